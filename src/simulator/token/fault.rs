use std::{fmt, time::Duration};

use bytes::Bytes;
use http::Response;

/// What goes wrong with one request to the token endpoint. `Debug` shows no body.
///
/// [`Slow`](Self::Slow), [`Expired`](Self::Expired) and [`CutOff`](Self::CutOff) carry the grant out: they
/// spend a refresh token. The others do not look at the request.
#[derive(Clone)]
#[non_exhaustive]
pub enum TokenFault {
    /// The answer comes as it should, after so long. The grant is carried out before the wait.
    Slow(Duration),
    /// No answer ever comes.
    Hang,
    /// 500.
    ServerError,
    /// 503.
    Unavailable,
    /// 429.
    RateLimited {
        /// `Retry-After`, in whole seconds.
        retry_after: Duration,
    },
    /// 400 `invalid_grant`.
    InvalidGrant,
    /// An access token that expired a minute ago, with an `expires_in` of 0.
    Expired,
    /// 200 with text that is no JSON, though it says that it is.
    Garbage,
    /// 200 with a page in HTML, as of a captive portal.
    Html,
    /// 307 to this location.
    Redirect(String),
    /// The answer comes as it should, but its body breaks off half way.
    CutOff,
    /// Any other answer.
    Answer(Response<Bytes>),
}

impl fmt::Debug for TokenFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Slow(wait) => write!(f, "Slow({wait:?})"),
            Self::Hang => f.write_str("Hang"),
            Self::ServerError => f.write_str("ServerError"),
            Self::Unavailable => f.write_str("Unavailable"),
            Self::RateLimited { retry_after } => write!(f, "RateLimited {{ retry_after: {retry_after:?} }}"),
            Self::InvalidGrant => f.write_str("InvalidGrant"),
            Self::Expired => f.write_str("Expired"),
            Self::Garbage => f.write_str("Garbage"),
            Self::Html => f.write_str("Html"),
            Self::Redirect(location) => write!(f, "Redirect({location:?})"),
            Self::CutOff => f.write_str("CutOff"),
            Self::Answer(answer) => write!(f, "Answer({})", answer.status()),
        }
    }
}
