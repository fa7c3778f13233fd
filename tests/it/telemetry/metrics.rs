//! Tests of the metrics that a recorder receives.

use std::{
    future::ready,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Waker},
};

use http::{HeaderMap, Request, StatusCode};
use tower::{Layer, ServiceBuilder, ServiceExt, service_fn};
use tower_selam::{
    ApiKey, ApiKeyLayer, AuthErrorLayer, BoxError, Credentials, JwtLayer, PerSubject, Refreshing,
    RequestAuth, SelamLayer, Subject, Token,
    simulator::Simulator,
    source::{Reason, SourceError, source_fn},
    telemetry,
};

use super::{
    GUIDE,
    recorder::Recorder,
    scenario::{RotatingKey, api, assert_no_secret, chat, login_with_failing_store, trigger_everything},
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

fn refreshes(outcome: &str) -> String {
    format!("tower_selam_renewals_total{{credential=token,outcome={outcome}}}")
}

#[tokio::test(start_paused = true)]
async fn refreshes_are_counted_by_outcome() {
    for (answer, outcome) in [
        (Answer::Lives(MINUTE), "renewed"),
        (Answer::Same("token-1", 2 * MINUTE), "unchanged"),
        (Answer::Fails(None), "failed"),
        (Answer::Fails(Some(SECOND)), "failed"),
        (Answer::Refused, "rejected"),
        (Answer::Panics, "panicked"),
        (Answer::Hangs, "timed_out"),
        (Answer::Same("token-0", SECOND), "unusable"),
    ] {
        let recorder = Recorder::default();
        let _guard = ::metrics::set_default_local_recorder(&recorder);
        let mint = Mint::default().then(Answer::Lives(MINUTE)).then(answer);
        let (jwts, _) = engine(&mint);
        text(&jwts).await.unwrap();
        assert_eq!(recorder.all(), [(refreshes("renewed"), 1.0)]);
        tokio::time::advance(55 * SECOND).await;
        text(&jwts).await.unwrap();
        settle().await;
        tokio::time::advance(31 * SECOND).await;
        settle().await;
        assert_eq!(mint.asked(), 2);
        let expected = match outcome {
            "renewed" => vec![(refreshes("renewed"), 2.0)],
            outcome => {
                let mut both = vec![(refreshes("renewed"), 1.0), (refreshes(outcome), 1.0)];
                both.sort_by(|one, other| one.0.cmp(&other.0));
                both
            }
        };
        assert_eq!(recorder.all(), expected, "{outcome}");
    }
}

/// A refresh whose runtime is shut down counts as aborted, one without a runtime as failed.
#[test]
fn runtime_shutdown_counts_as_aborted() {
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
    assert_eq!(recorder.all(), [(refreshes("aborted"), 1.0)]);
    assert!(pin!(jwts.token()).poll(&mut context).is_ready());
    assert_eq!(recorder.all(), [(refreshes("aborted"), 1.0), (refreshes("failed"), 1.0)]);
}

/// A refresh counts once, independent of its waiters and of how often it asks its source.
#[tokio::test(start_paused = true)]
async fn refresh_counts_once() {
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
    assert_eq!(recorder.all(), [(refreshes("renewed"), 1.0)]);
    // Its token was rejected in the meantime, so the refresh fetches once more.
    tokio::time::advance(54 * SECOND).await;
    let first = jwts.token().await.unwrap();
    settle().await;
    jwts.rejected(&first);
    assert_eq!(text(&jwts).await.unwrap(), "token-3");
    assert_eq!((mint.asked(), recorder.all()), (3, vec![(refreshes("renewed"), 2.0)]));
}

#[tokio::test]
async fn auth_errors_are_counted_by_kind_and_code() {
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
            ServiceBuilder::new().layer(AuthErrorLayer::new()).layer(AuthErrorLayer::new().annotated());
        layers
            .layer(AuthErrorLayer::new().annotated())
            .service(api([(status, body)]))
            .oneshot(chat())
            .await
            .unwrap_err();
        assert_eq!(recorder.all(), expected, "three layers must count the error once");
    }
}

/// Replays are counted by outcome; a 401 that is replayed does not count as an auth error.
#[tokio::test]
async fn replays_are_counted_by_outcome() {
    const REJECTED: (u16, &str) = (401, r#"{"error":{"code":"invalid_token"}}"#);
    let error = "tower_selam_auth_errors_total{code=invalid_token,kind=token_rejected}";
    for annotated in [false, true] {
        for (second, outcome, expected) in [
            (Some((200, "")), "accepted", None),
            (Some((500, "")), "accepted", None),
            (Some(REJECTED), "refused", Some(error)),
            (Some((403, "")), "refused", Some("tower_selam_auth_errors_total{code=none,kind=forbidden}")),
            (None, "failed", None),
        ] {
            let recorder = Recorder::default();
            let _guard = ::metrics::set_default_local_recorder(&recorder);
            let layer = SelamLayer::builder().with_api_key(key()).with_jwt(endless_jwts()).build().unwrap();
            let api = api([REJECTED, second.unwrap_or((200, ""))]);
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
            let mut all: Vec<_> = expected.map(|error| (error.to_owned(), 1.0)).into_iter().collect();
            all.push((format!("tower_selam_replays_total{{outcome={outcome}}}"), 1.0));
            assert_eq!(requests(&recorder), all);
        }
    }
}

/// Hosts that are not Tower services are counted in the same way.
#[tokio::test]
async fn replays_of_other_hosts_are_counted() {
    for (second, outcome, kind) in [
        (200, "accepted", None),
        (500, "accepted", None),
        (401, "refused", Some("unauthorized")),
        (403, "refused", Some("forbidden")),
    ] {
        let recorder = Recorder::default();
        let _guard = ::metrics::set_default_local_recorder(&recorder);
        let layer = SelamLayer::builder().with_api_key(key()).with_jwt(endless_jwts()).build().unwrap();
        let (mut head, ()) = get(MODELS).into_parts();
        let mut authorized = layer.authorize(&mut head).await.unwrap();
        let headers = HeaderMap::new();
        assert!(authorized.should_replay(StatusCode::UNAUTHORIZED, &headers, b"").await.unwrap());
        authorized.authorize_again(&mut head).await.unwrap();
        let _ = authorized.should_replay(second.try_into().unwrap(), &headers, b"").await;
        let error = kind.map(|kind| format!("tower_selam_auth_errors_total{{code=none,kind={kind}}}"));
        let replay = format!("tower_selam_replays_total{{outcome={outcome}}}");
        let all: Vec<_> = error.into_iter().chain([replay]).map(|name| (name, 1.0)).collect();
        assert_eq!(requests(&recorder), all);
    }
}

/// What was counted of requests.
fn requests(recorder: &Recorder) -> Vec<(String, f64)> {
    let all = recorder.all().into_iter();
    all.filter(|(name, _)| !name.contains("renewals") && !name.contains("info")).collect()
}

/// gRPC errors are counted once: in headers, in trailers, or as the 401 of an HTTP proxy.
#[cfg(feature = "tonic")]
#[tokio::test]
async fn grpc_errors_are_counted_once() {
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
        let status =
            |status: &str| HeaderMap::from_iter([("grpc-status".parse().unwrap(), status.parse().unwrap())]);
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
async fn unsent_requests_are_counted_by_kind() {
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
    let with = |choice: RequestAuth| {
        let mut request = get(MODELS);
        request.extensions_mut().insert(choice);
        request
    };
    for is_tower in [true, false] {
        for (jwt, request, kind) in [
            (None, get("http://api.selamgpt.com/v1"), "origin_not_allowed"),
            (None, with(RequestAuth::ApiKeyAndJwt), "credential_unavailable"),
            (Some(endless_jwts()), with(RequestAuth::VoiceAgent), "invalid_request"),
            (Some(failing(false)), get(MODELS), "refresh_failed"),
            (Some(failing(true)), get(MODELS), "refresh_rejected"),
        ] {
            let recorder = Recorder::default();
            let _guard = ::metrics::set_default_local_recorder(&recorder);
            let builder = SelamLayer::builder().with_api_key(key());
            let builder = jwt.into_iter().fold(builder, |builder, jwt| builder.with_jwt(jwt));
            let layer = builder.build().unwrap();
            if is_tower {
                layer.layer(api([])).oneshot(request.map(|()| String::new())).await.unwrap_err();
            } else {
                layer.authorize(&mut request.into_parts().0).await.unwrap_err();
            }
            assert_eq!(recorder.value(&unsent(kind)), Some(1.0), "{kind}: {:?}", recorder.all());
            assert_eq!(recorder.all().iter().filter(|(name, _)| name.contains("unsent")).count(), 1);
            assert!(recorder.all().iter().all(|(name, _)| !name.contains("auth_errors")));
        }
    }
}

/// K2: a refresh token that its store fails to save is counted.
#[tokio::test]
async fn unsaved_refresh_token_is_counted() {
    let recorder = Recorder::default();
    let _guard = ::metrics::set_default_local_recorder(&recorder);
    login_with_failing_store(&Simulator::new()).await;
    assert_eq!(recorder.value("tower_selam_unsaved_refresh_tokens_total{}"), Some(1.0));
}

fn info(key: &str) -> String {
    format!("tower_selam_credential_info{{credential=api_key,id={}}}", ApiKey::new(key).unwrap().id())
}

/// S4: the gauge shows the id of the key in use, and is 0 for replaced keys.
#[tokio::test(start_paused = true)]
async fn credential_info_follows_key_rotation() {
    let recorder = Recorder::default();
    let _guard = ::metrics::set_default_local_recorder(&recorder);
    let source = RotatingKey::new("sk-selam-one");
    let keys = Refreshing::new(source.clone());
    let layer = SelamLayer::builder().with_api_key(&keys).build().unwrap();
    assert_eq!(recorder.all(), []);
    keys.prefetch().await.unwrap();
    assert_eq!(recorder.value(&info("sk-selam-one")), Some(1.0));
    source.rotate("sk-selam-two");
    keys.rejected(&keys.current().unwrap());
    settle().await;
    assert_eq!(recorder.value(&info("sk-selam-one")), Some(0.0));
    assert_eq!(recorder.value(&info("sk-selam-two")), Some(1.0));
    // The first key returns, and then its engine is dropped.
    source.rotate("sk-selam-one");
    tokio::time::advance(MINUTE).await;
    keys.rejected(&keys.current().unwrap());
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

/// S4: the gauge shows a fixed key of every layer.
#[tokio::test]
async fn credential_info_shows_fixed_keys() {
    for layer in [0, 1, 2, 3] {
        let recorder = Recorder::default();
        let _guard = ::metrics::set_default_local_recorder(&recorder);
        match layer {
            0 => drop(ApiKeyLayer::bearer(key())),
            1 => drop((JwtLayer::new(endless_jwts()), ApiKeyLayer::x_api_key(key()))),
            2 => drop((
                JwtLayer::new(PerSubject::new(|_: &Subject| Mint::default())),
                ApiKeyLayer::x_api_key(key()),
            )),
            _ => drop(SelamLayer::builder().with_api_key(key()).build().unwrap()),
        }
        assert_eq!(recorder.all(), [(info(KEY), 1.0)]);
    }
}

/// Subjects' tokens, tenants' keys and JWTs add no series.
#[tokio::test]
async fn series_do_not_grow_with_credentials() {
    let recorder = Recorder::default();
    let _guard = ::metrics::set_default_local_recorder(&recorder);
    let jwts = PerSubject::new(|subject: &Subject| {
        let jwt = format!("jwt.of.{}", subject.as_str());
        source_fn(move |_: Reason<Token>| {
            let jwt = jwt.clone();
            async { Ok::<_, BoxError>(Token::new(jwt)?) }
        })
    });
    let layer = SelamLayer::builder().with_api_key(key()).with_jwt(jwts).build().unwrap();
    for number in 0..50 {
        let mut request = chat();
        request.extensions_mut().insert(Subject::new(format!("user-{number}")));
        layer.layer(api([(200, "")])).oneshot(request).await.unwrap();
        let tenant = ApiKey::new(format!("sk-selam-tenant-{number}")).unwrap();
        let mut request = chat();
        request.extensions_mut().insert(RequestAuth::Custom(Credentials::bearer(tenant)));
        layer.layer(api([(200, "")])).oneshot(request).await.unwrap();
    }
    assert_eq!(recorder.all(), [(info(KEY), 1.0), (refreshes("renewed"), 50.0)]);
}

#[tokio::test]
async fn successful_request_touches_no_metric() {
    let recorder = Recorder::default();
    let _guard = ::metrics::set_default_local_recorder(&recorder);
    let layer = SelamLayer::builder().with_api_key(key()).with_jwt(endless_jwts()).build().unwrap();
    let stack = layer.layer(service_fn(|_: Request<String>| ready(Ok::<_, BoxError>(response(200, "")))));
    let proxy =
        layer.annotated().layer(service_fn(|_: Request<String>| ready(Ok::<_, BoxError>(response(429, "")))));
    stack.send(chat()).await.unwrap();
    let registrations = recorder.registrations();
    for _ in 0..10 {
        stack.send(chat()).await.unwrap();
        proxy.send(chat()).await.unwrap();
    }
    assert_eq!(recorder.registrations(), registrations);
}

/// `describe_metrics` shows every series at zero, with names and labels that the guide lists.
#[test]
fn described_metrics_start_at_zero() {
    let recorder = Recorder::default();
    let _guard = ::metrics::set_default_local_recorder(&recorder);
    telemetry::describe_metrics();
    telemetry::describe_metrics();
    let all = recorder.all();
    assert!(all.iter().all(|(_, value)| *value == 0.0));
    let of_fleets = if cfg!(feature = "fleet") { 3 + 4 + 1 } else { 0 };
    assert_eq!(all.len(), 3 * 8 + 16 + 4 + 3 + 5 + 1 + of_fleets, "{all:?}");
    for (series, _) in &all {
        let (name, labels) = series.trim_end_matches('}').split_once('{').unwrap();
        let labels =
            labels.split(',').filter(|label| !label.is_empty()).map(|label| label.split_once('=').unwrap());
        for text in labels.flat_map(|(label, value)| [label, value]).chain([name]) {
            assert!(GUIDE.contains(&format!("`{text}`")), "{text}");
        }
        assert!(recorder.is_described(name), "{name}");
    }
    assert!(recorder.is_described(telemetry::CREDENTIAL_INFO));
}

/// S2: no metric holds a secret.
#[tokio::test(start_paused = true)]
async fn metrics_hold_no_secret() {
    let recorder = Recorder::default();
    let _guard = ::metrics::set_default_local_recorder(&recorder);
    trigger_everything().await;
    let shown = format!("{:?}", recorder.all());
    for series in ["renewals", "auth_errors", "replays", "unsent", "unsaved", "info"] {
        assert!(shown.contains(series), "{series}");
    }
    assert_no_secret(&shown);
}
