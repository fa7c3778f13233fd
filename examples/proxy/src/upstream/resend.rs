//! Whether a request that failed may be sent once more: [`may_resend`].
//!
//! A request is sent again, once and on another connection, if the API cannot have processed it, or if it is idempotent and its
//! connection broke off before the answer.

use std::{error::Error, io};

use axum::http::Method;

/// What the failure of a request says about the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// The API has not processed the request, so any request may be sent again.
    Unprocessed,
    /// The connection broke off, and the API may have processed the request.
    ConnectionLost,
    /// Anything else, such as a reset of this request by the API or an invalid response.
    Other,
}

impl Failure {
    /// Classifies the error of an HTTP client over hyper.
    ///
    /// A request is unprocessed if the API says so, with `REFUSED_STREAM` or with a `GOAWAY` whose last stream is an earlier
    /// one ([RFC 9113 section 8.7](https://www.rfc-editor.org/rfc/rfc9113#section-8.7)), and if hyper has not begun to write
    /// it.
    pub(super) fn of(error: &(dyn Error + 'static)) -> Self {
        let mut cause = Some(error);
        while let Some(error) = cause {
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
            if let Some(error) = error.downcast_ref::<io::Error>()
                && is_connection_lost(error)
            {
                return Self::ConnectionLost;
            }
            cause = error.source();
        }
        Self::Other
    }

    /// Whether a request with this method may be sent again. Idempotent methods are those of
    /// [RFC 9110 section 9.2.2](https://www.rfc-editor.org/rfc/rfc9110#section-9.2.2).
    pub(super) fn may_resend(self, method: &Method) -> bool {
        match self {
            Self::Unprocessed => true,
            Self::ConnectionLost => method.is_idempotent(),
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
