//! Refreshes two-second tokens under load, while the key is rotated and the token endpoint fails.
//!
//! ```console
//! $ cargo run --release --example refresh
//! ```
//!
//! The API is the crate's simulator, in process. `REFRESH_SECONDS` sets how long the load lasts (30 by default). The
//! last lines of a run:
//!
//! ```text
//! 2. Result
//!    requests   6001
//!    failed     0
//!    refreshes  35, each shared by all requests
//!    replays    1, after a 401 for a credential that was replaced meanwhile
//!    slowest    1.7ms
//! ```

#[path = "support/transcript.rs"]
mod transcript;

use std::{
    env, fs,
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

use self::transcript::{finish, line, step, title};

const REQUEST_INTERVAL: Duration = Duration::from_millis(5);
const TOKEN_LIFETIME: Duration = Duration::from_secs(2);
const OUTAGE: Duration = Duration::from_millis(600);

#[derive(Default)]
struct Tally {
    sent: AtomicU64,
    failed: AtomicU64,
    slowest_micros: AtomicU64,
}

#[tokio::main]
async fn main() -> ExitCode {
    finish(run().await)
}

async fn run() -> Result<(), BoxError> {
    let seconds = env::var("REFRESH_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(30);
    let duration = Duration::from_secs(seconds);
    let simulator = Simulator::new();
    simulator.set_rate_limit(u64::MAX);
    simulator.set_token_lifetime(TOKEN_LIFETIME);

    // The key is read from a file, as in a secret volume. The token endpoint issues JWTs in exchange for the key.
    let file = KeyFile::new()?;
    let first_key = simulator.issue_key();
    file.replace(&first_key)?;
    let keys: Refreshing<ApiKey> = Refreshing::new(FileSource::new(&file.0));
    let policy = RefreshPolicy::new().with_backoff(Duration::from_millis(100), Duration::from_secs(1));
    let endpoint =
        TokenEndpoint::new::<_, Full<Bytes>, _>("https://api.selamgpt.com/oauth/token", simulator.clone())?
            .with_client_auth(ClientAuth::api_key(&keys));
    let jwts = Refreshing::with_policy(OAuthSource::client_credentials(endpoint), policy);
    let layer = SelamLayer::builder().with_api_key(&keys).with_jwt(&jwts).build()?;
    let url = layer.base_url().endpoint("audio/agent/sessions")?;
    let selam = layer.layer(simulator.clone());
    jwts.prefetch().await?;

    title("tower-selam refreshing under load");
    line("API", "a simulator, in process");
    line("tokens", format_args!("live {TOKEN_LIFETIME:?}, from a token endpoint"));
    line("load", format_args!("one request every {REQUEST_INTERVAL:?} for {duration:?}"));

    step("Load: totals after each second");
    line("time", "requests  failed  refreshes");
    let tally = Arc::new(Tally::default());
    let mut requests = JoinSet::new();
    let mut ticks = interval(REQUEST_INTERVAL);
    let start = Instant::now();
    let mut second = 0;
    let (mut rotated, mut failing) = (false, false);
    while start.elapsed() < duration {
        ticks.tick().await;
        let request = Request::post(url.clone()).body(Full::from(r#"{"voice":"mekdes"}"#))?;
        requests.spawn(send(selam.clone(), request, Arc::clone(&tally)));
        while requests.try_join_next().is_some() {}

        let elapsed = start.elapsed();
        if !rotated && elapsed >= duration / 3 {
            rotated = true;
            let second_key = simulator.issue_key();
            file.replace(&second_key)?;
            simulator.revoke_key(&first_key);
            line("event", "the key was rotated in its file, and the old key revoked");
        }
        if !failing && elapsed >= duration * 2 / 3 {
            failing = true;
            line("event", format_args!("the token endpoint fails for {OUTAGE:?}"));
            let simulator = simulator.clone();
            simulator.set_token_outage(true);
            tokio::spawn(async move {
                sleep(OUTAGE).await;
                simulator.set_token_outage(false);
            });
        }
        if elapsed.as_secs() > second {
            second = elapsed.as_secs();
            let (sent, failed) = (tally.sent.load(Relaxed), tally.failed.load(Relaxed));
            let refreshes = refreshes(&simulator);
            line(&format!("{second} s"), format_args!("{sent:>8}  {failed:>6}  {refreshes:>9}"));
        }
    }
    while requests.join_next().await.is_some() {}

    let (sent, failed) = (tally.sent.load(Relaxed), tally.failed.load(Relaxed));
    // A replay is what the API received in addition to one request each.
    let replays = simulator.requests() - simulator.token_requests() - sent;
    step("Result");
    line("requests", sent);
    line("failed", failed);
    line("refreshes", format_args!("{}, each shared by all requests", refreshes(&simulator)));
    line("replays", format_args!("{replays}, after a 401 for a credential that was replaced meanwhile"));
    line("slowest", format_args!("{:.1?}", Duration::from_micros(tally.slowest_micros.load(Relaxed))));
    if failed == 0 { Ok(()) } else { Err(format!("{failed} of {sent} requests failed").into()) }
}

async fn send<S>(selam: S, request: Request<Full<Bytes>>, tally: Arc<Tally>)
where
    S: Service<Request<Full<Bytes>>, Error: std::fmt::Display>,
{
    let start = Instant::now();
    tally.sent.fetch_add(1, Relaxed);
    if let Err(error) = selam.oneshot(request).await {
        tally.failed.fetch_add(1, Relaxed);
        line("failed", error);
    }
    let micros = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
    tally.slowest_micros.fetch_max(micros, Relaxed);
}

/// Counts requests to the token endpoint; the first one fetched the initial token.
fn refreshes(simulator: &Simulator) -> u64 {
    simulator.token_requests() - 1
}

/// A temporary file with the key, replaced atomically.
struct KeyFile(PathBuf);

impl KeyFile {
    fn new() -> Result<Self, BoxError> {
        let directory = env::temp_dir().join(format!("tower-selam-refresh-{}", std::process::id()));
        fs::create_dir(&directory)?;
        Ok(Self(directory.join("api-key")))
    }

    fn replace(&self, key: &str) -> Result<(), BoxError> {
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
