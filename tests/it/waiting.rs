//! Requests that wait for a credential, for a refresh or for the inner service (T1 to T3).

use std::{
    future::poll_fn,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll},
    time::Duration,
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
    service_fn,
    util::BoxCloneSyncService,
};
use tower_selam::{
    ApiKey, ApiKeyLayer, BoxError, JwtLayer, Provider, RefreshLayer, Refreshing, RequestAuth, SelamLayer,
    Token,
    source::{Fetched, Reason, source_fn},
};
use tower_test::mock;

use crate::{
    api::{Api, INVALID_TOKEN, counting, request, request_with, stack},
    mint::{MINUTE, Mint, SECOND, engine, settle},
    support::{Body, Fed, key, response},
};

/// A slow API that accepts `token-2` and records every bearer it is sent.
///
/// An instance is ready once it has been polled twice since its last call; a clone has to be polled itself.
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

/// An engine whose source makes a credential of `token-1`, `token-2`, … and yields this many times for each.
fn yielding<C: tower_selam::Credential>(
    turns: usize,
    make: fn(String) -> C,
) -> (Refreshing<C>, Arc<AtomicUsize>) {
    let fetches = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&fetches);
    let source = source_fn(move |_: Reason<C>| {
        let number = counter.fetch_add(1, SeqCst) + 1;
        async move {
            for _ in 0..turns {
                yield_now().await;
            }
            Ok::<_, BoxError>(make(format!("token-{number}")))
        }
    });
    (Refreshing::new(source), fetches)
}

fn token(text: String) -> Token {
    Token::new(text).unwrap()
}

/// Polls a future at most this many times, yields to other tasks for this many turns, and drops the future. Returns its
/// output if it completed.
async fn poll_then_drop<F: Future>(future: F, times: usize, turns: usize) -> Option<F::Output> {
    let (mut future, mut left) = (Box::pin(future), times);
    let output = poll_fn(|cx| {
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
    let output = output.await;
    for _ in 0..turns {
        yield_now().await;
    }
    output
}

/// How many turns pass before the drop: none, some while the awaited work is in flight, or enough to complete it.
const TURNS: [usize; 4] = [0, 1, 4, 30];

/// T3: a call dropped at any await point loses nothing and sends nothing twice.
#[tokio::test(start_paused = true)]
async fn call_dropped_anywhere_loses_nothing() {
    // Alone or with two other waiters; with a fixed key or with one from a source.
    let kinds = [(0, false), (2, false), (0, true), (2, true)];
    for ((others, key_from_source), turns) in
        kinds.into_iter().flat_map(|kind| TURNS.map(|turns| (kind, turns)))
    {
        let mut polls = 0;
        loop {
            let case = format!("{polls} polls, {turns} turns, {others} others, key: {key_from_source}");
            let ((jwts, fetches), (keys, reads)) =
                (yielding(3, token), yielding(6, |text| ApiKey::new(text).unwrap()));
            let key = if key_from_source { Provider::from(&keys) } else { key().into() };
            let (api, sent) = Slow::new();
            let limited = ConcurrencyLimit::new(api, 1 + others);
            let service =
                RefreshLayer::new().layer((JwtLayer::new(&jwts), ApiKeyLayer::x_api_key(key)).layer(limited));

            let call = poll_then_drop(service.clone().oneshot(request()), polls, turns);
            let other_calls: Vec<_> =
                (0..others).map(|_| tokio::spawn(service.clone().oneshot(request()))).collect();
            let output = call.await;
            let sent_before_drop = sent.lock().unwrap().len();
            for other in other_calls {
                assert_eq!(other.await.unwrap().unwrap().status(), StatusCode::OK, "{case}");
            }
            sleep(SECOND).await;
            if others == 0 {
                let sent = sent.lock().unwrap();
                assert_eq!(
                    *sent,
                    ["Bearer token-1", "Bearer token-2"][..sent_before_drop],
                    "nothing is sent after the drop: {case}"
                );
            }

            // The fetched token is kept and all permits are released, so that another call succeeds.
            let kept = jwts.current().map(|token| token.expose_secret().to_owned());
            let number = fetches.load(SeqCst);
            assert_eq!(kept, (number > 0).then(|| format!("token-{number}")), "{case}");
            let status = timeout(SECOND, service.oneshot(request())).await.expect(&case).unwrap().status();
            assert_eq!(status, StatusCode::OK, "{case}");
            let sends_of = |bearer: &str| sent.lock().unwrap().iter().filter(|sent| *sent == bearer).count();
            let (first, second) = (sends_of("Bearer token-1"), sends_of("Bearer token-2"));
            let answered = others + 1 + usize::from(output.is_some());
            assert!(
                second == answered || output.is_none() && second == answered + 1,
                "{case}: {second} accepted"
            );
            assert!(first <= others + 2, "at most one rejected send per call: {case}: {first} rejected");
            assert_eq!(sent.lock().unwrap().len(), first + second, "{case}");
            assert_eq!(fetches.load(SeqCst), 2, "each token is fetched once: {case}");
            assert_eq!(reads.load(SeqCst), usize::from(key_from_source), "{case}");

            if let Some(output) = output {
                assert_eq!(output.unwrap().status(), StatusCode::OK);
                break;
            }
            polls += 1;
        }
        assert!(
            polls >= 8,
            "{polls} polls do not cover the token, readiness, the 401, its body, the refresh and the replay"
        );
    }
}

/// T3: a waiter dropped at any await point causes no second fetch.
#[tokio::test(start_paused = true)]
async fn dropped_waiter_causes_no_second_fetch() {
    for turns in TURNS {
        let mut polls = 0;
        loop {
            let (jwts, fetches) = yielding(3, token);
            let output = poll_then_drop(jwts.token(), polls, turns).await;
            settle().await;
            // A future that was never polled fetches nothing.
            assert_eq!(fetches.load(SeqCst), usize::from(polls > 0));
            assert_eq!(jwts.token().await.unwrap().expose_secret(), "token-1");
            assert_eq!(fetches.load(SeqCst), 1, "{polls} polls, {turns} turns");
            if output.is_some() {
                break;
            }
            polls += 1;
        }
        assert!(polls >= 1, "{polls}");
    }
}

/// T3: no matter when a runtime stops, the next one gets a token.
#[test]
fn next_runtime_still_gets_a_token() {
    let runtime = || Builder::new_current_thread().enable_time().build().unwrap();
    for turns in 0..8 {
        let (jwts, fetches) = yielding(3, token);
        let stopped = runtime();
        stopped.block_on(async {
            let mut waiting = task::spawn(jwts.token());
            let _ = waiting.poll();
            for _ in 0..turns {
                yield_now().await;
            }
        });
        drop(stopped);
        let refetch = jwts.current().is_none();
        let token = runtime().block_on(jwts.token()).unwrap();
        // Only a fetch in flight is lost with its runtime.
        assert!(fetches.load(SeqCst) <= 1 + usize::from(refetch), "after {turns} turns");
        assert_eq!(token.expose_secret(), format!("token-{}", fetches.load(SeqCst)), "after {turns} turns");
    }
}

/// T3: a call dropped while it waits sends nothing, and the refresh completes.
#[tokio::test(start_paused = true)]
async fn refresh_outlives_the_dropped_call() {
    let (jwts, fetches) = counting();
    let api = Api::accepting("token-1", INVALID_TOKEN);
    let mut service = stack(&jwts, api.service());
    let mut waiting = task::spawn(service.ready().await.unwrap().call(request()));
    assert_pending!(waiting.poll());
    drop(waiting);
    sleep(SECOND).await;
    assert!(api.bearers().is_empty());
    assert_eq!((jwts.current().unwrap().expose_secret(), fetches.load(SeqCst)), ("token-1", 1));
}

/// T2: a future dropped before its first poll fetches and sends nothing.
#[tokio::test(start_paused = true)]
async fn unpolled_futures_do_nothing() {
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

/// T2: clones of layers and services share one engine.
#[tokio::test(start_paused = true)]
async fn clones_share_one_engine() {
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

/// T1: a replay waits until the inner service is ready.
#[tokio::test(start_paused = true)]
async fn replay_awaits_readiness() {
    let (jwts, fetches) = counting();
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
    assert_eq!(fetches.load(SeqCst), 2);
    assert_pending!(call.poll());
    assert_pending!(task::spawn(handle.next_request()).poll(), "the inner service is not ready");
    handle.allow(1);
    assert!(call.is_woken());
    assert_pending!(call.poll());
    let (second, send) = assert_ready!(task::spawn(handle.next_request()).poll()).unwrap();
    assert_eq!(second.headers()["authorization"], "Bearer token-2");
    send.send_response(response(200, ""));
    assert_eq!(assert_ready_ok!(call.poll()).status(), StatusCode::OK);
    // A readiness error of the inner service is returned.
    handle.send_error("the inner service is gone");
    let error = service.ready().await.err().unwrap();
    assert!(error.to_string().contains("is gone"), "{error}");
}

type Inner = BoxCloneSyncService<Request<Body>, Response<Body>, BoxError>;

/// Tower's limits over an API, each with room for one request at a time.
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

/// T1: a request waiting for a refresh holds no permit of the inner service.
#[tokio::test(start_paused = true)]
async fn waiting_for_a_refresh_pins_no_permit() {
    let api = Api::accepting("token-1", INVALID_TOKEN);
    for (name, inner) in limits(&api) {
        // The request waits for its first token or, after a 401, for the second.
        for rejected in [false, true] {
            let case = format!("{name}, rejected: {rejected}");
            let mint = Mint::default();
            let (jwts, _) = engine(&mint);
            if rejected {
                jwts.prefetch().await.unwrap();
            }
            api.accept(if rejected { "token-2" } else { "token-1" });
            let before = api.bearers().len();
            mint.takes(10 * SECOND);
            let mut service = stack(&jwts, inner.clone());
            let started = Instant::now();
            let mut waiting = Box::pin(service.ready().await.unwrap().call(request()));
            assert!(timeout(SECOND, &mut waiting).await.is_err(), "{case}");
            assert_eq!(api.bearers().len() - before, usize::from(rejected), "{case}");
            // Requests with the key alone need no JWT, only the permit.
            for turn in 0..3 {
                let alone = request_with(Some(RequestAuth::ApiKey));
                let mut another = service.clone();
                let service = if turn < 2 { &mut another } else { &mut service };
                let answered = async { service.ready().await.unwrap().call(alone).await };
                let answered = timeout(2 * SECOND, answered);
                assert_eq!(answered.await.expect(&case).unwrap().status(), StatusCode::UNAUTHORIZED);
            }
            assert!(started.elapsed() < 5 * SECOND, "{case}");
            assert_eq!(waiting.await.unwrap().status(), StatusCode::OK, "{case}");
            assert_eq!(started.elapsed().as_secs(), 10, "{case}");
            assert_eq!(api.bearers().len() - before, 4 + usize::from(rejected), "{case}");
            sleep(2 * SECOND).await;
        }
    }
}

/// T1, R7: 100 waiting requests leave the only permit to another request.
#[tokio::test(start_paused = true)]
async fn hundred_waiters_leave_the_permit_free() {
    let api = Api::accepting_all();
    for (name, inner) in limits(&api) {
        let mint = Mint::default().taking(10 * SECOND);
        let (jwts, _) = engine(&mint);
        let service = stack(&jwts, inner);
        let waiting: Vec<_> = (0..100).map(|_| tokio::spawn(service.clone().oneshot(request()))).collect();
        sleep(SECOND).await;
        let started = Instant::now();
        service.clone().oneshot(request_with(Some(RequestAuth::ApiKey))).await.unwrap();
        assert!(started.elapsed() <= SECOND, "{name}");
        for call in waiting {
            assert_eq!(call.await.unwrap().unwrap().status(), StatusCode::OK, "{name}");
        }
        // At one request per second the token, which lives for a minute, expires while requests wait for their permit.
        let fetches = if name.ends_with("rate") { 3 } else { 1 };
        assert_eq!(mint.asked(), fetches, "{name}");
    }
    assert_eq!(api.bearers().len(), 4 * 101);
}

/// Tokens that say when they were issued, in seconds, and live for a minute.
fn dated(start: Instant) -> Refreshing<Token> {
    Refreshing::new(source_fn(move |_: Reason<Token>| async move {
        sleep(5 * SECOND).await;
        let token = Token::new(format!("at-{}", start.elapsed().as_millis()))?;
        Ok::<_, BoxError>(Fetched::new(token).with_lifetime(MINUTE))
    }))
}

/// R7: a token that lives for a minute is valid when it is sent, although each request takes ten minutes and the others wait
/// for it: inside or outside of a limit, in a buffer, or after a 401.
#[tokio::test(start_paused = true)]
async fn token_is_valid_after_any_wait() {
    const BUSY: Duration = Duration::from_secs(600);
    for (name, rejects) in ["inside", "inside twice", "outside", "buffer outside", "rate outside"]
        .into_iter()
        .flat_map(|name| [(name, false), (name, true)])
    {
        let start = Instant::now();
        let sends = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&sends);
        let api = service_fn(move |request: Request<Body>| {
            let bearer = request.headers()["authorization"].to_str().unwrap().to_owned();
            let issued: u64 = bearer.strip_prefix("Bearer at-").unwrap().parse().unwrap();
            let age = start.elapsed() - Duration::from_millis(issued);
            assert!(age < MINUTE, "{name}, 401: {rejects}: sent at the age of {age:?}");
            // The first send of all is rejected, and its replay waits behind the other requests.
            let is_rejected = counter.fetch_add(1, SeqCst) == 0 && rejects;
            async move {
                if is_rejected {
                    return Ok::<_, BoxError>(response(401, INVALID_TOKEN));
                }
                sleep(BUSY).await;
                Ok(response(200, ""))
            }
        });
        let jwts = dated(start);
        let limit = || ConcurrencyLimit::new(api.clone(), 1);
        let answered = |response: Response<tower_selam::auth_error::InspectedBody<Body>>| response.status();
        type Statuses = BoxCloneSyncService<Request<Body>, StatusCode, BoxError>;
        let service = match name {
            "inside" => Statuses::new(stack(&jwts, limit()).map_response(answered)),
            "inside twice" => {
                Statuses::new(stack(&jwts, ConcurrencyLimit::new(limit(), 2)).map_response(answered))
            }
            "outside" => {
                Statuses::new(ConcurrencyLimit::new(stack(&jwts, api.clone()), 1).map_response(answered))
            }
            "buffer outside" => Statuses::new(Buffer::new(stack(&jwts, limit()).map_response(answered), 8)),
            _ => {
                let limited =
                    RateLimit::new(stack(&jwts, api.clone()).map_response(answered), Rate::new(1, BUSY));
                Statuses::new(Buffer::new(limited, 8))
            }
        };
        let calls: Vec<_> = (0..4).map(|_| tokio::spawn(service.clone().oneshot(request()))).collect();
        for call in calls {
            assert_eq!(call.await.unwrap().unwrap(), StatusCode::OK, "{name}, 401: {rejects}");
        }
        assert_eq!(sends.load(SeqCst), 4 + usize::from(rejects), "{name}");
        assert!(start.elapsed() >= 3 * BUSY, "{name}");
    }
}

/// T1: an error of the inner service ends a call that waits for its readiness.
#[tokio::test(start_paused = true)]
async fn readiness_error_ends_the_waiting_call() {
    // The inner service is ready at first and fails before the first send, or before the replay.
    for rejected in [false, true] {
        let (jwts, _) = counting();
        if rejected {
            jwts.prefetch().await.unwrap();
        }
        let (gone, api) = (Arc::new(AtomicUsize::new(0)), Api::accepting("token-2", INVALID_TOKEN));
        let mut service = stack(&jwts, ReadyUnless { inner: api.service(), gone: Arc::clone(&gone) });
        let mut call = task::spawn(service.ready().await.unwrap().call(request()));
        assert_pending!(call.poll());
        assert_eq!(api.bearers().len(), usize::from(rejected));
        gone.store(1, SeqCst);
        let error = timeout(SECOND, call).await.expect("the call ends").unwrap_err();
        assert_eq!(error.to_string(), "the inner service is gone");
        assert_eq!(api.bearers().len(), usize::from(rejected));
    }
}

/// Ready like the inner service until it is gone.
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
            _ => Poll::Ready(Err("the inner service is gone".into())),
        }
    }

    fn call(&mut self, request: Request<Body>) -> S::Future {
        self.inner.call(request)
    }
}
