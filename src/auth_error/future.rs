use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll},
};

use http::Response;
use http_body::Body;
use pin_project_lite::pin_project;

use super::inspect::{Bounds, Inspect};
use crate::{BoxError, error::FromAuthError};

pin_project! {
    /// Response future of [`MapAuthError`](super::MapAuthError). Dropping it drops the request, or the
    /// response whose body it reads.
    pub struct ResponseFuture<F, B> {
        #[pin]
        inspect: Inspect<F, B>,
    }
}

impl<F, B> ResponseFuture<F, B> {
    #[inline]
    pub(super) fn new(response: F, bounds: Bounds) -> Self {
        Self { inspect: Inspect::new(response, bounds) }
    }
}

impl<F, B, E> Future for ResponseFuture<F, B>
where
    F: Future<Output = Result<Response<B>, E>>,
    E: FromAuthError,
    B: Body,
    B::Error: Into<BoxError>,
{
    type Output = F::Output;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.project().inspect.poll_or(cx, |response| response, |read| Err(read.into_error().into()))
    }
}

impl<F, B> fmt::Debug for ResponseFuture<F, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}
