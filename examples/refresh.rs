//! Tokens that live two seconds, under a steady load for half a minute. In between, the key is rotated and the token
//! endpoint is out of order; no request notices.
//!
//! ```console
//! $ cargo run --release --example refresh
//! ```
//!
//! The API is this crate's simulator, in process. `REFRESH_SECONDS` sets how long it takes.

#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use std::{
    env, fs,
    io::Write as _,
    path::PathBuf,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use tokio::{
    task::JoinSet,
    time::{Instant, interval, sleep},
};
use tower::{Layer, Service, ServiceExt};
use tower_selam::{
    ApiKey, BoxError, RefreshPolicy, Refreshing, SelamLayer,
    oauth::{ClientAuth, OAuthSource, TokenEndpoint},
    simulator::Simulator,
    source::FileSource,
};

const EVERY: Duration = Duration::from_millis(5);
const TOKEN_LIFETIME: Duration = Duration::from_secs(2);
const OUTAGE: Duration = Duration::from_millis(600);

#[derive(Default)]
struct Tally {
    sent: AtomicU64,
    failed: AtomicU64,
    longest_micros: AtomicU64,
}

#[tokio::main]
async fn main() -> Result<ExitCode, BoxError> {
    let seconds = env::var("REFRESH_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(30);
    let simulator = Simulator::new();
    simulator.set_rate_limit(u64::MAX);
    simulator.set_token_lifetime(TOKEN_LIFETIME);

    // The key lies in a file, as in a secret volume; the JWT comes from a token endpoint that takes the key.
    let file = KeyFile::new()?;
    let first = simulator.issue_key();
    file.write(&first)?;
    let keys: Refreshing<ApiKey> = Refreshing::new(FileSource::new(&file.0));
    let policy = RefreshPolicy::new().with_backoff(Duration::from_millis(100), Duration::from_secs(1));
    let endpoint =
        TokenEndpoint::new::<_, Full<Bytes>, _>("https://api.selamgpt.com/oauth/token", simulator.clone())?
            .with_client_auth(ClientAuth::api_key(&keys));
    let jwts = Refreshing::with_policy(OAuthSource::client_credentials(endpoint), policy);
    let layer = SelamLayer::builder().with_api_key(&keys).with_jwt(&jwts).build()?;
    let uri = layer.base_url().endpoint("audio/agent/sessions")?;
    let selam = layer.layer(simulator.clone());
    jwts.prefetch().await?;

    println!("{seconds} seconds of a request every {EVERY:?}, with tokens that live {TOKEN_LIFETIME:?}.");
    let tally = Arc::new(Tally::default());
    let mut requests = JoinSet::new();
    let mut beat = interval(EVERY);
    let began = Instant::now();
    let mut shown = 0;
    let (mut rotated, mut broke) = (false, false);
    while began.elapsed() < Duration::from_secs(seconds) {
        beat.tick().await;
        let request = Request::post(uri.clone()).body(Full::from(r#"{"voice":"mekdes"}"#))?;
        requests.spawn(send(selam.clone(), request, Arc::clone(&tally)));
        while requests.try_join_next().is_some() {}

        let elapsed = began.elapsed();
        if !rotated && elapsed >= Duration::from_secs(seconds) / 3 {
            rotated = true;
            let second = simulator.issue_key();
            file.write(&second)?;
            simulator.revoke_key(&first);
            println!("\n  the key was rotated, and the old one revoked");
        }
        if !broke && elapsed >= Duration::from_secs(seconds) * 2 / 3 {
            broke = true;
            println!("\n  the token endpoint is out of order for {OUTAGE:?}");
            let simulator = simulator.clone();
            simulator.set_token_outage(true);
            tokio::spawn(async move {
                sleep(OUTAGE).await;
                simulator.set_token_outage(false);
            });
        }
        if elapsed.as_secs() > shown {
            shown = elapsed.as_secs();
            show(shown, &simulator, &tally);
        }
    }
    while requests.join_next().await.is_some() {}

    let (sent, failed) = (tally.sent.load(Relaxed), tally.failed.load(Relaxed));
    println!("\n\nrequests sent  {sent:>8}");
    println!("failed         {failed:>8}");
    println!("renewals       {:>8}", simulator.token_requests() - 1);
    println!("replays        {:>8}", replays(&simulator, sent));
    println!("longest wait   {:>8.1?}", Duration::from_micros(tally.longest_micros.load(Relaxed)));
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn send<S>(selam: S, request: Request<Full<Bytes>>, tally: Arc<Tally>)
where
    S: Service<Request<Full<Bytes>>, Error: std::fmt::Display>,
{
    let began = Instant::now();
    tally.sent.fetch_add(1, Relaxed);
    if let Err(error) = selam.oneshot(request).await {
        tally.failed.fetch_add(1, Relaxed);
        println!("\n  failed: {error}");
    }
    let micros = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
    tally.longest_micros.fetch_max(micros, Relaxed);
}

fn show(second: u64, simulator: &Simulator, tally: &Tally) {
    let (sent, failed) = (tally.sent.load(Relaxed), tally.failed.load(Relaxed));
    let renewals = simulator.token_requests() - 1;
    print!("\r{second:>4} s: {sent:>6} requests, {failed} failed, {renewals} renewals");
    let _ = std::io::stdout().flush();
}

/// What the API got beyond one for each request.
fn replays(simulator: &Simulator, sent: u64) -> u64 {
    simulator.requests() - simulator.token_requests() - sent
}

/// A file of this run's own, replaced atomically.
struct KeyFile(PathBuf);

impl KeyFile {
    fn new() -> Result<Self, BoxError> {
        let directory = env::temp_dir().join(format!("tower-selam-refresh-{}", std::process::id()));
        fs::create_dir(&directory)?;
        Ok(Self(directory.join("api-key")))
    }

    fn write(&self, key: &str) -> Result<(), BoxError> {
        let next = self.0.with_extension("next");
        fs::write(&next, key)?;
        Ok(fs::rename(next, &self.0)?)
    }
}

impl Drop for KeyFile {
    fn drop(&mut self) {
        if let Some(directory) = self.0.parent() {
            let _ = fs::remove_dir_all(directory);
        }
    }
}
