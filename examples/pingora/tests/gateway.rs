//! The proxy between callers and a simulated API, over real connections.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests")]

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use example_pingora::Gateway;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use pingora::{
    apps::ServerApp,
    protocols::{Stream, l4::stream::Stream as TcpConnection},
    proxy::http_proxy,
    server::configuration::ServerConf,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    time::timeout,
};
use tower_selam::{
    ApiKey, BaseUrl, JwtProvider, Provider, Refreshing, SelamLayer, Token,
    simulator::{Fault, JwtAlgorithm, Received, Server, Simulator},
    source::{Reason, SourceError, source_fn},
};

const TOKEN: &str = "token-of-the-web-site";
const CHAT: &str = r#"{"messages":[{"role":"user","content":"Selam!"}]}"#;
const CHAT_STREAM: &str = r#"{"stream":true,"messages":[{"role":"user","content":"Selam!"}]}"#;

/// Time limit that only a hanging test reaches.
const HANG: Duration = Duration::from_secs(60);

/// The simulated API, and the proxy in front of it.
struct Stack {
    simulator: Simulator,
    _api: Server,
    proxy: SocketAddr,
}

impl Stack {
    async fn start(simulator: Simulator, key: impl Into<Provider<ApiKey>>, jwt: Option<JwtProvider>) -> Self {
        let api = Server::http(&simulator).await.unwrap();
        let base_url = BaseUrl::allow_insecure_loopback(api.base_url()).unwrap();
        let mut layer = SelamLayer::builder().with_base_url(base_url).with_api_key(key);
        if let Some(jwt) = jwt {
            layer = layer.with_jwt(jwt);
        }
        let gateway = Gateway::new(layer.build().unwrap(), TOKEN).unwrap();
        let proxy = Arc::new(http_proxy(&Arc::new(ServerConf::default()), gateway));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (_running, shutdown) = watch::channel(false);
            while let Ok((connection, _)) = listener.accept().await {
                let (proxy, shutdown) = (Arc::clone(&proxy), shutdown.clone());
                tokio::spawn(async move {
                    let mut next: Option<Stream> = Some(Box::new(TcpConnection::from(connection)));
                    while let Some(connection) = next {
                        next = proxy.process_new(connection, &shutdown).await;
                    }
                });
            }
        });
        Self { simulator, _api: api, proxy: address }
    }

    /// With a key that is replaced by the next one when it is rejected.
    async fn with_keys<const N: usize>() -> (Self, [String; N]) {
        let simulator = Simulator::new();
        let keys = [(); N].map(|()| simulator.issue_key());
        let mut rest = keys.clone().into_iter();
        let source = std::sync::Mutex::new(move || rest.next());
        let source = source_fn(move |_: Reason<ApiKey>| {
            let key = (source.lock().unwrap())().map(ApiKey::new);
            async move { Ok::<_, SourceError>(key.ok_or_else(|| SourceError::transient("no key is left"))??) }
        });
        (Self::start(simulator, Refreshing::new(source), None).await, keys)
    }

    async fn send(&self, request: Request<impl Into<Bytes>>) -> Response<Bytes> {
        let exchange = async {
            let stream = TcpStream::connect(self.proxy).await.unwrap();
            let (mut client, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
            tokio::spawn(connection);
            let (head, body) = client
                .send_request(request.map(|body| Full::<Bytes>::from(body.into())))
                .await
                .unwrap()
                .into_parts();
            Response::from_parts(head, body.collect().await.unwrap().to_bytes())
        };
        timeout(HANG, exchange).await.unwrap()
    }

    async fn chat(&self, body: impl Into<Bytes>) -> Response<Bytes> {
        self.send(post("/v1/chat/completions").body(body).unwrap()).await
    }

    /// The bearer credentials that the API received.
    fn bearers(&self) -> Vec<String> {
        let received = self.simulator.received();
        received.iter().map(|received| bearer(&received.headers).to_owned()).collect()
    }
}

/// A request of a caller that brings credentials, in all the places where they would matter.
fn post(path: &str) -> http::request::Builder {
    Request::post(path)
        .header("host", "evil.com")
        .header("authorization", format!("Bearer {TOKEN}"))
        .header("content-type", "application/json")
        .header("x-api-key", "theirs")
        .header("cookie", "session=theirs")
        .header("x-forwarded-for", "192.0.2.7")
        .header("connection", "x-api-key, authorization")
}

fn bearer(headers: &HeaderMap) -> &str {
    let values: Vec<_> =
        headers.get_all("authorization").iter().map(|value| value.to_str().unwrap()).collect();
    assert_eq!(values.len(), 1);
    values[0].strip_prefix("Bearer ").unwrap()
}

fn bodies(received: &[Received]) -> Vec<&[u8]> {
    received.iter().map(|received| &received.body[..]).collect()
}

#[tokio::test]
async fn a_rotated_key_is_replayed_with_the_next() {
    let (stack, [old, new]) = Stack::with_keys().await;
    assert_eq!(stack.chat(CHAT).await.status(), StatusCode::OK);
    stack.simulator.revoke_key(&old);
    let response = stack.chat(CHAT).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert!(response.body().starts_with(b"{"));
    assert_eq!(stack.bearers(), [&old, &old, &new].map(Clone::clone));
    assert_eq!(bodies(&stack.simulator.received()), [CHAT.as_bytes(); 3]);
}

#[tokio::test]
async fn an_expired_jwt_is_replayed_with_the_next() {
    let simulator = Simulator::new();
    let (key, mint) = (simulator.issue_key(), simulator.clone());
    let jwts = Refreshing::new(source_fn(move |_: Reason<Token>| {
        let jwt = Token::new(mint.mint_jwt(JwtAlgorithm::Es256, HANG));
        async move { Ok::<_, SourceError>(jwt?) }
    }));
    let stack = Stack::start(simulator, ApiKey::new(&*key).unwrap(), Some(jwts.into())).await;
    assert_eq!(stack.chat(CHAT).await.status(), StatusCode::OK);
    stack.simulator.expire_jwts();
    assert_eq!(stack.chat(CHAT).await.status(), StatusCode::OK);
    let sent = stack.bearers();
    assert!(sent.len() == 3 && sent[0] == sent[1] && sent[1] != sent[2]);
    assert!(stack.simulator.received().iter().all(|received| received.headers["x-api-key"] == key));
}

#[tokio::test]
async fn a_request_is_sent_twice_at_most() {
    let (stack, keys) = Stack::with_keys::<4>().await;
    keys.iter().for_each(|key| stack.simulator.revoke_key(key));
    let response = stack.chat(CHAT).await;
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    assert!(String::from_utf8_lossy(response.body()).contains("invalid_api_key"), "the answer passes");
    assert_eq!(stack.bearers(), keys[..2]);
}

#[tokio::test]
async fn a_long_body_is_not_replayed() {
    let (stack, [old, new]) = Stack::with_keys().await;
    stack.simulator.revoke_key(&old);
    let long = format!("{CHAT}{}", " ".repeat(200_000));
    assert_eq!(stack.chat(long.clone()).await.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(stack.chat(long).await.status(), StatusCode::OK, "the key was read again");
    assert_eq!(stack.bearers(), [old, new]);
}

#[tokio::test]
async fn a_403_passes() {
    let simulator = Simulator::new();
    let key = ApiKey::new(simulator.issue_limited_key()).unwrap();
    let stack = Stack::start(simulator, key, None).await;
    let response = stack.send(post("/v1/audio/speech").body("{}").unwrap()).await;
    assert_eq!(response.status(), StatusCode::FORBIDDEN);
    assert!(String::from_utf8_lossy(response.body()).contains("insufficient_permissions"));
    assert_eq!(stack.simulator.requests(), 1);
}

#[tokio::test]
async fn the_api_sees_our_credentials_and_its_own_host() {
    let (stack, [key]) = Stack::with_keys().await;
    let api = stack._api.local_addr().to_string();
    for target in
        ["/v1/chat/completions?n=1&api_key=theirs", "http://evil.com/v1/chat/completions?n=1&Token=theirs"]
    {
        assert_eq!(stack.send(post(target).body(CHAT).unwrap()).await.status(), StatusCode::OK);
        let received = stack.simulator.received().pop().unwrap();
        assert_eq!((bearer(&received.headers), received.headers["host"].to_str().unwrap()), (&*key, &*api));
        assert_eq!(received.uri, "/v1/chat/completions?n=1");
        let shown = format!("{:?}", received.headers);
        assert!(
            !["theirs", TOKEN, "evil", "192.0.2.7"].iter().any(|theirs| shown.contains(theirs)),
            "{shown}"
        );
    }
}

#[tokio::test]
async fn others_are_refused() {
    let (stack, [key]) = Stack::with_keys().await;
    for authorization in ["", "Bearer ", "Digest token-of-the-web-site", &format!("Bearer {key}")] {
        let request =
            Request::post("/v1/chat/completions").header("host", "a").header("authorization", authorization);
        assert_eq!(stack.send(request.body(CHAT).unwrap()).await.status(), StatusCode::UNAUTHORIZED);
    }
    let twice = post("/v1/chat/completions").header("authorization", format!("Bearer {TOKEN}"));
    assert_eq!(stack.send(twice.body(CHAT).unwrap()).await.status(), StatusCode::UNAUTHORIZED);
    for path in ["/", "/admin", "/v1/../admin", "/v1/%2e%2e/admin", "/v10/chat"] {
        assert_eq!(
            stack.send(post(path).body(CHAT).unwrap()).await.status(),
            StatusCode::NOT_FOUND,
            "{path}"
        );
    }
    assert_eq!(stack.simulator.requests(), 0);
}

/// The caller's mistake is not reported as an outage.
#[tokio::test]
async fn a_method_without_credentials_is_refused() {
    let (stack, [_]) = Stack::with_keys().await;
    let trace = post("/v1/chat/completions").method("TRACE").body("").unwrap();
    assert_eq!(stack.send(trace).await.status(), StatusCode::BAD_REQUEST);
    assert_eq!(stack.simulator.requests(), 0);
}

#[tokio::test]
async fn without_a_credential_nothing_is_sent() {
    let sealed = source_fn(|_: Reason<ApiKey>| async {
        Err::<ApiKey, _>(SourceError::transient("the vault is sealed"))
    });
    let stack = Stack::start(Simulator::new(), Refreshing::new(sealed), None).await;
    assert_eq!(stack.chat(CHAT).await.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(stack.simulator.requests(), 0);
}

/// The first event arrives although the stream never ends.
#[tokio::test]
async fn streams_pass_as_they_arrive() {
    let (stack, [_]) = Stack::with_keys().await;
    let whole = stack.chat(CHAT_STREAM).await;
    assert_eq!(whole.headers()["content-type"], "text/event-stream");
    assert!(whole.body().ends_with(b"data: [DONE]\n\n"));

    stack.simulator.inject(Fault::StallBody { after: 20 });
    let stream = TcpStream::connect(stack.proxy).await.unwrap();
    let (mut client, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let request = post("/v1/chat/completions").body(Full::<Bytes>::from(CHAT_STREAM)).unwrap();
    let mut body = timeout(HANG, client.send_request(request)).await.unwrap().unwrap().into_body();
    let mut first = Vec::new();
    while first.len() < 20 {
        let frame = timeout(HANG, body.frame()).await.unwrap().unwrap().unwrap();
        first.extend_from_slice(&frame.into_data().unwrap());
    }
    assert_eq!(first, whole.body()[..20]);
}
