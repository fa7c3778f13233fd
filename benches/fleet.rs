//! Measures a fleet over a Redis of its own on a unix socket: what followers wait for, and how fast news and takeovers are.
//!
//! ```console
//! $ cargo bench -p benches --bench fleet
//! ```
//!
//! Needs `redis-server` in `PATH`. The run fails if a cold fleet fetches more than once.

use std::{
    future::pending,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use benches::{full_or_smoke, table::Table};
use redis::{Client, aio::MultiplexedConnection};
use tokio::{
    runtime::{Builder, Runtime},
    time::sleep,
};
use tower_selam::{
    BoxError, Refreshing, Token,
    fleet::{Fleet, FleetSource, RedisStore, SealingKey},
    source::{Fetched, Reason, Source, SourceError},
};

const FETCH: Duration = Duration::from_millis(50);
const LEASE: Duration = Duration::from_secs(2);

type Outcome<T> = Result<T, BoxError>;

fn main() -> Outcome<()> {
    let Some(redis) = Redis::start()? else {
        println!(
            "redis-server is missing; install it to measure fleets (Debian: apt-get install redis-server)"
        );
        return Ok(());
    };
    let runtime = Builder::new_multi_thread().enable_all().build()?;
    let mut table = Table::new(&["", "count", "fetches", "median ms", "99 % ms", "longest ms"]);
    let mut row = |name: &str, fetches: u64, mut waits: Vec<f64>| {
        waits.sort_by(f64::total_cmp);
        let at = |part: f64| format!("{:.2}", waits[((waits.len() - 1) as f64 * part) as usize]);
        table.row([name.into(), waits.len().to_string(), fetches.to_string(), at(0.5), at(0.99), at(1.0)]);
    };
    let (fetches, waits) = runtime.block_on(followers(&redis, full_or_smoke(2_000, 20)))?;
    row("a user's token that another replica has", fetches, waits);
    let (fetches, waits) = runtime.block_on(cold(&redis, full_or_smoke(1_000, 10)))?;
    assert_eq!(fetches, 1, "one fetch serves a cold fleet");
    row("members from cold, beyond the 50 ms of the source", fetches, waits);
    let (fetches, waits) = runtime.block_on(rejected(&redis, full_or_smoke(100, 5)))?;
    row("members that hear of a rejected token", fetches, waits);
    let (fetches, waits) = killed(&redis, &runtime, full_or_smoke(100, 5))?;
    row("members that take over from a killed leader with a lease of 2 s", fetches, waits);
    table.print("What members of a fleet wait for");
    Ok(())
}

/// Asks for the tokens of users, one after the other, that another replica has fetched.
async fn followers(redis: &Redis, users: usize) -> Outcome<(u64, Vec<f64>)> {
    let source = Counted::default();
    let [first, second] = [redis.fleet("followers").await?, redis.fleet("followers").await?];
    let share = |fleet: &Fleet, user| Refreshing::new(fleet.share(&format!("user-{user}"), source.clone()));
    for user in 0..users {
        share(&first, user).token().await?;
    }
    let mut waits = Vec::new();
    for user in 0..users {
        let member = share(&second, user);
        waits.push(wait_for(&member).await?);
    }
    Ok((source.fetches() - users as u64, waits))
}

/// Starts members that all need the first token at once.
async fn cold(redis: &Redis, count: usize) -> Outcome<(u64, Vec<f64>)> {
    let source = Counted { takes: FETCH, ..Counted::default() };
    let members = redis.members("cold", count, &source).await?;
    let calls = members.into_iter().map(|member| tokio::spawn(async move { wait_for(&member).await }));
    let waits = all(calls.collect()).await?;
    Ok((source.fetches(), waits.into_iter().map(|wait| (wait - 50.0).max(0.0)).collect()))
}

/// Rejects the token at one member and measures until the others have stopped using it.
async fn rejected(redis: &Redis, count: usize) -> Outcome<(u64, Vec<f64>)> {
    let source = Counted::default();
    let mut members = redis.members("rejected", count, &source).await?;
    for member in &members {
        member.token().await?;
    }
    sleep(2 * LEASE).await;
    let first = members.remove(0);
    let rejected = first.token().await?;
    first.rejected(&rejected);
    let started = Instant::now();
    let calls = members.into_iter().map(|member| {
        let rejected = rejected.id();
        tokio::spawn(async move {
            while member.token().await?.id() == rejected {
                sleep(Duration::from_millis(5)).await;
            }
            Ok(millis(started))
        })
    });
    let waits = all(calls.collect()).await?;
    Ok((source.fetches(), waits))
}

/// Kills the runtime of the leader, and measures until the others have a token.
fn killed(redis: &Redis, runtime: &Runtime, count: usize) -> Outcome<(u64, Vec<f64>)> {
    let leader = Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let hangs = Counted { takes: Duration::MAX, ..Counted::default() };
    let member =
        leader.block_on(async { Outcome::Ok(redis.members("killed", 1, &hangs).await?.remove(0)) })?;
    leader.spawn(async move { member.token().await });
    while hangs.fetches() == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    leader.shutdown_background();
    let source = Counted { takes: FETCH, ..Counted::default() };
    runtime.block_on(async {
        let members = redis.members("killed", count, &source).await?;
        let calls = members.into_iter().map(|member| tokio::spawn(async move { wait_for(&member).await }));
        let waits = all(calls.collect()).await?;
        Ok((source.fetches(), waits))
    })
}

async fn wait_for(member: &Refreshing<Token>) -> Result<f64, BoxError> {
    let started = Instant::now();
    member.token().await?;
    Ok(millis(started))
}

async fn all(calls: Vec<tokio::task::JoinHandle<Result<f64, BoxError>>>) -> Outcome<Vec<f64>> {
    let mut waits = Vec::new();
    for call in calls {
        waits.push(call.await??);
    }
    Ok(waits)
}

fn millis(started: Instant) -> f64 {
    started.elapsed().as_secs_f64() * 1e3
}

/// A source that counts its fetches.
#[derive(Clone, Default)]
struct Counted {
    count: Arc<AtomicU64>,
    takes: Duration,
}

impl Counted {
    fn fetches(&self) -> u64 {
        self.count.load(Ordering::SeqCst)
    }
}

impl Source<Token> for Counted {
    async fn fetch(&self, _: Reason<Token>) -> Result<Fetched<Token>, SourceError> {
        let number = self.count.fetch_add(1, Ordering::SeqCst);
        if self.takes == Duration::MAX {
            pending::<()>().await;
        }
        sleep(self.takes).await;
        // About as long as a JWT.
        let token = Token::new(format!("{number}-{}", "a".repeat(800)))?;
        Ok(Fetched::new(token).with_lifetime(Duration::from_secs(3600)))
    }
}

/// A server that ends with this value.
struct Redis {
    folder: PathBuf,
    process: Child,
}

impl Redis {
    /// `None` if it is not installed.
    fn start() -> Outcome<Option<Self>> {
        let folder = std::env::temp_dir().join(format!("selam-bench-{}", std::process::id()));
        std::fs::create_dir_all(&folder)?;
        let mut command = Command::new("redis-server");
        command.args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"]);
        command.arg(folder.join("socket")).stdout(Stdio::null());
        match command.spawn() {
            Ok(process) => Ok(Some(Self { folder, process })),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    async fn connect(&self) -> Outcome<MultiplexedConnection> {
        let client = Client::open(format!("unix://{}", self.folder.join("socket").display()))?;
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match client.get_multiplexed_async_connection().await {
                Ok(connection) => return Ok(connection),
                Err(error) if Instant::now() > deadline => return Err(error.into()),
                Err(_) => sleep(Duration::from_millis(20)).await,
            }
        }
    }

    async fn fleet(&self, name: &str) -> Outcome<Fleet> {
        let store = RedisStore::new(self.connect().await?);
        Ok(Fleet::builder(name, store, SealingKey::new([1; 32])).with_lease(LEASE).build()?)
    }

    /// Members of a fleet, each with a connection of its own.
    async fn members(&self, name: &str, count: usize, source: &Counted) -> Outcome<Vec<Refreshing<Token>>> {
        let mut members = Vec::new();
        for _ in 0..count {
            let member: FleetSource<_> = self.fleet(name).await?.share("selam", source.clone());
            members.push(Refreshing::new(member));
        }
        Ok(members)
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.process.kill().and_then(|()| self.process.wait());
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
