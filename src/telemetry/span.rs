//! Makes the spans that [the guide](crate::guide::telemetry) documents.
//!
//! As for events, callers must hold no lock.

use http::{Method, StatusCode, Uri};
#[cfg(feature = "tracing")]
use tracing::{
    Instrument,
    field::{Empty, display},
    info_span,
};

use super::event::RefreshOutcome;
#[cfg(feature = "tracing")]
use super::{
    TARGET,
    event::{Id, name},
};
#[cfg(feature = "tracing")]
use crate::error::Redactor;
use crate::{KeyId, error::Setting};

/// A span if the feature `tracing` is on, otherwise nothing.
#[derive(Clone, Debug)]
pub(crate) struct Span(#[cfg(feature = "tracing")] tracing::Span);

#[cfg(feature = "tracing")]
impl Span {
    /// The caller's span.
    pub(crate) fn current() -> Self {
        Self(tracing::Span::current())
    }

    /// A refresh. It follows from the caller's span and is no child of it: it serves other requests too, and may outlive this
    /// one, whose span would stay open as long as a child is.
    pub(crate) fn refresh(credential: Setting, reason: &'static str) -> Self {
        let span = info_span!(
            target: TARGET,
            parent: None,
            "refresh",
            otel.kind = "internal",
            credential = name(credential),
            reason = reason,
            outcome = Empty,
            id = Empty,
            "error.type" = Empty,
            otel.status_code = Empty,
        );
        span.follows_from(tracing::Span::current());
        Self(span)
    }

    /// One send of an HTTP request, below the caller's span. `resends` counts the sends before it, if there were any.
    pub(crate) fn http_request(method: &Method, uri: &Uri, resends: Option<u64>) -> Self {
        let known = is_known(method);
        let default_port = uri.scheme_str().and_then(|scheme| match scheme {
            "https" => Some(443),
            "http" => Some(80),
            _ => None,
        });
        Self(info_span!(
            target: TARGET,
            "http_request",
            otel.kind = "client",
            otel.name = if known { method.as_str() } else { "HTTP" },
            http.request.method = if known { method.as_str() } else { "_OTHER" },
            http.request.method_original = (!known).then_some(method.as_str()),
            http.request.resend_count = resends,
            url.full = url(uri),
            server.address = uri.host().map(|host| host.trim_matches(['[', ']'])),
            server.port = uri.port_u16().or(default_port),
            http.response.status_code = Empty,
            "error.type" = Empty,
            otel.status_code = Empty,
        ))
    }

    pub(crate) fn in_scope<T>(&self, work: impl FnOnce() -> T) -> T {
        self.0.in_scope(work)
    }

    pub(crate) fn instrument<F: Future>(self, future: F) -> impl Future<Output = F::Output> {
        future.instrument(self.0)
    }

    /// Records how a refresh ended, with the id of the current or last credential.
    pub(crate) fn refreshed(&self, outcome: RefreshOutcome, id: Option<KeyId>) {
        self.0.record("outcome", outcome.label()).record("id", display(Id(id)));
        if !matches!(outcome, RefreshOutcome::Refreshed | RefreshOutcome::Unchanged) {
            self.error(outcome.label());
        }
    }

    /// Records the head of the response.
    pub(crate) fn responded(&self, status: StatusCode) {
        self.0.record("http.response.status_code", status.as_u16());
        if status.is_client_error() || status.is_server_error() {
            self.error(status.as_str());
        }
    }

    /// Records that there was no response, or not all of it.
    pub(crate) fn failed(&self) {
        self.error("_OTHER");
    }

    fn error(&self, kind: &str) {
        self.0.record("error.type", kind).record("otel.status_code", "ERROR");
    }
}

#[cfg(not(feature = "tracing"))]
impl Span {
    pub(crate) fn current() -> Self {
        Self()
    }

    pub(crate) fn refresh(_: Setting, _: &'static str) -> Self {
        Self()
    }

    pub(crate) fn http_request(_: &Method, _: &Uri, _: Option<u64>) -> Self {
        Self()
    }

    pub(crate) fn in_scope<T>(&self, work: impl FnOnce() -> T) -> T {
        work()
    }

    pub(crate) fn instrument<F: Future>(self, future: F) -> impl Future<Output = F::Output> {
        future
    }

    pub(crate) fn refreshed(&self, _: RefreshOutcome, _: Option<KeyId>) {}

    pub(crate) fn responded(&self, _: StatusCode) {}

    pub(crate) fn failed(&self) {}
}

/// Whether OpenTelemetry's conventions know the method; any other could be of high cardinality.
#[cfg(feature = "tracing")]
fn is_known(method: &Method) -> bool {
    const KNOWN: [&str; 10] =
        ["CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"];
    KNOWN.contains(&method.as_str())
}

/// The URL without user information and query, which may hold secrets; what looks like a key or a JWT in the path is masked.
#[cfg(feature = "tracing")]
fn url(uri: &Uri) -> String {
    let authority = uri.authority().map_or("", |authority| authority.as_str());
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let scheme = uri.scheme_str().map(|scheme| format!("{scheme}://")).unwrap_or_default();
    Redactor::masking(None).text(format!("{scheme}{host}{}", uri.path()))
}
