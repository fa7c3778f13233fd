//! What is counted and told of, by which names, and what is not: secrets, users, and requests that are well.

#[cfg(feature = "metrics")]
mod recorder;

#[cfg(any(feature = "metrics", feature = "tracing"))]
use std::{
    future::ready,
    sync::{Arc, Mutex},
    time::Duration,
};

#[cfg(any(feature = "metrics", feature = "tracing"))]
use http::{Request, Response};
#[cfg(any(feature = "metrics", feature = "tracing"))]
use tower::{Layer, ServiceExt, service_fn};
use tower_selam::telemetry;
#[cfg(any(feature = "metrics", feature = "tracing"))]
use tower_selam::{
    ApiKey, BoxError, RenewalPolicy, Renewing, SelamLayer, Token,
    oauth::{OAuthSource, RefreshToken, RefreshTokenStore, TokenEndpoint},
    simulator::{JwtAlgorithm, Simulator},
    source::{Fetched, Reason, Source, SourceError, source_fn},
};

#[cfg(any(feature = "metrics", feature = "tracing"))]
use crate::{
    mint::{Answer, MINUTE, Mint, SECOND, engine, settle, text},
    support::{Body, CHAT, KEY, MODELS, key, response},
};

const PAGE: &str = include_str!("../../src/telemetry.md");

#[test]
fn the_page_has_every_name() {
    for name in [
        telemetry::RENEWALS,
        telemetry::AUTH_ERRORS,
        telemetry::REPLAYS,
        telemetry::UNSENT_REQUESTS,
        telemetry::UNSAVED_REFRESH_TOKENS,
        telemetry::CREDENTIAL_INFO,
        telemetry::TARGET,
    ] {
        assert!(name.starts_with("tower_selam"));
        assert!(PAGE.contains(&format!("`{name}`")), "{name}");
    }
}

/// A source of keys that can be rotated.
#[cfg(any(feature = "metrics", feature = "tracing"))]
#[derive(Clone)]
struct Rotating(Arc<Mutex<String>>);

#[cfg(any(feature = "metrics", feature = "tracing"))]
impl Rotating {
    fn new(key: impl Into<String>) -> Self {
        Self(Arc::new(Mutex::new(key.into())))
    }

    fn rotate(&self, key: impl Into<String>) {
        *self.0.lock().unwrap() = key.into();
    }
}

#[cfg(any(feature = "metrics", feature = "tracing"))]
impl Source<ApiKey> for Rotating {
    async fn fetch(&self, _: Reason<ApiKey>) -> Result<Fetched<ApiKey>, SourceError> {
        let key = self.0.lock().unwrap().clone();
        Ok(Fetched::new(ApiKey::new(key)?))
    }
}

/// A store that saves nothing, and says with what it was to.
#[cfg(any(feature = "metrics", feature = "tracing"))]
struct Full(RefreshToken);

#[cfg(any(feature = "metrics", feature = "tracing"))]
impl RefreshTokenStore for Full {
    async fn load(&self) -> Result<Option<RefreshToken>, BoxError> {
        Ok(Some(self.0.clone()))
    }

    async fn save(&self, token: &RefreshToken) -> Result<(), BoxError> {
        Err(format!("no room for\n{}", token.expose_secret()).into())
    }
}

#[cfg(any(feature = "metrics", feature = "tracing"))]
fn chat() -> Request<String> {
    Request::post("https://api.selamgpt.com/v1/chat/completions").body(CHAT.to_owned()).unwrap()
}

/// An API that answers each request with the next of these.
#[cfg(any(feature = "metrics", feature = "tracing"))]
fn api<const N: usize>(
    answers: [(u16, &'static str); N],
) -> impl tower::Service<Request<String>, Response = Response<Body>, Error = BoxError, Future: Send> + Clone {
    let answers = Arc::new(Mutex::new(answers.into_iter()));
    service_fn(move |_: Request<String>| {
        let next = answers.lock().unwrap().next();
        ready(
            next.map(|(status, body)| response(status, body))
                .ok_or_else(|| BoxError::from("the connection broke")),
        )
    })
}

#[cfg(any(feature = "metrics", feature = "tracing"))]
fn endless_jwts() -> Renewing<Token> {
    let number = std::sync::atomic::AtomicUsize::new(1);
    Renewing::new(source_fn(move |_: Reason<Token>| {
        let number = number.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        async move { Ok::<_, BoxError>(Token::new(format!("canary-token-{number}"))?) }
    }))
}

#[cfg(feature = "metrics")]
mod metrics {
    use tower::ServiceBuilder;
    use tower_selam::{
        AnnotateAuthErrorLayer, ApiKeyLayer, AuthErrorLayer, Credentials, JwtLayer, PerSubject, RequestAuth,
        Subject,
    };

    use super::{recorder::Recorder, *};
    use crate::support::get;

    fn renewals(outcome: &str) -> String {
        format!("tower_selam_renewals_total{{credential=token,outcome={outcome}}}")
    }

    #[tokio::test(start_paused = true)]
    async fn renewals_are_counted_by_credential_and_outcome() {
        for (answer, outcome) in [
            (Answer::Lives(MINUTE), "renewed"),
            (Answer::Same("token-1", 2 * MINUTE), "unchanged"),
            (Answer::Fails(None), "failed"),
            (Answer::Fails(Some(SECOND)), "failed"),
            (Answer::Refused, "refused"),
            (Answer::Panics, "panicked"),
            (Answer::Hangs, "timed_out"),
            (Answer::Same("token-0", SECOND), "unfit"),
        ] {
            let recorder = Recorder::default();
            let _guard = ::metrics::set_default_local_recorder(&recorder);
            let mint = Mint::default().then(Answer::Lives(MINUTE)).then(answer);
            let (jwts, _) = engine(&mint);
            text(&jwts).await.unwrap();
            assert_eq!(recorder.all(), [(renewals("renewed"), 1.0)]);
            tokio::time::advance(55 * SECOND).await;
            text(&jwts).await.unwrap();
            settle().await;
            tokio::time::advance(31 * SECOND).await;
            settle().await;
            assert_eq!(mint.asked(), 2);
            let expected = match outcome {
                "renewed" => vec![(renewals("renewed"), 2.0)],
                outcome => {
                    let mut both = vec![(renewals("renewed"), 1.0), (renewals(outcome), 1.0)];
                    both.sort_by(|one, other| one.0.cmp(&other.0));
                    both
                }
            };
            assert_eq!(recorder.all(), expected, "{outcome}");
        }
    }

    #[test]
    fn a_renewal_whose_runtime_is_shut_down_counts_as_aborted_and_one_without_any_as_failed() {
        let recorder = Recorder::default();
        let _guard = ::metrics::set_default_local_recorder(&recorder);
        let (jwts, _) = engine(&Mint::default().then(Answer::Hangs));
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        {
            let _runtime = runtime.enter();
            assert!(std::pin::pin!(jwts.token()).poll(&mut context).is_pending());
        }
        drop(runtime);
        assert_eq!(recorder.all(), [(renewals("aborted"), 1.0)]);
        assert!(std::pin::pin!(jwts.token()).poll(&mut context).is_ready());
        assert_eq!(recorder.all(), [(renewals("aborted"), 1.0), (renewals("failed"), 1.0)]);
    }

    /// However many wait for it, and however often its source is asked.
    #[tokio::test(start_paused = true)]
    async fn a_renewal_counts_once() {
        let recorder = Recorder::default();
        let _guard = ::metrics::set_default_local_recorder(&recorder);
        let mint = Mint::default()
            .then(Answer::Lives(MINUTE))
            .then(Answer::Same("token-1", 2 * MINUTE))
            .taking(SECOND);
        let (jwts, _) = engine(&mint);
        let calls: Vec<_> = (0..100)
            .map(|_| {
                let jwts = jwts.clone();
                tokio::spawn(async move { jwts.token().await })
            })
            .collect();
        for call in calls {
            call.await.unwrap().unwrap();
        }
        assert_eq!(recorder.all(), [(renewals("renewed"), 1.0)]);
        // What it brings was refused in the meantime: it asks once more.
        tokio::time::advance(54 * SECOND).await;
        let first = jwts.token().await.unwrap();
        settle().await;
        jwts.invalidate(&first);
        assert_eq!(text(&jwts).await.unwrap(), "token-3");
        assert_eq!((mint.asked(), recorder.all()), (3, vec![(renewals("renewed"), 2.0)]));
    }

    #[tokio::test]
    async fn refusals_of_the_api_are_counted_by_kind_and_known_codes() {
        for (status, body, kind, code) in [
            (401, r#"{"error":{"code":"invalid_api_key"}}"#, "invalid_api_key", "invalid_api_key"),
            (401, r#"{"error":{"code":"missing_api_key"}}"#, "missing_api_key", "missing_api_key"),
            (
                403,
                r#"{"error":{"code":"insufficient_permissions"}}"#,
                "insufficient_permissions",
                "insufficient_permissions",
            ),
            (401, r#"{"error":{"code":"jwt_expired"}}"#, "token_rejected", "jwt_expired"),
            (401, r#"{"error":{"code":"x-9f8e7d6c5b4a"}}"#, "unauthorized", "other"),
            (403, r#"{"error":{"code":"<script>"}}"#, "forbidden", "other"),
            (401, r#"{"error":{"code":"none"}}"#, "unauthorized", "other"),
            (403, r#"{"error":{"code":7}}"#, "forbidden", "other"),
            (401, "", "unauthorized", "none"),
            (403, "<html>", "forbidden", "none"),
        ] {
            let expected = [(format!("tower_selam_auth_errors_total{{code={code},kind={kind}}}"), 1.0)];
            let recorder = Recorder::default();
            let _guard = ::metrics::set_default_local_recorder(&recorder);
            let layer = AuthErrorLayer::new();
            layer.layer(api([(status, body)])).oneshot(chat()).await.unwrap_err();
            assert_eq!(recorder.all(), expected);

            let recorder = Recorder::default();
            let _guard = ::metrics::set_default_local_recorder(&recorder);
            let layers =
                ServiceBuilder::new().layer(AuthErrorLayer::new()).layer(AnnotateAuthErrorLayer::new());
            layers
                .layer(AnnotateAuthErrorLayer::new())
                .service(api([(status, body)]))
                .oneshot(chat())
                .await
                .unwrap_err();
            assert_eq!(recorder.all(), expected, "once, though three layers read it");
        }
    }

    /// The 401 that is not gone up does not count.
    #[tokio::test]
    async fn replays_are_counted_by_what_came_of_them() {
        const REFUSED: (u16, &str) = (401, r#"{"error":{"code":"invalid_token"}}"#);
        let error = "tower_selam_auth_errors_total{code=invalid_token,kind=token_rejected}";
        for annotated in [false, true] {
            for (second, outcome, expected) in [
                (Some((200, "")), "accepted", None),
                (Some((500, "")), "accepted", None),
                (Some(REFUSED), "refused", Some(error)),
                (Some((403, "")), "refused", Some("tower_selam_auth_errors_total{code=none,kind=forbidden}")),
                (None, "failed", None),
            ] {
                let recorder = Recorder::default();
                let _guard = ::metrics::set_default_local_recorder(&recorder);
                let layer =
                    SelamLayer::builder().with_api_key(key()).with_jwt(endless_jwts()).build().unwrap();
                let api = api([REFUSED, second.unwrap_or((200, ""))]);
                let api = service_fn({
                    let sent = Arc::new(std::sync::atomic::AtomicUsize::new(0));
                    move |request: Request<String>| {
                        let broken =
                            sent.fetch_add(1, std::sync::atomic::Ordering::SeqCst) == 1 && second.is_none();
                        let api = api.clone();
                        async move { if broken { Err("broken".into()) } else { api.oneshot(request).await } }
                    }
                });
                if annotated {
                    drop(layer.annotated().layer(api).oneshot(chat()).await);
                } else {
                    drop(layer.layer(api).oneshot(chat()).await);
                }
                let counted = recorder
                    .all()
                    .into_iter()
                    .filter(|(name, _)| !name.contains("renewals") && !name.contains("info"));
                let mut all: Vec<_> = expected.map(|error| (error.to_owned(), 1.0)).into_iter().collect();
                all.push((format!("tower_selam_replays_total{{outcome={outcome}}}"), 1.0));
                assert_eq!(counted.collect::<Vec<_>>(), all);
            }
        }
    }

    #[tokio::test]
    async fn requests_that_are_not_sent_are_counted_by_kind() {
        let failing = |permanent: bool| {
            Renewing::<Token>::new(source_fn(move |_: Reason<Token>| async move {
                Err::<Token, _>(if permanent {
                    SourceError::permanent("over")
                } else {
                    SourceError::transient("busy")
                })
            }))
        };
        let unsent = |kind: &str| format!("tower_selam_unsent_requests_total{{kind={kind}}}");
        let mut own = get(MODELS);
        own.extensions_mut().insert(RequestAuth::ApiKeyAndJwt);
        let mut voice = get(MODELS);
        voice.extensions_mut().insert(RequestAuth::VoiceAgent);
        for (jwt, request, kind) in [
            (None, get("http://api.selamgpt.com/v1"), "origin_not_allowed"),
            (None, own, "credential_unavailable"),
            (Some(endless_jwts()), voice, "invalid_request"),
            (Some(failing(false)), get(MODELS), "renewal_failed"),
            (Some(failing(true)), get(MODELS), "renewal_refused"),
        ] {
            let recorder = Recorder::default();
            let _guard = ::metrics::set_default_local_recorder(&recorder);
            let builder = SelamLayer::builder().with_api_key(key());
            let builder = jwt.into_iter().fold(builder, |builder, jwt| builder.with_jwt(jwt));
            let request = request.map(|()| String::new());
            builder.build().unwrap().layer(api([])).oneshot(request.clone()).await.unwrap_err();
            assert_eq!(recorder.value(&unsent(kind)), Some(1.0), "{kind}: {:?}", recorder.all());
            assert_eq!(recorder.all().iter().filter(|(name, _)| name.contains("unsent")).count(), 1);
            assert!(recorder.all().iter().all(|(name, _)| !name.contains("auth_errors")));
        }
    }

    #[tokio::test]
    async fn a_refresh_token_that_is_not_saved_is_counted() {
        let recorder = Recorder::default();
        let _guard = ::metrics::set_default_local_recorder(&recorder);
        unsaved(&Simulator::new()).await;
        assert_eq!(recorder.value("tower_selam_unsaved_refresh_tokens_total{}"), Some(1.0));
    }

    fn info(key: &str) -> String {
        format!("tower_selam_credential_info{{credential=api_key,id={}}}", ApiKey::new(key).unwrap().id())
    }

    #[tokio::test(start_paused = true)]
    async fn the_key_in_use_is_shown_and_the_old_one_set_to_zero() {
        let recorder = Recorder::default();
        let _guard = ::metrics::set_default_local_recorder(&recorder);
        let source = Rotating::new("sk-selam-one");
        let keys = Renewing::new(source.clone());
        let layer = SelamLayer::builder().with_api_key(&keys).build().unwrap();
        assert_eq!(recorder.all(), []);
        keys.prefetch().await.unwrap();
        assert_eq!(recorder.value(&info("sk-selam-one")), Some(1.0));
        source.rotate("sk-selam-two");
        keys.invalidate(&keys.current().unwrap());
        settle().await;
        assert_eq!(recorder.value(&info("sk-selam-one")), Some(0.0));
        assert_eq!(recorder.value(&info("sk-selam-two")), Some(1.0));
        // Back to the first, and then with its engine.
        source.rotate("sk-selam-one");
        tokio::time::advance(MINUTE).await;
        keys.invalidate(&keys.current().unwrap());
        settle().await;
        assert_eq!(
            [info("sk-selam-one"), info("sk-selam-two")].map(|key| recorder.value(&key)),
            [Some(1.0), Some(0.0)]
        );
        drop((keys, layer));
        assert_eq!(
            [info("sk-selam-one"), info("sk-selam-two")].map(|key| recorder.value(&key)),
            [Some(0.0), Some(0.0)]
        );
    }

    #[tokio::test]
    async fn a_fixed_key_is_shown_whatever_it_stands_beside() {
        for layer in [0, 1, 2, 3] {
            let recorder = Recorder::default();
            let _guard = ::metrics::set_default_local_recorder(&recorder);
            match layer {
                0 => drop(ApiKeyLayer::bearer(key())),
                1 => drop(JwtLayer::new(endless_jwts(), key())),
                2 => drop(JwtLayer::new(PerSubject::new(|_: &Subject| Mint::default()), key())),
                _ => drop(SelamLayer::builder().with_api_key(key()).build().unwrap()),
            }
            assert_eq!(recorder.all(), [(info(KEY), 1.0)]);
        }
    }

    /// Neither users' tokens, nor tenants' keys, nor JWTs of any sort.
    #[tokio::test]
    async fn there_are_no_more_series_however_many_credentials_there_are() {
        let recorder = Recorder::default();
        let _guard = ::metrics::set_default_local_recorder(&recorder);
        let jwts = PerSubject::new(|user: &Subject| {
            let jwt = format!("jwt.of.{}", user.as_str());
            source_fn(move |_: Reason<Token>| {
                let jwt = jwt.clone();
                async { Ok::<_, BoxError>(Token::new(jwt)?) }
            })
        });
        let layer = SelamLayer::builder().with_api_key(key()).with_jwt(jwts).build().unwrap();
        for user in 0..50 {
            let mut request = chat();
            request.extensions_mut().insert(Subject::new(format!("user-{user}")));
            layer.layer(api([(200, "")])).oneshot(request).await.unwrap();
            let tenant = ApiKey::new(format!("sk-selam-tenant-{user}")).unwrap();
            let mut request = chat();
            request.extensions_mut().insert(RequestAuth::Own(Credentials::bearer(tenant)));
            layer.layer(api([(200, "")])).oneshot(request).await.unwrap();
        }
        assert_eq!(recorder.all(), [(info(KEY), 1.0), (renewals("renewed"), 50.0)]);
    }

    #[tokio::test]
    async fn a_request_that_is_well_touches_no_metric() {
        let recorder = Recorder::default();
        let _guard = ::metrics::set_default_local_recorder(&recorder);
        let layer = SelamLayer::builder().with_api_key(key()).with_jwt(endless_jwts()).build().unwrap();
        let stack = layer.layer(service_fn(|_: Request<String>| ready(Ok::<_, BoxError>(response(200, "")))));
        let proxy = layer
            .annotated()
            .layer(service_fn(|_: Request<String>| ready(Ok::<_, BoxError>(response(429, "")))));
        stack.send(chat()).await.unwrap();
        let asked = recorder.asked();
        for _ in 0..10 {
            stack.send(chat()).await.unwrap();
            proxy.send(chat()).await.unwrap();
        }
        assert_eq!(recorder.asked(), asked);
    }

    #[test]
    fn all_that_can_be_counted_is_shown_at_zero_with_labels_that_are_on_the_page() {
        let recorder = Recorder::default();
        let _guard = ::metrics::set_default_local_recorder(&recorder);
        telemetry::describe_metrics();
        telemetry::describe_metrics();
        let all = recorder.all();
        assert!(all.iter().all(|(_, value)| *value == 0.0));
        assert_eq!(all.len(), 2 * 8 + 9 + 4 + 3 + 5 + 1, "{all:?}");
        for (series, _) in &all {
            let (name, labels) = series.trim_end_matches('}').split_once('{').unwrap();
            let labels = labels
                .split(',')
                .filter(|label| !label.is_empty())
                .map(|label| label.split_once('=').unwrap());
            for text in labels.flat_map(|(label, value)| [label, value]).chain([name]) {
                assert!(PAGE.contains(&format!("`{text}`")), "{text}");
            }
            assert!(recorder.is_described(name), "{name}");
        }
        assert!(recorder.is_described(telemetry::CREDENTIAL_INFO));
    }

    #[tokio::test]
    async fn no_metric_has_a_secret() {
        let recorder = Recorder::default();
        let _guard = ::metrics::set_default_local_recorder(&recorder);
        everything().await;
        let shown = format!("{:?}", recorder.all());
        for series in ["renewals", "auth_errors", "replays", "unsent", "unsaved", "info"] {
            assert!(shown.contains(series), "{series}");
        }
        assert_clean(&shown);
    }
}

#[cfg(any(feature = "metrics", feature = "tracing"))]
fn assert_clean(shown: &str) {
    for secret in [KEY, "canary", "sk-selam", "eyJ", "user-secret"] {
        assert!(!shown.contains(secret), "{shown}");
    }
}

/// A login of which the store keeps nothing.
#[cfg(any(feature = "metrics", feature = "tracing"))]
async fn unsaved(simulator: &Simulator) {
    let endpoint = TokenEndpoint::new::<_, http_body_util::Full<bytes::Bytes>, _>(
        "https://api.selamgpt.com/oauth/token",
        simulator.clone(),
    );
    let (id, secret) = simulator.issue_client();
    let auth = tower_selam::oauth::ClientAuth::client_secret_basic(id, secret).unwrap();
    let token = RefreshToken::new(simulator.issue_refresh_token()).unwrap();
    let source = OAuthSource::refresh_token(endpoint.unwrap().with_client_auth(auth), Full(token));
    Renewing::new(source).prefetch().await.unwrap();
    settle().await;
}

/// Everything happens that is counted or told of, with sources and an API that say what they should not.
#[cfg(any(feature = "metrics", feature = "tracing"))]
async fn everything() {
    let simulator = Simulator::new();
    unsaved(&simulator).await;

    // Both are rotated behind our back.
    simulator.add_key(KEY);
    let keys = Rotating::new(KEY);
    let minting = simulator.clone();
    let jwts = Renewing::new(source_fn(move |_: Reason<Token>| {
        let jwt = minting.mint_jwt(JwtAlgorithm::Es256, Duration::from_secs(600));
        async { Ok::<_, BoxError>(Token::new(jwt)?) }
    }));
    let keys_in_use = Renewing::with_policy(keys.clone(), RenewalPolicy::new());
    let layer = SelamLayer::builder().with_api_key(&keys_in_use).with_jwt(&jwts).build().unwrap();
    let selam = layer.layer(simulator.clone());
    assert_eq!(selam.send(chat()).await.unwrap().status(), 200);
    simulator.expire_jwts();
    assert_eq!(selam.send(chat()).await.unwrap().status(), 200);
    simulator.revoke_key(KEY);
    keys.rotate("sk-selam-canary-the-next");
    simulator.add_key("sk-selam-canary-the-next");
    let _ = selam.send(chat()).await;
    simulator.reject_jwts(true);
    let _ = selam.send(chat()).await;

    // An API that echoes.
    let fixed = SelamLayer::builder().with_api_key(key()).build().unwrap();
    let echo = r#"{"error":{"code":"sk-selam-canary-0123456789abcdef","message":"bad\nkey sk-selam-canary-0123456789abcdef"}}"#;
    fixed.layer(api([(401, echo)])).send(chat()).await.unwrap_err();
    fixed.annotated().layer(api([(403, echo)])).send(chat()).await.unwrap();

    // Requests that are not sent, with a secret where it should not be.
    let plain = Request::get(format!("http://api.selamgpt.com/?api_key={KEY}")).body(String::new()).unwrap();
    layer.layer(api([])).send(plain).await.unwrap_err();

    // Sources that say what they held.
    let (first, second) = ("opaque-canary-first", "opaque-canary-second");
    for permanent in [false, true] {
        let jwts = Renewing::new(source_fn(move |reason: Reason<Token>| async move {
            match reason {
                Reason::Rejected(old) => {
                    let said = format!("no other than\r\n{}, {KEY} or eyJh.eyJz.c2ln", old.expose_secret());
                    Err(if permanent { SourceError::permanent(said) } else { SourceError::transient(said) })
                }
                _ => Ok(Fetched::new(Token::new(if permanent { first } else { second })?)),
            }
        }));
        let old = jwts.token().await.unwrap();
        jwts.invalidate(&old);
        jwts.token().await.unwrap_err();
    }
    for answer in [Answer::Panics, Answer::Fails(None), Answer::Bare(Token::new("canary-bare").unwrap())] {
        let _ = engine(&Mint::default().then(answer)).0.token().await;
    }
}

/// In a process of its own: `tracing` remembers for all threads whether anybody listens.
#[cfg(feature = "tracing")]
#[test]
fn events_have_their_names_and_fields_and_no_secret() {
    use crate::environment::{CASE, run, tell};

    const NAME: &str = "telemetry::events_have_their_names_and_fields_and_no_secret";
    if std::env::var(CASE).is_err() {
        let events = run(NAME, "the events", &[]);
        for message in [
            "a credential was renewed",
            "a credential was not renewed",
            "a credential cannot be renewed",
            "the API refused a request",
            "a request was sent again",
            "a request was not sent",
            "the new refresh token was not saved and is kept in memory alone",
        ] {
            assert!(events.contains(message), "{message}: {events}");
            assert!(PAGE.contains(&format!("`{message}`")), "{message}");
        }
        let ids = [KEY, "sk-selam-canary-the-next"].map(|key| ApiKey::new(key).unwrap().id());
        for field in [
            format!("credential=\"api_key\" \"api_key\" outcome=\"renewed\" \"renewed\" id={} ", ids[0]),
            format!("credential=\"api_key\" \"api_key\" outcome=\"renewed\" \"renewed\" id={} ", ids[1]),
            format!(
                "kind=\"forbidden\" \"forbidden\" api_key={0} {0} token=none none error=forbidden (403",
                ids[0]
            ),
            "kind=\"origin_not_allowed\"".to_owned(),
            "outcome=\"accepted\"".to_owned(),
            "outcome=\"panicked\"".to_owned(),
            "outcome=\"refused\"".to_owned(),
            "request_id=\"req_".to_owned(),
            // On one line, and masked.
            r"no other than\r\n[redacted], [redacted] or [redacted]".to_owned(),
            r"no room for\n[redacted]".to_owned(),
        ] {
            assert!(events.contains(&field), "{field}: {events}");
        }
        assert_clean(&events);
        return;
    }
    let log = crate::secrets::Log::default();
    let _guard = tracing::subscriber::set_default(log.clone());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(everything());
    let ours: Vec<_> =
        log.text().split('\n').filter(|line| line.starts_with("tower_selam ")).map(str::to_owned).collect();
    tell(&ours.join(" "));
}
