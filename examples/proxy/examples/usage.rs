//! Reports the proxy's usage by caller, and unusual activity.
//!
//! ```console
//! $ cargo run --example usage -- http://127.0.0.1:8080/metrics               # since the proxy started
//! $ cargo run --example usage -- http://127.0.0.1:8080/metrics --for 60      # during the next minute
//! $ cargo run --example usage -- monday.txt tuesday.txt --for 86400          # between two snapshots, a day apart
//! ```
//!
//! If `/metrics` needs a token, set `SELAM_PROXY_TOKEN`. See `README.md`.

use std::{process::ExitCode, time::Duration};

use axum::body::Body;
use example_proxy::usage::{Report, Snapshot};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tower_selam::BoxError;

const USAGE: &str = "usage: usage SOURCE [LATER] [--for SECONDS]\n\n\
    SOURCE   the proxy's http://…/metrics, or a file with a snapshot of it\n\
    LATER    a second snapshot, to compare with the first\n\
    --for    seconds between the two; without LATER, fetch SOURCE again after this time";

#[tokio::main]
async fn main() -> ExitCode {
    let message = match arguments() {
        Ok((sources, time)) => match report(&sources, time).await {
            Ok(report) => {
                print!("{report}");
                return ExitCode::SUCCESS;
            }
            Err(error) => format!("usage: {error}"),
        },
        Err(message) => message,
    };
    eprintln!("{message}");
    ExitCode::from(2)
}

async fn report(sources: &[String], time: Option<Duration>) -> Result<Report, BoxError> {
    let first = read(&sources[0]).await?;
    Ok(match (sources.get(1), time) {
        (Some(later), time) => Report::between(&first, read(later).await?, time.unwrap_or_default()),
        (None, Some(time)) => {
            eprintln!("fetching again in {} s …", time.as_secs());
            tokio::time::sleep(time).await;
            Report::between(&first, read(&sources[0]).await?, time)
        }
        (None, None) => Report::of(first),
    })
}

fn arguments() -> Result<(Vec<String>, Option<Duration>), String> {
    use lexopt::{Arg, ValueExt};

    let mut parser = lexopt::Parser::from_env();
    let (mut sources, mut time) = (Vec::new(), None);
    while let Some(argument) = parser.next().map_err(|error| error.to_string())? {
        match argument {
            Arg::Value(source) if sources.len() < 2 => {
                sources.push(source.string().map_err(|error| error.to_string())?);
            }
            Arg::Long("for") => {
                let seconds: u64 = parser
                    .value()
                    .and_then(|value| value.parse())
                    .map_err(|error| format!("--for: {error}"))?;
                if seconds == 0 {
                    return Err("--for: the time must be at least 1 second".to_owned());
                }
                time = Some(Duration::from_secs(seconds));
            }
            _ => return Err(USAGE.to_owned()),
        }
    }
    match (sources.len(), time) {
        (0, _) => Err(USAGE.to_owned()),
        (2, None) => Err("two snapshots need --for SECONDS, the time between them".to_owned()),
        _ => Ok((sources, time)),
    }
}

async fn read(source: &str) -> Result<Snapshot, BoxError> {
    let failed = |error: BoxError| -> BoxError { format!("{source}: {error}").into() };
    let text = if source.starts_with("http://") {
        fetch(source).await.map_err(failed)?
    } else {
        std::fs::read_to_string(source).map_err(|error| failed(error.into()))?
    };
    let snapshot = Snapshot::parse(&text);
    if snapshot.is_empty() { Err(failed("contains no metrics".into())) } else { Ok(snapshot) }
}

async fn fetch(url: &str) -> Result<String, BoxError> {
    let client = Client::builder(TokioExecutor::new()).build_http::<Body>();
    let mut request = hyper::Request::get(url);
    if let Ok(token) = std::env::var("SELAM_PROXY_TOKEN")
        && !token.is_empty()
    {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    let response = client.request(request.body(Body::empty())?).await?;
    if !response.status().is_success() {
        return Err(format!("answered {}", response.status()).into());
    }
    let body = axum::body::to_bytes(Body::new(response.into_body()), 16 * 1024 * 1024).await?;
    Ok(String::from_utf8(body.into())?)
}
