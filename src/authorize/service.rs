//! The service: [`Authorize`] and its response future.

use std::{
    fmt, mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use http::{Request, Response};
use pin_project_lite::pin_project;
use tower::Service;

use super::{
    policy::{Decision, Policy},
    provider::PendingCredentials,
    sent::Sent,
};
use crate::{AuthError, CloneClient, FromAuthError, error::is_auth_status, telemetry::event};

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
}

impl<S: Clone> Authorize<S> {
    /// Replaces the ready inner service by a clone. Readiness may hold a permit, which others can use while this request
    /// waits or if it is refused.
    #[cold]
    fn release_permit(&mut self) {
        let clone = self.inner.clone();
        drop(mem::replace(&mut self.inner, clone));
    }
}

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for Authorize<S>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>> + CloneClient,
    S::Error: FromAuthError,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = ResponseFuture<S, ReqBody>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    #[inline]
    fn call(&mut self, mut request: Request<ReqBody>) -> Self::Future {
        let state = match self.policy.authorize(&mut request) {
            Ok(Decision::Send(sent)) => State::Sent { response: self.inner.call(request), sent },
            Ok(Decision::Wait(pending)) => {
                self.release_permit();
                let (service, policy) = (self.inner.clone(), Arc::clone(&self.policy));
                let waiting = Waiting { service, request, policy, pending: Some(pending) };
                State::Waiting { waiting: Some(Box::new(waiting)) }
            }
            Err(error) => {
                self.release_permit();
                State::Refused { error: Some(error) }
            }
        };
        ResponseFuture { state }
    }
}

pin_project! {
    /// Response future of [`Authorize`].
    ///
    /// # Cancel safety
    ///
    /// Dropping it drops the request. A refresh that it waits for continues.
    pub struct ResponseFuture<S, B>
    where
        S: Service<Request<B>>,
    {
        #[pin]
        state: State<S::Future, S, B>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<F, S, B> {
        // The request was sent, and its response is awaited.
        Sent { #[pin] response: F, sent: Sent },
        // The request waits for credentials, or for the service to be ready.
        Waiting { waiting: Option<Box<Waiting<S, B>>> },
        // The request is not sent.
        Refused { error: Option<AuthError> },
    }
}

/// A request that is not sent yet.
struct Waiting<S, B> {
    service: S,
    request: Request<B>,
    policy: Arc<Policy>,
    pending: Option<Box<PendingCredentials>>,
}

impl<S, ReqBody, ResBody> Future for ResponseFuture<S, ReqBody>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>> + Clone,
    S::Error: FromAuthError,
{
    type Output = Result<S::Response, S::Error>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.project().state;
        loop {
            match state.as_mut().project() {
                StateProj::Sent { response, sent } => {
                    let mut polled = response.poll(cx);
                    if let Poll::Ready(Ok(response)) = &mut polled
                        && may_be_rejected(response)
                    {
                        mem::take(sent).add_to(response);
                    }
                    return polled;
                }
                StateProj::Waiting { waiting: slot } => {
                    let Some(waiting) = slot else { return Poll::Pending };
                    let sent = ready!(waiting.poll(cx))?;
                    let Some(waiting) = slot.take() else { return Poll::Pending };
                    let Waiting { mut service, request, .. } = *waiting;
                    let response = service.call(request);
                    state.set(State::Sent { response, sent });
                }
                StateProj::Refused { error } => {
                    let Some(error) = error.take() else { return Poll::Pending };
                    event::request_not_sent(&error);
                    return Poll::Ready(Err(error.into()));
                }
            }
        }
    }
}

impl<S, ReqBody> Waiting<S, ReqBody> {
    /// Waits until the credentials are there and the service is ready, then writes the credentials that are current at
    /// that moment.
    #[cold]
    fn poll<ResBody>(&mut self, cx: &mut Context<'_>) -> Poll<Result<Sent, S::Error>>
    where
        S: Service<Request<ReqBody>, Response = Response<ResBody>> + Clone,
        S::Error: FromAuthError,
    {
        loop {
            if let Some(pending) = &mut self.pending {
                ready!(pending.poll(cx)).inspect_err(event::request_not_sent)?;
                self.pending = None;
            }
            ready!(self.service.poll_ready(cx))?;
            match self.policy.authorize(&mut self.request).inspect_err(event::request_not_sent)? {
                Decision::Send(sent) => return Poll::Ready(Ok(sent)),
                // The credential was rejected, or expired, while the service was not ready.
                Decision::Wait(pending) => {
                    self.pending = Some(pending);
                    let clone = self.service.clone();
                    drop(mem::replace(&mut self.service, clone));
                }
            }
        }
    }
}

/// Marks a response whose trailers may still report a rejection, as in gRPC.
#[derive(Clone, Copy)]
pub(crate) struct Undecided;

/// Whether outer layers need to know what was sent.
#[inline]
fn may_be_rejected<B>(response: &Response<B>) -> bool {
    is_auth_status(response.status())
        || (cfg!(feature = "tonic") && response.extensions().get::<Undecided>().is_some())
}

impl<S: Service<Request<B>>, B> fmt::Debug for ResponseFuture<S, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}
