//! Serves the proxy:
//!
//! ```console
//! $ SELAM_API_KEY=sk-selam-… GATEWAY_TOKEN=… cargo run --release -p example-pingora -- 127.0.0.1:6188
//! $ curl http://127.0.0.1:6188/v1/chat/completions -H "authorization: Bearer $GATEWAY_TOKEN" \
//!     -H 'content-type: application/json' -d '{"messages":[{"role":"user","content":"Selam!"}]}'
//! ```
//!
//! The credentials come from the environment, as for any `SelamLayer`. `RUST_LOG=warn` shows rejected requests.

use std::{env, process::ExitCode};

use example_pingora::Gateway;
use pingora::{proxy::http_proxy_service, server::Server};
use tokio::runtime::Builder;
use tower_selam::{BoxError, SelamLayer};

fn main() -> ExitCode {
    let Err(error) = run();
    eprintln!("example-pingora: {error}");
    ExitCode::FAILURE
}

fn run() -> Result<std::convert::Infallible, BoxError> {
    env_logger::init();
    let listen = env::args().nth(1).unwrap_or_else(|| "127.0.0.1:6188".to_owned());
    let token = env::var("GATEWAY_TOKEN").map_err(|_| "GATEWAY_TOKEN is not set")?;
    if token.len() < 16 {
        return Err("GATEWAY_TOKEN has fewer than 16 characters".into());
    }
    let selam = SelamLayer::builder().allow_insecure_loopback().build_with_env()?;
    // Before the first caller comes: a credential that cannot be fetched ends the program.
    Builder::new_current_thread().enable_all().build()?.block_on(selam.prefetch())?;

    let mut server = Server::new(None)?;
    server.bootstrap();
    let mut service = http_proxy_service(&server.configuration, Gateway::new(selam, &token)?);
    service.add_tcp(&listen);
    server.add_service(service);
    server.run_forever()
}
