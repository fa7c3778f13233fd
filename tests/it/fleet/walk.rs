//! Random walks of several members over a store and an endpoint that fail.

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use http::{Request, Response};
use http_body_util::BodyExt;
use proptest::prelude::*;
use tokio::{
    runtime::Builder,
    time::{Instant, sleep},
};
use tower::{BoxError, service_fn};
use tower_selam::{
    Refreshing, Token,
    fleet::{Entry, Fleet, FleetStore, Put, Revision, SealingKey, Write},
    oauth::{OAuthSource, RefreshToken, TokenEndpoint},
};

use crate::support::Body;

/// How long an access token lives.
const LIFETIME: u64 = 60;

/// What happens to one call of the endpoint or the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// The call takes so many milliseconds.
    Slow(u64),
    /// The call fails and has no effect.
    Fails,
    /// The call fails after it had its effect.
    AnswerLost,
}

/// What a member, or the world, does next.
#[derive(Clone, Copy, Debug)]
enum Step {
    Ask(usize),
    Reject(usize),
    /// The member ends, and another one starts in its place.
    Restart(usize),
    /// The store loses everything.
    Clear,
    /// The store returns to what it held so many writes ago.
    RollBack(usize),
    Wait(u64),
}

/// By their keys: revision, value, and when they were written.
type Entries = BTreeMap<String, (Revision, Vec<u8>, Instant)>;

#[derive(Default)]
struct World {
    entries: Entries,
    /// What the store held before each write, the latest first.
    history: VecDeque<Entries>,
    calls: VecDeque<Fault>,
    exchanges: VecDeque<Fault>,
    /// The token `refresh-n` that is valid.
    newest: u32,
    /// Accepts the token before the newest, too.
    has_grace: bool,
    /// Tokens whose successors a member has received.
    known_spent: HashSet<u32>,
    requests: usize,
    violations: Vec<String>,
}

#[derive(Clone, Default)]
struct Shared(Arc<Mutex<World>>);

impl Shared {
    fn look<T>(&self, look: impl FnOnce(&mut World) -> T) -> T {
        look(&mut self.0.lock().unwrap())
    }

    fn member(&self) -> Refreshing<Token> {
        let fleet = Fleet::new("walk", self.clone(), SealingKey::new([1; 32])).unwrap();
        let first = RefreshToken::new("refresh-0").unwrap();
        let world = self.clone();
        let client = service_fn(move |request: Request<Body>| world.clone().answer(request));
        let endpoint = TokenEndpoint::new("https://api.selamgpt.com/oauth/token", client).unwrap();
        Refreshing::new(
            fleet.share_login("login", |login| {
                OAuthSource::refresh_token(endpoint, login.with_initial(first))
            }),
        )
    }

    async fn answer(self, request: Request<Body>) -> Result<Response<Body>, BoxError> {
        let body = request.into_body().collect().await?.to_bytes();
        let sent = form_urlencoded::parse(&body).find(|(name, _)| name == "refresh_token").unwrap().1;
        let sent: u32 = sent.strip_prefix("refresh-").unwrap().parse().unwrap();
        let fault = self.look(|world| {
            world.requests += 1;
            world.exchanges.pop_front().unwrap_or(Fault::None)
        });
        let reset = || Err(io::Error::from(io::ErrorKind::ConnectionReset).into());
        if fault == Fault::Fails {
            return reset();
        }
        let next = self.look(|world| {
            if world.known_spent.contains(&sent) {
                world.violations.push(format!("refresh-{sent} is spent, and the fleet knows it"));
            }
            if sent == world.newest {
                world.newest += 1;
            } else if !(world.has_grace && sent + 1 == world.newest) {
                return None;
            }
            Some(world.newest)
        });
        if let Fault::Slow(millis) = fault {
            sleep(Duration::from_millis(millis)).await;
        }
        if fault == Fault::AnswerLost {
            return reset();
        }
        let Some(next) = next else {
            return Ok(Response::builder().status(400).body(Body::from(r#"{"error":"invalid_grant"}"#))?);
        };
        self.look(|world| world.known_spent.insert(sent));
        Ok(Response::new(Body::from(format!(
            r#"{{"access_token":"access-{next}","token_type":"Bearer","refresh_token":"refresh-{next}","expires_in":{LIFETIME}}}"#
        ))))
    }

    async fn call<T>(&self, call: impl FnOnce(&mut World) -> T) -> Result<T, BoxError> {
        let fault = self.look(|world| world.calls.pop_front().unwrap_or(Fault::None));
        if fault == Fault::Fails {
            return Err("the store failed".into());
        }
        let result = self.look(call);
        match fault {
            Fault::Slow(millis) => sleep(Duration::from_millis(millis)).await,
            Fault::AnswerLost => return Err("the reply was lost".into()),
            Fault::None | Fault::Fails => {}
        }
        Ok(result)
    }
}

impl World {
    fn entry(&self, key: &str) -> Option<Entry> {
        let (revision, value, written) = self.entries.get(key)?;
        Some(Entry { revision: *revision, value: value.clone(), age: written.elapsed() })
    }
}

impl FleetStore for Shared {
    async fn get(&self, key: &str) -> Result<Option<Entry>, BoxError> {
        self.call(|world| world.entry(key)).await
    }

    async fn put(&self, key: &str, write: Write<'_>) -> Result<Put, BoxError> {
        self.call(|world| {
            let found = world.entry(key);
            if found.as_ref().map(|entry| entry.revision) != write.expected {
                return Put::Conflict(found);
            }
            let before = world.entries.clone();
            world.history.push_front(before);
            world.history.truncate(20);
            world.entries.insert(key.to_owned(), (write.revision, write.value.to_vec(), Instant::now()));
            Put::Done
        })
        .await
    }
}

/// Takes the steps, then heals everything. Returns what each member is served in the end.
fn run(world: &Shared, members: usize, steps: &[Step]) -> Vec<Option<String>> {
    let runtime = Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let mut members: Vec<_> = (0..members).map(|_| world.member()).collect();
        let count = members.len();
        for step in steps {
            match *step {
                Step::Ask(member) => {
                    let member = members[member % count].clone();
                    tokio::spawn(async move { drop(member.token().await) });
                }
                Step::Reject(member) => {
                    if let Some(token) = members[member % count].current() {
                        members[member % count].rejected(&token);
                    }
                }
                Step::Restart(member) => members[member % count] = world.member(),
                Step::Clear | Step::RollBack(_) => {
                    // All have seen what is going to be lost, and have time to put it back.
                    heal(world);
                    settle(&members).await;
                    world.look(|world| {
                        world.entries = match *step {
                            Step::RollBack(writes) if !world.history.is_empty() => {
                                let at = writes % world.history.len();
                                world.history[at].clone()
                            }
                            _ => BTreeMap::new(),
                        };
                    });
                    sleep(Duration::from_secs(5)).await;
                }
                Step::Wait(millis) => sleep(Duration::from_millis(millis)).await,
            }
            tokio::task::yield_now().await;
        }
        heal(world);
        settle(&members).await;
        let mut served = Vec::new();
        for member in &members {
            served.push(member.token().await.ok().map(|token| token.expose_secret().to_owned()));
        }
        served
    })
}

fn heal(world: &Shared) {
    world.look(|world| {
        world.calls.clear();
        world.exchanges.clear();
    });
}

/// Lets back-offs and leases end, and every member ask until they agree.
async fn settle(members: &[Refreshing<Token>]) {
    sleep(Duration::from_secs(180)).await;
    for _ in 0..3 {
        for member in members {
            let _ = member.token().await;
        }
        sleep(Duration::from_secs(5)).await;
    }
}

fn faults(kinds: &[Fault], count: usize) -> impl Strategy<Value = VecDeque<Fault>> + use<> {
    let kinds = kinds.to_vec();
    let fault = prop_oneof![3 => Just(Fault::None), 2 => prop::sample::select(kinds)];
    prop::collection::vec(fault, 0..count).prop_map(VecDeque::from)
}

fn steps(loses: bool) -> impl Strategy<Value = Vec<Step>> {
    let weight = u32::from(loses);
    let step = prop_oneof![
        6 => (0usize..4).prop_map(Step::Ask),
        2 => (0usize..4).prop_map(Step::Reject),
        1 => (0usize..4).prop_map(Step::Restart),
        weight => Just(Step::Clear),
        weight => (0usize..20).prop_map(Step::RollBack),
        5 => prop_oneof![0u64..50, 500u64..5_000, Just(40_000), Just(58_000), Just(70_000)].prop_map(Step::Wait),
    ];
    prop::collection::vec(step, 1..25)
}

fn agrees(world: &Shared, served: &[Option<String>]) -> Result<(), TestCaseError> {
    let violations = world.look(|world| world.violations.clone());
    prop_assert!(violations.is_empty(), "{violations:?}");
    prop_assert!(served[0].is_some(), "the login is lost: {served:?}");
    prop_assert!(served.iter().all(|token| *token == served[0]), "{served:?}");
    Ok(())
}

const STORE: [Fault; 5] =
    [Fault::Slow(100), Fault::Slow(240), Fault::Slow(2_000), Fault::Fails, Fault::AnswerLost];

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// N2, N6: no fault of the store, and no end of a member, makes the fleet spend a refresh token twice or lose it.
    #[test]
    fn no_fault_of_the_store_loses_a_login(
        calls in faults(&STORE, 40),
        exchanges in faults(&[Fault::Slow(500), Fault::Slow(10_000), Fault::Fails], 8),
        members in 1usize..5,
        steps in steps(true),
    ) {
        let world = Shared::default();
        world.look(|world| (world.calls, world.exchanges) = (calls, exchanges));
        let served = run(&world, members, &steps);
        agrees(&world, &served)?;
    }

    /// N2: with a grace period, lost answers lose no login either.
    #[test]
    fn lost_answers_lose_no_login(
        calls in faults(&STORE, 40),
        exchanges in faults(&[Fault::Slow(500), Fault::Fails, Fault::AnswerLost], 8),
        members in 1usize..5,
        steps in steps(false),
    ) {
        let world = Shared::default();
        world.look(|world| (world.calls, world.exchanges, world.has_grace) = (calls, exchanges, true));
        let served = run(&world, members, &steps);
        world.look(|world| world.violations.clear());
        agrees(&world, &served)?;
    }
}
