//! What is counted, and the line that is logged for each request.
//!
//! The library counts what becomes of credentials (`tower_selam_…`); here is what becomes of requests (`selam_proxy_…`).
//! The README has a table of both.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use axum::{
    body::{Body, Bytes},
    http::{HeaderMap, Method, StatusCode},
    response::Response,
};
use http_body::{Body as _, Frame, SizeHint};
use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::time::{self, Duration, Instant};
use tower_selam::{RateLimit, telemetry};

use crate::{callers::Name, config, reply::Refusal};

const REQUESTS: &str = "selam_proxy_requests_total";
const REFUSALS: &str = "selam_proxy_refusals_total";
const BROKEN: &str = "selam_proxy_broken_off_total";
const RUNNING: &str = "selam_proxy_requests_running";
const SECONDS: &str = "selam_proxy_request_seconds";
const LIMIT: &str = "selam_proxy_rate_limit";
const REMAINING: &str = "selam_proxy_rate_limit_remaining";
const UPTIME: &str = "selam_proxy_uptime_seconds";
const RESET: &str = "selam_proxy_rate_limit_reset_seconds";

/// A caller whose name is not known: for labels.
const UNKNOWN: &str = "unknown";

/// From a quick answer to a long stream.
const BUCKETS: [f64; 10] = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0, 120.0, 600.0];

/// Begins to count.
///
/// # Errors
///
/// When something else in this process counts already.
pub fn install() -> Result<Metrics, config::Error> {
    let wrong = |error: &dyn std::fmt::Display| config::Error::new(format!("metrics: {error}"));
    let recorder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Full(SECONDS.to_owned()), &BUCKETS)
        .map_err(|error| wrong(&error))?
        .build_recorder();
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder).map_err(|error| wrong(&error))?;

    telemetry::describe_metrics();
    describe_counter!(
        REQUESTS,
        "Requests, by the class of the status that the caller got, and whose answer it was"
    );
    describe_counter!(REFUSALS, "Requests that the proxy answered itself, by why");
    describe_counter!(BROKEN, "Requests that did not come to their end, by the side that left");
    describe_gauge!(RUNNING, "Requests, streams and upgraded connections that are under way");
    describe_histogram!(SECONDS, "From a request's head to the last byte of its answer");
    describe_gauge!(LIMIT, "Requests that the account may make in a window, as the API said last");
    describe_gauge!(REMAINING, "Requests that are left in the window, as the API said last");
    describe_gauge!(RESET, "Seconds from then to the end of the window, as the API said last");
    describe_gauge!(UPTIME, "Seconds since the proxy began");
    gauge!(RUNNING).set(0.0);
    // What counts up from nothing is not seen to rise.
    for side in ["api", "caller"] {
        counter!(BROKEN, "by" => side).absolute(0);
    }
    for refusal in [Refusal::MissingToken, Refusal::InvalidToken] {
        counter!(REFUSALS, "reason" => refusal.name(), "caller" => UNKNOWN).absolute(0);
    }

    let upkeep = handle.clone();
    tokio::spawn(async move {
        let mut ticks = time::interval(Duration::from_secs(5));
        loop {
            ticks.tick().await;
            upkeep.run_upkeep();
        }
    });
    Ok(Metrics { handle, began: Instant::now() })
}

/// What was counted so far.
#[derive(Clone)]
pub struct Metrics {
    handle: PrometheusHandle,
    began: Instant,
}

impl Metrics {
    /// In Prometheus' text format.
    pub fn render(&self) -> String {
        gauge!(UPTIME).set(self.began.elapsed().as_secs_f64());
        self.handle.render()
    }
}

/// What the API says of the account's rate limit.
pub fn rate_limit(headers: &HeaderMap) {
    let Some(told) = RateLimit::from_headers(headers) else { return };
    // No limit is so large that its digits get lost.
    let set = |name: &'static str, value: Option<u64>| value.map(|value| gauge!(name).set(value as f64));
    set(LIMIT, told.limit);
    set(REMAINING, told.remaining);
    if let Some(wait) = told.reset_after {
        gauge!(RESET).set(wait.as_secs_f64());
    }
}

/// One request, from its head to the last byte of its answer. Counted and logged when it is dropped.
#[derive(Debug)]
pub struct Watch {
    began: Instant,
    method: Method,
    /// Without the query, which may hold secrets.
    path: String,
    caller: Option<Name>,
    answer: Option<(StatusCode, Option<Refusal>)>,
    bytes: u64,
    end: End,
}

/// How far it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// If it is dropped now, the caller has left.
    Open,
    Complete,
    UpstreamLeft,
}

impl Watch {
    pub fn new(method: &Method, path: &str) -> Self {
        gauge!(RUNNING).increment(1.0);
        Self {
            began: Instant::now(),
            method: method.clone(),
            path: path.to_owned(),
            caller: None,
            answer: None,
            bytes: 0,
            end: End::Open,
        }
    }

    pub fn set_caller(&mut self, caller: Name) {
        self.caller = Some(caller);
    }

    /// Counts the answer and goes along with its body.
    pub fn answered(mut self, response: Response) -> Response {
        self.count(&response);
        if response.body().is_end_stream() || self.method == Method::HEAD {
            self.end = End::Complete;
        }
        response.map(|body| Body::new(Watched { body, watch: self }))
    }

    /// Counts the answer, of which there is more to come on the connection itself.
    pub fn upgraded(mut self, response: &Response) -> Self {
        self.count(response);
        self
    }

    /// What went to the caller over the upgraded connection, when both sides are done.
    pub fn hung_up(mut self, bytes: u64) {
        self.bytes = bytes;
        self.end = End::Complete;
    }

    fn count(&mut self, response: &Response) {
        let refusal = response.extensions().get::<Refusal>().copied();
        let status = response.status();
        let caller = self.caller();
        let class = match status.as_u16() / 100 {
            1 => "1xx",
            2 => "2xx",
            3 => "3xx",
            4 => "4xx",
            _ => "5xx",
        };
        let by = if refusal.is_some() { "proxy" } else { "api" };
        counter!(REQUESTS, "status" => class, "by" => by, "caller" => caller.clone()).increment(1);
        if let Some(refusal) = refusal {
            counter!(REFUSALS, "reason" => refusal.name(), "caller" => caller).increment(1);
        }
        self.answer = Some((status, refusal));
    }

    /// A label that only the operator's own names can be.
    fn caller(&self) -> String {
        self.caller.as_deref().unwrap_or(UNKNOWN).to_owned()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        gauge!(RUNNING).decrement(1.0);
        let took = self.began.elapsed();
        histogram!(SECONDS).record(took.as_secs_f64());
        let end = match self.end {
            End::Complete => "complete",
            End::Open => "caller left",
            End::UpstreamLeft => "api broke off",
        };
        match self.end {
            End::Complete => {}
            End::Open => counter!(BROKEN, "by" => "caller").increment(1),
            End::UpstreamLeft => counter!(BROKEN, "by" => "api").increment(1),
        }
        let (status, refusal) = self.answer.unzip();
        tracing::info!(
            method = %self.method,
            path = self.path,
            caller = self.caller.as_deref(),
            status = status.map(|status| status.as_u16()),
            refused = refusal.flatten().map(Refusal::name),
            bytes = self.bytes,
            ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
            end,
            "request"
        );
    }
}

/// The body of an answer, and how far it came.
///
/// It tells no size: a `Content-Length` is the API's to say, and axum would add one where a `HEAD` or a 304 has none.
struct Watched {
    body: Body,
    watch: Watch,
}

impl http_body::Body for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                self.watch.bytes += frame.data_ref().map_or(0, |data| data.len() as u64);
                // Nothing comes after trailers, and nobody may ask.
                if frame.is_trailers() || self.body.is_end_stream() {
                    self.watch.end = End::Complete;
                }
            }
            Poll::Ready(Some(Err(_))) => self.watch.end = End::UpstreamLeft,
            Poll::Ready(None) => self.watch.end = End::Complete,
            Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}
