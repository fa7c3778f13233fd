//! [`PerSubject`]: one engine for each subject, in a cache that evicts idle ones.

use std::{
    cell::{Cell, OnceCell},
    convert::Infallible,
    fmt,
    hash::RandomState,
    ops::Deref,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use quick_cache::{Lifecycle, UnitWeighter, sync::Cache};
use tokio::runtime::Handle;

use super::{RefreshPolicy, Refreshing, turns::Turns};
use crate::{
    AuthError, AuthErrorKind, Subject, Token,
    source::{DynSource, Source},
    util::clock::Time,
};

const DEFAULT_CAPACITY: usize = 131_072;
const DEFAULT_IDLE_TIME: Duration = Duration::from_secs(15 * 60);
const DEFAULT_CONCURRENCY: usize = 64;

/// For how many subjects the cache allocates up front.
const EXPECTED: usize = 1_024;

/// Subjects that are being refreshed are never evicted: the cache may exceed its capacity by an eighth and this many.
const OVERFLOW: usize = 64;

/// How many times more subjects are remembered than failing ones that were evicted.
const PER_FAILING: usize = 8;

/// How often a full cache is searched for subjects to evict, in milliseconds.
const EVICTION_INTERVAL: u64 = 1_000;

/// How many times per idle time the cache is searched for idle subjects.
const SWEEPS_PER_IDLE_TIME: u32 = 4;

const FULL: &str = "too many subjects are waiting for a token: retry later or raise the capacity";
const RETRY_WHEN_FULL: Duration = Duration::from_secs(1);

/// One token for each of many subjects, each with a [`Refreshing`] engine. Clones are handles of one set.
///
/// The layers take it wherever they take a token; each request then names its [`Subject`]. The first request of a subject
/// waits for its token. Later ones cost one look-up, behind a lock that readers share, more than with a single token.
///
/// The set remembers about as many subjects as its [capacity](Self::with_capacity) and evicts those that were idle for the
/// [idle time](Self::with_idle_time); an evicted subject's next request waits again. A subject whose token is being
/// fetched is not evicted, so that there is one refresh at a time for each. If all of them are, requests of further
/// subjects fail with [`RefreshFailed`](crate::AuthErrorKind::RefreshFailed). A subject whose source failed is remembered
/// until its back-off ends, even after it was evicted, so that the arrival of others does not cause more calls of its source;
/// one for every eight subjects of the capacity, the latest.
///
/// [64](Self::with_concurrency) refreshes run at once; the others wait for their turn.
///
/// ```
/// use http::{Request, Response};
/// use tower::{Layer, ServiceExt, service_fn};
/// use tower_selam::{BoxError, JwtLayer, PerSubject, Subject, Token, source::{Reason, source_fn}};
///
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// // One source per subject: a token exchange, a signer, or your own code.
/// let jwts = PerSubject::new(|subject: &Subject| {
///     let subject = subject.clone();
///     source_fn(move |_: Reason<Token>| {
///         let jwt = format!("jwt.of.{}", subject.as_str());
///         async { Ok::<_, BoxError>(Token::new(jwt)?) }
///     })
/// });
///
/// let client = service_fn(|request: Request<()>| async move {
///     assert_eq!(request.headers()["authorization"], "Bearer jwt.of.user-7");
///     Ok::<_, BoxError>(Response::new(()))
/// });
/// let service = JwtLayer::new(jwts).layer(client);
/// let request = Request::post("https://api.selamgpt.com/v1/chat/completions").extension(Subject::new("user-7")).body(())?;
/// service.oneshot(request).await?;
/// # Ok::<(), BoxError>(())
/// # }).unwrap();
/// ```
///
/// A subject that was evicted gets a new source. If subjects have refresh tokens, create the
/// [`OAuthSource`](crate::oauth::OAuthSource) of each once, at login, and return clones of it: clones share what they know
/// of the refresh token.
#[doc(alias("user", "tenant"))]
#[derive(Clone)]
pub struct PerSubject(Arc<Subjects>);

struct Subjects {
    config: Config,
    engines: Cache<Subject, Arc<Entry>, UnitWeighter, RandomState, Retire>,
    /// Evicted subjects whose back-off has not ended.
    failing: Arc<Failing>,
    turns: Arc<Turns>,
    created: Time,
    /// When idle subjects were last searched for, in milliseconds since `created`.
    swept: AtomicU64,
    /// When a full cache was last searched.
    made_room: AtomicU64,
}

#[derive(Clone)]
struct Config {
    source_of: Arc<SourceOf>,
    policy: Arc<RefreshPolicy>,
    capacity: usize,
    idle: Duration,
    concurrency: usize,
}

type Failing = Cache<Subject, Arc<Entry>>;

type SourceOf = dyn Fn(&Subject) -> Arc<dyn DynSource<Token>> + Send + Sync;

#[derive(Debug)]
struct Entry {
    engine: Refreshing<Token>,
    /// When it was last used, in milliseconds since the set was created.
    used: AtomicU64,
}

/// The engine of a subject. The subject is not evicted while this is held.
#[derive(Clone, Debug)]
pub(crate) struct SubjectEngine(Arc<Entry>);

impl Deref for SubjectEngine {
    type Target = Refreshing<Token>;

    #[inline]
    fn deref(&self) -> &Refreshing<Token> {
        &self.0.engine
    }
}

/// Keeps subjects in the cache that are being served or refreshed, and remembers the failing ones that are evicted.
#[derive(Clone)]
struct Retire(Arc<Failing>);

impl Lifecycle<Subject, Arc<Entry>> for Retire {
    type RequestState = ();

    fn is_pinned(&self, _: &Subject, entry: &Arc<Entry>) -> bool {
        Arc::strong_count(entry) > 1 || entry.engine.0.is_refreshing()
    }

    fn on_evict(&self, (): &mut (), subject: Subject, entry: Arc<Entry>) {
        if entry.engine.0.is_backed_off() {
            self.0.insert(subject, entry);
        }
    }
}

impl PerSubject {
    /// Creates a set. `source_of` makes the source of a subject when the subject is first seen. It should be quick:
    /// concurrent requests of the same subject wait for it.
    #[must_use]
    pub fn new<S: Source<Token>>(source_of: impl Fn(&Subject) -> S + Send + Sync + 'static) -> Self {
        Self::build(Config {
            source_of: Arc::new(move |subject| Arc::new(source_of(subject))),
            policy: Arc::default(),
            capacity: DEFAULT_CAPACITY,
            idle: DEFAULT_IDLE_TIME,
            concurrency: DEFAULT_CONCURRENCY,
        })
    }

    fn build(config: Config) -> Self {
        let cache = |capacity: usize| (capacity.min(EXPECTED), capacity.max(1) as u64);
        let (expected, weight) = cache(config.capacity.div_ceil(PER_FAILING));
        let failing = Arc::new(Failing::with_weighter(expected, weight, UnitWeighter));
        let (expected, weight) = cache(config.capacity);
        let retire = Retire(Arc::clone(&failing));
        let engines = Cache::with(expected, weight, UnitWeighter, RandomState::new(), retire);
        Self(Arc::new(Subjects {
            engines,
            failing,
            turns: Arc::new(Turns::new(config.concurrency)),
            created: config.policy.now(),
            swept: AtomicU64::new(0),
            made_room: AtomicU64::new(0),
            config,
        }))
    }

    /// Sets windows, back-off and timeout for all subjects. Call it before the set is used: it starts an empty one.
    #[must_use]
    pub fn with_policy(self, policy: RefreshPolicy) -> Self {
        Self::build(Config { policy: Arc::new(policy), ..self.0.config.clone() })
    }

    /// Sets about how many subjects are remembered; 131,072 by default. The cache consists of parts, which do not fill up
    /// at exactly the same time. Call it before the set is used: it starts an empty one.
    #[must_use]
    pub fn with_capacity(self, subjects: usize) -> Self {
        Self::build(Config { capacity: subjects, ..self.0.config.clone() })
    }

    /// Sets how long an idle subject is remembered; 15 minutes by default, plus up to a quarter, because requests search for
    /// idle subjects four times in that period. Call it before the set is used: it starts an empty one.
    #[must_use]
    pub fn with_idle_time(self, time: Duration) -> Self {
        Self::build(Config { idle: time, ..self.0.config.clone() })
    }

    /// Sets how many refreshes run at once; 64 by default, at least one. After a restart, when no subject has a token, the
    /// token endpoint is not asked for all of them at once.
    ///
    /// The others wait in the order in which they came; their [timeout](RefreshPolicy::with_timeout) starts when their turn
    /// has come. A refresh that another refresh of the set waits for does not wait for its turn and does not count. Call it
    /// before the set is used: it starts an empty one.
    #[must_use]
    pub fn with_concurrency(self, refreshes: usize) -> Self {
        Self::build(Config { concurrency: refreshes, ..self.0.config.clone() })
    }

    /// Returns the engine of a subject, for use without HTTP: to [`prefetch`](Refreshing::prefetch) at login, for example.
    #[must_use]
    pub fn of_subject(&self, subject: &Subject) -> Refreshing<Token> {
        match self.engine(subject, &OnceCell::new()) {
            Ok(engine) => Refreshing::clone(&engine),
            // The cache is full: an engine for this caller alone.
            Err(_) => self.0.create(subject).engine.clone(),
        }
    }

    /// Forgets a subject, after a logout or a new login: its next request fetches a token from a new source. Requests under
    /// way keep theirs. Returns whether the subject was known.
    pub fn forget(&self, subject: &Subject) -> bool {
        let failing = self.0.failing.remove(subject).is_some();
        self.0.engines.remove(subject).is_some() || failing
    }

    /// Returns how many subjects are remembered.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.engines.len() + self.0.failing.len()
    }

    /// Returns whether no subject is remembered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The engine of a subject; creates it if the subject is new. Evicts idle subjects, if it is time to.
    #[inline]
    pub(crate) fn engine(&self, subject: &Subject, now: &OnceCell<Time>) -> Result<SubjectEngine, AuthError> {
        let now = millis(now.get_or_init(|| self.0.config.policy.now()).since(self.0.created));
        self.sweep(now);
        match self.find(subject, now) {
            Some(entry) => Ok(SubjectEngine(entry)),
            None => self.insert(subject).map(SubjectEngine),
        }
    }

    /// The current token of a known subject.
    pub(crate) fn current(&self, subject: &Subject) -> Option<Token> {
        let Subjects { engines, failing, .. } = &*self.0;
        engines.peek(subject).or_else(|| failing.peek(subject))?.engine.current()
    }

    #[inline]
    fn find(&self, subject: &Subject, now: u64) -> Option<Arc<Entry>> {
        let entry = self.0.engines.get(subject)?;
        if entry.used.load(Relaxed) != now {
            entry.used.store(now, Relaxed);
        }
        Some(entry)
    }

    #[cold]
    fn insert(&self, subject: &Subject) -> Result<Arc<Entry>, AuthError> {
        if self.0.is_full() {
            let policy = &self.0.config.policy;
            let retry = policy.countdown(policy.now().after(RETRY_WHEN_FULL));
            return Err(AuthError::refresh_failure(AuthErrorKind::RefreshFailed, FULL, Some(retry), None));
        }
        let retired = || Some(self.0.failing.remove(subject)?.1);
        let create = || Ok(retired().unwrap_or_else(|| self.0.create(subject)));
        let Ok(entry) = self.0.engines.get_or_insert_with::<_, Infallible>(subject, create);
        Ok(entry)
    }

    /// Evicts idle subjects, if it is time to; on a task if there is a runtime, because there may be many.
    #[inline]
    fn sweep(&self, now: u64) {
        let Subjects { config, swept, .. } = &*self.0;
        let last = swept.load(Relaxed);
        let is_due = now.saturating_sub(last) >= millis(config.idle / SWEEPS_PER_IDLE_TIME);
        if !is_due || swept.compare_exchange(last, now, Relaxed, Relaxed).is_err() {
            return;
        }
        let subjects = Arc::downgrade(&self.0);
        let evict = move || {
            if let Some(subjects) = subjects.upgrade() {
                subjects.evict_idle();
            }
        };
        match Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn(async move { evict() })),
            Err(_) => evict(),
        }
    }
}

impl Subjects {
    fn create(&self, subject: &Subject) -> Arc<Entry> {
        let Config { source_of, policy, .. } = &self.config;
        let engine = Refreshing::of_subject(source_of(subject), Arc::clone(policy), Arc::clone(&self.turns));
        Arc::new(Entry { engine, used: AtomicU64::new(self.millis()) })
    }

    /// Whether the cache has no room for another subject, even after evicting those that can be evicted.
    fn is_full(&self) -> bool {
        let capacity = self.config.capacity;
        let limit = capacity.saturating_add(capacity / 8).saturating_add(OVERFLOW);
        if self.engines.len() < limit {
            return false;
        }
        // The search visits all subjects, so it is not done for each new one.
        let (now, last) = (self.millis(), self.made_room.load(Relaxed));
        if now.saturating_sub(last) < EVICTION_INTERVAL && last != 0 {
            return true;
        }
        self.made_room.store(now.max(1), Relaxed);
        self.evict_least_recently_used();
        self.engines.len() >= limit
    }

    /// Evicts down to the capacity, as far as subjects can be evicted.
    fn evict_least_recently_used(&self) {
        let evictable = self.engines.iter().filter(|(_, entry)| !entry.engine.0.is_refreshing());
        let mut used: Vec<_> = evictable.map(|(_, entry)| entry.used.load(Relaxed)).collect();
        let excess = self.engines.len().saturating_sub(self.config.capacity).min(used.len());
        let Some(at) = excess.checked_sub(1) else { return };
        let (_, &mut latest, _) = used.select_nth_unstable(at);
        // Several may have been used in the same millisecond.
        let left = Cell::new(excess);
        self.evict(|entry| {
            let is_evicted = left.get() > 0 && entry.used.load(Relaxed) <= latest;
            left.set(left.get() - usize::from(is_evicted));
            is_evicted
        });
    }

    fn evict_idle(&self) {
        let (now, idle) = (self.millis(), millis(self.config.idle));
        self.failing.retain(|_, entry| entry.engine.0.is_backed_off());
        self.evict(|entry| now.saturating_sub(entry.used.load(Relaxed)) >= idle);
    }

    /// Evicts the subjects that `is_evicted` names, except those that are being refreshed.
    fn evict(&self, is_evicted: impl Fn(&Entry) -> bool) {
        self.engines.retain(|subject, entry| {
            if entry.engine.0.is_refreshing() || !is_evicted(entry) {
                return true;
            }
            if entry.engine.0.is_backed_off() {
                self.failing.insert(subject.clone(), Arc::clone(entry));
            }
            false
        });
    }

    #[inline]
    fn millis(&self) -> u64 {
        millis(self.config.policy.now().since(self.created))
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl fmt::Debug for PerSubject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PerSubject")
            .field("len", &self.len())
            .field("capacity", &self.0.config.capacity)
            .finish_non_exhaustive()
    }
}
