//! Tests of the spans that a `tracing` subscriber receives: names, fields, parents and links.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use tower::{Layer, Service};
use tower_selam::{
    ApiKey, BoxError, Refreshing, SelamLayer, Token,
    oauth::{ClientAuth, OAuthSource, RefreshToken, TokenEndpoint},
    simulator::{Simulator, TokenFault},
    source::{Reason, SourceError, source_fn},
};
use tracing::{
    Instrument, Subscriber,
    field::{Field, Visit},
    info_span,
    span::{Attributes, Id, Record},
};
use tracing_subscriber::{
    layer::{Context, SubscriberExt},
    registry::{LookupSpan, Registry},
};

use super::{
    GUIDE,
    scenario::{FailingStore, RotatingKey, api, assert_no_secret, chat},
};
use crate::{
    environment::{CASE, run, tell},
    mint::settle,
    support::{CHAT, KEY, key},
};

/// Keeps every span, in the order in which they were opened.
#[derive(Clone, Default)]
struct Spans(Arc<Mutex<Vec<Recorded>>>);

#[derive(Clone, Debug, Default)]
struct Recorded {
    id: u64,
    name: &'static str,
    parent: Option<&'static str>,
    follows: Vec<&'static str>,
    fields: BTreeMap<String, String>,
    events: Vec<String>,
    is_closed: bool,
}

impl Recorded {
    fn field(&self, name: &str) -> &str {
        self.fields.get(name).map_or("", String::as_str)
    }
}

impl Visit for Recorded {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.fields.insert(field.to_string(), value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.fields.insert(field.to_string(), format!("{value:?}"));
    }
}

impl Spans {
    fn change(&self, id: &Id, change: impl FnOnce(&mut Recorded)) {
        let mut spans = self.0.lock().unwrap();
        change(spans.iter_mut().rfind(|span| span.id == id.into_u64()).expect("an open span"));
    }

    /// Takes what was recorded. Every span must be closed.
    fn is_closed(&self, name: &str) -> bool {
        self.0.lock().unwrap().iter().any(|span| span.name == name && span.is_closed)
    }

    /// Takes the spans recorded so far, which must be closed, documented and free of secrets.
    #[track_caller]
    fn take(&self) -> Vec<Recorded> {
        let spans = std::mem::take(&mut *self.0.lock().unwrap());
        assert!(spans.iter().all(|span| span.is_closed), "{spans:#?}");
        assert_no_secret(&format!("{spans:?}"));
        for span in spans.iter().filter(|span| ["refresh", "http_request"].contains(&span.name)) {
            let is_documented = |name: &str| GUIDE.contains(&format!("`{name}`"));
            assert!(
                is_documented(span.name) && span.fields.keys().all(|name| is_documented(name)),
                "{span:#?}"
            );
        }
        spans
    }

    /// As [`take`](Self::take), for spans with these names.
    #[track_caller]
    fn take_named<const N: usize>(&self, names: [&str; N]) -> [Recorded; N] {
        let spans: [Recorded; N] = self.take().try_into().unwrap_or_else(|spans| panic!("{spans:#?}"));
        assert_eq!(spans.each_ref().map(|span| span.name), names);
        spans
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> tracing_subscriber::Layer<S> for Spans {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let span = context.span(id).unwrap();
        let parent = span.parent().map(|parent| parent.name());
        let mut recorded = Recorded { id: id.into_u64(), name: span.name(), parent, ..Default::default() };
        attributes.record(&mut recorded);
        self.0.lock().unwrap().push(recorded);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, _: Context<'_, S>) {
        self.change(id, |span| values.record(span));
    }

    fn on_follows_from(&self, id: &Id, follows: &Id, context: Context<'_, S>) {
        let follows = context.span(follows).unwrap().name();
        self.change(id, |span| span.follows.push(follows));
    }

    fn on_event(&self, event: &tracing::Event<'_>, context: Context<'_, S>) {
        let Some(span) = context.event_span(event) else { return };
        let mut recorded = Recorded::default();
        event.record(&mut recorded);
        self.change(&span.id(), |span| span.events.push(recorded.field("message").to_owned()));
    }

    fn on_close(&self, id: Id, _: Context<'_, S>) {
        self.change(&id, |span| span.is_closed = true);
    }
}

fn caller() -> tracing::Span {
    info_span!("caller")
}

/// Returns a request whose method is unusual, and whose URI holds secrets.
fn telling_request() -> Request<String> {
    let uri = format!("https://api.selamgpt.com/v1/files/{KEY}?token={KEY}");
    Request::builder().method("BREW").uri(uri).body(CHAT.to_owned()).unwrap()
}

async fn first_sends_have_no_span(spans: &Spans) {
    let simulator = Simulator::new();
    simulator.add_key(KEY);
    let keys = Refreshing::new(RotatingKey::new(KEY));
    keys.prefetch().await.unwrap();
    spans.take_named(["refresh"]);
    for layer in [SelamLayer::builder().with_api_key(key()), SelamLayer::builder().with_api_key(&keys)] {
        let selam = layer.build().unwrap().layer(simulator.clone());
        selam.send(chat()).instrument(caller()).await.unwrap();
    }
    spans.take_named(["caller", "caller"]);
}

/// A refresh neither is part of a caller's trace, nor keeps a caller's span open.
async fn refreshes_have_traces_of_their_own(spans: &Spans) {
    let keys = Refreshing::new(source_fn(|_: Reason<ApiKey>| {
        async {
            settle().await;
            Ok::<_, BoxError>(key())
        }
        .instrument(info_span!("source"))
    }));
    {
        let mut dropped = tokio_test::task::spawn(keys.api_key().instrument(caller()));
        tokio_test::assert_pending!(dropped.poll());
    }
    tokio::task::yield_now().await;
    assert!(spans.is_closed("caller") && !spans.is_closed("refresh"));
    keys.api_key().instrument(info_span!("waiter")).await.unwrap();
    settle().await;
    let [_, refresh, source, _] = spans.take_named(["caller", "refresh", "source", "waiter"]);
    assert_eq!((refresh.parent, &refresh.follows[..]), (None, &["caller"][..]));
    assert_eq!(refresh.events, ["credential refreshed"]);
    let id = key().id().to_string();
    for (field, value) in [
        ("otel.kind", "internal"),
        ("credential", "api_key"),
        ("reason", "first"),
        ("outcome", "renewed"),
        ("id", &id),
        ("otel.status_code", ""),
        ("error.type", ""),
    ] {
        assert_eq!(refresh.field(field), value, "{field}");
    }
    assert_eq!(source.parent, Some("refresh"));
}

async fn failed_refreshes_are_errors(spans: &Spans) {
    type Fails = fn() -> SourceError;
    let failures: [(Fails, &str); 2] =
        [(|| SourceError::transient(KEY), "failed"), (|| SourceError::permanent(KEY), "rejected")];
    for (fails, outcome) in failures {
        let jwts =
            Refreshing::new(source_fn(move |_: Reason<Token>| async move { Err::<Token, _>(fails()) }));
        jwts.token().await.unwrap_err();
        settle().await;
        let [refresh] = spans.take_named(["refresh"]);
        assert_eq!(refresh.field("outcome"), outcome);
        assert_eq!(refresh.field("error.type"), outcome);
        assert_eq!(refresh.field("otel.status_code"), "ERROR");
        assert_eq!(refresh.field("id"), "none");
    }

    // A refresh that nobody can ask about any more has no outcome.
    let jwts =
        Refreshing::new(source_fn(|_: Reason<Token>| std::future::pending::<Result<Token, BoxError>>()));
    {
        let mut dropped = tokio_test::task::spawn(jwts.token());
        tokio_test::assert_pending!(dropped.poll());
    }
    drop(jwts);
    settle().await;
    let [refresh] = spans.take_named(["refresh"]);
    assert_eq!(refresh.field("outcome"), "");
}

async fn replays_are_client_spans(spans: &Spans) {
    const REJECTED: (u16, &str) = (401, r#"{"error":{"code":"invalid_api_key"}}"#);
    async fn replay<const N: usize>(spans: &Spans, answers: [(u16, &'static str); N]) -> Recorded {
        let keys = RotatingKey::new(KEY);
        let engine = Refreshing::new(keys.clone());
        engine.prefetch().await.unwrap();
        spans.take_named(["refresh"]);
        keys.rotate("sk-selam-canary-the-next");
        let layer = SelamLayer::builder().with_api_key(&engine).build().unwrap();
        let inner = api(answers);
        let inner = tower::service_fn(move |request| {
            let span = info_span!("client");
            inner.clone().call(request).instrument(span)
        });
        let _ = layer.layer(inner).send(telling_request()).instrument(caller()).await;
        let [_, _, refresh, replay, client] =
            spans.take_named(["caller", "client", "refresh", "http_request", "client"]);
        assert_eq!((refresh.field("reason"), refresh.parent), ("rejected", None));
        assert_eq!((refresh.follows, replay.parent), (vec!["caller"], Some("caller")));
        assert_eq!(client.parent, Some("http_request"));
        replay
    }

    let replayed = replay(spans, [REJECTED, (200, "")]).await;
    for (field, value) in [
        ("otel.kind", "client"),
        ("otel.name", "HTTP"),
        ("http.request.method", "_OTHER"),
        ("http.request.method_original", "BREW"),
        ("http.request.resend_count", "1"),
        ("http.response.status_code", "200"),
        ("url.full", "https://api.selamgpt.com/v1/files/[redacted]"),
        ("server.address", "api.selamgpt.com"),
        ("server.port", "443"),
        ("otel.status_code", ""),
        ("error.type", ""),
    ] {
        assert_eq!(replayed.field(field), value, "{field}");
    }
    let rejected = replay(spans, [REJECTED, REJECTED]).await;
    assert_eq!(rejected.field("http.response.status_code"), "401");
    assert_eq!((rejected.field("error.type"), rejected.field("otel.status_code")), ("401", "ERROR"));
    let broken = replay(spans, [REJECTED]).await;
    assert_eq!(broken.field("http.response.status_code"), "");
    assert_eq!((broken.field("error.type"), broken.field("otel.status_code")), ("_OTHER", "ERROR"));
}

async fn token_requests_are_part_of_the_refresh(spans: &Spans) {
    let simulator = Simulator::new();
    let endpoint = || {
        TokenEndpoint::new::<_, Full<Bytes>, _>(
            "https://api.selamgpt.com/oauth/token?canary",
            simulator.clone(),
        )
        .unwrap()
    };
    let (id, secret) = simulator.issue_client();
    let auth = ClientAuth::client_secret_basic(id, secret).unwrap();
    let login = RefreshToken::new(simulator.issue_refresh_token()).unwrap();
    // Saving the token goes on in the background.
    let login =
        OAuthSource::refresh_token(endpoint().with_client_auth(auth.clone()), FailingStore::new(login));
    let machine = OAuthSource::client_credentials(endpoint().with_client_auth(auth));
    for source in [machine, login] {
        Refreshing::new(source).token().instrument(caller()).await.unwrap();
        settle().await;
        let [_, refresh, exchange] = spans.take_named(["caller", "refresh", "http_request"]);
        assert_eq!((refresh.parent, exchange.parent), (None, Some("refresh")));
        for (field, value) in [
            ("otel.kind", "client"),
            ("otel.name", "POST"),
            ("http.request.method", "POST"),
            ("http.request.method_original", ""),
            ("http.request.resend_count", ""),
            ("http.response.status_code", "200"),
            ("url.full", "https://api.selamgpt.com/oauth/token"),
            ("server.address", "api.selamgpt.com"),
            ("server.port", "443"),
            ("otel.status_code", ""),
        ] {
            assert_eq!(exchange.field(field), value, "{field}");
        }
    }

    // The endpoint rejects the client's key, which has its own refresh.
    let keys = RotatingKey::new(KEY);
    let engine = Refreshing::new(keys.clone());
    engine.prefetch().await.unwrap();
    spans.take_named(["refresh"]);
    keys.rotate(simulator.issue_key());
    let source = OAuthSource::client_credentials(endpoint().with_client_auth(ClientAuth::api_key(&engine)));
    Refreshing::new(source).prefetch().await.unwrap();
    settle().await;
    let [refresh, first, key, second] =
        spans.take_named(["refresh", "http_request", "refresh", "http_request"]);
    assert_eq!((refresh.field("credential"), key.field("credential")), ("token", "api_key"));
    assert_eq!((key.parent, &key.follows[..]), (None, &["refresh"][..]));
    assert_eq!((first.parent, second.parent), (Some("refresh"), Some("refresh")));
    assert_eq!((first.field("http.response.status_code"), first.field("error.type")), ("401", "401"));
    assert_eq!(second.field("http.request.resend_count"), "1");

    // The body of the answer breaks off.
    simulator.inject_token_fault(TokenFault::CutOff);
    let source = OAuthSource::client_credentials(endpoint().with_client_auth(ClientAuth::api_key(&engine)));
    Refreshing::new(source).prefetch().await.unwrap_err();
    settle().await;
    let [_, broken] = spans.take_named(["refresh", "http_request"]);
    assert_eq!((broken.field("http.response.status_code"), broken.field("error.type")), ("200", "_OTHER"));
}

/// S2: spans have stable names and fields, the parents that the guide states, and hold no secret.
///
/// Runs in a separate process: `tracing` caches for all threads whether a subscriber is interested.
#[test]
fn spans_are_stable_and_hold_no_secret() {
    const NAME: &str = "telemetry::spans::spans_are_stable_and_hold_no_secret";
    if std::env::var(CASE).is_err() {
        assert_eq!(run(NAME, "spans", &[]), "passed");
        return;
    }
    let spans = Spans::default();
    let _guard = tracing::subscriber::set_default(Registry::default().with(spans.clone()));
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(async {
        first_sends_have_no_span(&spans).await;
        refreshes_have_traces_of_their_own(&spans).await;
        failed_refreshes_are_errors(&spans).await;
        replays_are_client_spans(&spans).await;
        token_requests_are_part_of_the_refresh(&spans).await;
    });
    tell("passed");
}
