//! `RefreshLayer`: which 401s cause a refresh, a replay, both or neither (J1 to J6, J9, with H5 and R1).

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use http::{Request, Response, StatusCode};
use http_body_util::BodyExt;
use tokio::{
    sync::Semaphore,
    time::{Instant, Sleep, advance, sleep},
};
use tower::{Layer, Service, ServiceExt, service_fn, util::BoxCloneSyncService};
use tower_selam::{
    ApiKey, ApiKeyLayer, BoxError, Credentials, JwtLayer, Provider, RefreshLayer, RefreshPolicy, Refreshing,
    RequestAuth, SelamLayer, Token,
    source::{Fetched, Reason, source_fn},
};

use crate::{
    api::{Api, INVALID_KEY, INVALID_TOKEN, counting, request, stack},
    mint::{Answer, MINUTE, Mint, SECOND, clock, engine, settle, text},
    support::{Body, MODELS, key},
};

/// J1: a 401 for an older token is replayed with the newer one, without another refresh.
#[tokio::test(start_paused = true)]
async fn late_401_replays_with_the_newer_token() {
    let (jwts, fetches) = counting();
    let api = Api::accepting("token-2", INVALID_TOKEN);
    let first = jwts.token().await.unwrap();
    let slow = Arc::new(Semaphore::new(0));
    let call = tokio::spawn(stack(&jwts, api.gated(&slow).service()).oneshot(request()));
    sleep(Duration::from_millis(1)).await;
    jwts.rejected(&first);
    jwts.token().await.unwrap();
    slow.add_permits(2);
    assert_eq!(call.await.unwrap().unwrap().status(), StatusCode::OK);
    assert_eq!(api.bearers(), ["token-1", "token-2"]);
    assert_eq!(fetches.load(SeqCst), 2, "the late 401 causes no refresh");
    assert_eq!(jwts.token().await.unwrap().expose_secret(), "token-2");
}

/// J2: 1,000 concurrent 401s cause one refresh.
#[tokio::test(start_paused = true)]
async fn concurrent_401s_share_one_refresh() {
    let (jwts, fetches) = counting();
    jwts.prefetch().await.unwrap();
    let api = Api::accepting("token-2", INVALID_TOKEN);
    let gate = Arc::new(Semaphore::new(0));
    let gated = api.gated(&gate);
    let calls: Vec<_> =
        (0..1_000).map(|_| tokio::spawn(stack(&jwts, gated.service()).oneshot(request()))).collect();
    settle().await;
    assert_eq!(api.bearers().len(), 1_000, "all requests are in flight");
    gate.add_permits(2_000);
    for call in calls {
        assert_eq!(call.await.unwrap().unwrap().status(), StatusCode::OK);
    }
    assert_eq!(fetches.load(SeqCst), 2);
    let sent = [("token-1", 1_000), ("token-2", 1_000)].map(|(bearer, times)| (bearer.to_owned(), times));
    assert_eq!(api.tally(), sent.into());
}

/// Rejects `token-1` while a one-second refresh, begun in its advisory window, is still running, and sends a
/// second request meanwhile. Both must succeed; returns the API and how long they took.
async fn reject_during_refresh(mint: &Mint, accepts: &str) -> (Api, Duration) {
    let (jwts, _) = engine(mint);
    jwts.prefetch().await.unwrap();
    advance(54 * SECOND).await;
    mint.takes(SECOND);
    assert_eq!(text(&jwts).await.unwrap(), "token-1");
    settle().await;
    let api = Api::accepting(accepts, INVALID_TOKEN);
    let started = Instant::now();
    let first = tokio::spawn(stack(&jwts, api.service()).oneshot(request()));
    sleep(SECOND / 2).await;
    assert_eq!((api.bearers(), jwts.current().is_some()), (vec!["token-1".to_owned()], true));
    let second = tokio::spawn(stack(&jwts, api.service()).oneshot(request()));
    for call in [first, second] {
        assert_eq!(call.await.unwrap().unwrap().status(), StatusCode::OK);
    }
    (api, started.elapsed())
}

/// J3: if a refresh begun before the rejection returns the rejected token, another refresh follows at once.
#[tokio::test(start_paused = true)]
async fn earlier_refresh_cannot_restore_the_rejected_token() {
    let mint = Mint::default().then(Answer::Lives(MINUTE)).then(Answer::Same("token-1", 2 * MINUTE));
    let (api, time) = reject_during_refresh(&mint, "token-3").await;
    assert_eq!(api.bearers(), ["token-1", "token-3", "token-3"]);
    assert_eq!(
        mint.reasons(),
        ["first", "expiring token-1", "rejected token-1"],
        "a second refresh follows at once"
    );
    assert_eq!(time.as_secs(), 2);
}

/// J3: if a refresh begun before the rejection returns a different token, no other refresh follows.
#[tokio::test(start_paused = true)]
async fn earlier_refresh_with_another_token_is_enough() {
    let mint = Mint::default();
    let (api, time) = reject_during_refresh(&mint, "token-2").await;
    assert_eq!(api.bearers(), ["token-1", "token-2", "token-2"]);
    assert_eq!(
        (mint.reasons(), time.as_secs()),
        (vec!["first".to_owned(), "expiring token-1".to_owned()], 1)
    );
}

/// J3, J10: a refresh begun after the rejection vouches for the token that it returns again, which is used on. The same
/// holds if the source fails.
#[tokio::test(start_paused = true)]
async fn rejected_token_is_used_on_without_another() {
    for answer in [Answer::Same("token-1", MINUTE), Answer::Fails(None), Answer::Refused, Answer::Panics] {
        let mint = Mint::default().then(Answer::Lives(MINUTE)).then_always(answer);
        let (jwts, _) = engine(&mint);
        let api = Api::accepting("token-2", INVALID_TOKEN);
        let mut service = stack(&jwts, api.service());
        for _ in 0..10 {
            let response = service.ready().await.unwrap().call(request()).await.unwrap();
            assert_eq!(response.status(), StatusCode::UNAUTHORIZED, "no other token is available");
        }
        assert_eq!((api.tally(), mint.asked()), ([("token-1".to_owned(), 10)].into(), 2));
        api.accept("token-1");
        let response = service.ready().await.unwrap().call(request()).await.unwrap();
        assert_eq!((response.status(), mint.asked()), (StatusCode::OK, 2));
    }
}

/// J3: a late 401 joins the refresh that started after the token was rejected.
#[tokio::test(start_paused = true)]
async fn refresh_begun_after_the_rejection_is_joined() {
    let mint = Mint::default();
    let (jwts, _) = engine(&mint);
    jwts.prefetch().await.unwrap();
    mint.takes(SECOND);
    let (api, gate) = (Api::accepting("token-2", INVALID_TOKEN), Arc::new(Semaphore::new(0)));
    let late = tokio::spawn(stack(&jwts, api.gated(&gate).service()).oneshot(request()));
    let first = tokio::spawn(stack(&jwts, api.service()).oneshot(request()));
    sleep(SECOND / 2).await;
    gate.add_permits(2);
    sleep(SECOND / 4).await;
    assert_eq!(mint.asked(), 2, "the late 401 waits for the running refresh");
    for call in [first, late] {
        assert_eq!(call.await.unwrap().unwrap().status(), StatusCode::OK);
    }
    assert_eq!(api.bearers(), ["token-1", "token-1", "token-2", "token-2"]);
    assert_eq!(mint.reasons(), ["first", "rejected token-1"]);
}

/// J3: a re-check begun before the rejection does not count; the key is read once more.
#[tokio::test(start_paused = true)]
async fn key_read_before_the_rejection_is_reread() {
    // Every read but the first takes a second, and the key is rotated only after the second read has begun.
    let reads = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&reads);
    let source = source_fn(move |_: Reason<ApiKey>| {
        let number = counter.fetch_add(1, SeqCst) + 1;
        async move {
            let key = ApiKey::new(if number < 3 { "sk-selam-old" } else { "sk-selam-new" })?;
            sleep(if number == 1 { Duration::ZERO } else { SECOND }).await;
            Ok::<_, BoxError>(Fetched::new(key).with_recheck_after(5 * SECOND))
        }
    });
    let keys = Refreshing::with_policy(source, RefreshPolicy::new().with_clock(clock()));
    keys.prefetch().await.unwrap();
    advance(5 * SECOND).await;
    keys.api_key().await.unwrap();
    settle().await;
    assert_eq!(reads.load(SeqCst), 2, "the re-check is running");
    let api = Api::accepting("sk-selam-new", INVALID_KEY);
    let service = RefreshLayer::new().layer(ApiKeyLayer::bearer(&keys).layer(api.service()));
    assert_eq!(service.oneshot(request()).await.unwrap().status(), StatusCode::OK);
    assert_eq!((api.bearers(), reads.load(SeqCst)), (vec!["sk-selam-old".into(), "sk-selam-new".into()], 3));
}

/// J4, J5: the second 401 is returned after exactly two sends, and the breaker limits refreshes.
#[tokio::test(start_paused = true)]
async fn second_401_is_returned_and_refreshes_are_limited() {
    let (jwts, fetches) = counting();
    let api = Api::accepting("none of them", INVALID_TOKEN);
    let mut service = stack(&jwts, api.service());
    let response = service.ready().await.unwrap().call(request()).await.unwrap();
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(api.bearers(), ["token-1", "token-2"], "exactly two sends");
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), INVALID_TOKEN);

    for _ in 0..100 {
        let response = service.ready().await.unwrap().call(request()).await.unwrap();
        assert_eq!(response.status(), StatusCode::UNAUTHORIZED, "requests still get an answer");
    }
    assert_eq!(fetches.load(SeqCst), 2, "the breaker blocks refreshes");
    sleep(Duration::from_secs(2)).await;
    service.ready().await.unwrap().call(request()).await.unwrap();
    assert_eq!(fetches.load(SeqCst), 3, "the breaker lets one refresh through later");
}

/// J5: while every token is rejected, refreshes back off and every request still gets its 401.
#[tokio::test(start_paused = true)]
async fn refreshes_back_off_while_tokens_are_rejected() {
    let (jwts, fetches) = counting();
    let api = Api::accepting("none of them", INVALID_TOKEN);
    let service = stack(&jwts, api.service());
    for _ in 0..1_000 {
        let response = service.clone().oneshot(request()).await.unwrap();
        assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
        sleep(SECOND / 2).await;
    }
    // Refreshes follow after 1, 2, 4, 8, 16, 32 and then every 60 seconds, plus one each time a token reaches its
    // assumed lifetime of five minutes.
    let refreshes = fetches.load(SeqCst);
    assert!((10..=18).contains(&refreshes), "{refreshes} refreshes in eight minutes");
    let sends = api.bearers().len();
    assert!(sends > 1_000 && sends < 1_000 + refreshes, "{sends} sends");

    // Five minutes without a rejection reset the back-off.
    sleep(301 * SECOND).await;
    for (pause, expected) in [(0, 2), (1, 1), (0, 0), (2, 1)] {
        sleep(pause * SECOND).await;
        let before = fetches.load(SeqCst);
        service.clone().oneshot(request()).await.unwrap();
        assert_eq!(fetches.load(SeqCst) - before, expected, "after {pause} seconds");
    }
}

/// J5: quick rotations are not limited as long as the API accepts the new tokens.
#[tokio::test(start_paused = true)]
async fn quick_rotations_are_not_limited() {
    let (jwts, fetches) = counting();
    let api = Api::accepting("token-1", INVALID_TOKEN);
    let service = stack(&jwts, api.service());
    for rotation in 1..=50 {
        api.accept(&format!("token-{rotation}"));
        for _ in 0..3 {
            let response = service.clone().oneshot(request()).await.unwrap();
            assert_eq!(response.status(), StatusCode::OK, "rotation {rotation}");
        }
        assert_eq!(fetches.load(SeqCst), rotation);
    }
    // The first rejection after the rotations still refreshes; the ones that follow are limited.
    api.accept("none of them");
    for refreshes in [51, 51, 51] {
        assert_eq!(service.clone().oneshot(request()).await.unwrap().status(), StatusCode::UNAUTHORIZED);
        assert_eq!(fetches.load(SeqCst), refreshes);
    }
}

/// J5: a 503, 429, 307 or 404 does not prove that the API accepted the token.
#[tokio::test(start_paused = true)]
async fn other_statuses_do_not_count_as_acceptance() {
    for status in [503, 429, 307, 404] {
        let (jwts, fetches) = counting();
        let api = Api::accepting("none of them", INVALID_TOKEN);
        let (rejecting, sends) = (api.service(), Arc::new(AtomicUsize::new(0)));
        // Another server answers every second send.
        let flaky = service_fn(move |request: Request<Body>| {
            let (rejecting, other) = (rejecting.clone(), sends.fetch_add(1, SeqCst) % 2 == 1);
            async move {
                match other {
                    true => Ok(Response::builder().status(status).body(Body::default())?),
                    false => rejecting.oneshot(request).await,
                }
            }
        });
        let service = stack(&jwts, flaky);
        assert_eq!(service.clone().oneshot(request()).await.unwrap().status(), status);
        assert_eq!(service.oneshot(request()).await.unwrap().status(), StatusCode::UNAUTHORIZED);
        assert_eq!(fetches.load(SeqCst), 2, "after {status}, a second refresh would be too soon");
    }
}

/// J6: `invalid_api_key` blames the key, not the JWT; the request is replayed only if the key changed.
#[tokio::test(start_paused = true)]
async fn invalid_api_key_blames_the_key() {
    let (jwts, fetches) = counting();
    let stored = Arc::new(Mutex::new("sk-selam-old".to_owned()));
    let reader = Arc::clone(&stored);
    let keys = Refreshing::new(source_fn(move |_: Reason<ApiKey>| {
        let key = reader.lock().unwrap().clone();
        async move { Ok::<_, BoxError>(ApiKey::new(key)?) }
    }));
    let api = Api::accepting("no token", INVALID_KEY);
    let service =
        RefreshLayer::new().layer((JwtLayer::new(&jwts), ApiKeyLayer::x_api_key(&keys)).layer(api.service()));

    let response = service.clone().oneshot(request()).await.unwrap();
    assert_eq!(
        (response.status(), api.bearers().len()),
        (StatusCode::UNAUTHORIZED, 1),
        "the key has not changed"
    );
    "sk-selam-new".clone_into(&mut stored.lock().unwrap());
    sleep(Duration::from_secs(2)).await;
    let _ = service.oneshot(request()).await.unwrap();
    let sent: Vec<_> = api.received.lock().unwrap().iter().map(|sent| sent.key.clone()).collect();
    assert_eq!(sent, ["sk-selam-old", "sk-selam-old", "sk-selam-new"], "replayed once, with the new key");
    assert_eq!(fetches.load(SeqCst), 1, "the JWT is not refreshed");
    assert_eq!(keys.api_key().await.unwrap().expose_secret(), "sk-selam-new");
}

/// J6, J11: a credential that the 401 does not blame is not fetched again, and a missing permission blames none.
#[tokio::test(start_paused = true)]
async fn only_the_blamed_credential_is_refreshed() {
    const MISSING: &str = r#"{"error":{"message":"Missing API key.","code":"missing_api_key"}}"#;
    // The body of the 401; whether the key comes from a source; how many JWT fetches, key reads and sends follow.
    for (error_body, key_from_source, expected) in [
        (MISSING, true, (1, 1, 1)),
        (INVALID_KEY, false, (1, 0, 1)),
        (INVALID_KEY, true, (1, 2, 2)),
        (INVALID_TOKEN, true, (2, 1, 2)),
        ("", true, (2, 1, 2)),
        (r#"{"error":{"code":"insufficient_permissions","type":"authentication_error"}}"#, true, (1, 1, 1)),
        (r#"{"error":{"code":null,"type":"insufficient_scope"}}"#, true, (1, 1, 1)),
        (r#"{"error":{"type":"permission_error","message":"no"}}"#, true, (1, 1, 1)),
        (
            r#"{"error":{"message":"You have insufficient permissions. Missing scopes: a.b."}}"#,
            true,
            (1, 1, 1),
        ),
        (r#"{"detail":"missing_scope: models.read"}"#, true, (1, 1, 1)),
        (r#"{"detail":{"error":{"code":"invalid_api_key"}}}"#, true, (1, 2, 2)),
        (r#"{"message":"upstream: {\"error\":{\"code\":\"invalid_api_key\"}}"}"#, true, (1, 2, 2)),
        ("event: error\ndata: {\"error\":{\"code\":\"invalid_api_key\"}}\n\n", true, (1, 2, 2)),
        (r#"{"detail":"Invalid API key"}"#, true, (1, 2, 2)),
    ] {
        for halves in [false, true] {
            let ((jwts, fetches), reads) = (counting(), Arc::new(AtomicUsize::new(0)));
            let counter = Arc::clone(&reads);
            let keys = Refreshing::new(source_fn(move |_: Reason<ApiKey>| {
                let number = counter.fetch_add(1, SeqCst) + 1;
                async move { Ok::<_, BoxError>(ApiKey::new(format!("sk-selam-{number}"))?) }
            }));
            let key = || if key_from_source { Provider::from(&keys) } else { key().into() };
            let api = Api::accepting("none of them", error_body);
            let service = if halves {
                let inner = ApiKeyLayer::x_api_key(key()).layer(api.service());
                BoxCloneSyncService::new(RefreshLayer::new().layer(JwtLayer::new(&jwts).layer(inner)))
            } else {
                BoxCloneSyncService::new(
                    RefreshLayer::new()
                        .layer((JwtLayer::new(&jwts), ApiKeyLayer::x_api_key(key())).layer(api.service())),
                )
            };
            let response = service.oneshot(request()).await.unwrap();
            assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
            let body = response.into_body().collect().await.unwrap().to_bytes();
            assert_eq!(body, error_body, "the 401 is returned intact");
            let counts = (fetches.load(SeqCst), reads.load(SeqCst), api.bearers().len());
            assert_eq!(
                counts, expected,
                "{error_body}, key from a source: {key_from_source}, halves: {halves}"
            );
        }
    }
}

/// J6: any 401 blames a key that was sent alone; the rotated key is read and the request replayed.
#[tokio::test(start_paused = true)]
async fn any_401_blames_a_key_sent_alone() {
    for error_body in [INVALID_KEY, INVALID_TOKEN, ""] {
        let api = Api::accepting("sk-selam-new", error_body);
        let reads = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&reads);
        let keys = Refreshing::new(source_fn(move |_: Reason<ApiKey>| {
            let text = if counter.fetch_add(1, SeqCst) == 0 { "sk-selam-old" } else { "sk-selam-new" };
            async move { Ok::<_, BoxError>(ApiKey::new(text)?) }
        }));
        let service = RefreshLayer::new().layer(ApiKeyLayer::bearer(keys).layer(api.service()));
        assert_eq!(service.oneshot(request()).await.unwrap().status(), StatusCode::OK);
        assert_eq!(api.bearers(), ["sk-selam-old", "sk-selam-new"]);
    }
}

/// A 403 is returned without a refresh; a 401 for custom credentials causes neither refresh nor replay.
#[tokio::test(start_paused = true)]
async fn custom_credentials_and_403_cause_no_refresh() {
    let (jwts, fetches) = counting();
    let forbidden = service_fn(|_: Request<Body>| async {
        Ok::<_, BoxError>(Response::builder().status(403).body(Body::default())?)
    });
    assert_eq!(stack(&jwts, forbidden).oneshot(request()).await.unwrap().status(), StatusCode::FORBIDDEN);
    let api = Api::accepting("token-9", INVALID_TOKEN);
    let mut custom = request();
    custom
        .extensions_mut()
        .insert(RequestAuth::Custom(Credentials::key_and_jwt(key(), Token::new("custom").unwrap())));
    stack(&jwts, api.service()).oneshot(custom).await.unwrap();
    assert_eq!(api.bearers(), ["custom"]);
    assert_eq!(fetches.load(SeqCst), 1);
}

/// Retries responses with this status, up to `left` times, after a pause.
#[derive(Clone)]
struct RetryOn {
    status: StatusCode,
    left: usize,
    pause: Duration,
}

impl<B> tower::retry::Policy<Request<Body>, Response<B>, BoxError> for RetryOn {
    type Future = Sleep;

    fn retry(
        &mut self,
        _: &mut Request<Body>,
        result: &mut Result<Response<B>, BoxError>,
    ) -> Option<Self::Future> {
        let retry = self.left > 0 && result.as_ref().is_ok_and(|response| response.status() == self.status);
        self.left = self.left.saturating_sub(1);
        retry.then(|| sleep(self.pause))
    }

    fn clone_request(&mut self, request: &Request<Body>) -> Option<Request<Body>> {
        Some(request.clone())
    }
}

/// J9: with `tower::retry` outside or inside the layer, sends do not multiply.
#[tokio::test(start_paused = true)]
async fn sends_do_not_multiply_with_retry() {
    // Retry outside: after the first attempt the token is newly refreshed, and the breaker allows no refresh.
    let (jwts, fetches) = counting();
    let api = Api::accepting("none of them", INVALID_TOKEN);
    let outside = tower::retry::RetryLayer::new(RetryOn {
        status: StatusCode::UNAUTHORIZED,
        left: 2,
        pause: Duration::ZERO,
    });
    let response = outside.layer(stack(&jwts, api.service())).oneshot(request()).await.unwrap();
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(api.bearers(), ["token-1", "token-2", "token-2", "token-2"]);
    assert_eq!(fetches.load(SeqCst), 2);

    // Once the pauses outlast the breaker, each attempt may refresh: two sends per attempt and no more.
    let (jwts, fetches) = counting();
    let api = Api::accepting("none of them", INVALID_TOKEN);
    let outside = RetryOn { status: StatusCode::UNAUTHORIZED, left: 2, pause: 5 * SECOND };
    let outside = tower::retry::RetryLayer::new(outside);
    outside.layer(stack(&jwts, api.service())).oneshot(request()).await.unwrap();
    assert_eq!(api.bearers(), ["token-1", "token-2", "token-2", "token-3", "token-3", "token-4"]);
    assert_eq!(fetches.load(SeqCst), 4);

    // Retry inside: `tower::retry` handles the 503s and `RefreshLayer` the 401.
    let (jwts, fetches) = counting();
    let answers = Arc::new(AtomicUsize::new(0));
    let sends = Arc::clone(&answers);
    let flaky = service_fn(move |_: Request<Body>| {
        let status = [503, 401, 503, 200, 500][answers.fetch_add(1, SeqCst).min(4)];
        async move { Ok::<_, BoxError>(Response::builder().status(status).body(Body::default())?) }
    });
    let inside = tower::retry::RetryLayer::new(RetryOn {
        status: StatusCode::SERVICE_UNAVAILABLE,
        left: 2,
        pause: Duration::ZERO,
    });
    let response = stack(&jwts, inside.layer(flaky)).oneshot(request()).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!((sends.load(SeqCst), fetches.load(SeqCst)), (4, 2));
}

/// H5: `SelamLayer` replays after a rotation; without replay, the first request fails and the next one succeeds.
#[tokio::test(start_paused = true)]
async fn selam_layer_follows_a_rotation() {
    let (jwts, _) = counting();
    jwts.prefetch().await.unwrap();
    let api = Api::accepting("token-2", INVALID_TOKEN);
    let layer = SelamLayer::builder().with_api_key(key()).with_jwt(&jwts).build().unwrap();
    assert_eq!(layer.layer(api.service()).oneshot(request()).await.unwrap().status(), StatusCode::OK);
    api.accept("token-3");
    sleep(Duration::from_secs(2)).await;
    let without_replay = layer.without_replay().layer(api.service());
    assert!(without_replay.clone().oneshot(request()).await.unwrap_err().auth().is_some());
    assert_eq!(without_replay.oneshot(request()).await.unwrap().status(), StatusCode::OK);
}

/// R1: while the refreshing token is fresh, a request without extensions allocates nothing, except the first of each service.
#[tokio::test(start_paused = true)]
async fn fresh_token_costs_no_allocation() {
    let (jwts, _) = counting();
    jwts.prefetch().await.unwrap();
    let api = service_fn(|request: Request<Body>| {
        let (parts, _) = request.into_parts();
        std::mem::forget(parts.headers);
        std::future::ready(Ok::<_, BoxError>(Response::new(Body::default())))
    });
    // Two services over one engine take turns.
    let layer = || SelamLayer::builder().with_api_key(key()).with_jwt(&jwts).build().unwrap();
    let mut services = [layer().layer(api), layer().layer(api)];
    for turn in 0..6 {
        let service = &mut services[turn % 2];
        let request = Request::get(MODELS)
            .header("accept", "x")
            .header("content-type", "x")
            .header("user-agent", "x")
            .body(Body::default())
            .unwrap();
        let counted = allocation_counter::measure(|| {
            let mut call = std::pin::pin!(service.call(request));
            let mut context = std::task::Context::from_waker(std::task::Waker::noop());
            assert!(call.as_mut().poll(&mut context).is_ready());
        });
        // The first request of each service makes the spare clone of its client, and that of the thread the buffers that
        // keep a head.
        assert!(turn < 2 || counted.count_total == 0, "{counted:?}");
    }
}
