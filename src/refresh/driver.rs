//! The core's decisions, carried out: one lock around the core, one task per renewal, and what requests read
//! without either.

#[cfg(all(test, model))]
#[path = "loom_tests.rs"]
mod loom_tests;

use std::{
    fmt::Write as _,
    future::poll_fn,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::pin,
    sync::{Arc, OnceLock, PoisonError, Weak},
    task::Poll,
    time::Duration,
};

use tokio::{
    runtime::{Handle as Timers, RuntimeFlavor},
    time::timeout,
};

use super::{
    RefreshPolicy,
    in_flight::{InFlight, Landing, Wait, Word},
    lease::{Epoch, Lease, Published},
    schedule::{Offer, Unfit},
    state::{Answer, Brought, Core, Finish, Outcome, Rejection, Start, Trouble, Value},
};
use crate::{
    AuthError, AuthErrorKind,
    credential::{Credential, Fingerprint},
    source::{DynSource, Fetched, Reason, SourceError},
    telemetry::event::{self, Renewal, Shown},
    util::clock::Time,
    util::sync::{AbortHandle, Handle, Mutex, MutexGuard, task_local},
};

const OWN_SOURCE: &str = "the source of this credential waits for the credential itself; have it send its \
     requests with `RequestAuth::Anonymous` or `RequestAuth::ApiKey`";
const NO_RUNTIME: &str = "a renewal needs a tokio runtime, and there is none here";
const NO_TIME: &str = "a renewal needs a tokio runtime with its timers enabled";
const TOO_SHORT: &str = "the source's tokens do not live as long as was asked for";

/// What all handles of one engine share.
pub(super) struct Shared<C: Credential> {
    /// What a request reads, and all of it while the credential is fresh.
    published: Published<C>,
    state: Mutex<State<C>>,
    source: Arc<dyn DynSource<C>>,
    policy: Arc<RefreshPolicy>,
    in_use: C::InUse,
}

struct State<C> {
    core: Core<C, AuthError>,
    flight: Option<Box<Flight>>,
    /// In the engine of a user's tokens there are none.
    keepers: Option<Box<Keepers>>,
}

#[derive(Default)]
struct Keepers(Vec<Weak<dyn Keeper>>);

impl Keepers {
    fn add(&mut self, keeper: &Weak<dyn Keeper>) {
        // Those that are gone are looked for before the room is doubled, and not each time.
        if self.0.len() == self.0.capacity() {
            self.0.retain(|keeper| keeper.strong_count() > 0);
        }
        self.0.push(Weak::clone(keeper));
    }

    fn there(&mut self) -> Vec<Arc<dyn Keeper>> {
        self.0.retain(|keeper| keeper.strong_count() > 0);
        self.0.iter().filter_map(Weak::upgrade).collect()
    }
}

/// A credential that was replaced, and who is to be told.
struct Replaced {
    former: Option<Fingerprint>,
    keepers: Vec<Arc<dyn Keeper>>,
}

impl Replaced {
    /// Without the lock: what goes may be the last of other things.
    fn tell(self) {
        self.keepers.iter().for_each(|keeper| keeper.let_go(self.former));
    }
}

/// Who keeps what it made of the credential, to use it again.
pub(crate) trait Keeper: Send + Sync {
    /// The credential is another now, or none: what was made of the former, if there was one, is to go.
    fn let_go(&self, former: Option<Fingerprint>);
}

/// The renewal that is running.
struct Flight {
    landing: Landing,
    task: Arc<OnceLock<AbortHandle>>,
}

/// What a caller has to do.
pub(crate) enum Demand<C> {
    Ready(C),
    Wait(Landing),
}

impl<C> Demand<C> {
    pub(crate) fn landing(self) -> Option<Landing> {
        match self {
            Self::Ready(_) => None,
            Self::Wait(landing) => Some(landing),
        }
    }
}

task_local! {
    /// The engines that the present task renews for.
    static RENEWING: Arc<Renewals>;
}

/// An engine and the ones whose sources asked for it.
#[derive(Debug)]
struct Renewals {
    engine: usize,
    on_behalf_of: Option<Arc<Self>>,
}

impl Renewals {
    fn contain(&self, engine: usize) -> bool {
        self.engine == engine || self.on_behalf_of.as_ref().is_some_and(|outer| outer.contain(engine))
    }
}

pub(super) fn is_renewed_by_this_task(engine: usize) -> bool {
    RENEWING.try_with(|renewals| renewals.contain(engine)).unwrap_or(false)
}

#[cold]
pub(super) fn own_source() -> AuthError {
    AuthError::renewal(AuthErrorKind::RefreshFailed, OWN_SOURCE, None, None)
}

/// Runs `task` for the renewals that the present task runs for.
pub(crate) fn on_behalf<F: Future>(task: F) -> impl Future<Output = F::Output> {
    let renewals = RENEWING.try_with(Arc::clone).ok();
    async move {
        match renewals {
            Some(renewals) => RENEWING.scope(renewals, task).await,
            None => task.await,
        }
    }
}

impl<C: Credential> Shared<C> {
    pub(super) fn new(source: Arc<dyn DynSource<C>>, policy: Arc<RefreshPolicy>) -> Arc<Self> {
        let core = Core::new(Arc::clone(&policy), fastrand::u64(..));
        let state = Mutex::new(State { core, flight: None, keepers: None });
        let (published, in_use) = (Published::new(), C::InUse::default());
        Arc::new(Self { published, state, source, policy, in_use })
    }

    /// The credential, if nothing has to be asked about it.
    #[inline]
    pub(super) fn fresh(&self) -> Option<C> {
        self.published.load(|lease| (!lease.until.has_come(self.now())).then(|| lease.value.clone()))
    }

    /// The same, with the time until which nothing has to be asked.
    pub(super) fn lease(&self) -> Option<Lease<C>> {
        self.published.load(|lease| (!lease.until.has_come(self.now())).then(|| lease.clone()))
    }

    /// Moves whenever what [`fresh`](Self::fresh) reads changes.
    #[inline]
    pub(super) fn epoch(&self) -> Epoch {
        self.published.epoch()
    }

    #[inline]
    pub(super) fn now(&self) -> Time {
        self.policy.now()
    }

    /// The credential and until when it may be used without asking again; or what to wait for.
    pub(super) fn demand(self: &Arc<Self>, lasting: Duration) -> Result<Demand<C>, AuthError> {
        let (mut state, version) = self.state_and_version();
        let now = self.now();
        let (answer, start) = state.core.demand(now, lasting, version);
        let takeoff = start.map(|start| self.prepare(&mut state, start, Word::new()));
        let demand = match answer {
            Answer::Serve(value) => Ok(Demand::Ready(value)),
            Answer::Fail(error) => Err(error),
            Answer::TooShort => Err(AuthError::local(AuthErrorKind::CredentialUnavailable, TOO_SHORT)),
            Answer::Wait if is_renewed_by_this_task(self.address()) => Err(own_source()),
            Answer::Wait => match &state.flight {
                Some(flight) => Ok(Demand::Wait(flight.landing.clone())),
                None => Err(AuthError::renewal(AuthErrorKind::RefreshFailed, "", None, None)),
            },
        };
        let replaced = self.publish(state, now);
        if let Some(takeoff) = takeoff {
            self.take_off(takeoff);
        }
        replaced.tell();
        demand
    }

    /// A credential that is good for `lasting` at least, after a renewal if need be.
    pub(super) async fn obtain(self: &Arc<Self>, lasting: Duration) -> Result<C, AuthError> {
        loop {
            match self.demand(lasting)? {
                Demand::Ready(credential) => return Ok(credential),
                Demand::Wait(landing) => Wait::new(landing).await?,
            }
        }
    }

    /// The API refused this one: forget it if it is still the present one, and fetch another.
    ///
    /// What to wait for, if anything.
    pub(super) fn reject(
        self: &Arc<Self>,
        fingerprint: Fingerprint,
        insist: bool,
    ) -> (Rejection, Option<Landing>) {
        let (mut state, version) = self.state_and_version();
        let now = self.now();
        let (rejection, start) = state.core.reject(now, fingerprint, insist, version);
        let takeoff = start.map(|start| self.prepare(&mut state, start, Word::new()));
        let landing = match rejection {
            Rejection::Refreshing if !is_renewed_by_this_task(self.address()) => {
                state.flight.as_ref().map(|flight| flight.landing.clone())
            }
            _ => None,
        };
        let replaced = self.publish(state, now);
        if let Some(takeoff) = takeoff {
            self.take_off(takeoff);
        }
        replaced.tell();
        (rejection, landing)
    }

    /// The API took what came after `refused`.
    pub(super) fn accept(&self, refused: Fingerprint) {
        self.state().core.accept(refused);
    }

    /// The credential there is, fresh or not, and when it expires.
    pub(super) fn current(&self) -> Option<(C, Option<std::time::SystemTime>)> {
        let (value, expires) =
            self.state().core.current(self.now()).map(|(value, expires)| (value.clone(), expires))?;
        Some((value, expires.map(|at| at.wall())))
    }

    pub(super) fn is_renewing(&self) -> bool {
        self.state().core.is_renewing()
    }

    fn prepare(self: &Arc<Self>, state: &mut State<C>, start: Start<C>, word: Arc<Word>) -> Takeoff<C> {
        let task = Arc::new(OnceLock::new());
        let (engine, id) = (Arc::downgrade(self), start.id);
        let abandon = Box::new(move || {
            if let Some(engine) = engine.upgrade() {
                engine.abandon(id);
            }
        });
        let runtime = Timers::try_current().ok().map(|runtime| runtime.id());
        let (limit, engine) = (self.policy.timeout, self.address());
        let landing = Landing(Arc::new(InFlight { word, limit, runtime, engine, abandon }));
        state.flight = Some(Box::new(Flight { landing: landing.clone(), task: Arc::clone(&task) }));
        Takeoff { start, landing, task }
    }

    /// Starts the renewal's task; without the lock, as a runtime that is shutting down drops it at once.
    fn take_off(self: &Arc<Self>, takeoff: Takeoff<C>) {
        let Takeoff { start: Start { id, reason }, landing, task } = takeoff;
        let word = Some(Arc::clone(&landing.0.word));
        let end = End { engine: Arc::downgrade(self), id, word };
        let Ok(runtime) = Handle::try_current() else {
            return end.with(Err(SourceError::transient(NO_RUNTIME).into()));
        };
        let renewals = Renewals { engine: self.address(), on_behalf_of: RENEWING.try_with(Arc::clone).ok() };
        let (source, limit) = (Arc::clone(&self.source), self.policy.timeout);
        let renewal = async move {
            let fetched = fetch(&*source, reason, limit).await;
            end.with(fetched);
        };
        let spawned = runtime.spawn(RENEWING.scope(Arc::new(renewals), renewal));
        let _ = task.set(spawned.abort_handle());
        // A source that blocks its thread blocks its own time limit; there are others to look at the time.
        if let Ok(timers) = Timers::try_current()
            && timers.runtime_flavor() != RuntimeFlavor::CurrentThread
        {
            timers.spawn(async move {
                let _ = Wait::watch(landing).await;
            });
        }
    }

    /// Takes in how a renewal ended, and tells those who wait, unless it has to be repeated: then they wait for that.
    fn land(self: &Arc<Self>, id: u64, ended: Option<Result<Fetched<C>, Failure>>, word: Arc<Word>) {
        let version = self.version();
        let (outcome, failed, cause) = match ended {
            Some(Ok(fetched)) => (Outcome::Fetched(offer(fetched)), Renewal::Failed, None),
            Some(Err(Failure { how, error })) => {
                let (permanent, retry_after) = (error.is_permanent(), error.retry_after());
                (Outcome::Failed { permanent, retry_after }, how, Some(error))
            }
            None => (Outcome::Aborted, Renewal::Aborted, None),
        };
        let mut state = self.state();
        let now = self.now();
        let describe = |trouble, delay| describe(trouble, delay, cause);
        let over = match state.core.finish(now, id, outcome, version, describe) {
            Finish::Again(start) => {
                let takeoff = self.prepare(&mut state, start, word);
                let replaced = self.publish(state, now);
                self.take_off(takeoff);
                return replaced.tell();
            }
            Finish::Over(how) => Some(Ended::of(how, failed, &state.core)),
            Finish::Late => None,
        };
        let result = match (state.core.current(now), state.core.error()) {
            (None, Some(error)) => Err(error.clone()),
            _ => Ok(()),
        };
        // Its task is larger than all else together.
        let flight = if state.core.is_renewing() { None } else { state.flight.take() };
        self.publish(state, now).tell();
        drop(flight);
        // Before those who wait go on, so that they find it told.
        if let Some(ended) = over {
            self.tell(&ended);
        }
        word.tell(result);
    }

    /// Tells whoever watches; without the lock, as that is others' code.
    fn tell(&self, ended: &Ended<C>) {
        let secret = ended.last.as_ref().map(|last| last.secret());
        let (id, shows) =
            (secret.map(|secret| secret.fingerprint().id()), secret.map(|secret| secret.expose()));
        event::renewal_ended(C::SUBJECT, ended.outcome, id, ended.error.as_ref(), shows);
        self.in_use.show(|| Some(self.state().core.last()?.secret().fingerprint().id()));
    }

    /// Gives a renewal up that has not ended in its time, and tells who waits: nobody drives its runtime, or its source blocks
    /// the thread.
    fn abandon(&self, id: u64) {
        let version = self.version();
        let mut state = self.state();
        if !state.core.is_running(id) {
            return;
        }
        let now = self.now();
        let describe = |trouble, delay| describe(trouble, delay, None);
        let finish = state.core.finish(now, id, Outcome::Aborted, version, describe);
        let ended = match finish {
            Finish::Over(how) => Some(Ended::of(how, Renewal::Aborted, &state.core)),
            Finish::Again(_) | Finish::Late => None,
        };
        let flight = state.flight.take();
        self.publish(state, now).tell();
        if let Some(ended) = ended {
            self.tell(&ended);
        }
        let Some(flight) = flight else { return };
        flight.landing.0.word.tell(Ok(()));
        if let Some(task) = flight.task.get() {
            task.abort();
        }
    }

    /// The source's version; where asking for it panics, it has none.
    fn version(&self) -> u64 {
        catch_unwind(AssertUnwindSafe(|| self.source.version())).unwrap_or_default()
    }

    /// The state, and the source's version where a decision may depend on it: after a permanent failure. The source is
    /// others' code, and asked without the lock.
    fn state_and_version(&self) -> (MutexGuard<'_, State<C>>, u64) {
        let state = self.state();
        if !state.core.has_failed_for_good() {
            return (state, 0);
        }
        drop(state);
        let version = self.version();
        (self.state(), version)
    }

    /// Changes what requests read, if it is another than before: they look at all of it anew then. Gives up the lock.
    #[must_use]
    fn publish(&self, mut state: MutexGuard<'_, State<C>>, now: Time) -> Replaced {
        let lease = state.core.lease(now);
        let next = lease.as_ref().map(|(value, until)| (value.secret().fingerprint(), *until));
        let former = self.published.load(|former| Some((former.value.secret().fingerprint(), former.until)));
        if former != next {
            self.published.store(lease);
        }
        let former = former.map(|(former, _)| former);
        let keepers = match &mut state.keepers {
            Some(keepers) if former != next.map(|(next, _)| next) => keepers.there(),
            _ => Vec::new(),
        };
        Replaced { former, keepers }
    }

    /// Has it told when the credential is another.
    pub(super) fn kept_by(&self, keeper: &Weak<dyn Keeper>) {
        self.state().keepers.get_or_insert_default().add(keeper);
    }

    fn address(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    fn state(&self) -> MutexGuard<'_, State<C>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends the renewal that nobody is there for any more.
impl<C: Credential> Drop for Shared<C> {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(task) = state.flight.as_ref().and_then(|flight| flight.task.get()) {
            task.abort();
        }
    }
}

impl<C: Credential> Value for C {
    fn fingerprint(&self) -> Fingerprint {
        self.secret().fingerprint()
    }
}

/// What is told of a renewal.
struct Ended<C> {
    outcome: Renewal,
    /// The credential there is by now, or was.
    last: Option<C>,
    error: Option<AuthError>,
}

impl<C: Credential> Ended<C> {
    fn of(how: Result<Brought, Trouble>, failed: Renewal, core: &Core<C, AuthError>) -> Self {
        let outcome = match how {
            Ok(Brought::Another) => Renewal::Renewed,
            Ok(Brought::TheSame) => Renewal::Unchanged,
            Err(Trouble::Failed) => failed,
            Err(Trouble::Aborted) => Renewal::Aborted,
            Err(Trouble::Unfit(_) | Trouble::Rejected | Trouble::Older | Trouble::Stale) => Renewal::Unfit,
        };
        Self { outcome, last: core.last().cloned(), error: core.error().cloned() }
    }
}

struct Takeoff<C> {
    start: Start<C>,
    landing: Landing,
    task: Arc<OnceLock<AbortHandle>>,
}

/// Sees to it that a renewal ends, also when its task is dropped.
struct End<C: Credential> {
    engine: Weak<Shared<C>>,
    id: u64,
    word: Option<Arc<Word>>,
}

impl<C: Credential> End<C> {
    fn with(mut self, fetched: Result<Fetched<C>, Failure>) {
        self.end(Some(fetched));
    }

    fn end(&mut self, ended: Option<Result<Fetched<C>, Failure>>) {
        match (self.word.take(), self.engine.upgrade()) {
            (Some(word), Some(engine)) => engine.land(self.id, ended, word),
            // There is nothing to be had any more.
            (Some(word), None) => word.tell(Ok(())),
            (None, _) => {}
        }
    }
}

impl<C: Credential> Drop for End<C> {
    fn drop(&mut self) {
        self.end(None);
    }
}

/// Why nothing was fetched.
struct Failure {
    how: Renewal,
    error: SourceError,
}

impl Failure {
    fn of(how: Renewal, error: SourceError) -> Self {
        Self { how, error }
    }
}

impl From<SourceError> for Failure {
    fn from(error: SourceError) -> Self {
        Self::of(if error.is_permanent() { Renewal::Refused } else { Renewal::Failed }, error)
    }
}

/// Asks the source, for so long and whatever it does.
async fn fetch<C: Credential>(
    source: &dyn DynSource<C>,
    reason: Reason<C>,
    limit: Duration,
) -> Result<Fetched<C>, Failure> {
    let fetching = async { source.fetch(reason).await };
    let mut fetching = pin!(fetching);
    let guarded = poll_fn(|cx| {
        let polled = catch_unwind(AssertUnwindSafe(|| fetching.as_mut().poll(cx)));
        // What it panicked with may be a secret.
        let panicked = || Failure::of(Renewal::Panicked, SourceError::transient("the source panicked"));
        polled.map_or_else(|_| Poll::Ready(Err(panicked())), |polled| polled.map_err(Failure::from))
    });
    // There is no asking a runtime whether it has timers: `timeout` panics where it does not.
    let Ok(bounded) = catch_unwind(AssertUnwindSafe(|| timeout(limit, guarded))) else {
        return Err(SourceError::transient(NO_TIME).into());
    };
    bounded.await.unwrap_or_else(|_| {
        let error = SourceError::transient(format!("the source did not answer within {limit:?}"));
        Err(Failure::of(Renewal::TimedOut, error))
    })
}

fn offer<C: Credential>(fetched: Fetched<C>) -> Offer<C> {
    let Fetched { credential, lifetime, recheck } = fetched;
    Offer {
        expiry: credential.expiry(),
        lifetime: credential.lifetime(),
        stated: lifetime,
        recheck,
        lasting: C::OUTLIVES_REJECTION,
        value: credential,
    }
}

/// The one error that all who waited get.
fn describe(trouble: Trouble, delay: Duration, cause: Option<SourceError>) -> AuthError {
    let permanent = cause.as_ref().is_some_and(SourceError::is_permanent);
    let kind = if permanent { AuthErrorKind::RefreshRejected } else { AuthErrorKind::RefreshFailed };
    let mut detail = match trouble {
        Trouble::Failed => "the source failed",
        Trouble::Aborted => "its task was dropped, as runtimes do when they shut down",
        Trouble::Unfit(Unfit::Expired) => {
            "what the source gave has expired or is about to; if it is new, this machine's clock is ahead"
        }
        Trouble::Unfit(Unfit::NoExpiry) => "what the source gave does not say when it expires",
        Trouble::Rejected => "the source gave what the API has refused",
        Trouble::Older => "the source gave what expires sooner than what was there",
        Trouble::Stale => "the source gave what is about to expire",
    }
    .to_owned();
    if !permanent {
        let _ = write!(detail, "; tried again in {delay:.1?} at the earliest");
    }
    AuthError::renewal(kind, detail, (!permanent).then_some(delay), cause.map(SourceError::into_cause))
}

#[cfg(test)]
mod tests {
    use std::{
        sync::mpsc::channel,
        task::{Context, Waker},
        thread,
    };

    use http::{Request, Response};
    use tokio::runtime;
    use tower::{Layer, Service, service_fn};

    use super::*;
    use crate::{ApiKey, ApiKeyLayer, BoxError, JwtLayer, Refreshing, Token, source::source_fn};

    #[test]
    fn r1_f8_while_the_lock_is_held_a_fresh_credential_is_read_and_sent() {
        let jwts = Refreshing::new(source_fn(|_: Reason<Token>| async {
            Ok::<_, BoxError>(Token::new("a-token")?)
        }));
        let runtime = runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(jwts.prefetch()).unwrap();
        let api = service_fn(|_: Request<()>| std::future::ready(Ok::<_, BoxError>(Response::new(()))));
        let mut service = JwtLayer::new(&jwts, ApiKey::new("sk-selam-x").unwrap()).layer(api);
        let mut send = move || {
            let mut context = Context::from_waker(Waker::noop());
            let request = Request::get("https://api.selamgpt.com/v1/models").body(()).unwrap();
            pin!(service.call(request)).poll(&mut context).is_ready()
        };
        assert!(send(), "the first makes the set that the others share");

        let (tell, told) = channel();
        let held = jwts.0.state();
        let reader = jwts.clone();
        thread::spawn(move || {
            let token = pin!(reader.token()).poll(&mut Context::from_waker(Waker::noop())).is_ready();
            tell.send((token, send())).unwrap();
        });
        let told = told.recv_timeout(Duration::from_secs(10));
        drop(held);
        assert_eq!(told.expect("nobody waits for the lock"), (true, true));
    }

    #[test]
    fn s3_layers_that_are_gone_are_not_remembered() {
        let keys = Refreshing::new(source_fn(|_: Reason<ApiKey>| async {
            Ok::<_, BoxError>(ApiKey::new("sk-selam-x")?)
        }));
        let keepers = || keys.0.state().keepers.as_ref().map_or(0, |keepers| keepers.0.len());
        let stays = ApiKeyLayer::bearer(&keys);
        for _ in 0..100 {
            drop(ApiKeyLayer::bearer(&keys));
        }
        assert!(keepers() < 10, "{} layers", keepers());
        drop(stays);
    }
}
