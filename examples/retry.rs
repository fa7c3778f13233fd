//! Shares a rate limit among many clients: retries after a 429, and waits so that few are needed.
//!
//! ```console
//! $ cargo run --example retry
//! ```
//!
//! The example always talks to a simulator of the API over TLS. Its windows last two seconds instead of a minute.

#[path = "support/hyper.rs"]
mod support;

use std::{process::ExitCode, time::Duration};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use tokio::{task::JoinSet, time::Instant};
use tower::{Service, ServiceBuilder, ServiceExt};
use tower_selam::{
    BoxError, RateLimit,
    retry::{RetryPolicy, ThrottleLayer},
    simulator::{Fault, Simulator},
};

use self::support::{
    Api, client,
    transcript::{finish, line, step, title},
};

const CLIENTS: usize = 20;
const CALLS: usize = 200;
const LIMIT: u64 = 60;
const WINDOW: Duration = Duration::from_secs(2);

#[tokio::main]
async fn main() -> ExitCode {
    finish(run().await)
}

async fn run() -> Result<(), BoxError> {
    title("tower-selam with retries and a shared rate limit");
    let api = Api::simulated().await?;
    let simulator = api.simulator().ok_or("there is no simulator")?;
    let client = client(&api)?;
    line("API", format_args!("a simulator at {}", api.base_url()));

    step("Refused request: it is sent again after the wait that the API told");
    simulator.inject(Fault::RateLimited { retry_after: Duration::from_secs(1) });
    let service = ServiceBuilder::new().retry(RetryPolicy::new()).layer(api.layer()).service(client.clone());
    let began = Instant::now();
    let response = service.oneshot(request(&api)?).await.map_err(tower_selam::Error::into_boxed)?;
    line("answer", format_args!("{} after {:.1?}", response.status(), began.elapsed()));
    if let Some(limit) = RateLimit::from_headers(response.headers()) {
        line(
            "limit",
            format_args!("{} of {} requests remain", limit.remaining.unwrap_or(0), limit.limit.unwrap_or(0)),
        );
    }
    check(response.status().is_success() && began.elapsed() >= Duration::from_secs(1), "it did not wait")?;

    step("Retries alone: each client finds out by its own 429 that the limit is used up");
    let policy = RetryPolicy::new().with_max_retries(10);
    let alone = ServiceBuilder::new().retry(policy).layer(api.layer()).service(client.clone());
    let (failed, _) = calls(&api, simulator, alone).await?;
    check(failed == 0, "a call failed")?;

    step("Retries and a throttle: requests wait until the window allows them");
    let throttled = ServiceBuilder::new()
        .retry(RetryPolicy::new())
        .layer(ThrottleLayer::new())
        .layer(api.layer())
        .service(client);
    let (failed, sent) = calls(&api, simulator, throttled).await?;
    check(failed == 0 && sent <= 220, "a call failed, or too many requests were sent")
}

fn request(api: &Api) -> Result<Request<Full<Bytes>>, BoxError> {
    let body = serde_json::json!({ "messages": [{ "role": "user", "content": "What does selam mean?" }] });
    Ok(Request::post(api.url("chat/completions")?).body(Full::from(body.to_string()))?)
}

/// Lets the clients make their calls. Returns how many failed, and how many requests the API received.
async fn calls<S, B, E>(api: &Api, simulator: &Simulator, service: S) -> Result<(usize, u64), BoxError>
where
    S: Service<Request<Full<Bytes>>, Response = Response<B>, Error = E, Future: Send>
        + Clone
        + Send
        + 'static,
    B: Send + 'static,
    E: Send + 'static,
{
    simulator.set_rate_limit_per(WINDOW, LIMIT);
    let (before, began) = (simulator.requests(), Instant::now());
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        let (service, request) = (service.clone(), request(api)?);
        clients.spawn(async move {
            let mut failed = 0;
            for _ in 0..CALLS / CLIENTS {
                let result = service.clone().oneshot(request.clone()).await;
                failed += usize::from(!result.is_ok_and(|response| response.status().is_success()));
            }
            failed
        });
    }
    let failed = clients.join_all().await.into_iter().sum();
    let sent = simulator.requests() - before;
    line("limit", format_args!("{LIMIT} requests in {WINDOW:?}"));
    line("calls", format_args!("{CALLS} by {CLIENTS} clients, {failed} failed, in {:.1?}", began.elapsed()));
    line("sent", format_args!("{sent} requests, {} of them refused", sent - (CALLS - failed) as u64));
    Ok((failed, sent))
}

fn check(holds: bool, otherwise: &'static str) -> Result<(), BoxError> {
    if holds { Ok(()) } else { Err(otherwise.into()) }
}
