//! Where credentials come from: [`Source`], and the ones that are ready-made.
//!
//! | A credential | Source |
//! |---|---|
//! | in an environment variable | [`EnvSource`] |
//! | in a file that is replaced when it is rotated | [`FileSource`] |
//! | from code of yours | [`source_fn`] |
//! | from a Tower service of yours, with layers of its own | [`ServiceSource`] |
//! | from an OAuth 2.0 token endpoint | [`OAuthSource`](crate::oauth::OAuthSource) |
//! | signed by the program itself, with a key of its own | `JwtSigner`: feature `sign` |
//!
//! One that never changes needs no source: the layers take an [`ApiKey`](crate::ApiKey) or a
//! [`Token`](crate::Token) as it is.
//!
//! A source does one thing: it fetches when it is asked. It does not retry, cache or wait: the engine that
//! asks it does ([`Refreshing`](crate::Refreshing)). For a token of each user, there is a source of each:
//! [`PerSubject`](crate::PerSubject).
//!
//! ```
//! use tower_selam::{BoxError, Refreshing, Token, source::{Reason, source_fn}};
//!
//! # tokio_test::block_on(async {
//! let jwts = Refreshing::new(source_fn(|reason: Reason<Token>| async move {
//!     if let Reason::Rejected(refused) = reason {
//!         eprintln!("the API refused {refused:?}");
//!     }
//!     Ok::<_, BoxError>(Token::new("from.your.code")?)
//! }));
//! assert_eq!(jwts.token().await?.expose_secret(), "from.your.code");
//! # Ok::<(), BoxError>(())
//! # }).unwrap();
//! ```

mod closure;
mod env;
mod file;
mod service;
#[cfg(feature = "sign")]
mod sign;

use std::{error::Error as StdError, fmt, pin::Pin, time::Duration};

#[cfg(feature = "sign")]
pub use self::sign::{JwtSigner, SigningAlgorithm, SigningKey};
pub use self::{
    closure::{SourceFn, source_fn},
    env::EnvSource,
    file::FileSource,
    service::ServiceSource,
};
use crate::{BoxError, ConfigError, credential::Credential};

/// Where a credential comes from. See the [module docs](self).
///
/// # Cancel safety
///
/// The future is dropped when it takes longer than the engine's timeout, and when the last handle of the
/// engine is. Callers that lose their patience do not drop it. A source that must not lose an answer
/// (a refresh token that is spent once, say) fetches on a task of its own.
pub trait Source<C: Credential>: Send + Sync + 'static {
    /// Fetches a credential.
    ///
    /// # Errors
    ///
    /// Whatever keeps it from that; [`SourceError`] tells whether it is worth trying again.
    fn fetch(&self, reason: Reason<C>) -> impl Future<Output = Result<Fetched<C>, SourceError>> + Send;

    /// Changes when what the source works with has changed: a new refresh token, a rotated key.
    ///
    /// After a permanent failure the source is not asked again until it does. Must be cheap.
    fn version(&self) -> u64 {
        0
    }
}

/// Why a source is asked.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Reason<C> {
    /// There is no credential yet.
    First,
    /// The one there is expires soon or has expired, or it is time to look whether it was replaced.
    Expiring(C),
    /// The API refused this one.
    Rejected(C),
}

/// What a source fetched.
///
/// A [`Token`](crate::Token) that is a JWT tells by itself when it expires; anything else is said here.
#[derive(Clone, Debug)]
pub struct Fetched<C> {
    pub(crate) credential: C,
    pub(crate) lifetime: Option<Duration>,
    pub(crate) recheck: Option<Duration>,
}

impl<C> Fetched<C> {
    /// A credential that expires as it says itself.
    #[must_use]
    pub fn new(credential: C) -> Self {
        Self { credential, lifetime: None, recheck: None }
    }

    /// It was issued just now and expires after this time: `expires_in` of OAuth 2.0. Counts more than what a
    /// JWT says of itself, which a machine whose clock is wrong misreads.
    #[must_use]
    pub fn with_lifetime(mut self, lifetime: Duration) -> Self {
        self.lifetime = Some(lifetime);
        self
    }

    /// It was read from a place where another may stand at any time: look again after this time. What is
    /// found there then replaces it, whether it expires later or sooner.
    #[must_use]
    pub fn with_recheck_after(mut self, time: Duration) -> Self {
        self.recheck = Some(time);
        self
    }
}

impl<C> From<C> for Fetched<C> {
    fn from(credential: C) -> Self {
        Self::new(credential)
    }
}

/// Why a source has no credential to give.
///
/// ```
/// use std::time::Duration;
/// use tower_selam::source::SourceError;
///
/// let error = SourceError::transient("the vault is sealed").with_retry_after(Duration::from_secs(30));
/// assert!(!error.is_permanent());
/// assert_eq!(error.to_string(), "the vault is sealed");
/// assert!(SourceError::permanent("the login has ended").is_permanent());
/// ```
#[derive(Debug)]
pub struct SourceError {
    error: BoxError,
    permanent: bool,
    retry_after: Option<Duration>,
}

impl SourceError {
    /// Asking again later may help. This is also what any other error becomes.
    pub fn transient(error: impl Into<BoxError>) -> Self {
        Self { error: error.into(), permanent: false, retry_after: None }
    }

    /// Asking again does not help until something [changes](Source::version).
    pub fn permanent(error: impl Into<BoxError>) -> Self {
        Self { error: error.into(), permanent: true, retry_after: None }
    }

    /// To be asked again after this time, and not earlier: `Retry-After`. Otherwise the engine backs off.
    #[must_use]
    pub fn with_retry_after(mut self, time: Duration) -> Self {
        self.retry_after = Some(time);
        self
    }

    /// Whether asking again does not help.
    #[must_use]
    pub fn is_permanent(&self) -> bool {
        self.permanent
    }

    /// When to be asked again.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        self.retry_after
    }

    pub(crate) fn into_cause(self) -> BoxError {
        self.error
    }
}

impl From<BoxError> for SourceError {
    fn from(error: BoxError) -> Self {
        match error.downcast::<Self>() {
            Ok(error) => *error,
            Err(error) => Self::transient(error),
        }
    }
}

impl From<ConfigError> for SourceError {
    fn from(error: ConfigError) -> Self {
        Self::transient(error)
    }
}

impl fmt::Display for SourceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.error, f)
    }
}

impl StdError for SourceError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.error.source()
    }
}

/// [`Source`] for trait objects.
pub(crate) trait DynSource<C>: Send + Sync {
    fn fetch(&self, reason: Reason<C>) -> Fetching<'_, C>;

    fn version(&self) -> u64;
}

pub(crate) type Fetching<'a, C> = Pin<Box<dyn Future<Output = Result<Fetched<C>, SourceError>> + Send + 'a>>;

impl<C: Credential, T: Source<C>> DynSource<C> for T {
    fn fetch(&self, reason: Reason<C>) -> Fetching<'_, C> {
        Box::pin(Source::fetch(self, reason))
    }

    fn version(&self) -> u64 {
        Source::version(self)
    }
}
