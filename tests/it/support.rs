//! Helpers shared by the tests: credentials, a mock client that records its request, real clients over TLS.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use bytes::Bytes;
use http::{Request, Response};
use http_body::Frame;
use http_body_util::Full;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore, pki_types::CertificateDer};
use tower::{Layer, Service, ServiceExt};
use tower_selam::{
    ApiKey, AuthError, BaseUrl, BoxError, Error, RequestAuth, SelamLayer, SelamLayerBuilder, Token,
    simulator::Server,
};
use tower_test::mock;

pub(crate) const KEY: &str = "sk-selam-canary-0123456789abcdef";
pub(crate) const JWT: &str = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJjYW5hcnkifQ.Y2FuYXJ5LXNpZ25hdHVyZQ";
pub(crate) const MODELS: &str = "https://api.selamgpt.com/v1/models";

pub(crate) type Body = Full<Bytes>;
pub(crate) type Mock = mock::Mock<Request<()>, Response<Body>>;

pub(crate) fn key() -> ApiKey {
    ApiKey::new(KEY).unwrap()
}

pub(crate) fn jwt() -> Token {
    Token::new(JWT).unwrap()
}

/// Returns a JWT with these claims and a fake signature.
pub(crate) fn jwt_claiming(claims: &str) -> Token {
    let part = |text| BASE64_URL_SAFE_NO_PAD.encode(text);
    Token::new(format!("{}.{}.c2ln", part(r#"{"alg":"HS256"}"#), part(claims))).unwrap()
}

pub(crate) fn get(uri: &str) -> Request<()> {
    Request::get(uri).body(()).unwrap()
}

pub(crate) fn response(status: u16, body: impl Into<Bytes>) -> Response<Body> {
    Response::builder().status(status).body(Full::new(body.into())).unwrap()
}

/// Adds duplicated `Authorization` and `X-API-Key` headers, as an inbound caller could send them.
pub(crate) fn bring_theirs<B>(request: &mut Request<B>) {
    for (name, value) in [
        ("authorization", "Bearer theirs"),
        ("authorization", "Basic dGhlaXJz"),
        ("x-api-key", "theirs"),
        ("x-api-key", "theirs too"),
    ] {
        request.headers_mut().append(name, value.parse().unwrap());
    }
}

/// Returns the voice agent's WebSocket handshake, with the nonce of RFC 6455 section 1.3.
pub(crate) fn handshake(uri: &str) -> Request<()> {
    Request::get(uri)
        .header("connection", "Upgrade")
        .header("upgrade", "websocket")
        .header("sec-websocket-version", "13")
        .header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==")
        .extension(RequestAuth::VoiceAgent)
        .body(())
        .unwrap()
}

/// Returns the URL of the voice agent's WebSocket handshake.
pub(crate) fn voice_agent(server: &Server) -> String {
    let origin = server.base_url().strip_suffix("/v1").unwrap();
    format!("{origin}/socket.io/?EIO=4&transport=websocket&voice=mekdes")
}

/// A response body whose frames come from a channel.
#[derive(Debug)]
pub(crate) struct Fed(pub(crate) UnboundedReceiver<io::Result<Frame<Bytes>>>);

impl http_body::Body for Fed {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        self.0.poll_recv(cx)
    }
}

/// Sends `request` through `layer` to a mock client that answers 200.
///
/// Returns the request that the client received, or the error if nothing was sent.
pub(crate) async fn send<L, S, B>(layer: &L, request: Request<()>) -> Result<Request<()>, AuthError>
where
    L: Layer<Mock, Service = S>,
    S: Service<Request<()>, Response = Response<B>, Error: StackError>,
{
    let (mock, mut handle) = mock::pair();
    let client = async {
        let (request, send) = handle.next_request().await?;
        send.send_response(response(200, ""));
        Some(request)
    };
    let (result, sent) = tokio::join!(layer.layer(mock).oneshot(request), client);
    match (result, sent) {
        (Ok(_), Some(sent)) => Ok(sent),
        (Err(error), None) => Err(error.auth_error()),
        (result, sent) => panic!("result {:?} contradicts sent = {}", result.map(|_| ()), sent.is_some()),
    }
}

/// An error type of a stack under test; [`send`] extracts the [`AuthError`] from it.
pub(crate) trait StackError: std::fmt::Debug {
    fn auth_error(&self) -> AuthError;
}

impl StackError for BoxError {
    fn auth_error(&self) -> AuthError {
        AuthError::find(&**self).expect("an AuthError").clone()
    }
}

impl StackError for Error<BoxError> {
    fn auth_error(&self) -> AuthError {
        self.auth().expect("an AuthError").clone()
    }
}

/// Returns all values of a header, as they appear on the wire.
pub(crate) fn values(request: &Request<()>, name: &str) -> Vec<String> {
    request.headers().get_all(name).iter().map(|value| value.to_str().unwrap().to_owned()).collect()
}

/// The HTTP versions that real clients are tested with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Http {
    One,
    Two,
}

pub(crate) const BOTH: [Http; 2] = [Http::One, Http::Two];

pub(crate) type Https = Client<HttpsConnector<HttpConnector>, Body>;

/// Returns a hyper-util client that speaks one HTTP version over TLS.
pub(crate) fn https(server: &Server, http: Http) -> Https {
    let connector = HttpsConnectorBuilder::new().with_tls_config(trusting(server)).https_only();
    let connector = match http {
        Http::One => connector.enable_http1().build(),
        Http::Two => connector.enable_http2().build(),
    };
    Client::builder(TokioExecutor::new()).http2_only(http == Http::Two).build(connector)
}

/// Returns a TLS configuration that trusts only the simulator's certificate authority.
pub(crate) fn trusting(server: &Server) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(server.ca_der().unwrap().to_vec())).unwrap();
    ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth()
}

pub(crate) fn builder(server: &Server) -> SelamLayerBuilder {
    SelamLayer::builder().with_base_url(BaseUrl::new(server.base_url()).unwrap())
}

pub(crate) fn post(layer: &SelamLayer, path: &str, body: &'static str) -> Request<Body> {
    let uri = layer.base_url().endpoint(path).unwrap();
    Request::post(uri).header("content-type", "application/json").body(Full::from(body)).unwrap()
}

pub(crate) const CHAT: &str = r#"{"messages":[{"role":"user","content":"Selam!"}]}"#;
pub(crate) const CHAT_STREAM: &str = r#"{"stream":true,"messages":[{"role":"user","content":"Selam!"}]}"#;

/// Time limit that only a hanging test reaches: far longer than any loopback operation.
pub(crate) const HANG: Duration = Duration::from_secs(60);
