//! Measures requests per second of one and of two threads that share an engine, each with its own clone of the service.
//!
//! ```console
//! $ cargo bench -p benches --bench contention
//! ```
//!
//! The threads answer batches in lockstep, so that they compete all the time; the requests of a batch are built before
//! it is timed.

use std::{
    hint::spin_loop,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Instant,
};

use benches::{
    contenders::contenders,
    full_or_smoke, is_given,
    requests::request,
    rounds::{interleave, median},
    serve::Serve,
    table::{Table, target},
};
use tokio::runtime::{Builder, Handle};

const BATCH: usize = 500;
const TARGET: f64 = 1.8;

/// Left out to keep the table short.
const OMITTED: [&str; 7] = [
    "AuthErrorLayer",
    "RefreshLayer",
    "SetRequestHeaderLayer",
    "SelamLayer, key fixed",
    "SelamLayer, key refreshing",
    "by hand, 2 headers, checked",
    "by hand, 2 headers, checked and kept",
];

fn main() {
    let rounds = full_or_smoke(41, 3);
    let runtime = Builder::new_current_thread().enable_all().build().expect("the runtime is built");
    let mut contenders = contenders(&runtime);
    contenders.retain(|contender| !OMITTED.contains(&contender.name));
    let _entered = runtime.enter();

    // Four samples of each contender: one and two threads, without and with a clone per request.
    let samples = interleave(rounds, contenders.len() * 4, |at| {
        requests_per_second(&*contenders[at / 4].service, at % 2 + 1, at % 4 >= 2)
    });

    let mut table = Table::new(&[
        "",
        "1 thread",
        "2 threads",
        "x one",
        "target",
        "a clone per request: 1 thread",
        "2 threads",
        "x one",
    ]);
    let millions = |at| format!("{:.2}", samples.median(at) / 1e6);
    for (at, contender) in contenders.iter().enumerate() {
        let at = at * 4;
        let scaling = samples.ratio(at + 1, at);
        // Times of unoptimized code mean nothing.
        let is_judged = contender.is_ours && !is_given("--test");
        table.row([
            contender.name.to_owned(),
            millions(at),
            millions(at + 1),
            format!("{scaling:.2}"),
            if is_judged { target(&format!(">= {TARGET}"), scaling >= TARGET) } else { String::new() },
            millions(at + 2),
            millions(at + 3),
            format!("{:.2}", samples.ratio(at + 3, at + 2)),
        ]);
    }
    table.print(&format!("Millions of requests per second: medians of {rounds} interleaved rounds"));
}

/// Start and end of each batch of a thread.
type Times = Vec<(Instant, Instant)>;

fn requests_per_second(service: &dyn Serve, threads: usize, clones: bool) -> f64 {
    let batches = full_or_smoke(60, 2);
    let gate = Gate { arrived: AtomicUsize::new(0), threads };
    let runtime = Handle::current();
    let services: Vec<_> = (0..threads).map(|_| service.boxed_clone()).collect();
    let times: Vec<Times> = thread::scope(|scope| {
        let run = |mut service: Box<dyn Serve>| {
            let (gate, runtime) = (&gate, runtime.clone());
            scope.spawn(move || {
                let _entered = runtime.enter();
                let time = |batch| {
                    let requests = (0..BATCH).map(|_| request()).collect();
                    gate.wait(batch);
                    let started = Instant::now();
                    if clones {
                        service.answer_all_by_clones(requests)
                    } else {
                        service.answer_all(requests)
                    }
                    (started, Instant::now())
                };
                (0..batches).map(time).collect()
            })
        };
        let threads: Vec<_> = services.into_iter().map(run).collect();
        threads.into_iter().map(|thread| thread.join().expect("no request failed")).collect()
    });
    let simultaneous: Vec<usize> = (0..batches).filter(|batch| overlaps(&times, *batch)).collect();
    let rate = |times: &Times| {
        let seconds = simultaneous.iter().map(|batch| (times[*batch].1 - times[*batch].0).as_secs_f64());
        BATCH as f64 / median(&seconds.collect::<Vec<_>>())
    };
    times.iter().map(rate).sum()
}

/// Whether the threads ran this batch at the same time. On a busy machine one may have waited for the other's processor;
/// such a batch says nothing about contention.
fn overlaps(times: &[Times], batch: usize) -> bool {
    let started = times.iter().map(|times| times[batch].0);
    let ended = times.iter().map(|times| times[batch].1);
    let (first, last) = (started.clone().min(), ended.clone().max());
    let (from, to) = (started.max(), ended.min());
    let seconds = |from: Option<Instant>, to: Option<Instant>| {
        to.zip(from).map_or(0.0, |(to, from)| to.saturating_duration_since(from).as_secs_f64())
    };
    seconds(from, to) >= 0.8 * seconds(first, last)
}

/// A spinning barrier: a parked thread would start too late.
struct Gate {
    arrived: AtomicUsize,
    threads: usize,
}

impl Gate {
    /// Waits until all threads have arrived at this batch.
    fn wait(&self, batch: usize) {
        self.arrived.fetch_add(1, Ordering::AcqRel);
        let mut spins = 0_u32;
        while self.arrived.load(Ordering::Acquire) < self.threads * (batch + 1) {
            // On a single processor the other thread needs the time.
            if spins > 10_000 {
                thread::yield_now()
            } else {
                spin_loop()
            }
            spins = spins.saturating_add(1);
        }
    }
}
