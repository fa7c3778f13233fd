//! The requests that every contender gets, and the client that answers them at once.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    hint::black_box,
    pin::pin,
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use http::{HeaderValue, Request, Response};
use http_body_util::Full;
use tower::Service;

pub const KEY: &str = "sk-selam-0123456789abcdef0123456789abcdef";
pub const JWT: &str = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJiZW5jaG1hcmsifQ.c2lnbmF0dXJlLW9mLWEtYmVuY2htYXJr";

const QUESTION: &str = r#"{"model":"selam-turbo","messages":[{"role":"user","content":"Selam!"}]}"#;

pub type Body = Full<Bytes>;

/// A chat request, as a program builds one.
pub fn request() -> Request<Body> {
    Request::post("https://api.selamgpt.com/v1/chat/completions")
        .header("content-type", "application/json")
        .header("accept", "application/json")
        .header("user-agent", "benches/1.0")
        .body(Body::from(QUESTION))
        .expect("a request")
}

/// The bare service. The compiler does not see that it looks at nothing.
pub fn client(request: Request<Body>) -> Ready<Result<Response<Body>, Infallible>> {
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
