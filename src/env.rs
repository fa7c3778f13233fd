//! The names of the environment variables that this crate reads, and only when it is asked to.

use crate::error::ConfigErrorKind;

/// The API key: `sk-selam-…`.
pub const SELAM_API_KEY: &str = "SELAM_API_KEY";

/// The JWT, for the features that need one beside the key.
pub const SELAM_JWT: &str = "SELAM_JWT";

/// The base URL; [`BaseUrl::DEFAULT`](crate::BaseUrl::DEFAULT) when it is not set.
pub const SELAM_BASE_URL: &str = "SELAM_BASE_URL";

/// What the variable `name` holds. `VarError` is not passed on: its `Debug` shows the value.
pub(crate) fn var(name: &str) -> Result<String, ConfigErrorKind> {
    let value = std::env::var_os(name).ok_or(ConfigErrorKind::Missing)?;
    value.into_string().map_err(|_| ConfigErrorKind::NotUnicode)
}
