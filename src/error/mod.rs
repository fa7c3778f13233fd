//! What can go wrong, typed: [`ConfigError`] when something is made, [`AuthError`] when a request is.

mod auth;
mod body;
mod challenge;
mod config;
mod kind;
mod rate_limit;
mod redact;
mod wrap;

use std::error::Error as StdError;

pub(crate) use self::config::{Place, Subject};
pub use self::{
    auth::AuthError,
    body::ErrorBody,
    config::{ConfigError, ConfigErrorKind},
    kind::AuthErrorKind,
    rate_limit::RateLimit,
    wrap::Error,
};

/// An error of any type, as Tower's own layers have it.
pub type BoxError = Box<dyn StdError + Send + Sync>;
