//! The faults that can be injected into the API.

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
