//! K5, K6: sources that share a login, over stores and endpoints that fail.

use std::{
    collections::{HashSet, VecDeque},
    error::Error as _,
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use http::{Request, Response};
use http_body_util::BodyExt;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use proptest::prelude::*;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    sync::Mutex as AsyncMutex,
    time::{sleep, timeout},
};
use tower::{BoxError, service_fn};
use tower_selam::{
    AuthErrorKind, RefreshPolicy, Refreshing, Token,
    oauth::{
        ClientAuth, MemoryStore, OAuthSource, RefreshToken, RefreshTokenStore, StoreLock, TokenEndpoint,
        UnansweredExchange,
    },
    simulator::{Server, Simulator, TokenFault},
    source::{Reason, Source},
};

use crate::support::{Body, Http, https};

const URL: &str = "https://api.selamgpt.com/oauth/token";
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

/// What happens to one call of the endpoint or the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// The call takes so many seconds.
    Slow(u64),
    /// The call fails and has no effect.
    Fails,
    /// The call fails after it had its effect.
    AnswerLost,
    /// The store returns what it held before.
    Lags,
}

/// An endpoint that rotates tokens, and a store. Both know what must not happen.
#[derive(Default)]
struct Model {
    /// The token `refresh-n` that is valid.
    newest: u32,
    /// Accepts the token before the newest, too, as endpoints with a grace period do.
    has_grace: bool,
    /// Tokens whose successors a living source has received.
    known_spent: HashSet<u32>,
    is_dead: bool,
    violations: Vec<String>,
    exchanges: VecDeque<Fault>,
    loads: VecDeque<Fault>,
    saves: VecDeque<Fault>,
    /// All that was saved, the latest last.
    stored: Vec<u32>,
}

impl Model {
    /// Returns the next token.
    fn exchange(&mut self, sent: u32) -> Option<u32> {
        if self.known_spent.contains(&sent) {
            self.violations.push(format!("refresh-{sent} is spent, and a source knows it"));
        }
        if sent == self.newest {
            self.newest += 1;
        } else if !(self.has_grace && sent + 1 == self.newest) {
            self.is_dead = true;
            return None;
        }
        Some(self.newest)
    }
}

#[derive(Clone, Default)]
struct World {
    model: Arc<Mutex<Model>>,
    locked: Arc<AsyncMutex<()>>,
}

impl World {
    fn model<T>(&self, look: impl FnOnce(&mut Model) -> T) -> T {
        look(&mut self.model.lock().unwrap())
    }

    fn source(&self) -> OAuthSource {
        let world = self.clone();
        let client = service_fn(move |request: Request<Body>| world.clone().answer(request));
        OAuthSource::refresh_token(TokenEndpoint::new(URL, client).unwrap(), self.clone())
    }

    async fn answer(self, request: Request<Body>) -> Result<Response<Body>, BoxError> {
        let body = request.into_body().collect().await?.to_bytes();
        let sent = form_urlencoded::parse(&body).find(|(name, _)| name == "refresh_token").unwrap().1;
        let sent = number(&sent);
        let fault = self.model(|model| model.exchanges.pop_front().unwrap_or(Fault::None));
        let reset = || Err(io::Error::from(io::ErrorKind::ConnectionReset).into());
        if fault == Fault::Fails {
            return reset();
        }
        let next = self.model(|model| model.exchange(sent));
        if let Fault::Slow(seconds) = fault {
            sleep(Duration::from_secs(seconds)).await;
        }
        if fault == Fault::AnswerLost {
            return reset();
        }
        let Some(next) = next else {
            let answer = Response::builder().status(400);
            return Ok(answer.body(Body::from(r#"{"error":"invalid_grant"}"#))?);
        };
        self.model(|model| model.known_spent.insert(sent));
        Ok(Response::new(Body::from(format!(
            r#"{{"access_token":"token-{next}","token_type":"Bearer","refresh_token":"refresh-{next}"}}"#
        ))))
    }
}

fn number(token: &str) -> u32 {
    token.strip_prefix("refresh-").unwrap().parse().unwrap()
}

impl RefreshTokenStore for World {
    async fn lock(&self) -> Result<StoreLock, BoxError> {
        Ok(StoreLock::new(Arc::clone(&self.locked).lock_owned().await))
    }

    async fn load(&self) -> Result<Option<RefreshToken>, BoxError> {
        let fault = self.model(|model| model.loads.pop_front().unwrap_or(Fault::None));
        if let Fault::Slow(seconds) = fault {
            sleep(Duration::from_secs(seconds)).await;
        }
        let lag = match fault {
            Fault::Fails | Fault::AnswerLost => return Err("the store cannot be read".into()),
            Fault::Lags => 2,
            _ => 1,
        };
        let held =
            self.model(|model| model.stored.iter().rev().nth(lag - 1).or(model.stored.last()).copied());
        Ok(held.map(|held| RefreshToken::new(format!("refresh-{held}")).unwrap()))
    }

    async fn save(&self, token: &RefreshToken, replaced: &RefreshToken) -> Result<(), BoxError> {
        let fault = self.model(|model| model.saves.pop_front().unwrap_or(Fault::None));
        if let Fault::Slow(seconds) = fault {
            sleep(Duration::from_secs(seconds)).await;
        }
        if fault != Fault::Fails {
            let [token, replaced] = [token, replaced].map(|token| number(token.expose_secret()));
            self.model(|model| {
                if model.stored.contains(&replaced) && !model.stored.contains(&token) {
                    model.stored.push(token);
                }
            });
        }
        match fault {
            Fault::Fails | Fault::AnswerLost => Err("the store cannot be written".into()),
            _ => Ok(()),
        }
    }
}

/// The life of a process with two sources.
#[derive(Clone, Debug)]
struct Life {
    /// Which sources fetch a token, and how many seconds later the next step begins.
    steps: Vec<(bool, bool, u64)>,
    /// Ends at once after the last step, rather than after the store has recovered.
    crashes: bool,
}

impl Life {
    fn run(&self, world: &World) {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        let sources = [world.source(), world.source()];
        runtime.block_on(async {
            for (first, second, pause) in &self.steps {
                for source in sources.iter().zip([first, second]).filter(|(_, fetches)| **fetches) {
                    let source = source.0.clone();
                    tokio::spawn(async move { source.fetch(Reason::First).await.map(drop) });
                }
                sleep(Duration::from_secs(*pause)).await;
            }
            if !self.crashes {
                world.model(|model| {
                    model.exchanges.clear();
                    model.loads.clear();
                    model.saves.clear();
                });
                sleep(10 * MINUTE).await;
            }
        });
    }
}

fn faults(kinds: &[Fault]) -> impl Strategy<Value = VecDeque<Fault>> + use<> {
    let kinds = kinds.to_vec();
    let fault = prop_oneof![2 => Just(Fault::None), 3 => prop::sample::select(kinds)];
    prop::collection::vec(fault, 0..12).prop_map(VecDeque::from)
}

fn lives(may_crash: bool) -> impl Strategy<Value = Vec<Life>> {
    let step = (any::<bool>(), any::<bool>(), prop_oneof![Just(0), 1u64..10, Just(70), Just(300)]);
    let life = (prop::collection::vec(step, 1..6), any::<bool>())
        .prop_map(move |(steps, crashes)| Life { steps, crashes: crashes && may_crash });
    prop::collection::vec(life, 1..4)
}

fn survives(world: &World, lives: &[Life]) -> Result<(), TestCaseError> {
    for life in lives {
        // A process that starts knows nothing.
        world.model(|model| model.known_spent.clear());
        life.run(world);
        let (violations, is_dead) = world.model(|model| (model.violations.clone(), model.is_dead));
        prop_assert!(violations.is_empty(), "{violations:?}");
        prop_assert!(!is_dead, "the login is lost");
        if !life.crashes {
            let (stored, newest) = world.model(|model| (*model.stored.last().unwrap(), model.newest));
            prop_assert!(stored == newest || world.model(|model| model.has_grace && stored + 1 == newest));
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// K2, K5, K6: no fault of the store makes a source spend a token again that it knows to be spent, or lose the newest.
    #[test]
    fn store_faults_lose_no_login(
        exchanges in faults(&[Fault::Slow(3), Fault::Slow(50), Fault::Fails]),
        loads in faults(&[Fault::Slow(3), Fault::Fails]),
        saves in faults(&[Fault::Slow(3), Fault::Slow(50), Fault::Slow(200), Fault::Fails, Fault::AnswerLost]),
        lives in lives(false),
    ) {
        let world = World::default();
        world.model(|model| *model = Model { exchanges, loads, saves, stored: vec![0], ..Model::default() });
        survives(&world, &lives)?;
    }

    /// K5, K6: with a grace period, lost answers and crashes lose no login either.
    #[test]
    fn lost_answers_and_crashes_lose_no_login(
        exchanges in faults(&[Fault::Slow(3), Fault::Slow(50), Fault::Fails, Fault::AnswerLost]),
        loads in faults(&[Fault::Slow(3), Fault::Fails]),
        lives in lives(true),
    ) {
        let world = World::default();
        let model = Model { has_grace: true, exchanges, loads, stored: vec![0], ..Model::default() };
        world.model(|current| *current = model);
        survives(&world, &lives)?;
    }

    /// K5: a store that returns what was replaced, read by the source that replaced it.
    #[test]
    fn lagging_store_loses_no_login(
        loads in faults(&[Fault::Lags, Fault::Fails]),
        saves in faults(&[Fault::Slow(3), Fault::Fails]),
        pauses in prop::collection::vec(1u64..200, 1..8),
    ) {
        let world = World::default();
        world.model(|model| *model = Model { loads, saves, stored: vec![0], ..Model::default() });
        let steps = pauses.into_iter().map(|pause| (true, false, pause)).collect();
        survives(&world, &[Life { steps, crashes: false }])?;
    }
}

fn public(simulator: &Simulator) -> TokenEndpoint {
    let endpoint = TokenEndpoint::new::<_, Body, _>(URL, simulator.clone()).unwrap();
    endpoint.with_client_auth(ClientAuth::public("app").unwrap())
}

fn engine(source: OAuthSource) -> Refreshing<Token> {
    Refreshing::with_policy(source, RefreshPolicy::new().with_jitter(0.0).with_backoff(SECOND, SECOND))
}

/// A store that cannot exclude others.
#[derive(Clone)]
struct Unlocked(Arc<Mutex<RefreshToken>>);

impl RefreshTokenStore for Unlocked {
    async fn load(&self) -> Result<Option<RefreshToken>, BoxError> {
        Ok(Some(self.0.lock().unwrap().clone()))
    }

    async fn save(&self, token: &RefreshToken, _: &RefreshToken) -> Result<(), BoxError> {
        *self.0.lock().unwrap() = token.clone();
        Ok(())
    }
}

/// K5: also without a lock, if they do not refresh at the same moment.
#[tokio::test(start_paused = true)]
async fn sources_take_turns() {
    let simulator = Simulator::new();
    simulator.set_token_lifetime(MINUTE);
    let first = RefreshToken::new(simulator.issue_refresh_token()).unwrap();
    let store = Unlocked(Arc::new(Mutex::new(first)));
    let sources = [(); 3].map(|()| engine(OAuthSource::refresh_token(public(&simulator), store.clone())));
    for turn in 0..9 {
        sources[turn * 2 % 3].token().await.unwrap();
        sleep(2 * MINUTE).await;
    }
    assert_eq!((simulator.token_requests(), simulator.reused_refresh_tokens()), (9, 0));
}

/// K5: with a lock, at the same moment.
#[tokio::test(start_paused = true)]
async fn sources_exclude_each_other() {
    let simulator = Simulator::new();
    simulator.set_token_lifetime(MINUTE);
    let store = MemoryStore::new(RefreshToken::new(simulator.issue_refresh_token()).unwrap());
    for _ in 0..5 {
        let fetches = [(); 10].map(|()| {
            simulator.inject_token_fault(TokenFault::Slow(SECOND));
            let source = OAuthSource::refresh_token(public(&simulator), store.clone());
            tokio::spawn(async move { source.fetch(Reason::First).await.map(drop) })
        });
        for fetch in fetches {
            fetch.await.unwrap().unwrap();
        }
    }
    assert_eq!((simulator.token_requests(), simulator.reused_refresh_tokens()), (50, 0));
}

/// K5: a source whose save fails keeps the lock, because the stored token is spent.
#[tokio::test(start_paused = true)]
async fn unsaved_token_keeps_the_store_locked() {
    let world = World::default();
    world.model(|model| model.stored.push(0));
    let (holder, other) = (world.source(), world.source());
    world.model(|model| model.saves.extend([Fault::Fails; 20]));
    holder.fetch(Reason::First).await.unwrap();
    let waiting = tokio::spawn(async move { other.fetch(Reason::First).await.map(drop) });
    sleep(10 * SECOND).await;
    assert!(!waiting.is_finished());
    assert_eq!(world.model(|model| model.newest), 1, "nothing is sent");
    world.model(|model| model.saves.clear());
    waiting.await.unwrap().unwrap();
    assert_eq!(world.model(|model| (model.newest, model.is_dead)), (2, false));

    // The last clone of a source releases it.
    world.model(|model| model.saves.extend([Fault::Fails; 1000]));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let last = world.source();
    let fetched = std::thread::spawn(move || {
        runtime.block_on(async { timeout(SECOND / 5, last.fetch(Reason::First)).await.map(drop) }).is_err()
    });
    assert!(fetched.join().unwrap(), "it waits for the store");
    assert!(world.locked.try_lock().is_ok());
}

/// K6: a program that ends as soon as it has its token, over a store that takes its time.
#[test]
fn program_that_ends_at_once_keeps_its_login() {
    let simulator = Simulator::new();
    let world = World::default();
    world.model(|model| {
        model.stored.push(0);
        model.saves = [Fault::Slow(2), Fault::Fails, Fault::None].repeat(20).into();
    });
    for _ in 0..40 {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        let source = world.source();
        runtime.block_on(async { engine(source).token().await.map(drop) }).unwrap();
    }
    assert_eq!(world.model(|model| (model.newest, model.is_dead)), (40, false));
    assert_eq!(simulator.reused_refresh_tokens(), 0);
}

/// Accepts connections, reads a request from each and writes `answer`, then closes.
async fn answering(answer: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/oauth/token", listener.local_addr().unwrap());
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !String::from_utf8_lossy(&request).contains("refresh_token=") {
                assert_ne!(stream.read_buf(&mut request).await.unwrap(), 0);
            }
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    url
}

/// K5: over real connections, an exchange that may have spent its token is told from one that did not.
#[tokio::test]
async fn maybe_spent_tokens_are_reported() {
    let client = || Client::builder(TokioExecutor::new()).build_http::<Body>();
    let error_of = async |endpoint: TokenEndpoint| {
        let store = MemoryStore::new(RefreshToken::new("refresh-0").unwrap());
        engine(OAuthSource::refresh_token(endpoint, store)).token().await.unwrap_err()
    };
    for (answer, may_be_spent) in [
        ("", true),
        ("HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{\"access_token\":", true),
        ("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", true),
        ("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n<!DOCTYPE", true),
        ("HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n", true),
        ("HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n", true),
        ("HTTP/1.1 504 Gateway Timeout\r\ncontent-length: 0\r\n\r\n", true),
        ("HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n", false),
        ("HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\n\r\n", false),
        ("HTTP/1.1 302 Found\r\nlocation: /\r\ncontent-length: 0\r\n\r\n", false),
        ("HTTP/1.1 400 Bad Request\r\ncontent-length: 25\r\n\r\n{\"error\":\"invalid_grant\"}", false),
        ("HTTP/1.1 400 Bad Request\r\ncontent-length: 25\r\n\r\n{\"error\":\"invalid_scope\"}", false),
    ] {
        let url = answering(answer).await;
        let endpoint = TokenEndpoint::allow_insecure_loopback(&url, client()).unwrap();
        let error = error_of(endpoint).await;
        let found = error.source().and_then(|cause| cause.downcast_ref::<UnansweredExchange>());
        assert_eq!(found.is_some(), may_be_spent, "{answer}: {error:?}");
        assert!(found.is_none_or(|found| !found.is_rejected() && found.source().is_some()));
    }

    // A closed port, and a server that is not trusted.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/oauth/token", listener.local_addr().unwrap());
    drop(listener);
    let closed = TokenEndpoint::allow_insecure_loopback(&url, client()).unwrap();
    let [server, other] = [Simulator::new(), Simulator::new()]
        .map(|simulator| async move { Server::tls(&simulator).await.unwrap() });
    let (server, other) = (server.await, other.await);
    let url = format!("https://localhost:{}/oauth/token", server.local_addr().port());
    let untrusted = TokenEndpoint::new(&url, https(&other, Http::One)).unwrap();
    for endpoint in [closed, untrusted] {
        let error = error_of(endpoint).await;
        assert!(!error.source().unwrap().is::<UnansweredExchange>(), "{error:?}");
    }
}

/// K5: a token that may be spent is sent again until the endpoint answers, after a look into the store.
#[tokio::test(start_paused = true)]
async fn maybe_spent_token_is_sent_again() {
    // The endpoint never got it.
    let world = World::default();
    world.model(|model| {
        model.stored.push(0);
        model.exchanges.extend([Fault::Fails; 3]);
    });
    let jwts = engine(world.source());
    for _ in 0..3 {
        assert!(jwts.token().await.unwrap_err().source().unwrap().is::<UnansweredExchange>());
        sleep(2 * SECOND).await;
    }
    jwts.token().await.unwrap();

    // The answer was lost, and the endpoint is strict.
    let world = World::default();
    world.model(|model| {
        model.stored.push(0);
        model.exchanges.extend([Fault::AnswerLost, Fault::None]);
    });
    let jwts = engine(world.source());
    jwts.token().await.unwrap_err();
    sleep(2 * SECOND).await;
    let error = jwts.token().await.unwrap_err();
    let found = error.source().and_then(|cause| cause.downcast_ref::<UnansweredExchange>());
    assert!(found.is_some_and(UnansweredExchange::is_rejected), "{error:?}");
    assert_eq!(error.kind(), AuthErrorKind::RefreshRejected);

    // The answer was lost, and somebody has logged in since.
    let world = World::default();
    world.model(|model| {
        model.stored.push(0);
        model.exchanges.push_back(Fault::AnswerLost);
    });
    let jwts = engine(world.source());
    jwts.token().await.unwrap_err();
    world.model(|model| {
        model.newest = 7;
        model.stored.push(7);
    });
    sleep(2 * SECOND).await;
    jwts.token().await.unwrap();
    assert!(!world.model(|model| model.is_dead));
}
