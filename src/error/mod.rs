//! What can go wrong, typed: [`ConfigError`] when something is made, [`AuthError`] when a request is.

mod auth;
mod body;
mod bounds;
mod challenge;
mod config;
#[expect(clippy::module_inception, reason = "the type of that name")]
mod error;
mod kind;
mod rate_limit;
mod redact;

use std::error::Error as StdError;

use http::StatusCode;

#[cfg(feature = "tonic")]
pub(crate) use self::auth::grpc_message;
pub use self::{
    auth::AuthError,
    body::ErrorBody,
    bounds::{CloneClient, FromAuthError},
    config::{ConfigError, ConfigErrorKind},
    error::Error,
    kind::AuthErrorKind,
    rate_limit::RateLimit,
};
pub(crate) use self::{
    auth::shown,
    config::{Place, Subject},
    kind::CODES,
    rate_limit::retry_after,
    redact::Redactor,
};

/// Whether a response with this status becomes an [`AuthError`].
#[inline]
pub(crate) fn is_auth_status(status: StatusCode) -> bool {
    matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)
}

/// What `error` and its causes say, as one text.
pub(crate) fn with_causes(error: &dyn StdError) -> String {
    let mut said = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        said = format!("{said}: {error}");
        cause = error.source();
    }
    said
}

/// An error of any type, as Tower's own layers have it.
pub type BoxError = Box<dyn StdError + Send + Sync>;
