//! The metrics, as a recorder sees them.

use std::{
    future::ready,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Waker},
};

use http::Request;
use tower::{Layer, ServiceBuilder, ServiceExt, service_fn};
use tower_selam::{
    AnnotateAuthErrorLayer, ApiKey, ApiKeyLayer, AuthErrorLayer, BoxError, Credentials, JwtLayer, PerSubject,
    Refreshing, RequestAuth, SelamLayer, Subject, Token,
    simulator::Simulator,
    source::{Reason, SourceError, source_fn},
    telemetry,
};

use super::{
    PAGE,
    recorder::Recorder,
    scenario::{Rotating, api, assert_clean, chat, everything, unsaved},
};
use crate::{
    mint::{Answer, MINUTE, Mint, SECOND, engine, settle, text},
    support::{KEY, MODELS, get, key, response},
};

fn endless_jwts() -> Refreshing<Token> {
    let number = AtomicUsize::new(1);
    Refreshing::new(source_fn(move |_: Reason<Token>| {
        let number = number.fetch_add(1, SeqCst);
        async move { Ok::<_, BoxError>(Token::new(format!("canary-token-{number}"))?) }
    }))
}

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
    let mut context = Context::from_waker(Waker::noop());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    {
        let _runtime = runtime.enter();
        assert!(pin!(jwts.token()).poll(&mut context).is_pending());
    }
    drop(runtime);
    assert_eq!(recorder.all(), [(renewals("aborted"), 1.0)]);
    assert!(pin!(jwts.token()).poll(&mut context).is_ready());
    assert_eq!(recorder.all(), [(renewals("aborted"), 1.0), (renewals("failed"), 1.0)]);
}

/// However many wait for it, and however often its source is asked.
#[tokio::test(start_paused = true)]
async fn a_renewal_counts_once() {
    let recorder = Recorder::default();
    let _guard = ::metrics::set_default_local_recorder(&recorder);
    let mint =
        Mint::default().then(Answer::Lives(MINUTE)).then(Answer::Same("token-1", 2 * MINUTE)).taking(SECOND);
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
        let layers = ServiceBuilder::new().layer(AuthErrorLayer::new()).layer(AnnotateAuthErrorLayer::new());
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
            let layer = SelamLayer::builder().with_api_key(key()).with_jwt(endless_jwts()).build().unwrap();
            let api = api([REFUSED, second.unwrap_or((200, ""))]);
            let api = service_fn({
                let sent = Arc::new(AtomicUsize::new(0));
                move |request: Request<String>| {
                    let broken = sent.fetch_add(1, SeqCst) == 1 && second.is_none();
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

/// In headers, in trailers, and by a proxy that speaks HTTP.
#[cfg(feature = "tonic")]
#[tokio::test]
async fn refusals_in_grpc_are_counted_once_too() {
    use ::tonic::body::Body;
    use http::Response;
    use http_body_util::{BodyExt, Empty};
    use tower_selam::adapter::tonic::SelamGrpcLayer;

    for (http, headers, trailers, kind) in [
        (200, Some("16"), None, "unauthorized"),
        (200, Some("7"), None, "forbidden"),
        (200, None, Some("16"), "unauthorized"),
        (200, None, Some("7"), "forbidden"),
        (401, None, None, "unauthorized"),
        (200, None, Some("0"), ""),
    ] {
        let recorder = Recorder::default();
        let _guard = ::metrics::set_default_local_recorder(&recorder);
        let selam = SelamLayer::builder().with_api_key(key()).build().unwrap();
        let layer = SelamGrpcLayer::new(selam, &"https://api.selamgpt.com".parse().unwrap()).unwrap();
        let status = |status: &str| {
            http::HeaderMap::from_iter([("grpc-status".parse().unwrap(), status.parse().unwrap())])
        };
        let channel = service_fn(move |_: Request<Body>| {
            let end = trailers.map(|trailers| Ok(status(trailers)));
            let mut response = Response::new(Body::new(Empty::new().with_trailers(ready(end))));
            *response.status_mut() = http.try_into().unwrap();
            response.headers_mut().extend(headers.map(status).unwrap_or_default());
            ready(Ok::<_, BoxError>(response))
        });
        let request = Request::post("/selam.Chat/Complete").body(Body::empty()).unwrap();
        if let Ok(response) = layer.layer(channel).oneshot(request).await {
            assert_eq!(recorder.all(), [(info(KEY), 1.0)]);
            let _ = response.into_body().collect().await;
        }
        let mut all = vec![(info(KEY), 1.0)];
        if !kind.is_empty() {
            all.insert(0, (format!("tower_selam_auth_errors_total{{code=none,kind={kind}}}"), 1.0));
        }
        assert_eq!(recorder.all(), all);
    }
}

#[tokio::test]
async fn requests_that_are_not_sent_are_counted_by_kind() {
    let failing = |permanent: bool| {
        Refreshing::<Token>::new(source_fn(move |_: Reason<Token>| async move {
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
    let keys = Refreshing::new(source.clone());
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
        request.extensions_mut().insert(RequestAuth::Custom(Credentials::bearer(tenant)));
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
    let proxy =
        layer.annotated().layer(service_fn(|_: Request<String>| ready(Ok::<_, BoxError>(response(429, "")))));
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
        let labels =
            labels.split(',').filter(|label| !label.is_empty()).map(|label| label.split_once('=').unwrap());
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
