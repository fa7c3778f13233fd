//! The shell, what it publishes, and the sets that are made of it, in every interleaving.
//!
//! loom runs each scenario once for every order in which its threads can take their steps, and for every value that
//! a load may see by the memory model. What came of it is collected: that a scenario could come out in a certain way
//! shows that it was not one after the other.

use std::{
    collections::BTreeSet,
    pin::Pin,
    sync::{LazyLock, Mutex},
    task::{Context, Wake, Waker},
    time::UNIX_EPOCH,
};

use loom::sync::atomic::{AtomicBool, AtomicUsize};
use tokio::runtime;

use super::*;
use crate::{
    ApiKey, Credentials, Provider, Refreshing, TestClock, Token,
    authorize::provider::{Need, Supplied, Supply, Whose},
    credential::Form,
    source::Source,
    util::clock::Clock,
    util::sync::Ordering,
};

/// So many times at most a thread loses its turn before it has to wait, unless `LOOM_MAX_PREEMPTIONS` says otherwise.
/// Two find less, four take minutes.
const PREEMPTIONS: usize = 3;

fn walk<T: Ord + Send + 'static>(scenario: impl Fn() -> T + Send + Sync + 'static) -> BTreeSet<T> {
    // `timeout` and the clock want a runtime. Its time stands still.
    let runtime = runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let runtime = runtime.unwrap();
    let _entered = runtime.enter();
    let mut model = loom::model::Builder::new();
    model.preemption_bound.get_or_insert(PREEMPTIONS);

    let scenario = Arc::new(scenario);
    let outcomes = Arc::new(Mutex::new(BTreeSet::new()));
    let seen = Arc::clone(&outcomes);
    model.check(move || {
        // The thread there is has too small a stack.
        let scenario = Arc::clone(&scenario);
        let outcome = spawn(move || scenario()).join().unwrap();
        seen.lock().unwrap().insert(outcome);
    });
    std::mem::take(&mut *outcomes.lock().unwrap())
}

/// Credentials are told apart by a number; of two, the newer has the higher.
trait Numbered: Credential {
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

/// Gives what it is told to, one after the other, and wants to be asked by one at a time.
struct Script {
    gives: &'static [usize],
    asked: AtomicUsize,
    busy: AtomicBool,
}

impl Script {
    fn new(gives: &'static [usize]) -> Arc<Self> {
        Arc::new(Self { gives, asked: AtomicUsize::new(0), busy: AtomicBool::new(false) })
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::Acquire)
    }
}

impl<C: Numbered> Source<C> for Arc<Script> {
    async fn fetch(&self, _: Reason<C>) -> Result<Fetched<C>, SourceError> {
        assert!(!self.busy.swap(true, Ordering::AcqRel), "two renewals at once");
        let at = self.asked.fetch_add(1, Ordering::AcqRel);
        self.busy.store(false, Ordering::Release);
        match self.gives.get(at) {
            Some(number) => Ok(Fetched::new(C::numbered(*number))),
            None => Err(SourceError::transient("that is all")),
        }
    }
}

/// Makes tokens with the key there is: with key 0 from number 0, with key 1 from number 4.
struct Signer {
    keys: Refreshing<ApiKey>,
    made: AtomicUsize,
}

impl Source<Token> for Signer {
    async fn fetch(&self, _: Reason<Token>) -> Result<Fetched<Token>, SourceError> {
        let key = self.keys.fresh().or_else(|| self.keys.current()).unwrap();
        let serial = self.made.fetch_add(1, Ordering::AcqRel);
        Ok(Fetched::new(Token::numbered(4 * key.number() + serial)))
    }
}

fn clock() -> TestClock {
    TestClock::new(UNIX_EPOCH + Duration::from_secs(1_900_000_000))
}

/// Of a token, which lives for five minutes here: it is served, and one renewal runs beside.
const INTO_THE_ADVISORY_WINDOW: Duration = Duration::from_secs(280);

fn engine<C: Credential>(source: impl Source<C>, clock: &TestClock) -> Refreshing<C> {
    Refreshing::with_policy(source, RefreshPolicy::new().with_jitter(0.0).with_clock(clock.clone()))
}

/// One that has fetched its first.
fn holding<C: Credential>(source: impl Source<C>, clock: &TestClock) -> Refreshing<C> {
    let engine = engine(source, clock);
    assert!(Tasks::AtOnce.during(|| engine.0.demand(Duration::ZERO)).is_ok());
    assert!(engine.fresh().is_some());
    engine
}

fn reject<C: Numbered>(engine: &Refreshing<C>, number: usize) -> (Rejection, Option<Landing>) {
    engine.0.reject(C::numbered(number).secret().fingerprint(), false)
}

fn supply(key: impl Into<Provider<ApiKey>>, jwts: &Refreshing<Token>) -> Arc<Supply> {
    Supply::new(Form::Pair, Some(key.into()), Some(jwts.into()))
}

/// Asks, and looks once whether the wait is over if there is one.
fn demand(supply: &Supply) -> Option<Credentials> {
    match supply.demand(Need::All, &Whose::Everybodys).ok()? {
        Supplied::Ready(set) => Some(set),
        Supplied::Wait(mut waiting) => match waiting.poll(supply, &mut Context::from_waker(Waker::noop())) {
            Poll::Ready(set) => set.ok(),
            Poll::Pending => None,
        },
    }
}

fn jwt(set: &Credentials) -> usize {
    set.jwt().unwrap().number()
}

/// The token, in every way in which it is had, one after the other.
fn all_ways(engine: &Refreshing<Token>, supply: &Supply) -> Vec<usize> {
    [
        supply.fresh_for_all(Need::All).map(|set| jwt(&set)),
        engine.fresh().map(|token| token.number()),
        supply.fresh_for_all(Need::All).map(|set| jwt(&set)),
        engine.0.lease().map(|lease| lease.value.number()),
        demand(supply).map(|set| jwt(&set)),
        engine.current().map(|token| token.number()),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Somebody who was told what to wait for.
struct Waiter {
    landing: Landing,
    waits: Option<Wait>,
    woken: Arc<Woken>,
}

#[derive(Default)]
struct Woken(std::sync::atomic::AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }
}

/// What there was to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Waited {
    /// Nothing: it had been replaced.
    Not,
    /// It landed before it was waited for.
    Landed,
    ForLanding,
}
use Waited::{ForLanding, Landed, Not};

impl Waiter {
    fn new(landing: Landing) -> Self {
        let woken = Arc::new(Woken::default());
        let mut waits = Wait::new(landing.clone());
        let polled = Pin::new(&mut waits).poll(&mut Context::from_waker(&Waker::from(Arc::clone(&woken))));
        Self { landing, waits: polled.is_pending().then_some(waits), woken }
    }

    /// After all has landed: they waited for one landing, and were woken by it.
    fn check(waiters: [Option<Self>; 2]) -> [Waited; 2] {
        if let [Some(one), Some(other)] = &waiters {
            assert!(Arc::ptr_eq(&one.landing.0.word, &other.landing.0.word));
        }
        waiters.map(|waiter| {
            let Some(waiter) = waiter else { return Not };
            assert!(matches!(waiter.landing.0.word.told(), Some(Ok(()))));
            assert!(waiter.waits.is_none() || waiter.woken.0.load(Ordering::Acquire));
            if waiter.waits.is_some() { ForLanding } else { Landed }
        })
    }
}

#[test]
fn f1_two_who_ask_at_once_wait_for_one_renewal_and_are_woken_by_it() {
    let ask = |engine: &Refreshing<Token>| match engine.0.demand(Duration::ZERO).unwrap() {
        Demand::Wait(landed) => Some(Waiter::new(landed)),
        Demand::Ready(token) => {
            assert_eq!(token.number(), 0);
            None
        }
    };
    let outcomes = walk(move || {
        let script = Script::new(&[0]);
        let engine = engine::<Token>(Arc::clone(&script), &clock());
        let other = spawn({
            let engine = engine.clone();
            move || ask(&engine)
        });
        let waiters = [ask(&engine), other.join().unwrap()];
        Tasks::join();

        assert_eq!(script.asked(), 1);
        assert_eq!(engine.fresh().unwrap().number(), 0);
        Waiter::check(waiters)
    });
    assert!(outcomes.is_superset(&[[ForLanding, ForLanding], [ForLanding, Not], [Not, ForLanding]].into()));
}

#[test]
fn f5_a_runtime_that_drops_its_tasks_leaves_nobody_waiting() {
    let outcomes = walk(|| {
        let script = Script::new(&[0]);
        let engine = engine::<Token>(Arc::clone(&script), &clock());
        let ask = |engine: Refreshing<Token>| {
            let woken = Arc::new(Woken::default());
            let mut asks = Box::pin(async move { engine.obtain(Duration::ZERO).await });
            let waker = Waker::from(Arc::clone(&woken));
            let polled = Tasks::Dropped.during(|| asks.as_mut().poll(&mut Context::from_waker(&waker)));
            (polled.is_pending().then_some(asks), woken)
        };
        let other = spawn({
            let engine = engine.clone();
            move || ask(engine)
        });
        [ask(engine), other.join().unwrap()].map(|(waits, woken)| {
            let Some(mut waits) = waits else { return Landed };
            assert!(woken.0.load(Ordering::Acquire));
            let polled =
                Tasks::Dropped.during(|| waits.as_mut().poll(&mut Context::from_waker(Waker::noop())));
            assert!(matches!(polled, Poll::Ready(Err(_))));
            ForLanding
        })
    });
    assert_eq!(outcomes, [[Landed, Landed], [Landed, ForLanding], [ForLanding, Landed]].into());
}

#[test]
fn f6_the_last_handle_may_go_at_any_moment_of_a_renewal() {
    let outcomes = walk(|| {
        let script = Script::new(&[0]);
        let engine = engine::<Token>(Arc::clone(&script), &clock());
        let Ok(Demand::Wait(landed)) = engine.0.demand(Duration::ZERO) else {
            panic!("there is one already")
        };
        // loom does not see the counts of an `Arc`; what it sees are these.
        let _ = (script.asked(), engine.fresh());
        drop(engine);
        Tasks::join();

        assert_eq!(Arc::strong_count(&script), 1, "something is left of the engine");
        let waiter = Waiter::new(landed);
        assert!(waiter.waits.is_none());
        assert!(matches!(waiter.landing.0.word.told(), Some(Ok(()))));
        script.asked()
    });
    assert_eq!(outcomes, [0, 1].into());
}

#[test]
fn j1_j2_two_rejections_at_once_lead_to_one_renewal() {
    let refuse = |engine: &Refreshing<Token>| {
        let (rejection, landed) = reject(engine, 0);
        let expected = if landed.is_some() { Rejection::Refreshing } else { Rejection::Superseded };
        assert_eq!(rejection, expected);
        landed.map(Waiter::new)
    };
    let outcomes = walk(move || {
        let script = Script::new(&[0, 1]);
        let engine = holding::<Token>(Arc::clone(&script), &clock());
        let other = spawn({
            let engine = engine.clone();
            move || refuse(&engine)
        });
        let waiters = [refuse(&engine), other.join().unwrap()];
        Tasks::join();

        assert_eq!(script.asked(), 2);
        assert_eq!(engine.fresh().unwrap().number(), 1);
        Waiter::check(waiters)
    });
    assert!(outcomes.is_superset(&[[ForLanding, ForLanding], [ForLanding, Not], [Not, ForLanding]].into()));
}

#[test]
fn j3_what_was_rejected_is_had_in_no_way_any_more() {
    let outcomes = walk(|| {
        let engine = holding::<Token>(Script::new(&[0, 1]), &clock());
        let supply = supply(ApiKey::numbered(0), &engine);
        let rejected = Arc::new(AtomicBool::new(false));
        let other = spawn({
            let (supply, rejected) = (Arc::clone(&supply), Arc::clone(&rejected));
            move || {
                // The set that is made here may be put on the shelf when its token is rejected already.
                let before = demand(&supply).map(|set| jwt(&set));
                let after = rejected.load(Ordering::Acquire);
                assert!(!after || supply.fresh_for_all(Need::All).is_none_or(|set| jwt(&set) == 1));
                (before, after)
            }
        });
        assert_eq!(reject(&engine, 0).0, Rejection::Refreshing);
        rejected.store(true, Ordering::Release);
        assert!(engine.fresh().is_none_or(|token| token.number() == 1));
        assert!(supply.fresh_for_all(Need::All).is_none_or(|set| jwt(&set) == 1));
        let outcome = other.join().unwrap();
        Tasks::join();

        let ways = all_ways(&engine, &supply);
        assert!(!ways.contains(&0) && ways.contains(&1));
        outcome
    });
    assert!(outcomes.is_superset(&[(Some(0), true), (Some(0), false), (None, true), (Some(1), true)].into()));
}

#[test]
fn j3_a_renewal_that_runs_does_not_bring_back_what_is_rejected_meanwhile() {
    let outcomes = walk(|| {
        let clock = clock();
        let script = Script::new(&[0, 0, 1]);
        let engine = holding::<Token>(Arc::clone(&script), &clock);
        let supply = supply(ApiKey::numbered(0), &engine);
        clock.jump(INTO_THE_ADVISORY_WINDOW);
        assert!(engine.0.demand(Duration::ZERO).is_ok());
        let asked = script.asked();
        assert_eq!(reject(&engine, 0).0, Rejection::Refreshing);
        assert!(!all_ways(&engine, &supply).contains(&0));
        Tasks::join();

        assert_eq!(script.asked(), 3, "it was not repeated");
        assert_eq!(engine.fresh().map(|token| token.number()), Some(1));
        asked
    });
    assert_eq!(outcomes, [1, 2].into());
}

#[test]
fn j3_what_is_rejected_as_soon_as_it_lands_is_not_published_by_its_landing() {
    let outcomes = walk(|| {
        let engine = engine::<Token>(Script::new(&[0, 1]), &clock());
        let supply = supply(ApiKey::numbered(0), &engine);
        assert!(engine.0.demand(Duration::ZERO).is_ok());
        let landed = engine.current().is_some_and(|token| token.number() == 0);
        if landed {
            assert_eq!(reject(&engine, 0).0, Rejection::Refreshing);
            assert!(!all_ways(&engine, &supply).contains(&0));
        }
        Tasks::join();
        assert_eq!(engine.fresh().map(|token| token.number()), Some(usize::from(landed)));
        landed
    });
    assert_eq!(outcomes, [false, true].into());
}

/// Whoever has seen a token in one way sees none that is older in another; and the shelf keeps up with the engine.
#[test]
fn h5_no_set_is_older_than_what_was_seen_before_it() {
    let outcomes = walk(|| {
        let clock = clock();
        let engine = holding::<Token>(Script::new(&[0, 1]), &clock);
        let supply = supply(ApiKey::numbered(0), &engine);
        clock.jump(INTO_THE_ADVISORY_WINDOW);
        // Puts a set on the shelf, and starts the renewal.
        assert!(demand(&supply).is_some());
        let look = |engine: &Refreshing<Token>, supply: &Supply| {
            let ways = all_ways(engine, supply);
            assert!(ways.is_sorted(), "{ways:?}");
            ways
        };
        let other = spawn({
            let supply = Arc::clone(&supply);
            move || drop(demand(&supply))
        });
        let ways = look(&engine, &supply);
        other.join().unwrap();
        Tasks::join();

        assert!(supply.fresh_for_all(Need::All).is_none_or(|set| jwt(&set) == 1));
        assert_eq!(demand(&supply).map(|set| jwt(&set)), Some(1));
        assert_eq!(supply.fresh_for_all(Need::All).map(|set| jwt(&set)), Some(1));
        (ways[0], ways[ways.len() - 1])
    });
    assert_eq!(outcomes, [(0, 0), (0, 1), (1, 1)].into());
}

/// The source of the JWTs may make them with the key there is. Then no JWT goes with a key that is older than its
/// own: an API that has taken the key back could know neither. That it goes with a newer one cannot be helped,
/// until it is renewed; that one of the two is replaced before the set is sent cannot either.
fn signed(first: impl FnOnce(&Refreshing<Token>)) -> Option<(usize, usize)> {
    let clock = clock();
    let keys = holding::<ApiKey>(Script::new(&[0, 1]), &clock);
    let jwts = engine(Signer { keys: keys.clone(), made: AtomicUsize::new(0) }, &clock);
    first(&jwts);
    let supply = supply(&keys, &jwts);
    let rotates = spawn(move || {
        Tasks::AtOnce.during(|| {
            let again = || jwts.current().iter().for_each(|jwt| jwts.invalidate(jwt));
            again();
            keys.invalidate(&ApiKey::numbered(0));
            again();
            again();
        });
    });
    let set = Tasks::AtOnce.during(|| demand(&supply));
    rotates.join().unwrap();
    let parts = |set: &Credentials| (set.api_key().unwrap().number(), jwt(set));
    for set in set.iter().chain(&supply.fresh_for_all(Need::All)) {
        let (key, jwt) = parts(set);
        assert!(key >= jwt / 4, "token {jwt} with key {key}");
    }
    set.as_ref().map(parts)
}

#[test]
fn h5_no_jwt_goes_with_a_key_older_than_its_own() {
    let outcomes =
        walk(|| signed(|jwts| assert!(Tasks::AtOnce.during(|| jwts.0.demand(Duration::ZERO)).is_ok())));
    assert!(outcomes.is_superset(&[Some((0, 0)), Some((1, 1)), Some((1, 6))].into()));
}

#[test]
fn h5_nor_after_waiting_for_it() {
    let outcomes = walk(|| signed(|_| ()));
    assert!(outcomes.is_superset(&[None, Some((0, 0)), Some((1, 1)), Some((1, 4))].into()));
}

#[test]
fn h5_who_has_seen_a_lease_sees_no_epoch_from_before_it() {
    let outcomes = walk(|| {
        let published = Arc::new(Published::new());
        let now = Clock::default().now();
        let writes = spawn({
            let published = Arc::clone(&published);
            move || {
                for value in 1..=3 {
                    published.store((value != 2).then(|| (value, now.after(Duration::ZERO))));
                }
            }
        });
        let seen = published.load(|lease| Some((lease.value, lease.epoch)));
        let epoch = published.epoch();
        writes.join().unwrap();
        seen.map(|(value, own)| {
            assert!(epoch >= own, "{epoch:?} with the lease of {own:?}");
            (value, epoch == own)
        })
    });
    assert_eq!(outcomes, [None, Some((1, true)), Some((1, false)), Some((3, true))].into());
}
