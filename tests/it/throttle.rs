//! `ThrottleLayer`: requests that wait while the account's rate limit is used up.

use std::{
    future::pending,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use http::{HeaderName, Method, Request, Response, StatusCode};
use tokio::{task::JoinSet, time::Instant};
use tokio_test::{assert_pending, assert_ready, task};
use tower::{BoxError, Layer, Service, ServiceBuilder, ServiceExt, limit::ConcurrencyLimitLayer, service_fn};
use tower_selam::{
    ApiKey, SelamLayer,
    retry::{RetryPolicy, ThrottleLayer},
    simulator::{Server, Simulator},
};

use crate::support::{Body, CHAT, HANG, Http, MODELS, builder, https, post, response};

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

fn request() -> Request<Body> {
    Request::builder().method(Method::POST).uri(MODELS).body(Body::default()).unwrap()
}

/// An API that allows some requests per minute, like the simulator, and notes their `x-number`.
#[derive(Clone)]
struct Api {
    simulator: Simulator,
    numbers: Arc<Mutex<Vec<usize>>>,
}

impl Api {
    fn new(limit: u64) -> Self {
        let simulator = Simulator::new();
        simulator.set_rate_limit(limit);
        Self { simulator, numbers: Arc::default() }
    }

    fn service(
        &self,
    ) -> impl Service<Request<Body>, Response = Response<Body>, Error = BoxError, Future: Send> + Clone + use<>
    {
        let this = self.clone();
        service_fn(move |request: Request<Body>| {
            let this = this.clone();
            async move {
                if let Some(number) = request.headers().get("x-number") {
                    this.numbers.lock().unwrap().push(number.to_str()?.parse()?);
                }
                let answer = this.simulator.oneshot(request).await?;
                let mut response = response(200, "");
                if answer.status() == StatusCode::TOO_MANY_REQUESTS {
                    *response.status_mut() = answer.status();
                }
                response.headers_mut().clone_from(answer.headers());
                Ok::<_, BoxError>(response)
            }
        })
    }
}

fn numbered(number: usize) -> Request<Body> {
    let mut request = request();
    request.headers_mut().insert("x-number", number.into());
    request
}

/// Uses up the window.
async fn use_up(service: &(impl Service<Request<Body>, Error = BoxError> + Clone), requests: usize) {
    for _ in 0..requests {
        service.clone().oneshot(request()).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_used_up_window_is_waited_for() {
    let api = Api::new(3);
    let service = ThrottleLayer::new().layer(api.service());
    let began = Instant::now();
    use_up(&service, 3).await;
    assert_eq!(began.elapsed(), Duration::ZERO);
    assert_eq!(service.oneshot(request()).await.unwrap().status(), StatusCode::OK);
    assert!(began.elapsed() >= MINUTE);
    assert_eq!(api.simulator.requests(), 4, "none was refused");
}

/// Requests go in the order of their calls, and a dropped one gives its place away.
#[tokio::test(start_paused = true)]
async fn waiters_go_first_come_first_served() {
    let api = Api::new(5);
    let service = ThrottleLayer::new().with_max_wait(600 * SECOND).layer(api.service());
    use_up(&service, 5).await;
    let mut waiting: Vec<_> =
        (0..12).map(|number| task::spawn(Box::pin(service.clone().oneshot(numbered(number))))).collect();
    for waiter in &mut waiting {
        assert_pending!(waiter.poll());
    }
    // At the front, in the middle, and at the end.
    for dropped in [11, 4, 0] {
        drop(waiting.remove(dropped));
    }
    let mut set = JoinSet::new();
    for waiter in waiting {
        set.spawn(waiter.into_inner());
    }
    while let Some(answered) = set.join_next().await {
        assert_eq!(answered.unwrap().unwrap().status(), StatusCode::OK);
    }
    assert_eq!(*api.numbers.lock().unwrap(), [1, 2, 3, 5, 6, 7, 8, 9, 10]);
    assert_eq!(api.simulator.requests(), 14, "none was refused");
}

/// A request that comes when the window has just ended does not overtake those that wait.
#[tokio::test(start_paused = true)]
async fn newcomers_do_not_overtake() {
    let api = Api::new(1);
    let service = ThrottleLayer::new().layer(api.service());
    use_up(&service, 1).await;
    let mut waiting = task::spawn(Box::pin(service.clone().oneshot(numbered(1))));
    assert_pending!(waiting.poll());
    // The window ends, and nobody has been polled yet.
    tokio::time::advance(MINUTE).await;
    let mut newcomer = task::spawn(Box::pin(service.clone().oneshot(numbered(2))));
    assert_pending!(newcomer.poll());
    let (waited, came) = tokio::join!(waiting.into_inner(), newcomer.into_inner());
    assert_eq!((waited.unwrap().status(), came.unwrap().status()), (StatusCode::OK, StatusCode::OK));
    assert_eq!(*api.numbers.lock().unwrap(), [1, 2]);
}

/// Ten thousand wait for a window that allows as many: each is sent once it has begun, and none is refused.
#[tokio::test(start_paused = true)]
async fn ten_thousand_waiters_go_at_once() {
    const WAITERS: u64 = 10_000;
    let sends = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&sends);
    // The first request is the last of its window.
    let api = service_fn(move |_: Request<Body>| {
        let remaining = (WAITERS - count.fetch_add(1, SeqCst)) % WAITERS;
        async move {
            let mut response = response(200, "");
            for (name, value) in [("limit", WAITERS), ("remaining", remaining), ("reset-after", 60)] {
                response
                    .headers_mut()
                    .insert(HeaderName::try_from(format!("x-ratelimit-{name}"))?, value.into());
            }
            Ok::<_, BoxError>(response)
        }
    });
    let service = ThrottleLayer::new().layer(api);
    use_up(&service, 1).await;
    let mut waiting = JoinSet::new();
    let began = Instant::now();
    for _ in 0..WAITERS {
        waiting.spawn(service.clone().oneshot(request()));
    }
    tokio::time::sleep(MINUTE - SECOND).await;
    assert_eq!(sends.load(SeqCst), 1, "all wait");
    while let Some(answered) = waiting.join_next().await {
        answered.unwrap().unwrap();
    }
    assert!(began.elapsed() < MINUTE + SECOND, "one window is enough");
    assert_eq!(sends.load(SeqCst), 1 + WAITERS);
}

/// Headers that ask for an hour or a lifetime: the request is sent after the longest wait.
#[tokio::test(start_paused = true)]
async fn no_header_blocks_for_ever() {
    for reset in ["3600", "999999999", "9e99", "-1"] {
        let api = service_fn(move |_: Request<Body>| async move {
            let mut response = response(200, "");
            response.headers_mut().insert("x-ratelimit-remaining", "0".parse()?);
            response.headers_mut().insert("x-ratelimit-reset-after", reset.parse()?);
            Ok::<_, BoxError>(response)
        });
        let service = ThrottleLayer::new().with_max_wait(90 * SECOND).layer(api);
        use_up(&service, 1).await;
        let began = Instant::now();
        service.oneshot(request()).await.unwrap();
        assert!(
            began.elapsed() >= MINUTE && began.elapsed() <= 91 * SECOND,
            "{reset}: {:?}",
            began.elapsed()
        );
    }
}

#[tokio::test(start_paused = true)]
async fn without_limits_nothing_waits() {
    let api = service_fn(|_: Request<Body>| async {
        tokio::time::sleep(SECOND).await;
        Ok::<_, BoxError>(response(200, ""))
    });
    let service = ThrottleLayer::new().layer(api);
    let began = Instant::now();
    let mut set = JoinSet::new();
    for _ in 0..1000 {
        set.spawn(service.clone().oneshot(request()));
    }
    while set.join_next().await.is_some() {}
    // The first ten show that there is no limit.
    assert!(began.elapsed() < 3 * SECOND, "{:?}", began.elapsed());
}

/// A request that fails without a response does not show that there is no limit.
#[tokio::test(start_paused = true)]
async fn failures_lift_no_limit() {
    let api = service_fn(|request: Request<Body>| async move {
        if request.method() == Method::GET {
            return Err::<Response<Body>, BoxError>("broken".into());
        }
        pending().await
    });
    let service = ThrottleLayer::new().layer(api);
    let get = Request::get(MODELS).body(Body::default()).unwrap();
    service.clone().oneshot(get.clone()).await.unwrap_err();
    let mut hanging: Vec<_> = (0..10).map(|_| task::spawn(service.clone().oneshot(request()))).collect();
    for request in &mut hanging {
        assert_pending!(request.poll());
    }
    assert_pending!(task::spawn(service.oneshot(get)).poll());
}

type Sent = task::Spawn<Pin<Box<dyn Future<Output = Result<Response<Body>, BoxError>>>>>;

/// Sends ten requests that are never answered, and another, which waits for them.
fn behind_hanging_requests() -> (Vec<Sent>, Sent) {
    let api = service_fn(|request: Request<Body>| async move {
        if request.method() == Method::GET {
            return Ok::<_, BoxError>(response(200, ""));
        }
        pending().await
    });
    let service = ThrottleLayer::new().layer(api);
    let send = |request| {
        let mut sent: Sent = task::spawn(Box::pin(service.clone().oneshot(request)));
        assert_pending!(sent.poll());
        sent
    };
    let hanging = (0..10).map(|_| send(request())).collect();
    (hanging, send(Request::get(MODELS).body(Body::default()).unwrap()))
}

/// Hanging requests do not keep others from being sent for longer than the longest wait.
#[tokio::test(start_paused = true)]
async fn hanging_requests_do_not_block_for_ever() {
    let (_hanging, waiting) = behind_hanging_requests();
    let began = Instant::now();
    waiting.await.unwrap();
    assert_eq!(began.elapsed().as_secs(), 90);
}

/// Nor does a request at the front of the line that nobody polls.
#[tokio::test(start_paused = true)]
async fn an_unpolled_waiter_does_not_block_for_ever() {
    let api = Api::new(1);
    let service = ThrottleLayer::new().layer(api.service());
    use_up(&service, 1).await;
    let mut unpolled = task::spawn(Box::pin(service.clone().oneshot(request())));
    assert_pending!(unpolled.poll());
    let began = Instant::now();
    assert_eq!(service.oneshot(request()).await.unwrap().status(), StatusCode::OK);
    assert_eq!(began.elapsed().as_secs(), 90);
}

/// Where the limit is not known yet, a dropped request makes room for another at once.
#[tokio::test(start_paused = true)]
async fn dropped_requests_make_room() {
    let (mut hanging, mut waiting) = behind_hanging_requests();
    hanging.pop();
    assert_ready!(waiting.poll()).unwrap();
}

/// T1: the instance that was polled ready is called, and a waiting request pins no permit of the inner service.
#[tokio::test(start_paused = true)]
async fn waiting_requests_pin_no_permit() {
    let api = Api::new(1);
    let limit = ConcurrencyLimitLayer::new(1);
    let mut service = ServiceBuilder::new().layer(ThrottleLayer::new()).layer(limit).service(api.service());
    use_up(&service, 1).await;
    let mut waiting = task::spawn(service.ready().await.unwrap().call(request()));
    assert_pending!(waiting.poll());
    let mut other = service.get_ref().clone();
    let response = assert_ready!(task::spawn(other.ready()).poll()).unwrap().call(request());
    assert_eq!(response.await.unwrap().status(), StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(waiting.await.unwrap().status(), StatusCode::OK);
}

/// T2: services and futures are `Send`, `Sync` and `Clone` as their parts are.
#[test]
fn auto_traits_are_kept() {
    fn is<T: Send + Sync>(_: T) {}
    let service = ThrottleLayer::new()
        .layer(service_fn(|_: Request<Body>| async { Ok::<_, BoxError>(response(200, "")) }));
    is(service.clone());
    is(RetryPolicy::new());
    is(service.clone().call(request()));
}

const CLIENTS: usize = 20;
const CALLS: usize = 200;
const LIMIT: u64 = 60;

/// Lets twenty clients make two hundred calls over real connections, through one of `throttles` each, with sixty allowed per
/// window. Returns how many calls failed, and how many requests were sent.
async fn load(http: Http, throttles: &[ThrottleLayer]) -> (usize, u64) {
    let simulator = Simulator::new();
    let server = Server::tls(&simulator).await.unwrap();
    // The API's window lasts a minute. A second makes the test shorter, and its headers coarser.
    simulator.set_rate_limit_per(SECOND, LIMIT);
    let layer: SelamLayer =
        builder(&server).with_api_key(ApiKey::new(simulator.issue_key()).unwrap()).build().unwrap();
    let client = https(&server, http);
    let policy = RetryPolicy::new();
    let mut clients = JoinSet::new();
    for number in 0..CLIENTS {
        let service = ServiceBuilder::new()
            .retry(policy.clone())
            .layer(throttles[number % throttles.len()].clone())
            .layer(layer.clone())
            .service(client.clone());
        let layer = layer.clone();
        clients.spawn(async move {
            let mut failed = 0;
            for _ in 0..CALLS / CLIENTS {
                let result = service.clone().oneshot(post(&layer, "chat/completions", CHAT)).await;
                failed += usize::from(!result.is_ok_and(|response| response.status().is_success()));
            }
            failed
        });
    }
    let failed = tokio::time::timeout(3 * HANG, clients.join_all()).await.unwrap().into_iter().sum();
    (failed, simulator.requests())
}

/// Twenty clients that share a limit of 60 make 200 calls: none fails, and few requests are refused on the way.
#[tokio::test]
async fn clients_share_a_limit_over_connections() {
    let (one, two) = ([ThrottleLayer::new()], [ThrottleLayer::new()]);
    let (one, two) = tokio::join!(load(Http::One, &one), load(Http::Two, &two));
    for (failed, sent) in [one, two] {
        assert_eq!(failed, 0);
        assert!(sent <= 220, "{sent} requests for {CALLS} calls");
    }
}

/// Two programs on one account: each sees the other through what remains. No call fails, and a few more are refused.
#[tokio::test]
async fn two_throttles_share_an_account() {
    let (failed, sent) = load(Http::Two, &[ThrottleLayer::new(), ThrottleLayer::new()]).await;
    assert_eq!(failed, 0);
    assert!(sent <= 240, "{sent} requests for {CALLS} calls");
}
