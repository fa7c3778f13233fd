use std::task::{Context, Poll};

use http::{Request, Response};
use http_body::Body;
use tower_service::Service;

use super::{ResponseFuture, inspect::Bounds};
use crate::{BoxError, error::FromAuthError};

/// Makes a 401 or 403 an [`AuthError`](crate::AuthError). Made by [`AuthErrorLayer`](super::AuthErrorLayer); see the
/// [module docs](super).
#[derive(Clone, Copy, Debug)]
pub struct MapAuthError<S> {
    inner: S,
    bounds: Bounds,
}

impl<S> MapAuthError<S> {
    pub(super) fn new(inner: S, bounds: Bounds) -> Self {
        Self { inner, bounds }
    }

    inner_accessors!();
}

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for MapAuthError<S>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>>,
    S::Error: FromAuthError,
    ResBody: Body,
    ResBody::Error: Into<BoxError>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future, ResBody>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    #[inline]
    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        ResponseFuture::new(self.inner.call(request), self.bounds)
    }
}
