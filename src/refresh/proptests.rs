//! Walks the state machine through random schedules of time, success, failure, rejection and cancellation.

use std::{
    cell::RefCell,
    collections::{BTreeSet, VecDeque},
    time::{Duration, SystemTime},
};

use proptest::{prelude::*, test_runner::TestRunner};
use tokio::time::Instant;

use super::{
    RefreshPolicy,
    schedule::Fresh,
    state::{Answer, Finish, Outcome, Rejection, Start, State, Value},
};
use crate::{credential::Fingerprint, source::Reason, util::clock::Time};

/// One step of a schedule.
#[derive(Clone, Debug)]
enum Step {
    Pass(u64),
    JumpForward(u64),
    JumpBack(u64),
    Demand,
    DemandFor(u64),
    /// The source returns a new token with this lifetime in milliseconds.
    Fetch(u64),
    /// A token of which only a fraction of the lifetime is left: from a cache, or an issuer whose clock is behind.
    FetchAged {
        lifetime: u64,
        left: f64,
    },
    /// Callers need a token every few milliseconds, for nearly all of its lifetime or for no time, and the source returns
    /// such tokens at once.
    Load {
        every: u64,
        lifetime: u64,
        left: f64,
        whole: bool,
    },
    /// The source returns an earlier token.
    FetchOld(usize),
    /// A refresh that was given up ends after all.
    FetchLate(u64),
    Fail {
        permanent: bool,
        retry_after: Option<u64>,
    },
    /// The runtime shuts down, and perhaps the one on which the next caller starts a refresh.
    Abort {
        twice: bool,
    },
    /// The API rejects the current token.
    Reject,
    /// One endpoint rejects the current token every few milliseconds, and all others accept it. The source returns the same
    /// token again, another one, or none.
    RejectOften {
        every: u64,
        times: usize,
        source: Rejecting,
    },
    /// The API accepts the current token, perhaps after it rejected the one before.
    Accept,
    /// The API rejects an earlier token.
    RejectOld(usize),
    /// The source's version changes.
    Change,
}

/// What the source does while one endpoint rejects everything.
#[derive(Clone, Copy, Debug)]
enum Rejecting {
    Repeats,
    Replaces,
    Fails { permanent: bool },
}

fn step() -> impl Strategy<Value = Step> {
    let lifetime =
        prop_oneof![Just(0), 1u64..1_000, 1_000u64..5_000, 5_000u64..100_000, Just(3_600_000)].boxed();
    let rejecting = prop_oneof![
        2 => Just(Rejecting::Repeats),
        1 => Just(Rejecting::Replaces),
        1 => any::<bool>().prop_map(|permanent| Rejecting::Fails { permanent }),
    ];
    prop_oneof![
        4 => (0u64..3_000).prop_map(Step::Pass),
        2 => (0u64..120_000).prop_map(Step::Pass),
        1 => (1u64..3_600_000).prop_map(Step::JumpForward),
        1 => (1u64..3_600_000).prop_map(Step::JumpBack),
        8 => Just(Step::Demand),
        1 => (0u64..200_000).prop_map(Step::DemandFor),
        6 => lifetime.clone().prop_map(Step::Fetch),
        2 => (lifetime.clone(), 0.0..1.0).prop_map(|(lifetime, left)| Step::FetchAged { lifetime, left }),
        2 => (1u64..200, lifetime.clone(), prop_oneof![Just(1.0), 0.0..1.0, 0.1..0.13], any::<bool>())
            .prop_map(|(every, lifetime, left, whole)| Step::Load { every, lifetime, left, whole }),
        3 => any::<usize>().prop_map(Step::FetchOld),
        1 => lifetime.prop_map(Step::FetchLate),
        2 => (any::<bool>(), prop::option::of(0u64..100_000))
            .prop_map(|(permanent, retry_after)| Step::Fail { permanent, retry_after }),
        2 => any::<bool>().prop_map(|twice| Step::Abort { twice }),
        2 => Just(Step::Reject),
        2 => (1u64..30_000, 1usize..40, rejecting).prop_map(|(every, times, source)| Step::RejectOften { every, times, source }),
        1 => Just(Step::Accept),
        1 => any::<usize>().prop_map(Step::RejectOld),
        1 => Just(Step::Change),
    ]
}

/// A token's expiry and lifetime.
#[derive(Clone, Copy, Debug)]
struct Minted {
    mono: Instant,
    lifetime: Duration,
}

impl Value for usize {
    fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.to_le_bytes())
    }
}

struct World {
    state: State<usize, String>,
    now: Time,
    version: u64,
    running: Option<u64>,
    tokens: Vec<Minted>,
    may_last: bool,
    /// When refreshes were started by rejections, since the last trigger.
    started_by_rejections: VecDeque<Instant>,
    /// After this time the source may have another token.
    recheck: Option<Duration>,
    /// The lifetime of the token that was fetched last.
    fetched: Duration,
    /// Why refreshes failed.
    failures: Vec<String>,
    /// How many events may each have caused a refresh.
    triggers: u64,
    /// When the last refresh started, and how many triggers preceded it.
    started: Option<(Instant, u64)>,
}

impl World {
    fn new(may_last: bool, recheck: bool, seed: u64) -> Self {
        let mono = Instant::now();
        Self {
            state: State::new(RefreshPolicy::new(), seed),
            now: Time { wall: SystemTime::UNIX_EPOCH + Duration::from_secs(1_900_000_000), mono },
            version: 0,
            running: None,
            tokens: Vec::new(),
            may_last,
            started_by_rejections: VecDeque::new(),
            recheck: recheck.then_some(Duration::from_secs(1)),
            fetched: Duration::MAX,
            failures: Vec::new(),
            triggers: 0,
            started: None,
        }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Pass(time) => self.pass(time),
            Step::JumpForward(time) => {
                self.trigger();
                self.now.wall += Duration::from_millis(time);
            }
            Step::JumpBack(time) => self.now.wall -= Duration::from_millis(time),
            Step::Demand => self.demand(Duration::ZERO),
            Step::DemandFor(time) => self.demand(Duration::from_millis(time)),
            Step::Fetch(lifetime) => self.fetch(lifetime, 1.0),
            Step::FetchAged { lifetime, left } => self.fetch(lifetime, left),
            Step::Load { every, lifetime, left, whole } => {
                let min_validity =
                    Duration::from_millis(if whole { lifetime.saturating_sub(every) } else { 0 });
                for _ in 0..8 {
                    self.pass(every);
                    self.demand(min_validity);
                    if self.running.is_some() {
                        self.fetch(lifetime, left);
                    }
                }
            }
            Step::FetchOld(at) if !self.tokens.is_empty() => self.fetch_again(at % self.tokens.len()),
            Step::FetchLate(lifetime) => {
                let token = self.mint(lifetime, 1.0);
                self.finish_late(Outcome::Fetched(self.fresh(token)));
            }
            Step::Fail { permanent, retry_after } => {
                let retry_after = retry_after.map(Duration::from_millis);
                self.finish(Outcome::Failed { permanent, retry_after });
            }
            Step::Abort { twice } => {
                self.trigger();
                self.finish(Outcome::Aborted);
                if twice {
                    self.take(Step::Demand);
                    self.take(Step::Abort { twice: false });
                }
            }
            Step::Reject => {
                self.current().inspect(|token| self.reject(*token));
            }
            Step::RejectOften { every, times, source } => self.reject_often(every, times, source),
            Step::Accept => {
                self.trigger();
                self.state.accept(|_| true);
            }
            Step::RejectOld(at) if !self.tokens.is_empty() => self.reject(at % self.tokens.len()),
            Step::Change => {
                self.trigger();
                self.version += 1;
            }
            Step::FetchOld(_) | Step::RejectOld(_) => {}
        }
        self.check_lease();
    }

    /// Notes an event that may cause a refresh by itself.
    fn trigger(&mut self) {
        self.triggers += 1;
        self.started_by_rejections.clear();
    }

    fn current(&self) -> Option<usize> {
        self.state.current(self.now).map(|(token, _)| *token)
    }

    fn reject_often(&mut self, every: u64, times: usize, source: Rejecting) {
        let mut waits = 0;
        for _ in 0..times {
            self.pass(every);
            let Some(token) = self.current() else { return };
            self.reject(token);
            if self.running.is_none() {
                continue;
            }
            // Another endpoint needs the token while the refresh runs.
            let (answer, _) = self.state.demand(self.now, Duration::ZERO, self.version);
            waits += usize::from(matches!(answer, Answer::Wait) && !self.is_about_to_expire(token));
            match source {
                Rejecting::Repeats => self.fetch_again(token),
                Rejecting::Replaces => self.fetch(3_600_000, 1.0),
                Rejecting::Fails { permanent } => {
                    self.finish(Outcome::Failed { permanent, retry_after: None })
                }
            }
            if self.current().is_some() && self.running.is_none() {
                let (answer, start) = self.state.demand(self.now, Duration::ZERO, self.version);
                self.started(start);
                assert!(
                    matches!(answer, Answer::Serve(_))
                        || self.current().is_some_and(|token| self.is_about_to_expire(token)),
                    "the others are not served: {answer:?}"
                );
            }
        }
        assert!(waits <= 2, "the others waited {waits} times");
    }

    /// Whether the token is in its mandatory window, or nearly.
    fn is_about_to_expire(&self, token: usize) -> bool {
        let Minted { mono, lifetime } = self.tokens[token];
        self.recheck.is_some() || mono.saturating_duration_since(self.now.mono) <= lifetime / 5
    }

    fn pass(&mut self, time: u64) {
        self.now.wall += Duration::from_millis(time);
        self.now.mono += Duration::from_millis(time);
    }

    fn mint(&mut self, lifetime: u64, left: f64) -> usize {
        let lifetime = Duration::from_millis(lifetime);
        self.tokens.push(Minted { mono: self.now.mono + lifetime.mul_f64(left), lifetime });
        self.tokens.len() - 1
    }

    fn fetch(&mut self, lifetime: u64, left: f64) {
        let token = self.mint(lifetime, left);
        self.fetch_again(token);
    }

    fn fetch_again(&mut self, token: usize) {
        let fresh = self.fresh(token);
        if self.running.is_some() {
            self.fetched = fresh.stated_lifetime.unwrap_or(Duration::MAX);
        }
        self.finish(Outcome::Fetched(fresh));
    }

    fn fresh(&self, token: usize) -> Fresh<usize> {
        let stated = self.tokens[token].mono.saturating_duration_since(self.now.mono);
        Fresh {
            value: token,
            expiry: None,
            claimed_lifetime: (!self.may_last).then_some(self.tokens[token].lifetime),
            stated_lifetime: (!self.may_last).then_some(stated),
            recheck: self.recheck,
            may_last: self.may_last,
        }
    }

    fn demand(&mut self, time: Duration) {
        let (answer, start) = self.state.demand(self.now, time, self.version);
        self.started(start);
        match answer {
            Answer::Serve(token) => {
                self.check(token);
                assert!(self.may_last || self.now.mono + time <= self.tokens[token].mono, "too short");
            }
            Answer::Wait => assert!(self.running.is_some(), "a caller waits for nothing"),
            Answer::Fail(_) => {
                assert!(self.running.is_none(), "a caller fails during a refresh");
                assert!(
                    !time.is_zero() || self.current().is_none(),
                    "a caller fails although there is a token"
                );
            }
            Answer::TooShort => assert!(!time.is_zero()),
        }
    }

    fn reject(&mut self, token: usize) {
        let held = self.current();
        let (rejection, start) = self.state.reject(self.now, token.fingerprint(), self.version);
        assert_eq!(held, self.current(), "a rejection discards nothing");
        if start.is_some() {
            self.triggers += 1;
            let (now, starts) = (self.now.mono, &mut self.started_by_rejections);
            starts.push_back(now);
            starts.retain(|start| now - *start <= Duration::from_secs(60));
            assert!(starts.len() <= 14, "{} refreshes within a minute", starts.len());
        }
        // A refresh that began earlier is repeated if it returns the rejected token.
        if rejection == Rejection::Refreshing {
            self.triggers += 1;
        }
        self.started(start);
        assert!(rejection != Rejection::Refreshing || self.running.is_some());
    }

    fn finish(&mut self, outcome: Outcome<usize>) {
        let Some(id) = self.running else { return self.finish_late(outcome) };
        let failures = &mut self.failures;
        let finish = self.state.finish(self.now, id, outcome, self.version, |failure, _| {
            failures.push(format!("{failure:?}"));
            format!("{failure:?}")
        });
        self.running = None;
        match finish {
            Finish::Late => panic!("the refresh was running"),
            Finish::Repeat(start) => self.started(Some(start)),
            Finish::Done(_) => {}
        }
    }

    /// The late end of a refresh that was given up changes nothing.
    fn finish_late(&mut self, outcome: Outcome<usize>) {
        let before = format!("{:?}", self.state);
        let id = self.running.map_or(0, |running| running - 1);
        let finish = self.state.finish(self.now, id, outcome, self.version, |_, _| String::new());
        assert!(matches!(finish, Finish::Late));
        assert_eq!(before, format!("{:?}", self.state));
    }

    fn started(&mut self, start: Option<Start<usize>>) {
        let Some(Start { id, reason }) = start else { return };
        assert!(self.running.is_none(), "two refreshes at once");
        if let Reason::Rejected(token) | Reason::Expiring(token) = reason {
            assert!(token < self.tokens.len());
        }
        self.running = Some(id);
        // Without a trigger, refreshes are at least 0.4 seconds apart; less for lifetimes below a second, in proportion.
        if let Some((at, triggers)) = self.started {
            let since = self.now.mono - at;
            let fetched = self.fetched.clamp(Duration::from_millis(100), Duration::from_secs(1));
            assert!(
                triggers < self.triggers || since >= fetched.mul_f64(0.399),
                "another refresh after {since:?}"
            );
        }
        self.started = Some((self.now.mono, self.triggers));
    }

    /// A token that is handed out has not expired.
    fn check(&self, token: usize) {
        let Minted { mono, .. } = self.tokens[token];
        assert!(self.may_last || self.now.mono < mono, "expired {:?} ago", self.now.mono - mono);
    }

    /// So does a token that requests may use without asking, until its deadline.
    fn check_lease(&self) {
        if let Some((&token, until)) = self.state.lease(self.now) {
            self.check(token);
            let last = self.now.mono + until.remaining(self.now);
            assert!(self.may_last || last <= self.tokens[token].mono, "leased beyond its expiry");
        }
    }
}

/// R3, R5, W1, W2, W3, J1, J3, J5, J10: the invariants that `check`, `started` and the answers assert.
#[test]
fn every_schedule_keeps_the_invariants() {
    let config = ProptestConfig { cases: 250, source_file: Some(file!()), ..ProptestConfig::default() };
    let steps = prop::collection::vec(step(), 1..120);
    let kinds = (prop::bool::weighted(0.2), prop::bool::weighted(0.2), any::<u64>());
    let failures = RefCell::new(BTreeSet::new());
    let walk = |(steps, (may_last, recheck, seed)): (Vec<Step>, _)| {
        let mut world = World::new(may_last, recheck, seed);
        for step in steps {
            world.take(step);
        }
        failures.borrow_mut().extend(world.failures);
        Ok(())
    };
    TestRunner::new(config).run(&(steps, kinds), walk).unwrap();
    let met: Vec<_> = failures.borrow().iter().cloned().collect();
    let all = ["Aborted", "Older", "Source", "Stale", "Unusable(Expired)"];
    assert_eq!(met, all, "the schedules cover every failure");
}
