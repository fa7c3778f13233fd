//! Walks the core through random schedules of time, success, failure, rejection and cancellation.

use std::{
    cell::RefCell,
    collections::{BTreeSet, HashSet},
    time::{Duration, SystemTime},
};

use proptest::{prelude::*, test_runner::TestRunner};
use tokio::time::Instant;

use super::{
    RefreshPolicy,
    schedule::Offer,
    state::{Answer, Core, Finish, Outcome, Rejection, Start, Value},
};
use crate::{credential::Fingerprint, source::Reason, util::clock::Time};

/// What happens next.
#[derive(Clone, Debug)]
enum Step {
    Pass(u64),
    JumpForward(u64),
    JumpBack(u64),
    Demand,
    DemandFor(u64),
    /// The renewal brings a new token that lives so many milliseconds.
    Bring(u64),
    /// A new one, of whose lifetime so much is left: out of a cache, or by an issuer whose clock is behind.
    BringAged {
        lifetime: u64,
        left: f64,
    },
    /// Somebody needs one every so many milliseconds, for nearly all of its lifetime or for no time, and
    /// renewals bring such ones at once.
    Load {
        every: u64,
        lifetime: u64,
        left: f64,
        whole: bool,
    },
    /// It brings one that was there before.
    BringOld(usize),
    /// A renewal that was given up answers after all.
    BringLate(u64),
    Fail {
        permanent: bool,
        retry_after: Option<u64>,
    },
    /// Its runtime is shut down, and so, perhaps, is the one that the next caller starts another on.
    Abort {
        again: bool,
    },
    /// The API refuses the present token.
    Reject {
        insist: bool,
    },
    /// The API refuses one of those before.
    RejectOld(usize),
    /// What the source works with is replaced.
    Change,
}

fn step() -> impl Strategy<Value = Step> {
    let lifetime =
        prop_oneof![Just(0), 1u64..1_000, 1_000u64..5_000, 5_000u64..100_000, Just(3_600_000)].boxed();
    prop_oneof![
        4 => (0u64..3_000).prop_map(Step::Pass),
        2 => (0u64..120_000).prop_map(Step::Pass),
        1 => (1u64..3_600_000).prop_map(Step::JumpForward),
        1 => (1u64..3_600_000).prop_map(Step::JumpBack),
        8 => Just(Step::Demand),
        1 => (0u64..200_000).prop_map(Step::DemandFor),
        6 => lifetime.clone().prop_map(Step::Bring),
        2 => (lifetime.clone(), 0.0..1.0).prop_map(|(lifetime, left)| Step::BringAged { lifetime, left }),
        2 => (1u64..200, lifetime.clone(), prop_oneof![Just(1.0), 0.0..1.0, 0.1..0.13], any::<bool>())
            .prop_map(|(every, lifetime, left, whole)| Step::Load { every, lifetime, left, whole }),
        3 => any::<usize>().prop_map(Step::BringOld),
        1 => lifetime.prop_map(Step::BringLate),
        2 => (any::<bool>(), prop::option::of(0u64..100_000))
            .prop_map(|(permanent, retry_after)| Step::Fail { permanent, retry_after }),
        2 => any::<bool>().prop_map(|again| Step::Abort { again }),
        2 => any::<bool>().prop_map(|insist| Step::Reject { insist }),
        1 => any::<usize>().prop_map(Step::RejectOld),
        1 => Just(Step::Change),
    ]
}

/// When a token expires.
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
    core: Core<usize, String>,
    now: Time,
    version: u64,
    running: Option<u64>,
    tokens: Vec<Minted>,
    rejected: HashSet<usize>,
    lasting: bool,
    /// Another may stand in its place after this time.
    recheck: Option<Duration>,
    /// How long the last one that was brought lived.
    brought: Duration,
    /// What was said of renewals that brought nothing.
    troubles: Vec<String>,
    /// What may have brought a start of its own.
    pushes: u64,
    /// When the last one was, and the pushes before it.
    started: Option<(Instant, u64)>,
}

impl World {
    fn new(lasting: bool, recheck: bool, seed: u64) -> Self {
        let mono = Instant::now();
        Self {
            core: Core::new(RefreshPolicy::new(), seed),
            now: Time { wall: SystemTime::UNIX_EPOCH + Duration::from_secs(1_900_000_000), mono },
            version: 0,
            running: None,
            tokens: Vec::new(),
            rejected: HashSet::new(),
            lasting,
            recheck: recheck.then_some(Duration::from_secs(1)),
            brought: Duration::MAX,
            troubles: Vec::new(),
            pushes: 0,
            started: None,
        }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Pass(time) => self.pass(time),
            Step::JumpForward(time) => {
                self.pushes += 1;
                self.now.wall += Duration::from_millis(time);
            }
            Step::JumpBack(time) => self.now.wall -= Duration::from_millis(time),
            Step::Demand => self.demand(Duration::ZERO),
            Step::DemandFor(time) => self.demand(Duration::from_millis(time)),
            Step::Bring(lifetime) => self.bring(lifetime, 1.0),
            Step::BringAged { lifetime, left } => self.bring(lifetime, left),
            Step::Load { every, lifetime, left, whole } => {
                let lasting = Duration::from_millis(if whole { lifetime.saturating_sub(every) } else { 0 });
                for _ in 0..8 {
                    self.pass(every);
                    self.demand(lasting);
                    if self.running.is_some() {
                        self.bring(lifetime, left);
                    }
                }
            }
            Step::BringOld(at) if !self.tokens.is_empty() => self.bring_again(at % self.tokens.len()),
            Step::BringLate(lifetime) => {
                let token = self.mint(lifetime, 1.0);
                self.finish_late(Outcome::Fetched(self.offer(token)));
            }
            Step::Fail { permanent, retry_after } => {
                let retry_after = retry_after.map(Duration::from_millis);
                self.finish(Outcome::Failed { permanent, retry_after });
            }
            Step::Abort { again } => {
                self.pushes += 1;
                self.finish(Outcome::Aborted);
                if again {
                    self.take(Step::Demand);
                    self.take(Step::Abort { again: false });
                }
            }
            Step::Reject { insist } => {
                if let Some(token) = self.core.current(self.now).map(|(token, _)| *token) {
                    self.reject(token, insist);
                }
            }
            Step::RejectOld(at) if !self.tokens.is_empty() => self.reject(at % self.tokens.len(), false),
            Step::Change => {
                self.pushes += 1;
                self.version += 1;
            }
            Step::BringOld(_) | Step::RejectOld(_) => {}
        }
        self.check_lease();
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

    fn bring(&mut self, lifetime: u64, left: f64) {
        let token = self.mint(lifetime, left);
        self.bring_again(token);
    }

    fn bring_again(&mut self, token: usize) {
        let offer = self.offer(token);
        if self.running.is_some() {
            self.brought = offer.stated.unwrap_or(Duration::MAX);
        }
        self.finish(Outcome::Fetched(offer));
    }

    fn offer(&self, token: usize) -> Offer<usize> {
        let stated = self.tokens[token].mono.saturating_duration_since(self.now.mono);
        Offer {
            value: token,
            expiry: None,
            lifetime: (!self.lasting).then_some(self.tokens[token].lifetime),
            stated: (!self.lasting).then_some(stated),
            recheck: self.recheck,
            lasting: self.lasting,
        }
    }

    fn demand(&mut self, time: Duration) {
        let (answer, start) = self.core.demand(self.now, time, self.version);
        self.started(start);
        match answer {
            Answer::Serve(token) => {
                self.check(token);
                assert!(self.lasting || self.now.mono + time <= self.tokens[token].mono, "too short");
            }
            Answer::Wait => assert!(self.running.is_some(), "waits for nothing"),
            Answer::Fail(_) => assert!(self.running.is_none(), "fails though a renewal runs"),
            Answer::TooShort => assert!(!time.is_zero()),
        }
    }

    fn reject(&mut self, token: usize, insist: bool) {
        let held = self.core.current(self.now).map(|(held, _)| *held);
        let fingerprint = token.fingerprint();
        let (rejection, start) = self.core.reject(self.now, fingerprint, insist, self.version);
        // Even of one that has expired, which nobody is handed: it may come back with the renewal that runs.
        if rejection == Rejection::Refreshing {
            self.pushes += 1;
        }
        self.started(start);
        match rejection {
            Rejection::Superseded => {}
            Rejection::Refreshing => assert!(self.running.is_some()),
            Rejection::Ignored if !insist => {
                return assert_eq!(held, self.core.current(self.now).map(|(held, _)| *held));
            }
            Rejection::Ignored => {}
        }
        if held == Some(token) {
            self.rejected.extend(Some(token).filter(|_| !self.lasting));
        }
    }

    fn finish(&mut self, outcome: Outcome<usize>) {
        let Some(id) = self.running else { return self.finish_late(outcome) };
        let troubles = &mut self.troubles;
        let finish = self.core.finish(self.now, id, outcome, self.version, |trouble, _| {
            troubles.push(format!("{trouble:?}"));
            format!("{trouble:?}")
        });
        self.running = None;
        match finish {
            Finish::Late => panic!("it was running"),
            Finish::Again(start) => self.started(Some(start)),
            Finish::Over(_) => {}
        }
    }

    /// An answer that nobody awaits any more changes nothing.
    fn finish_late(&mut self, outcome: Outcome<usize>) {
        let before = format!("{:?}", self.core);
        let id = self.running.map_or(0, |running| running - 1);
        let finish = self.core.finish(self.now, id, outcome, self.version, |_, _| String::new());
        assert!(matches!(finish, Finish::Late));
        assert_eq!(before, format!("{:?}", self.core));
    }

    fn started(&mut self, start: Option<Start<usize>>) {
        let Some(Start { id, reason }) = start else { return };
        assert!(self.running.is_none(), "two renewals at once");
        if let Reason::Rejected(token) = reason {
            assert!(self.lasting || self.rejected.contains(&token) || self.tokens.len() > token);
        }
        self.running = Some(id);
        // Another follows after 0.4 seconds at the earliest (a token that lives for one; for one that lives shorter,
        // after as large a part of that), unless something happened.
        if let Some((at, pushes)) = self.started {
            let since = self.now.mono - at;
            let brought = self.brought.clamp(Duration::from_millis(100), Duration::from_secs(1));
            assert!(pushes < self.pushes || since >= brought.mul_f64(0.399), "again after {since:?}");
        }
        self.started = Some((self.now.mono, self.pushes));
    }

    /// What is handed out is good.
    fn check(&self, token: usize) {
        let Minted { mono, .. } = self.tokens[token];
        assert!(self.lasting || self.now.mono < mono, "expired {:?} ago", self.now.mono - mono);
        assert!(!self.rejected.contains(&token), "a rejected one came back");
    }

    /// So is what requests may take without asking, for as long as they may.
    fn check_lease(&self) {
        if let Some((token, until)) = self.core.lease(self.now) {
            self.check(token);
            let last = self.now.mono + until.remaining(self.now);
            assert!(self.lasting || last <= self.tokens[token].mono, "leased beyond its end");
        }
    }
}

#[test]
fn r3_r5_j3_every_schedule_keeps_the_invariants() {
    let config = ProptestConfig { cases: 250, source_file: Some(file!()), ..ProptestConfig::default() };
    let steps = prop::collection::vec(step(), 1..120);
    let kinds = (prop::bool::weighted(0.2), prop::bool::weighted(0.2), any::<u64>());
    let troubles = RefCell::new(BTreeSet::new());
    let walk = |(steps, (lasting, recheck, seed)): (Vec<Step>, _)| {
        let mut world = World::new(lasting, recheck, seed);
        for step in steps {
            world.take(step);
        }
        troubles.borrow_mut().extend(world.troubles);
        Ok(())
    };
    TestRunner::new(config).run(&(steps, kinds), walk).unwrap();
    let met: Vec<_> = troubles.borrow().iter().cloned().collect();
    let all = ["Aborted", "Failed", "Older", "Rejected", "Stale", "Unfit(Expired)"];
    assert_eq!(met, all, "the schedules lead everywhere");
}
