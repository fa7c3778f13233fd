//! What the error of a client says about its request: [`Failure`], found through [`AsError`].

use std::{convert::Infallible, error::Error as StdError, io};

use hyper_util::client::legacy;

use crate::{AuthError, BoxError, Error, error::cause_of};

/// What the failure of a request says about the server.
///
/// ```
/// use std::io;
/// use tower_selam::retry::Failure;
///
/// let broken = io::Error::from(io::ErrorKind::ConnectionReset);
/// let failure = Failure::of(&broken);
/// assert_eq!(failure, Failure::ConnectionLost);
/// assert!(failure.may_retry(http::Method::GET.is_idempotent()));
/// assert!(!failure.may_retry(http::Method::POST.is_idempotent()));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Failure {
    /// The server has not processed the request, so any request may be sent again.
    Unprocessed,
    /// The connection broke off, and the server may have processed the request.
    ConnectionLost,
    /// Anything else, such as a reset of this request by the server, an invalid response or a time limit.
    Other,
}

impl Failure {
    /// Classifies the error of an HTTP client over hyper, such as hyper-util's or reqwest.
    ///
    /// A request is unprocessed if no connection could be made, if hyper has not begun to write the request, and if the
    /// server says so: with `REFUSED_STREAM`, or with a `GOAWAY` whose last stream is an earlier one
    /// ([RFC 9113 section 8.7](https://www.rfc-editor.org/rfc/rfc9113#section-8.7)).
    #[must_use]
    pub fn of(error: &(dyn StdError + 'static)) -> Self {
        let mut cause = Some(error);
        while let Some(error) = cause {
            if error.downcast_ref().is_some_and(legacy::Error::is_connect) {
                return Self::Unprocessed;
            }
            if let Some(error) = error.downcast_ref::<hyper::Error>() {
                if error.is_canceled() {
                    return Self::Unprocessed;
                }
                // What lies below is the failure of the request's body.
                if error.is_user() {
                    return Self::Other;
                }
                if error.is_incomplete_message() || error.is_timeout() {
                    return Self::ConnectionLost;
                }
            }
            if let Some(error) = error.downcast_ref::<h2::Error>() {
                // h2 fails a stream with a `GOAWAY` only if the stream is later than the last one it names.
                let refused = error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM);
                if error.is_remote() && (refused || error.is_go_away()) {
                    return Self::Unprocessed;
                }
            }
            if error.downcast_ref().is_some_and(is_connection_lost) {
                return Self::ConnectionLost;
            }
            cause = cause_of(error);
        }
        Self::Other
    }

    /// Returns whether the request may be sent again. `is_repeatable` says whether the server may process it twice, as it may
    /// an idempotent one ([RFC 9110 section 9.2.2](https://www.rfc-editor.org/rfc/rfc9110#section-9.2.2)).
    #[must_use]
    pub fn may_retry(self, is_repeatable: bool) -> bool {
        match self {
            Self::Unprocessed => true,
            Self::ConnectionLost => is_repeatable,
            Self::Other => false,
        }
    }
}

fn is_connection_lost(error: &io::Error) -> bool {
    use io::ErrorKind::{
        BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, TimedOut, UnexpectedEof,
    };
    matches!(
        error.kind(),
        BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected | TimedOut | UnexpectedEof
    )
}

/// An error that [`RetryPolicy`](super::RetryPolicy) can look into.
///
/// Implemented for `BoxError`, [`Error`], [`AuthError`] and the errors of hyper, hyper-util, reqwest and reqwest-middleware.
/// Implement it for your own client's error; it is one line.
///
/// ```
/// use tower_selam::retry::AsError;
///
/// #[derive(Debug)]
/// struct ClientError;
/// # impl std::fmt::Display for ClientError {
/// #     fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { f.write_str("client failed") }
/// # }
/// # impl std::error::Error for ClientError {}
///
/// impl AsError for ClientError {
///     fn as_error(&self) -> &(dyn std::error::Error + 'static) { self }
/// }
/// # assert_eq!(ClientError.as_error().to_string(), "client failed");
/// ```
#[diagnostic::on_unimplemented(
    message = "`RetryPolicy` cannot look into the error `{Self}`",
    label = "this error tells the policy nothing",
    note = "implement `tower_selam::retry::AsError` for it, or box it: `.map_err(tower_selam::BoxError::from)`",
    note = "directly outside `SelamLayer`, the error is `tower_selam::Error<E>`, and `E` needs the trait"
)]
pub trait AsError {
    /// Returns the error with its chain of sources.
    fn as_error(&self) -> &(dyn StdError + 'static);
}

impl AsError for BoxError {
    fn as_error(&self) -> &(dyn StdError + 'static) {
        &**self
    }
}

impl<E: AsError> AsError for Error<E> {
    fn as_error(&self) -> &(dyn StdError + 'static) {
        match self {
            Self::Auth(error) => error,
            Self::Inner(error) => error.as_error(),
        }
    }
}

/// Implements [`AsError`] for errors that are one.
macro_rules! impl_as_error {
    ($($error:ty),+) => {$(
        impl $crate::retry::AsError for $error {
            fn as_error(&self) -> &(dyn std::error::Error + 'static) {
                self
            }
        }
    )+};
}
#[cfg(feature = "reqwest")]
pub(crate) use impl_as_error;

impl_as_error!(AuthError, Infallible, hyper::Error, io::Error, legacy::Error);

#[cfg(test)]
mod tests {
    use super::*;

    /// Wraps an error, as boxes of other layers do.
    #[derive(Debug)]
    struct Wrapped(BoxError);

    impl std::fmt::Display for Wrapped {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("wrapped")
        }
    }

    impl StdError for Wrapped {
        fn source(&self) -> Option<&(dyn StdError + 'static)> {
            Some(&*self.0)
        }
    }

    #[test]
    fn broken_connections_are_found_in_chains() {
        let of = |kind: io::ErrorKind| Failure::of(&Wrapped(Wrapped(io::Error::from(kind).into()).into()));
        for kind in [io::ErrorKind::ConnectionReset, io::ErrorKind::BrokenPipe, io::ErrorKind::UnexpectedEof]
        {
            assert_eq!(of(kind), Failure::ConnectionLost, "{kind}");
        }
        let wrapped = io::Error::other(io::Error::from(io::ErrorKind::ConnectionReset));
        assert_eq!(Failure::of(&wrapped), Failure::ConnectionLost);
        for kind in [io::ErrorKind::InvalidData, io::ErrorKind::PermissionDenied] {
            assert_eq!(of(kind), Failure::Other, "{kind}");
        }
        assert_eq!(Failure::of(&Wrapped("no connection".into())), Failure::Other);
    }
}
