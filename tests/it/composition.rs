//! The recipes of the page `composition`: each layer of Tower's on the side where it belongs, and where it shows, on the
//! other.

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

/// Tokens that take so long: `jwt-1`, `jwt-2` and so on.
fn tokens(takes: Duration) -> Refreshing<Token> {
    let count = Arc::new(Mutex::new(0));
    Refreshing::new(source_fn(move |_: Reason<Token>| {
        let number = {
            let mut count = count.lock().unwrap();
            *count += 1;
            *count
        };
        async move {
            sleep(takes).await;
            let token = Token::new(format!("jwt-{number}"))?;
            Ok::<_, BoxError>(Fetched::new(token).with_lifetime(3600 * SECOND))
        }
    }))
}

/// What a client was sent: `Authorization`, once for each request.
type Seen = Arc<Mutex<Vec<String>>>;

/// Answers from the front of `answers`, and 200 at their end.
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

/// Tries again after 5xx, so many times.
#[derive(Clone)]
struct Again(u8);

impl<E> Policy<Request<Body>, Response<Body>, E> for Again {
    type Future = Ready<()>;

    fn retry(&mut self, _: &mut Request<Body>, result: &mut Result<Response<Body>, E>) -> Option<Ready<()>> {
        let again = result.as_ref().is_ok_and(|response| response.status().is_server_error());
        self.0 = self.0.checked_sub(u8::from(again))?;
        again.then(|| ready(()))
    }

    fn clone_request(&mut self, request: &Request<Body>) -> Option<Request<Body>> {
        Some(request.clone())
    }
}

#[tokio::test(start_paused = true)]
async fn a_retry_outside_has_the_credential_of_its_moment_and_one_inside_that_of_its_request() {
    let layer = || {
        let jwts = tokens(Duration::ZERO);
        SelamLayer::builder().with_api_key(key()).with_jwt(jwts).build().unwrap()
    };
    let sent = ["Bearer jwt-1", "Bearer jwt-1", "Bearer jwt-2", "Bearer jwt-2"];
    // 503, then a 401 that renews the token, then 503 for the replay, then 200.
    let (client, seen) = api(&[503, 401, 503]);
    let service = ServiceBuilder::new().layer(RetryLayer::new(Again(2))).layer(layer()).service(client);
    assert_eq!(service.oneshot(request()).await.unwrap().status(), StatusCode::OK);
    assert_eq!(*seen.lock().unwrap(), sent);

    let (client, seen) = api(&[503, 401, 503]);
    let service = ServiceBuilder::new().layer(layer()).layer(RetryLayer::new(Again(2))).service(client);
    assert_eq!(service.oneshot(request()).await.unwrap().status(), StatusCode::OK);
    assert_eq!(*seen.lock().unwrap(), sent);
}

#[tokio::test(start_paused = true)]
async fn a_timeout_outside_counts_the_wait_for_a_credential_and_one_inside_does_not() {
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
    // The renewal went on: who comes later need not wait.
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

/// A client that is no `Clone`.
struct Single(Seen);

impl Service<Request<Body>> for Single {
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
async fn a_buffer_inside_takes_a_client_that_is_no_clone() {
    let seen = Seen::default();
    let layer = SelamLayer::builder().with_api_key(key()).build().unwrap();
    let service =
        ServiceBuilder::new().layer(layer).layer(BufferLayer::new(8)).service(Single(Arc::clone(&seen)));
    service.oneshot(request()).await.unwrap();
    assert_eq!(*seen.lock().unwrap(), [format!("Bearer {KEY}")]);
}

#[tokio::test(start_paused = true)]
async fn a_buffer_outside_is_not_held_up_by_one_who_waits_for_a_renewal() {
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

#[tokio::test(start_paused = true)]
async fn a_limit_inside_is_not_used_up_by_those_who_wait_and_one_outside_is() {
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

#[tokio::test(start_paused = true)]
async fn a_rate_limit_inside_under_a_buffer_counts_what_is_sent() {
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

#[tokio::test(start_paused = true)]
async fn a_request_that_is_refused_gives_its_permit_back() {
    let layer = SelamLayer::builder().with_api_key(key()).build().unwrap();
    let service = ServiceBuilder::new().layer(layer).layer(ConcurrencyLimitLayer::new(1)).service(api(&[]).0);
    let mut holder = service.clone();
    let mut refused = request();
    *refused.uri_mut() = "http://api.selamgpt.com/".parse().unwrap();
    holder.ready().await.unwrap().call(refused).await.unwrap_err();
    assert!(task::spawn(service.oneshot(request())).poll().is_ready(), "though `holder` lives");
    drop(holder);
}

#[tokio::test(start_paused = true)]
async fn a_load_shed_over_the_limit_sheds_what_is_sent_and_not_what_waits() {
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
    // The first of them holds the one permit, and the others are shed.
    assert_pending!(calls[0].poll());
    for call in &mut calls[1..] {
        match assert_ready!(call.poll()) {
            Err(Error::Inner(error)) => assert!(error.is::<Overloaded>()),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_log_outside_sees_no_credential_and_one_inside_shows_none_of_the_headers() {
    let said = |inside: bool| {
        let said = Arc::new(Mutex::new(String::new()));
        let trace = TraceLayer::new_for_http().on_request({
            let said = Arc::clone(&said);
            move |request: &Request<Body>, _: &tracing::Span| {
                said.lock().unwrap().push_str(&format!("{:?} {}", request.headers(), request.uri()));
            }
        });
        (trace, said, inside)
    };
    for (trace, said, inside) in [said(false), said(true)] {
        let layer = ApiKeyLayer::bearer(key());
        let (client, _) = api(&[]);
        if inside {
            ServiceBuilder::new().layer(layer).layer(trace).service(client).oneshot(request()).await.unwrap();
        } else {
            ServiceBuilder::new().layer(trace).layer(layer).service(client).oneshot(request()).await.unwrap();
        }
        let said = said.lock().unwrap();
        assert_eq!(said.contains("authorization"), inside, "{said}");
        assert!(!said.contains(KEY), "{said}");
    }
}

#[tokio::test]
async fn redirects_outside_go_on_without_credentials_and_those_inside_take_the_key_along() {
    let hops = || {
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
        JwtLayer::new(Token::new("a.b.c").unwrap(), key())
            .with_origins(Origins::selam().strip_for_other_origins())
    };
    let host = |name: &str, sent| (name.to_owned(), sent, sent);

    let (client, seen) = hops();
    let outside = ServiceBuilder::new().layer(FollowRedirectLayer::new()).layer(layer()).service(client);
    outside.oneshot(request()).await.unwrap();
    assert_eq!(*seen.lock().unwrap(), [host("api.selamgpt.com", true), host("other.example", false)]);

    let (client, seen) = hops();
    let inside = ServiceBuilder::new().layer(layer()).layer(FollowRedirectLayer::new()).service(client);
    inside.oneshot(request()).await.unwrap();
    let leaked = ("other.example".to_owned(), false, true);
    assert_eq!(seen.lock().unwrap()[1], leaked, "this is why it belongs outside");
}

#[tokio::test]
async fn decompression_inside_lets_a_compressed_error_be_read() {
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
    assert_eq!(AuthError::find(&*error).unwrap().kind(), AuthErrorKind::Unauthorized);
}

#[tokio::test]
async fn a_stack_of_them_all_works_and_its_errors_are_found() {
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
