//! The service: [`Refresh`].

use std::{
    fmt,
    sync::Arc,
    task::{Context, Poll},
};

use http::{Request, Response};
use http_body::Body;
use tower::Service;

use super::{
    CloneBody, Replay, ResponseFuture,
    captured::{Captured, Spare},
    future::Attempt,
    head::Head,
};
use crate::{CloneClient, auth_error::InspectedBody, util::per_thread::PerThread};

/// Replays a request once after a 401. Made by [`RefreshLayer`](super::RefreshLayer); see the [module docs](super).
pub struct Refresh<S, R = CloneBody> {
    inner: S,
    replay: R,
    spares: Arc<PerThread<Spare<S>>>,
    /// Whether nothing can be replayed, because no credential is ever refreshed.
    is_disabled: bool,
}

impl<S, R> Refresh<S, R> {
    pub(super) fn new(inner: S, replay: R, is_disabled: bool) -> Self {
        Self { inner, replay, spares: Arc::new(PerThread::new()), is_disabled }
    }

    /// Returns a reference to the inner service.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// Returns a mutable reference to the inner service.
    pub fn get_mut(&mut self) -> &mut S {
        // Spares made so far are clones of the unchanged service.
        self.spares = Arc::new(PerThread::new());
        &mut self.inner
    }

    /// Returns the inner service without this one.
    pub fn into_inner(self) -> S {
        self.inner
    }
}

impl<S, R, ReqBody, ResBody> Service<Request<ReqBody>> for Refresh<S, R>
where
    S: Service<Request<R::Body>, Response = Response<ResBody>> + CloneClient,
    R: Replay<ReqBody> + Clone,
    ResBody: Body,
{
    type Response = Response<InspectedBody<ResBody>>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future, Attempt<S, R, ReqBody, ResBody>>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    #[inline]
    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        let replay = self.replay.clone();
        let mut captured = None;
        let request = request.map(|body| {
            if self.is_disabled {
                return replay.pass_through(body);
            }
            let (body, kept) = replay.capture(body);
            captured = kept;
            body
        });
        let captured = captured.and_then(|body| {
            let spare = self.spares.get_or_init(|| Spare::new(&self.inner))?.clone();
            Some(Captured { head: Head::copy(&request), body, spare })
        });
        let response = self.inner.call(request);
        ResponseFuture::new(response, Attempt::new(replay, captured))
    }
}

impl<S: Clone, R: Clone> Clone for Refresh<S, R> {
    fn clone(&self) -> Self {
        let Self { inner, replay, spares, is_disabled } = self;
        let (inner, replay, spares) = (inner.clone(), replay.clone(), Arc::clone(spares));
        Self { inner, replay, spares, is_disabled: *is_disabled }
    }
}

impl<S: fmt::Debug, R: fmt::Debug> fmt::Debug for Refresh<S, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Refresh").field("inner", &self.inner).field("replay", &self.replay).finish()
    }
}
