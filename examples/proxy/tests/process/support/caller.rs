//! Who calls the proxy.

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
    io::{AsyncRead, AsyncReadExt},
    net::TcpStream,
};

use super::{Body, Protocol, Proxy, assert_clean, empty, soon, whole};

/// A client with connections of its own, and perhaps a token.
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
        soon(self.client.request(request)).await
    }

    /// The head of the answer.
    pub(crate) async fn send(&self, request: Request<Body>) -> Response<Incoming> {
        self.try_send(request).await.unwrap()
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        read(self.send(self.request(Method::GET, path).body(empty()).unwrap()).await).await
    }

    pub(crate) async fn post(&self, path: &str, body: impl Into<Bytes>) -> Answer {
        read(self.send(self.request(Method::POST, path).body(whole(body)).unwrap()).await).await
    }

    /// A chat completion.
    pub(crate) async fn chat(&self) -> Answer {
        self.post("/v1/chat/completions", r#"{"messages":[{"role":"user","content":"hi"}]}"#).await
    }
}

/// The whole of an answer.
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

    /// An error in the form of the API's: its `type` and `code`.
    #[track_caller]
    pub(crate) fn error(&self) -> (String, String) {
        assert_eq!(self.headers["content-type"], "application/json");
        let body: Value = serde_json::from_slice(&self.body).unwrap();
        let error = body["error"].as_object().unwrap();
        assert!(!error["message"].as_str().unwrap().is_empty());
        (error["type"].as_str().unwrap().to_owned(), error["code"].as_str().unwrap().to_owned())
    }

    /// Status and error of an answer in the API's form.
    #[track_caller]
    pub(crate) fn assert_error(&self, status: u16, kind: &str, code: &str) {
        assert_eq!(self.status, status, "{}", self.text());
        assert_eq!(self.error(), (kind.to_owned(), code.to_owned()));
    }
}

/// All that is still to come of an answer. No secret is in it.
#[track_caller]
pub(crate) fn read(response: Response<Incoming>) -> impl Future<Output = Answer> {
    let place = std::panic::Location::caller();
    async move {
        let (parts, body) = response.into_parts();
        let body = soon(body.collect()).await.unwrap_or_else(|error| panic!("{error:?} at {place}"));
        let trailers = body.trailers().cloned();
        let answer = Answer { status: parts.status, headers: parts.headers, body: body.to_bytes(), trailers };
        assert_clean("an answer", format!("{:?} {:?}", answer.headers, answer.trailers).as_bytes());
        assert_clean("an answer", &answer.body);
        answer
    }
}

/// The next that comes of a body; `None` at its end.
pub(crate) async fn frame(body: &mut Incoming) -> Option<Result<Frame<Bytes>, hyper::Error>> {
    soon(body.frame()).await
}

/// Waits for the end of a body, which has to be a good one. HTTP/2 may say it with data that is empty.
#[track_caller]
pub(crate) fn ended(body: &mut Incoming) -> impl Future<Output = ()> {
    let place = std::panic::Location::caller();
    async move {
        while let Some(frame) = frame(body).await {
            match frame {
                Ok(frame) if frame.data_ref().is_some_and(Bytes::is_empty) => {}
                other => panic!("no end, but {other:?} at {place}"),
            }
        }
    }
}

/// A connection on which the test says every byte itself.
pub(crate) async fn raw(proxy: &Proxy) -> TcpStream {
    let stream = soon(TcpStream::connect(proxy.address())).await.unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// The head of an answer on such a connection, with the empty line at its end.
pub(crate) async fn response_head(stream: &mut (impl AsyncRead + Unpin)) -> String {
    super::read_head(stream).await
}

/// What is still to come on such a connection until it ends.
pub(crate) async fn read_to_end(stream: &mut (impl AsyncRead + Unpin)) -> Vec<u8> {
    let mut rest = Vec::new();
    soon(stream.read_to_end(&mut rest)).await.unwrap();
    rest
}
