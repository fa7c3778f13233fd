//! [`Refreshing`]: the handle of an engine.

use std::{
    cell::OnceCell,
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use super::{
    RefreshPolicy,
    driver::{Demand, Driver},
    lease::Lease,
};
use crate::{
    ApiKey, AuthError, Token,
    credential::{Credential, Fingerprint},
    source::{DynSource, Source},
    util::clock::Time,
};

/// A credential that refreshes itself. See [how refreshing works](crate::guide::refreshing).
///
/// Clones are handles of one engine; the engine ends with the last one. The layers take a `Refreshing` wherever they
/// take an [`ApiKey`] or a [`Token`]. Without HTTP, [`token`](Self::token) and [`api_key`](Self::api_key) return the
/// credential.
///
/// ```
/// use tower_selam::{BoxError, Refreshing, Token, source::{Reason, source_fn}};
///
/// # tokio_test::block_on(async {
/// let jwts = Refreshing::new(source_fn(|_: Reason<Token>| async { Ok::<_, BoxError>(Token::new("a.b.c")?) }));
/// jwts.prefetch().await?; // at start-up, so that the first request does not wait
///
/// let jwt = jwts.token().await?;
/// assert_eq!(jwt.expose_secret(), "a.b.c");
/// jwts.invalidate(&jwt); // the next call fetches another
/// # Ok::<(), BoxError>(())
/// # }).unwrap();
/// ```
pub struct Refreshing<C: Credential>(pub(super) Arc<Driver<C>>);

impl<C: Credential> Refreshing<C> {
    /// Creates an engine with the default policy. The source is asked when the credential is first needed.
    #[must_use]
    pub fn new(source: impl Source<C>) -> Self {
        Self::with_policy(source, RefreshPolicy::new())
    }

    /// Creates an engine with other windows, back-off or timeout.
    #[must_use]
    pub fn with_policy(source: impl Source<C>, policy: RefreshPolicy) -> Self {
        Self(Driver::new(Arc::new(source), Arc::new(policy), true))
    }

    /// The engine of one subject among many.
    pub(super) fn of_subject(source: Arc<dyn DynSource<C>>, policy: Arc<RefreshPolicy>) -> Self {
        Self(Driver::new(source, policy, false))
    }

    /// Discards `rejected` if it is still the current credential, and starts a refresh without waiting for it. A newer
    /// credential stays.
    ///
    /// A key is not discarded: its source is asked again, and the key stays in use if the source has no other.
    pub fn invalidate(&self, rejected: &C) {
        let _ = self.0.reject(rejected.secret().fingerprint(), true);
    }

    /// Fetches the first credential, if there is none yet.
    ///
    /// # Errors
    ///
    /// When the source fails. The engine asks it again when the next request needs the credential.
    ///
    /// # Cancel safety
    ///
    /// The refresh continues without its caller.
    pub async fn prefetch(&self) -> Result<(), AuthError> {
        self.obtain().await.map(|_| ())
    }

    /// Returns the current credential without starting a refresh; `None` if there is none or it has expired.
    #[must_use]
    pub fn current(&self) -> Option<C> {
        self.0.current().map(|(credential, _)| credential)
    }

    /// Returns when the current credential expires by this machine's clock; `None` if there is none or it does not
    /// expire.
    #[must_use]
    pub fn expires_at(&self) -> Option<SystemTime> {
        self.0.current()?.1
    }

    pub(super) async fn obtain(&self) -> Result<C, AuthError> {
        self.0.obtain(Duration::ZERO).await
    }

    #[cfg(all(test, model))]
    pub(crate) fn fresh(&self) -> Option<Arc<Lease<C>>> {
        self.0.fresh(&OnceCell::new())
    }

    /// The credential, or the refresh to wait for. `now` is read once for all credentials of a request: reading both of a
    /// machine's clocks takes as long as writing a header.
    #[inline]
    pub(crate) fn demand(&self, now: &OnceCell<Time>) -> Result<Demand<Arc<Lease<C>>>, AuthError> {
        match self.0.fresh(now) {
            Some(lease) => Ok(Demand::Ready(lease)),
            None => self.0.demand(Duration::ZERO),
        }
    }

    /// Whether the credential with this fingerprint is the current one.
    pub(crate) fn holds(&self, fingerprint: Fingerprint) -> bool {
        self.0.holds(fingerprint)
    }

    /// The fingerprints of credentials that were replaced lately.
    pub(crate) fn recently_replaced(&self) -> Vec<Fingerprint> {
        self.0.recently_replaced()
    }
}

impl Refreshing<Token> {
    /// Returns the token: at once while there is one, otherwise after the refresh.
    ///
    /// # Errors
    ///
    /// [`RefreshFailed`](crate::AuthErrorKind::RefreshFailed) or
    /// [`RefreshRejected`](crate::AuthErrorKind::RefreshRejected), with the source's error as the cause.
    ///
    /// # Cancel safety
    ///
    /// The refresh continues without its caller, and its result is kept.
    pub async fn token(&self) -> Result<Token, AuthError> {
        self.obtain().await
    }

    /// Returns a token that stays valid for `time`; fetches another if the current one does not. Ask for at most one
    /// second less than tokens live.
    ///
    /// # Errors
    ///
    /// As [`token`](Self::token), and
    /// [`CredentialUnavailable`](crate::AuthErrorKind::CredentialUnavailable) if new tokens do not live that long.
    ///
    /// # Cancel safety
    ///
    /// As [`token`](Self::token).
    pub async fn token_valid_for(&self, time: Duration) -> Result<Token, AuthError> {
        self.0.obtain(time).await
    }
}

impl Refreshing<ApiKey> {
    /// Returns the key: at once while there is one, otherwise after the refresh.
    ///
    /// # Errors and cancel safety
    ///
    /// As [`token`](Refreshing::token).
    pub async fn api_key(&self) -> Result<ApiKey, AuthError> {
        self.obtain().await
    }
}

impl<C: Credential> Clone for Refreshing<C> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<C: Credential + fmt::Debug> fmt::Debug for Refreshing<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Refreshing").field("current", &self.current()).finish_non_exhaustive()
    }
}
