//! A SelamAPI key.

use secrecy::{ExposeSecret, SecretString};

use super::{Secret, env};
use crate::error::{ConfigError, Place, Setting};

/// A SelamAPI key, shaped `sk-selam-…`.
///
/// Cheap to clone. `Debug` prints its [id](Self::id) only, and there is no `Display`. The bytes are wiped when the last
/// clone, and the last header value made from it, is dropped.
///
/// ```
/// use secrecy::SecretString;
/// use tower_selam::{ApiKey, ConfigErrorKind};
///
/// let key = ApiKey::new("sk-selam-example\n")?;
/// assert_eq!(format!("{key:?}"), "ApiKey([redacted] id=9da0f3)");
/// assert_eq!(ApiKey::new(SecretString::from("sk-selam-example"))?.id(), key.id());
///
/// let error = ApiKey::new("Bearer sk-selam-example").unwrap_err();
/// assert_eq!(*error.kind(), ConfigErrorKind::BearerPrefix);
/// # Ok::<(), tower_selam::ConfigError>(())
/// ```
#[derive(Clone)]
pub struct ApiKey(pub(crate) Secret);

impl ApiKey {
    /// Validates a key: a `&str`, a `String` or a [`SecretString`]. Keys belong in the environment or in a file, never in
    /// source code.
    ///
    /// Surrounding blanks and one trailing newline are trimmed. SelamAPI's keys begin with `sk-selam-`; other shapes are accepted,
    /// because gateways and tests may have other keys, and the API answers 401 to a key that it does not know.
    ///
    /// # Errors
    ///
    /// When the rest is empty, contains white space, control characters or non-ASCII characters, is quoted,
    /// starts with `Bearer `, or is a JWT, which belongs in a [`Token`](crate::Token). The error never contains the value.
    pub fn new(value: impl Into<SecretString>) -> Result<Self, ConfigError> {
        Secret::new(value.into().expose_secret(), Setting::ApiKey, Place::Argument).map(Self)
    }

    /// Reads the key from the environment variable [`SELAM_API_KEY`](env::SELAM_API_KEY).
    ///
    /// # Errors
    ///
    /// When the variable is not set, or as for [`new`](Self::new); the error names the variable.
    pub fn from_env() -> Result<Self, ConfigError> {
        Self::from_env_var(env::SELAM_API_KEY)
    }
}
