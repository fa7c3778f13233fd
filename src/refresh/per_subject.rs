//! Tokens of many users: an engine for each, in a cache that forgets who has not come for a while.

use std::{
    cell::Cell,
    convert::Infallible,
    fmt,
    hash::RandomState,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use quick_cache::{Lifecycle, UnitWeighter, sync::Cache};
use tokio::runtime::Handle;

use crate::{
    Credentials, Provider, RefreshPolicy, Refreshing, Subject, Token,
    credential::Kept,
    source::{DynSource, Source},
    util::clock::Time,
};

const CAPACITY: usize = 131_072;
const EXPECTED: usize = 1_024;
const IDLE: Duration = Duration::from_secs(15 * 60);

/// So many more than there is room for may be fetched at once, and an eighth.
const MARGIN: usize = 64;

/// Room is looked for once in so many milliseconds.
const CLEARING: u64 = 1_000;

/// In each such part of the idle time, those who are idle are looked for once.
const SWEEPS: u32 = 4;

/// Tokens of many users, each renewed like a [`Refreshing`] of its own. Clones are handles of one.
///
/// The layers take it wherever they take a token; each request then names its [`Subject`]. One whose subject is new waits
/// for that user's first token; the others are as quick as with one token, but for a look-up behind a lock that readers
/// share.
///
/// As many users as the [capacity](Self::with_capacity) says are remembered, and who has not come for the
/// [idle time](Self::with_idle_time) is forgotten: a user who comes back then waits once more. One whose token is being
/// fetched is not forgotten, so that there is one renewal at a time for each; when there is no room for others, their
/// requests fail with [`RefreshFailed`](crate::AuthErrorKind::RefreshFailed) until there is.
///
/// ```
/// use http::{Request, Response};
/// use tower::{Layer, ServiceExt, service_fn};
/// use tower_selam::{ApiKey, BoxError, JwtLayer, PerSubject, Subject, Token, source::{Reason, source_fn}};
///
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// // A source for each: of a token exchange, or of a signer, or of your own code.
/// let tokens = PerSubject::new(|subject: &Subject| {
///     let user = subject.clone();
///     source_fn(move |_: Reason<Token>| {
///         let jwt = format!("jwt.of.{}", user.as_str());
///         async { Ok::<_, BoxError>(Token::new(jwt)?) }
///     })
/// });
///
/// let client = service_fn(|request: Request<()>| async move {
///     assert_eq!(request.headers()["authorization"], "Bearer jwt.of.user-7");
///     Ok::<_, BoxError>(Response::new(()))
/// });
/// let service = JwtLayer::new(tokens, ApiKey::new("sk-selam-example")?).layer(client);
/// let request = Request::get("https://api.selamgpt.com/v1/models").extension(Subject::new("user-7")).body(())?;
/// service.oneshot(request).await?;
/// # Ok::<(), BoxError>(())
/// # }).unwrap();
/// ```
///
/// A source is made anew for a user who was forgotten. Where users have refresh tokens, make the
/// [`OAuthSource`](crate::oauth::OAuthSource) of each once, at the login, and return clones of it: they share what is
/// known of the refresh token.
#[derive(Clone)]
pub struct PerSubject(Arc<Subjects>);

struct Subjects {
    entries: Cache<Subject, Arc<Entry>, UnitWeighter, RandomState, Renewals>,
    source_of: Arc<SourceOf>,
    policy: Arc<RefreshPolicy>,
    capacity: usize,
    idle: Duration,
    began: Time,
    /// When idle ones were last looked for, in milliseconds since the beginning.
    swept: AtomicU64,
    /// When room was last looked for.
    cleared: AtomicU64,
}

type SourceOf = dyn Fn(&Subject) -> Arc<dyn DynSource<Token>> + Send + Sync;

/// What is known of a user.
pub(crate) struct Entry {
    tokens: Refreshing<Token>,
    /// When it was last asked for, in milliseconds since the beginning.
    used: AtomicU64,
    /// What the layer that was last asked made of it.
    kept: Kept,
}

/// Keeps those who are being served, and those whose token is being fetched.
#[derive(Clone)]
struct Renewals;

impl Lifecycle<Subject, Arc<Entry>> for Renewals {
    type RequestState = ();

    fn is_pinned(&self, _: &Subject, entry: &Arc<Entry>) -> bool {
        Arc::strong_count(entry) > 1 || entry.is_needed()
    }
}

impl PerSubject {
    /// Tokens from a source for each subject, which `source_of` makes when the subject first comes. It should be quick:
    /// whoever asks for the same subject meanwhile waits for it.
    #[must_use]
    pub fn new<S: Source<Token>>(source_of: impl Fn(&Subject) -> S + Send + Sync + 'static) -> Self {
        let source_of =
            Arc::new(move |subject: &Subject| Arc::new(source_of(subject)) as Arc<dyn DynSource<Token>>);
        Self::of(source_of, Arc::default(), CAPACITY, IDLE)
    }

    fn of(source_of: Arc<SourceOf>, policy: Arc<RefreshPolicy>, capacity: usize, idle: Duration) -> Self {
        // It allocates for as many as it is told to expect, and has as many locks as they are worth.
        let expected = capacity.min(EXPECTED);
        let entries =
            Cache::with(expected, capacity.max(1) as u64, UnitWeighter, RandomState::new(), Renewals);
        let began = policy.now();
        Self(Arc::new(Subjects {
            entries,
            source_of,
            policy,
            capacity,
            idle,
            began,
            swept: AtomicU64::new(0),
            cleared: AtomicU64::new(0),
        }))
    }

    /// Other windows, back-off or timeout, the same for all subjects. To be set before the first is asked for: who was
    /// is forgotten.
    #[must_use]
    pub fn with_policy(self, policy: RefreshPolicy) -> Self {
        let Subjects { source_of, capacity, idle, .. } = &*self.0;
        Self::of(Arc::clone(source_of), Arc::new(policy), *capacity, *idle)
    }

    /// About how many subjects are remembered; 131,072 by default. They are spread over parts with a lock each, which are
    /// not full at the very same time. To be set before the first is asked for.
    #[must_use]
    pub fn with_capacity(self, subjects: usize) -> Self {
        let Subjects { source_of, policy, idle, .. } = &*self.0;
        Self::of(Arc::clone(source_of), Arc::clone(policy), subjects, *idle)
    }

    /// For how long a subject is remembered that nobody asks for; 15 minutes by default, and up to a quarter more, as
    /// idle ones are looked for when others are fetched. To be set before the first is asked for.
    #[must_use]
    pub fn with_idle_time(self, time: Duration) -> Self {
        let Subjects { source_of, policy, capacity, .. } = &*self.0;
        Self::of(Arc::clone(source_of), Arc::clone(policy), *capacity, time)
    }

    /// The subject's tokens, for use without HTTP: to [`prefetch`](Refreshing::prefetch) at a login, say.
    #[must_use]
    pub fn of_subject(&self, subject: &Subject) -> Refreshing<Token> {
        match self.entry(subject) {
            Some(entry) => entry.tokens.clone(),
            // No room: good for who asks, and for nobody else.
            None => self.0.make(subject).tokens.clone(),
        }
    }

    /// Forgets a subject, after a logout or a new login: its next request has a token fetched anew, from a new source.
    /// Requests that are under way keep theirs. Whether it was known.
    pub fn forget(&self, subject: &Subject) -> bool {
        self.0.entries.remove(subject).is_some()
    }

    /// How many subjects are remembered.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.entries.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.entries.is_empty()
    }

    #[inline]
    pub(crate) fn now(&self) -> Time {
        self.0.policy.now()
    }

    /// What is known of a subject that a request has come for.
    #[inline]
    pub(crate) fn find(&self, subject: &Subject, now: Time) -> Option<Arc<Entry>> {
        let entry = self.0.entries.get(subject)?;
        let now = self.0.millis_at(now);
        if entry.used.load(Relaxed) != now {
            entry.used.store(now, Relaxed);
        }
        Some(entry)
    }

    /// What is known of a subject, without asking for its token.
    pub(crate) fn known(&self, subject: &Subject) -> Option<Arc<Entry>> {
        self.0.entries.peek(subject)
    }

    /// The same; if nothing is known yet, it is from now on. `None` when there is no room: those whose token is being
    /// fetched are not forgotten for others.
    pub(crate) fn entry(&self, subject: &Subject) -> Option<Arc<Entry>> {
        if let Some(entry) = self.find(subject, self.now()) {
            return Some(entry);
        }
        self.sweep();
        if self.0.is_overfull() {
            return None;
        }
        let entry = self.0.entries.get_or_insert_with::<_, Infallible>(subject, || Ok(self.0.make(subject)));
        match entry {
            Ok(entry) => Some(entry),
            Err(never) => match never {},
        }
    }

    /// Looks for idle subjects, if it is time to.
    pub(crate) fn sweep(&self) {
        let Subjects { idle, swept, .. } = &*self.0;
        let (now, last) = (self.0.millis(), swept.load(Relaxed));
        let due = now.saturating_sub(last) >= millis(*idle / SWEEPS);
        if !due || swept.compare_exchange(last, now, Relaxed, Relaxed).is_err() {
            return;
        }
        self.later(Subjects::forget_idle);
    }

    /// Forgets such sets.
    pub(crate) fn let_go(&self, such: impl Fn(&Credentials) -> bool + Send + 'static) {
        self.later(move |subjects| {
            for (_, entry) in subjects.entries.iter() {
                entry.kept.forget_if(&such);
            }
        });
    }

    /// Has something done with all of them, of whom there may be many: on a task, where there is a runtime.
    fn later(&self, work: impl FnOnce(&Subjects) + Send + 'static) {
        let subjects = Arc::downgrade(&self.0);
        let work = move || {
            if let Some(subjects) = subjects.upgrade() {
                work(&subjects);
            }
        };
        match Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn(async move { work() })),
            Err(_) => work(),
        }
    }
}

impl Subjects {
    fn make(&self, subject: &Subject) -> Arc<Entry> {
        let tokens = Refreshing::of((self.source_of)(subject), Arc::clone(&self.policy));
        Arc::new(Entry { tokens, used: AtomicU64::new(self.millis()), kept: Kept::nothing() })
    }

    /// Whether there are more than there is room for, as none of them can be forgotten. Of those that can be, who has not
    /// come for longest is, until there is.
    fn is_overfull(&self) -> bool {
        let room = self.capacity.saturating_add(self.capacity / 8).saturating_add(MARGIN);
        if self.entries.len() < room {
            return false;
        }
        // It looks at all of them, so not for each who comes.
        let (now, last) = (self.millis(), self.cleared.load(Relaxed));
        if now.saturating_sub(last) < CLEARING && last != 0 {
            return true;
        }
        self.cleared.store(now.max(1), Relaxed);
        self.forget_longest_idle();
        self.entries.len() >= room
    }

    /// Forgets as many as there are more than the capacity, if so many can be.
    fn forget_longest_idle(&self) {
        let idle = self.entries.iter().filter(|(_, entry)| !entry.is_needed());
        let mut used: Vec<_> = idle.map(|(_, entry)| entry.used.load(Relaxed)).collect();
        let excess = self.entries.len().saturating_sub(self.capacity).min(used.len());
        let Some(at) = excess.checked_sub(1) else { return };
        let (_, &mut last, _) = used.select_nth_unstable(at);
        // Many may have come at the same time.
        let left = Cell::new(excess);
        self.entries.retain(|_, entry| {
            let is_kept = left.get() == 0 || entry.used.load(Relaxed) > last || entry.is_needed();
            if !is_kept {
                left.set(left.get() - 1);
            }
            is_kept
        });
    }

    fn forget_idle(&self) {
        let (now, idle) = (self.millis(), millis(self.idle));
        self.entries
            .retain(|_, entry| now.saturating_sub(entry.used.load(Relaxed)) < idle || entry.is_needed());
    }

    fn millis(&self) -> u64 {
        self.millis_at(self.policy.now())
    }

    #[inline]
    fn millis_at(&self, now: Time) -> u64 {
        millis(now.since(self.began))
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl Entry {
    fn is_needed(&self) -> bool {
        self.tokens.is_renewing()
    }

    pub(crate) fn tokens(&self) -> &Refreshing<Token> {
        &self.tokens
    }

    #[inline]
    pub(crate) fn kept(&self) -> &Kept {
        &self.kept
    }
}

/// Where the JWTs of a layer come from.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum JwtProvider {
    /// One for all requests.
    Shared(Provider<Token>),
    /// One for each user.
    PerSubject(PerSubject),
}

impl From<Token> for JwtProvider {
    fn from(jwt: Token) -> Self {
        Self::Shared(jwt.into())
    }
}

impl From<Refreshing<Token>> for JwtProvider {
    fn from(jwts: Refreshing<Token>) -> Self {
        Self::Shared(jwts.into())
    }
}

impl From<&Refreshing<Token>> for JwtProvider {
    fn from(jwts: &Refreshing<Token>) -> Self {
        Self::Shared(jwts.into())
    }
}

impl From<Provider<Token>> for JwtProvider {
    fn from(jwts: Provider<Token>) -> Self {
        Self::Shared(jwts)
    }
}

impl From<PerSubject> for JwtProvider {
    fn from(tokens: PerSubject) -> Self {
        Self::PerSubject(tokens)
    }
}

impl From<&PerSubject> for JwtProvider {
    fn from(tokens: &PerSubject) -> Self {
        Self::PerSubject(tokens.clone())
    }
}

impl fmt::Debug for PerSubject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PerSubject")
            .field("len", &self.len())
            .field("capacity", &self.0.capacity)
            .finish_non_exhaustive()
    }
}
