//! Measures latency while a token is refreshed in its advisory window, for 200 ms, and before that refresh.
//!
//! ```console
//! $ cargo bench -p benches --bench stall
//! $ cargo bench -p benches --bench stall -- --plot   # draws benches/plots/refresh.svg
//! ```
//!
//! One thread sends a request every 10 µs, whether or not earlier ones were answered, and measures from the time it was
//! due: a blocked request does not hide those behind it. The refresh runs on another thread.

use std::{
    collections::BTreeMap,
    task::{Context, Poll, Waker},
    thread,
    time::{Duration, Instant},
};

use benches::{
    full_or_smoke, is_given,
    issuer::{CONTENDERS, Client, Issuer, Measurement, measure_contender},
    plot,
    requests::{client, request},
    rounds::{median, percentile},
    table::Table,
};
use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::runtime::{Builder, Runtime};
use tower::service_fn;

const REFRESH: Duration = Duration::from_millis(200);
/// Its second half is the advisory window.
const FIRST_LIFETIME: Duration = Duration::from_secs(1);
/// The locks have no window; they refresh when half of the lifetime is left.
const MARGIN: Duration = Duration::from_millis(500);
const EVERY: Duration = Duration::from_micros(10);
const LOAD: Duration = Duration::from_millis(800);

fn main() {
    let rounds = full_or_smoke(41, 1);
    let runtime =
        Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("the runtime is built");
    let names: Vec<&str> = ["bare service"].into_iter().chain(CONTENDERS).collect();
    let mut results: Vec<Results> = names.iter().map(|_| Results::default()).collect();
    for round in 0..rounds {
        for turn in 0..names.len() {
            let at = (round + turn) % names.len();
            results[at].add(&latencies(at, &runtime));
        }
    }

    let mut table = Table::new(&[
        "",
        "p50 before",
        "during",
        "p99 before",
        "during",
        "x before",
        "longest before",
        "during",
    ]);
    for (name, Results { before, during, .. }) in names.iter().zip(&results) {
        let pair = |decimals: usize, value: fn(&Summary) -> f64| {
            [before, during]
                .map(|rounds| median(&rounds.iter().map(value).collect::<Vec<_>>()))
                .map(|micros| format!("{micros:.decimals$}"))
        };
        let ratios = during.iter().zip(before).map(|(during, before)| during.p99 / before.p99);
        let ratio = format!("{:.2}", median(&ratios.collect::<Vec<_>>()));
        let percentiles = [pair(2, |summary| summary.p50), pair(2, |summary| summary.p99)];
        let cells = [(*name).to_owned()].into_iter().chain(percentiles.into_iter().flatten());
        table.row(cells.chain([ratio]).chain(pair(1, |summary| summary.longest)));
    }
    table.print(&format!(
        "Latency in µs, before a refresh and during one of 200 ms: medians of {rounds} interleaved rounds"
    ));

    if is_given("--plot") {
        let curve = |at: usize| plot::Curve { name: names[at], points: results[at].curve() };
        plot::latency_during_refresh(&[curve(1), curve(3), curve(0)], REFRESH);
    }
}

/// One contender's rounds.
#[derive(Default)]
struct Results {
    before: Vec<Summary>,
    during: Vec<Summary>,
    /// The 99th percentiles of all rounds, by milliseconds since the refresh began.
    p99: BTreeMap<i32, Vec<f64>>,
}

/// One part of one round, in microseconds.
struct Summary {
    p50: f64,
    p99: f64,
    longest: f64,
}

/// When each request was due, in seconds since the refresh began, and its latency in microseconds.
struct Latencies(Vec<(f64, f64)>);

impl Latencies {
    fn since(refresh: Instant, answered: Vec<(Instant, Instant)>) -> Self {
        let seconds = |from: Instant, to: Instant| match to.checked_duration_since(from) {
            Some(duration) => duration.as_secs_f64(),
            None => -from.duration_since(to).as_secs_f64(),
        };
        let latency = |(due, answered)| (seconds(refresh, due), seconds(due, answered) * 1e6);
        Self(answered.into_iter().map(latency).collect())
    }

    fn summary(&self, from: f64, to: f64) -> Summary {
        let part = self.0.iter().filter(|(due, _)| (from..to).contains(due));
        let micros: Vec<f64> = part.map(|(_, micros)| *micros).collect();
        let [p50, p99, longest] = [50.0, 99.0, 100.0].map(|percent| percentile(&micros, percent));
        Summary { p50, p99, longest }
    }
}

impl Results {
    fn add(&mut self, latencies: &Latencies) {
        self.before.push(latencies.summary(-0.25, -0.05));
        // A little longer than the refresh, to include its start and the arrival of the new token.
        self.during.push(latencies.summary(-0.001, REFRESH.as_secs_f64() + 0.005));
        let mut slots = BTreeMap::<i32, Vec<f64>>::new();
        for (due, micros) in &latencies.0 {
            slots.entry((due * 1e3 / 2.0).floor() as i32 * 2).or_default().push(*micros);
        }
        for (at, micros) in slots {
            self.p99.entry(at).or_default().push(percentile(&micros, 99.0));
        }
    }

    /// The median round at each time.
    fn curve(&self) -> Vec<(i32, f64)> {
        self.p99.iter().map(|(at, micros)| (*at, median(micros))).collect()
    }
}

fn latencies(at: usize, runtime: &Runtime) -> Latencies {
    if at == 0 {
        let started = Instant::now();
        return Latencies::since(started + LOAD / 2, load(runtime, service_fn(client)));
    }
    let issuer = Issuer::new(FIRST_LIFETIME, REFRESH);
    measure_contender(at - 1, runtime, &issuer, MARGIN, Load { runtime })
}

struct Load<'a> {
    runtime: &'a Runtime,
}

impl Measurement for Load<'_> {
    type Output = Latencies;

    fn run<S: Client>(self, issuer: &Issuer, service: S) -> Latencies {
        let answered = load(self.runtime, service);
        assert_eq!(issuer.refreshes(), 1, "one refresh runs during the load");
        loop {
            match issuer.last_refresh() {
                Some((started, _)) => return Latencies::since(started, answered),
                // On a very busy machine it may not have ended yet.
                None => thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}

/// Sends a request whenever one is due; returns when each was due and when it was answered.
fn load<S: Client>(runtime: &Runtime, mut service: S) -> Vec<(Instant, Instant)> {
    let _entered = runtime.enter();
    let count = (LOAD.as_nanos() / EVERY.as_nanos()) as usize;
    let mut answered = Vec::with_capacity(count);
    let mut waiting = FuturesUnordered::new();
    let mut context = Context::from_waker(Waker::noop());
    let (mut next, mut sent, mut due) = (request(), 0, Instant::now());
    while answered.len() < count {
        if sent < count && Instant::now() >= due {
            assert!(matches!(service.poll_ready(&mut context), Poll::Ready(Ok(()))));
            let response = service.call(next);
            let mut answer = Box::pin(async move {
                let _response = response.await.expect("the request succeeds");
                (due, Instant::now())
            });
            match answer.as_mut().poll(&mut context) {
                Poll::Ready(times) => answered.push(times),
                // Polled again at once, with a waker of the set.
                Poll::Pending => waiting.push(answer),
            }
            (next, sent, due) = (request(), sent + 1, due + EVERY);
        } else if let Poll::Ready(Some(times)) = waiting.poll_next_unpin(&mut context) {
            answered.push(times);
        }
    }
    answered
}
