//! The faults that can be injected into the API and the token endpoint.

use std::{fmt, time::Duration};

use bytes::Bytes;
use http::{Response, StatusCode};

/// A fault for a single API request: see [`inject`](super::Simulator::inject). `Debug` shows no body.
#[derive(Clone)]
#[non_exhaustive]
pub enum Fault {
    /// Never responds.
    Stall,
    /// Sends the normal response, but its body stalls and never ends.
    StallBody {
        /// The number of bytes sent before the stall.
        after: usize,
    },
    /// Sends the normal response, but its body breaks off.
    CutOff {
        /// The number of bytes sent before the error.
        after: usize,
    },
    /// Responds with this status and an HTML error page, like a gateway.
    Html(StatusCode),
    /// Responds 429 `rate_limit_exceeded`.
    RateLimited {
        /// `Retry-After`, rounded up to whole seconds.
        retry_after: Duration,
    },
    /// Responds 503.
    Unavailable,
    /// Sends this response.
    Answer(Response<Bytes>),
}

impl fmt::Debug for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stall => f.write_str("Stall"),
            Self::StallBody { after } => write!(f, "StallBody {{ after: {after} }}"),
            Self::CutOff { after } => write!(f, "CutOff {{ after: {after} }}"),
            Self::Html(status) => write!(f, "Html({status})"),
            Self::RateLimited { retry_after } => write!(f, "RateLimited {{ retry_after: {retry_after:?} }}"),
            Self::Unavailable => f.write_str("Unavailable"),
            Self::Answer(answer) => write!(f, "Answer({})", answer.status()),
        }
    }
}

/// A fault for a single token request: see
/// [`inject_token_fault`](super::Simulator::inject_token_fault).
///
/// [`Slow`](Self::Slow), [`Expired`](Self::Expired) and [`CutOff`](Self::CutOff) carry out the grant, so they spend a
/// refresh token. The others ignore the content of the request. `Debug` shows no body.
#[derive(Clone)]
#[non_exhaustive]
pub enum TokenFault {
    /// Carries out the grant at once, and sends the response after this delay.
    Slow(Duration),
    /// Never responds.
    Hang,
    /// Responds 500.
    ServerError,
    /// Responds 503.
    Unavailable,
    /// Responds 429.
    RateLimited {
        /// `Retry-After`, rounded up to whole seconds.
        retry_after: Duration,
    },
    /// Responds 400 `invalid_grant`.
    InvalidGrant,
    /// Responds with an access token that expired a minute ago and an `expires_in` of 0.
    Expired,
    /// Responds 200 with invalid JSON, labelled as JSON.
    Garbage,
    /// Responds 200 with an HTML page, like a captive portal.
    Html,
    /// Responds 307 with this location.
    Redirect(String),
    /// Sends the normal response, and breaks it off in the middle of the body.
    CutOff,
    /// Sends this response.
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
