//! The requests that every contender gets, and the client that answers them at once.

use std::{
    future::{Ready, ready},
    hint::black_box,
    pin::pin,
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use http::{HeaderValue, Request, Response};
use http_body_util::Full;
use tower::Service;
use tower_selam::BoxError;

pub const KEY: &str = "sk-selam-0123456789abcdef0123456789abcdef";
/// `{"alg":"ES256","typ":"JWT"}`, claims of an issuer, a user and an id, and what stands for a signature. When it expires is
/// said by whoever issues it.
pub const JWT: &str = "eyJhbGciOiJFUzI1NiIsInR5cCI6IkpXVCJ9.\
    eyJpc3MiOiJodHRwczovL2xvZ2luLmV4YW1wbGUiLCJzdWIiOiJ1c2VyLTAwMDAwMCIsImF1ZCI6Imh0dHBzOi8vYXBpLnNlbGFt\
    Z3B0LmNvbSIsImp0aSI6IjAxMjM0NTY3ODlhYmNkZWYwMTIzNDU2Nzg5YWJjZGVmIn0.\
    kIjo2qTEwIV7BEC_jE8Y7s-xhiJAkuqdM5ReGbCKc_I1laxrlV3CCfebzHiXBmBderuI5jVewzZ6Wc2tl21cxw";

const QUESTION: &str = r#"{"model":"selam-turbo","messages":[{"role":"user","content":"Selam!"}]}"#;

pub type Body = Full<Bytes>;

const URL: &str = "https://api.selamgpt.com/v1/chat/completions";
const HEADERS: [(&str, &str); 3] =
    [("content-type", "application/json"), ("accept", "application/json"), ("user-agent", "benches/1.0")];

/// A chat request, as a program builds one: header values from text, a body that is a constant.
pub fn request() -> Request<Body> {
    let [content_type, accept, agent] = HEADERS;
    Request::post(URL)
        .header(content_type.0, content_type.1)
        .header(accept.0, accept.1)
        .header(agent.0, agent.1)
        .body(Body::from(QUESTION))
        .expect("a request")
}

/// The same of constants: nothing in it allocates when it is cloned.
pub fn request_of_constants() -> Request<Body> {
    let mut request = Request::post(URL);
    for (name, value) in HEADERS {
        request = request.header(name, HeaderValue::from_static(value));
    }
    request.body(Body::from(QUESTION)).expect("a request")
}

/// The same with a body that was made for it.
pub fn request_of_owned() -> Request<Body> {
    let (head, _) = request().into_parts();
    Request::from_parts(head, Body::from(QUESTION.as_bytes().to_vec()))
}

/// The bare service, whose error is Tower's. The compiler does not see that it looks at nothing.
pub fn client(request: Request<Body>) -> Ready<Result<Response<Body>, BoxError>> {
    ready(Ok(Response::new(black_box(request).into_body())))
}

/// One request through the service, as a runtime drives it: readiness, call, poll, the response dropped.
pub fn answer<S, R>(service: &mut S, request: Request<Body>)
where
    S: Service<Request<Body>, Response = Response<R>>,
{
    let mut context = Context::from_waker(Waker::noop());
    assert!(matches!(black_box(service.poll_ready(&mut context)), Poll::Ready(Ok(()))));
    let future = pin!(service.call(request));
    match future.poll(&mut context) {
        Poll::Ready(Ok(response)) => drop(black_box(response)),
        _ => panic!("the service answers at once"),
    }
}

/// A header's value, marked sensitive as the layers do.
pub fn sensitive(value: &str) -> HeaderValue {
    let mut value = HeaderValue::from_str(value).expect("a header's value");
    value.set_sensitive(true);
    value
}
