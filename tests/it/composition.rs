//! Tests of the guide's `composition` page: Tower's own layers outside and inside this crate's.

use std::{
    future::{Ready, pending, ready},
    io::Write as _,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use http::{Request, Response, StatusCode, header::LOCATION};
use http_body_util::{BodyExt, Full};
use tokio::time::sleep;
use tokio_test::{assert_pending, assert_ready, task};
use tower::{
    BoxError, Layer, Service, ServiceBuilder, ServiceExt,
    buffer::BufferLayer,
    limit::ConcurrencyLimitLayer,
    load_shed::{LoadShedLayer, error::Overloaded},
    retry::{Policy, RetryLayer},
    service_fn,
    timeout::{TimeoutLayer, error::Elapsed},
};
use tower_http::{
    decompression::DecompressionLayer, follow_redirect::FollowRedirectLayer, trace::TraceLayer,
};
use tower_selam::{
    ApiKeyLayer, AuthError, AuthErrorKind, AuthErrorLayer, Error, JwtLayer, Origins, Refreshing, SelamLayer,
    Token,
    simulator::{Fault, Simulator},
    source::{Fetched, Reason, source_fn},
};

use crate::support::{Body, KEY, MODELS, key, response};

const SECOND: Duration = Duration::from_secs(1);

fn request() -> Request<Body> {
    Request::get(MODELS).body(Body::default()).unwrap()
}

/// Returns a source of `jwt-1`, `jwt-2` and so on, each of which takes `fetch_time`.
fn tokens(fetch_time: Duration) -> Refreshing<Token> {
    let count = Arc::new(Mutex::new(0));
    Refreshing::new(source_fn(move |_: Reason<Token>| {
        let number = {
            let mut count = count.lock().unwrap();
            *count += 1;
            *count
        };
        async move {
            sleep(fetch_time).await;
            let token = Token::new(format!("jwt-{number}"))?;
            Ok::<_, BoxError>(Fetched::new(token).with_lifetime(3600 * SECOND))
        }
    }))
}

/// The `Authorization` header of each request that a client received.
type Seen = Arc<Mutex<Vec<String>>>;

/// Returns a client that answers with the given statuses in order, then with 200.
fn api(
    answers: &[u16],
) -> (impl Service<Request<Body>, Response = Response<Body>, Error = BoxError, Future: Send> + Clone, Seen) {
    let seen = Seen::default();
    let answers = Arc::new(Mutex::new(answers.iter().rev().copied().collect::<Vec<_>>()));
    let api = service_fn({
        let seen = Arc::clone(&seen);
        move |request: Request<Body>| {
            let authorization = request.headers().get("authorization");
            let authorization = authorization.map_or("", |value| value.to_str().unwrap()).to_owned();
            seen.lock().unwrap().push(authorization);
            let status = answers.lock().unwrap().pop().unwrap_or(200);
            ready(Ok::<_, BoxError>(response(status, "")))
        }
    });
    (api, seen)
}

/// Retries after a 5xx, up to a number of times.
#[derive(Clone)]
struct RetryServerErrors(u8);

impl<B, E> Policy<Request<Body>, Response<B>, E> for RetryServerErrors {
    type Future = Ready<()>;

    fn retry(&mut self, _: &mut Request<Body>, result: &mut Result<Response<B>, E>) -> Option<Ready<()>> {
        let retry = result.as_ref().is_ok_and(|response| response.status().is_server_error());
        self.0 = self.0.checked_sub(u8::from(retry))?;
        retry.then(|| ready(()))
    }

    fn clone_request(&mut self, request: &Request<Body>) -> Option<Request<Body>> {
        Some(request.clone())
    }
}

/// Outside, each attempt takes the current credential; inside, the attempts share their request's.
#[tokio::test(start_paused = true)]
async fn retry_works_outside_and_inside() {
    let layer = || {
        let jwts = tokens(Duration::ZERO);
        SelamLayer::builder().with_api_key(key()).with_jwt(jwts).build().unwrap()
    };
    let sent = ["Bearer jwt-1", "Bearer jwt-1", "Bearer jwt-2", "Bearer jwt-2"];
    // 503, then a 401 that causes a refresh, then 503 for the replay, then 200.
    let (client, seen) = api(&[503, 401, 503]);
    let service =
        ServiceBuilder::new().layer(RetryLayer::new(RetryServerErrors(2))).layer(layer()).service(client);
    assert_eq!(service.oneshot(request()).await.unwrap().status(), StatusCode::OK);
    assert_eq!(*seen.lock().unwrap(), sent);

    let (client, seen) = api(&[503, 401, 503]);
    let service =
        ServiceBuilder::new().layer(layer()).layer(RetryLayer::new(RetryServerErrors(2))).service(client);
    assert_eq!(service.oneshot(request()).await.unwrap().status(), StatusCode::OK);
    assert_eq!(*seen.lock().unwrap(), sent);
}

/// F4: a timeout around the layer does not cancel the refresh; a timeout inside does not count it.
#[tokio::test(start_paused = true)]
async fn only_an_outer_timeout_counts_the_refresh() {
    let layer =
        |jwts: &Refreshing<Token>| SelamLayer::builder().with_api_key(key()).with_jwt(jwts).build().unwrap();
    let timeout = TimeoutLayer::new(SECOND);
    let jwts = tokens(3 * SECOND);
    let (client, seen) = api(&[]);
    let outside = ServiceBuilder::new()
        .layer(timeout.clone())
        .map_err(Error::into_boxed)
        .layer(layer(&jwts))
        .service(client);
    let error = outside.clone().oneshot(request()).await.unwrap_err();
    assert!(error.is::<Elapsed>());
    assert!(seen.lock().unwrap().is_empty());
    // The refresh continued, so that a later request need not wait.
    sleep(2 * SECOND).await;
    outside.oneshot(request()).await.unwrap();

    let (client, _) = api(&[]);
    let inside = ServiceBuilder::new().layer(layer(&tokens(3 * SECOND))).layer(timeout).service(client);
    inside.oneshot(request()).await.unwrap();
    let never = service_fn(|_: Request<Body>| pending::<Result<Response<Body>, BoxError>>());
    let inside = ServiceBuilder::new().layer(layer(&jwts)).layer(TimeoutLayer::new(SECOND)).service(never);
    match inside.oneshot(request()).await {
        Err(Error::Inner(error)) => assert!(error.is::<Elapsed>()),
        other => panic!("{other:?}"),
    }
}

/// A client that does not implement `Clone`.
struct NotClone(Seen);

impl Service<Request<Body>> for NotClone {
    type Response = Response<Body>;
    type Error = BoxError;
    type Future = Ready<Result<Response<Body>, BoxError>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), BoxError>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        self.0.lock().unwrap().push(request.headers()["authorization"].to_str().unwrap().to_owned());
        ready(Ok(response(200, "")))
    }
}

#[tokio::test(start_paused = true)]
async fn inner_buffer_accepts_a_client_without_clone() {
    let seen = Seen::default();
    let layer = SelamLayer::builder().with_api_key(key()).build().unwrap();
    let service =
        ServiceBuilder::new().layer(layer).layer(BufferLayer::new(8)).service(NotClone(Arc::clone(&seen)));
    service.oneshot(request()).await.unwrap();
    assert_eq!(*seen.lock().unwrap(), [format!("Bearer {KEY}")]);
}

#[tokio::test(start_paused = true)]
async fn outer_buffer_is_not_blocked_by_a_waiter() {
    let (client, seen) = api(&[]);
    let jwts = tokens(3 * SECOND);
    let layer = SelamLayer::builder().with_api_key(key()).with_jwt(&jwts).build().unwrap();
    let service = ServiceBuilder::new()
        .layer(BufferLayer::new(8))
        .map_err(Error::into_boxed)
        .layer(layer)
        .service(client);
    let waiting = tokio::spawn(service.clone().oneshot(request()));
    let mut key_alone = request();
    key_alone.extensions_mut().insert(tower_selam::RequestAuth::ApiKey);
    let began = tokio::time::Instant::now();
    service.clone().oneshot(key_alone).await.unwrap();
    assert_eq!(began.elapsed(), Duration::ZERO);
    waiting.await.unwrap().unwrap();
    assert_eq!(*seen.lock().unwrap(), [format!("Bearer {KEY}"), "Bearer jwt-1".to_owned()]);

    let mut plain = request();
    *plain.uri_mut() = "http://api.selamgpt.com/".parse().unwrap();
    let error = service.oneshot(plain).await.unwrap_err();
    assert_eq!(AuthError::find(&*error).unwrap().kind(), AuthErrorKind::OriginNotAllowed);
}

/// T1: a request waiting for a refresh holds no permit of a `ConcurrencyLimit` inside, but one of a limit outside.
#[tokio::test(start_paused = true)]
async fn only_an_outer_limit_counts_waiters() {
    let jwts = tokens(3 * SECOND);
    let layer = SelamLayer::builder().with_api_key(key()).with_jwt(&jwts).build().unwrap();
    let limit = ConcurrencyLimitLayer::new(1);

    let inside = ServiceBuilder::new().layer(layer.clone()).layer(limit.clone()).service(api(&[]).0);
    let (mut first, mut second) = (inside.clone(), inside);
    let mut waiting = task::spawn(first.ready().await.unwrap().call(request()));
    assert_pending!(waiting.poll());
    assert!(task::spawn(second.ready()).poll().is_ready(), "the permit is free");

    let outside = ServiceBuilder::new().layer(limit).layer(layer).service(api(&[]).0);
    let (mut first, mut second) = (outside.clone(), outside);
    let mut waiting = task::spawn(first.ready().await.unwrap().call(request()));
    assert_pending!(waiting.poll());
    assert!(task::spawn(second.ready()).poll().is_pending(), "the permit is taken");
}

/// T1: a refused request costs no slot of a `RateLimit` inside.
#[tokio::test(start_paused = true)]
async fn rate_limit_under_a_buffer_counts_sent_requests() {
    let (client, seen) = api(&[]);
    let layer = SelamLayer::builder().with_api_key(key()).build().unwrap();
    let service = ServiceBuilder::new().layer(layer).buffer(8).rate_limit(2, SECOND).service(client);
    let mut refused = request();
    *refused.uri_mut() = "http://api.selamgpt.com/".parse().unwrap();
    service.clone().oneshot(refused).await.unwrap_err();
    let began = tokio::time::Instant::now();
    for _ in 0..4 {
        service.clone().oneshot(request()).await.unwrap();
    }
    assert_eq!(seen.lock().unwrap().len(), 4);
    let took = began.elapsed();
    assert!(took >= SECOND && took < 2 * SECOND, "{took:?}");
}

/// T1: a refused request releases the permit of the inner service.
#[tokio::test(start_paused = true)]
async fn refused_request_releases_its_permit() {
    let layer = SelamLayer::builder().with_api_key(key()).build().unwrap();
    let service = ServiceBuilder::new().layer(layer).layer(ConcurrencyLimitLayer::new(1)).service(api(&[]).0);
    let mut holder = service.clone();
    let mut refused = request();
    *refused.uri_mut() = "http://api.selamgpt.com/".parse().unwrap();
    holder.ready().await.unwrap().call(refused).await.unwrap_err();
    assert!(
        task::spawn(service.oneshot(request())).poll().is_ready(),
        "the permit is free although `holder` is alive"
    );
    drop(holder);
}

/// T1: an inner `LoadShed` sheds requests when they are sent, not while they wait for a refresh.
#[tokio::test(start_paused = true)]
async fn load_shed_ignores_waiters() {
    let jwts = tokens(3 * SECOND);
    let layer = SelamLayer::builder().with_api_key(key()).with_jwt(&jwts).build().unwrap();
    let never = service_fn(|_: Request<Body>| pending::<Result<Response<Body>, BoxError>>());
    let service = ServiceBuilder::new()
        .layer(layer)
        .layer(LoadShedLayer::new())
        .layer(ConcurrencyLimitLayer::new(1))
        .service(never);
    let mut calls: Vec<_> = (0..3).map(|_| task::spawn(service.clone().oneshot(request()))).collect();
    calls.iter_mut().for_each(|call| assert_pending!(call.poll()));
    jwts.prefetch().await.unwrap();
    // The first request holds the only permit; the others are shed.
    assert_pending!(calls[0].poll());
    for call in &mut calls[1..] {
        match assert_ready!(call.poll()) {
            Err(Error::Inner(error)) => assert!(error.is::<Overloaded>()),
            other => panic!("{other:?}"),
        }
    }
}

/// S2: an outer `TraceLayer` sees no credential, and an inner one prints none.
#[tokio::test]
async fn trace_layer_logs_no_credential() {
    let tracer = |inside: bool| {
        let log = Arc::new(Mutex::new(String::new()));
        let trace = TraceLayer::new_for_http().on_request({
            let log = Arc::clone(&log);
            move |request: &Request<Body>, _: &tracing::Span| {
                log.lock().unwrap().push_str(&format!("{:?} {}", request.headers(), request.uri()));
            }
        });
        (trace, log, inside)
    };
    for (trace, log, inside) in [tracer(false), tracer(true)] {
        let layer = ApiKeyLayer::bearer(key());
        let (client, _) = api(&[]);
        if inside {
            ServiceBuilder::new().layer(layer).layer(trace).service(client).oneshot(request()).await.unwrap();
        } else {
            ServiceBuilder::new().layer(trace).layer(layer).service(client).oneshot(request()).await.unwrap();
        }
        let log = log.lock().unwrap();
        assert_eq!(log.contains("authorization"), inside, "{log}");
        assert!(!log.contains(KEY), "{log}");
    }
}

/// O4: redirects followed outside lose the credentials; those followed inside leak `X-API-Key`.
#[tokio::test]
async fn only_an_inner_redirect_layer_leaks_the_key() {
    let redirecting_client = || {
        let seen: Arc<Mutex<Vec<(String, bool, bool)>>> = Arc::default();
        let client = service_fn({
            let seen = Arc::clone(&seen);
            move |request: Request<Body>| {
                let (uri, headers) = (request.uri(), request.headers());
                let host = uri.host().unwrap().to_owned();
                let first = host == "api.selamgpt.com";
                let (bearer, key) =
                    (headers.contains_key("authorization"), headers.contains_key("x-api-key"));
                seen.lock().unwrap().push((host, bearer, key));
                let answer = Response::builder();
                let answer = if first {
                    answer.status(307).header(LOCATION, "https://other.example/")
                } else {
                    answer
                };
                ready(Ok::<_, BoxError>(answer.body(Body::default()).unwrap()))
            }
        });
        (client, seen)
    };
    let layer = || {
        (
            JwtLayer::new(Token::new("a.b.c").unwrap())
                .with_origins(Origins::selam().strip_for_other_origins()),
            ApiKeyLayer::x_api_key(key()).with_origins(Origins::selam().strip_for_other_origins()),
        )
    };
    let host = |name: &str, sent| (name.to_owned(), sent, sent);

    let (client, seen) = redirecting_client();
    let outside = ServiceBuilder::new().layer(FollowRedirectLayer::new()).layer(layer()).service(client);
    outside.oneshot(request()).await.unwrap();
    assert_eq!(*seen.lock().unwrap(), [host("api.selamgpt.com", true), host("other.example", false)]);

    let (client, seen) = redirecting_client();
    let inside = ServiceBuilder::new().layer(layer()).layer(FollowRedirectLayer::new()).service(client);
    inside.oneshot(request()).await.unwrap();
    let leaked = ("other.example".to_owned(), false, true);
    assert_eq!(
        seen.lock().unwrap()[1],
        leaked,
        "an inner redirect layer forwards `X-API-Key` to the other origin"
    );
}

#[tokio::test]
async fn inner_decompression_exposes_error_bodies() {
    let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
    gzip.write_all(br#"{"error":{"message":"No API key provided.","code":"missing_api_key"}}"#).unwrap();
    let body = Bytes::from(gzip.finish().unwrap());
    let client = service_fn(move |_: Request<Body>| {
        let answer = Response::builder().status(401).header("content-encoding", "gzip");
        ready(Ok::<_, BoxError>(answer.body(Full::new(body.clone())).unwrap()))
    });
    let errors = AuthErrorLayer::new();
    let inside = ServiceBuilder::new().layer(errors).layer(DecompressionLayer::new()).service(client.clone());
    let error = inside.oneshot(request()).await.err().unwrap();
    assert_eq!(AuthError::find(&*error).unwrap().kind(), AuthErrorKind::MissingApiKey);

    let outside = ServiceBuilder::new().layer(DecompressionLayer::new()).layer(errors).service(client);
    let error = outside.oneshot(request()).await.err().unwrap();
    let kind = match cfg!(feature = "decompression") {
        true => AuthErrorKind::MissingApiKey,
        false => AuthErrorKind::Unauthorized,
    };
    assert_eq!(AuthError::find(&*error).unwrap().kind(), kind);
}

/// E7: the `AuthError` is found through Tower's layers and their boxes.
#[tokio::test]
async fn full_stack_works_and_errors_are_found() {
    let simulator = Simulator::new();
    let good = simulator.issue_key();
    let layer = |key: &str| {
        SelamLayer::builder().with_api_key(tower_selam::ApiKey::new(key).unwrap()).build().unwrap()
    };
    let stack = |layer: SelamLayer| {
        let inside = ServiceBuilder::new()
            .load_shed()
            .concurrency_limit(8)
            .layer(DecompressionLayer::new())
            .service(simulator.clone());
        ServiceBuilder::new()
            .boxed_clone()
            .layer(TraceLayer::new_for_http())
            .buffer(8)
            .timeout(5 * SECOND)
            .map_err(Error::into_boxed)
            .service(layer.layer(inside))
    };
    let chat = || {
        let uri = "https://api.selamgpt.com/v1/chat/completions";
        Request::post(uri).body(Body::from(crate::support::CHAT)).unwrap()
    };
    let answer = stack(layer(&good)).oneshot(chat()).await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    assert!(!answer.into_body().collect().await.unwrap().to_bytes().is_empty());
    let error = stack(layer("sk-selam-wrong")).oneshot(chat()).await.err().unwrap();
    assert_eq!(AuthError::find(&*error).unwrap().kind(), AuthErrorKind::InvalidApiKey);
    simulator.inject(Fault::Unavailable);
    assert_eq!(stack(layer(&good)).oneshot(chat()).await.unwrap().status(), 503);
}
