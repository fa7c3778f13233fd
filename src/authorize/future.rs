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
use crate::{
    AuthError, Credentials, authorize::provider::Waiting, error::FromAuthError, error::is_auth_status,
    telemetry::event, util::cold::Cold,
};

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
        // Anything else: one state, so that one look tells it from the usual.
        Unsent { unsent: Cold<Unsent<S, B>> },
    }
}

enum Unsent<S, B> {
    Waits(Box<Later<S, B>>),
    Refused(AuthError),
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
        Self { state: State::Unsent { unsent: Cold::new(Unsent::Waits(later)) } }
    }

    #[cold]
    pub(super) fn refused(error: AuthError) -> Self {
        event::not_sent(&error);
        Self { state: State::Unsent { unsent: Cold::new(Unsent::Refused(error)) } }
    }
}

impl<S, ReqBody, ResBody> Future for ResponseFuture<S::Future, S, ReqBody>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>>,
    S::Error: FromAuthError,
{
    type Output = Result<S::Response, S::Error>;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.as_mut().project().state;
        let StateProj::Sent { response, credentials } = state.as_mut().project() else {
            return self.poll_unsent(cx);
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
    S::Error: FromAuthError,
{
    #[cold]
    fn poll_unsent(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<<Self as Future>::Output> {
        let mut state = self.as_mut().project().state;
        if let StateProj::Unsent { unsent } = state.as_mut().project() {
            let later = match unsent.as_mut() {
                Some(Unsent::Waits(later)) => later,
                Some(Unsent::Refused(error)) => return Poll::Ready(Err(error.clone().into())),
                None => return Poll::Pending,
            };
            let credentials = ready!(later.poll(cx))?;
            let Some(Unsent::Waits(later)) = unsent.take() else { return Poll::Pending };
            let (mut service, request, credentials) = later.write(&credentials, |_| ())?;
            let response = service.call(request);
            state.set(State::Sent { response, credentials });
        }
        self.poll(cx)
    }
}

/// A service that is ready, a request with its credentials, and which these are, if any.
type ToSend<S, B> = (S, Request<B>, Option<Credentials>);

impl<S, B> Later<S, B> {
    pub(super) fn new(service: S, request: Request<B>, policy: Arc<Policy>, waiting: Waiting) -> Box<Self> {
        Box::new(Self { service, request, policy, waiting, credentials: None })
    }

    /// Waits until the request can be sent: with what there is then, unless there is something newer.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Credentials, S::Error>>
    where
        S: Service<Request<B>>,
        S::Error: FromAuthError,
    {
        let credentials = match &self.credentials {
            Some(credentials) => credentials,
            None => {
                let credentials = ready!(self.policy.poll(&mut self.waiting, cx));
                self.credentials.insert(credentials.inspect_err(event::not_sent)?)
            }
        };
        ready!(self.service.poll_ready(cx))?;
        Poll::Ready(Ok(credentials.clone()))
    }

    /// Writes the credentials. `as_it_came` sees the request before that.
    pub(crate) fn write(
        self,
        credentials: &Credentials,
        as_it_came: impl FnOnce(&Request<B>),
    ) -> Result<ToSend<S, B>, AuthError> {
        let Self { service, mut request, policy, .. } = self;
        as_it_came(&request);
        let credentials = policy.authorize_later(&mut request, credentials).inspect_err(event::not_sent)?;
        Ok((service, request, credentials))
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
