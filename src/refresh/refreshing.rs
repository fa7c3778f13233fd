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
    turns::Turns,
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
/// # Ok::<(), BoxError>(())
/// # }).unwrap();
/// ```
#[doc(alias("TokenProvider", "TokenCache", "refresh", "renew", "rotate"))]
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
        Self(Driver::new(Arc::new(source), Arc::new(policy), None))
    }

    /// The engine of one subject among many.
    pub(super) fn of_subject(
        source: Arc<dyn DynSource<C>>,
        policy: Arc<RefreshPolicy>,
        turns: Arc<Turns>,
    ) -> Self {
        Self(Driver::new(source, policy, Some(turns)))
    }

    /// Reports that the API answered 401 to `credential`, and starts a refresh without waiting for it. [`RefreshLayer`]
    /// does so by itself; this is for code that uses the credential without the layers.
    ///
    /// The API's answer is [evidence and no proof](crate::guide::refreshing#when-the-api-rejects-a-credential): the source
    /// is asked again, and if it brings the same credential, or fails, the credential stays in use. Reporting an older
    /// credential than the current one does nothing. Reports in close succession start one refresh.
    ///
    /// ```
    /// use tower_selam::{AuthError, BoxError, Refreshing, Token, source::{Reason, source_fn}};
    /// # async fn send(jwt: &Token) -> u16 { if jwt.expose_secret() == "rotated" { 200 } else { 401 } }
    ///
    /// async fn send_or_replay(jwts: &Refreshing<Token>) -> Result<u16, AuthError> {
    ///     let jwt = jwts.token().await?;
    ///     let status = send(&jwt).await;
    ///     if status != 401 {
    ///         return Ok(status);
    ///     }
    ///     jwts.rejected(&jwt);
    ///     let next = jwts.token().await?; // after the refresh, if this was the first rejection
    ///     if next.id() == jwt.id() {
    ///         return Ok(status); // a replay would be rejected as well
    ///     }
    ///     let status = send(&next).await;
    ///     if status != 401 {
    ///         jwts.accepted(&next);
    ///     }
    ///     Ok(status)
    /// }
    ///
    /// # tokio_test::block_on(async {
    /// let jwts = Refreshing::new(source_fn(|reason: Reason<Token>| async move {
    ///     let is_rejected = matches!(reason, Reason::Rejected(_));
    ///     Ok::<_, BoxError>(Token::new(if is_rejected { "rotated" } else { "first" })?)
    /// }));
    /// assert_eq!(send_or_replay(&jwts).await?, 200);
    /// # Ok::<(), BoxError>(())
    /// # }).unwrap();
    /// ```
    ///
    /// [`RefreshLayer`]: crate::RefreshLayer
    #[doc(alias("invalidate", "revoke"))]
    pub fn rejected(&self, credential: &C) {
        let _ = self.0.reject(credential.secret().fingerprint());
    }

    /// Reports that the API accepted `credential` after it had [rejected](Self::rejected) the one before: the next
    /// rejection need not be spaced. There is no need to report other successes.
    pub fn accepted(&self, credential: &C) {
        let accepted = credential.secret().fingerprint();
        self.0.accept(|current| current == accepted);
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
