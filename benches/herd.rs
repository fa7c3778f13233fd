//! Many tasks at once on a token that has expired, and a source that takes 50 ms: renewals, time, memory.
//!
//! ```console
//! $ cargo bench -p benches --bench herd
//! ```
//!
//! The floor is the same tasks, which wait until 50 ms after the first of them came and call the bare service. The time is
//! that of a runtime with many threads; the memory that of one with a single thread, where all of it can be counted.

use std::{
    fmt::Debug,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use allocation_counter::measure;
use benches::{
    issuer::{Issuer, by_mutex, by_rw_lock},
    or_short,
    rounds::interleave,
    table::{Table, verdict},
    traffic::{Body, KEY, client, request},
};
use http::{Request, Response};
use tokio::{
    runtime::{Builder, Runtime},
    time::{sleep, sleep_until},
};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_selam::{ApiKey, JwtLayer, SelamLayer};

const TAKES: Duration = Duration::from_millis(50);
const LIFETIME: Duration = Duration::from_millis(150);
const TARGET: f64 = 1.5;
const TASKS: [usize; 2] = [1_000, 10_000];

/// A herd of so many tasks: how long it took from the first to the last, and how often the token was renewed.
type Herd = fn(&Runtime, usize) -> (Duration, Option<usize>);

const FLOOR: usize = 0;
const CONTENDERS: [(&str, Herd); 5] = [
    ("the same tasks wait 50 ms, bare service", floor),
    ("SelamLayer, JWT renewing", selam),
    ("JwtLayer, JWT renewing", jwt_layer),
    ("Mutex<Token> and format!", mutex),
    ("RwLock<HeaderValue>", rw_lock),
];

fn main() {
    let rounds = or_short(21, 1);
    let many = Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let single = Builder::new_current_thread().enable_all().build().expect("a runtime");
    println!("\nTasks on an expired token, renewed in 50 ms: medians of {rounds} interleaved rounds\n");
    let mut table = Table::new(&[
        "",
        "tasks",
        "renewals",
        "target",
        "",
        "total ms",
        "beyond 50 ms",
        "x floor",
        "target",
        "",
        "longest total ms",
        "peak KiB",
        "bytes per task",
    ]);
    for tasks in TASKS {
        let mut renewals = [None; CONTENDERS.len()];
        let samples = interleave(rounds, CONTENDERS.len(), |at| {
            let (took, renewed) = CONTENDERS[at].1(&many, tasks);
            renewals[at] = renewals[at].max(renewed);
            took.as_secs_f64() * 1e3
        });
        let beyond = |at| samples.median(at) - TAKES.as_secs_f64() * 1e3;
        for (at, (name, herd)) in CONTENDERS.iter().enumerate() {
            herd(&single, tasks);
            let peak = measure(|| {
                herd(&single, tasks);
            })
            .bytes_max;
            let ratio = beyond(at) / beyond(FLOOR);
            let judge = |yes: bool, text: String| if yes { text } else { String::new() };
            let is_ours = name.contains("Layer");
            table.row([
                (*name).to_owned(),
                tasks.to_string(),
                renewals[at].map(|renewals| renewals.to_string()).unwrap_or_default(),
                judge(is_ours, "1".to_owned()),
                judge(is_ours, verdict(renewals[at] == Some(1))),
                format!("{:.1}", samples.median(at)),
                format!("{:.1}", beyond(at)),
                format!("{ratio:.2}"),
                judge(is_ours && tasks == TASKS[1], format!("<= {TARGET}")),
                judge(is_ours && tasks == TASKS[1], verdict(ratio <= TARGET)),
                format!("{:.1}", samples.largest(at)),
                format!("{}", peak / 1024),
                format!("{}", peak / tasks as u64),
            ]);
        }
    }
    table.print();
    println!("\n`renewals` is the most of any round, `x floor` what is beyond the 50 ms beside the floor's.");
}

fn floor(runtime: &Runtime, tasks: usize) -> (Duration, Option<usize>) {
    let until = Arc::new(OnceLock::new());
    let service = service_fn(move |request| {
        let until = Arc::clone(&until);
        async move {
            sleep_until(*until.get_or_init(|| tokio::time::Instant::now() + TAKES)).await;
            client(request).await
        }
    });
    (runtime.block_on(stampede(service, tasks)), None)
}

fn selam(runtime: &Runtime, tasks: usize) -> (Duration, Option<usize>) {
    let issuer = Issuer::new(LIFETIME, TAKES);
    let jwts = issuer.renewing();
    let key = ApiKey::new(KEY).expect("a key");
    let layer = SelamLayer::builder().with_api_key(key).with_jwt(&jwts).build().expect("a layer");
    let took = runtime.block_on(async {
        jwts.prefetch().await.expect("the first token");
        expire().await;
        stampede(layer.layer(service_fn(client)), tasks).await
    });
    (took, Some(issuer.renewals()))
}

fn jwt_layer(runtime: &Runtime, tasks: usize) -> (Duration, Option<usize>) {
    let issuer = Issuer::new(LIFETIME, TAKES);
    let jwts = issuer.renewing();
    let client = service_fn(client);
    let service = JwtLayer::new(&jwts, ApiKey::new(KEY).expect("a key")).layer(client);
    let took = runtime.block_on(async {
        jwts.prefetch().await.expect("the first token");
        expire().await;
        stampede(service, tasks).await
    });
    (took, Some(issuer.renewals()))
}

fn mutex(runtime: &Runtime, tasks: usize) -> (Duration, Option<usize>) {
    let issuer = Issuer::new(LIFETIME, TAKES);
    let took = runtime.block_on(async {
        let service = by_mutex(Arc::clone(&issuer), Duration::ZERO).await;
        expire().await;
        stampede(service, tasks).await
    });
    (took, Some(issuer.renewals()))
}

fn rw_lock(runtime: &Runtime, tasks: usize) -> (Duration, Option<usize>) {
    let issuer = Issuer::new(LIFETIME, TAKES);
    let took = runtime.block_on(async {
        let service = by_rw_lock(Arc::clone(&issuer), Duration::ZERO).await;
        expire().await;
        stampede(service, tasks).await
    });
    (took, Some(issuer.renewals()))
}

async fn expire() {
    sleep(LIFETIME + Duration::from_millis(10)).await;
}

/// So many tasks, each with a request of its own.
async fn stampede<S, R>(service: S, tasks: usize) -> Duration
where
    S: Service<Request<Body>, Response = Response<R>, Error: Debug, Future: Send> + Clone + Send + 'static,
{
    let started = Instant::now();
    let tasks: Vec<_> = (0..tasks)
        .map(|_| {
            let service = service.clone();
            tokio::spawn(async move {
                service.oneshot(request()).await.expect("a response");
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("no task failed");
    }
    started.elapsed()
}
