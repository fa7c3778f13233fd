use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use http::{Request, Response};
use pin_project_lite::pin_project;
use tower_service::Service;

use super::policy::Policy;
use crate::{AuthError, Credentials, bounds::AuthErrorRoom, error::is_auth_status, event, supply::Waiting};

/// On a 401 or 403: the credentials that were sent, for the layers outside.
#[derive(Clone)]
pub(crate) struct Sent {
    pub(crate) credentials: Credentials,
    /// What the layer beside sent.
    pub(crate) beside: Option<Credentials>,
}

impl Sent {
    /// What each layer sent.
    pub(crate) fn parts(&self) -> impl Iterator<Item = &Credentials> {
        [Some(&self.credentials), self.beside.as_ref()].into_iter().flatten()
    }

    /// All of it as one set.
    pub(crate) fn joined(self) -> Credentials {
        match &self.beside {
            Some(beside) => self.credentials.joined(beside),
            None => self.credentials,
        }
    }
}

pin_project! {
    /// Response future of [`Authorize`](super::Authorize). Dropping it drops the request, and leaves a renewal
    /// that it waits for running.
    pub struct ResponseFuture<F, S, B> {
        #[pin]
        state: State<F, S, B>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<F, S, B> {
        Sent { #[pin] response: F, credentials: Option<Credentials> },
        Later { later: Option<Box<Later<S, B>>> },
        Refused { error: AuthError },
    }
}

/// A request that waits, with all that it takes to send it.
pub(crate) struct Later<S, B> {
    service: S,
    request: Request<B>,
    policy: Arc<Policy>,
    waiting: Waiting,
    /// What came of that, for when there is nothing newer once the service is ready.
    credentials: Option<Credentials>,
}

impl<F, S, B> ResponseFuture<F, S, B> {
    #[inline]
    pub(crate) fn sent(response: F, credentials: Option<Credentials>) -> Self {
        Self { state: State::Sent { response, credentials } }
    }

    /// What was sent, for who learns of a refusal after the response has begun.
    #[cfg(feature = "tonic")]
    pub(crate) fn take_sent(self: Pin<&mut Self>) -> Option<Sent> {
        let StateProj::Sent { credentials, .. } = self.project().state.project() else { return None };
        credentials.take().map(|credentials| Sent { credentials, beside: None })
    }

    #[cold]
    pub(super) fn later(later: Box<Later<S, B>>) -> Self {
        Self { state: State::Later { later: Some(later) } }
    }

    #[cold]
    pub(super) fn refused(error: AuthError) -> Self {
        event::not_sent(&error);
        Self { state: State::Refused { error } }
    }
}

impl<S, ReqBody, ResBody> Future for ResponseFuture<S::Future, S, ReqBody>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>>,
    S::Error: AuthErrorRoom,
{
    type Output = Result<S::Response, S::Error>;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.as_mut().project().state;
        let StateProj::Sent { response, credentials } = state.as_mut().project() else {
            return self.poll_later(cx);
        };
        // The status alone, which is looked at where the response goes: what is more would have it go there by a detour.
        match response.poll(cx) {
            Poll::Ready(Ok(response)) if is_auth_status(response.status()) => {
                Poll::Ready(Ok(remember(response, credentials.take())))
            }
            polled => polled,
        }
    }
}

impl<S, ReqBody, ResBody> ResponseFuture<S::Future, S, ReqBody>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>>,
    S::Error: AuthErrorRoom,
{
    #[cold]
    fn poll_later(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<<Self as Future>::Output> {
        loop {
            let mut state = self.as_mut().project().state;
            match state.as_mut().project() {
                StateProj::Sent { .. } => return self.poll(cx),
                StateProj::Later { later } => {
                    let (mut service, request, credentials) = ready!(Later::poll(later, cx, |_| ()))?;
                    let response = service.call(request);
                    state.set(State::Sent { response, credentials });
                }
                StateProj::Refused { error } => return Poll::Ready(Err(error.clone().into())),
            }
        }
    }
}

/// A service that is ready, a request with its credentials, and which these are, if any.
type ToSend<S, B> = (S, Request<B>, Option<Credentials>);

impl<S, B> Later<S, B> {
    pub(super) fn new(service: S, request: Request<B>, policy: Arc<Policy>, waiting: Waiting) -> Box<Self> {
        Box::new(Self { service, request, policy, waiting, credentials: None })
    }

    /// Waits until the request can be sent, and writes the credentials. `as_it_came` sees the request before that.
    pub(crate) fn poll(
        waiting: &mut Option<Box<Self>>,
        cx: &mut Context<'_>,
        as_it_came: impl FnOnce(&Request<B>),
    ) -> Poll<Result<ToSend<S, B>, S::Error>>
    where
        S: Service<Request<B>>,
        S::Error: AuthErrorRoom,
    {
        let Some(later) = waiting else { return Poll::Pending };
        if later.credentials.is_none() {
            let credentials =
                ready!(later.policy.poll(&mut later.waiting, cx)).inspect_err(event::not_sent)?;
            later.credentials = Some(credentials);
        }
        ready!(later.service.poll_ready(cx))?;
        let Some(Self { service, mut request, policy, credentials: Some(credentials), .. }) =
            waiting.take().map(|later| *later)
        else {
            return Poll::Pending;
        };
        as_it_came(&request);
        let credentials = policy.authorize_later(&mut request, &credentials).inspect_err(event::not_sent)?;
        Poll::Ready(Ok((service, request, credentials)))
    }
}

/// Two layers beside each other each sent their half: the outer one adds its own to the inner one's.
#[cold]
fn remember<B>(mut response: Response<B>, credentials: Option<Credentials>) -> Response<B> {
    let Some(credentials) = credentials else { return response };
    let sent = match response.extensions_mut().remove::<Sent>() {
        Some(inner) => Sent { beside: Some(credentials), ..inner },
        None => Sent { credentials, beside: None },
    };
    response.extensions_mut().insert(sent);
    response
}

impl<F, S, B> fmt::Debug for ResponseFuture<F, S, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}
