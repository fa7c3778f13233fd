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
    /// `None` if nothing is replayed, because no credential is ever refreshed.
    spares: Option<Arc<PerThread<Spare<S>>>>,
}

impl<S, R> Refresh<S, R> {
    pub(super) fn new(inner: S, replay: R, is_disabled: bool) -> Self {
        let spares = (!is_disabled).then(|| Arc::new(PerThread::new()));
        Self { inner, replay, spares }
    }

    /// Returns a reference to the inner service.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// Returns a mutable reference to the inner service.
    pub fn get_mut(&mut self) -> &mut S {
        // Spares made so far are clones of the unchanged service.
        self.spares = self.spares.as_ref().map(|_| Arc::new(PerThread::new()));
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
            let Some(spares) = &self.spares else { return replay.pass_through(body) };
            let (body, kept) = replay.capture(body);
            captured = kept.map(|kept| (kept, spares));
            body
        });
        let captured = captured.and_then(|(body, spares)| {
            let spare = spares.get_or_init(|| Spare::new(&self.inner))?.clone();
            Some(Captured { head: Head::copy(&request), body, spare })
        });
        let response = self.inner.call(request);
        ResponseFuture::new(response, Attempt::new(replay, captured))
    }
}

impl<S: Clone, R: Clone> Clone for Refresh<S, R> {
    fn clone(&self) -> Self {
        let Self { inner, replay, spares } = self;
        Self { inner: inner.clone(), replay: replay.clone(), spares: spares.clone() }
    }
}

impl<S: fmt::Debug, R: fmt::Debug> fmt::Debug for Refresh<S, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Refresh").field("inner", &self.inner).field("replay", &self.replay).finish()
    }
}
