//! J1 to J7, J9 and T1: what a 401 leads to.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use tokio::sync::Semaphore;
use tower::{Layer, Service, ServiceBuilder, ServiceExt, limit::ConcurrencyLimitLayer, service_fn};
use tower_selam::{
    ApiKey, ApiKeyLayer, BoxError, JwtLayer, RefreshLayer, Renewing, RequestAuth, SelamLayer, Token,
    source::{Reason, source_fn},
};

use crate::{
    api::{Api, INVALID_KEY, INVALID_TOKEN, request},
    support::{Body, KEY, MODELS, key},
};

/// A source of `token-1`, `token-2`, …, and how often it was asked.
fn counting() -> (Renewing<Token>, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&asked);
    let source = source_fn(move |_: Reason<Token>| {
        let number = counter.fetch_add(1, SeqCst) + 1;
        async move {
            tokio::time::sleep(Duration::from_millis(50)).await;
            Ok::<_, BoxError>(Token::new(format!("token-{number}"))?)
        }
    });
    (Renewing::new(source), asked)
}

fn stack<S: Clone>(
    jwts: &Renewing<Token>,
    inner: S,
) -> <RefreshLayer as Layer<tower_selam::authorize::Authorize<S>>>::Service {
    RefreshLayer::new().layer(JwtLayer::new(jwts, key()).layer(inner))
}

#[tokio::test(start_paused = true)]
async fn j1_a_late_401_for_an_older_token_is_replayed_with_the_newer() {
    let (jwts, asked) = counting();
    let api = Api::accepting("token-2", INVALID_TOKEN);
    let first = jwts.token().await.unwrap();
    let slow = Arc::new(Semaphore::new(0));
    let call = tokio::spawn(stack(&jwts, api.gated(&slow).service()).oneshot(request()));
    tokio::time::sleep(Duration::from_millis(1)).await;
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
    let calls: Vec<_> =
        (0..1_000).map(|_| tokio::spawn(stack(&jwts, api.service()).oneshot(request()))).collect();
    for call in calls {
        assert_eq!(call.await.unwrap().unwrap().status(), StatusCode::OK);
    }
    assert_eq!(asked.load(SeqCst), 2);
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
    tokio::time::sleep(Duration::from_secs(2)).await;
    service.ready().await.unwrap().call(request()).await.unwrap();
    assert_eq!(asked.load(SeqCst), 3, "and lets one through after a while");
}

#[tokio::test(start_paused = true)]
async fn j6_invalid_api_key_blames_the_key_which_is_replayed_only_if_it_changed() {
    let (jwts, asked) = counting();
    let held = Arc::new(Mutex::new("sk-selam-old".to_owned()));
    let place = Arc::clone(&held);
    let keys = Renewing::new(source_fn(move |_: Reason<ApiKey>| {
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
    tokio::time::sleep(Duration::from_secs(2)).await;
    let _ = service.oneshot(request()).await.unwrap();
    let sent: Vec<_> = api.received.lock().unwrap().iter().map(|sent| sent.head.contains("new")).collect();
    assert_eq!(sent.len(), 3, "once more, with the new key");
    assert_eq!(asked.load(SeqCst), 1, "the JWT is not to blame");
    assert_eq!(keys.api_key().await.unwrap().expose_secret(), "sk-selam-new");
}

#[tokio::test(start_paused = true)]
async fn j6_a_key_that_was_rotated_is_read_again() {
    let api = Api::accepting("sk-selam-new", INVALID_KEY);
    let reads = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&reads);
    let keys = Renewing::new(source_fn(move |_: Reason<ApiKey>| {
        let text = if counter.fetch_add(1, SeqCst) == 0 { "sk-selam-old" } else { "sk-selam-new" };
        async move { Ok::<_, BoxError>(ApiKey::new(text)?) }
    }));
    let service = RefreshLayer::new().layer(ApiKeyLayer::bearer(keys).layer(api.service()));
    assert_eq!(service.oneshot(request()).await.unwrap().status(), StatusCode::OK);
    assert_eq!(api.bearers(), ["sk-selam-old", "sk-selam-new"]);
}

#[tokio::test(start_paused = true)]
async fn j7_what_is_sent_again_is_what_was_sent() {
    let (jwts, _) = counting();
    jwts.prefetch().await.unwrap();
    let api = Api::accepting("token-2", INVALID_TOKEN);
    let mut request = Request::put("https://api.selamgpt.com/v1/models?a=b")
        .version(http::Version::HTTP_2)
        .header("x-many", "one")
        .header("x-other", "three")
        .header("x-many", "two")
        .extension(7_u8)
        .body(Body::from("the body"))
        .unwrap();
    request.headers_mut().append("x-many", "four".parse().unwrap());
    stack(&jwts, api.service()).oneshot(request).await.unwrap();
    let received = api.received.lock().unwrap();
    let [first, second] = &received[..] else { panic!("{received:?}") };
    assert_eq!((&first.head, &first.body), (&second.head, &second.body));
    assert_eq!(second.body, b"the body");
    assert!(second.head.contains("Some(7)"), "{}", second.head);
}

#[tokio::test(start_paused = true)]
async fn j7_a_stream_is_kept_and_sent_again_up_to_its_limit() {
    for (limit, sends) in [(10, 2), (9, 1), (0, 1)] {
        let (jwts, asked) = counting();
        jwts.prefetch().await.unwrap();
        let api = Api::accepting("token-2", INVALID_TOKEN);
        let frames =
            ["01234", "56789"].map(|data| Ok::<_, BoxError>(http_body::Frame::data(Bytes::from(data))));
        let trailers = http::HeaderMap::from_iter([("x-sum".parse().unwrap(), "1".parse().unwrap())]);
        let frames = frames.into_iter().chain([Ok(http_body::Frame::trailers(trailers))]);
        let body = StreamBody::new(tokio_stream(frames));
        let service = RefreshLayer::buffered(limit).layer(JwtLayer::new(&jwts, key()).layer(api.service()));
        let response = service.oneshot(Request::post(MODELS).body(body).unwrap()).await.unwrap();
        let received = std::mem::take(&mut *api.received.lock().unwrap());
        assert_eq!(received.len(), sends, "limit {limit}");
        assert!(received.iter().all(|sent| sent.body == b"0123456789" && sent.head.contains("x-sum")));
        assert_eq!(response.status() == StatusCode::OK, sends == 2);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(asked.load(SeqCst), 2, "the token is renewed all the same");
    }
}

/// Items as a stream.
fn tokio_stream<I: Iterator>(items: I) -> impl futures_core::Stream<Item = I::Item> {
    let mut items = Box::new(items);
    struct Items<F>(F);
    impl<T, F: FnMut() -> Option<T> + Unpin> futures_core::Stream for Items<F> {
        type Item = T;
        fn poll_next(
            mut self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
        ) -> std::task::Poll<Option<T>> {
            std::task::Poll::Ready((self.0)())
        }
    }
    Items(move || items.next())
}

#[tokio::test(start_paused = true)]
async fn j7_without_replay_the_401_goes_up_intact_and_the_token_is_renewed() {
    let (jwts, _) = counting();
    let api = Api::accepting("token-2", INVALID_TOKEN);
    let service = RefreshLayer::without_replay().layer(JwtLayer::new(&jwts, key()).layer(api.service()));
    let response = service.clone().oneshot(request()).await.unwrap();
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), INVALID_TOKEN);
    assert_eq!(service.oneshot(request()).await.unwrap().status(), StatusCode::OK);
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
    own.extensions_mut().insert(RequestAuth::Own(tower_selam::Credentials::bearer(key())));
    stack(&jwts, api.service()).oneshot(own).await.unwrap();
    assert_eq!(api.bearers(), [KEY]);
    assert_eq!(asked.load(SeqCst), 1);
}

/// Sends again, up to three times in all, what was answered with this status.
#[derive(Clone)]
struct Again {
    status: StatusCode,
    left: usize,
}

impl<B> tower::retry::Policy<Request<Body>, Response<B>, BoxError> for Again {
    type Future = std::future::Ready<()>;

    fn retry(
        &mut self,
        _: &mut Request<Body>,
        result: &mut Result<Response<B>, BoxError>,
    ) -> Option<Self::Future> {
        let again = self.left > 0 && result.as_ref().is_ok_and(|response| response.status() == self.status);
        self.left = self.left.saturating_sub(1);
        again.then(|| std::future::ready(()))
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
    let over = tower::retry::RetryLayer::new(Again { status: StatusCode::UNAUTHORIZED, left: 2 });
    let response = over.layer(stack(&jwts, api.service())).oneshot(request()).await.unwrap();
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(api.bearers(), ["token-1", "token-2", "token-2", "token-2"]);
    assert_eq!(asked.load(SeqCst), 2);

    // Under: what is about the service is the retry's, what is about the token is ours.
    let (jwts, asked) = counting();
    let answers = Arc::new(AtomicUsize::new(0));
    let sends = Arc::clone(&answers);
    let flaky = service_fn(move |_: Request<Body>| {
        let status = [503, 401, 503, 200, 500][answers.fetch_add(1, SeqCst).min(4)];
        async move { Ok::<_, BoxError>(Response::builder().status(status).body(Body::default())?) }
    });
    let under = tower::retry::RetryLayer::new(Again { status: StatusCode::SERVICE_UNAVAILABLE, left: 2 });
    let response = stack(&jwts, under.layer(flaky)).oneshot(request()).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!((sends.load(SeqCst), asked.load(SeqCst)), (4, 2));
}

#[tokio::test(start_paused = true)]
async fn t1_a_slow_renewal_pins_no_permit() {
    let (jwts, _) = counting();
    let api = Api::accepting("token-1", INVALID_TOKEN);
    let limited = ServiceBuilder::new().layer(ConcurrencyLimitLayer::new(1)).service(api.service());
    let mut service = stack(&jwts, limited);
    let mut waiting = tokio_test::task::spawn(service.ready().await.unwrap().call(request()));
    assert!(waiting.poll().is_pending());
    // The key alone needs no JWT, and the one permit there is.
    let mut alone = request();
    alone.extensions_mut().insert(RequestAuth::ApiKey);
    let answered = tokio::time::timeout(Duration::from_millis(10), async {
        service.ready().await.unwrap().call(alone).await
    });
    assert_eq!(answered.await.unwrap().unwrap().status(), StatusCode::UNAUTHORIZED);
    assert_eq!(waiting.await.unwrap().status(), StatusCode::OK);
}

#[tokio::test(start_paused = true)]
async fn t3_a_call_dropped_while_it_waits_sends_nothing_and_the_renewal_goes_on() {
    let (jwts, asked) = counting();
    let api = Api::accepting("token-1", INVALID_TOKEN);
    let mut service = stack(&jwts, api.service());
    let mut waiting = tokio_test::task::spawn(service.ready().await.unwrap().call(request()));
    assert!(waiting.poll().is_pending());
    drop(waiting);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(api.bearers().is_empty());
    assert_eq!((jwts.current().unwrap().expose_secret(), asked.load(SeqCst)), ("token-1", 1));
}

#[tokio::test(start_paused = true)]
async fn h5_the_whole_stack_replays_a_rotation_and_sends_one_set_at_a_time() {
    let (jwts, _) = counting();
    jwts.prefetch().await.unwrap();
    let api = Api::accepting("token-2", INVALID_TOKEN);
    let layer = SelamLayer::builder().with_api_key(key()).with_jwt(&jwts).build().unwrap();
    assert_eq!(layer.layer(api.service()).oneshot(request()).await.unwrap().status(), StatusCode::OK);
    api.accept("token-3");
    tokio::time::sleep(Duration::from_secs(2)).await;
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
