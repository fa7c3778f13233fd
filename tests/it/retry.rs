//! `RetryPolicy`: which requests are sent again, when, and how often (J9).

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use bytes::Bytes;
use h2::{Reason, server::SendResponse};
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tokio::{
    io::AsyncReadExt,
    net::{TcpListener, TcpStream},
    time::{Instant, timeout},
};
use tower::{Layer, Service, ServiceBuilder, ServiceExt, retry::budget::TpsBudget, service_fn};
use tower_selam::{
    ApiKey, AuthErrorKind, BoxError, Error, Refreshing, RequestAuth, SelamLayer, Token,
    retry::{Failure, MayProcessTwice, RetryPolicy},
    simulator::{Fault, JwtAlgorithm, Server, Simulator},
    source::{Reason as Why, SourceError, source_fn},
};
use tower_test::mock;

use crate::support::{BOTH, Body, CHAT, HANG, MODELS, builder, https, key, post, response};

const SECOND: Duration = Duration::from_secs(1);

fn request(method: Method) -> Request<Body> {
    Request::builder().method(method).uri(MODELS).body(Body::default()).unwrap()
}

/// An outcome of an attempt.
#[derive(Clone, Debug)]
enum Outcome {
    Status(u16),
    /// With this `Retry-After`.
    Told(u16, &'static str),
    Broken,
}

/// Answers with these outcomes in order, then with 200.
#[derive(Clone, Default)]
struct Api {
    outcomes: Arc<Vec<Outcome>>,
    sends: Arc<AtomicUsize>,
}

impl Api {
    fn new(outcomes: &[Outcome]) -> Self {
        Self { outcomes: Arc::new(outcomes.to_vec()), ..Self::default() }
    }

    fn sends(&self) -> usize {
        self.sends.load(SeqCst)
    }

    fn service(
        &self,
    ) -> impl Service<Request<Body>, Response = Response<Body>, Error = BoxError, Future: Send> + Clone + use<>
    {
        let this = self.clone();
        service_fn(move |_: Request<Body>| {
            let outcome = this.outcomes.get(this.sends.fetch_add(1, SeqCst)).cloned();
            async move {
                match outcome.unwrap_or(Outcome::Status(200)) {
                    Outcome::Status(status) => Ok::<_, BoxError>(response(status, "")),
                    Outcome::Told(status, wait) => {
                        let mut response = response(status, "");
                        response.headers_mut().insert("retry-after", wait.parse()?);
                        Ok(response)
                    }
                    Outcome::Broken => Err(io::Error::from(io::ErrorKind::ConnectionReset).into()),
                }
            }
        })
    }

    /// Sends a request under `policy`, and returns the status, if any, and the time it took.
    async fn send(&self, policy: RetryPolicy, request: Request<Body>) -> (Option<StatusCode>, Duration) {
        let began = Instant::now();
        let result = ServiceBuilder::new().retry(policy).service(self.service()).oneshot(request).await;
        (result.ok().map(|response| response.status()), began.elapsed())
    }
}

#[tokio::test(start_paused = true)]
async fn only_harmless_repetitions_are_sent() {
    let marked = |method| {
        let mut request = request(method);
        request.extensions_mut().insert(MayProcessTwice);
        request
    };
    let keyed = |method| {
        let mut request = request(method);
        request.headers_mut().insert("idempotency-key", "\"8e03978e\"".parse().unwrap());
        request
    };
    let gateway = [502, 503, 504].map(Outcome::Status);
    for outcome in gateway.into_iter().chain([Outcome::Broken]) {
        for (request, expected) in [
            (request(Method::GET), 2),
            (request(Method::PUT), 2),
            (request(Method::DELETE), 2),
            (request(Method::POST), 1),
            (request(Method::PATCH), 1),
            (marked(Method::POST), 2),
            (keyed(Method::POST), 2),
        ] {
            let (api, method) = (Api::new(std::slice::from_ref(&outcome)), request.method().clone());
            api.send(RetryPolicy::new(), request).await;
            assert_eq!(api.sends(), expected, "{outcome:?} {method}");
        }
        let api = Api::new(&[outcome]);
        api.send(RetryPolicy::new().allow_processing_twice(), request(Method::POST)).await;
        assert_eq!(api.sends(), 2);
    }
}

#[tokio::test(start_paused = true)]
async fn a_refusal_is_retried_with_any_method() {
    let api = Api::new(&[Outcome::Status(429)]);
    let (status, _) = api.send(RetryPolicy::new(), request(Method::POST)).await;
    assert_eq!((status, api.sends()), (Some(StatusCode::OK), 2));
}

#[tokio::test(start_paused = true)]
async fn other_responses_are_final() {
    for status in [200, 304, 400, 401, 403, 404, 408, 413, 500, 501] {
        let api = Api::new(&[Outcome::Status(status)]);
        let (answered, took) = api.send(RetryPolicy::new(), request(Method::GET)).await;
        assert_eq!((answered.unwrap().as_u16(), api.sends(), took), (status, 1, Duration::ZERO));
    }
}

#[tokio::test(start_paused = true)]
async fn told_waits_are_never_shortened() {
    for _ in 0..30 {
        let api = Api::new(&[Outcome::Told(429, "7"), Outcome::Told(503, "3")]);
        let (status, took) = api.send(RetryPolicy::new(), request(Method::GET)).await;
        assert_eq!(status, Some(StatusCode::OK));
        // Jitter adds up to the back-off of half a second, then of one.
        assert!(took >= 10 * SECOND && took <= Duration::from_millis(11_510), "{took:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn longer_waits_are_left_to_the_caller() {
    let policy = || RetryPolicy::new().with_max_wait(60 * SECOND);
    let api = Api::new(&[Outcome::Told(429, "61")]);
    let (status, took) = api.send(policy(), request(Method::GET)).await;
    assert_eq!((status.unwrap().as_u16(), api.sends(), took), (429, 1, Duration::ZERO));

    let api = Api::new(&[Outcome::Told(429, "60")]);
    assert_eq!(api.send(policy(), request(Method::GET)).await.0, Some(StatusCode::OK));
}

#[tokio::test(start_paused = true)]
async fn retries_and_back_off_are_bounded() {
    let always = vec![Outcome::Status(503); 20];
    let api = Api::new(&always);
    let (status, took) = api.send(RetryPolicy::new(), request(Method::GET)).await;
    assert_eq!((status.unwrap().as_u16(), api.sends()), (503, 4));
    // 0.5, 1 and 2 seconds, and up to as much again.
    assert!(took >= Duration::from_millis(3500) && took <= Duration::from_millis(7010), "{took:?}");

    let api = Api::new(&always);
    let policy = RetryPolicy::new().with_max_retries(10).with_backoff(SECOND, 2 * SECOND);
    let (_, took) = api.send(policy, request(Method::GET)).await;
    assert_eq!(api.sends(), 11);
    assert!(took >= 19 * SECOND && took <= 39 * SECOND, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn each_request_has_its_own_retries() {
    let api = Api::new(&vec![Outcome::Status(503); 20]);
    let service = ServiceBuilder::new().retry(RetryPolicy::new()).service(api.service());
    for sends in [4, 8] {
        service.clone().oneshot(request(Method::GET)).await.unwrap();
        assert_eq!(api.sends(), sends);
    }
}

#[tokio::test(start_paused = true)]
async fn clones_share_the_budget() {
    let api = Api::new(&vec![Outcome::Status(503); 40]);
    let policy = RetryPolicy::new().with_budget(TpsBudget::new(10 * SECOND, 0, 0.5));
    let (clone, mut sends) = (policy.clone(), 0);
    for _ in 0..4 {
        let ok = Api::new(&[]);
        ok.send(policy.clone(), request(Method::GET)).await;
    }
    for policy in [policy, clone] {
        api.send(policy, request(Method::GET)).await;
        sends = api.sends();
    }
    assert_eq!(sends, 4, "two requests, and two retries for the four successes");
}

/// Nothing was sent, so the request is repeated once its key can be fetched again.
#[tokio::test(start_paused = true)]
async fn temporary_auth_errors_are_retried() {
    for permanent in [false, true] {
        let fetches = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&fetches);
        let keys: Refreshing<ApiKey> = Refreshing::new(source_fn(move |_: Why<ApiKey>| {
            let first = count.fetch_add(1, SeqCst) == 0;
            async move {
                match (first, permanent) {
                    (false, _) => Ok(key()),
                    (true, false) => Err(SourceError::transient("sealed").with_retry_after(3 * SECOND)),
                    (true, true) => Err(SourceError::permanent("revoked")),
                }
            }
        }));
        let (api, began) = (Api::new(&[]), Instant::now());
        let layer = SelamLayer::builder().with_api_key(keys).build().unwrap();
        let service = ServiceBuilder::new().retry(RetryPolicy::new()).layer(layer).service(api.service());
        let result = service.oneshot(request(Method::POST)).await;
        if permanent {
            assert_eq!(result.unwrap_err().auth().unwrap().kind(), AuthErrorKind::RefreshRejected);
            assert_eq!((api.sends(), fetches.load(SeqCst), began.elapsed()), (0, 1, Duration::ZERO));
        } else {
            assert_eq!(result.unwrap().status(), StatusCode::OK);
            assert_eq!((api.sends(), fetches.load(SeqCst)), (1, 2));
            assert!(began.elapsed() >= 3 * SECOND);
        }
    }
}

/// Sends a POST through `stack` and answers the statuses in order. Returns the last one, and how many were asked for.
async fn exchange<L, S, B>(stack: L, statuses: &'static [u16]) -> (Option<StatusCode>, usize)
where
    L: Layer<mock::Mock<Request<Body>, Response<Body>>, Service = S>,
    S: Service<Request<Body>, Response = Response<B>, Error = Error<BoxError>>,
{
    let (client, mut handle) = mock::pair::<Request<Body>, Response<Body>>();
    let api = tokio::spawn(async move {
        let mut sends = 0;
        while let Some((_, send)) = handle.next_request().await {
            send.send_response(response(statuses.get(sends).copied().unwrap_or(200), ""));
            sends += 1;
        }
        sends
    });
    let service = stack.layer(client);
    let result = service.oneshot(request(Method::POST)).await;
    let status = result.ok().map(|response| response.status());
    drop(stack);
    (status, api.await.unwrap())
}

/// JWTs that are different each time, so that a 401 is worth a replay.
fn tokens() -> Refreshing<Token> {
    let count = AtomicUsize::new(0);
    Refreshing::new(source_fn(move |_: Why<Token>| {
        let token = Token::new(format!("jwt-{}", count.fetch_add(1, SeqCst)));
        async move { Ok::<_, BoxError>(token?) }
    }))
}

/// J9: inside and outside of `SelamLayer`, the policy leaves 401s to it, and sends do not multiply.
#[tokio::test(start_paused = true)]
async fn sends_do_not_multiply() {
    let layer = || SelamLayer::builder().with_api_key(key()).with_jwt(tokens()).build().unwrap();
    let outside = || ServiceBuilder::new().retry(RetryPolicy::new()).layer(layer());
    let inside = || ServiceBuilder::new().layer(layer()).retry(RetryPolicy::new());
    // A 429, a 401, and the replay, which is refused as well.
    assert_eq!(exchange(outside(), &[429, 401, 429]).await, (Some(StatusCode::OK), 4));
    assert_eq!(exchange(inside(), &[429, 401, 429]).await, (Some(StatusCode::OK), 4));
    // The second 401 is final: neither is retried.
    assert_eq!(exchange(outside(), &[401, 401]).await, (None, 2));
    assert_eq!(exchange(inside(), &[401, 401]).await, (None, 2));
    assert_eq!(exchange(outside(), &[403]).await, (None, 1));
}

/// J9: over real connections as well.
#[tokio::test]
async fn sends_do_not_multiply_over_connections() {
    for http in BOTH {
        for outside in [true, false] {
            let simulator = Simulator::new();
            let server = Server::tls(&simulator).await.unwrap();
            let minted = simulator.clone();
            let jwts = Refreshing::new(source_fn(move |_: Why<Token>| {
                let jwt = minted.mint_jwt(JwtAlgorithm::Hs256, 60 * SECOND);
                async move { Ok::<_, BoxError>(Token::new(jwt)?) }
            }));
            jwts.prefetch().await.unwrap();
            let layer = builder(&server)
                .with_api_key(ApiKey::new(simulator.issue_key()).unwrap())
                .with_jwt(jwts)
                .build()
                .unwrap();
            let mut request = post(&layer, "audio/agent/sessions", r#"{"voice":"mekdes"}"#);
            request.extensions_mut().insert(RequestAuth::ApiKeyAndJwt);
            let policy = RetryPolicy::new().with_backoff(Duration::from_millis(1), Duration::from_millis(1));
            let client = https(&server, http);
            simulator.inject(Fault::RateLimited { retry_after: Duration::ZERO });
            simulator.expire_jwts();
            let status = timeout(HANG, async {
                if outside {
                    let service = ServiceBuilder::new().retry(policy).layer(layer).service(client);
                    service.oneshot(request).await.unwrap().status()
                } else {
                    let service = ServiceBuilder::new().layer(layer).retry(policy).service(client);
                    service.oneshot(request).await.unwrap().status()
                }
            });
            assert_eq!(status.await.unwrap(), StatusCode::OK);
            assert_eq!(simulator.requests(), 3, "429, 401, 200: {http:?}, outside: {outside}");
        }
    }
}

/// A client without TLS, and the error of a request that it sends.
async fn error_of(address: std::net::SocketAddr, http2: bool) -> BoxError {
    let client =
        Client::builder(TokioExecutor::new()).http2_only(http2).retry_canceled_requests(false).build_http();
    let request = Request::post(format!("http://{address}/")).body(Full::<Bytes>::from(CHAT)).unwrap();
    timeout(HANG, client.request(request)).await.unwrap().unwrap_err().into()
}

#[tokio::test]
async fn a_missing_connection_is_unprocessed() {
    // Nobody listens on this port any more.
    let address = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    assert_eq!(Failure::of(&*error_of(address, false).await), Failure::Unprocessed);
}

#[tokio::test]
async fn a_broken_connection_is_lost() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (error, ()) = tokio::join!(error_of(address, false), async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut head = [0; 16];
        stream.read_exact(&mut head).await.unwrap();
    });
    assert_eq!(Failure::of(&*error), Failure::ConnectionLost);
}

/// Accepts one HTTP/2 request, and answers as `answer` says.
async fn http2_failure(
    answer: impl FnOnce(SendResponse<Bytes>, &mut h2::server::Connection<TcpStream, Bytes>),
) -> Failure {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (error, ()) = tokio::join!(error_of(address, true), async {
        let (stream, _) = listener.accept().await.unwrap();
        let mut connection = h2::server::handshake(stream).await.unwrap();
        let (_request, respond) = connection.accept().await.unwrap().unwrap();
        answer(respond, &mut connection);
        let _ = timeout(HANG, std::future::poll_fn(|cx| connection.poll_closed(cx))).await.unwrap();
    });
    Failure::of(&*error)
}

#[tokio::test]
async fn a_refused_stream_is_unprocessed() {
    let refused = http2_failure(|mut respond, connection| {
        respond.send_reset(Reason::REFUSED_STREAM);
        connection.graceful_shutdown();
    });
    assert_eq!(refused.await, Failure::Unprocessed);
    let reset = http2_failure(|mut respond, connection| {
        respond.send_reset(Reason::INTERNAL_ERROR);
        connection.graceful_shutdown();
    });
    assert_eq!(reset.await, Failure::Other, "the API may have processed it");
}
