//! Five processes share a JWT, and a login whose refresh token rotates, while their leader and Redis are killed.
//!
//! ```console
//! $ cargo run --release -p example-fleet
//! ```
//!
//! The example starts a Redis, the crate's simulator, and itself five times. Each process sends requests all the time; the
//! lines on the screen show what it does. It takes about 20 seconds, and ends with 1 if a request has failed or a
//! refresh token was sent twice:
//!
//! ```text
//!    tokens fetched, for five processes   8
//!    rotations of the login               50
//!    requests                             21026
//!    failed requests                      0
//!    refresh tokens sent twice            0
//!    longest request                      147 ms
//! ```

#![allow(clippy::print_stdout, reason = "the screen is the point of the example")]

mod member;
mod redis;
mod screen;
#[path = "../../support/transcript.rs"]
mod transcript;

use std::{process::ExitCode, time::Duration};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use tokio::time::{MissedTickBehavior, interval, sleep};
use tower_selam::{
    BoxError,
    fleet::{Fleet, SealingKey},
    oauth::RefreshToken,
    simulator::{Server, Simulator, TokenFault},
};

use self::{
    member::{LOGIN, Process, Settings},
    redis::Redis,
    screen::Screen,
    transcript::{finish, line, step, title},
};

const PROCESSES: usize = 5;
const ROTATIONS: u64 = 50;
const TOKEN_LIFETIME: Duration = Duration::from_secs(4);
/// So short that 50 rotations take seconds.
const LOGIN_LIFETIME: Duration = Duration::from_millis(600);
const OUTAGE: Duration = Duration::from_secs(2);

/// Before a phase counts as failed.
const PATIENCE: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> ExitCode {
    match Settings::from_env() {
        Some(settings) => finish(member::run(settings).await),
        None => finish(demo().await),
    }
}

/// What the phases have in common.
struct Demo {
    simulator: Simulator,
    settings: Settings,
    processes: Vec<Process>,
    screen: Screen,
}

impl Demo {
    /// Shows the processes until the condition holds.
    async fn until(&mut self, what: &str, is_over: impl Fn(&Self) -> bool) -> Result<(), BoxError> {
        step(what);
        self.screen.begin();
        let mut ticks = interval(Duration::from_millis(100));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for _ in 0..PATIENCE.as_millis() / ticks.period().as_millis() {
            ticks.tick().await;
            let is_over = is_over(self);
            self.screen.draw(&self.processes, self.simulator.token_requests(), is_over);
            if is_over {
                return Ok(());
            }
        }
        Err("this took too long".into())
    }

    fn sum(&self, count: impl Fn(&Process) -> u64) -> u64 {
        self.processes.iter().map(count).sum()
    }

    fn requests(&self) -> u64 {
        self.sum(|process| process.report().requests)
    }
}

async fn demo() -> Result<(), BoxError> {
    title("A fleet of five processes, each of which sends requests with a JWT");
    let mut redis = Redis::start().await?;
    line("Redis", redis.url());
    let simulator = Simulator::new();
    simulator.set_rate_limit(u64::MAX);
    simulator.set_token_lifetime(TOKEN_LIFETIME);
    let server = Server::http(&simulator).await?;
    line("API", server.base_url());
    let settings = Settings {
        store: redis.url().to_owned(),
        key: BASE64_STANDARD.encode(std::array::from_fn::<u8, 32, _>(|_| fastrand::u8(..))),
        base_url: server.base_url().to_owned(),
        api_key: simulator.issue_key(),
    };
    let processes = (0..PROCESSES).map(|_| Process::start(&settings)).collect::<Result<_, _>>()?;
    let mut demo = Demo { simulator: simulator.clone(), settings, processes, screen: Screen::default() };

    demo.until("All need a JWT at once; one of them asks", |demo| {
        demo.processes.iter().all(|process| process.report().requests >= 20)
    })
    .await?;
    let cold = simulator.token_requests();

    simulator.inject_token_fault(TokenFault::Slow(PATIENCE));
    demo.until("The JWT is about to expire; who asks for the next one?", |demo| {
        demo.processes.iter().any(|process| process.report().is_leading)
    })
    .await?;
    let leader = demo.processes.iter().position(|process| process.report().is_leading);
    demo.processes[leader.ok_or("there is no leader")?].kill().await?;
    let asked = simulator.token_requests();
    demo.until("It is killed while it asks; another one takes over, and all go on", |demo| {
        demo.simulator.token_requests() > asked
            && demo.processes.iter().all(|process| !process.report().is_leading)
    })
    .await?;

    let replacement = Process::start(&demo.settings)?;
    demo.processes.push(replacement);
    demo.until("It is replaced; the new process asks for nothing", |demo| {
        demo.processes.last().is_some_and(|process| process.report().requests >= 20)
    })
    .await?;

    redis.kill().await?;
    let restarting = tokio::spawn(async move {
        sleep(OUTAGE).await;
        redis.restart().await?;
        Ok::<_, BoxError>(redis)
    });
    let goal = demo.requests() + 4_000;
    demo.until("Redis is killed, and two seconds later started, empty", |demo| demo.requests() >= goal)
        .await?;
    let redis = restarting.await??;
    let fetched = simulator.token_requests();

    simulator.set_token_lifetime(LOGIN_LIFETIME);
    let fleet = Fleet::new("demo", redis.store()?, SealingKey::from_base64(&demo.settings.key)?)?;
    fleet.log_in(LOGIN, &RefreshToken::new(simulator.issue_refresh_token())?).await?;
    for process in &mut demo.processes {
        process.use_login().await;
    }
    demo.until(
        "A user has logged in; now all use the login's token, which is refreshed all the time",
        |demo| demo.simulator.token_requests() >= fetched + ROTATIONS,
    )
    .await?;
    for process in &mut demo.processes {
        process.end().await?;
    }

    let rotations = simulator.token_requests() - fetched;
    let failed = demo.sum(|process| process.report().failed);
    let reused = simulator.reused_refresh_tokens();
    let longest = demo.processes.iter().map(|process| process.report().longest).max().unwrap_or_default();
    step("Result");
    let show = |what: &str, value: &str| println!("   {what:<36} {value}");
    show("tokens fetched, for five processes", &fetched.to_string());
    show("rotations of the login", &rotations.to_string());
    show("requests", &demo.requests().to_string());
    show("failed requests", &failed.to_string());
    show("refresh tokens sent twice", &reused.to_string());
    show("longest request", &format!("{longest} ms"));
    match (cold, failed, reused) {
        (1, 0, 0) => Ok(()),
        _ => Err(format!("a promise is broken: {cold} requests for the first JWT").into()),
    }
}
