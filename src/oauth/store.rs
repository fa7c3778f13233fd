use std::{
    fmt,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use zeroize::Zeroizing;

use crate::{
    BoxError, ConfigError, KeyId,
    credential::{Fingerprint, text},
    error::{Place, Subject},
};

/// A refresh token ([RFC 6749 section 1.5](https://www.rfc-editor.org/rfc/rfc6749#section-1.5)). Redacted and wiped like
/// every secret of this crate.
#[derive(Clone)]
pub struct RefreshToken(Zeroizing<String>);

impl RefreshToken {
    /// A refresh token that the program was given.
    ///
    /// # Errors
    ///
    /// When it is empty, or has a control character or one that is not ASCII. The error never holds the value.
    pub fn new(value: impl Into<String>) -> Result<Self, ConfigError> {
        let value = Zeroizing::new(value.into());
        match text(&value) {
            Ok(value) => Ok(Self(Zeroizing::new(value.to_owned()))),
            Err(kind) => Err(ConfigError::new(Subject::RefreshToken, Place::Argument, kind)),
        }
    }

    /// As the endpoint gave it: whatever that was, it is not to be lost.
    pub(super) fn received(value: Zeroizing<String>) -> Option<Self> {
        (!value.is_empty()).then_some(Self(value))
    }

    /// The token itself, to be stored. Do not print it.
    #[must_use]
    pub fn expose_secret(&self) -> &str {
        &self.0
    }

    /// A short, non-reversible name for logs.
    #[must_use]
    pub fn id(&self) -> KeyId {
        self.fingerprint().id()
    }

    pub(super) fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(self.0.as_bytes())
    }
}

impl fmt::Debug for RefreshToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RefreshToken([redacted] id={})", self.id())
    }
}

/// Where the refresh token of a login is kept, so that the next run of the program finds the newest.
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
///         // Written beside and moved, so that it is never half there.
///         let next = self.0.with_extension("next");
///         fs::write(&next, token.expose_secret())?;
///         Ok(fs::rename(next, &self.0)?)
///     }
/// }
/// ```
pub trait RefreshTokenStore: Send + Sync + 'static {
    /// The token to begin with; `None` where nobody has logged in.
    ///
    /// Asked when the first token is needed, when the [`version`](Self::version) has changed, and when the endpoint has
    /// refused the token there was: a program beside this one may have stored another.
    ///
    /// # Errors
    ///
    /// What keeps it from that. It is asked again later.
    fn load(&self) -> impl Future<Output = Result<Option<RefreshToken>, BoxError>> + Send;

    /// Keeps the token that the endpoint gave in place of the one before.
    ///
    /// Requests do not wait for it; the next exchange does, for two minutes at most. A store that fails now and then had
    /// better try again by itself.
    ///
    /// # Errors
    ///
    /// What keeps it from that: an event at level `WARN` with the feature `tracing`. The token is kept in memory, used for
    /// the next exchange, and not saved again; the one which that brings is.
    fn save(&self, token: &RefreshToken) -> impl Future<Output = Result<(), BoxError>> + Send;

    /// Changes when another token is to be [loaded](Self::load): after a new login, say. Must be cheap.
    fn version(&self) -> u64 {
        0
    }
}

/// A [`RefreshTokenStore`] that lives as long as the program. Clones are handles of one.
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
    /// A store of this token.
    #[must_use]
    pub fn new(token: RefreshToken) -> Self {
        Self(Arc::new(Mutex::new(Stored { token, version: 0 })))
    }

    /// The token of a new login, which the next exchange spends. Ends the failure that an old one led to.
    pub fn replace(&self, token: RefreshToken) {
        let mut stored = self.stored();
        stored.token = token;
        stored.version += 1;
    }

    /// The token there is: the last that was given here or by the endpoint.
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

/// [`RefreshTokenStore`] for trait objects.
pub(super) trait DynStore: Send + Sync {
    fn load(&self) -> Boxed<'_, Option<RefreshToken>>;

    fn save<'a>(&'a self, token: &'a RefreshToken) -> Boxed<'a, ()>;

    fn version(&self) -> u64;
}

type Boxed<'a, T> = Pin<Box<dyn Future<Output = Result<T, BoxError>> + Send + 'a>>;

impl<S: RefreshTokenStore> DynStore for S {
    fn load(&self) -> Boxed<'_, Option<RefreshToken>> {
        Box::pin(RefreshTokenStore::load(self))
    }

    fn save<'a>(&'a self, token: &'a RefreshToken) -> Boxed<'a, ()> {
        Box::pin(RefreshTokenStore::save(self, token))
    }

    fn version(&self) -> u64 {
        RefreshTokenStore::version(self)
    }
}
