//! A scripted token source, and an engine over it.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, UNIX_EPOCH},
};

use tokio::time::{Instant, sleep};
use tower_selam::{
    AuthErrorKind, RefreshPolicy, Refreshing, TestClock, Token,
    source::{Fetched, Reason, Source, SourceError},
};

pub(crate) const MINUTE: Duration = Duration::from_secs(60);
pub(crate) const SECOND: Duration = Duration::from_secs(1);

/// A source that counts its fetches and answers from a script, and then with tokens that live for a minute.
#[derive(Clone, Default)]
pub(crate) struct Mint {
    pub(crate) asked: Arc<AtomicUsize>,
    takes: Arc<Mutex<Duration>>,
    script: Arc<Mutex<VecDeque<Answer>>>,
    reasons: Arc<Mutex<Vec<String>>>,
    times: Arc<Mutex<Vec<Instant>>>,
    pub(crate) version: Arc<AtomicUsize>,
}

#[derive(Clone)]
pub(crate) enum Answer {
    Lives(Duration),
    Same(&'static str, Duration),
    /// Without a stated lifetime.
    Bare(Token),
    Fails(Option<Duration>),
    Refused,
    Panics,
    Hangs,
}

impl Mint {
    pub(crate) fn then(self, answer: Answer) -> Self {
        self.script.lock().unwrap().push_back(answer);
        self
    }

    /// Scripts the same answer 1,000 times.
    pub(crate) fn then_always(self, answer: Answer) -> Self {
        self.script.lock().unwrap().extend(std::iter::repeat_n(answer, 1_000));
        self
    }

    /// Removes what is left of the script.
    pub(crate) fn clear(&self) {
        self.script.lock().unwrap().clear();
    }

    pub(crate) fn taking(self, time: Duration) -> Self {
        self.takes(time);
        self
    }

    /// Sets how long each fetch takes from now on.
    pub(crate) fn takes(&self, time: Duration) {
        *self.takes.lock().unwrap() = time;
    }

    pub(crate) fn asked(&self) -> usize {
        self.asked.load(SeqCst)
    }

    /// Returns the reason of each fetch.
    pub(crate) fn reasons(&self) -> Vec<String> {
        self.reasons.lock().unwrap().clone()
    }

    /// Returns the times between the starts of consecutive fetches.
    pub(crate) fn pauses(&self) -> Vec<Duration> {
        self.times.lock().unwrap().windows(2).map(|pair| pair[1] - pair[0]).collect()
    }
}

impl Source<Token> for Mint {
    async fn fetch(&self, reason: Reason<Token>) -> Result<Fetched<Token>, SourceError> {
        let number = self.asked.fetch_add(1, SeqCst) + 1;
        self.times.lock().unwrap().push(Instant::now());
        self.reasons.lock().unwrap().push(match reason {
            Reason::First => "first".to_owned(),
            Reason::Expiring(token) => format!("expiring {}", token.expose_secret()),
            Reason::Rejected(token) => format!("rejected {}", token.expose_secret()),
            _ => "other".to_owned(),
        });
        let takes = *self.takes.lock().unwrap();
        sleep(takes).await;
        let answer = self.script.lock().unwrap().pop_front().unwrap_or(Answer::Lives(MINUTE));
        let token = |text: String, lifetime| Ok(Fetched::new(Token::new(text)?).with_lifetime(lifetime));
        match answer {
            Answer::Lives(lifetime) => token(format!("token-{number}"), lifetime),
            Answer::Same(text, lifetime) => token(text.to_owned(), lifetime),
            Answer::Bare(token) => Ok(Fetched::new(token)),
            Answer::Fails(None) => Err(SourceError::transient("out of order")),
            Answer::Fails(Some(wait)) => Err(SourceError::transient("busy").with_retry_after(wait)),
            Answer::Refused => Err(SourceError::permanent("the login has ended")),
            Answer::Panics => panic!("sk-selam-a-secret-in-a-panic"),
            Answer::Hangs => std::future::pending().await,
        }
    }

    fn version(&self) -> u64 {
        self.version.load(SeqCst) as u64
    }
}

/// A [`Mint`] on a busy machine: time passes whenever the engine reads the version, which it does before it
/// answers a caller.
pub(crate) struct Busy {
    pub(crate) mint: Mint,
    pub(crate) clock: TestClock,
    pub(crate) passes: Duration,
}

impl Source<Token> for Busy {
    async fn fetch(&self, reason: Reason<Token>) -> Result<Fetched<Token>, SourceError> {
        self.mint.fetch(reason).await
    }

    fn version(&self) -> u64 {
        self.clock.jump(self.passes);
        self.mint.version()
    }
}

/// A wall clock that follows tokio's time.
pub(crate) fn clock() -> TestClock {
    TestClock::new(UNIX_EPOCH + Duration::from_secs(1_900_000_000))
}

/// Makes an engine without jitter, and the clock that it reads.
pub(crate) fn engine(mint: &Mint) -> (Refreshing<Token>, TestClock) {
    let clock = clock();
    let policy = RefreshPolicy::new().with_jitter(0.0).with_clock(clock.clone());
    (Refreshing::with_policy(mint.clone(), policy), clock)
}

pub(crate) async fn text(jwts: &Refreshing<Token>) -> Result<String, AuthErrorKind> {
    jwts.token().await.map(|token| token.expose_secret().to_owned()).map_err(|error| error.kind())
}

/// Starts tasks that each ask for the token.
pub(crate) fn spawn_callers(
    jwts: &Refreshing<Token>,
    count: usize,
) -> Vec<tokio::task::JoinHandle<Result<String, AuthErrorKind>>> {
    let call = |jwts: Refreshing<Token>| tokio::spawn(async move { text(&jwts).await });
    (0..count).map(|_| call(jwts.clone())).collect()
}

/// Runs the tasks that are ready.
pub(crate) async fn settle() {
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
}
