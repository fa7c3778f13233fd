//! Measures a thundering herd: many tasks on an expired token, and a source that takes 50 ms to refresh it.
//!
//! ```console
//! $ cargo bench -p benches --bench herd
//! ```
//!
//! The floor is the same tasks, which sleep for 50 ms after the first one starts and then call the bare service. Time is
//! measured on a multi-threaded runtime, memory on a single thread, where all of it can be counted. The run fails if a
//! herd causes more than one refresh.

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use allocation_counter::measure;
use benches::{
    full_or_smoke,
    issuer::{CONTENDERS, Client, Issuer, Measurement, measure_contender},
    requests::{client, request},
    rounds::interleave,
    table::Table,
};
use tokio::{
    runtime::{Builder, Runtime},
    time::{sleep, sleep_until},
};
use tower::{ServiceExt, service_fn};

const REFRESH: Duration = Duration::from_millis(50);
const FIRST_LIFETIME: Duration = Duration::from_millis(150);

fn main() {
    let rounds = full_or_smoke(21, 1);
    let many_threads = Builder::new_multi_thread().enable_all().build().expect("the runtime is built");
    let one_thread = Builder::new_current_thread().enable_all().build().expect("the runtime is built");
    let names: Vec<&str> = ["by hand: sleep 50 ms, bare service"].into_iter().chain(CONTENDERS).collect();
    let mut table =
        Table::new(&["", "tasks", "total ms", "beyond 50 ms", "x floor", "longest ms", "bytes per task"]);
    for tasks in [1_000, 10_000] {
        let samples = interleave(rounds, names.len(), |at| herd(at, &many_threads, tasks));
        let beyond = |at| samples.median(at) - REFRESH.as_secs_f64() * 1e3;
        for (at, name) in names.iter().enumerate() {
            herd(at, &one_thread, tasks);
            let peak = measure(|| {
                herd(at, &one_thread, tasks);
            })
            .bytes_max;
            table.row([
                (*name).to_owned(),
                tasks.to_string(),
                format!("{:.1}", samples.median(at)),
                format!("{:.1}", beyond(at)),
                format!("{:.2}", beyond(at) / beyond(0)),
                format!("{:.1}", samples.largest(at)),
                (peak / tasks as u64).to_string(),
            ]);
        }
    }
    table.print(&format!(
        "Tasks on an expired token, refreshed in 50 ms: medians of {rounds} interleaved rounds"
    ));
    println!("\n`x floor` compares the time beyond the 50 ms of the source.");
}

/// Runs one herd and returns its duration in milliseconds.
fn herd(at: usize, runtime: &Runtime, tasks: usize) -> f64 {
    let measurement = Herd { runtime, tasks };
    match at {
        0 => runtime.block_on(stampede(sleep_by_hand(), tasks)),
        _ => {
            let issuer = Issuer::new(FIRST_LIFETIME, REFRESH);
            measure_contender(at - 1, runtime, &issuer, Duration::ZERO, measurement)
        }
    }
}

fn sleep_by_hand() -> impl Client {
    let wake_at = Arc::new(OnceLock::new());
    service_fn(move |request| {
        let wake_at = Arc::clone(&wake_at);
        async move {
            sleep_until(*wake_at.get_or_init(|| tokio::time::Instant::now() + REFRESH)).await;
            client(request).await
        }
    })
}

struct Herd<'a> {
    runtime: &'a Runtime,
    tasks: usize,
}

impl Measurement for Herd<'_> {
    type Output = f64;

    fn run<S: Client>(self, issuer: &Issuer, service: S) -> f64 {
        let millis = self.runtime.block_on(async {
            sleep(FIRST_LIFETIME + Duration::from_millis(10)).await;
            stampede(service, self.tasks).await
        });
        assert_eq!(issuer.refreshes(), 1, "one refresh serves the herd");
        millis
    }
}

/// Sends one request from each task and returns the milliseconds until all are answered.
async fn stampede<S: Client>(service: S, tasks: usize) -> f64 {
    let started = Instant::now();
    let send = |_| {
        let service = service.clone();
        tokio::spawn(async move { drop(service.oneshot(request()).await.expect("the request succeeds")) })
    };
    let tasks: Vec<_> = (0..tasks).map(send).collect();
    for task in tasks {
        task.await.expect("no task panicked");
    }
    started.elapsed().as_secs_f64() * 1e3
}
