//! The names of the environment variables that this crate reads, and only when it is asked to.

use crate::error::ConfigErrorKind;

/// The API key: `sk-selam-…`.
pub const SELAM_API_KEY: &str = "SELAM_API_KEY";

/// The path of a file with the API key, read again when it is rotated; instead of [`SELAM_API_KEY`].
pub const SELAM_API_KEY_FILE: &str = "SELAM_API_KEY_FILE";

/// The JWT, for the features that need one beside the key.
pub const SELAM_JWT: &str = "SELAM_JWT";

/// The path of a file with the JWT, read again when it is renewed; instead of [`SELAM_JWT`].
pub const SELAM_JWT_FILE: &str = "SELAM_JWT_FILE";

/// The URL of a token endpoint that JWTs come from; instead of [`SELAM_JWT`].
pub const SELAM_TOKEN_URL: &str = "SELAM_TOKEN_URL";

/// With [`SELAM_CLIENT_SECRET`], as whom tokens are asked for at [`SELAM_TOKEN_URL`]; by default with the API key.
pub const SELAM_CLIENT_ID: &str = "SELAM_CLIENT_ID";

/// The secret of [`SELAM_CLIENT_ID`].
pub const SELAM_CLIENT_SECRET: &str = "SELAM_CLIENT_SECRET";

/// The base URL; [`BaseUrl::DEFAULT`](crate::BaseUrl::DEFAULT) when it is not set.
pub const SELAM_BASE_URL: &str = "SELAM_BASE_URL";

/// What the variable `name` holds. `VarError` is not passed on: its `Debug` shows the value.
pub(crate) fn var(name: &str) -> Result<String, ConfigErrorKind> {
    let value = std::env::var_os(name).ok_or(ConfigErrorKind::Missing)?;
    value.into_string().map_err(|_| ConfigErrorKind::NotUnicode)
}
