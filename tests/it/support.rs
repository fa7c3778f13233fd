//! What the tests share: keys, a client that shows what it was sent, real clients over TLS.

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

/// A JWT with these claims, signed by nobody.
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

/// Adds credentials of its caller's to a request, twice each.
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

/// The voice agent's WebSocket handshake, with the nonce of RFC 6455 section 1.3.
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

/// A body fed by hand.
#[derive(Debug)]
pub(crate) struct Fed(pub(crate) UnboundedReceiver<io::Result<Frame<Bytes>>>);

impl http_body::Body for Fed {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        self.0.poll_recv(cx)
    }
}

/// Sends `request` through `layer` to a client that answers 200: what the client was sent, or why not.
pub(crate) async fn send<L, S>(layer: &L, request: Request<()>) -> Result<Request<()>, AuthError>
where
    L: Layer<Mock, Service = S>,
    S: Service<Request<()>, Response = Response<Body>, Error: Refusal>,
{
    let (mock, mut handle) = mock::pair();
    let answer = async {
        let (request, send) = handle.next_request().await?;
        send.send_response(response(200, ""));
        Some(request)
    };
    let (result, sent) = tokio::join!(layer.layer(mock).oneshot(request), answer);
    match (result, sent) {
        (Ok(_), Some(sent)) => Ok(sent),
        (Err(error), None) => Err(error.auth_error()),
        (result, sent) => panic!("answered {:?} though sent {:?}", result.map(|_| ()), sent.is_some()),
    }
}

/// The errors of the stacks that `send` is used with.
pub(crate) trait Refusal: std::fmt::Debug {
    fn auth_error(&self) -> AuthError;
}

impl Refusal for BoxError {
    fn auth_error(&self) -> AuthError {
        AuthError::find(&**self).expect("an AuthError").clone()
    }
}

impl Refusal for Error<BoxError> {
    fn auth_error(&self) -> AuthError {
        self.auth().expect("an AuthError").clone()
    }
}

/// The values of a header, each as it goes over the wire.
pub(crate) fn values(request: &Request<()>, name: &str) -> Vec<String> {
    request.headers().get_all(name).iter().map(|value| value.to_str().unwrap().to_owned()).collect()
}

/// The versions of HTTP that a real client is tried with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Http {
    One,
    Two,
}

pub(crate) const BOTH: [Http; 2] = [Http::One, Http::Two];

pub(crate) type Https = Client<HttpsConnector<HttpConnector>, Body>;

/// hyper-util's client, speaking one version of HTTP over TLS.
pub(crate) fn https(server: &Server, http: Http) -> Https {
    let connector = HttpsConnectorBuilder::new().with_tls_config(trusting(server)).https_only();
    let connector = match http {
        Http::One => connector.enable_http1().build(),
        Http::Two => connector.enable_http2().build(),
    };
    Client::builder(TokioExecutor::new()).http2_only(http == Http::Two).build(connector)
}

/// TLS that trusts the simulator's own authority and no other.
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

/// Longer than anything on a loopback takes; a test that meets it hangs.
pub(crate) const HANG: Duration = Duration::from_secs(20);
