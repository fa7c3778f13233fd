use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll, ready},
};

use http::Response;
use http_body::Body;
use pin_project_lite::pin_project;

use super::collect::{Bounds, Collect, End, is_auth_error};
use crate::{AuthError, BoxError};

pin_project! {
    /// Response future of [`MapAuthError`](super::MapAuthError). Dropping it drops the request, or the
    /// response whose body it reads.
    pub struct ResponseFuture<F, B> {
        #[pin]
        state: State<F, B>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<F, B> {
        Response { #[pin] response: F, bounds: Bounds },
        Body { collect: Box<Collect<B>> },
    }
}

impl<F, B> ResponseFuture<F, B> {
    #[inline]
    pub(super) fn new(response: F, bounds: Bounds) -> Self {
        Self { state: State::Response { response, bounds } }
    }
}

impl<F, B, E> Future for ResponseFuture<F, B>
where
    F: Future<Output = Result<Response<B>, E>>,
    E: From<AuthError>,
    B: Body,
    B::Error: Into<BoxError>,
{
    type Output = F::Output;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.project().state;
        loop {
            match state.as_mut().project() {
                StateProj::Response { response, bounds } => {
                    let response = ready!(response.poll(cx))?;
                    if !is_auth_error(response.status()) {
                        return Poll::Ready(Ok(response));
                    }
                    let collect = Collect::new(response, *bounds);
                    state.set(State::Body { collect });
                }
                StateProj::Body { collect } => {
                    let source = match ready!(collect.poll(cx)) {
                        End::Failed(error) => Some(error.into()),
                        End::Complete { .. } | End::OutOfBounds => None,
                    };
                    return Poll::Ready(Err(collect.error(source).into()));
                }
            }
        }
    }
}

impl<F, B> fmt::Debug for ResponseFuture<F, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}
