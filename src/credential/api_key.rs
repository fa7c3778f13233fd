use std::fmt;

use super::{KeyId, Secret};
use crate::{
    env,
    error::{ConfigError, Place, Subject},
};

/// A SelamAPI key, shaped `sk-selam-…`.
///
/// Made once, then cheap to clone. `Debug` shows its [id](KeyId) alone; there is no `Display`. The bytes
/// are wiped when the last clone, and the last header value made from it, is dropped.
///
/// ```
/// use tower_selam::{ApiKey, ConfigErrorKind};
///
/// let key = ApiKey::new("sk-selam-example\n")?;
/// assert_eq!(format!("{key:?}"), "ApiKey([redacted] id=9da0f3)");
///
/// let error = ApiKey::new("Bearer sk-selam-example").unwrap_err();
/// assert_eq!(error.kind(), ConfigErrorKind::BearerPrefix);
/// # Ok::<(), tower_selam::ConfigError>(())
/// ```
#[derive(Clone)]
pub struct ApiKey(pub(crate) Secret);

impl ApiKey {
    /// A key given by the program. Keys belong in the environment or a file, never in source code.
    ///
    /// Surrounding blanks and one line end are trimmed.
    ///
    /// # Errors
    ///
    /// When what is left is empty, has inner white space, control characters or anything but ASCII, is in
    /// quotes, or starts with `Bearer `. The error never holds the value.
    pub fn new(value: impl Into<String>) -> Result<Self, ConfigError> {
        Secret::new(value.into(), Subject::ApiKey, Place::Argument).map(Self)
    }

    /// The key in the environment variable [`SELAM_API_KEY`](env::SELAM_API_KEY).
    ///
    /// # Errors
    ///
    /// When it is not set, or as for [`new`](Self::new); the error names the variable.
    pub fn from_env() -> Result<Self, ConfigError> {
        Self::from_env_var(env::SELAM_API_KEY)
    }

    /// The key in the environment variable `name`.
    ///
    /// # Errors
    ///
    /// As [`from_env`](Self::from_env).
    pub fn from_env_var(name: &str) -> Result<Self, ConfigError> {
        Secret::from_env_var(name, Subject::ApiKey).map(Self)
    }

    /// A short, non-reversible name for logs and metrics.
    #[must_use]
    pub fn id(&self) -> KeyId {
        self.0.id()
    }

    /// The key itself, for an API that takes nothing else. Do not print it.
    #[must_use]
    pub fn expose_secret(&self) -> &str {
        self.0.expose()
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.debug("ApiKey", f)
    }
}
