//! Where credentials are fetched from: the [`Source`] trait and its implementations.
//!
//! | The credential is | Source |
//! |---|---|
//! | in an environment variable | [`EnvSource`] |
//! | in a file that is replaced on rotation | [`FileSource`] |
//! | returned by your own code | [`source_fn`] |
//! | returned by your own Tower service | [`ServiceSource`] |
//! | issued by an OAuth 2.0 token endpoint | [`OAuthSource`](crate::oauth::OAuthSource) |
//! | a JWT that the program signs itself | `JwtSigner` (feature `sign`) |
//!
//! A credential that never changes needs no source: the layers accept an [`ApiKey`](crate::ApiKey) or a
//! [`Token`](crate::Token) directly.
//!
//! A source only fetches. Caching, retries, back-off and single flight are the job of the engine that calls
//! it, [`Refreshing`](crate::Refreshing). To use a different token for each subject, give each its own source:
//! see [`PerSubject`](crate::PerSubject).
//!
//! ```
//! use tower_selam::{BoxError, Refreshing, Token, source::{Reason, source_fn}};
//!
//! # tokio_test::block_on(async {
//! let jwts = Refreshing::new(source_fn(|reason: Reason<Token>| async move {
//!     if let Reason::Rejected(token) = reason {
//!         eprintln!("the API rejected {token:?}");
//!     }
//!     Ok::<_, BoxError>(Token::new("from.your.code")?)
//! }));
//! assert_eq!(jwts.token().await?.expose_secret(), "from.your.code");
//! # Ok::<(), BoxError>(())
//! # }).unwrap();
//! ```

mod closure;
mod engine;
mod env;
mod file;
mod service;
mod settled;
#[cfg(feature = "sign")]
mod sign;

use std::{error::Error as StdError, fmt, pin::Pin, time::Duration};

use tokio::runtime::Handle;

pub(crate) use self::engine::AskingEngine;
#[cfg(feature = "sign")]
pub use self::sign::{HmacSecret, JwtSigner, SigningAlgorithm, SigningKey};
pub use self::{
    closure::{IntoSourceError, SourceFn, source_fn},
    engine::EngineHandle,
    env::EnvSource,
    file::FileSource,
    service::ServiceSource,
    settled::SettledFile,
};
use crate::{
    credential::Credential,
    error::{BoxError, ConfigError},
};

const NO_RUNTIME: &str = "this source needs a tokio runtime, and there is none here";
const ABORTED: &str = "the source panicked, or its runtime was shut down";

/// Fetches a credential. See the [module docs](self).
///
/// # Panics
///
/// The engine turns a panic of a source into an error. In a program that is built with `panic = "abort"`, a source's own panic
/// ends the program.
///
/// # Cancel safety
///
/// The engine drops the future when it exceeds the engine's timeout, and when the last handle of the engine is
/// dropped. A request that is dropped while it waits does not drop the future. A source that must not lose a
/// response, for example because it spends a one-time refresh token, should fetch on a task it spawns itself.
pub trait Source<C: Credential>: Send + Sync + 'static {
    /// Fetches a credential.
    ///
    /// # Errors
    ///
    /// Fails if no credential can be obtained. [`SourceError`] says whether a retry can help.
    fn fetch(&self, reason: Reason<C>) -> impl Future<Output = Result<Fetched<C>, SourceError>> + Send;

    /// Returns a number that changes when the input of this source changes: a new refresh token, a rotated
    /// key.
    ///
    /// After a permanent failure the source is called again when the version changes, and otherwise every 5 minutes only.
    /// Must be cheap.
    fn version(&self) -> u64 {
        0
    }

    /// Says what this source asks for and where, without secrets. Sources that say the same fetch interchangeable credentials.
    ///
    /// The members of a fleet (feature `fleet`) use each other's credentials only if their sources say the same.
    fn identity(&self) -> Option<String> {
        None
    }

    /// Receives a handle of the engine that is going to call this source. Called once, before the first fetch.
    ///
    /// A source that learns that a credential has ended, by a revocation list or a logout, withdraws it with this handle.
    fn attach(&self, engine: EngineHandle<C>) {
        drop(engine);
    }
}

/// Why a source is called.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Reason<C> {
    /// There is no credential yet.
    First,
    /// The current credential has expired or expires soon, or it is time to check whether it was rotated.
    Expiring(C),
    /// The API rejected this credential.
    Rejected(C),
}

impl<C> Reason<C> {
    /// The stable name in spans.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Expiring(_) => "expiring",
            Self::Rejected(_) => "rejected",
        }
    }
}

/// A fetched credential, with what the source knows about its lifetime.
///
/// A [`Token`](crate::Token) that is a JWT carries its expiry in its claims; for anything else, state it here.
#[derive(Clone, Debug)]
pub struct Fetched<C> {
    pub(crate) credential: C,
    pub(crate) lifetime: Option<Duration>,
    pub(crate) recheck: Option<Duration>,
}

impl<C> Fetched<C> {
    /// Wraps a credential that expires as its own claims say, or never.
    #[must_use]
    pub fn new(credential: C) -> Self {
        Self { credential, lifetime: None, recheck: None }
    }

    /// Sets the remaining lifetime, counted from now: `expires_in` in OAuth 2.0.
    ///
    /// It takes precedence over the claims of a JWT, which a machine with a wrong clock misreads.
    #[doc(alias("expires_in", "ttl"))]
    #[must_use]
    pub fn with_lifetime(mut self, lifetime: Duration) -> Self {
        self.lifetime = Some(lifetime);
        self
    }

    /// Asks for another fetch after `time`, because the credential may be rotated in place at any moment.
    ///
    /// The result of that fetch replaces this credential whether it expires later or sooner.
    #[must_use]
    pub fn with_recheck_after(mut self, time: Duration) -> Self {
        self.recheck = Some(time);
        self
    }
}

impl_from! {
    Fetched<C>: [C] C, credential => Self::new(credential);
    SourceError: [] ConfigError, error => Self::transient(error);
}

/// Why a source could not fetch a credential, and whether a retry can help.
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
    /// Reports a failure that a later attempt may not meet. As a function, it maps an error of your own:
    /// `.map_err(SourceError::transient)`.
    pub fn transient(error: impl Into<BoxError>) -> Self {
        Self::of(false, None, error)
    }

    /// Reports a failure that probably lasts until the input of the source [changes](Source::version).
    pub fn permanent(error: impl Into<BoxError>) -> Self {
        Self::of(true, None, error)
    }

    /// Reports a failure about which both are known.
    pub(crate) fn of(permanent: bool, retry_after: Option<Duration>, error: impl Into<BoxError>) -> Self {
        Self { error: error.into(), permanent, retry_after }
    }

    /// Sets how long to wait before the next attempt, as `Retry-After` does. Without it the engine backs off.
    #[must_use]
    pub fn with_retry_after(mut self, time: Duration) -> Self {
        self.retry_after = Some(time);
        self
    }

    /// Returns whether a retry cannot help.
    #[must_use]
    pub fn is_permanent(&self) -> bool {
        self.permanent
    }

    /// Returns how long to wait before the next attempt.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        self.retry_after
    }

    pub(crate) fn cause(&self) -> &(dyn StdError + 'static) {
        &*self.error
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

/// Runs a function that blocks its thread, on tokio's blocking pool.
pub(crate) async fn unblock<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, SourceError> {
    let runtime = Handle::try_current().map_err(|_| SourceError::transient(NO_RUNTIME))?;
    // The `JoinError` is dropped because a panic message may contain a secret.
    runtime.spawn_blocking(work).await.map_err(|_| SourceError::transient(ABORTED))
}

/// [`Source`] as a trait object.
pub(crate) trait DynSource<C: Credential>: Send + Sync {
    fn fetch(&self, reason: Reason<C>) -> Fetching<'_, C>;

    fn version(&self) -> u64;

    fn attach(&self, engine: EngineHandle<C>);
}

pub(crate) type Fetching<'a, C> = Pin<Box<dyn Future<Output = Result<Fetched<C>, SourceError>> + Send + 'a>>;

impl<C: Credential, T: Source<C>> DynSource<C> for T {
    fn fetch(&self, reason: Reason<C>) -> Fetching<'_, C> {
        Box::pin(Source::fetch(self, reason))
    }

    fn version(&self) -> u64 {
        Source::version(self)
    }

    fn attach(&self, engine: EngineHandle<C>) {
        Source::attach(self, engine);
    }
}
