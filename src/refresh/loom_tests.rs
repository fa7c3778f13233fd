//! The driver and what it publishes, in every interleaving of its threads.
//!
//! loom runs each scenario once for every order in which its threads can take their steps, and for every value that a load
//! may see under the memory model. The outcomes are collected: that a scenario can end in different ways shows that its
//! threads did run concurrently.

use std::{
    collections::BTreeSet,
    pin::Pin,
    sync::{LazyLock, Mutex, atomic::Ordering},
    task::{Context, Poll, Wake, Waker},
    time::UNIX_EPOCH,
};

use loom::{
    sync::atomic::{AtomicBool, AtomicUsize},
    thread::JoinHandle,
};
use tokio::runtime;

use super::*;
use crate::{
    ApiKey, Refreshing, TestClock, Token,
    source::{Reason, Source},
    util::loom::{Tasks, spawn},
};

/// How often a thread is preempted at most, unless `LOOM_MAX_PREEMPTIONS` says otherwise. Two find less, four take minutes.
const PREEMPTIONS: usize = 3;

fn explore<T: Ord + Send + 'static>(scenario: impl Fn() -> T + Send + Sync + 'static) -> BTreeSet<T> {
    explore_within(PREEMPTIONS, scenario)
}

/// Runs `scenario` in every interleaving with at most this many preemptions, and returns its outcomes.
pub(crate) fn explore_within<T: Ord + Send + 'static>(
    preemptions: usize,
    scenario: impl Fn() -> T + Send + Sync + 'static,
) -> BTreeSet<T> {
    // `timeout` and the clock need a runtime. Its time stands still.
    let runtime = runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let runtime = runtime.unwrap();
    let _entered = runtime.enter();
    let mut model = loom::model::Builder::new();
    model.preemption_bound.get_or_insert(preemptions);

    let scenario = Arc::new(scenario);
    let outcomes = Arc::new(Mutex::new(BTreeSet::new()));
    let seen = Arc::clone(&outcomes);
    model.check(move || {
        // loom's own thread has too small a stack.
        let scenario = Arc::clone(&scenario);
        let outcome = spawn(move || scenario()).join().unwrap();
        seen.lock().unwrap().insert(outcome);
    });
    std::mem::take(&mut *outcomes.lock().unwrap())
}

/// A credential that is known by a number. Of two, the newer has the higher number.
pub(crate) trait Numbered: Credential {
    fn numbered(number: usize) -> Self;

    fn number(&self) -> usize {
        self.secret().expose().rsplit('-').next().unwrap().parse().unwrap()
    }
}

impl Numbered for Token {
    fn numbered(number: usize) -> Self {
        static TOKENS: LazyLock<[Token; 8]> =
            LazyLock::new(|| std::array::from_fn(|number| Token::new(format!("token-{number}")).unwrap()));
        TOKENS[number].clone()
    }
}

impl Numbered for ApiKey {
    fn numbered(number: usize) -> Self {
        static KEYS: LazyLock<[ApiKey; 2]> = LazyLock::new(|| {
            std::array::from_fn(|number| ApiKey::new(format!("sk-selam-{number}")).unwrap())
        });
        KEYS[number].clone()
    }
}

/// A source that returns the given credentials in order, and panics when it is asked concurrently.
pub(crate) struct Script {
    credentials: &'static [usize],
    asked: AtomicUsize,
    is_busy: AtomicBool,
}

impl Script {
    pub(crate) fn new(credentials: &'static [usize]) -> Arc<Self> {
        Arc::new(Self { credentials, asked: AtomicUsize::new(0), is_busy: AtomicBool::new(false) })
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::Acquire)
    }
}

impl<C: Numbered> Source<C> for Arc<Script> {
    async fn fetch(&self, _: Reason<C>) -> Result<Fetched<C>, SourceError> {
        assert!(!self.is_busy.swap(true, Ordering::AcqRel), "two refreshes at once");
        let at = self.asked.fetch_add(1, Ordering::AcqRel);
        self.is_busy.store(false, Ordering::Release);
        match self.credentials.get(at) {
            Some(number) => Ok(Fetched::new(C::numbered(*number))),
            None => Err(SourceError::transient("the script has ended")),
        }
    }
}

pub(crate) fn clock() -> TestClock {
    TestClock::new(UNIX_EPOCH + Duration::from_secs(1_900_000_000))
}

/// Tokens live for five minutes here: after this time they are served while a refresh runs in the background.
const INTO_THE_ADVISORY_WINDOW: Duration = Duration::from_secs(280);

pub(crate) fn engine<C: Credential>(source: impl Source<C>, clock: &TestClock) -> Refreshing<C> {
    Refreshing::with_policy(source, RefreshPolicy::new().with_jitter(0.0).with_clock(clock.clone()))
}

/// An engine that has fetched its first credential.
pub(crate) fn prefetched<C: Credential>(source: impl Source<C>, clock: &TestClock) -> Refreshing<C> {
    let engine = engine(source, clock);
    assert!(Tasks::AtOnce.during(|| engine.demand(&OnceCell::new())).is_ok());
    assert!(engine.fresh().is_some());
    engine
}

fn reject<C: Numbered>(engine: &Refreshing<C>, number: usize) -> (Rejection, Option<InFlight>) {
    engine.0.reject(C::numbered(number).secret().fingerprint())
}

fn fresh(engine: &Refreshing<Token>) -> Option<usize> {
    engine.fresh().map(|lease| lease.credential.number())
}

fn spawn_with<T: Send + 'static>(
    engine: &Refreshing<Token>,
    run: impl FnOnce(Refreshing<Token>) -> T + Send + 'static,
) -> JoinHandle<T> {
    let engine = engine.clone();
    spawn(move || run(engine))
}

/// Asks for the token in every way, one after the other.
fn ask_in_every_way(engine: &Refreshing<Token>) -> Vec<usize> {
    let demanded = || match engine.demand(&OnceCell::new()) {
        Ok(Demand::Ready(lease)) => Some(lease.credential.number()),
        _ => None,
    };
    [fresh(engine), demanded(), fresh(engine), demanded()].into_iter().flatten().collect()
}

/// A waiter that was polled once.
struct Waiter {
    in_flight: InFlight,
    wait: Option<WaitForRefresh>,
    woken: Arc<Woken>,
}

#[derive(Default)]
struct Woken(std::sync::atomic::AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }
}

/// How a caller got on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Waited {
    /// It did not wait.
    Not,
    /// The refresh had ended when it was polled.
    Completed,
    ForRefresh,
}
use Waited::{Completed, ForRefresh, Not};

impl Waiter {
    fn new(in_flight: InFlight) -> Self {
        let woken = Arc::new(Woken::default());
        let mut wait = WaitForRefresh::new(in_flight.clone());
        let polled = Pin::new(&mut wait).poll(&mut Context::from_waker(&Waker::from(Arc::clone(&woken))));
        Self { in_flight, wait: polled.is_pending().then_some(wait), woken }
    }

    /// Checks, after the refresh, that all waited for the same one and were woken by it.
    fn check(waiters: [Option<Self>; 2]) -> [Waited; 2] {
        if let [Some(one), Some(other)] = &waiters {
            assert!(one.in_flight.shares_waiters_with(&other.in_flight));
        }
        waiters.map(|waiter| {
            let Some(waiter) = waiter else { return Not };
            assert!(matches!(waiter.in_flight.result(), Some(Ok(()))));
            assert!(waiter.wait.is_none() || waiter.woken.0.load(Ordering::Acquire));
            if waiter.wait.is_some() { ForRefresh } else { Completed }
        })
    }
}

/// Has two threads `call` an engine, which fetches the credentials up to the last one of the script in one refresh.
fn share_one_refresh(
    credentials: &'static [usize],
    engine: fn(Arc<Script>) -> Refreshing<Token>,
    call: fn(&Refreshing<Token>) -> Option<Waiter>,
) {
    let outcomes = explore(move || {
        let script = Script::new(credentials);
        let engine = engine(Arc::clone(&script));
        let other = spawn_with(&engine, move |engine| call(&engine));
        let waiters = [call(&engine), other.join().unwrap()];
        Tasks::join();

        assert_eq!(script.asked(), credentials.len());
        assert_eq!(fresh(&engine), credentials.last().copied());
        Waiter::check(waiters)
    });
    assert!(outcomes.is_superset(&[[ForRefresh, ForRefresh], [ForRefresh, Not], [Not, ForRefresh]].into()));
}

/// F1
#[test]
fn concurrent_callers_share_one_refresh() {
    let ask = |engine: &Refreshing<Token>| match engine.demand(&OnceCell::new()).unwrap() {
        Demand::Wait(in_flight) => Some(Waiter::new(in_flight)),
        Demand::Ready(lease) => {
            assert_eq!(lease.credential.number(), 0);
            None
        }
    };
    share_one_refresh(&[0], |script| engine(script, &clock()), ask);
}

/// F5
#[test]
fn a_runtime_that_drops_its_tasks_strands_no_waiter() {
    let outcomes = explore(|| {
        let script = Script::new(&[0]);
        let engine = engine::<Token>(Arc::clone(&script), &clock());
        let ask = |engine: Refreshing<Token>| {
            let woken = Arc::new(Woken::default());
            let mut call = Box::pin(async move { engine.token().await });
            let waker = Waker::from(Arc::clone(&woken));
            let polled = Tasks::Dropped.during(|| call.as_mut().poll(&mut Context::from_waker(&waker)));
            (polled.is_pending().then_some(call), woken)
        };
        let other = spawn_with(&engine, ask);
        [ask(engine), other.join().unwrap()].map(|(call, woken)| {
            let Some(mut call) = call else { return Completed };
            assert!(woken.0.load(Ordering::Acquire));
            let polled =
                Tasks::Dropped.during(|| call.as_mut().poll(&mut Context::from_waker(Waker::noop())));
            assert!(matches!(polled, Poll::Ready(Err(_))));
            ForRefresh
        })
    });
    let [completed, waited] = [Completed, ForRefresh];
    assert_eq!(outcomes, [[completed, completed], [completed, waited], [waited, completed]].into());
}

/// F6
#[test]
fn the_last_handle_may_be_dropped_during_a_refresh() {
    let outcomes = explore(|| {
        let script = Script::new(&[0]);
        let engine = engine::<Token>(Arc::clone(&script), &clock());
        let Ok(Demand::Wait(in_flight)) = engine.demand(&OnceCell::new()) else {
            panic!("a new engine has a token")
        };
        // loom does not see the reference counts of std's `Arc`; it sees these loads.
        let _ = (script.asked(), engine.fresh());
        drop(engine);
        Tasks::join();

        assert_eq!(Arc::strong_count(&script), 1, "a part of the engine is left");
        let waiter = Waiter::new(in_flight);
        assert!(waiter.wait.is_none());
        assert!(matches!(waiter.in_flight.result(), Some(Ok(()))));
        script.asked()
    });
    assert_eq!(outcomes, [0, 1].into());
}

/// J1, J2
#[test]
fn concurrent_rejections_share_one_refresh() {
    let refuse = |engine: &Refreshing<Token>| {
        let (rejection, in_flight) = reject(engine, 0);
        let expected = if in_flight.is_some() { Rejection::Refreshing } else { Rejection::Superseded };
        assert_eq!(rejection, expected);
        in_flight.map(Waiter::new)
    };
    share_one_refresh(&[0, 1], |script| prefetched(script, &clock()), refuse);
}

/// J3
#[test]
fn a_rejected_token_is_not_served_again() {
    let outcomes = explore(|| {
        let engine = prefetched::<Token>(Script::new(&[0, 1]), &clock());
        let is_rejected = Arc::new(AtomicBool::new(false));
        let other = spawn({
            let (engine, is_rejected) = (engine.clone(), Arc::clone(&is_rejected));
            move || {
                let before = fresh(&engine);
                let after = is_rejected.load(Ordering::Acquire);
                assert!(!after || fresh(&engine).is_none_or(|token| token == 1));
                (before, after)
            }
        });
        assert_eq!(reject(&engine, 0).0, Rejection::Refreshing);
        is_rejected.store(true, Ordering::Release);
        assert!(fresh(&engine).is_none_or(|token| token == 1));
        let outcome = other.join().unwrap();
        Tasks::join();

        let tokens = ask_in_every_way(&engine);
        assert!(!tokens.contains(&0) && tokens.contains(&1));
        outcome
    });
    assert!(outcomes.is_superset(&[(Some(0), true), (Some(0), false), (None, true), (Some(1), true)].into()));
}

/// J3
#[test]
fn a_running_refresh_does_not_restore_a_rejected_token() {
    let outcomes = explore(|| {
        let clock = clock();
        let script = Script::new(&[0, 0, 1]);
        let engine = prefetched::<Token>(Arc::clone(&script), &clock);
        clock.jump(INTO_THE_ADVISORY_WINDOW);
        assert!(engine.demand(&OnceCell::new()).is_ok());
        let asked = script.asked();
        assert_eq!(reject(&engine, 0).0, Rejection::Refreshing);
        assert!(!ask_in_every_way(&engine).contains(&0));
        Tasks::join();

        assert_eq!(script.asked(), 3, "the refresh was not repeated");
        assert_eq!(fresh(&engine), Some(1));
        asked
    });
    assert_eq!(outcomes, [1, 2].into());
}

/// J3
#[test]
fn a_token_rejected_on_arrival_is_not_published() {
    let outcomes = explore(|| {
        let engine = engine::<Token>(Script::new(&[0, 1]), &clock());
        assert!(engine.demand(&OnceCell::new()).is_ok());
        let has_arrived = engine.current().is_some_and(|token| token.number() == 0);
        if has_arrived {
            assert_eq!(reject(&engine, 0).0, Rejection::Refreshing);
            assert!(!ask_in_every_way(&engine).contains(&0));
        }
        Tasks::join();
        assert_eq!(fresh(&engine), Some(usize::from(has_arrived)));
        has_arrived
    });
    assert_eq!(outcomes, [false, true].into());
}

/// H5: a caller that has seen a token in one way sees no older one in another.
#[test]
fn tokens_are_seen_in_order() {
    let outcomes = explore(|| {
        let clock = clock();
        let engine = prefetched::<Token>(Script::new(&[0, 1]), &clock);
        clock.jump(INTO_THE_ADVISORY_WINDOW);
        // Starts the refresh.
        assert!(engine.demand(&OnceCell::new()).is_ok());
        let other = spawn_with(&engine, |engine| drop(engine.demand(&OnceCell::new())));
        let tokens = ask_in_every_way(&engine);
        assert!(tokens.is_sorted(), "{tokens:?}");
        other.join().unwrap();
        Tasks::join();

        assert_eq!(fresh(&engine), Some(1));
        (tokens[0], tokens[tokens.len() - 1])
    });
    assert_eq!(outcomes, [(0, 0), (0, 1), (1, 1)].into());
}
