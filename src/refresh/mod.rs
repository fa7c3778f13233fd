#![doc = include_str!("../guide/refreshing.md")]

mod driver;
mod in_flight;
mod lease;
mod per_subject;
mod policy;
#[cfg(test)]
mod proptests;
mod schedule;
mod state;

use std::{
    fmt,
    sync::{Arc, Weak},
    time::{Duration, SystemTime},
};

use tokio::runtime::Handle;

use self::driver::Shared;
pub(crate) use self::{
    driver::{Demand, Keeper, on_behalf},
    in_flight::{Landing, Wait},
    lease::{Epoch, Lease},
    per_subject::Entry,
    state::Rejection,
};
pub use self::{
    per_subject::{JwtProvider, PerSubject},
    policy::RefreshPolicy,
};
use crate::{
    ApiKey, AuthError, Token,
    credential::{Credential, Fingerprint},
    source::{DynSource, Source},
    util::clock::{Deadline, Time},
};

/// A credential that renews itself. See [how renewal works](self).
///
/// Clones are handles of one engine; the last one that is dropped ends it. The layers take one wherever they take
/// an [`ApiKey`] or a [`Token`]; without HTTP, [`token`](Self::token) and [`api_key`](Self::api_key) give it.
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
pub struct Refreshing<C: Credential>(Arc<Shared<C>>);

impl<C: Credential> Refreshing<C> {
    /// An engine that renews from `source`, which it asks when the credential is first needed.
    #[must_use]
    pub fn new(source: impl Source<C>) -> Self {
        Self::with_policy(source, RefreshPolicy::new())
    }

    /// The same with other windows, back-off or timeout.
    #[must_use]
    pub fn with_policy(source: impl Source<C>, policy: RefreshPolicy) -> Self {
        Self::of(Arc::new(source), Arc::new(policy))
    }

    pub(crate) fn of(source: Arc<dyn DynSource<C>>, policy: Arc<RefreshPolicy>) -> Self {
        Self(Shared::new(source, policy))
    }

    /// Forgets `rejected`, if it is still the present one: the next call fetches another. A newer one stays.
    ///
    /// A key is not forgotten but asked for again, and used on if its source has no other. Starts a renewal and
    /// does not wait for it.
    pub fn invalidate(&self, rejected: &C) {
        let _ = self.0.reject(rejected.secret().fingerprint(), true);
    }

    /// Fetches the first credential, if there is none yet.
    ///
    /// # Errors
    ///
    /// When the source has none. The engine will ask again when the next request needs it.
    ///
    /// # Cancel safety
    ///
    /// The fetch goes on without its caller.
    pub async fn prefetch(&self) -> Result<(), AuthError> {
        self.obtain(Duration::ZERO).await.map(|_| ())
    }

    /// The credential there is, without asking for another; `None` when there is none or it has expired.
    #[must_use]
    pub fn current(&self) -> Option<C> {
        self.0.current().map(|(credential, _)| credential)
    }

    /// When the present credential expires by this machine's clock; `None` when there is none, or it does not.
    #[must_use]
    pub fn expires_at(&self) -> Option<SystemTime> {
        self.0.current()?.1
    }

    async fn obtain(&self, lasting: Duration) -> Result<C, AuthError> {
        match self.fresh() {
            Some(credential) if lasting.is_zero() => Ok(credential),
            _ => self.0.obtain(lasting).await,
        }
    }

    /// Whether a renewal is running.
    pub(crate) fn is_renewing(&self) -> bool {
        self.0.is_renewing()
    }

    #[inline]
    fn fresh(&self) -> Option<C> {
        self.0.fresh()
    }

    #[inline]
    pub(crate) fn epoch(&self) -> Epoch {
        self.0.epoch()
    }

    #[inline]
    pub(crate) fn now(&self) -> Time {
        self.0.now()
    }
}

impl Refreshing<Token> {
    /// The token: at once while there is one, after the renewal otherwise.
    ///
    /// # Errors
    ///
    /// [`RefreshFailed`](crate::AuthErrorKind::RefreshFailed) or
    /// [`RefreshRejected`](crate::AuthErrorKind::RefreshRejected), with what the source said as its cause.
    ///
    /// # Cancel safety
    ///
    /// The renewal goes on without its caller, and its result is kept.
    pub async fn token(&self) -> Result<Token, AuthError> {
        self.obtain(Duration::ZERO).await
    }

    /// A token that does not expire for `time`; fetches another if the present one does. Ask for a second less
    /// than tokens live, at most.
    ///
    /// # Errors
    ///
    /// As [`token`](Self::token), and
    /// [`CredentialUnavailable`](crate::AuthErrorKind::CredentialUnavailable) when new ones do not live that long.
    ///
    /// # Cancel safety
    ///
    /// As [`token`](Self::token).
    pub async fn token_valid_for(&self, time: Duration) -> Result<Token, AuthError> {
        self.obtain(time).await
    }
}

impl Refreshing<ApiKey> {
    /// The key: at once while there is one, after the source was asked otherwise.
    ///
    /// # Errors
    ///
    /// As [`token`](Refreshing::token).
    ///
    /// # Cancel safety
    ///
    /// As [`token`](Refreshing::token).
    pub async fn api_key(&self) -> Result<ApiKey, AuthError> {
        self.obtain(Duration::ZERO).await
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

/// A credential that is fixed, or one that renews itself: what the layers take.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Provider<C: Credential> {
    /// It never changes.
    Fixed(C),
    /// It renews itself.
    Refreshing(Refreshing<C>),
}

impl<C: Credential> Provider<C> {
    /// The credential, after a renewal if need be.
    ///
    /// # Errors
    ///
    /// As [`Refreshing::token`].
    ///
    /// # Cancel safety
    ///
    /// As [`Refreshing::token`].
    pub async fn get(&self) -> Result<C, AuthError> {
        match self {
            Self::Fixed(credential) => Ok(credential.clone()),
            Self::Refreshing(renewing) => renewing.obtain(Duration::ZERO).await,
        }
    }

    /// The credential there is, without asking for another.
    #[must_use]
    pub fn current(&self) -> Option<C> {
        match self {
            Self::Fixed(credential) => Some(credential.clone()),
            Self::Refreshing(renewing) => renewing.current(),
        }
    }
}

impl<C: Credential> Provider<C> {
    pub(crate) fn renewing(&self) -> Option<&Refreshing<C>> {
        match self {
            Self::Fixed(_) => None,
            Self::Refreshing(renewing) => Some(renewing),
        }
    }

    /// The credential, if nothing has to be asked about it: in which epoch, and until when.
    pub(crate) fn lease(&self) -> Option<(C, Epoch, Option<Deadline>)> {
        match self {
            Self::Fixed(credential) => Some((credential.clone(), Epoch::default(), None)),
            Self::Refreshing(renewing) => {
                let Lease { value, until, epoch } = renewing.0.lease()?;
                Some((value, epoch, Some(until)))
            }
        }
    }

    /// The credential, or what to wait for; starts a renewal if need be.
    pub(crate) fn demand(&self) -> Result<Demand<C>, AuthError> {
        match self {
            Self::Fixed(credential) => Ok(Demand::Ready(credential.clone())),
            // To ask moves the epoch, and with it every layer that shares the engine.
            Self::Refreshing(renewing) => match renewing.fresh() {
                Some(credential) => Ok(Demand::Ready(credential)),
                None => renewing.0.demand(Duration::ZERO),
            },
        }
    }

    /// Tells the credential there is from any other; `None` when there is none. Has another looked for if it is time to:
    /// whoever waits for a change may be the only one who asks.
    pub(crate) fn version(&self) -> Option<u64> {
        if let Self::Refreshing(renewing) = self
            && Handle::try_current().is_ok()
            && renewing.fresh().is_none()
        {
            let _ = renewing.0.demand(Duration::ZERO);
        }
        self.current().map(|credential| credential.secret().fingerprint().number())
    }

    #[inline]
    pub(crate) fn epoch(&self) -> Epoch {
        self.renewing().map(Refreshing::epoch).unwrap_or_default()
    }

    #[inline]
    pub(crate) fn now(&self) -> Option<Time> {
        self.renewing().map(Refreshing::now)
    }

    /// Has `keeper` told when there is another credential, or none.
    pub(crate) fn kept_by(&self, keeper: &Weak<dyn Keeper>) {
        if let Self::Refreshing(renewing) = self {
            renewing.0.kept_by(keeper);
        }
    }

    /// The API took what came after `refused`.
    pub(crate) fn accept(&self, refused: Fingerprint) {
        if let Self::Refreshing(renewing) = self {
            renewing.0.accept(refused);
        }
    }

    /// The API refused `fingerprint`: whether and what there is to wait for.
    pub(crate) fn reject(&self, fingerprint: Fingerprint) -> (Rejection, Option<Landing>) {
        match self {
            Self::Fixed(_) => (Rejection::Ignored, None),
            Self::Refreshing(renewing) => renewing.0.reject(fingerprint, false),
        }
    }
}

impl<C: Credential> From<C> for Provider<C> {
    fn from(credential: C) -> Self {
        Self::Fixed(credential)
    }
}

impl<C: Credential> From<Refreshing<C>> for Provider<C> {
    fn from(renewing: Refreshing<C>) -> Self {
        Self::Refreshing(renewing)
    }
}

impl<C: Credential> From<&Refreshing<C>> for Provider<C> {
    fn from(renewing: &Refreshing<C>) -> Self {
        Self::Refreshing(renewing.clone())
    }
}
