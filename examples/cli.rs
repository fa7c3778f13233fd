//! Prints an access token and ends, as a command-line program does whose user stays logged in.
//!
//! ```console
//! $ cargo run --example cli
//! ```
//!
//! Without `SELAM_TOKEN_URL` it shows how a login survives: it starts a simulator of the API, and then itself several times as
//! separate processes, the last four at once. With it, it is one such program:
//!
//! ```console
//! $ SELAM_TOKEN_URL=https://… SELAM_CLIENT_ID=my-app SELAM_REFRESH_TOKEN=… cargo run --example cli -- ~/.local/state/my-app/login
//! ```
//!
//! The refresh token is needed for the first run only. Each run spends the one in the file, and saves the next there before it
//! prints the access token.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "the program prints a token")]

#[path = "support/transcript.rs"]
mod transcript;

use std::{
    env, fs,
    process::{Command, ExitCode, Stdio},
};

use bytes::Bytes;
use http_body_util::Full;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tower_selam::{
    BoxError, Refreshing,
    env::{SELAM_CLIENT_ID, SELAM_TOKEN_URL},
    oauth::{ClientAuth, FileStore, OAuthSource, RefreshToken, TokenEndpoint},
    simulator::{Server, Simulator},
};

use self::transcript::{finish, line, step, title};

const SELAM_REFRESH_TOKEN: &str = "SELAM_REFRESH_TOKEN";

fn main() -> ExitCode {
    let Ok(url) = env::var(SELAM_TOKEN_URL) else { return finish(demonstrate()) };
    match print_token(&url) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            let mut source = error.source();
            while let Some(cause) = source {
                eprintln!("  caused by: {cause}");
                source = cause.source();
            }
            ExitCode::FAILURE
        }
    }
}

/// The program proper.
#[tokio::main(flavor = "current_thread")]
async fn print_token(url: &str) -> Result<(), BoxError> {
    let file = env::args_os().nth(1).ok_or("name the file that keeps the login")?;
    let mut store = FileStore::new(file);
    if let Ok(first) = env::var(SELAM_REFRESH_TOKEN) {
        store = store.with_initial(RefreshToken::new(first)?);
    }
    let client_id = env::var(SELAM_CLIENT_ID).unwrap_or("tower-selam-cli".to_owned());
    let endpoint = endpoint(url)?.with_client_auth(ClientAuth::public(client_id)?);
    let jwts = Refreshing::new(OAuthSource::refresh_token(endpoint, store));
    println!("{}", jwts.token().await?.expose_secret());
    Ok(())
}

fn endpoint(url: &str) -> Result<TokenEndpoint, BoxError> {
    let client = Client::builder(TokioExecutor::new());
    if url.starts_with("http:") {
        // The simulator, or another server on this machine.
        return Ok(TokenEndpoint::allow_insecure_loopback(url, client.build_http::<Full<Bytes>>())?);
    }
    let tls = hyper_rustls::HttpsConnectorBuilder::new().with_native_roots()?.https_only().enable_http1();
    Ok(TokenEndpoint::new(url, client.build::<_, Full<Bytes>>(tls.build()))?)
}

/// Runs the program proper against a simulator, which revokes a login when a refresh token is used twice.
#[tokio::main]
async fn demonstrate() -> Result<(), BoxError> {
    title("tower-selam: a login that survives");
    let simulator = Simulator::new();
    let server = Server::http(&simulator).await?;
    let url = format!("http://{}/oauth/token", server.local_addr());
    let directory = env::temp_dir().join(format!("tower-selam-cli-{}", std::process::id()));
    let program = env::current_exe()?;
    let first = simulator.issue_refresh_token();
    let start = || {
        let mut command = Command::new(&program);
        command.arg(directory.join("login")).env(SELAM_TOKEN_URL, &url).env(SELAM_REFRESH_TOKEN, &first);
        command.stdout(Stdio::piped()).spawn()
    };

    let mut tokens = Vec::new();
    for (text, runs, at_once) in [("Three runs in a row", 3, 1), ("Four runs at once", 1, 4)] {
        step(text);
        for _ in 0..runs {
            let programs = (0..at_once).map(|_| start()).collect::<Result<Vec<_>, _>>()?;
            for program in programs {
                let output = program.wait_with_output()?;
                let token = String::from_utf8(output.stdout)?;
                if !output.status.success() || tokens.contains(&token) {
                    return Err("a run printed no new token".into());
                }
                line("token", format_args!("{}…", token.get(..20).unwrap_or(&token)));
                tokens.push(token);
            }
        }
    }

    step("The login");
    line("file", directory.join("login").display());
    line("runs", tokens.len());
    line("exchanges", simulator.token_requests());
    line("reused", format_args!("{} refresh tokens", simulator.reused_refresh_tokens()));
    let newest = fs::read_to_string(directory.join("login"))?;
    fs::remove_dir_all(&directory)?;
    if simulator.reused_refresh_tokens() > 0 || !simulator.is_refresh_token_valid(newest.trim_end()) {
        return Err("the login did not survive".into());
    }
    Ok(())
}
