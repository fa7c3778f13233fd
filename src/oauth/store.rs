//! [`RefreshToken`] and the [`RefreshTokenStore`] that keeps it.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

use crate::{
    credential::{Fingerprint, KeyId, text},
    error::{BoxError, ConfigError, Place, Setting},
};

/// A refresh token ([RFC 6749 section 1.5](https://www.rfc-editor.org/rfc/rfc6749#section-1.5)). Redacted in `Debug` and
/// wiped on drop.
#[derive(Clone)]
pub struct RefreshToken(SecretString);

impl RefreshToken {
    /// Makes a refresh token from text or a `SecretString`. Trims surrounding blanks and one trailing newline.
    ///
    /// # Errors
    ///
    /// Fails if the token is empty, or contains a control or non-ASCII character. The error never contains the
    /// token.
    pub fn new(token: impl Into<SecretString>) -> Result<Self, ConfigError> {
        let token = token.into();
        let refuse = |kind| ConfigError::new(Setting::RefreshToken, Place::Argument, kind);
        text(token.expose_secret()).map(|token| Self(token.into())).map_err(refuse)
    }

    /// Makes a refresh token that the endpoint issued. Accepts any text, because rejecting it would lose the login.
    pub(super) fn received(token: Zeroizing<String>) -> Option<Self> {
        (!token.is_empty()).then(|| Self(token.as_str().into()))
    }

    /// Returns the token itself, for storage. Do not print it.
    #[must_use]
    pub fn expose_secret(&self) -> &str {
        self.0.expose_secret()
    }

    /// Returns a short, non-reversible name for logs.
    #[must_use]
    pub fn id(&self) -> KeyId {
        self.fingerprint().id()
    }

    pub(super) fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(self.expose_secret().as_bytes())
    }
}

impl ExposeSecret<str> for RefreshToken {
    fn expose_secret(&self) -> &str {
        self.0.expose_secret()
    }
}

impl fmt::Debug for RefreshToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RefreshToken([redacted] id={})", self.id())
    }
}

/// Keeps the refresh token of a login, so that the next run of the program starts with the newest one.
///
/// ```
/// use std::{fs, io, path::PathBuf};
/// use tower_selam::{BoxError, oauth::{RefreshToken, RefreshTokenStore}};
///
/// struct File(PathBuf);
///
/// impl RefreshTokenStore for File {
///     async fn load(&self) -> Result<Option<RefreshToken>, BoxError> {
///         match fs::read_to_string(&self.0) {
///             Ok(text) => Ok(Some(RefreshToken::new(text)?)),
///             Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
///             Err(error) => Err(error.into()),
///         }
///     }
///
///     async fn save(&self, token: &RefreshToken) -> Result<(), BoxError> {
///         // Written to another file and renamed, so that no reader sees half a token.
///         let next = self.0.with_extension("next");
///         fs::write(&next, token.expose_secret())?;
///         Ok(fs::rename(next, &self.0)?)
///     }
/// }
/// ```
pub trait RefreshTokenStore: Send + Sync + 'static {
    /// Returns the stored token, or `None` if nobody has logged in.
    ///
    /// Called for the first exchange, after the [`version`](Self::version) changes, and after the endpoint rejects the
    /// current token, because another program may have stored a newer one.
    ///
    /// # Errors
    ///
    /// Fails if the store cannot be read. The call is repeated later.
    fn load(&self) -> impl Future<Output = Result<Option<RefreshToken>, BoxError>> + Send;

    /// Replaces the stored token with `token`, which the endpoint has just issued.
    ///
    /// Requests do not wait for this call; the next exchange does, for at most two minutes. The call is not repeated,
    /// so a store that may fail temporarily should retry by itself.
    ///
    /// # Errors
    ///
    /// Fails if the token cannot be stored, which raises a `WARN` event with the feature `tracing`. The token stays in
    /// memory and is spent by the next exchange; the token that one returns is saved again.
    fn save(&self, token: &RefreshToken) -> impl Future<Output = Result<(), BoxError>> + Send;

    /// Returns a number that changes when the token must be [loaded](Self::load) again, for example after a new login.
    /// Must be cheap.
    fn version(&self) -> u64 {
        0
    }
}

/// A [`RefreshTokenStore`] in memory, which loses the login when the program ends. Clones share one store.
///
/// ```
/// use tower_selam::oauth::{MemoryStore, RefreshToken};
///
/// let store = MemoryStore::new(RefreshToken::new("from-the-login")?);
/// store.replace(RefreshToken::new("from-the-next-login")?);
/// assert_eq!(store.current().expose_secret(), "from-the-next-login");
/// # Ok::<(), tower_selam::ConfigError>(())
/// ```
#[derive(Clone, Debug)]
pub struct MemoryStore(Arc<Mutex<Stored>>);

#[derive(Debug)]
struct Stored {
    token: RefreshToken,
    version: u64,
}

impl MemoryStore {
    /// Makes a store that holds `token`.
    #[must_use]
    pub fn new(token: RefreshToken) -> Self {
        Self(Arc::new(Mutex::new(Stored { token, version: 0 })))
    }

    /// Stores the token of a new login, which the next exchange spends. Ends a permanent failure of the previous
    /// login.
    pub fn replace(&self, token: RefreshToken) {
        let mut stored = self.stored();
        stored.token = token;
        stored.version += 1;
    }

    /// Returns the newest token, stored by the program or issued by the endpoint.
    #[must_use]
    pub fn current(&self) -> RefreshToken {
        self.stored().token.clone()
    }

    fn stored(&self) -> MutexGuard<'_, Stored> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RefreshTokenStore for MemoryStore {
    async fn load(&self) -> Result<Option<RefreshToken>, BoxError> {
        Ok(Some(self.current()))
    }

    async fn save(&self, token: &RefreshToken) -> Result<(), BoxError> {
        self.stored().token = token.clone();
        Ok(())
    }

    fn version(&self) -> u64 {
        self.stored().version
    }
}
