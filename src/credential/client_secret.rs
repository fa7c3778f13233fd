//! The secret of an OAuth client.

use secrecy::{ExposeSecret, SecretString};

use super::Secret;
use crate::error::{ConfigError, Place, Setting};

/// The secret of an OAuth client, for [`ClientAuth`](crate::oauth::ClientAuth).
///
/// Cheap to clone, redacted and wiped like [`ApiKey`](crate::ApiKey). A [`Refreshing`](crate::Refreshing) over a
/// [`FileSource`](crate::source::FileSource) follows a secret that is rotated.
///
/// ```
/// use tower_selam::oauth::ClientSecret;
///
/// let secret = ClientSecret::new("s3cr3t with blanks\n")?;
/// assert_eq!(secret.expose_secret(), "s3cr3t with blanks");
/// assert!(format!("{secret:?}").starts_with("ClientSecret([redacted] id="));
/// # Ok::<(), tower_selam::ConfigError>(())
/// ```
#[derive(Clone)]
pub struct ClientSecret(pub(crate) Secret);

impl ClientSecret {
    /// Validates a secret: a `&str`, a `String` or a [`SecretString`]. Surrounding blanks and one trailing newline are
    /// trimmed.
    ///
    /// # Errors
    ///
    /// Fails if the rest is empty, or contains a control or non-ASCII character
    /// ([RFC 6749 appendix A.2](https://www.rfc-editor.org/rfc/rfc6749#appendix-A.2)). The error never contains the value.
    pub fn new(value: impl Into<SecretString>) -> Result<Self, ConfigError> {
        Secret::new(value.into().expose_secret(), Setting::ClientSecret, Place::Argument).map(Self)
    }
}
