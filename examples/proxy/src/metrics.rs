//! Counts requests, and logs one line for each.
//!
//! The library counts what happens to credentials (`tower_selam_…`); this module counts requests (`selam_proxy_…`). The
//! README has a table of both.

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
use tower_selam::{RateLimit, telemetry, verify::VerifyError};

use crate::{callers::Identity, config, reply::Refusal, voice};

const REQUESTS: &str = "selam_proxy_requests_total";
const REFUSALS: &str = "selam_proxy_refusals_total";
const ABORTED: &str = "selam_proxy_broken_off_total";
const IN_FLIGHT: &str = "selam_proxy_requests_running";
pub(crate) const CONNECTIONS: &str = "selam_proxy_connections";
const SECONDS: &str = "selam_proxy_request_seconds";
const LIMIT: &str = "selam_proxy_rate_limit";
const REMAINING: &str = "selam_proxy_rate_limit_remaining";
const RESET: &str = "selam_proxy_rate_limit_reset_seconds";
const UPTIME: &str = "selam_proxy_uptime_seconds";
const VOICE_HANDSHAKES: &str = "selam_proxy_voice_handshakes_total";
const VOICE_SESSIONS: &str = "selam_proxy_voice_sessions";
const VOICE_PACKETS: &str = "selam_proxy_voice_refused_packets_total";

/// The `caller` label of requests without a valid token.
const UNKNOWN: &str = "unknown";

/// How much of what a caller chose is logged, in bytes.
const LOGGED_METHOD: usize = 16;
const LOGGED_PATH: usize = 256;
pub const LOGGED_ERROR: usize = 512;

/// From a quick answer to a long stream.
const BUCKETS: [f64; 10] = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0, 120.0, 600.0];

/// Installs the process's metrics recorder.
///
/// # Errors
///
/// Another recorder is installed already.
pub fn install() -> Result<Metrics, config::Error> {
    let failed = |error: &dyn std::fmt::Display| config::Error::new(format!("metrics: {error}"));
    let recorder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Full(SECONDS.to_owned()), &BUCKETS)
        .map_err(|error| failed(&error))?
        .build_recorder();
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder).map_err(|error| failed(&error))?;

    telemetry::describe_metrics();
    describe_counter!(
        REQUESTS,
        "Answered requests by status class, caller, and whether API or proxy answered"
    );
    describe_counter!(REFUSALS, "Requests that the proxy answered itself, by reason");
    describe_counter!(ABORTED, "Requests that ended early, by the side that disconnected");
    describe_gauge!(IN_FLIGHT, "Requests, streams and upgraded connections in flight");
    describe_gauge!(CONNECTIONS, "Connections of callers, idle ones included");
    describe_histogram!(SECONDS, "Time from the head of a request to the last byte of its response");
    describe_gauge!(LIMIT, "Requests that the account may make per window, from the API's last response");
    describe_gauge!(REMAINING, "Requests left in the window, from the API's last response");
    describe_gauge!(RESET, "Seconds from the API's last response to the end of the window");
    describe_gauge!(UPTIME, "Seconds since the proxy started");
    gauge!(IN_FLIGHT).set(0.0);
    gauge!(CONNECTIONS).set(0.0);
    // Prometheus sees no increase in a counter whose first sample is not zero.
    for side in ["api", "caller"] {
        counter!(ABORTED, "by" => side).absolute(0);
    }
    let refusals = [
        Refusal::MissingToken,
        Refusal::InvalidToken,
        Refusal::InvalidJwt(VerifyError::Malformed),
        Refusal::ExpiredJwt,
        Refusal::OriginNotAllowed,
    ];
    for refusal in refusals {
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
    Ok(Metrics { handle, started: Instant::now() })
}

/// Begins to show the metrics of the voice agent.
pub fn describe_voice() {
    describe_counter!(VOICE_HANDSHAKES, "Handshakes of the voice agent's clients, by transport");
    describe_gauge!(VOICE_SESSIONS, "Sessions of the voice agent that are open");
    describe_counter!(VOICE_PACKETS, "Packets of the voice agent that did not pass, by sender and reason");
    set_voice_sessions(0);
    for transport in ["polling", "websocket"] {
        counter!(VOICE_HANDSHAKES, "transport" => transport).absolute(0);
    }
    for (side, fault) in voice::packet_faults() {
        counter!(VOICE_PACKETS, "from" => side, "reason" => fault).absolute(0);
    }
}

pub fn count_voice_handshake(transport: &'static str) {
    counter!(VOICE_HANDSHAKES, "transport" => transport).increment(1);
}

pub fn set_voice_sessions(open: usize) {
    gauge!(VOICE_SESSIONS).set(open as f64);
}

pub fn count_voice_packet(from: &'static str, reason: &'static str) {
    counter!(VOICE_PACKETS, "from" => from, "reason" => reason).increment(1);
}

/// Access to the recorded metrics.
#[derive(Clone)]
pub struct Metrics {
    handle: PrometheusHandle,
    started: Instant,
}

impl Metrics {
    /// Renders all metrics in the Prometheus text format.
    pub fn render(&self) -> String {
        gauge!(UPTIME).set(self.started.elapsed().as_secs_f64());
        self.handle.render()
    }
}

/// Records the account's rate limit as reported by these response headers.
pub fn record_rate_limit(headers: &HeaderMap) {
    let Some(rate_limit) = RateLimit::from_headers(headers) else { return };
    // Rate limits are far below 2^53, where `f64` begins to lose digits.
    let set = |name: &'static str, value: Option<u64>| value.map(|value| gauge!(name).set(value as f64));
    set(LIMIT, rate_limit.limit);
    set(REMAINING, rate_limit.remaining);
    if let Some(wait) = rate_limit.reset_after {
        gauge!(RESET).set(wait.as_secs_f64());
    }
}

/// Tracks one request from its head to the last byte of its response. Counts and logs it when dropped.
#[derive(Debug)]
pub struct RequestTracker {
    started: Instant,
    method: String,
    /// Without the query, which may contain secrets.
    path: String,
    is_head: bool,
    caller: Option<Identity>,
    answer: Option<(StatusCode, Option<Refusal>)>,
    bytes: u64,
    outcome: Outcome,
}

/// How a request ended, if its tracker were dropped now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    CallerLeft,
    Complete,
    Idle,
    ApiFailed,
}

impl RequestTracker {
    pub fn new(method: &Method, path: &str) -> Self {
        gauge!(IN_FLIGHT).increment(1.0);
        Self {
            started: Instant::now(),
            method: shorten(method.as_str(), LOGGED_METHOD),
            path: shorten(path, LOGGED_PATH),
            is_head: method == Method::HEAD,
            caller: None,
            answer: None,
            bytes: 0,
            outcome: Outcome::CallerLeft,
        }
    }

    pub fn set_caller(&mut self, caller: Identity) {
        self.caller = Some(caller);
    }

    /// Counts the response, and tracks its body to the end.
    pub fn track_response(mut self, response: Response) -> Response {
        self.count(&response);
        if response.body().is_end_stream() || self.is_head {
            self.outcome = Outcome::Complete;
        }
        response.map(|body| Body::new(TrackedBody { body, tracker: self }))
    }

    /// Counts the response that upgrades the connection. The request lasts until [`upgrade_closed`](Self::upgrade_closed).
    pub fn track_upgrade(mut self, response: &Response) -> Self {
        self.count(response);
        self
    }

    /// Completes an upgraded connection over which the caller received this many bytes.
    pub fn upgrade_closed(mut self, bytes: u64) {
        self.bytes = bytes;
        self.outcome = Outcome::Complete;
    }

    /// Ends an upgraded connection that was idle for too long.
    pub fn upgrade_idle(mut self) {
        self.outcome = Outcome::Idle;
    }

    fn count(&mut self, response: &Response) {
        let refusal = response.extensions().get::<Refusal>().copied();
        let status = response.status();
        // Only names of client tokens and groups become labels, so their number is bounded. Users do not.
        let caller = self.caller.as_ref().map_or(UNKNOWN, |caller| &*caller.name).to_owned();
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
}

impl Drop for RequestTracker {
    fn drop(&mut self) {
        gauge!(IN_FLIGHT).decrement(1.0);
        let elapsed = self.started.elapsed();
        histogram!(SECONDS).record(elapsed.as_secs_f64());
        let (end, aborted_by) = match self.outcome {
            Outcome::Complete => ("complete", None),
            Outcome::Idle => ("idle", None),
            Outcome::CallerLeft => ("caller left", Some("caller")),
            Outcome::ApiFailed => ("api broke off", Some("api")),
        };
        if let Some(side) = aborted_by {
            counter!(ABORTED, "by" => side).increment(1);
        }
        let (status, refusal) = self.answer.unzip();
        let refusal = refusal.flatten();
        tracing::info!(
            method = %self.method,
            path = self.path,
            caller = self.caller.as_ref().map(|caller| &*caller.name),
            user = self.caller.as_ref().and_then(|caller| caller.user.as_ref()?.logged.as_deref()),
            status = status.map(|status| status.as_u16()),
            refused = refusal.map(Refusal::name),
            why = refusal.and_then(Refusal::why).map(tracing::field::display),
            bytes = self.bytes,
            ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
            end,
            "request"
        );
    }
}

/// Cuts a text that a caller may have chosen to at most this many bytes, for the log. The log escapes what is left.
pub fn shorten(text: &str, most: usize) -> String {
    if text.len() <= most {
        return text.to_owned();
    }
    let end = (0..=most).rev().find(|end| text.is_char_boundary(*end)).unwrap_or_default();
    format!("{}… ({} bytes)", &text[..end], text.len())
}

/// A response body that reports its progress to a [`RequestTracker`].
///
/// Its size hint is empty, because axum would derive a `Content-Length` from it for a `HEAD` or 304 response. That header is
/// passed through from the API.
struct TrackedBody {
    body: Body,
    tracker: RequestTracker,
}

impl http_body::Body for TrackedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                self.tracker.bytes += frame.data_ref().map_or(0, |data| data.len() as u64);
                // The server may not poll again after the last frame or the trailers.
                if frame.is_trailers() || self.body.is_end_stream() {
                    self.tracker.outcome = Outcome::Complete;
                }
            }
            Poll::Ready(Some(Err(_))) => self.tracker.outcome = Outcome::ApiFailed,
            Poll::Ready(None) => self.tracker.outcome = Outcome::Complete,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_are_cut_between_characters() {
        assert_eq!(shorten("", 0), "");
        assert_eq!(shorten("abc", 3), "abc");
        assert_eq!(shorten("abcd", 3), "abc… (4 bytes)");
        assert_eq!(shorten("aሰላም", 3), "a… (10 bytes)");
        for length in 0..300 {
            for text in ["x".repeat(length), "é".repeat(length), "ሰ".repeat(length)] {
                let cut = shorten(&text, 256);
                assert!(cut.len() < 256 + 24 && (cut == text) == (text.len() <= 256), "{length}");
            }
        }
    }
}
