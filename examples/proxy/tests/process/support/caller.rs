//! Callers of the proxy.

use std::net::SocketAddr;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, header::AUTHORIZATION, request::Builder};
use http_body::Frame;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{self, Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{Body, Protocol, Proxy, Tls, TlsListener, assert_clean, empty, full, with_timeout};

/// A client with a separate connection pool, and optionally a token.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    client: Client<HttpConnector, Body>,
    address: SocketAddr,
    token: Option<String>,
}

impl Caller {
    pub(crate) fn new(proxy: &Proxy, protocol: Protocol) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let client = Client::builder(TokioExecutor::new())
            .http2_only(protocol == Protocol::Http2)
            .http1_preserve_header_case(true)
            .http1_max_headers(4096)
            .http2_max_header_list_size(1024 * 1024)
            .build(connector);
        Self { client, address: proxy.address(), token: None }
    }

    pub(crate) fn http1(proxy: &Proxy) -> Self {
        Self::new(proxy, Protocol::Http1)
    }

    pub(crate) fn http2(proxy: &Proxy) -> Self {
        Self::new(proxy, Protocol::Http2)
    }

    pub(crate) fn with_token(self, token: &str) -> Self {
        Self { token: Some(token.to_owned()), ..self }
    }

    pub(crate) fn request(&self, method: Method, path: &str) -> Builder {
        let request = Request::builder().method(method).uri(format!("http://{}{path}", self.address));
        match &self.token {
            Some(token) => request.header(AUTHORIZATION, format!("Bearer {token}")),
            None => request,
        }
    }

    pub(crate) async fn try_send(&self, request: Request<Body>) -> Result<Response<Incoming>, legacy::Error> {
        with_timeout(self.client.request(request)).await
    }

    /// Sends a request, and returns the head of the response.
    pub(crate) async fn send(&self, request: Request<Body>) -> Response<Incoming> {
        self.try_send(request).await.unwrap()
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        read(self.send(self.request(Method::GET, path).body(empty()).unwrap()).await).await
    }

    pub(crate) async fn post(&self, path: &str, body: impl Into<Bytes>) -> Answer {
        read(self.send(self.request(Method::POST, path).body(full(body)).unwrap()).await).await
    }

    /// Requests a chat completion.
    pub(crate) async fn chat(&self) -> Answer {
        self.chat_with(&[]).await
    }

    /// Requests a chat completion with further headers.
    pub(crate) async fn chat_with(&self, headers: &[(&str, &str)]) -> Answer {
        let mut request = self.request(Method::POST, "/v1/chat/completions");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let body = full(r#"{"messages":[{"role":"user","content":"hi"}]}"#);
        read(self.send(request.body(body).unwrap()).await).await
    }
}

/// A complete response.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    pub(crate) trailers: Option<HeaderMap>,
}

impl Answer {
    #[track_caller]
    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    /// Returns `type` and `code` of an error in the API's shape.
    #[track_caller]
    pub(crate) fn error(&self) -> (String, String) {
        assert_eq!(self.headers["content-type"], "application/json");
        let body: Value = serde_json::from_slice(&self.body).unwrap();
        let error = body["error"].as_object().unwrap();
        assert!(!error["message"].as_str().unwrap().is_empty());
        (error["type"].as_str().unwrap().to_owned(), error["code"].as_str().unwrap().to_owned())
    }

    /// Asserts the status, and an error in the API's shape.
    #[track_caller]
    pub(crate) fn assert_error(&self, status: u16, kind: &str, code: &str) {
        assert_eq!(self.status, status, "{}", self.text());
        assert_eq!(self.error(), (kind.to_owned(), code.to_owned()));
    }
}

/// Reads the rest of a response, and asserts that it contains no secret.
#[track_caller]
pub(crate) fn read(response: Response<Incoming>) -> impl Future<Output = Answer> {
    let place = std::panic::Location::caller();
    async move {
        let (parts, body) = response.into_parts();
        let body = with_timeout(body.collect()).await.unwrap_or_else(|error| panic!("{error:?} at {place}"));
        let trailers = body.trailers().cloned();
        let answer = Answer { status: parts.status, headers: parts.headers, body: body.to_bytes(), trailers };
        assert_clean("an answer", format!("{:?} {:?}", answer.headers, answer.trailers).as_bytes());
        assert_clean("an answer", &answer.body);
        answer
    }
}

/// Reads the next frame of a body; `None` at the end.
pub(crate) async fn frame(body: &mut Incoming) -> Option<Result<Frame<Bytes>, hyper::Error>> {
    with_timeout(body.frame()).await
}

/// Asserts that a body ends without an error. HTTP/2 may send an empty data frame first.
#[track_caller]
pub(crate) fn assert_ended(body: &mut Incoming) -> impl Future<Output = ()> {
    let place = std::panic::Location::caller();
    async move {
        while let Some(frame) = frame(body).await {
            match frame {
                Ok(frame) if frame.data_ref().is_some_and(Bytes::is_empty) => {}
                other => panic!("expected the end of the body, got {other:?} at {place}"),
            }
        }
    }
}

/// Opens a connection on which the test writes every byte itself.
pub(crate) async fn raw(proxy: &Proxy) -> TcpStream {
    let stream = with_timeout(TcpStream::connect(proxy.address())).await.unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// Opens a connection that is upgraded; returns the caller's end and the API's.
pub(crate) async fn upgraded(proxy: &Proxy, api: &TlsListener) -> (TcpStream, Tls) {
    let upgrade = "Connection: Upgrade\r\nUpgrade: echo\r\n\r\n";
    let mut caller = raw(proxy).await;
    let head = format!("GET /v1/live HTTP/1.1\r\nHost: localhost\r\n{upgrade}");
    caller.write_all(head.as_bytes()).await.unwrap();
    let mut connection = api.accept().await;
    super::read_head(&mut connection).await;
    let switched = format!("HTTP/1.1 101 Switching Protocols\r\n{upgrade}");
    connection.write_all(switched.as_bytes()).await.unwrap();
    assert!(response_head(&mut caller).await.starts_with("HTTP/1.1 101 "));
    (caller, connection)
}

/// Reads the head of a response from a raw connection, up to and including the empty line.
pub(crate) async fn response_head(stream: &mut (impl AsyncRead + Unpin)) -> String {
    super::read_head(stream).await
}

/// Reads a raw connection to its end.
pub(crate) async fn read_to_end(stream: &mut (impl AsyncRead + Unpin)) -> Vec<u8> {
    let mut rest = Vec::new();
    with_timeout(stream.read_to_end(&mut rest)).await.unwrap();
    rest
}
