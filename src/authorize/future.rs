use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll, ready},
};

use http::Response;
use pin_project_lite::pin_project;

use crate::{AuthError, Credentials, error::is_auth_status};

/// On a 401 or 403: the credentials that were refused, for the layers outside.
#[derive(Clone)]
pub(crate) struct Sent(pub(crate) Credentials);

pin_project! {
    /// Response future of [`Authorize`](super::Authorize). Dropping it drops the request.
    pub struct ResponseFuture<F> {
        #[pin]
        state: State<F>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<F> {
        Sent { #[pin] response: F, credentials: Option<Credentials> },
        Refused { error: AuthError },
    }
}

impl<F> ResponseFuture<F> {
    #[inline]
    pub(super) fn sent(response: F, credentials: Option<Credentials>) -> Self {
        Self { state: State::Sent { response, credentials } }
    }

    #[cold]
    pub(super) fn refused(error: AuthError) -> Self {
        Self { state: State::Refused { error } }
    }
}

impl<F, ResBody, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<ResBody>, E>>,
    E: From<AuthError>,
{
    type Output = F::Output;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().state.project() {
            StateProj::Sent { response, credentials } => {
                let mut response = ready!(response.poll(cx))?;
                if is_auth_status(response.status())
                    && let Some(credentials) = credentials.take()
                {
                    remember(&mut response, credentials);
                }
                Poll::Ready(Ok(response))
            }
            StateProj::Refused { error } => Poll::Ready(Err(error.clone().into())),
        }
    }
}

/// Two layers beside each other each sent their half: the outer one adds its own to the inner one's.
#[cold]
fn remember<B>(response: &mut Response<B>, credentials: Credentials) {
    let credentials = match response.extensions_mut().remove::<Sent>() {
        Some(Sent(inner)) => inner.joined(&credentials),
        None => credentials,
    };
    response.extensions_mut().insert(Sent(credentials));
}

impl<F> fmt::Debug for ResponseFuture<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}
