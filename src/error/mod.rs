//! Error types: [`ConfigError`] for invalid settings, [`AuthError`] for requests that were not authenticated.
//!
//! This module depends on `util` alone. Code that knows credentials passes them in as plain `&str` secrets to redact.

mod auth;
mod body;
mod challenge;
mod config;
mod encoding;
#[expect(clippy::module_inception, reason = "the file is named after the type `Error`")]
mod error;
mod kind;
#[cfg(test)]
mod proptests;
mod rate_limit;
mod redact;
mod view;

use std::{error::Error as StdError, io};

use http::StatusCode;

#[cfg(feature = "tonic")]
pub(crate) use self::auth::grpc_message;
#[cfg(feature = "metrics")]
pub(crate) use self::kind::{CODES, UNSENT};
pub use self::{
    auth::AuthError,
    body::ErrorBody,
    config::{ConfigError, ConfigErrorKind},
    error::{CloneClient, Error, FromAuthError, HttpClient},
    kind::AuthErrorKind,
    rate_limit::RateLimit,
};
pub(crate) use self::{
    auth::write_excerpt,
    body::is_code,
    config::{Place, Setting},
    encoding::decoded,
    kind::known_code,
    rate_limit::retry_after,
    redact::{MIN_SECRET, Redactor},
};

/// Whether a response with this status becomes an [`AuthError`].
#[inline]
pub(crate) fn is_auth_status(status: StatusCode) -> bool {
    matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)
}

/// Returns the error below this one. `io::Error::source` skips the error that it wraps.
pub(crate) fn cause_of<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a (dyn StdError + 'static)> {
    let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    wrapped.map(|wrapped| wrapped as _).or_else(|| error.source())
}

/// Formats `error` and all its causes, separated by colons.
pub(crate) fn with_causes(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// A boxed error of any type, as Tower's own layers use.
pub type BoxError = Box<dyn StdError + Send + Sync>;
