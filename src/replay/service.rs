use std::{
    fmt,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    task::{Context, Poll},
};

use http::{Request, Response};
use http_body::Body;
use tower_service::Service;

use super::{
    CloneBody, Replay, ResponseFuture,
    future::{Again, Kept, Replaying},
    head::HeadCopy,
};
use crate::{
    auth_error::InspectedBody,
    error::CloneClient,
    util::per_thread::{Apart, Shards},
};

/// Renews what the API refused and sends the request once more. Made by
/// [`RefreshLayer`](super::RefreshLayer); see the [module docs](super).
pub struct Refresh<S, R = CloneBody> {
    inner: S,
    replay: R,
    spares: Spares<S>,
    /// Nothing within renews, so nothing is kept.
    idle: bool,
}

type Spares<S> = Arc<Shards<Spare<S>>>;

/// A clone of the service within, which refused requests clone in turn: so the others need not.
pub(super) struct Spare<S>(Arc<Apart<OnceLock<Mutex<S>>>>);

impl<S, R> Refresh<S, R> {
    pub(crate) fn new(inner: S, replay: R) -> Self {
        Self { inner, replay, spares: spares(), idle: false }
    }

    pub(crate) fn with_idle(mut self, idle: bool) -> Self {
        self.idle = idle;
        self
    }

    /// The service within.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// The service within, to be changed.
    pub fn get_mut(&mut self) -> &mut S {
        // What is changed is not what the spares are clones of.
        self.spares = spares();
        &mut self.inner
    }

    /// The service within, without this one.
    pub fn into_inner(self) -> S {
        self.inner
    }
}

impl<S: Clone, R: Clone> Refresh<S, R> {
    /// Sends a request as the service within gets it, with what it takes to send it again.
    #[inline]
    pub(crate) fn keep<ReqBody, T>(
        &mut self,
        request: Request<ReqBody>,
        send: impl FnOnce(&mut S, Request<R::Body>, Again<S, R, ReqBody>) -> T,
    ) -> T
    where
        R: Replay<ReqBody>,
    {
        let replay = self.replay.clone();
        if self.idle {
            let request = replay.once_of(request);
            return send(&mut self.inner, request, Again { kept: None, replay });
        }
        let (parts, body) = request.into_parts();
        let (body, kept) = replay.capture(body);
        let request = Request::from_parts(parts, body);
        let kept = kept.map(|body| Kept { head: HeadCopy::of(&request), body, spare: self.spare() });
        send(&mut self.inner, request, Again { kept, replay })
    }

    #[inline]
    fn spare(&self) -> Spare<S> {
        let spare = self.spares.local();
        spare.fill(&self.inner);
        spare.clone()
    }

    /// What `call` does, for a stack that makes an error of a 401 that goes up. `wrap` makes the future, where it goes.
    #[inline]
    pub(crate) fn send<ReqBody, ResBody, T>(
        &mut self,
        request: Request<ReqBody>,
        wrap: impl FnOnce(Replaying<S::Future, S, R, ReqBody, ResBody>) -> T,
    ) -> T
    where
        S: Service<Request<R::Body>, Response = Response<ResBody>>,
        R: Replay<ReqBody>,
        ResBody: Body,
    {
        self.keep(request, |inner, request, again| wrap(Replaying::new(inner.call(request), again)))
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
    type Future = ResponseFuture<S::Future, S, R, ReqBody, ResBody>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    #[inline]
    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        self.send(request, ResponseFuture::new)
    }
}

/// The spares are shared: they are templates, never called.
impl<S: Clone, R: Clone> Clone for Refresh<S, R> {
    fn clone(&self) -> Self {
        let Self { inner, replay, spares, idle } = self;
        Self { inner: inner.clone(), replay: replay.clone(), spares: Arc::clone(spares), idle: *idle }
    }
}

impl<S: fmt::Debug, R: fmt::Debug> fmt::Debug for Refresh<S, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Refresh").field("inner", &self.inner).field("replay", &self.replay).finish()
    }
}

fn spares<S>() -> Spares<S> {
    Arc::new(Shards::new(|| Spare(Arc::new(Apart(OnceLock::new())))))
}

impl<S: Clone> Spare<S> {
    #[inline]
    fn fill(&self, service: &S) {
        if self.0.0.get().is_none() {
            let _ = self.0.0.set(Mutex::new(service.clone()));
        }
    }

    /// A service to send a request again with.
    pub(super) fn service(&self) -> Option<S> {
        let spare = self.0.0.get()?;
        Some(spare.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }
}

impl<S> Clone for Spare<S> {
    #[inline]
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}
