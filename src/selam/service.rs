use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll, ready},
};

use http::{Request, Response};
use http_body::Body;
use pin_project_lite::pin_project;
use tower_service::Service;

use crate::{
    BoxError, Error,
    auth_error::{self, MapAuthError},
    authorize::{self, Authorize},
};

/// Sends authenticated requests. Made by [`SelamLayer`](super::SelamLayer); see the [module docs](super).
#[derive(Clone, Debug)]
pub struct Selam<S>(pub(super) MapAuthError<Authorize<WrapError<S>>>);

impl<S> Selam<S> {
    /// The client within.
    pub fn get_ref(&self) -> &S {
        &self.0.get_ref().get_ref().0
    }

    /// The client within.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.0.get_mut().get_mut().0
    }

    /// The client within.
    pub fn into_inner(self) -> S {
        self.0.into_inner().into_inner().0
    }
}

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for Selam<S>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>> + Clone,
    ResBody: Body,
    ResBody::Error: Into<BoxError>,
{
    type Response = S::Response;
    type Error = Error<S::Error>;
    type Future = ResponseFuture<S::Future, S, ReqBody, ResBody>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(cx)
    }

    #[inline]
    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        ResponseFuture { response: self.0.call(request) }
    }
}

pin_project! {
    /// Response future of [`Selam`]. Dropping it drops the request, or the response whose body it reads.
    pub struct ResponseFuture<F, S, ReqBody, ResBody> {
        #[pin]
        response: auth_error::ResponseFuture<Authorized<F, S, ReqBody>, ResBody>,
    }
}

type Authorized<F, S, B> = authorize::ResponseFuture<WrapErrorFuture<F>, WrapError<S>, B>;

impl<S, ReqBody, ResBody> Future for ResponseFuture<S::Future, S, ReqBody, ResBody>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>>,
    ResBody: Body,
    ResBody::Error: Into<BoxError>,
{
    type Output = Result<S::Response, Error<S::Error>>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.project().response.poll(cx)
    }
}

impl<F, S, ReqBody, ResBody> fmt::Debug for ResponseFuture<F, S, ReqBody, ResBody> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}

/// Makes the client's error `Error::Inner`, next to which an `AuthError` has room.
#[derive(Clone, Debug)]
pub(super) struct WrapError<S>(pub(super) S);

impl<S, R> Service<R> for WrapError<S>
where
    S: Service<R>,
{
    type Response = S::Response;
    type Error = Error<S::Error>;
    type Future = WrapErrorFuture<S::Future>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(cx).map_err(Error::Inner)
    }

    #[inline]
    fn call(&mut self, request: R) -> Self::Future {
        WrapErrorFuture { future: self.0.call(request) }
    }
}

pin_project! {
    pub(super) struct WrapErrorFuture<F> {
        #[pin]
        future: F,
    }
}

impl<F, T, E> Future for WrapErrorFuture<F>
where
    F: Future<Output = Result<T, E>>,
{
    type Output = Result<T, Error<E>>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Poll::Ready(ready!(self.project().future.poll(cx)).map_err(Error::Inner))
    }
}
