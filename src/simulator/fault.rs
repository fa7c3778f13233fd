use std::{fmt, time::Duration};

use bytes::Bytes;
use http::{Response, StatusCode};

/// What goes wrong with one request. `Debug` shows no body.
#[derive(Clone)]
#[non_exhaustive]
pub enum Fault {
    /// No answer ever comes.
    Stall,
    /// The answer comes as it should, but its body stops after so many bytes without ending.
    StallBody {
        /// The bytes that still come.
        after: usize,
    },
    /// The answer comes as it should, but its body breaks off after so many bytes.
    CutOff {
        /// The bytes that still come.
        after: usize,
    },
    /// An error page of some gateway, in HTML.
    Html(StatusCode),
    /// 429 `rate_limit_exceeded`.
    RateLimited {
        /// `Retry-After`, in whole seconds.
        retry_after: Duration,
    },
    /// 503.
    Unavailable,
    /// Any other answer.
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
