//! What a layer has to send: one consistent set of credentials at a time, of a key and a JWT that may each renew
//! themselves.
//!
//! The set is made when one of the two changes and then shared by all requests, which read it without a lock, for as
//! long as both are in force. No JWT goes with a key that is older than the one it was made with.

use std::{
    fmt,
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll, ready},
    time::Duration,
};

use crate::{
    ApiKey, AuthError, AuthErrorKind, Credentials, PerSubject, Provider, Refreshing, Subject, Token,
    authorize::strip::Former,
    credential::{Copies, Form},
    credential::{Credential, Fingerprint},
    refresh::Entry,
    refresh::{Demand, Epoch, Keeper, Landing, Rejection, Wait},
    util::clock::{Deadline, Time},
    util::sync::ArcSwapOption,
};

const NO_SUBJECT: &str = "the request names no `Subject`, and this layer has a JWT for each";

const FULL: &str = "tokens of as many users as there is room for are being fetched";
const AGAIN: Duration = Duration::from_secs(1);

/// Makes [`Credentials`] of a key and a JWT: for everybody, or for each of many users.
pub(crate) struct Supply {
    form: Form,
    sources: Arc<Sources>,
    whole: Shelf,
    key_alone: Shelf,
    former: Former,
}

/// Where the key and the JWT of a set come from; without the JWT where each user has its own.
pub(crate) struct Sources {
    key: Option<Provider<ApiKey>>,
    jwt: Option<Provider<Token>>,
}

/// Whose set it is.
#[derive(Clone)]
pub(crate) enum Whose {
    Everybodys,
    /// One user's, with a JWT of its own.
    Users(Arc<Entry>),
}

/// Whose set a request gets.
pub(crate) struct Found {
    pub(crate) whose: Whose,
    /// By the clocks of users, where they have been read.
    pub(crate) now: Option<Time>,
}

/// What a request needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    All,
    KeyAlone,
}

/// Where a set came from. One that was sent keeps it, so that what is refused of it can be renewed whatever has become of
/// the layer's own by then.
#[derive(Clone)]
pub(crate) struct Provenance {
    sources: Arc<Sources>,
    /// The user's own.
    jwt: Option<Refreshing<Token>>,
    /// `None` where it was in force but for a moment.
    term: Option<Term>,
}

/// For how long a set is in force: as long as the key and the JWT are what they were, and until they may be others.
#[derive(Clone, Copy)]
struct Term {
    epochs: [Epoch; 2],
    until: Option<Deadline>,
}

type Shelf = ArcSwapOption<Made>;

/// A set for everybody.
struct Made {
    credentials: Copies,
    term: Term,
}

/// A set that is waited for.
pub(crate) struct Waiting {
    need: Need,
    whose: Whose,
    /// Of the key and of the JWT, as far as they are running.
    renewals: [Option<Wait>; 2],
}

/// A set, or what to wait for.
pub(crate) enum Supplied {
    Ready(Credentials),
    Wait(Waiting),
}

impl Supply {
    pub(crate) fn new(form: Form, key: Option<Provider<ApiKey>>, jwt: Option<Provider<Token>>) -> Arc<Self> {
        let sources = Arc::new(Sources { key, jwt });
        let this = Arc::new(Self {
            form,
            sources,
            whole: Shelf::empty(),
            key_alone: Shelf::empty(),
            former: Former::default(),
        });
        this.sources.kept_by(&this);
        this
    }

    /// The set, if nothing has to be asked about it. `now`: for a user's, where the clocks have just been read.
    #[inline]
    pub(crate) fn fresh(&self, need: Need, whose: &Whose, now: Option<Time>) -> Option<Credentials> {
        match whose {
            Whose::Everybodys => self.fresh_for_all(need),
            Whose::Users(entry) => entry.kept().load(|from| {
                let now = || now.or_else(|| Some(entry.tokens().now()));
                // Layers may share users, and each writes its own over the others'.
                Arc::ptr_eq(&from.sources, &self.sources)
                    && from.term.as_ref().is_some_and(|term| term.is_in_force(self.epochs(need, whose), now))
            }),
        }
    }

    /// Everybody's.
    #[inline]
    pub(crate) fn fresh_for_all(&self, need: Need) -> Option<Credentials> {
        let shelf = self.shelf(need).load();
        let made = shelf.as_deref()?;
        made.term
            .is_in_force(self.epochs(need, &Whose::Everybodys), || self.now())
            .then(|| made.credentials.local().clone())
    }

    /// What there is for everybody, fresh or not.
    pub(crate) fn last(&self) -> Option<Credentials> {
        if let Some(made) = self.whole.load().as_deref() {
            return Some(made.credentials.local().clone());
        }
        let key = self.sources.key.as_ref().and_then(Provider::current);
        let jwt = self.sources.jwt.as_ref().and_then(Provider::current);
        (key.is_some() || jwt.is_some()).then(|| self.make(Need::All, &Whose::Everybodys, key, jwt, None))
    }

    /// The set, or what to wait for; starts renewals if need be.
    pub(crate) fn demand(&self, need: Need, whose: &Whose) -> Result<Supplied, AuthError> {
        let source_of_key = self.sources.key.as_ref();
        if need == Need::KeyAlone && source_of_key.is_none() {
            return Ok(Supplied::Ready(Credentials::beside()));
        }
        let source_of_jwt = self.jwt(need, whose);
        let source_of_jwt = source_of_jwt.as_ref();
        loop {
            // First the JWT, here and below: the key that is read after it is no older than the one it was made with.
            let jwt = demand(source_of_jwt)?;
            let key = demand(source_of_key)?;
            let (jwt, key) = match (jwt, key) {
                (Demand::Ready(jwt), Demand::Ready(key)) => (jwt, key),
                (jwt, key) => {
                    let renewals = [key.landing(), jwt.landing()].map(|landing| landing.map(Wait::new));
                    return Ok(Supplied::Wait(Waiting { need, whose: whose.clone(), renewals }));
                }
            };

            let (jwt, key, term) = match (lease(source_of_jwt), lease(source_of_key)) {
                (Some((jwt, jwt_epoch, jwt_until)), Some((key, key_epoch, key_until))) => {
                    let until = match (key_until, jwt_until) {
                        (Some(key), Some(jwt)) => Some(key.earlier(jwt)),
                        (key, jwt) => key.or(jwt),
                    };
                    (jwt, key, Some(Term { epochs: [key_epoch, jwt_epoch], until }))
                }
                _ => (jwt, key, None),
            };
            // Where the JWT is gone by now, it may have gone before the key came: they were never a pair.
            if !self.has_still(source_of_jwt, jwt.as_ref()) {
                continue;
            }
            let credentials = self.make(need, whose, key, jwt, term);
            if let Some(term) = term {
                self.keep(need, whose, &credentials, term);
            }
            return Ok(Supplied::Ready(credentials));
        }
    }

    /// Whether `jwt` is the one there is, where there is a key that may change beside it.
    fn has_still(&self, source: Option<&Provider<Token>>, jwt: Option<&Token>) -> bool {
        let (Some(Provider::Refreshing(_)), Some(own), Some(jwt)) = (&self.sources.key, source, jwt) else {
            return true;
        };
        own.current().is_some_and(|current| current.secret.fingerprint() == jwt.secret.fingerprint())
    }

    fn make(
        &self,
        need: Need,
        whose: &Whose,
        key: Option<ApiKey>,
        jwt: Option<Token>,
        term: Option<Term>,
    ) -> Credentials {
        let form = self.form_of(need, key.is_some(), jwt.is_some());
        let own = match whose {
            Whose::Everybodys => None,
            Whose::Users(entry) => Some(entry.tokens().clone()),
        };
        let from = Provenance { sources: Arc::clone(&self.sources), jwt: own, term };
        Credentials::supplied(form, key, jwt, from)
    }

    fn keep(&self, need: Need, whose: &Whose, credentials: &Credentials, term: Term) {
        match whose {
            Whose::Everybodys => {
                let made = Made { credentials: Copies::of(credentials.clone()), term };
                self.shelf(need).store(Some(Arc::new(made)));
            }
            // One user's requests are few, and users are many.
            Whose::Users(entry) => entry.kept().store(Some(credentials.clone())),
        }
        // Whoever let go of what was kept may have done so a moment before.
        if term.epochs != self.epochs(need, whose) {
            match whose {
                Whose::Everybodys => self.shelf(need).store(None),
                Whose::Users(entry) => entry.kept().store(None),
            }
        }
    }

    /// Of a set with or without a key and a JWT.
    fn form_of(&self, need: Need, key: bool, jwt: bool) -> Form {
        match (self.form, key, jwt) {
            (_, false, _) => Form::JwtHalf,
            (Form::Pair, true, true) => Form::Pair,
            (Form::KeyHalf, true, _) if need == Need::All => Form::KeyHalf,
            (Form::Header, true, _) => Form::Header,
            (_, true, _) => Form::Bearer,
        }
    }

    pub(crate) fn form(&self) -> Form {
        self.form
    }

    /// What was replaced by what there is.
    pub(crate) fn former(&self) -> &Former {
        &self.former
    }

    /// The set, if none of it is ever another.
    pub(crate) fn fixed(&self) -> Option<Credentials> {
        let (key, jwt) = (fixed(self.sources.key.as_ref())?, fixed(self.sources.jwt.as_ref())?);
        Some(Credentials::new(self.form_of(Need::All, key.is_some(), jwt.is_some()), key, jwt))
    }

    fn jwt(&self, need: Need, whose: &Whose) -> Option<Provider<Token>> {
        match (need, whose) {
            (Need::KeyAlone, _) => None,
            (Need::All, Whose::Everybodys) => self.sources.jwt.clone(),
            (Need::All, Whose::Users(entry)) => Some(entry.tokens().into()),
        }
    }

    #[inline]
    fn epochs(&self, need: Need, whose: &Whose) -> [Epoch; 2] {
        let Sources { key, jwt } = &*self.sources;
        let jwt = match (need, whose) {
            (Need::KeyAlone, _) => Epoch::default(),
            (Need::All, Whose::Everybodys) => epoch(jwt.as_ref()),
            (Need::All, Whose::Users(entry)) => entry.tokens().epoch(),
        };
        [epoch(key.as_ref()), jwt]
    }

    /// Either engine's time does.
    #[inline]
    fn now(&self) -> Option<Time> {
        let Sources { key, jwt } = &*self.sources;
        let now = jwt.as_ref().and_then(Provider::now);
        now.or_else(|| key.as_ref().and_then(Provider::now))
    }

    #[inline]
    fn shelf(&self, need: Need) -> &Shelf {
        match need {
            Need::All => &self.whole,
            Need::KeyAlone => &self.key_alone,
        }
    }
}

/// Nobody may ask for the sets again, and what is in them is to be wiped.
impl Keeper for Supply {
    fn let_go(&self, former: Option<Fingerprint>) {
        if let Some(former) = former {
            self.former.remember(former);
        }
        self.whole.store(None);
        self.key_alone.store(None);
    }
}

impl Term {
    #[inline]
    fn is_in_force(&self, epochs: [Epoch; 2], now: impl FnOnce() -> Option<Time>) -> bool {
        let has_come = |until: Deadline| now().is_none_or(|now| until.has_come(now));
        self.epochs == epochs && !self.until.is_some_and(has_come)
    }
}

impl Sources {
    fn kept_by<K: Keeper + 'static>(&self, keeper: &Arc<K>) {
        let keeper = Arc::downgrade(keeper);
        let keeper: Weak<dyn Keeper> = keeper;
        if let Some(key) = &self.key {
            key.kept_by(&keeper);
        }
        if let Some(jwt) = &self.jwt {
            jwt.kept_by(&keeper);
        }
    }
}

impl Provenance {
    fn jwt(&self) -> Option<Provider<Token>> {
        self.jwt.as_ref().map(Provider::from).or_else(|| self.sources.jwt.clone())
    }

    /// The API refused `sent`; whether its `part` can be another by now, and what to wait for until then.
    pub(crate) fn reject(&self, part: Part, sent: &Credentials) -> (Rejection, Option<Landing>) {
        let ignored = (Rejection::Ignored, None);
        match part {
            Part::Key => match (&self.sources.key, sent.api_key()) {
                (Some(key), Some(sent)) => key.reject(sent.0.fingerprint()),
                _ => ignored,
            },
            Part::Jwt => match (self.jwt(), sent.jwt()) {
                (Some(jwt), Some(sent)) => jwt.reject(sent.secret.fingerprint()),
                _ => ignored,
            },
        }
    }

    /// The API took another than the `part` of `refused`.
    pub(crate) fn accept(&self, part: Part, refused: &Credentials) {
        match part {
            Part::Key => {
                if let (Some(key), Some(refused)) = (&self.sources.key, refused.api_key()) {
                    key.accept(refused.0.fingerprint());
                }
            }
            Part::Jwt => {
                if let (Some(jwt), Some(refused)) = (self.jwt(), refused.jwt()) {
                    jwt.accept(refused.secret.fingerprint());
                }
            }
        }
    }

    /// Whether `part` is there and is not what was sent.
    pub(crate) fn has_other(&self, part: Part, sent: &Credentials) -> bool {
        match part {
            Part::Key => self.sources.key.as_ref().and_then(Provider::current).is_some_and(|key| {
                Some(key.0.fingerprint()) != sent.api_key().map(|sent| sent.0.fingerprint())
            }),
            Part::Jwt => self.jwt().and_then(|jwt| jwt.current()).is_some_and(|jwt| {
                Some(jwt.secret.fingerprint()) != sent.jwt().map(|sent| sent.secret.fingerprint())
            }),
        }
    }
}

/// What a layer has to send for many users: for each, a key that they share and a JWT of its own.
pub(crate) struct Supplies {
    supply: Arc<Supply>,
    tokens: PerSubject,
}

impl Supplies {
    pub(crate) fn new(form: Form, key: Option<Provider<ApiKey>>, tokens: PerSubject) -> Arc<Self> {
        let this = Arc::new(Self { supply: Supply::new(form, key, None), tokens });
        this.supply.sources.kept_by(&this);
        this
    }

    pub(crate) fn supply(&self) -> &Supply {
        &self.supply
    }

    /// Whose set a request gets that names this user; `None` for one who is not known yet.
    #[inline]
    pub(crate) fn find(&self, need: Need, subject: Option<&Subject>) -> Result<Option<Found>, AuthError> {
        match (need, subject) {
            (Need::KeyAlone, _) => Ok(Some(Found { whose: Whose::Everybodys, now: None })),
            (Need::All, Some(subject)) => {
                let now = self.tokens.now();
                let entry = self.tokens.find(subject, now);
                Ok(entry.map(|entry| Found { whose: Whose::Users(entry), now: Some(now) }))
            }
            (Need::All, None) => Err(no_subject()),
        }
    }

    /// The same for one who is not known yet.
    #[cold]
    pub(crate) fn of(&self, subject: Option<&Subject>) -> Result<Found, AuthError> {
        let subject = subject.ok_or_else(no_subject)?;
        let Some(entry) = self.tokens.entry(subject) else {
            return Err(AuthError::renewal(AuthErrorKind::RefreshFailed, FULL, Some(AGAIN), None));
        };
        Ok(Found { whose: Whose::Users(entry), now: None })
    }

    /// What there is of this user's, or else of everybody's.
    pub(crate) fn last(&self, subject: Option<&Subject>) -> Option<Credentials> {
        let entry = subject.and_then(|subject| self.tokens.known(subject));
        let is_ours = |from: &Provenance| Arc::ptr_eq(&from.sources, &self.supply.sources);
        if let Some(credentials) = entry.as_ref().and_then(|entry| entry.kept().load(is_ours)) {
            return Some(credentials);
        }
        let jwt = entry.and_then(|entry| entry.tokens().current());
        match (self.supply.last(), jwt) {
            (Some(key), Some(jwt)) => Some(key.joined(&Credentials::jwt_beside_key(jwt))),
            (key, jwt) => key.or_else(|| jwt.map(Credentials::jwt_beside_key)),
        }
    }

    /// Forgets such of its users' sets; other layers have theirs.
    fn forget(&self, such: impl Fn(&Credentials) -> bool + Send + 'static) {
        let sources = Arc::downgrade(&self.supply.sources);
        self.tokens.let_go(move |credentials| {
            let is_ours = |from: &Provenance| Arc::as_ptr(&from.sources) == sources.as_ptr();
            credentials.provenance().is_some_and(is_ours) && such(credentials)
        });
    }

    /// A request has to wait: a moment to look for users who are idle.
    pub(crate) fn sweep(&self) {
        self.tokens.sweep();
    }
}

/// Users may stay away, and the key that is in their sets is not theirs.
impl Keeper for Supplies {
    fn let_go(&self, _: Option<Fingerprint>) {
        let key = self.supply.sources.key.as_ref().and_then(Provider::current);
        let key = key.map(|key| key.0.fingerprint());
        self.forget(move |credentials| {
            let own = credentials.api_key().map(|own| own.0.fingerprint());
            own.is_some() && own != key
        });
    }
}

/// Others may go on with these users.
impl Drop for Supplies {
    fn drop(&mut self) {
        self.forget(|_| true);
    }
}

impl fmt::Debug for Supplies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Supplies")
            .field("key", &self.supply.sources.key)
            .field("tokens", &self.tokens)
            .finish_non_exhaustive()
    }
}

impl Waiting {
    /// Waits until `supply`, which it is of, has the set.
    pub(crate) fn poll(
        &mut self,
        supply: &Supply,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Credentials, AuthError>> {
        loop {
            for renewal in &mut self.renewals {
                if let Some(wait) = renewal {
                    ready!(Pin::new(wait).poll(cx))?;
                    *renewal = None;
                }
            }
            // Of many who waited, the first makes the set.
            if let Some(credentials) = supply.fresh(self.need, &self.whose, None) {
                return Poll::Ready(Ok(credentials));
            }
            // The one may have been refused while the other was awaited.
            match supply.demand(self.need, &self.whose)? {
                Supplied::Ready(credentials) => return Poll::Ready(Ok(credentials)),
                Supplied::Wait(others) => *self = others,
            }
        }
    }
}

#[cold]
fn no_subject() -> AuthError {
    AuthError::local(AuthErrorKind::CredentialUnavailable, NO_SUBJECT)
}

/// The part of a set that an API may refuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Key,
    Jwt,
}

/// What is not wanted is there: nothing.
fn demand<C: Credential>(part: Option<&Provider<C>>) -> Result<Demand<Option<C>>, AuthError> {
    Ok(match part.map(Provider::demand).transpose()? {
        None => Demand::Ready(None),
        Some(Demand::Ready(credential)) => Demand::Ready(Some(credential)),
        Some(Demand::Wait(landed)) => Demand::Wait(landed),
    })
}

#[inline]
fn epoch<C: Credential>(part: Option<&Provider<C>>) -> Epoch {
    part.map(Provider::epoch).unwrap_or_default()
}

fn fixed<C: Credential>(part: Option<&Provider<C>>) -> Option<Option<C>> {
    match part {
        None => Some(None),
        Some(Provider::Fixed(credential)) => Some(Some(credential.clone())),
        Some(Provider::Refreshing(_)) => None,
    }
}

fn lease<C: Credential>(part: Option<&Provider<C>>) -> Option<(Option<C>, Epoch, Option<Deadline>)> {
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
