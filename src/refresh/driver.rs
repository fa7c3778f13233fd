//! The driver: carries out what the state machine decides, with one lock and one task per refresh.

#[cfg(all(test, model))]
#[path = "loom_tests.rs"]
pub(crate) mod loom_tests;

use std::{
    cell::OnceCell,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, OnceLock, PoisonError, Weak},
    time::{Duration, SystemTime},
};

use tokio::runtime::{Handle as Runtime, RuntimeFlavor};

use super::{
    Engine, RefreshPolicy,
    fetch::{Failed, describe, fetch},
    in_flight::{InFlight, WaitForRefresh},
    lease::{Lease, Publication},
    reentrancy::{is_own_refresh, own_source, refresh_of},
    schedule::Fresh,
    state::{Answer, Finish, Outcome, RefreshFailure, Refreshed, Rejection, Start, State, Value},
    turns::Turns,
};
use crate::{
    AuthError, AuthErrorKind,
    credential::{Credential, Fingerprint},
    source::{AskingEngine, DynSource, EngineHandle, Fetched, SourceError},
    telemetry::{
        event::{self, KeyInUse, RefreshOutcome},
        span::Span,
    },
    util::{
        clock::Time,
        sync::{AbortHandle, Handle, Mutex, MutexGuard},
    },
};

const NO_RUNTIME: &str = "a refresh needs a tokio runtime, and there is none here";
const TOO_SHORT: &str = "the source issues tokens with a shorter lifetime than requested";

/// How many replaced credentials are remembered, to recognise them in URLs.
const REMEMBERED_REPLACEMENTS: usize = 16;

/// What all handles of one engine share.
pub(crate) struct Driver<C: Credential> {
    /// All that a request reads while the credential is fresh.
    publication: Publication<C>,
    locked: Mutex<Locked<C>>,
    source: Arc<dyn DynSource<C>>,
    policy: Arc<RefreshPolicy>,
    /// What the refreshes of one subject among many wait for; `None` if all requests share the credential.
    turns: Option<Arc<Turns>>,
    in_use: KeyInUse,
}

struct Locked<C: Credential> {
    state: State<C, AuthError>,
    running: Option<Running>,
    /// The latest first. Empty in the engine of a subject.
    recently_replaced: Vec<Fingerprint>,
}

/// The refresh that is running.
#[derive(Clone)]
struct Running {
    in_flight: InFlight,
    task: Arc<OnceLock<AbortHandle>>,
}

/// A refresh that is about to be spawned.
struct Launch<C> {
    start: Start<C>,
    in_flight: InFlight,
    task: Arc<OnceLock<AbortHandle>>,
}

/// A credential, or the refresh to wait for.
pub(crate) enum Demand<T> {
    Ready(T),
    Wait(InFlight),
}

impl<C: Credential> Driver<C> {
    pub(super) fn new(
        source: Arc<dyn DynSource<C>>,
        policy: Arc<RefreshPolicy>,
        turns: Option<Arc<Turns>>,
    ) -> Arc<Self> {
        let state = State::new(Arc::clone(&policy), fastrand::u64(..));
        let locked = Mutex::new(Locked { state, running: None, recently_replaced: Vec::new() });
        let in_use = KeyInUse::new(C::SETTING);
        let driver =
            Arc::new(Self { publication: Publication::empty(), locked, source, policy, turns, in_use });
        let handle = EngineHandle::new(Arc::downgrade(&driver) as Weak<dyn AskingEngine<C>>);
        let _ = catch_unwind(AssertUnwindSafe(|| driver.source.attach(handle)));
        driver
    }

    /// The fast path: the credential, if nothing has to be decided about it.
    #[inline]
    pub(super) fn fresh(&self, now: &OnceCell<Time>) -> Option<Arc<Lease<C>>> {
        self.publication.get(|| *now.get_or_init(|| self.policy.now()))
    }

    /// A credential that stays valid for `min_validity`, or the refresh to wait for; starts a refresh if one is due.
    pub(super) fn demand(
        self: &Arc<Self>,
        min_validity: Duration,
    ) -> Result<Demand<Arc<Lease<C>>>, AuthError> {
        let (answer, in_flight) = self.decide(|state, now, version| state.demand(now, min_validity, version));
        match answer {
            Answer::Serve(credential) => Ok(Demand::Ready(self.lease(credential))),
            Answer::Fail(error) => Err(error),
            Answer::TooShort => Err(AuthError::local(AuthErrorKind::CredentialUnavailable, TOO_SHORT)),
            Answer::Wait if is_own_refresh(self.address()) => Err(own_source()),
            Answer::Wait => match in_flight {
                Some(in_flight) => Ok(Demand::Wait(in_flight)),
                None => Err(AuthError::refresh_failure(AuthErrorKind::RefreshFailed, "", None, None)),
            },
        }
    }

    /// As [`demand`](Self::demand), but waits.
    pub(super) async fn obtain(self: &Arc<Self>, min_validity: Duration) -> Result<C, AuthError> {
        if min_validity.is_zero()
            && let Some(lease) = self.fresh(&OnceCell::new())
        {
            return Ok(lease.credential.clone());
        }
        loop {
            match self.demand(min_validity)? {
                Demand::Ready(lease) => return Ok(lease.credential.clone()),
                Demand::Wait(in_flight) => WaitForRefresh::new(in_flight).await?,
            }
        }
    }

    /// Records that the API rejected a credential, and starts a refresh if that may help. Returns the refresh to wait for.
    pub(super) fn reject(self: &Arc<Self>, fingerprint: Fingerprint) -> (Rejection, Option<InFlight>) {
        let (rejection, in_flight) =
            self.decide(|state, now, version| state.reject(now, fingerprint, version));
        let waits = rejection == Rejection::Refreshing && !is_own_refresh(self.address());
        (rejection, in_flight.filter(|_| waits))
    }

    /// Records that the API accepted the current credential, if it is the one in question.
    pub(super) fn accept(&self, is_accepted: impl FnOnce(Fingerprint) -> bool) {
        self.lock().state.accept(is_accepted);
    }

    /// Asks the state machine for a decision and starts the refresh that it orders. Returns the refresh that is running.
    fn decide<D>(
        self: &Arc<Self>,
        decide: impl FnOnce(&mut State<C, AuthError>, Time, u64) -> (D, Option<Start<C>>),
    ) -> (D, Option<InFlight>) {
        let (mut locked, version) = self.lock_with_version();
        let now = self.policy.now();
        let (decision, start) = decide(&mut locked.state, now, version);
        let launch = start.map(|start| self.prepare(&mut locked, start, None));
        let in_flight = locked.running.as_ref().map(|running| running.in_flight.clone());
        self.publish(locked, now);
        if let Some(launch) = launch {
            self.spawn(launch);
        }
        (decision, in_flight)
    }

    /// The current credential, fresh or not, and when it expires.
    pub(super) fn current(&self) -> Option<(C, Option<SystemTime>)> {
        let locked = self.lock();
        let (credential, expires_at) = locked.state.current(self.policy.now())?;
        Some((credential.clone(), expires_at.map(|at| at.wall)))
    }

    /// Whether the credential with this fingerprint is the current one.
    pub(super) fn holds(&self, fingerprint: Fingerprint) -> bool {
        match self.publication.published() {
            Some(published) => published == fingerprint,
            None => self.current().is_some_and(|(current, _)| current.secret().fingerprint() == fingerprint),
        }
    }

    pub(super) fn is_refreshing(&self) -> bool {
        self.lock().state.is_refreshing()
    }

    /// Whether the source failed and is not asked again yet.
    pub(super) fn is_backed_off(&self) -> bool {
        self.lock().state.is_backed_off(|| self.policy.now())
    }

    pub(super) fn recently_replaced(&self) -> Vec<Fingerprint> {
        self.lock().recently_replaced.clone()
    }

    fn lease(self: &Arc<Self>, credential: C) -> Arc<Lease<C>> {
        Lease::of_engine(credential, Arc::downgrade(self) as Weak<dyn Engine>)
    }

    /// Registers a refresh as running. `repeated` is the refresh whose waiters it takes over.
    fn prepare(
        self: &Arc<Self>,
        locked: &mut Locked<C>,
        start: Start<C>,
        repeated: Option<&InFlight>,
    ) -> Launch<C> {
        let (engine, id) = (Arc::downgrade(self), start.id);
        let abandon = Box::new(move || {
            if let Some(engine) = engine.upgrade() {
                engine.abandon(id);
            }
        });
        let results = repeated.map(InFlight::results);
        let in_flight =
            InFlight::new(results, self.turns.clone(), self.policy.timeout, self.address(), abandon);
        let task = Arc::new(OnceLock::new());
        locked.running = Some(Running { in_flight: in_flight.clone(), task: Arc::clone(&task) });
        Launch { start, in_flight, task }
    }

    /// Spawns the task of a refresh. Not under the lock: a runtime that is shutting down drops the task at once.
    fn spawn(self: &Arc<Self>, launch: Launch<C>) {
        let Launch { start: Start { id, reason }, in_flight, task } = launch;
        let span = Span::refresh(C::SETTING, reason.label());
        let engine = Arc::downgrade(self);
        let mut completion =
            Completion { engine, id, in_flight: Some(in_flight.clone()), span: span.clone() };
        let Ok(runtime) = Handle::try_current() else {
            return completion.complete(Some(Err(SourceError::transient(NO_RUNTIME).into())));
        };
        in_flight.enter();
        let (source, timeout, queued) = (Arc::clone(&self.source), self.policy.timeout, in_flight.clone());
        let refresh = async move {
            queued.turn().await;
            let fetched = fetch(&*source, reason, timeout).await;
            completion.complete(Some(fetched));
        };
        let turns = self.turns.as_ref().map_or(0, |turns| Arc::as_ptr(turns).addr());
        let spawned = runtime.spawn(refresh_of(self.address(), turns, span.instrument(refresh)));
        let _ = task.set(spawned.abort_handle());
        // A source that blocks its thread also blocks its own timeout; another thread can keep the time.
        if let Ok(runtime) = Runtime::try_current()
            && runtime.runtime_flavor() != RuntimeFlavor::CurrentThread
        {
            runtime.spawn(async move {
                let _ = WaitForRefresh::watchdog(in_flight).await;
            });
        }
    }

    /// Records how refresh `id` ended and wakes its waiters, unless the refresh has to be repeated.
    fn complete(
        self: &Arc<Self>,
        id: u64,
        ended: Option<Result<Fetched<C>, Failed>>,
        in_flight: InFlight,
        span: Option<&Span>,
    ) {
        let version = self.version();
        let (outcome, failed, cause) = match ended {
            Some(Ok(fetched)) => (Outcome::Fetched(fresh(fetched)), RefreshOutcome::Failed, None),
            Some(Err(Failed { how, error })) => {
                let (permanent, retry_after) = (error.is_permanent(), error.retry_after());
                (Outcome::Failed { permanent, retry_after }, how, Some(error))
            }
            None => (Outcome::Aborted, RefreshOutcome::Aborted, None),
        };
        let mut locked = self.lock();
        let now = self.policy.now();
        let describe = |failure, retry| describe(failure, self.policy.countdown(retry), cause);
        let report = match locked.state.finish(now, id, outcome, version, describe) {
            Finish::Repeat(start) => {
                let launch = self.prepare(&mut locked, start, Some(&in_flight));
                self.publish(locked, now);
                in_flight.leave();
                return self.spawn(launch);
            }
            Finish::Done(result) => Some(Report::new(result, failed, &locked.state)),
            Finish::Late => None,
        };
        let result = match (locked.state.current(now), locked.state.error()) {
            (None, Some(error)) => Err(error.clone()),
            _ => Ok(()),
        };
        let running = if locked.state.is_refreshing() { None } else { locked.running.take() };
        self.publish(locked, now);
        drop(running);
        // Before the waiters wake, so that they find it reported.
        match (report, span) {
            (Some(report), span) => self.report(&report, span),
            (None, Some(span)) => span.refreshed(RefreshOutcome::Aborted, None),
            (None, None) => {}
        }
        in_flight.complete(result);
    }

    /// Gives up refresh `id`: nobody drives its runtime, or its source blocks the thread.
    fn abandon(self: &Arc<Self>, id: u64) {
        let locked = self.lock();
        let running = locked.running.clone().filter(|_| locked.state.is_running(id));
        drop(locked);
        if let Some(Running { in_flight, task }) = running {
            self.complete(id, None, in_flight, None);
            task.get().inspect(|task| task.abort());
        }
    }

    /// Emits the event and the metrics of a refresh. Not under the lock: subscribers and recorders are third-party code.
    fn report(&self, report: &Report<C>, span: Option<&Span>) {
        let Report { outcome, last, error } = report;
        let secret = last.as_ref().map(|last| last.secret());
        let (id, exposed) = (secret.map(|secret| secret.id()), secret.map(|secret| secret.expose()));
        event::refresh_ended(C::SETTING, *outcome, id, error.as_ref(), exposed);
        span.inspect(|span| span.refreshed(*outcome, id));
        self.in_use.show(|| Some(self.lock().state.last()?.secret().id()));
    }

    /// The source's version, or zero if the source panics.
    fn version(&self) -> u64 {
        catch_unwind(AssertUnwindSafe(|| self.source.version())).unwrap_or_default()
    }

    /// Locks the state. Asks for the source's version first if a decision may depend on it, which is after a permanent
    /// failure: the source is third-party code and is not called under the lock.
    fn lock_with_version(&self) -> (MutexGuard<'_, Locked<C>>, u64) {
        let locked = self.lock();
        if !locked.state.has_failed_permanently() {
            return (locked, 0);
        }
        drop(locked);
        let version = self.version();
        (self.lock(), version)
    }

    /// Publishes what requests may use from now on, and releases the lock.
    fn publish(self: &Arc<Self>, mut locked: MutexGuard<'_, Locked<C>>, now: Time) {
        // One subject's token is not worth copies per thread.
        let is_shared = self.turns.is_none();
        let before = self.publication.stored();
        let after = locked.state.lease(now).map(|(value, until)| (value.clone(), until));
        let fingerprint = |lease: &(C, _)| lease.0.secret().fingerprint();
        if before == after.as_ref().map(|lease| (fingerprint(lease), lease.1)) {
            return;
        }
        if let Some((replaced, _)) = before
            && is_shared
            && after.as_ref().map(fingerprint) != Some(replaced)
        {
            let remembered = &mut locked.recently_replaced;
            remembered.retain(|earlier| *earlier != replaced);
            remembered.truncate(REMEMBERED_REPLACEMENTS - 1);
            remembered.insert(0, replaced);
        }
        let after = after.map(|(credential, until)| (self.lease(credential), until));
        self.publication.store(after, is_shared);
    }

    fn address(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    fn lock(&self) -> MutexGuard<'_, Locked<C>> {
        self.locked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Aborts the running refresh when the last handle is dropped.
impl<C: Credential> Drop for Driver<C> {
    fn drop(&mut self) {
        let locked = self.locked.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(task) = locked.running.as_ref().and_then(|running| running.task.get()) {
            task.abort();
        }
    }
}

impl<C: Credential> Engine for Driver<C> {
    fn report_rejected(self: Arc<Self>, rejected: Fingerprint) -> (Rejection, Option<InFlight>) {
        self.reject(rejected)
    }

    fn report_accepted(&self, rejected: Fingerprint) {
        self.accept(|accepted| accepted != rejected);
    }

    fn has_replaced(&self, rejected: Fingerprint) -> bool {
        self.current().is_some_and(|(current, _)| current.secret().fingerprint() != rejected)
    }
}

impl<C: Credential> AskingEngine<C> for Driver<C> {
    fn fingerprint(&self) -> Option<Fingerprint> {
        self.lock().state.last().map(Value::fingerprint)
    }

    fn withdraw(self: Arc<Self>, fingerprint: Fingerprint) {
        let mut locked = self.lock();
        if locked.state.withdraw(fingerprint) {
            self.publish(locked, self.policy.now());
        }
    }

    #[cfg(feature = "fleet")]
    fn would_keep(&self, fetched: Fetched<C>) -> bool {
        self.lock().state.would_keep(self.policy.now(), &fresh(fetched))
    }
}

opaque_debug!(Driver<C> where C: Credential);

impl<C: Credential> Value for C {
    fn fingerprint(&self) -> Fingerprint {
        self.secret().fingerprint()
    }
}

/// What events and metrics say about a refresh.
struct Report<C> {
    outcome: RefreshOutcome,
    /// The current credential or the last one.
    last: Option<C>,
    error: Option<AuthError>,
}

impl<C: Credential> Report<C> {
    /// `failed` is the outcome if the source failed.
    fn new(
        result: Result<Refreshed, RefreshFailure>,
        failed: RefreshOutcome,
        state: &State<C, AuthError>,
    ) -> Self {
        let outcome = match result {
            Ok(Refreshed::Replaced) => RefreshOutcome::Refreshed,
            Ok(Refreshed::Unchanged) => RefreshOutcome::Unchanged,
            Err(RefreshFailure::Source) => failed,
            Err(RefreshFailure::Aborted) => RefreshOutcome::Aborted,
            Err(_) => RefreshOutcome::Unusable,
        };
        Self { outcome, last: state.last().cloned(), error: state.error().cloned() }
    }
}

/// Completes a refresh exactly once, also when its task is dropped.
struct Completion<C: Credential> {
    engine: Weak<Driver<C>>,
    id: u64,
    in_flight: Option<InFlight>,
    span: Span,
}

impl<C: Credential> Completion<C> {
    fn complete(&mut self, ended: Option<Result<Fetched<C>, Failed>>) {
        match (self.in_flight.take(), self.engine.upgrade()) {
            (Some(in_flight), Some(engine)) => engine.complete(self.id, ended, in_flight, Some(&self.span)),
            // Nobody can ask the engine any more.
            (Some(in_flight), None) => in_flight.complete(Ok(())),
            (None, _) => {}
        }
    }
}

impl<C: Credential> Drop for Completion<C> {
    fn drop(&mut self) {
        self.complete(None);
    }
}

fn fresh<C: Credential>(fetched: Fetched<C>) -> Fresh<C> {
    let Fetched { credential, lifetime, recheck } = fetched;
    Fresh {
        expiry: credential.secret().expires_at(),
        claimed_lifetime: credential.secret().lifetime(),
        stated_lifetime: lifetime,
        recheck,
        may_last: C::MAY_LAST,
        value: credential,
    }
}

#[cfg(test)]
mod tests {
    use std::{
        pin::pin,
        sync::mpsc::channel,
        task::{Context, Poll, Waker},
        thread,
    };

    use http::{Request, Response};
    use tokio::runtime::Builder;
    use tower::{Layer, Service, service_fn};

    use crate::{
        BoxError, JwtLayer, Refreshing, Token,
        source::{Reason, source_fn},
    };

    use super::*;

    /// R1, F8: while another thread holds the lock, a fresh token is demanded, read and sent.
    #[test]
    fn fresh_credential_is_read_without_the_lock() {
        let jwts = Refreshing::new(source_fn(|_: Reason<Token>| async {
            Ok::<_, BoxError>(Token::new("a-token")?)
        }));
        let runtime = Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(jwts.prefetch()).unwrap();
        let api = service_fn(|_: Request<()>| std::future::ready(Ok::<_, BoxError>(Response::new(()))));
        let mut service = JwtLayer::new(&jwts).layer(api);

        let locked = jwts.0.lock();
        let (results, received) = channel();
        let reader = jwts.clone();
        thread::spawn(move || {
            let mut context = Context::from_waker(Waker::noop());
            let demanded = matches!(reader.demand(&OnceCell::new()), Ok(Demand::Ready(_)));
            let read = pin!(reader.token()).poll(&mut context).is_ready();
            let request = Request::get("https://api.selamgpt.com/v1/models").body(()).unwrap();
            let sent = matches!(pin!(service.call(request)).poll(&mut context), Poll::Ready(Ok(_)));
            results.send((demanded, read, sent)).unwrap();
        });
        let received = received.recv_timeout(Duration::from_secs(60));
        drop(locked);
        assert_eq!(received.expect("nothing waits for the lock"), (true, true, true));
    }
}
