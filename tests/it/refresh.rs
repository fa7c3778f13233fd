//! J1 to J6 and J9: what a 401 leads to.

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
    ApiKey, ApiKeyLayer, BoxError, JwtLayer, Provider, RefreshLayer, RefreshPolicy, Refreshing, RequestAuth,
    SelamLayer,
    source::{Fetched, Reason, source_fn},
};

use crate::{
    api::{Api, INVALID_KEY, INVALID_TOKEN, counting, request, stack},
    mint::{Answer, MINUTE, Mint, SECOND, clock, engine, settle, text},
    support::{Body, KEY, MODELS, key},
};

#[tokio::test(start_paused = true)]
async fn j1_a_late_401_for_an_older_token_is_replayed_with_the_newer() {
    let (jwts, asked) = counting();
    let api = Api::accepting("token-2", INVALID_TOKEN);
    let first = jwts.token().await.unwrap();
    let slow = Arc::new(Semaphore::new(0));
    let call = tokio::spawn(stack(&jwts, api.gated(&slow).service()).oneshot(request()));
    sleep(Duration::from_millis(1)).await;
    jwts.invalidate(&first);
    jwts.token().await.unwrap();
    slow.add_permits(2);
    assert_eq!(call.await.unwrap().unwrap().status(), StatusCode::OK);
    assert_eq!(api.bearers(), ["token-1", "token-2"]);
    assert_eq!(asked.load(SeqCst), 2, "no renewal for it");
    assert_eq!(jwts.token().await.unwrap().expose_secret(), "token-2");
}

#[tokio::test(start_paused = true)]
async fn j2_a_thousand_refusals_at_once_cause_one_renewal() {
    let (jwts, asked) = counting();
    jwts.prefetch().await.unwrap();
    let api = Api::accepting("token-2", INVALID_TOKEN);
    let gate = Arc::new(Semaphore::new(0));
    let gated = api.gated(&gate);
    let calls: Vec<_> =
        (0..1_000).map(|_| tokio::spawn(stack(&jwts, gated.service()).oneshot(request()))).collect();
    settle().await;
    assert_eq!(api.bearers().len(), 1_000, "all are on their way");
    gate.add_permits(2_000);
    for call in calls {
        assert_eq!(call.await.unwrap().unwrap().status(), StatusCode::OK);
    }
    assert_eq!(asked.load(SeqCst), 2);
    let sent = [("token-1", 1_000), ("token-2", 1_000)].map(|(bearer, times)| (bearer.to_owned(), times));
    assert_eq!(api.tally(), sent.into());
}

/// A renewal that takes a second begins in the advisory window of `token-1`, and while it runs the API refuses
/// that: what becomes of the request, of another that comes in the meantime, and after how long.
async fn refused_while_renewing(mint: &Mint, accepts: &str) -> (Api, Duration) {
    let (jwts, _) = engine(mint);
    jwts.prefetch().await.unwrap();
    advance(54 * SECOND).await;
    mint.takes(SECOND);
    assert_eq!(text(&jwts).await.unwrap(), "token-1");
    settle().await;
    let api = Api::accepting(accepts, INVALID_TOKEN);
    let began = Instant::now();
    let refused = tokio::spawn(stack(&jwts, api.service()).oneshot(request()));
    sleep(SECOND / 2).await;
    assert_eq!((api.bearers(), jwts.current().is_none()), (vec!["token-1".to_owned()], true));
    let another = tokio::spawn(stack(&jwts, api.service()).oneshot(request()));
    for call in [refused, another] {
        assert_eq!(call.await.unwrap().unwrap().status(), StatusCode::OK);
    }
    (api, began.elapsed())
}

#[tokio::test(start_paused = true)]
async fn j3_a_renewal_begun_before_the_rejection_does_not_bring_back_what_was_rejected() {
    let mint = Mint::default().then(Answer::Lives(MINUTE)).then(Answer::Same("token-1", 2 * MINUTE));
    let (api, time) = refused_while_renewing(&mint, "token-3").await;
    assert_eq!(api.bearers(), ["token-1", "token-3", "token-3"]);
    assert_eq!(mint.reasons(), ["first", "expiring token-1", "rejected token-1"], "once more, at once");
    assert_eq!(time.as_secs(), 2);
}

#[tokio::test(start_paused = true)]
async fn j3_a_renewal_begun_before_the_rejection_that_brings_another_is_enough() {
    let mint = Mint::default();
    let (api, time) = refused_while_renewing(&mint, "token-2").await;
    assert_eq!(api.bearers(), ["token-1", "token-2", "token-2"]);
    assert_eq!(
        (mint.reasons(), time.as_secs()),
        (vec!["first".to_owned(), "expiring token-1".to_owned()], 1)
    );
}

#[tokio::test(start_paused = true)]
async fn j3_a_renewal_begun_after_the_rejection_that_brings_the_same_is_a_failure() {
    let mint = Mint::default().then(Answer::Lives(MINUTE)).then_always(Answer::Same("token-1", MINUTE));
    let (jwts, _) = engine(&mint);
    let api = Api::accepting("token-2", INVALID_TOKEN);
    let mut service = stack(&jwts, api.service());
    let response = service.ready().await.unwrap().call(request()).await.unwrap();
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED, "there is no other");
    for _ in 0..10 {
        let error = service.ready().await.unwrap().call(request()).await.unwrap_err();
        assert!(error.to_string().contains("what the API has refused"), "{error}");
    }
    assert_eq!((api.bearers(), mint.asked()), (vec!["token-1".to_owned()], 2));
}

#[tokio::test(start_paused = true)]
async fn j3_a_renewal_begun_after_the_rejection_is_joined() {
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
    assert_eq!(mint.asked(), 2, "the late one waits for the renewal that runs");
    for call in [first, late] {
        assert_eq!(call.await.unwrap().unwrap().status(), StatusCode::OK);
    }
    assert_eq!(api.bearers(), ["token-1", "token-1", "token-2", "token-2"]);
    assert_eq!(mint.reasons(), ["first", "rejected token-1"]);
}

#[tokio::test(start_paused = true)]
async fn j3_a_key_that_was_read_before_the_rejection_is_read_again() {
    // Looking again takes a second, and the file is replaced only after that has begun.
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
    assert_eq!(reads.load(SeqCst), 2, "it is looking again");
    let api = Api::accepting("sk-selam-new", INVALID_KEY);
    let service = RefreshLayer::new().layer(ApiKeyLayer::bearer(&keys).layer(api.service()));
    assert_eq!(service.oneshot(request()).await.unwrap().status(), StatusCode::OK);
    assert_eq!((api.bearers(), reads.load(SeqCst)), (vec!["sk-selam-old".into(), "sk-selam-new".into()], 3));
}

#[tokio::test(start_paused = true)]
async fn j4_j5_the_second_401_goes_up_and_renewals_are_limited() {
    let (jwts, asked) = counting();
    let api = Api::accepting("none of them", INVALID_TOKEN);
    let mut service = stack(&jwts, api.service());
    let response = service.ready().await.unwrap().call(request()).await.unwrap();
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(api.bearers(), ["token-1", "token-2"], "exactly two sends");
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), INVALID_TOKEN);

    for _ in 0..100 {
        let response = service.ready().await.unwrap().call(request()).await.unwrap();
        assert_eq!(response.status(), StatusCode::UNAUTHORIZED, "requests still answer");
    }
    assert_eq!(asked.load(SeqCst), 2, "the breaker holds");
    sleep(Duration::from_secs(2)).await;
    service.ready().await.unwrap().call(request()).await.unwrap();
    assert_eq!(asked.load(SeqCst), 3, "and lets one through after a while");
}

#[tokio::test(start_paused = true)]
async fn j5_renewals_of_what_is_always_refused_are_spaced_ever_wider_and_every_request_is_answered() {
    let (jwts, asked) = counting();
    let api = Api::accepting("none of them", INVALID_TOKEN);
    let service = stack(&jwts, api.service());
    for _ in 0..5_000 {
        let response = service.clone().oneshot(request()).await.unwrap();
        assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
        sleep(SECOND / 10).await;
    }
    // After 1, 2, 4, 8, 16, 32 and then every 60 seconds; and one for each five minutes that a token lives.
    let renewals = asked.load(SeqCst);
    assert!((10..=18).contains(&renewals), "{renewals} in eight minutes");
    let sends = api.bearers().len();
    assert!(sends > 5_000 && sends < 5_000 + renewals, "{sends} sends");

    // After five minutes without a refusal they are spaced as at first.
    sleep(301 * SECOND).await;
    for (pause, renews) in [(0, 2), (1, 1), (0, 0), (2, 1)] {
        sleep(pause * SECOND).await;
        let before = asked.load(SeqCst);
        service.clone().oneshot(request()).await.unwrap();
        assert_eq!(asked.load(SeqCst) - before, renews, "after {pause} seconds");
    }
}

#[tokio::test(start_paused = true)]
async fn j5_rotations_however_quick_are_not_limited_while_the_new_ones_are_accepted() {
    let (jwts, asked) = counting();
    let api = Api::accepting("token-1", INVALID_TOKEN);
    let service = stack(&jwts, api.service());
    for rotation in 1..=50 {
        api.accept(&format!("token-{rotation}"));
        for _ in 0..3 {
            let response = service.clone().oneshot(request()).await.unwrap();
            assert_eq!(response.status(), StatusCode::OK, "rotation {rotation}");
        }
        assert_eq!(asked.load(SeqCst), rotation);
    }
    // Nor is the first that is refused after them, and then they are.
    api.accept("none of them");
    for renewals in [51, 51, 51] {
        assert_eq!(service.clone().oneshot(request()).await.unwrap().status(), StatusCode::UNAUTHORIZED);
        assert_eq!(asked.load(SeqCst), renewals);
    }
}

#[tokio::test(start_paused = true)]
async fn j5_a_server_that_fails_or_limits_has_accepted_nothing() {
    for status in [503, 429, 307, 404] {
        let (jwts, asked) = counting();
        let api = Api::accepting("none of them", INVALID_TOKEN);
        let (refusing, seen) = (api.service(), Arc::new(AtomicUsize::new(0)));
        // Every second send is answered by another than the API.
        let flaky = service_fn(move |request: Request<Body>| {
            let (refusing, other) = (refusing.clone(), seen.fetch_add(1, SeqCst) % 2 == 1);
            async move {
                match other {
                    true => Ok(Response::builder().status(status).body(Body::default())?),
                    false => refusing.oneshot(request).await,
                }
            }
        });
        let service = stack(&jwts, flaky);
        assert_eq!(service.clone().oneshot(request()).await.unwrap().status(), status);
        assert_eq!(service.oneshot(request()).await.unwrap().status(), StatusCode::UNAUTHORIZED);
        assert_eq!(asked.load(SeqCst), 2, "after {status}, the second is too soon");
    }
}

#[tokio::test(start_paused = true)]
async fn j6_invalid_api_key_blames_the_key_which_is_replayed_only_if_it_changed() {
    let (jwts, asked) = counting();
    let held = Arc::new(Mutex::new("sk-selam-old".to_owned()));
    let place = Arc::clone(&held);
    let keys = Refreshing::new(source_fn(move |_: Reason<ApiKey>| {
        let key = place.lock().unwrap().clone();
        async move { Ok::<_, BoxError>(ApiKey::new(key)?) }
    }));
    let api = Api::accepting("no token", INVALID_KEY);
    let service = RefreshLayer::new().layer(JwtLayer::new(&jwts, &keys).layer(api.service()));

    let response = service.clone().oneshot(request()).await.unwrap();
    assert_eq!(
        (response.status(), api.bearers().len()),
        (StatusCode::UNAUTHORIZED, 1),
        "the key is the same"
    );
    "sk-selam-new".clone_into(&mut held.lock().unwrap());
    sleep(Duration::from_secs(2)).await;
    let _ = service.oneshot(request()).await.unwrap();
    let sent: Vec<_> = api.received.lock().unwrap().iter().map(|sent| sent.key.clone()).collect();
    assert_eq!(sent, ["sk-selam-old", "sk-selam-old", "sk-selam-new"], "once more, with the new key");
    assert_eq!(asked.load(SeqCst), 1, "the JWT is not to blame");
    assert_eq!(keys.api_key().await.unwrap().expose_secret(), "sk-selam-new");
}

#[tokio::test(start_paused = true)]
async fn j6_what_is_not_at_fault_is_left_alone() {
    const MISSING: &str = r#"{"error":{"message":"Missing API key.","code":"missing_api_key"}}"#;
    // What the API says, whether the key is from a source; how often JWT, key and API are asked.
    for (refusal, renewing, expected) in [
        (MISSING, true, (1, 1, 1)),
        (INVALID_KEY, false, (1, 0, 1)),
        (INVALID_KEY, true, (1, 2, 2)),
        (INVALID_TOKEN, true, (2, 1, 2)),
        ("", true, (2, 1, 2)),
    ] {
        for halves in [false, true] {
            let ((jwts, asked), reads) = (counting(), Arc::new(AtomicUsize::new(0)));
            let counter = Arc::clone(&reads);
            let keys = Refreshing::new(source_fn(move |_: Reason<ApiKey>| {
                let number = counter.fetch_add(1, SeqCst) + 1;
                async move { Ok::<_, BoxError>(ApiKey::new(format!("sk-selam-{number}"))?) }
            }));
            let key = || if renewing { Provider::from(&keys) } else { key().into() };
            let api = Api::accepting("none of them", refusal);
            let service = if halves {
                let inner = ApiKeyLayer::beside_jwt(key()).layer(api.service());
                BoxCloneSyncService::new(
                    RefreshLayer::new().layer(JwtLayer::beside_api_key(&jwts).layer(inner)),
                )
            } else {
                BoxCloneSyncService::new(
                    RefreshLayer::new().layer(JwtLayer::new(&jwts, key()).layer(api.service())),
                )
            };
            let response = service.oneshot(request()).await.unwrap();
            assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
            let body = response.into_body().collect().await.unwrap().to_bytes();
            assert_eq!(body, refusal, "the 401 as it came");
            let asked = (asked.load(SeqCst), reads.load(SeqCst), api.bearers().len());
            assert_eq!(asked, expected, "{refusal}, key from a source: {renewing}, halves: {halves}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn j6_a_key_that_was_rotated_is_read_again_and_where_it_goes_alone_any_401_blames_it() {
    for refusal in [INVALID_KEY, INVALID_TOKEN, ""] {
        let api = Api::accepting("sk-selam-new", refusal);
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

#[tokio::test(start_paused = true)]
async fn a_403_is_never_sent_again_nor_is_anything_with_credentials_of_its_own() {
    let (jwts, asked) = counting();
    let forbidden = service_fn(|_: Request<Body>| async {
        Ok::<_, BoxError>(Response::builder().status(403).body(Body::default())?)
    });
    assert_eq!(stack(&jwts, forbidden).oneshot(request()).await.unwrap().status(), StatusCode::FORBIDDEN);
    let api = Api::accepting("token-9", INVALID_TOKEN);
    let mut own = request();
    own.extensions_mut().insert(RequestAuth::Custom(tower_selam::Credentials::bearer(key())));
    stack(&jwts, api.service()).oneshot(own).await.unwrap();
    assert_eq!(api.bearers(), [KEY]);
    assert_eq!(asked.load(SeqCst), 1);
}

/// Sends again, up to three times in all, what was answered with this status.
#[derive(Clone)]
struct Again {
    status: StatusCode,
    left: usize,
    pause: Duration,
}

impl<B> tower::retry::Policy<Request<Body>, Response<B>, BoxError> for Again {
    type Future = Sleep;

    fn retry(
        &mut self,
        _: &mut Request<Body>,
        result: &mut Result<Response<B>, BoxError>,
    ) -> Option<Self::Future> {
        let again = self.left > 0 && result.as_ref().is_ok_and(|response| response.status() == self.status);
        self.left = self.left.saturating_sub(1);
        again.then(|| sleep(self.pause))
    }

    fn clone_request(&mut self, request: &Request<Body>) -> Option<Request<Body>> {
        Some(request.clone())
    }
}

#[tokio::test(start_paused = true)]
async fn j9_sends_do_not_multiply_over_or_under_a_retry() {
    // Over: each attempt after the first finds a token that was just renewed, which is not renewed again.
    let (jwts, asked) = counting();
    let api = Api::accepting("none of them", INVALID_TOKEN);
    let over = tower::retry::RetryLayer::new(Again {
        status: StatusCode::UNAUTHORIZED,
        left: 2,
        pause: Duration::ZERO,
    });
    let response = over.layer(stack(&jwts, api.service())).oneshot(request()).await.unwrap();
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(api.bearers(), ["token-1", "token-2", "token-2", "token-2"]);
    assert_eq!(asked.load(SeqCst), 2);

    // With pauses as long as the breaker's, each attempt may have its own renewal: it sends twice, and not more.
    let (jwts, asked) = counting();
    let api = Api::accepting("none of them", INVALID_TOKEN);
    let over = Again { status: StatusCode::UNAUTHORIZED, left: 2, pause: 5 * SECOND };
    let over = tower::retry::RetryLayer::new(over);
    over.layer(stack(&jwts, api.service())).oneshot(request()).await.unwrap();
    assert_eq!(api.bearers(), ["token-1", "token-2", "token-2", "token-3", "token-3", "token-4"]);
    assert_eq!(asked.load(SeqCst), 4);

    // Under: what is about the service is the retry's, what is about the token is ours.
    let (jwts, asked) = counting();
    let answers = Arc::new(AtomicUsize::new(0));
    let sends = Arc::clone(&answers);
    let flaky = service_fn(move |_: Request<Body>| {
        let status = [503, 401, 503, 200, 500][answers.fetch_add(1, SeqCst).min(4)];
        async move { Ok::<_, BoxError>(Response::builder().status(status).body(Body::default())?) }
    });
    let under = tower::retry::RetryLayer::new(Again {
        status: StatusCode::SERVICE_UNAVAILABLE,
        left: 2,
        pause: Duration::ZERO,
    });
    let response = stack(&jwts, under.layer(flaky)).oneshot(request()).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!((sends.load(SeqCst), asked.load(SeqCst)), (4, 2));
}

#[tokio::test(start_paused = true)]
async fn h5_the_whole_stack_replays_a_rotation_and_sends_one_set_at_a_time() {
    let (jwts, _) = counting();
    jwts.prefetch().await.unwrap();
    let api = Api::accepting("token-2", INVALID_TOKEN);
    let layer = SelamLayer::builder().with_api_key(key()).with_jwt(&jwts).build().unwrap();
    assert_eq!(layer.layer(api.service()).oneshot(request()).await.unwrap().status(), StatusCode::OK);
    api.accept("token-3");
    sleep(Duration::from_secs(2)).await;
    let stream = layer.without_replay().layer(api.service());
    assert!(stream.clone().oneshot(request()).await.unwrap_err().auth().is_some());
    assert_eq!(stream.oneshot(request()).await.unwrap().status(), StatusCode::OK);
}

#[tokio::test(start_paused = true)]
async fn r1_a_request_with_a_fresh_renewing_token_allocates_nothing() {
    let (jwts, _) = counting();
    jwts.prefetch().await.unwrap();
    let api = service_fn(|request: Request<Body>| {
        let (parts, _) = request.into_parts();
        std::mem::forget(parts.headers);
        std::future::ready(Ok::<_, BoxError>(Response::new(Body::default())))
    });
    // Two that share one engine, in turn.
    let layer = || SelamLayer::builder().with_api_key(key()).with_jwt(&jwts).build().unwrap();
    let mut services = [layer().layer(api), layer().layer(api)];
    // The first request makes the set and the copy that the others use again.
    let mut allocations = 0;
    for turn in 0..6 {
        let service = &mut services[turn % 2];
        let mut request = Some(Request::get(MODELS).body(Body::default()).unwrap());
        let shared = request.as_ref().map(|request| request.uri().clone());
        for name in ["accept", "content-type", "user-agent"] {
            let value = http::HeaderValue::from_static("x");
            request.as_mut().unwrap().headers_mut().insert(name, value);
        }
        let counted = allocation_counter::measure(|| {
            let mut call = std::pin::pin!(service.call(request.take().unwrap()));
            let mut context = std::task::Context::from_waker(std::task::Waker::noop());
            assert!(call.as_mut().poll(&mut context).is_ready());
        });
        drop(shared);
        allocations = counted.count_total;
    }
    assert_eq!(allocations, 0);
}
