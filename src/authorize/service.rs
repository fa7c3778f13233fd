use std::{
    mem,
    sync::Arc,
    task::{Context, Poll},
};

use http::{Request, Response};
use tower_service::Service;

use super::{
    ResponseFuture,
    future::Later,
    policy::{Policy, Unsent},
};
use crate::{
    AuthError,
    authorize::provider::Waiting,
    error::{CloneClient, FromAuthError},
};

/// Writes credentials into each request. Made by [`ApiKeyLayer`](super::ApiKeyLayer) and
/// [`JwtLayer`](super::JwtLayer); see the [module docs](super).
#[derive(Clone, Debug)]
pub struct Authorize<S> {
    inner: S,
    policy: Arc<Policy>,
}

impl<S> Authorize<S> {
    pub(crate) fn new(inner: S, policy: Arc<Policy>) -> Self {
        Self { inner, policy }
    }

    inner_accessors!();

    #[inline]
    pub(crate) fn policy(&self) -> &Policy {
        &self.policy
    }
}

impl<S: Clone> Authorize<S> {
    /// The instance that is ready may hold a permit, which others can use while this request waits, or is not sent.
    #[cold]
    fn give_back(&mut self) {
        let unready = self.inner.clone();
        drop(mem::replace(&mut self.inner, unready));
    }

    /// A request that is not sent yet.
    #[cold]
    pub(crate) fn later<B>(&mut self, request: Request<B>, waiting: Waiting) -> Box<Later<S, B>> {
        self.give_back();
        Later::new(self.inner.clone(), request, Arc::clone(&self.policy), waiting)
    }

    /// What [`call`](Service::call) does with a request that is not usual, out of line: that one stays so small.
    #[inline(never)]
    fn call_any<B>(&mut self, mut request: Request<B>) -> ResponseFuture<S::Future, S, B>
    where
        S: Service<Request<B>>,
    {
        match self.policy.authorize_any(&mut request) {
            Ok(credentials) => ResponseFuture::sent(self.inner.call(request), credentials),
            Err(Unsent::Waits(waiting)) => ResponseFuture::later(self.later(request, waiting)),
            Err(Unsent::Refused(error)) => self.refused(error),
        }
    }

    /// One that is not sent at all.
    #[cold]
    pub(crate) fn refused<B>(&mut self, error: AuthError) -> ResponseFuture<S::Future, S, B>
    where
        S: Service<Request<B>>,
    {
        self.give_back();
        ResponseFuture::refused(error)
    }
}

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for Authorize<S>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>> + CloneClient,
    S::Error: FromAuthError,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future, S, ReqBody>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    // So little that a call of its own would be a tenth of it.
    #[inline(always)]
    fn call(&mut self, mut request: Request<ReqBody>) -> Self::Future {
        match self.policy.authorize_usual(&mut request) {
            Some(credentials) => ResponseFuture::sent(self.inner.call(request), Some(credentials)),
            None => self.call_any(request),
        }
    }
}
