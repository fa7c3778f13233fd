//! T1 to T3 of requests that wait: for a credential, for a renewal, for the service within.

use std::{
    future::poll_fn,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll},
};

use http::{Request, Response, StatusCode};
use http_body::Frame;
use tokio::{
    runtime::Builder,
    sync::mpsc::unbounded_channel,
    task::yield_now,
    time::{Instant, sleep, timeout},
};
use tokio_test::{assert_pending, assert_ready, assert_ready_ok, task};
use tower::{
    Layer, Service, ServiceExt,
    buffer::Buffer,
    limit::{ConcurrencyLimit, RateLimit, rate::Rate},
    util::BoxCloneSyncService,
};
use tower_selam::{
    ApiKey, BoxError, JwtLayer, Provider, RefreshLayer, Refreshing, RequestAuth, SelamLayer, Token,
    source::{Reason, source_fn},
};
use tower_test::mock;

use crate::{
    api::{Api, INVALID_TOKEN, counting, request, request_with, stack},
    mint::{Mint, SECOND, engine, settle},
    support::{Body, Fed, key, response},
};

/// An API that takes its time for everything, and notes what it was sent: it accepts `token-2`.
///
/// It is ready when it was polled twice since its last call, and only the instance that was.
struct Slow {
    polls: usize,
    sent: Arc<Mutex<Vec<String>>>,
}

impl Slow {
    fn new() -> (Self, Arc<Mutex<Vec<String>>>) {
        let sent = Arc::default();
        (Self { polls: 0, sent: Arc::clone(&sent) }, sent)
    }
}

impl Clone for Slow {
    fn clone(&self) -> Self {
        Self { polls: 0, sent: Arc::clone(&self.sent) }
    }
}

impl Service<Request<Body>> for Slow {
    type Response = Response<Fed>;
    type Error = BoxError;
    type Future = std::pin::Pin<Box<dyn Future<Output = Result<Response<Fed>, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.polls += 1;
        if self.polls > 1 {
            return Poll::Ready(Ok(()));
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        assert!(std::mem::take(&mut self.polls) > 1, "called without being ready");
        let bearer = request.headers()["authorization"].to_str().unwrap().to_owned();
        let accepted = bearer == "Bearer token-2";
        self.sent.lock().unwrap().push(bearer);
        Box::pin(async move {
            yield_now().await;
            let (feed, fed) = unbounded_channel();
            if accepted {
                return Ok(Response::new(Fed(fed)));
            }
            tokio::spawn(async move {
                yield_now().await;
                feed.send(Ok(Frame::data(INVALID_TOKEN.into())))
            });
            Ok(Response::builder().status(401).body(Fed(fed))?)
        })
    }
}

/// An engine whose source gives `token-1`, `token-2`, … or keys, and takes its time as well.
fn yielding<C: tower_selam::Credential>(
    turns: usize,
    make: fn(String) -> C,
) -> (Refreshing<C>, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&asked);
    let source = source_fn(move |_: Reason<C>| {
        let number = counter.fetch_add(1, SeqCst) + 1;
        async move {
            for _ in 0..turns {
                yield_now().await;
            }
            Ok::<_, BoxError>(make(format!("token-{number}")))
        }
    });
    (Refreshing::new(source), asked)
}

fn token(text: String) -> Token {
    Token::new(text).unwrap()
}

/// Polls a future so many times and, if it has not ended by then, drops it, after others had so many turns.
async fn polled<F: Future>(future: F, times: usize, turns: usize) -> Option<F::Output> {
    let (mut future, mut left) = (Box::pin(future), times);
    let ended = poll_fn(|cx| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        match future.as_mut().poll(cx) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending if left == 0 => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    });
    let ended = ended.await;
    for _ in 0..turns {
        yield_now().await;
    }
    ended
}

/// At once, while what it waits for is under way, and when that is there.
const TURNS: [usize; 4] = [0, 1, 4, 30];

#[tokio::test(start_paused = true)]
async fn t3_wherever_a_call_is_dropped_nothing_is_lost_and_nothing_is_sent_twice() {
    // Alone; with others that wait for the same; with a key from a source beside the JWT.
    let kinds = [(0, false), (2, false), (0, true), (2, true)];
    for ((others, key_from_source), turns) in
        kinds.into_iter().flat_map(|kind| TURNS.map(|turns| (kind, turns)))
    {
        let mut polls = 0;
        loop {
            let case = format!("{polls} polls, {turns} turns, {others} others, key: {key_from_source}");
            let ((jwts, asked), (keys, reads)) =
                (yielding(3, token), yielding(6, |text| ApiKey::new(text).unwrap()));
            let key = if key_from_source { Provider::from(&keys) } else { key().into() };
            let (api, sent) = Slow::new();
            let limited = ConcurrencyLimit::new(api, 1 + others);
            let service = RefreshLayer::new().layer(JwtLayer::new(&jwts, key).layer(limited));

            let call = polled(service.clone().oneshot(request()), polls, turns);
            let beside: Vec<_> =
                (0..others).map(|_| tokio::spawn(service.clone().oneshot(request()))).collect();
            let ended = call.await;
            let by_then = sent.lock().unwrap().len();
            for other in beside {
                assert_eq!(other.await.unwrap().unwrap().status(), StatusCode::OK, "{case}");
            }
            sleep(SECOND).await;
            if others == 0 {
                let sent = sent.lock().unwrap();
                assert_eq!(
                    *sent,
                    ["Bearer token-1", "Bearer token-2"][..by_then],
                    "no more than before: {case}"
                );
            }

            // What was fetched is kept, every permit is there again, and another call finds all of it.
            let kept = jwts.current().map(|token| token.expose_secret().to_owned());
            let number = asked.load(SeqCst);
            assert_eq!(kept, (number > 0).then(|| format!("token-{number}")), "{case}");
            let status = timeout(SECOND, service.oneshot(request())).await.expect(&case).unwrap().status();
            assert_eq!(status, StatusCode::OK, "{case}");
            let with = |bearer: &str| sent.lock().unwrap().iter().filter(|sent| *sent == bearer).count();
            let (first, second) = (with("Bearer token-1"), with("Bearer token-2"));
            let answered = others + 1 + usize::from(ended.is_some());
            assert!(
                second == answered || ended.is_none() && second == answered + 1,
                "{case}: {second} accepted"
            );
            assert!(first <= others + 2, "once for each call at most: {case}: {first} refused");
            assert_eq!(sent.lock().unwrap().len(), first + second, "{case}");
            assert_eq!(asked.load(SeqCst), 2, "each token is fetched once: {case}");
            assert_eq!(reads.load(SeqCst), usize::from(key_from_source), "{case}");

            if let Some(ended) = ended {
                assert_eq!(ended.unwrap().status(), StatusCode::OK);
                break;
            }
            polls += 1;
        }
        assert!(
            polls >= 8,
            "{polls} polls: for the token, readiness, the 401, its body, a renewal, and again"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn t3_wherever_who_wants_a_token_leaves_it_is_fetched_once() {
    for turns in TURNS {
        let mut polls = 0;
        loop {
            let (jwts, asked) = yielding(3, token);
            let ended = polled(jwts.token(), polls, turns).await;
            settle().await;
            // What was not even begun asks nobody.
            assert_eq!(asked.load(SeqCst), usize::from(polls > 0));
            assert_eq!(jwts.token().await.unwrap().expose_secret(), "token-1");
            assert_eq!(asked.load(SeqCst), 1, "{polls} polls, {turns} turns");
            if ended.is_some() {
                break;
            }
            polls += 1;
        }
        assert!(polls >= 1, "{polls}");
    }
}

#[test]
fn t3_wherever_a_runtime_stops_the_next_one_has_a_token() {
    let runtime = || Builder::new_current_thread().enable_time().build().unwrap();
    for turns in 0..8 {
        let (jwts, asked) = yielding(3, token);
        let stopped = runtime();
        stopped.block_on(async {
            let mut waiting = task::spawn(jwts.token());
            let _ = waiting.poll();
            for _ in 0..turns {
                yield_now().await;
            }
        });
        drop(stopped);
        let again = jwts.current().is_none();
        let token = runtime().block_on(jwts.token()).unwrap();
        // The one that was begun is lost with its runtime, and no other.
        assert!(asked.load(SeqCst) <= 1 + usize::from(again), "after {turns} turns");
        assert_eq!(token.expose_secret(), format!("token-{}", asked.load(SeqCst)), "after {turns} turns");
    }
}

#[tokio::test(start_paused = true)]
async fn t3_a_call_dropped_while_it_waits_sends_nothing_and_the_renewal_goes_on() {
    let (jwts, asked) = counting();
    let api = Api::accepting("token-1", INVALID_TOKEN);
    let mut service = stack(&jwts, api.service());
    let mut waiting = task::spawn(service.ready().await.unwrap().call(request()));
    assert_pending!(waiting.poll());
    drop(waiting);
    sleep(SECOND).await;
    assert!(api.bearers().is_empty());
    assert_eq!((jwts.current().unwrap().expose_secret(), asked.load(SeqCst)), ("token-1", 1));
}

#[tokio::test(start_paused = true)]
async fn t2_a_future_that_is_dropped_before_its_first_poll_sends_nothing_and_asks_nobody() {
    let mint = Mint::default();
    let (jwts, _) = engine(&mint);
    drop(jwts.token());
    drop(jwts.prefetch());
    drop(jwts.token_valid_for(SECOND));
    settle().await;
    assert_eq!(mint.asked(), 0);
    let api = Api::accepting_all();
    let mut service = stack(&jwts, api.service());
    drop(service.ready().await.unwrap().call(request()));
    settle().await;
    assert!(api.bearers().is_empty());
}

#[tokio::test(start_paused = true)]
async fn t2_clones_of_layers_and_services_share_one_engine() {
    let mint = Mint::default().taking(SECOND);
    let (jwts, _) = engine(&mint);
    let layer = SelamLayer::builder().with_api_key(key()).with_jwt(jwts).build().unwrap();
    let api = Api::accepting_all();
    let services = [layer.layer(api.service()), layer.clone().layer(api.service())];
    let calls: Vec<_> =
        (0..10).map(|turn| tokio::spawn(services[turn % 2].clone().oneshot(request()))).collect();
    for call in calls {
        call.await.unwrap().unwrap();
    }
    assert_eq!((mint.asked(), api.tally()), (1, [("token-1".to_owned(), 10)].into()));
}

#[tokio::test(start_paused = true)]
async fn t1_on_a_replay_a_service_that_is_not_ready_is_awaited() {
    let (jwts, asked) = counting();
    jwts.prefetch().await.unwrap();
    let (mock, mut handle) = mock::pair::<Request<Body>, Response<Body>>();
    handle.allow(1);
    let mut service = stack(&jwts, mock);
    let mut call = task::spawn(service.ready().await.unwrap().call(request()));
    assert_pending!(call.poll());
    let (first, send) = assert_ready!(task::spawn(handle.next_request()).poll()).unwrap();
    assert_eq!(first.headers()["authorization"], "Bearer token-1");
    send.send_response(response(401, INVALID_TOKEN));
    assert_pending!(call.poll());
    sleep(SECOND).await;
    assert_eq!(asked.load(SeqCst), 2);
    assert_pending!(call.poll());
    assert_pending!(task::spawn(handle.next_request()).poll(), "it is not ready");
    handle.allow(1);
    assert!(call.is_woken());
    assert_pending!(call.poll());
    let (second, send) = assert_ready!(task::spawn(handle.next_request()).poll()).unwrap();
    assert_eq!(second.headers()["authorization"], "Bearer token-2");
    send.send_response(response(200, ""));
    assert_eq!(assert_ready_ok!(call.poll()).status(), StatusCode::OK);
    // An error of its readiness is its own.
    handle.send_error("the service within is gone");
    let error = service.ready().await.err().unwrap();
    assert!(error.to_string().contains("is gone"), "{error}");
}

type Inner = BoxCloneSyncService<Request<Body>, Response<Body>, BoxError>;

/// The limits, with room for one request at a time, over an API.
fn limits(api: &Api) -> [(&'static str, Inner); 4] {
    let service = || api.service::<Body>();
    let rate = Rate::new(1, SECOND);
    [
        ("concurrency", Inner::new(ConcurrencyLimit::new(service(), 1))),
        ("buffer", Inner::new(Buffer::new(service(), 1))),
        ("buffer of concurrency", Inner::new(Buffer::new(ConcurrencyLimit::new(service(), 1), 1))),
        ("buffer of rate", Inner::new(Buffer::new(RateLimit::new(service(), rate), 1))),
    ]
}

#[tokio::test(start_paused = true)]
async fn t1_who_waits_for_a_renewal_pins_nothing_within() {
    let api = Api::accepting("token-1", INVALID_TOKEN);
    for (name, inner) in limits(&api) {
        // It waits for the first token; then, refused, for the second.
        for refused in [false, true] {
            let case = format!("{name}, refused: {refused}");
            let mint = Mint::default();
            let (jwts, _) = engine(&mint);
            if refused {
                jwts.prefetch().await.unwrap();
            }
            api.accept(if refused { "token-2" } else { "token-1" });
            let before = api.bearers().len();
            mint.takes(10 * SECOND);
            let mut service = stack(&jwts, inner.clone());
            let began = Instant::now();
            let mut waiting = Box::pin(service.ready().await.unwrap().call(request()));
            assert!(timeout(SECOND, &mut waiting).await.is_err(), "{case}");
            assert_eq!(api.bearers().len() - before, usize::from(refused), "{case}");
            // The key alone needs no JWT, and what room there is.
            for turn in 0..3 {
                let alone = request_with(Some(RequestAuth::ApiKey));
                let mut another = service.clone();
                let service = if turn < 2 { &mut another } else { &mut service };
                let answered = async { service.ready().await.unwrap().call(alone).await };
                let answered = timeout(2 * SECOND, answered);
                assert_eq!(answered.await.expect(&case).unwrap().status(), StatusCode::UNAUTHORIZED);
            }
            assert!(began.elapsed() < 5 * SECOND, "{case}");
            assert_eq!(waiting.await.unwrap().status(), StatusCode::OK, "{case}");
            assert_eq!(began.elapsed().as_secs(), 10, "{case}");
            assert_eq!(api.bearers().len() - before, 4 + usize::from(refused), "{case}");
            sleep(2 * SECOND).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn t1_a_hundred_that_wait_leave_the_one_permit_to_others() {
    let api = Api::accepting_all();
    for (name, inner) in limits(&api) {
        let mint = Mint::default().taking(10 * SECOND);
        let (jwts, _) = engine(&mint);
        let service = stack(&jwts, inner);
        let waiting: Vec<_> = (0..100).map(|_| tokio::spawn(service.clone().oneshot(request()))).collect();
        sleep(SECOND).await;
        let began = Instant::now();
        service.clone().oneshot(request_with(Some(RequestAuth::ApiKey))).await.unwrap();
        assert!(began.elapsed() <= SECOND, "{name}");
        for call in waiting {
            assert_eq!(call.await.unwrap().unwrap().status(), StatusCode::OK, "{name}");
        }
        assert_eq!(mint.asked(), 1);
    }
    assert_eq!(api.bearers().len(), 4 * 101);
}

#[tokio::test(start_paused = true)]
async fn t1_an_error_of_the_service_within_ends_who_waits_for_it() {
    // It is ready, and then gone: when the token has come, or when the second has.
    for refused in [false, true] {
        let (jwts, _) = counting();
        if refused {
            jwts.prefetch().await.unwrap();
        }
        let (gone, api) = (Arc::new(AtomicUsize::new(0)), Api::accepting("token-2", INVALID_TOKEN));
        let mut service = stack(&jwts, ReadyUnless { inner: api.service(), gone: Arc::clone(&gone) });
        let mut call = task::spawn(service.ready().await.unwrap().call(request()));
        assert_pending!(call.poll());
        assert_eq!(api.bearers().len(), usize::from(refused));
        gone.store(1, SeqCst);
        let error = timeout(SECOND, call).await.expect("it ends").unwrap_err();
        assert_eq!(error.to_string(), "the service within is gone");
        assert_eq!(api.bearers().len(), usize::from(refused));
    }
}

#[derive(Clone)]
struct ReadyUnless<S> {
    inner: S,
    gone: Arc<AtomicUsize>,
}

impl<S: Service<Request<Body>, Error = BoxError>> Service<Request<Body>> for ReadyUnless<S> {
    type Response = S::Response;
    type Error = BoxError;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        match self.gone.load(SeqCst) {
            0 => self.inner.poll_ready(cx),
            _ => Poll::Ready(Err("the service within is gone".into())),
        }
    }

    fn call(&mut self, request: Request<Body>) -> S::Future {
        self.inner.call(request)
    }
}
