//! Requests per second with one and two threads that share one engine, each with its own clone of the service.
//!
//! ```console
//! $ cargo bench -p benches --bench contention
//! $ cargo bench -p benches --bench contention -- --plot   # draws benches/plots/contention.svg
//! ```
//!
//! The threads answer batches in step, so that they meet all the time; the requests of a batch are built before it
//! begins, which takes no part in the time. What two threads get is beside what one gets of the same round.

use std::{
    hint::spin_loop,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Instant,
};

use benches::{
    contenders::{
        BARE, ONE_HEADER, PRIVATE_HEADERS, Serve, TWO_HEADERS, contenders, position, private_headers,
    },
    is_given, or_short, plot,
    rounds::{interleave, median},
    table::{Table, verdict},
    traffic::request,
};
use tokio::runtime::{Builder, Handle};

const BATCH: usize = 500;
const CLONES: usize = 1_000;
const TARGET: f64 = 1.8;

const SHOWN: [&str; 13] = [
    BARE,
    ONE_HEADER,
    "ApiKeyLayer, fixed",
    "ApiKeyLayer, renewing",
    TWO_HEADERS,
    PRIVATE_HEADERS,
    "2 x SetRequestHeaderLayer",
    "Mutex<Token> and format!",
    "RwLock<HeaderValue>",
    "JwtLayer, fixed",
    "JwtLayer, renewing",
    "SelamLayer, JWT and key fixed",
    "SelamLayer, JWT and key renewing",
];

/// What is measured of each.
const WAYS: usize = 5;

fn main() {
    let rounds = or_short(41, 3);
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    let mut contenders = contenders(&runtime);
    contenders.insert(position(&contenders, TWO_HEADERS) + 1, private_headers());
    contenders.retain(|contender| SHOWN.contains(&contender.name));
    let _entered = runtime.enter();

    let samples = interleave(rounds, contenders.len() * WAYS, |at| {
        let service = &*contenders[at / WAYS].service;
        match at % WAYS {
            0 => rate(service, 1, false),
            1 => rate(service, 2, false),
            2 => rate(service, 1, true),
            3 => rate(service, 2, true),
            _ => {
                let started = Instant::now();
                service.clones(CLONES);
                started.elapsed().as_nanos() as f64 / CLONES as f64
            }
        }
    });

    let scaling = |at: usize| samples.ratio(at * WAYS + 1, at * WAYS);
    let bare = scaling(position(&contenders, BARE));
    let target = TARGET.min(bare);
    println!("\nRequests per second, in millions: medians of {rounds} interleaved rounds\n");
    let mut table = Table::new(&[
        "",
        "1 thread",
        "2 threads",
        "x one",
        "target",
        "",
        "ns to clone",
        "cloned for each: 1 thread",
        "2 threads",
        "x one",
    ]);
    let millions = |at| format!("{:.2}", samples.median(at) / 1e6);
    for (at, contender) in contenders.iter().enumerate() {
        let first = at * WAYS;
        let is_ours = contender.is_ours;
        table.row([
            contender.name.to_owned(),
            millions(first),
            millions(first + 1),
            format!("{:.2}", scaling(at)),
            if is_ours { format!(">= {target:.2}") } else { String::new() },
            if is_ours { verdict(scaling(at) >= target) } else { String::new() },
            format!("{:.0}", samples.median(first + 4)),
            millions(first + 2),
            millions(first + 3),
            format!("{:.2}", samples.ratio(first + 3, first + 2)),
        ]);
    }
    table.print();
    println!("\nThe target is {TARGET} x, or what the bare service reaches where that is less: {bare:.2} x.");

    if is_given("--plot") {
        let pairs: Vec<_> = contenders
            .iter()
            .enumerate()
            .filter(|(_, contender)| contender.floor != ONE_HEADER)
            .map(|(at, contender)| plot::Pair {
                name: contender.name,
                is_ours: contender.is_ours,
                one: samples.median(at * WAYS) / 1e6,
                two: samples.median(at * WAYS + 1) / 1e6,
                times: scaling(at),
            })
            .collect();
        plot::contention(&pairs, bare);
    }
}

/// Requests per second of so many threads.
fn rate(service: &dyn Serve, threads: usize, clones: bool) -> f64 {
    let batches = or_short(60, 2);
    let gate = Gate { arrived: AtomicUsize::new(0), threads };
    let runtime = Handle::current();
    let services: Vec<_> = (0..threads).map(|_| service.clone_service()).collect();
    let times: Vec<Vec<(Instant, Instant)>> = thread::scope(|scope| {
        let threads: Vec<_> = services
            .into_iter()
            .map(|mut service| {
                let (gate, runtime) = (&gate, runtime.clone());
                scope.spawn(move || {
                    let _entered = runtime.enter();
                    let answer = |batch| {
                        let requests: Vec<_> = (0..BATCH).map(|_| request()).collect();
                        gate.pass(batch);
                        let began = Instant::now();
                        if clones {
                            service.answers_by_clones(requests)
                        } else {
                            service.answers(requests)
                        }
                        (began, Instant::now())
                    };
                    (0..batches).map(answer).collect()
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("no request failed")).collect()
    });
    let together: Vec<usize> = (0..batches).filter(|batch| were_together(&times, *batch)).collect();
    let rate = |times: &Vec<(Instant, Instant)>| {
        let took = |batch: &usize| (times[*batch].1 - times[*batch].0).as_secs_f64();
        BATCH as f64 / median(&together.iter().map(took).collect::<Vec<_>>())
    };
    times.iter().map(rate).sum()
}

/// Whether the threads answered this batch at the same time. On a machine that is busy, one may have had to wait for the
/// other's processor: then they did not meet.
fn were_together(times: &[Vec<(Instant, Instant)>], batch: usize) -> bool {
    let began = times.iter().map(|times| times[batch].0);
    let ended = times.iter().map(|times| times[batch].1);
    let first = began.clone().min().zip(ended.clone().max());
    let common = began.max().zip(ended.min());
    match (first, common) {
        (Some((first, last)), Some((from, to))) => {
            to.saturating_duration_since(from).as_secs_f64() >= 0.8 * (last - first).as_secs_f64()
        }
        _ => false,
    }
}

/// Lets all threads go on at once.
struct Gate {
    arrived: AtomicUsize,
    threads: usize,
}

impl Gate {
    fn pass(&self, times: usize) {
        self.arrived.fetch_add(1, Ordering::AcqRel);
        let mut spins = 0_u32;
        while self.arrived.load(Ordering::Acquire) < self.threads * (times + 1) {
            // Where there is one processor, the other thread needs it.
            if spins > 10_000 {
                thread::yield_now()
            } else {
                spin_loop()
            }
            spins = spins.saturating_add(1);
        }
    }
}
