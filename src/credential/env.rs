//! Names of the environment variables that this crate reads. It reads them only when asked to.
//!
//! A variable that is set to nothing counts as not set: a shell's or Compose's `${VAR:-}` produces it.

use std::ffi::OsString;

use crate::error::ConfigErrorKind;

/// The API key: `sk-selam-…`.
pub const SELAM_API_KEY: &str = "SELAM_API_KEY";

/// The path of a file with the API key, re-read when the key is rotated; replaces [`SELAM_API_KEY`].
pub const SELAM_API_KEY_FILE: &str = "SELAM_API_KEY_FILE";

/// The JWT, for features that need one in addition to the key.
pub const SELAM_JWT: &str = "SELAM_JWT";

/// The path of a file with the JWT, re-read when it is replaced; replaces [`SELAM_JWT`].
pub const SELAM_JWT_FILE: &str = "SELAM_JWT_FILE";

/// The URL of an OAuth 2.0 token endpoint that issues the JWT; replaces [`SELAM_JWT`].
pub const SELAM_TOKEN_URL: &str = "SELAM_TOKEN_URL";

/// The client id to authenticate with at [`SELAM_TOKEN_URL`]; without it, the API key is used.
pub const SELAM_CLIENT_ID: &str = "SELAM_CLIENT_ID";

/// The client secret that belongs to [`SELAM_CLIENT_ID`].
pub const SELAM_CLIENT_SECRET: &str = "SELAM_CLIENT_SECRET";

/// The path of a file with the client secret, re-read when it is rotated; replaces [`SELAM_CLIENT_SECRET`].
pub const SELAM_CLIENT_SECRET_FILE: &str = "SELAM_CLIENT_SECRET_FILE";

/// How the client of [`SELAM_CLIENT_ID`] authenticates, by its registered name
/// ([RFC 7591 section 2](https://www.rfc-editor.org/rfc/rfc7591#section-2)): `client_secret_basic`, the default,
/// `client_secret_post`, or `none` for a public client.
pub const SELAM_CLIENT_AUTH: &str = "SELAM_CLIENT_AUTH";

/// The scopes to request from [`SELAM_TOKEN_URL`], separated by spaces.
pub const SELAM_TOKEN_SCOPE: &str = "SELAM_TOKEN_SCOPE";

/// The name of the service that the JWT is for, sent to [`SELAM_TOKEN_URL`] as `audience`.
pub const SELAM_TOKEN_AUDIENCE: &str = "SELAM_TOKEN_AUDIENCE";

/// The URI of the resource that the JWT is for, sent to [`SELAM_TOKEN_URL`] as `resource`
/// ([RFC 8707 section 2](https://www.rfc-editor.org/rfc/rfc8707#section-2)).
pub const SELAM_TOKEN_RESOURCE: &str = "SELAM_TOKEN_RESOURCE";

/// The base URL; [`BaseUrl::DEFAULT`](crate::BaseUrl::DEFAULT) when not set.
pub const SELAM_BASE_URL: &str = "SELAM_BASE_URL";

/// Reads the variable `name`; `None` also if it is empty.
pub(crate) fn var_os(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

/// Reads the variable `name`. `VarError` is not passed on because its `Debug` prints the value.
pub(crate) fn var(name: &str) -> Result<String, ConfigErrorKind> {
    let value = var_os(name).ok_or(ConfigErrorKind::Missing)?;
    value.into_string().map_err(|_| ConfigErrorKind::NotUnicode)
}
