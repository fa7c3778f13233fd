//! The HTTP clients for the API: [`Upstream`].

mod connect;
mod connection;
mod expect;
mod http_proxy;

use std::{
    error::Error as _,
    fmt,
    future::poll_fn,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::{Body, Bytes},
    http::{Request, Response, Version},
};
use http_body::{Frame, SizeHint};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{Builder, Client, Error as ClientError, connect::capture_connection},
    rt::{TokioExecutor, TokioTimer},
};
use tokio::time;
use tokio_rustls::rustls::ClientConfig;
use tower::Service;
use tower_selam::{
    replay::{BufferBody, Replay, ReplayBody},
    retry::Failure,
};

use self::{
    connect::{Connector, connector},
    connection::{IdleLimit, MAX_IDLE, Used, idle_time},
    expect::{AnswerSender, HeldBody, hold_body},
};
pub use self::{
    connect::{Versions, tls},
    expect::expects_continue,
    http_proxy::HttpProxy,
};
use crate::server::{MAX_FIELDS, MAX_HEAD_HTTP1, MAX_HEAD_HTTP2, has_large_headers};

/// How often HTTP/2 connections are pinged, idle or not, and how long an answer may take. The time until a connection that
/// leads nowhere gets no more requests is the sum.
const PING_EVERY: Duration = Duration::from_secs(5);
const PING_TIMEOUT: Duration = Duration::from_secs(5);

/// How many requests share an HTTP/2 connection. Few servers allow less than a hundred.
const STREAMS: usize = 100;

/// How far a response may be ahead of a slow caller. The connection's window covers all streams, so that callers who do not read
/// their streams do not block the others.
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = STREAM_WINDOW * STREAMS as u32;

/// How long a failed connection may take to let go of the body of a request that is sent again.
const BODY_RELEASE_TIMEOUT: Duration = Duration::from_secs(5);

/// A client that follows no redirects.
pub type TokenClient = Client<Connector, Body>;

/// What clients for the API have in common.
#[derive(Clone, Debug)]
pub struct Settings {
    pub tls: ClientConfig,
    pub proxy: HttpProxy,
    /// How long an idle connection is reused; `None` for the defaults.
    pub idle: Option<Duration>,
    /// How much of a request's body is kept, to send the request once more if the API has not processed it.
    pub resend_limit: usize,
    ping_every: Duration,
    ping_timeout: Duration,
}

impl Settings {
    pub fn new(tls: ClientConfig, proxy: HttpProxy, idle: Option<Duration>, resend_limit: usize) -> Self {
        Self { tls, proxy, idle, resend_limit, ping_every: PING_EVERY, ping_timeout: PING_TIMEOUT }
    }

    fn builder(&self) -> Builder {
        let mut builder = Client::builder(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(self.idle.unwrap_or(MAX_IDLE))
            .http1_max_buf_size(MAX_HEAD_HTTP1)
            .http1_max_headers(MAX_FIELDS)
            .http2_max_header_list_size(MAX_HEAD_HTTP2)
            .http2_keep_alive_interval(self.ping_every)
            .http2_keep_alive_timeout(self.ping_timeout)
            .http2_keep_alive_while_idle(true)
            .http2_initial_stream_window_size(STREAM_WINDOW)
            .http2_initial_connection_window_size(CONNECTION_WINDOW);
        builder
    }

    /// Builds a plain client, for the token endpoint and the issuer of logins. It is called rarely, so no connection is kept for
    /// the next call.
    pub fn token_client(&self) -> TokenClient {
        self.builder().pool_max_idle_per_host(0).build(connector(&self.tls, &self.proxy, Versions::All))
    }
}

/// Sends any number of concurrent requests. A hyper-util client opens one HTTP/2 connection per server, and the server limits
/// the streams on it, so there is one client for every hundred requests in flight.
///
/// A request that the API has not processed is sent once more, as is an idempotent one whose connection broke off before the
/// answer: see [`Failure`].
#[derive(Clone, Debug)]
pub struct Upstream {
    settings: Arc<Settings>,
    connector: Connector,
    lanes: Arc<Mutex<Vec<Lane>>>,
}

/// The request body that the layers produce.
type RequestBody = ReplayBody<Body>;

/// A body that is kept for a second attempt.
type KeptBody = ReplayBody<RequestBody>;

/// A body as the client sends it. Boxed: hyper's channel to a connection has 32 slots for requests.
type SentBody = Pin<Box<HeldBody<KeptBody>>>;

/// A client, and its number of requests in flight: each holds a clone of `in_flight`.
#[derive(Clone, Debug)]
struct Lane {
    client: Client<Connector, SentBody>,
    in_flight: Arc<()>,
}

impl Upstream {
    pub fn new(settings: &Settings, versions: Versions) -> Self {
        let connector = connector(&settings.tls, &settings.proxy, versions);
        Self { settings: Arc::new(settings.clone()), connector, lanes: Arc::default() }
    }

    /// Returns the first lane with a free slot, or a new one.
    fn lane(&self) -> Lane {
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        // `<=`, because the list itself holds one clone.
        if let Some(free) = lanes.iter().find(|lane| Arc::strong_count(&lane.in_flight) <= STREAMS) {
            return free.clone();
        }
        let lane =
            Lane { client: self.settings.builder().build(self.connector.clone()), in_flight: Arc::new(()) };
        lanes.push(lane.clone());
        lane
    }

    /// Sends a request, and once more if it failed and may be sent again.
    async fn send(self, request: Request<RequestBody>) -> Result<Response<ResponseBody>, Error> {
        let keep = BufferBody::new(self.settings.resend_limit);
        let (head, body) = request.into_parts();
        let (body, kept) = keep.capture(body);
        let (failure, error) = match self.attempt(Request::from_parts(head.clone(), body)).await {
            Ok(response) => return Ok(response),
            Err(failed) => failed,
        };
        let Some(mut kept) = kept.filter(|_| failure.may_retry(head.method.is_idempotent())) else {
            return Err(error);
        };
        let released = poll_fn(|cx| keep.poll_captured(&mut kept, cx));
        // If it is not released in time, it cannot be restored.
        let _ = time::timeout(BODY_RELEASE_TIMEOUT, released).await;
        let Some(body) = keep.restore(kept) else { return Err(error) };
        tracing::debug!(?failure, %error, "request sent again on another connection");
        self.attempt(Request::from_parts(head, body)).await.map_err(|(_, error)| error)
    }

    async fn attempt(&self, request: Request<KeptBody>) -> Result<Response<ResponseBody>, (Failure, Error)> {
        let Lane { client, in_flight } = self.lane();
        let (request, held_back) = hold_body(request);
        let mut request = request.map(Box::pin);
        let connection = capture_connection(&mut request);
        let result = client.request(request).await;
        let used = Used::new(connection);
        let response = match result {
            Ok(response) => response,
            Err(error) => return Err((failure(used.as_ref(), &error), error.into())),
        };
        if let Some(body) = &held_back {
            body.answered();
        }
        if let Some(used) = &used {
            used.answered();
        }
        if has_large_headers(response.headers()) {
            return Err((Failure::Other, Error::LargeHeaders));
        }
        let idle_limit = used
            .filter(|_| response.version() != Version::HTTP_2)
            .map(|used| IdleLimit::new(used, idle_time(response.headers(), self.settings.idle)));
        Ok(response.map(|body| ResponseBody {
            body,
            _idle_limit: idle_limit,
            _held_back: held_back,
            _in_flight: in_flight,
        }))
    }
}

/// Classifies a failed request, and keeps further ones off its connection.
fn failure(used: Option<&Used>, error: &ClientError) -> Failure {
    let Some(used) = used else {
        // The request was not given to a connection. If none can be made, a second attempt is of no use.
        return if error.is_connect() { Failure::Other } else { Failure::Unprocessed };
    };
    match Failure::of(error) {
        // The API may close every connection because of this request.
        Failure::ConnectionLost if !used.has_answered() => Failure::Other,
        Failure::Other => Failure::Other,
        failure => {
            used.retire();
            failure
        }
    }
}

/// Why there is no response from the API.
#[derive(Debug)]
pub enum Error {
    Client(ClientError),
    /// The headers of the response are too large.
    LargeHeaders,
}

impl From<ClientError> for Error {
    fn from(error: ClientError) -> Self {
        let cause = error.source().and_then(|cause| cause.downcast_ref::<hyper::Error>());
        match cause.is_some_and(hyper::Error::is_parse_too_large) {
            true => Self::LargeHeaders,
            false => Self::Client(error),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Client(error) => error.fmt(f),
            Self::LargeHeaders => f.write_str("the headers of the response are too large"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Client(error) => error.source(),
            Self::LargeHeaders => None,
        }
    }
}

impl Service<Request<RequestBody>> for Upstream {
    type Response = Response<ResponseBody>;
    type Error = Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<RequestBody>) -> Self::Future {
        Box::pin(self.clone().send(request))
    }
}

/// The body of a response. What it holds ends with it.
#[derive(Debug)]
pub struct ResponseBody {
    body: Incoming,
    _idle_limit: Option<IdleLimit>,
    _held_back: Option<AnswerSender>,
    /// Occupies the lane.
    _in_flight: Arc<()>,
}

impl http_body::Body for ResponseBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, path::Path};

    use axum::http::Method;
    use tokio::{
        io::copy_bidirectional,
        net::{TcpListener, TcpStream},
        sync::watch,
    };
    use tower::ServiceExt;
    use tower_selam::{
        replay::{BufferBody, Replay},
        simulator::{Fault, Server, Simulator},
    };

    use super::*;

    const CHAT: &str = r#"{"stream":true,"messages":[{"role":"user","content":"Selam!"}]}"#;

    /// Writes the certificate authority of `server` to a file.
    fn ca_file(server: &Server) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!(
            "selam-proxy-ca-{}-{}",
            std::process::id(),
            server.local_addr().port()
        ));
        std::fs::write(&path, server.ca_pem().unwrap()).unwrap();
        path
    }

    fn settings(ca: &Path) -> Settings {
        Settings::new(tls(Some(ca), true).unwrap(), HttpProxy::default(), None, 1024)
    }

    fn request(server: &Server, key: &str) -> Request<RequestBody> {
        let body = BufferBody::new(0).pass_through(Body::from(CHAT));
        let request = Request::post(format!("{}/chat/completions", server.base_url()));
        request.header("authorization", format!("Bearer {key}")).body(body).unwrap()
    }

    #[tokio::test]
    async fn streams_exceed_the_limit_of_one_connection() {
        let simulator = Simulator::new();
        let server = Server::tls(&simulator).await.unwrap();
        let (path, key) = (ca_file(&server), simulator.issue_key());
        let upstream = Upstream::new(&settings(&path), Versions::All);
        std::fs::remove_file(path).unwrap();

        // hyper's server allows 200 streams per connection.
        let count = 450;
        let mut running = Vec::new();
        for _ in 0..count {
            simulator.inject(Fault::StallBody { after: 10 });
            let response = upstream.clone().oneshot(request(&server, &key));
            running.push(time::timeout(Duration::from_secs(60), response).await.unwrap().unwrap());
        }
        assert!(running.iter().all(|response| response.version() == axum::http::Version::HTTP_2));
        assert_eq!(upstream.lanes.lock().unwrap().len(), 5);

        // Freed slots are reused first.
        drop(running);
        let again = upstream.clone().oneshot(request(&server, &key)).await.unwrap();
        assert_eq!(Arc::strong_count(&upstream.lanes.lock().unwrap()[0].in_flight), 2);
        drop(again);
    }

    /// Forwards connections to `server`, and returns its own base URL. Those so far stop forwarding when told to.
    async fn forwarder(server: &Server) -> (String, watch::Sender<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (own, api) = (listener.local_addr().unwrap(), server.local_addr());
        let (sender, _) = watch::channel(());
        let stop = sender.clone();
        tokio::spawn(async move {
            loop {
                let (mut near, _) = listener.accept().await.unwrap();
                let mut stopped = stop.subscribe();
                tokio::spawn(async move {
                    let mut far = TcpStream::connect(api).await.unwrap();
                    tokio::select! {
                        _ = copy_bidirectional(&mut near, &mut far) => return,
                        _ = stopped.changed() => {}
                    }
                    // Open, and silent.
                    std::future::pending::<()>().await;
                });
            }
        });
        (server.base_url().replace(&api.port().to_string(), &own.port().to_string()), sender)
    }

    #[tokio::test]
    async fn silent_connections_get_no_more_requests() {
        let simulator = Simulator::new();
        let server = Server::tls(&simulator).await.unwrap();
        let (path, key) = (ca_file(&server), simulator.issue_key());
        let mut settings = settings(&path);
        std::fs::remove_file(path).unwrap();
        (settings.ping_every, settings.ping_timeout) =
            (Duration::from_millis(100), Duration::from_millis(500));
        let upstream = Upstream::new(&settings, Versions::All);
        let (base_url, stop) = forwarder(&server).await;
        let send = |method: Method, path: &str| {
            let body = if method == Method::POST { Body::from(CHAT) } else { Body::empty() };
            let request = Request::builder().method(method).uri(format!("{base_url}{path}"));
            let request = request.header("authorization", format!("Bearer {key}"));
            let request = request.body(BufferBody::new(0).pass_through(body)).unwrap();
            time::timeout(Duration::from_secs(60), upstream.clone().oneshot(request))
        };
        let post = || send(Method::POST, "/chat/completions");
        assert_eq!(post().await.unwrap().unwrap().status(), 200);
        // A request in flight ends. It is sent again only if it is idempotent.
        for (method, path, succeeds) in
            [(Method::POST, "/chat/completions", false), (Method::GET, "/models", true)]
        {
            stop.send_replace(());
            let received = simulator.received().len();
            let answered = send(method.clone(), path).await.unwrap();
            assert_eq!(answered.is_ok(), succeeds, "{method}");
            assert_eq!(simulator.received().len() - received, usize::from(succeeds), "{method}");
            assert_eq!(post().await.unwrap().unwrap().status(), 200);
        }
        // An idle connection is given up before the next request.
        stop.send_replace(());
        time::sleep(Duration::from_millis(1200)).await;
        assert_eq!(post().await.unwrap().unwrap().status(), 200);
    }

    #[tokio::test]
    async fn upgrades_use_http1() {
        let simulator = Simulator::new();
        let server = Server::tls(&simulator).await.unwrap();
        let (path, key) = (ca_file(&server), simulator.issue_key());
        let settings = settings(&path);
        std::fs::remove_file(path).unwrap();
        let mut versions = HashMap::new();
        for wanted in [Versions::All, Versions::Http1] {
            let response = Upstream::new(&settings, wanted).oneshot(request(&server, &key)).await.unwrap();
            versions.insert(format!("{wanted:?}"), response.version());
        }
        assert_eq!(versions["All"], axum::http::Version::HTTP_2);
        assert_eq!(versions["Http1"], axum::http::Version::HTTP_11);
    }
}
