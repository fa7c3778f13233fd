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
    pub(crate) fn received(token: Zeroizing<String>) -> Option<Self> {
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
/// [`FileStore`](super::FileStore) keeps it in a file. Any other place takes two methods, and a third if several programs
/// share the login:
///
/// | The token is in | `lock` | `save` |
/// |---|---|---|
/// | a keychain, or a file of another format | a file lock | replaces it |
/// | PostgreSQL | a column `locked_until`, set where it has passed, and extended while the guard lives; not a transaction, which would occupy a connection during an exchange | `UPDATE … SET token = $1 WHERE token = $2` |
/// | Redis | `SET key owner NX PX 30000`, extended while the guard lives; the guard deletes the key if it is still the owner's | a script that compares and sets |
///
/// ```
/// use std::sync::{Arc, Mutex};
/// use tokio::sync::Mutex as AsyncMutex;
/// use tower_selam::{BoxError, oauth::{RefreshToken, RefreshTokenStore, StoreLock}};
///
/// # #[derive(Clone, Default)]
/// # struct Keychain(Arc<Mutex<String>>);
/// # impl Keychain {
/// #     async fn read(&self) -> Result<Option<String>, BoxError> { Ok(None) }
/// #     async fn write(&self, _: &str) -> Result<(), BoxError> { Ok(()) }
/// # }
/// /// A login in a keychain that one program uses, through any number of sources.
/// #[derive(Clone)]
/// struct KeychainStore {
///     keychain: Keychain,
///     in_use: Arc<AsyncMutex<()>>,
/// }
///
/// impl RefreshTokenStore for KeychainStore {
///     async fn lock(&self) -> Result<StoreLock, BoxError> {
///         Ok(StoreLock::new(Arc::clone(&self.in_use).lock_owned().await))
///     }
///
///     async fn load(&self) -> Result<Option<RefreshToken>, BoxError> {
///         Ok(self.keychain.read().await?.map(RefreshToken::new).transpose()?)
///     }
///
///     async fn save(&self, token: &RefreshToken, _: &RefreshToken) -> Result<(), BoxError> {
///         self.keychain.write(token.expose_secret()).await
///     }
/// }
/// ```
///
/// Each call may take two minutes; a slower one is dropped and counts as failed. No call may block its thread.
pub trait RefreshTokenStore: Send + Sync + 'static {
    /// Excludes all other users of this login, in this process and in others, until the returned guard is dropped.
    ///
    /// Called before each exchange. The guard is held while the token is loaded, spent and saved, and longer if saving
    /// fails: until the token is saved, or the runtime has shut down and the last clone of the source is dropped. A guard
    /// that can expire, such as a lease, must extend itself.
    ///
    /// The default excludes nobody. Two sources may then load the same token and both spend it, for which an endpoint
    /// that detects reuse ends the login.
    ///
    /// # Errors
    ///
    /// Fails if the lock cannot be taken, preferably within 30 seconds. No token is spent, and the call is repeated
    /// later.
    fn lock(&self) -> impl Future<Output = Result<StoreLock, BoxError>> + Send {
        std::future::ready(Ok(StoreLock::none()))
    }

    /// Returns the stored token, or `None` if nobody has logged in.
    ///
    /// Called before each exchange, because another program may have stored a newer token, and before
    /// [`save`](Self::save) is repeated. A token that this source has spent is recognised and not spent again, so a store
    /// may lag behind.
    ///
    /// # Errors
    ///
    /// Fails if the store cannot be read. No token is spent then, except one that was never in the store, and the call
    /// is repeated later.
    fn load(&self) -> impl Future<Output = Result<Option<RefreshToken>, BoxError>> + Send;

    /// Replaces the stored token by `token`, which the endpoint has just issued.
    ///
    /// `replaced` is what [`load`](Self::load) returned last. A store that can compare must save `token` only if it still
    /// holds `replaced`: if it holds another token, somebody has logged in meanwhile, and it returns `Ok` without saving.
    ///
    /// The access token is not handed out before this call has succeeded, or 5 seconds have passed; a program that ends as
    /// soon as it has its access token loses nothing. A call that takes longer is not cancelled. A failed call is
    /// repeated, after at most a minute, as long as the runtime lives, even if the source is dropped.
    ///
    /// # Errors
    ///
    /// Fails if the token cannot be stored, which raises a `WARN` event with the feature `tracing`. The token stays in
    /// memory, and the next exchange spends it.
    fn save(
        &self,
        token: &RefreshToken,
        replaced: &RefreshToken,
    ) -> impl Future<Output = Result<(), BoxError>> + Send;

    /// Returns a number that changes when the token must be [loaded](Self::load) again, for example after a new login.
    /// Must be cheap.
    ///
    /// It ends a [permanent failure](crate::source::Source::version), and the result of an exchange during which it
    /// changes is discarded if the store then holds another login's token.
    fn version(&self) -> u64 {
        0
    }
}

/// What [`RefreshTokenStore::lock`] returns: excludes others from the store until it is dropped.
pub struct StoreLock {
    guard: Option<Box<dyn Send>>,
    can_lapse: bool,
}

impl StoreLock {
    /// Excludes others until `guard` is dropped.
    #[must_use]
    pub fn new(guard: impl Send + 'static) -> Self {
        Self { guard: Some(Box::new(guard)), can_lapse: false }
    }

    /// As [`new`](Self::new), but others may take over before `guard` is dropped.
    #[cfg(feature = "fleet")]
    pub(crate) fn lapsing(guard: impl Send + 'static) -> Self {
        Self { guard: Some(Box::new(guard)), can_lapse: true }
    }

    /// Excludes nobody: the default of a store that cannot.
    #[must_use]
    pub fn none() -> Self {
        Self { guard: None, can_lapse: false }
    }

    pub(super) fn excludes_others(&self) -> bool {
        self.guard.is_some() && !self.can_lapse
    }
}

impl fmt::Debug for StoreLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreLock").field("excludes_others", &self.excludes_others()).finish()
    }
}

/// A [`RefreshTokenStore`] in memory, which loses the login when the program ends. Clones share one store, and one lock.
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
pub struct MemoryStore {
    stored: Arc<Mutex<Stored>>,
    /// Held during an exchange.
    in_use: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Debug)]
struct Stored {
    token: RefreshToken,
    version: u64,
}

impl MemoryStore {
    /// Makes a store that holds `token`.
    #[must_use]
    pub fn new(token: RefreshToken) -> Self {
        Self { stored: Arc::new(Mutex::new(Stored { token, version: 0 })), in_use: Arc::default() }
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
        self.stored.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RefreshTokenStore for MemoryStore {
    async fn lock(&self) -> Result<StoreLock, BoxError> {
        Ok(StoreLock::new(Arc::clone(&self.in_use).lock_owned().await))
    }

    async fn load(&self) -> Result<Option<RefreshToken>, BoxError> {
        Ok(Some(self.current()))
    }

    async fn save(&self, token: &RefreshToken, replaced: &RefreshToken) -> Result<(), BoxError> {
        let mut stored = self.stored();
        if stored.token.fingerprint() == replaced.fingerprint() {
            stored.token = token.clone();
        }
        Ok(())
    }

    fn version(&self) -> u64 {
        self.stored().version
    }
}
