//! [`UnansweredExchange`]: a refresh token that may have been spent.

use std::{error::Error, fmt, io, iter};

use http::StatusCode;

use super::OAuthError;
use crate::{
    error::{AuthError, BoxError},
    source::SourceError,
};

/// How hyper-util's client names a failed connection, also under reqwest. Its type has no such stable place.
const NOT_CONNECTED: &str = "client error (Connect)";

/// An exchange of a refresh token ended without an answer, so the endpoint may have spent the token. It is a cause of the
/// [`AuthError`] that requests fail with; its own cause is what ended the exchange.
///
/// The [module docs](super#when-a-refresh-token-is-sent-again) say when the token is sent again.
#[derive(Debug)]
pub struct UnansweredExchange {
    cause: BoxError,
    rejected: bool,
}

impl UnansweredExchange {
    /// Wraps the error of the exchange itself, or, with `rejected`, of the next one.
    pub(super) fn wrap(error: SourceError, rejected: bool) -> SourceError {
        let (permanent, retry_after) = (error.is_permanent(), error.retry_after());
        SourceError::of(permanent, retry_after, Self { cause: error.into_cause(), rejected })
    }

    /// Returns whether the endpoint has since rejected the token, so that a new login is needed.
    #[must_use]
    pub fn is_rejected(&self) -> bool {
        self.rejected
    }
}

impl fmt::Display for UnansweredExchange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.rejected {
            false => "the token endpoint confirmed nothing, and may have spent the refresh token",
            true => "an exchange that the token endpoint did not confirm has spent the refresh token: log in again",
        })
    }
}

impl Error for UnansweredExchange {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&*self.cause)
    }
}

/// Whether an exchange that ended with `error` may have spent its refresh token.
pub(super) fn may_have_spent(error: &SourceError) -> bool {
    if let Some(answer) = OAuthError::of(error) {
        return match answer.status() {
            StatusCode::SERVICE_UNAVAILABLE => false,
            // An error object can come with any status.
            status if status.is_success() => answer.code().is_none() && !answer.is_permanent(),
            status => status.is_server_error(),
        };
    }
    // An `AuthError` is a refusal to send, or a 401 or 403 of the endpoint.
    let is_unsent = |cause: &(dyn Error + 'static)| {
        cause.is::<AuthError>()
            || cause
                .downcast_ref()
                .is_some_and(|error: &io::Error| error.kind() == io::ErrorKind::ConnectionRefused)
            || cause.to_string() == NOT_CONNECTED
    };
    !causes(error).any(is_unsent)
}

/// Whether an exchange that ended with `error` may have spent the refresh token, as far as is known.
#[cfg(feature = "fleet")]
pub(crate) fn may_be_spent(error: &SourceError) -> bool {
    let is_open = |unanswered: &UnansweredExchange| !unanswered.is_rejected();
    causes(error).any(|cause| cause.downcast_ref().is_some_and(is_open))
}

/// Whether the endpoint rejected the refresh token.
pub(crate) fn is_rejected(error: &SourceError) -> bool {
    let is_rejected = |answer: &OAuthError| answer.is_permanent() && answer.blames_grant();
    causes(error).any(|cause| cause.downcast_ref().is_some_and(is_rejected))
}

fn causes(error: &SourceError) -> impl Iterator<Item = &(dyn Error + 'static)> {
    iter::successors(Some(error.cause()), |&cause| cause.source())
}
