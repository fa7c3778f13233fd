//! A member of a fleet, as a program. It is configured by its environment, takes commands on its standard input, and answers
//! each with one line. It never prints a token, only ids.

#![allow(clippy::print_stdout, clippy::disallowed_methods, reason = "a program that answers, and measures")]

use std::{
    env,
    error::Error,
    io::stderr,
    process::abort,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
    time::Duration,
};

use bytes::Bytes;
use http_body_util::Full;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use tokio::{
    io::{AsyncBufReadExt, BufReader, stdin},
    task::JoinSet,
    time::{Instant, sleep},
};
use tower_selam::{
    AuthError, BoxError, PerSubject, Refreshing, Subject, Token,
    fleet::{Entry, Fleet, FleetStore, Put, RedisStore, SealingKey, Write},
    oauth::{ClientAuth, OAuthSource, TokenEndpoint},
};

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<(), BoxError> {
    if env::var_os("LOG").is_some() {
        let level = tracing_subscriber::filter::LevelFilter::TRACE;
        tracing_subscriber::fmt().with_max_level(level).with_writer(stderr).init();
    }
    let fleet = fleet()?;
    let member = Arc::new(Member::new(fleet)?);
    let mut commands = BufReader::new(stdin()).lines();
    while let Some(command) = commands.next_line().await? {
        let member = Arc::clone(&member);
        tokio::spawn(async move { println!("{}", member.answer(&command).await) });
    }
    Ok(())
}

fn fleet() -> Result<Fleet, BoxError> {
    let client = redis::Client::open(env::var("STORE")?)?;
    let config = ConnectionManagerConfig::new().set_max_delay(Duration::from_millis(500));
    let store = RedisStore::new(ConnectionManager::new_lazy_with_config(client, config)?);
    let store = Fragile { store, dies: env::var("DIES").ok(), written: AtomicU32::new(0) };
    let mut builder = Fleet::builder(env::var("FLEET")?, store, SealingKey::from_env_var("KEY")?);
    if let Ok(former) = SealingKey::from_env_var("FORMER_KEY") {
        builder = builder.with_former_key(former);
    }
    if let Some(lease) = millis("LEASE") {
        builder = builder.with_lease(lease).with_login_lease(lease);
    }
    if let Some(timeout) = millis("STORE_TIMEOUT") {
        builder = builder.with_store_timeout(timeout);
    }
    Ok(builder.build()?)
}

fn millis(name: &str) -> Option<Duration> {
    Some(Duration::from_millis(env::var(name).ok()?.parse().ok()?))
}

/// The credentials that a member shares.
struct Member {
    fleet: Fleet,
    /// Several engines stand for as many parts of a program.
    engines: Vec<Refreshing<Token>>,
    users: PerSubject,
}

impl Member {
    fn new(fleet: Fleet) -> Result<Self, BoxError> {
        let client = Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
        let auth = ClientAuth::client_secret_basic(env::var("CLIENT_ID")?, env::var("CLIENT_SECRET")?)?;
        let endpoint = TokenEndpoint::allow_insecure_loopback(&env::var("ENDPOINT")?, client)?;
        let endpoint = endpoint.with_client_auth(auth);
        let engine = || match env::var("MODE").as_deref() {
            Ok("login") => {
                let source = |login| OAuthSource::refresh_token(endpoint.clone(), login);
                Refreshing::new(fleet.share_login("selam", source))
            }
            _ => Refreshing::new(fleet.share("selam", OAuthSource::client_credentials(endpoint.clone()))),
        };
        let engines = env::var("ENGINES").map_or(Ok(1), |number| number.parse())?;
        let engines = (0..engines).map(|_| engine()).collect();
        let of_users = fleet.clone();
        let users = PerSubject::new(move |user: &Subject| {
            of_users.share(user.as_str(), OAuthSource::client_credentials(endpoint.clone()))
        });
        Ok(Self { fleet, engines, users })
    }

    async fn answer(&self, command: &str) -> String {
        match command.split_once(' ').unwrap_or((command, "")) {
            ("token", _) => self.token().await,
            ("current", _) => self.current(),
            ("reject", _) => self.reject(),
            ("user", name) => describe(self.users.of_subject(&Subject::new(name)).token().await),
            ("load", millis) => self.load(Duration::from_millis(millis.parse().unwrap_or_default())).await,
            ("leave", _) => {
                self.fleet.leave().await;
                "left".to_owned()
            }
            _ => format!("unknown command {command}"),
        }
    }

    /// Asks all engines at once.
    async fn token(&self) -> String {
        let call = |engine: Refreshing<Token>| async move { describe(engine.token().await) };
        let mut calls: JoinSet<_> = self.engines.clone().into_iter().map(call).collect();
        let mut answers = Vec::new();
        while let Some(answer) = calls.join_next().await {
            answers.push(answer.unwrap_or_else(|error| error.to_string()));
        }
        answers.sort_unstable();
        answers.dedup();
        answers.join(", ")
    }

    fn current(&self) -> String {
        self.engines[0].current().map_or("none".to_owned(), |token| format!("token {}", token.id()))
    }

    fn reject(&self) -> String {
        let answer = self.current();
        if let Some(token) = self.engines[0].current() {
            self.engines[0].rejected(&token);
        }
        answer
    }

    /// Asks for a token again and again, as requests do.
    async fn load(&self, time: Duration) -> String {
        let (end, mut failed, mut slowest) = (Instant::now() + time, 0, Duration::ZERO);
        while Instant::now() < end {
            let start = Instant::now();
            failed += u32::from(self.engines[0].token().await.is_err());
            slowest = slowest.max(start.elapsed());
            sleep(Duration::from_millis(2)).await;
        }
        format!("failed {failed}, slowest {}", slowest.as_millis())
    }
}

fn describe(result: Result<Token, AuthError>) -> String {
    let error = match result {
        Ok(token) => return format!("token {}", token.id()),
        Err(error) => error,
    };
    let mut text = format!("{:?}: {error}", error.kind());
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// A store that ends the program at a point of the protocol, as `kill -9` would: `before 2` or `after 2` writes of a record.
struct Fragile<S> {
    store: S,
    dies: Option<String>,
    written: AtomicU32,
}

impl<S> Fragile<S> {
    fn reach(&self, when: &str, write: u32) {
        if self.dies.as_ref().is_some_and(|point| *point == format!("{when} {write}")) {
            abort();
        }
    }
}

impl<S: FleetStore> FleetStore for Fragile<S> {
    async fn get(&self, key: &str) -> Result<Option<Entry>, BoxError> {
        self.store.get(key).await
    }

    async fn put(&self, key: &str, write: Write<'_>) -> Result<Put, BoxError> {
        if key.ends_with(":news") {
            return self.store.put(key, write).await;
        }
        self.reach("before", self.written.load(SeqCst) + 1);
        let put = self.store.put(key, write).await?;
        if matches!(put, Put::Done) {
            self.reach("after", self.written.fetch_add(1, SeqCst) + 1);
        }
        Ok(put)
    }
}
