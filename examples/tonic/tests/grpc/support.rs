//! Shared by the tests: a greeter behind a gate that rejects tokens, and a client that refreshes them.

use std::{
    collections::VecDeque,
    convert::Infallible,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use example_tonic::{Greeter, GreeterClient, GreeterServer, Greeting, Name, Server};
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::Frame;
use http_body_util::BodyExt;
use tokio::sync::watch;
use tokio_stream::{Stream, StreamExt};
use tonic::{
    Code, Status, Streaming, body::Body, metadata::MetadataMap, server::NamedService, transport::Channel,
};
use tower::{Layer, Service, ServiceExt};
use tower_selam::{
    ApiKey, BaseUrl, BoxError, JwtProvider, Refreshing, SelamLayer, Token,
    adapter::tonic::{SelamGrpc, SelamGrpcLayer},
    source::{Reason, source_fn},
};

pub(crate) const KEY: &str = "sk-selam-canary-0123456789abcdef";
pub(crate) const MESSAGE: &str = "the session has ended";
pub(crate) const DETAILS: &[u8] = b"\x0a\x07details";

/// Longer than any step takes on a loopback connection.
pub(crate) const HANG: Duration = Duration::from_secs(20);

pub(crate) type Client = GreeterClient<SelamGrpc<Channel>>;

/// How the gate rejects a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RejectIn {
    Headers,
    /// In trailers, after this number of messages.
    Trailers(usize),
    /// With an HTTP status, as a proxy without gRPC support would.
    Http,
}

/// A call that reached the gate, accepted or rejected.
#[derive(Clone, Debug)]
pub(crate) struct Received {
    pub(crate) head: HeaderMap,
    pub(crate) body: Arc<Mutex<Vec<u8>>>,
}

impl Received {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.body.lock().unwrap().clone()
    }
}

/// Mints tokens, accepts the last one, and guards the greeter.
#[derive(Clone, Default)]
pub(crate) struct Gate(Arc<Inner>);

#[derive(Default)]
struct Inner {
    accepted: Mutex<Option<String>>,
    minted: AtomicUsize,
    rejection: Mutex<Option<(RejectIn, Code)>>,
    /// Reads the whole request before it rejects it.
    reads_request_first: AtomicBool,
    /// Repeats the received credentials in a rejection.
    echoes: AtomicBool,
    /// Number of refreshes that have started.
    refreshes_started: AtomicUsize,
    /// Refreshes wait until this is false.
    held: watch::Sender<bool>,
    received: Mutex<Vec<Received>>,
}

impl Gate {
    pub(crate) fn rejecting(how: RejectIn) -> Self {
        Self::rejecting_with(how, Code::Unauthenticated)
    }

    pub(crate) fn rejecting_with(how: RejectIn, code: Code) -> Self {
        let gate = Self::default();
        gate.reject(how, code);
        gate
    }

    pub(crate) fn reading_request_first(self) -> Self {
        self.0.reads_request_first.store(true, SeqCst);
        self
    }

    pub(crate) fn echoing(self) -> Self {
        self.0.echoes.store(true, SeqCst);
        self
    }

    /// Keeps refreshes from completing until `release`.
    pub(crate) fn hold(&self) {
        self.0.held.send_replace(true);
    }

    pub(crate) fn release(&self) {
        self.0.held.send_replace(false);
    }

    /// Invalidates the current token.
    pub(crate) fn revoke(&self) {
        *self.0.accepted.lock().unwrap() = None;
    }

    pub(crate) fn reject(&self, how: RejectIn, code: Code) {
        *self.0.rejection.lock().unwrap() = Some((how, code));
    }

    pub(crate) fn accept_all(&self) {
        *self.0.rejection.lock().unwrap() = None;
    }

    /// Rejects every token, new ones included.
    pub(crate) fn reject_all(&self) {
        *self.0.accepted.lock().unwrap() = Some("none".to_owned());
    }

    pub(crate) fn minted(&self) -> usize {
        self.0.minted.load(SeqCst)
    }

    pub(crate) fn refreshes_started(&self) -> usize {
        self.0.refreshes_started.load(SeqCst)
    }

    pub(crate) fn received(&self) -> Vec<Received> {
        self.0.received.lock().unwrap().clone()
    }

    fn mint(&self) -> String {
        let token = format!("canary-token-{:04}", self.0.minted.fetch_add(1, SeqCst));
        let mut accepted = self.0.accepted.lock().unwrap();
        if accepted.as_deref() != Some("none") {
            *accepted = Some(token.clone());
        }
        token
    }

    pub(crate) fn jwts(&self) -> Refreshing<Token> {
        let gate = self.clone();
        Refreshing::new(source_fn(move |_: Reason<Token>| {
            let gate = gate.clone();
            async move {
                gate.0.refreshes_started.fetch_add(1, SeqCst);
                gate.0.held.subscribe().wait_for(|held| !held).await?;
                Ok::<_, BoxError>(Token::new(gate.mint())?)
            }
        }))
    }

    pub(crate) async fn serve(&self) -> Server {
        let gated = Gated { gate: self.clone(), inner: GreeterServer::new(GreeterService) };
        Server::start(tonic::service::Routes::new(gated)).await.unwrap()
    }

    /// Serves the greeter, and makes a client whose token was just revoked.
    pub(crate) async fn serve_with_revoked_token(&self) -> (Server, Client) {
        let server = self.serve().await;
        let jwts = self.jwts();
        jwts.prefetch().await.unwrap();
        self.revoke();
        let client = client(&server, jwts);
        (server, client)
    }

    fn rejection(&self, head: &HeaderMap, (how, code): (RejectIn, Code)) -> Response<Body> {
        let echo = match self.0.echoes.load(SeqCst) {
            true => format!("{} {}", text(head, "authorization"), text(head, "x-api-key")),
            false => String::new(),
        };
        let mut metadata = MetadataMap::new();
        metadata.insert("x-request-id", format!("req-1{echo}").parse().unwrap());
        metadata.insert_bin("echo-bin", tonic::metadata::MetadataValue::from_bytes(echo.as_bytes()));
        let details = Bytes::from([DETAILS, echo.as_bytes()].concat());
        let message = [MESSAGE, &echo].concat();
        let status = Status::with_details_and_metadata(code, &message, details, metadata);
        match how {
            RejectIn::Headers => status.into_http(),
            RejectIn::Trailers(messages) => {
                let mut trailers = HeaderMap::new();
                status.add_header(&mut trailers).unwrap();
                let mut frames = VecDeque::from_iter((0..messages).map(|_| Frame::data(message_frame())));
                frames.push_back(Frame::trailers(trailers));
                let mut response = Response::new(Body::new(Frames(frames)));
                response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
                response
            }
            RejectIn::Http => {
                let status = if code == Code::PermissionDenied { 403 } else { 401 };
                let body = format!(r#"{{"error":{{"message":"{message}"}}}}"#);
                let body = Body::new(http_body_util::Full::new(Bytes::from(body)));
                Response::builder().status(status).header("x-request-id", "req-1").body(body).unwrap()
            }
        }
    }
}

fn text<'a>(head: &'a HeaderMap, name: &str) -> &'a str {
    head.get(name).map_or("", |value| value.to_str().unwrap())
}

/// A greeting in gRPC's framing.
fn message_frame() -> Bytes {
    let message = prost::Message::encode_to_vec(&Greeting::saying("Selam!"));
    let mut frame = vec![0];
    frame.extend_from_slice(&u32::try_from(message.len()).unwrap().to_be_bytes());
    frame.extend_from_slice(&message);
    frame.into()
}

/// A body with the given frames.
pub(crate) struct Frames(pub(crate) VecDeque<Frame<Bytes>>);

impl http_body::Body for Frames {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.pop_front().map(Ok))
    }
}

#[derive(Clone)]
struct Gated<S> {
    gate: Gate,
    inner: S,
}

impl<S: NamedService> NamedService for Gated<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request<Body>> for Gated<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future: Send>
        + Clone
        + Send
        + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let Self { gate, inner } = self.clone();
        Box::pin(async move {
            let (parts, body) = request.into_parts();
            let received = Received { head: parts.headers.clone(), body: Arc::default() };
            gate.0.received.lock().unwrap().push(received.clone());
            let mut body = Body::new(body.map_frame(move |frame| {
                let data = frame.data_ref().map(|data| &data[..]).unwrap_or_default();
                received.body.lock().unwrap().extend_from_slice(data);
                frame
            }));
            let accepted = gate.0.accepted.lock().unwrap().clone();
            let accepted = accepted
                .is_some_and(|token| text(&parts.headers, "authorization") == format!("Bearer {token}"));
            let rejection = *gate.0.rejection.lock().unwrap();
            match rejection {
                Some(rejection) if !accepted => {
                    if gate.0.reads_request_first.load(SeqCst) {
                        while let Some(Ok(_)) = body.frame().await {}
                    }
                    Ok(gate.rejection(&parts.headers, rejection))
                }
                _ => inner.oneshot(Request::from_parts(parts, body)).await,
            }
        })
    }
}

struct GreeterService;

#[tonic::async_trait]
impl Greeter for GreeterService {
    async fn greet(&self, request: tonic::Request<Name>) -> Result<tonic::Response<Greeting>, Status> {
        Ok(tonic::Response::new(greeting(request.get_ref())))
    }

    type GreetInEveryLanguageStream = Pin<Box<dyn Stream<Item = Result<Greeting, Status>> + Send>>;

    async fn greet_in_every_language(
        &self,
        request: tonic::Request<Name>,
    ) -> Result<tonic::Response<Self::GreetInEveryLanguageStream>, Status> {
        let name = request.into_inner().name;
        let greetings =
            ["Selam", "Merhaba", "Hello"].map(|word| Ok(Greeting::saying(format!("{word}, {name}!"))));
        Ok(tonic::Response::new(Box::pin(tokio_stream::iter(greetings))))
    }

    async fn greet_all(
        &self,
        request: tonic::Request<Streaming<Name>>,
    ) -> Result<tonic::Response<Greeting>, Status> {
        let mut names = Vec::new();
        let mut stream = request.into_inner();
        while let Some(name) = stream.message().await? {
            names.push(name.name);
        }
        Ok(tonic::Response::new(Greeting::saying(format!("Selam, {}!", names.join(" and ")))))
    }

    type ConverseStream = Pin<Box<dyn Stream<Item = Result<Greeting, Status>> + Send>>;

    async fn converse(
        &self,
        request: tonic::Request<Streaming<Name>>,
    ) -> Result<tonic::Response<Self::ConverseStream>, Status> {
        let greetings = request.into_inner().map(|name| Ok(greeting(&name?)));
        Ok(tonic::Response::new(Box::pin(greetings)))
    }

    async fn forget(&self, _: tonic::Request<Name>) -> Result<tonic::Response<Greeting>, Status> {
        Err(Status::with_details(
            Code::PermissionDenied,
            "greetings cannot be forgotten",
            Bytes::from_static(DETAILS),
        ))
    }
}

fn greeting(name: &Name) -> Greeting {
    Greeting::saying(format!("Selam, {}!", name.name))
}

pub(crate) fn layer(server: &Server, jwt: impl Into<JwtProvider>) -> SelamGrpcLayer {
    let selam = SelamLayer::builder()
        .with_base_url(BaseUrl::new(&server.url()).unwrap())
        .with_api_key(ApiKey::new(KEY).unwrap())
        .with_jwt(jwt)
        .build()
        .unwrap();
    SelamGrpcLayer::new(selam, server.endpoint().unwrap().uri()).unwrap()
}

pub(crate) fn client(server: &Server, jwt: impl Into<JwtProvider>) -> Client {
    GreeterClient::new(layer(server, jwt).layer(server.endpoint().unwrap().connect_lazy()))
}

/// Waits until another task makes `condition` true.
pub(crate) async fn until(condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(HANG, wait).await.unwrap();
}

/// Calls `Greet` and returns the greeting.
pub(crate) async fn greet(client: &mut Client) -> Result<String, Status> {
    Ok(client.greet(Name::of("Almaz")).await?.into_inner().text)
}
