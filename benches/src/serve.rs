//! Sends batches of requests through a service whose type is erased.

use std::{
    hint::black_box,
    pin::pin,
    task::{Context, Poll, Waker},
};

use http::Request;
use tower::Service;

use crate::requests::Body;

/// A service that answers each request at its first poll.
pub trait Serve: Send {
    fn answer_all(&mut self, requests: Vec<Request<Body>>);

    /// Answers each request with a fresh clone of the service, as most servers do.
    fn answer_all_by_clones(&mut self, requests: Vec<Request<Body>>);

    fn boxed_clone(&self) -> Box<dyn Serve>;

    fn service_bytes(&self) -> usize;

    fn future_bytes(&self) -> usize;
}

#[derive(Clone)]
struct Erased<S> {
    service: S,
    succeeds: bool,
}

/// Erases the type of a service that answers with a response.
pub fn serve<S>(service: S) -> Box<dyn Serve>
where
    S: Service<Request<Body>> + Clone + Send + 'static,
{
    Box::new(Erased { service, succeeds: true })
}

/// Erases the type of a service that answers with an error.
pub fn serve_errors<S>(service: S) -> Box<dyn Serve>
where
    S: Service<Request<Body>> + Clone + Send + 'static,
{
    Box::new(Erased { service, succeeds: false })
}

impl<S> Serve for Erased<S>
where
    S: Service<Request<Body>> + Clone + Send + 'static,
{
    fn answer_all(&mut self, requests: Vec<Request<Body>>) {
        for request in requests {
            assert_eq!(answer_once(&mut self.service, request), self.succeeds);
        }
    }

    fn answer_all_by_clones(&mut self, requests: Vec<Request<Body>>) {
        for request in requests {
            assert_eq!(answer_once(&mut self.service.clone(), request), self.succeeds);
        }
    }

    fn boxed_clone(&self) -> Box<dyn Serve> {
        Box::new(self.clone())
    }

    fn service_bytes(&self) -> usize {
        size_of::<S>()
    }

    fn future_bytes(&self) -> usize {
        size_of::<S::Future>()
    }
}

/// Drives one request as a runtime does (readiness, call, poll, drop of the response) and returns whether it succeeded.
///
/// The bench `instructions` finds this function by its name, so it must not be inlined.
#[inline(never)]
fn answer_once<S: Service<Request<Body>>>(service: &mut S, request: Request<Body>) -> bool {
    let mut context = Context::from_waker(Waker::noop());
    assert!(matches!(black_box(service.poll_ready(&mut context)), Poll::Ready(Ok(()))));
    match pin!(service.call(request)).poll(&mut context) {
        Poll::Ready(result) => black_box(result).is_ok(),
        Poll::Pending => panic!("the service did not answer at once"),
    }
}
