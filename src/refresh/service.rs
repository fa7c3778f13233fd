use std::{
    fmt,
    sync::{Arc, Mutex, OnceLock},
    task::{Context, Poll},
};

use http::{Request, Response};
use http_body::Body;
use tower_service::Service;

use super::{CloneBody, Replay, ResponseFuture, copy::HeadCopy};
use crate::{auth_error::InspectedBody, bounds::CloneClient};

/// Renews what the API refused and sends the request once more. Made by
/// [`RefreshLayer`](super::RefreshLayer); see the [module docs](super).
pub struct Refresh<S, R = CloneBody> {
    inner: S,
    replay: R,
    spare: Spare<S>,
    /// Nothing within renews, so nothing is kept.
    idle: bool,
}

/// A clone of the service within, which refused requests clone in turn: so the others need not.
pub(super) type Spare<S> = Arc<OnceLock<Mutex<S>>>;

impl<S, R> Refresh<S, R> {
    pub(crate) fn new(inner: S, replay: R) -> Self {
        Self { inner, replay, spare: Spare::default(), idle: false }
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
        // What is changed is not what the spare is a clone of.
        self.spare = Spare::default();
        &mut self.inner
    }

    /// The service within, without this one.
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
    type Future = ResponseFuture<S::Future, S, R, ReqBody, ResBody>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    #[inline]
    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        let (parts, body) = request.into_parts();
        if self.idle {
            let request = Request::from_parts(parts, self.replay.once(body));
            return ResponseFuture::new(self.inner.call(request), None, self.replay.clone(), None);
        }
        let (body, kept) = self.replay.keep(body);
        let request = Request::from_parts(parts, body);
        let kept = kept.map(|body| (HeadCopy::of(&request), body));
        let _ = self.spare.get_or_init(|| Mutex::new(self.inner.clone()));
        let spare = Arc::clone(&self.spare);
        ResponseFuture::new(self.inner.call(request), kept, self.replay.clone(), Some(spare))
    }
}

/// The spare is shared: it is a template, never called.
impl<S: Clone, R: Clone> Clone for Refresh<S, R> {
    fn clone(&self) -> Self {
        let Self { inner, replay, spare, idle } = self;
        Self { inner: inner.clone(), replay: replay.clone(), spare: Arc::clone(spare), idle: *idle }
    }
}

impl<S: fmt::Debug, R: fmt::Debug> fmt::Debug for Refresh<S, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Refresh").field("inner", &self.inner).field("replay", &self.replay).finish()
    }
}
