//! What `retry` needs to know of reqwest: its errors, its requests, and how its bodies are cloned.

use ::reqwest::{Body, Request, Response};
use tower::retry::Policy;

use super::reqwest::TryCloneBody;
use crate::retry::{AsError, CloneRequestBody, RetryPolicy, Wait, impl_as_error};

impl_as_error!(::reqwest::Error);
#[cfg(feature = "reqwest-middleware")]
impl_as_error!(::reqwest_middleware::Error);

/// Copies the body's bytes. A stream cannot be cloned, so a request with one is sent once.
impl CloneRequestBody<Body> for TryCloneBody {
    fn try_clone(&self, body: &Body) -> Option<Body> {
        body.as_bytes().map(|bytes| Body::from(bytes.to_vec()))
    }
}

/// For tower's `retry` around `adapter::reqwest::Client`. Such requests have no extensions: `MayProcessTwice` is read inside
/// of the client only.
impl<E: AsError, C> Policy<Request, Response, E> for RetryPolicy<C> {
    type Future = Wait;

    fn retry(&mut self, request: &mut Request, result: &mut Result<Response, E>) -> Option<Wait> {
        let outcome = match result {
            Ok(response) => Ok((response.status(), response.headers())),
            Err(error) => Err(error.as_error()),
        };
        self.decide((request.method(), request.headers(), None), outcome)
    }

    fn clone_request(&mut self, request: &Request) -> Option<Request> {
        request.try_clone()
    }
}
