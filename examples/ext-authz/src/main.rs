//! Serves the authorization service; see `README.md`.
//!
//! ```console
//! $ SELAM_API_KEY=sk-selam-… CALLERS="web:3b1fa5c0e2f94c2e" cargo run -p example-ext-authz
//! listening on http://127.0.0.1:9191
//! ```

use std::{env, net::SocketAddr, path::PathBuf, process::ExitCode};

use example_ext_authz::{Authorizer, Callers};
use tokio::net::TcpListener;
use tower_selam::{BoxError, PerSubject, SelamLayer, Subject, source::FileSource};

const USAGE: &str = "usage: example-ext-authz [--listen ADDRESS:PORT] [--dangerous-listen-remote]";

#[tokio::main]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("example-ext-authz: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<(), BoxError> {
    let (mut listen, mut remote) = (SocketAddr::from(([127, 0, 0, 1], 9191)), false);
    let mut arguments = env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match &*argument {
            "--listen" => listen = arguments.next().ok_or(USAGE)?.parse().map_err(|_| USAGE)?,
            "--dangerous-listen-remote" => remote = true,
            _ => return Err(USAGE.into()),
        }
    }
    // Whoever has a caller's token and can connect gets our credentials.
    if !listen.ip().is_loopback() && !remote {
        return Err("--listen is not a loopback address; add --dangerous-listen-remote to allow that".into());
    }
    let callers = Callers::parse(&env::var("CALLERS").map_err(|_| "CALLERS is not set: NAME:TOKEN …")?)?;

    // `SELAM_JWT_FOLDER` has a file for each caller, which its login service replaces before the JWT expires.
    let builder = SelamLayer::builder().allow_insecure_loopback();
    let authorizer = match env::var_os("SELAM_JWT_FOLDER").map(PathBuf::from) {
        None => Authorizer::new(builder.build_with_env()?, callers),
        Some(folder) => {
            let jwts = PerSubject::new(move |caller: &Subject| FileSource::new(folder.join(caller.as_str())));
            Authorizer::new(builder.with_jwt(jwts).build_with_env()?, callers).per_caller()
        }
    };
    let listener = TcpListener::bind(listen).await?;
    println!("listening on http://{}", listener.local_addr()?);
    Ok(axum::serve(listener, authorizer.router()).await?)
}
