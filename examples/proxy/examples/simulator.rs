//! Runs the library's SelamAPI simulator on a loopback port, to try the proxy without an account.
//!
//! ```console
//! $ cargo run --example simulator
//! $ cargo run --example simulator -- --ca simulator.pem    # over TLS, with HTTP/2
//! ```
//!
//! It prints the environment and the flags for the proxy.

use std::{path::PathBuf, time::Duration};

use tower_selam::{
    BoxError,
    simulator::{JwtAlgorithm, Server, Simulator},
};

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let mut arguments = std::env::args_os().skip(1);
    let ca = match (arguments.next(), arguments.next()) {
        (None, _) => None,
        (Some(flag), Some(path)) if flag == "--ca" => Some(PathBuf::from(path)),
        _ => return Err("usage: simulator [--ca FILE]".into()),
    };
    let simulator = Simulator::new();
    simulator.set_rate_limit(1_000_000);
    let (server, flags) = match ca {
        None => (Server::http(&simulator).await?, "--allow-insecure-loopback".to_owned()),
        Some(path) => {
            let server = Server::tls(&simulator).await?;
            std::fs::write(&path, server.ca_pem().unwrap_or_default())?;
            (server, format!("--ca {}", path.display()))
        }
    };
    let jwt = simulator.mint_jwt(JwtAlgorithm::Hs256, Duration::from_secs(24 * 60 * 60));
    println!("export SELAM_BASE_URL={}", server.base_url());
    println!("export SELAM_API_KEY={}", simulator.issue_key());
    println!("# For endpoints that need a JWT: export SELAM_JWT={jwt}");
    println!("# Then run:                      cargo run --release --example proxy -- {flags}");
    std::future::pending().await
}
