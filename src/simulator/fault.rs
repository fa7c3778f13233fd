use std::time::Duration;

use bytes::Bytes;
use http::{Response, StatusCode};

/// What goes wrong with one request.
#[derive(Clone, Debug)]
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
