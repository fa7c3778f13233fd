//! The requests that every contender gets, and the bare client that answers them at once.

use std::{
    future::{Ready, ready},
    hint::black_box,
};

use bytes::Bytes;
use http::{HeaderValue, Request, Response};
use http_body_util::Full;
use tower_selam::BoxError;

pub const KEY: &str = "sk-selam-0123456789abcdef0123456789abcdef";
/// A header `{"alg":"ES256","typ":"JWT"}`, claims without an expiry (each source states its own), and 64 bytes in place
/// of a signature.
pub const JWT: &str = "eyJhbGciOiJFUzI1NiIsInR5cCI6IkpXVCJ9.\
    eyJpc3MiOiJodHRwczovL2xvZ2luLmV4YW1wbGUiLCJzdWIiOiJ1c2VyLTAwMDAwMCIsImF1ZCI6Imh0dHBzOi8vYXBpLnNlbGFt\
    Z3B0LmNvbSIsImp0aSI6IjAxMjM0NTY3ODlhYmNkZWYwMTIzNDU2Nzg5YWJjZGVmIn0.\
    kIjo2qTEwIV7BEC_jE8Y7s-xhiJAkuqdM5ReGbCKc_I1laxrlV3CCfebzHiXBmBderuI5jVewzZ6Wc2tl21cxw";

const QUESTION: &str = r#"{"model":"selam-turbo","messages":[{"role":"user","content":"Selam!"}]}"#;

pub type Body = Full<Bytes>;

const URL: &str = "https://api.selamgpt.com/v1/chat/completions";
const HEADERS: [(&str, &str); 3] =
    [("content-type", "application/json"), ("accept", "application/json"), ("user-agent", "benches/1.0")];

/// A chat request as most programs build one: header values from text, a constant body.
pub fn request() -> Request<Body> {
    let [content_type, accept, agent] = HEADERS;
    Request::post(URL)
        .header(content_type.0, content_type.1)
        .header(accept.0, accept.1)
        .header(agent.0, agent.1)
        .body(Body::from(QUESTION))
        .expect("the request is valid")
}

/// The same request from constants only, so that cloning a header value or the body allocates nothing.
pub fn request_of_constants() -> Request<Body> {
    let mut request = Request::post(URL);
    for (name, value) in HEADERS {
        request = request.header(name, HeaderValue::from_static(value));
    }
    request.body(Body::from(QUESTION)).expect("the request is valid")
}

/// The same request with a body that owns its bytes.
pub fn request_with_owned_body() -> Request<Body> {
    request().map(|_| Body::from(QUESTION.as_bytes().to_vec()))
}

/// The bare service. `black_box` keeps the compiler from seeing that it ignores the request.
pub fn client(request: Request<Body>) -> Ready<Result<Response<Body>, BoxError>> {
    ready(Ok(Response::new(black_box(request).into_body())))
}

/// A header value, marked sensitive as the layers do.
pub fn sensitive(value: &str) -> HeaderValue {
    let mut value = HeaderValue::from_str(value).expect("the header value is valid");
    value.set_sensitive(true);
    value
}
