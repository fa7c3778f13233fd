//! `RetryPolicy`: which requests are sent again, when, and how often (J9).

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use h2::Reason;
use http::{Method, Request, Response, StatusCode, Version};
use hyper::client::conn::http1;
use hyper_util::{
    client::legacy::Client,
    rt::{TokioExecutor, TokioIo, TokioTimer},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
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

use crate::support::{BOTH, Body, CHAT, Fed, HANG, MODELS, builder, https, key, post, response};

const MILLISECOND: Duration = Duration::from_millis(1);
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
    let mut waits = std::collections::BTreeSet::new();
    for _ in 0..30 {
        let api = Api::new(&[Outcome::Told(429, "7"), Outcome::Told(503, "3")]);
        let (status, took) = api.send(RetryPolicy::new(), request(Method::GET)).await;
        assert_eq!(status, Some(StatusCode::OK));
        // Jitter adds up to the back-off of half a second, then of one.
        assert!(took >= 10 * SECOND && took <= Duration::from_millis(11_510), "{took:?}");
        waits.insert(took);
    }
    assert!(waits.len() > 20, "{waits:?}");
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

/// The result is returned instead, since nothing could wait.
#[test]
fn without_timers_nothing_is_retried() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let api = Api::new(&[Outcome::Status(503)]);
    let service = ServiceBuilder::new().retry(RetryPolicy::new()).service(api.service());
    let response = runtime.block_on(service.oneshot(request(Method::GET))).unwrap();
    assert_eq!((response.status().as_u16(), api.sends()), (503, 1));
}

/// A retry is the same request.
#[tokio::test(start_paused = true)]
async fn heads_are_repeated() {
    let heads = Arc::new(std::sync::Mutex::new(Vec::new()));
    let api = service_fn(async |request: Request<Body>| {
        let (head, _) = request.into_parts();
        let extension = head.extensions.get::<&str>().copied();
        let mut heads = heads.lock().unwrap();
        heads.push((head.method, head.uri, head.version, head.headers, extension));
        Ok::<_, BoxError>(response(if heads.len() == 1 { 429 } else { 200 }, ""))
    });
    let mut sent = request(Method::PATCH);
    *sent.version_mut() = Version::HTTP_2;
    sent.headers_mut().insert("accept", "text/plain".parse().unwrap());
    sent.extensions_mut().insert("note");
    ServiceBuilder::new().retry(RetryPolicy::new()).service(api).oneshot(sent).await.unwrap();
    let heads = heads.lock().unwrap();
    assert!(heads.len() == 2 && heads[0] == heads[1] && heads[1].4 == Some("note"), "{heads:?}");
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
        let policy = RetryPolicy::new().with_max_retries(1);
        let service = ServiceBuilder::new().retry(policy).layer(layer).service(api.service());
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
async fn error_of<B>(address: SocketAddr, http2: bool, body: B) -> BoxError
where
    B: http_body::Body<Data: Send, Error: Into<BoxError>> + Send + Unpin + 'static,
{
    let mut client = Client::builder(TokioExecutor::new());
    client.timer(TokioTimer::new()).retry_canceled_requests(false).http2_only(http2);
    client.http2_keep_alive_interval(MILLISECOND).http2_keep_alive_timeout(SECOND);
    let request = Request::post(format!("http://{address}/")).body(body).unwrap();
    timeout(HANG, client.build_http().request(request)).await.unwrap().unwrap_err().into()
}

/// What a client makes of a server that does this with its connection.
async fn failure(http2: bool, serve: impl AsyncFnOnce(TcpStream)) -> Failure {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let served = async { timeout(HANG, serve(listener.accept().await.unwrap().0)).await.unwrap() };
    let (error, ()) = tokio::join!(error_of(address, http2, Body::from(CHAT)), served);
    Failure::of(&*error)
}

#[tokio::test]
async fn a_missing_connection_is_unprocessed() {
    // Nobody listens on this port any more.
    let address = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    assert_eq!(Failure::of(&*error_of(address, false, Body::from(CHAT)).await), Failure::Unprocessed);
}

#[tokio::test]
async fn an_unwritten_request_is_unprocessed() {
    let (io, _server) = tokio::io::duplex(64);
    let (mut client, connection) = http1::handshake(TokioIo::new(io)).await.unwrap();
    drop(connection);
    let error = client.send_request(request(Method::POST)).await.unwrap_err();
    assert_eq!(Failure::of(&error), Failure::Unprocessed);
}

#[tokio::test]
async fn a_broken_connection_is_lost() {
    let reset = failure(false, async |mut stream| {
        stream.read_exact(&mut [0; 16]).await.unwrap();
    });
    assert_eq!(reset.await, Failure::ConnectionLost);
    let closed = failure(false, async |mut stream| {
        let mut request = Vec::new();
        while !request.ends_with(CHAT.as_bytes()) {
            stream.read_buf(&mut request).await.unwrap();
        }
    });
    assert_eq!(closed.await, Failure::ConnectionLost);
    let silent = failure(true, async |mut stream| {
        stream.write_all(&frame(SETTINGS, 0, &[])).await.unwrap();
        // Its pings go unanswered.
        stream.read_to_end(&mut Vec::new()).await.unwrap();
    });
    assert_eq!(silent.await, Failure::ConnectionLost);
}

/// The client's connection is whole: the program failed to read what it was to send.
#[tokio::test]
async fn a_broken_body_is_not_retried() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (frames, body) = tokio::sync::mpsc::unbounded_channel();
    frames.send(Err(io::ErrorKind::ConnectionReset.into())).unwrap();
    let error = error_of(listener.local_addr().unwrap(), false, Fed(body)).await;
    assert_eq!(Failure::of(&*error), Failure::Other);
}

const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;

/// A frame of HTTP/2 without flags.
fn frame(kind: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    [&[0, 0, payload.len() as u8, kind, 0, 0, 0, 0, stream], payload].concat()
}

/// Answers an HTTP/2 request with `frame`, and waits for the client to close the connection.
async fn answer_with(frame_: Vec<u8>, mut stream: TcpStream) {
    stream.write_all(&frame(SETTINGS, 0, &[])).await.unwrap();
    stream.read_exact(&mut [0; 24]).await.unwrap();
    let mut head = [0; 9];
    while head[3] != HEADERS {
        stream.read_exact(&mut head).await.unwrap();
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        stream.read_exact(&mut vec![0; length as usize]).await.unwrap();
    }
    stream.write_all(&frame_).await.unwrap();
    stream.shutdown().await.unwrap();
    let _ = stream.read_to_end(&mut Vec::new()).await;
}

#[tokio::test]
async fn a_goaway_tells_what_is_unprocessed() {
    let goaway = |last_stream| frame(GOAWAY, 0, &[0, 0, 0, last_stream, 0, 0, 0, 0]);
    let excluded = failure(true, async |stream| answer_with(goaway(0), stream).await);
    assert_eq!(excluded.await, Failure::Unprocessed);
    let included = failure(true, async |stream| answer_with(goaway(1), stream).await);
    assert_eq!(included.await, Failure::ConnectionLost);
    // Headers of no stream: the client itself ends the connection.
    let invalid = failure(true, async |stream| answer_with(frame(HEADERS, 0, &[0x88]), stream).await);
    assert_eq!(invalid.await, Failure::Other);
}

#[tokio::test]
async fn a_refused_stream_is_unprocessed() {
    for (reason, expected) in
        [(Reason::REFUSED_STREAM, Failure::Unprocessed), (Reason::INTERNAL_ERROR, Failure::Other)]
    {
        let reset = failure(true, async |stream| {
            let mut connection = h2::server::handshake(stream).await.unwrap();
            let (_request, mut respond) = connection.accept().await.unwrap().unwrap();
            respond.send_reset(reason);
            connection.graceful_shutdown();
            let _ = std::future::poll_fn(|cx| connection.poll_closed(cx)).await;
        });
        assert_eq!(reset.await, expected);
    }
}
