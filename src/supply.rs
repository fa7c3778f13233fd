//! What a layer has to send: one consistent set of credentials at a time, of a key and a JWT that may each renew
//! themselves.
//!
//! The set is made when one of the two changes and then shared by all requests, which read it without a lock, for as
//! long as both are in force. No JWT goes with a key that is older than the one it was made with.

use std::{
    fmt,
    future::pending,
    pin::Pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::{
    ApiKey, AuthError, AuthErrorKind, Credentials, MaybeRenewing, PerSubject, Subject, Token,
    clock::Deadline,
    credentials::Form,
    engine::{Demand, Epoch, Landing, Rejection, wait},
    secret::Credential,
    shards::Shards,
    subjects::Entry,
    sync::ArcSwapOption,
};

/// Owner of what is no single user's.
const EVERYBODY: u64 = 0;

const NO_SUBJECT: &str = "the request names no `Subject`, and this layer has a JWT for each";

const FULL: &str = "tokens of as many users as there is room for are being fetched";
const AGAIN: Duration = Duration::from_secs(1);

/// Makes [`Credentials`] of a key and a JWT.
pub(crate) struct Supply {
    form: Form,
    /// The key goes as `X-API-Key` when it goes alone.
    as_header: bool,
    sources: Arc<Sources>,
    whole: Shelf,
    key_alone: Shelf,
    /// Which layer made it, where it is one user's; or [`EVERYBODY`].
    owner: u64,
    this: Weak<Self>,
}

/// Where the key and the JWT of a set come from. A set that was sent keeps them, so that what is refused of it can be
/// renewed whatever has become of the layer's own by then.
pub(crate) struct Sources {
    key: Option<MaybeRenewing<ApiKey>>,
    jwt: Option<MaybeRenewing<Token>>,
}

/// What a request needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    All,
    KeyAlone,
}

type Shelf = ArcSwapOption<Made>;

/// A set and what it was made of.
struct Made {
    credentials: Shards<Credentials>,
    epochs: [Epoch; 2],
    until: Option<Deadline>,
}

pub(crate) type Waiting = Pin<Box<dyn Future<Output = Result<Credentials, AuthError>> + Send + Sync>>;

/// A set, or what to wait for.
pub(crate) enum Supplied {
    Ready(Credentials),
    Wait(Waiting),
}

enum Offer {
    Ready(Credentials),
    Wait(Landings),
}

/// The renewals of key and JWT that are running.
type Landings = [Option<Landing>; 2];

impl Supply {
    pub(crate) fn new(
        form: Form,
        as_header: bool,
        key: Option<MaybeRenewing<ApiKey>>,
        jwt: Option<MaybeRenewing<Token>>,
    ) -> Arc<Self> {
        Self::owned(EVERYBODY, form, as_header, key, jwt)
    }

    fn owned(
        owner: u64,
        form: Form,
        as_header: bool,
        key: Option<MaybeRenewing<ApiKey>>,
        jwt: Option<MaybeRenewing<Token>>,
    ) -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            form,
            as_header,
            sources: Arc::new(Sources { key, jwt }),
            whole: Shelf::empty(),
            key_alone: Shelf::empty(),
            owner,
            this: this.clone(),
        })
    }

    /// The set, if nothing has to be asked about it.
    #[inline]
    pub(crate) fn fresh(&self, need: Need) -> Option<Credentials> {
        let made = self.shelf(need).load();
        let made = made.as_deref()?;
        let fresh = made.epochs == self.epochs(need) && made.until.is_none_or(|until| !self.has_come(until));
        fresh.then(|| made.credentials.local().clone())
    }

    /// What there is, fresh or not.
    pub(crate) fn last(&self) -> Option<Credentials> {
        if let Some(made) = self.whole.load().as_deref() {
            return Some(made.credentials.local().clone());
        }
        let key = self.sources.key.as_ref().and_then(MaybeRenewing::current);
        let jwt = self.sources.jwt.as_ref().and_then(MaybeRenewing::current);
        (key.is_some() || jwt.is_some()).then(|| self.make(Need::All, key, jwt))
    }

    /// The set, or what to wait for; starts renewals if need be.
    pub(crate) fn demand(&self, need: Need) -> Result<Supplied, AuthError> {
        Ok(match self.offer(need)? {
            Offer::Ready(credentials) => Supplied::Ready(credentials),
            Offer::Wait(landings) => Supplied::Wait(match self.this.upgrade() {
                Some(this) => Box::pin(this.obtain(need, landings)),
                None => Box::pin(pending()),
            }),
        })
    }

    async fn obtain(self: Arc<Self>, need: Need, mut landings: Landings) -> Result<Credentials, AuthError> {
        loop {
            for landing in landings.into_iter().flatten() {
                wait(landing).await?;
            }
            // Of many who waited, the first makes the set.
            if let Some(credentials) = self.fresh(need) {
                return Ok(credentials);
            }
            // The one may have been refused while the other was awaited.
            match self.offer(need)? {
                Offer::Ready(credentials) => return Ok(credentials),
                Offer::Wait(others) => landings = others,
            }
        }
    }

    fn offer(&self, need: Need) -> Result<Offer, AuthError> {
        if need == Need::KeyAlone && self.sources.key.is_none() {
            return Ok(Offer::Ready(Credentials::beside()));
        }
        loop {
            // First the JWT, here and below: the key that is read after it is no older than the one it was made with.
            let jwt = demand(self.jwt(need))?;
            let key = demand(self.sources.key.as_ref())?;
            let (jwt, key) = match (jwt, key) {
                (Demand::Ready(jwt), Demand::Ready(key)) => (jwt, key),
                (jwt, key) => return Ok(Offer::Wait([key.landing(), jwt.landing()])),
            };

            let (credentials, made) = match (lease(self.jwt(need)), lease(self.sources.key.as_ref())) {
                (Some((jwt, jwt_epoch, jwt_until)), Some((key, key_epoch, key_until))) => {
                    let credentials = self.make(need, key, jwt);
                    let until = match (key_until, jwt_until) {
                        (Some(key), Some(jwt)) => Some(key.earlier(jwt)),
                        (key, jwt) => key.or(jwt),
                    };
                    let epochs = [key_epoch, jwt_epoch];
                    let shards = match self.owner {
                        EVERYBODY => credentials.sharded(),
                        // One user's requests are few, and users are many.
                        _ => Shards::single(credentials.clone()),
                    };
                    (credentials, Some(Made { credentials: shards, epochs, until }))
                }
                _ => (self.make(need, key, jwt), None),
            };
            // Where the JWT is gone by now, it may have gone before the key came: they were never a pair.
            if !self.has_still(credentials.jwt()) {
                continue;
            }
            if let Some(made) = made {
                self.shelf(need).store(Some(Arc::new(made)));
            }
            return Ok(Offer::Ready(credentials));
        }
    }

    /// Whether `jwt` is the one there is, where there is a key that may change beside it.
    fn has_still(&self, jwt: Option<&Token>) -> bool {
        let (Some(MaybeRenewing::Renewing(_)), Some(own), Some(jwt)) =
            (&self.sources.key, &self.sources.jwt, jwt)
        else {
            return true;
        };
        own.current().is_some_and(|current| current.secret.fingerprint() == jwt.secret.fingerprint())
    }

    fn make(&self, need: Need, key: Option<ApiKey>, jwt: Option<Token>) -> Credentials {
        self.set(need, key, jwt).supplied_by(Arc::clone(&self.sources))
    }

    fn set(&self, need: Need, key: Option<ApiKey>, jwt: Option<Token>) -> Credentials {
        match (self.form, key, jwt) {
            (Form::Pair, Some(key), Some(jwt)) => Credentials::key_and_jwt(key, jwt),
            (Form::KeyHalf, Some(key), _) if need == Need::All => Credentials::key_beside_jwt(key),
            (Form::Key, Some(key), _) if self.as_header => Credentials::header(key),
            (_, Some(key), _) => Credentials::bearer(key),
            (_, None, Some(jwt)) => Credentials::jwt_beside_key(jwt),
            (_, None, None) => Credentials::beside(),
        }
    }

    pub(crate) fn form(&self) -> Form {
        self.form
    }

    pub(crate) fn owner(&self) -> u64 {
        self.owner
    }

    /// The set, if none of it is ever another.
    pub(crate) fn fixed(&self) -> Option<Credentials> {
        let (key, jwt) = (fixed(self.sources.key.as_ref())?, fixed(self.sources.jwt.as_ref())?);
        Some(self.set(Need::All, key, jwt))
    }

    fn jwt(&self, need: Need) -> Option<&MaybeRenewing<Token>> {
        self.sources.jwt.as_ref().filter(|_| need == Need::All)
    }

    #[inline]
    fn epochs(&self, need: Need) -> [Epoch; 2] {
        let epoch = |jwt: &MaybeRenewing<Token>| jwt.epoch();
        let key = self.sources.key.as_ref().map(MaybeRenewing::epoch).unwrap_or_default();
        [key, self.jwt(need).map(epoch).unwrap_or_default()]
    }

    #[inline]
    fn has_come(&self, until: Deadline) -> bool {
        let now = self.sources.jwt.as_ref().and_then(MaybeRenewing::now);
        let now = now.or_else(|| self.sources.key.as_ref().and_then(MaybeRenewing::now));
        now.is_none_or(|now| until.has_come(now))
    }

    #[inline]
    fn shelf(&self, need: Need) -> &Shelf {
        match need {
            Need::All => &self.whole,
            Need::KeyAlone => &self.key_alone,
        }
    }
}

impl Sources {
    /// The API refused `sent`; whether its `part` can be another by now, and what to wait for until then.
    pub(crate) fn reject(&self, part: Part, sent: &Credentials) -> (Rejection, Option<Landing>) {
        let ignored = (Rejection::Ignored, None);
        match part {
            Part::Key => match (&self.key, sent.api_key()) {
                (Some(key), Some(sent)) => key.reject(sent.0.fingerprint()),
                _ => ignored,
            },
            Part::Jwt => match (&self.jwt, sent.jwt()) {
                (Some(jwt), Some(sent)) => jwt.reject(sent.secret.fingerprint()),
                _ => ignored,
            },
        }
    }

    /// The API took another than the `part` of `refused`.
    pub(crate) fn accept(&self, part: Part, refused: &Credentials) {
        match (part, &self.key, &self.jwt) {
            (Part::Key, Some(key), _) => {
                refused.api_key().into_iter().for_each(|refused| key.accept(refused.0.fingerprint()));
            }
            (Part::Jwt, _, Some(jwt)) => {
                refused.jwt().into_iter().for_each(|refused| jwt.accept(refused.secret.fingerprint()));
            }
            _ => {}
        }
    }

    /// Whether `part` is there and is not what was sent.
    pub(crate) fn has_other(&self, part: Part, sent: &Credentials) -> bool {
        match part {
            Part::Key => self.key.as_ref().and_then(MaybeRenewing::current).is_some_and(|key| {
                Some(key.0.fingerprint()) != sent.api_key().map(|sent| sent.0.fingerprint())
            }),
            Part::Jwt => self.jwt.as_ref().and_then(MaybeRenewing::current).is_some_and(|jwt| {
                Some(jwt.secret.fingerprint()) != sent.jwt().map(|sent| sent.secret.fingerprint())
            }),
        }
    }
}

/// What a layer has to send for many users: for each, a key that they share and a JWT of its own.
pub(crate) struct Supplies {
    /// For requests that want the key without a JWT.
    key_alone: Arc<Supply>,
    tokens: PerSubject,
    /// Tells the layers apart that share the tokens.
    number: u64,
}

impl Supplies {
    pub(crate) fn new(form: Form, key: Option<MaybeRenewing<ApiKey>>, tokens: PerSubject) -> Arc<Self> {
        static NUMBERS: AtomicU64 = AtomicU64::new(1);
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        Arc::new(Self { key_alone: Supply::new(form, false, key, None), tokens, number })
    }

    /// What a request gets that names this user; `None` for one who is not known yet.
    #[inline]
    pub(crate) fn find(
        &self,
        need: Need,
        subject: Option<&Subject>,
    ) -> Result<Option<Arc<Supply>>, AuthError> {
        match (need, subject) {
            (Need::KeyAlone, _) => Ok(Some(Arc::clone(&self.key_alone))),
            (Need::All, Some(subject)) => Ok(self.tokens.find(subject).map(|entry| self.make(&entry))),
            (Need::All, None) => Err(AuthError::local(AuthErrorKind::CredentialUnavailable, NO_SUBJECT)),
        }
    }

    /// The same for anybody.
    #[cold]
    pub(crate) fn of(&self, need: Need, subject: Option<&Subject>) -> Result<Arc<Supply>, AuthError> {
        match (self.find(need, subject)?, subject) {
            (Some(supply), _) => Ok(supply),
            (None, Some(subject)) => match self.tokens.entry(subject) {
                Some(entry) => Ok(self.make(&entry)),
                None => Err(AuthError::renewal(AuthErrorKind::RenewalFailed, FULL, Some(AGAIN), None)),
            },
            (None, None) => Ok(Arc::clone(&self.key_alone)),
        }
    }

    fn make(&self, entry: &Entry) -> Arc<Supply> {
        entry.supply(self.number, |jwt| {
            let Supply { form, as_header, sources, .. } = &*self.key_alone;
            Supply::owned(self.number, *form, *as_header, sources.key.clone(), Some(jwt.into()))
        })
    }

    /// What there is of this user's, or else of everybody's.
    pub(crate) fn last(&self, subject: Option<&Subject>) -> Option<Credentials> {
        let jwt = subject.and_then(|subject| self.tokens.known(subject)?.tokens().current());
        match (self.key_alone.last(), jwt) {
            (Some(key), Some(jwt)) => Some(key.joined(&Credentials::jwt_beside_key(jwt))),
            (key, jwt) => key.or_else(|| jwt.map(Credentials::jwt_beside_key)),
        }
    }

    /// A request has to wait: a moment to look for users who are idle.
    pub(crate) fn sweep(&self) {
        self.tokens.sweep();
    }
}

impl fmt::Debug for Supplies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Supplies")
            .field("key", &self.key_alone.sources.key)
            .field("tokens", &self.tokens)
            .finish_non_exhaustive()
    }
}

/// The part of a set that an API may refuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Key,
    Jwt,
}

/// What is not wanted is there: nothing.
fn demand<C: Credential>(part: Option<&MaybeRenewing<C>>) -> Result<Demand<Option<C>>, AuthError> {
    Ok(match part.map(MaybeRenewing::demand).transpose()? {
        None => Demand::Ready(None),
        Some(Demand::Ready(credential)) => Demand::Ready(Some(credential)),
        Some(Demand::Wait(landed)) => Demand::Wait(landed),
    })
}

fn fixed<C: Credential>(part: Option<&MaybeRenewing<C>>) -> Option<Option<C>> {
    match part {
        None => Some(None),
        Some(MaybeRenewing::Fixed(credential)) => Some(Some(credential.clone())),
        Some(MaybeRenewing::Renewing(_)) => None,
    }
}

fn lease<C: Credential>(part: Option<&MaybeRenewing<C>>) -> Option<(Option<C>, Epoch, Option<Deadline>)> {
    match part {
        None => Some((None, Epoch::default(), None)),
        Some(part) => part.lease().map(|(credential, epoch, until)| (Some(credential), epoch, until)),
    }
}

impl fmt::Debug for Supply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Sources { key, jwt } = &*self.sources;
        f.debug_struct("Supply").field("key", key).field("jwt", jwt).finish_non_exhaustive()
    }
}
