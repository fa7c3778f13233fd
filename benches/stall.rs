//! Latency of requests while a token is renewed in its advisory window, in 200 ms, beside the same load without renewal.
//!
//! ```console
//! $ cargo bench -p benches --bench stall
//! $ cargo bench -p benches --bench stall -- --plot   # draws benches/plots/renewal.svg
//! ```
//!
//! One thread sends a request every 10 µs whether the others were answered or not, and counts from when it was due: a
//! request that is held does not hide those behind it. The renewal runs on another thread.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, Wake, Waker},
    thread,
    time::{Duration, Instant},
};

use benches::{
    is_given,
    issuer::{Issuer, by_mutex, by_rw_lock},
    or_short, plot,
    rounds::{median, percentile},
    table::{Table, verdict},
    traffic::{Body, KEY, client, request},
};
use http::{Request, Response};
use tokio::runtime::{Builder, Runtime};
use tower::{Layer, Service, service_fn};
use tower_selam::{ApiKey, JwtLayer, SelamLayer};

const TAKES: Duration = Duration::from_millis(200);
/// Its second half is the advisory window.
const LIFETIME: Duration = Duration::from_secs(1);
/// Those without windows renew when half of the lifetime is left.
const MARGIN: Duration = Duration::from_millis(500);
const EVERY: Duration = Duration::from_micros(10);
const LOAD: Duration = Duration::from_millis(800);
const TARGET: f64 = 1.5;

/// Puts the load on a contender.
type Run = fn(&Runtime) -> Latencies;

/// Above this p99 of the bare service, in µs, the machine has something else to do.
const QUIET: f64 = 50.0;

const BARE: usize = 0;
const CONTENDERS: [(&str, Run); 5] = [
    ("bare service", bare),
    ("SelamLayer, JWT renewing", selam),
    ("JwtLayer, JWT renewing", jwt_layer),
    ("Mutex<Token> and format!", mutex),
    ("RwLock<HeaderValue>", rw_lock),
];

/// When each request was due, counted from the beginning of the renewal, and how long it took from then; in seconds.
struct Latencies(Vec<(f64, f64)>);

/// Of one part of one round, in microseconds.
struct Part {
    p50: f64,
    p99: f64,
    longest: f64,
}

fn main() {
    let rounds = or_short(41, 1);
    let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let mut outside: Vec<Vec<Part>> = CONTENDERS.iter().map(|_| Vec::new()).collect();
    let mut during: Vec<Vec<Part>> = CONTENDERS.iter().map(|_| Vec::new()).collect();
    let mut curves = Vec::new();
    for round in 0..rounds {
        for turn in 0..CONTENDERS.len() {
            let at = (round + turn) % CONTENDERS.len();
            let latencies = CONTENDERS[at].1(&runtime);
            outside[at].push(latencies.part(-0.25, -0.05));
            // A little more than the renewal: how it begins and how the new token arrives belong to it.
            during[at].push(latencies.part(-0.001, TAKES.as_secs_f64() + 0.005));
            curves.push((at, latencies.p99_over_time()));
        }
    }

    println!(
        "\nLatency in µs, outside of a renewal and while one of 200 ms runs: medians of {rounds} interleaved rounds\n"
    );
    let mut table = Table::new(&[
        "",
        "p50 outside",
        "during",
        "p99 outside",
        "during",
        "x outside",
        "target",
        "",
        "longest outside",
        "during",
    ]);
    let is_busy = [&outside, &during]
        .iter()
        .any(|parts| median(&parts[BARE].iter().map(|part| part.p99).collect::<Vec<_>>()) > QUIET);
    for (at, (name, _)) in CONTENDERS.iter().enumerate() {
        let of =
            |parts: &[Part], value: fn(&Part) -> f64| median(&parts.iter().map(value).collect::<Vec<_>>());
        let (outside, during) = (&outside[at], &during[at]);
        let ratios: Vec<f64> =
            during.iter().zip(outside).map(|(during, outside)| during.p99 / outside.p99).collect();
        let is_ours = name.contains("Layer");
        table.row([
            (*name).to_owned(),
            format!("{:.2}", of(outside, |part| part.p50)),
            format!("{:.2}", of(during, |part| part.p50)),
            format!("{:.2}", of(outside, |part| part.p99)),
            format!("{:.2}", of(during, |part| part.p99)),
            format!("{:.2}", median(&ratios)),
            if is_ours { format!("<= {TARGET}") } else { String::new() },
            match (is_ours, is_busy) {
                (false, _) => String::new(),
                (true, true) => "unproven".to_owned(),
                (true, false) => verdict(median(&ratios) <= TARGET),
            },
            format!("{:.1}", of(outside, |part| part.longest)),
            format!("{:.1}", of(during, |part| part.longest)),
        ]);
    }
    table.print();
    if is_busy {
        println!(
            "\nThe machine is busy, as the bare service shows: nothing is proven. Run it on a quiet one."
        );
    }

    if is_given("--plot") {
        let curves: Vec<_> = [1, 3, 0]
            .map(|at| plot::Curve {
                name: CONTENDERS[at].0,
                points: medians(curves.iter().filter(|(of, _)| *of == at).map(|(_, curve)| curve)),
            })
            .into();
        plot::renewal(&curves, TAKES);
    }
}

fn bare(runtime: &Runtime) -> Latencies {
    let began = Instant::now();
    load(runtime, service_fn(client)).since(began + LOAD / 2)
}

fn selam(runtime: &Runtime) -> Latencies {
    let issuer = Issuer::new(LIFETIME, TAKES);
    let jwts = issuer.renewing();
    let key = ApiKey::new(KEY).expect("a key");
    let layer = SelamLayer::builder().with_api_key(key).with_jwt(&jwts).build().expect("a layer");
    runtime.block_on(jwts.prefetch()).expect("the first token");
    load(runtime, layer.layer(service_fn(client))).since_renewal(&issuer)
}

fn jwt_layer(runtime: &Runtime) -> Latencies {
    let issuer = Issuer::new(LIFETIME, TAKES);
    let jwts = issuer.renewing();
    let layer = JwtLayer::new(&jwts, ApiKey::new(KEY).expect("a key"));
    runtime.block_on(jwts.prefetch()).expect("the first token");
    load(runtime, layer.layer(service_fn(client))).since_renewal(&issuer)
}

fn mutex(runtime: &Runtime) -> Latencies {
    let issuer = Issuer::new(LIFETIME, TAKES);
    let service = runtime.block_on(by_mutex(Arc::clone(&issuer), MARGIN));
    load(runtime, service).since_renewal(&issuer)
}

fn rw_lock(runtime: &Runtime) -> Latencies {
    let issuer = Issuer::new(LIFETIME, TAKES);
    let service = runtime.block_on(by_rw_lock(Arc::clone(&issuer), MARGIN));
    load(runtime, service).since_renewal(&issuer)
}

/// When each request was due and when it was answered.
struct Log(Vec<(Instant, Instant)>);

impl Log {
    fn since(self, began: Instant) -> Latencies {
        let seconds = |from: Instant, to: Instant| match to.checked_duration_since(from) {
            Some(after) => after.as_secs_f64(),
            None => -from.duration_since(to).as_secs_f64(),
        };
        Latencies(
            self.0.into_iter().map(|(due, answered)| (seconds(began, due), seconds(due, answered))).collect(),
        )
    }

    fn since_renewal(self, issuer: &Issuer) -> Latencies {
        assert_eq!(issuer.renewals(), 1, "one renewal");
        // On a machine that is very busy it may not have ended yet.
        loop {
            match issuer.busy() {
                Some((began, _)) => return self.since(began),
                None => thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}

impl Latencies {
    fn part(&self, from: f64, to: f64) -> Part {
        let within = self.0.iter().filter(|(due, _)| (from..to).contains(due));
        let micros: Vec<f64> = within.map(|(_, took)| took * 1e6).collect();
        Part {
            p50: percentile(&micros, 50.0),
            p99: percentile(&micros, 99.0),
            longest: percentile(&micros, 100.0),
        }
    }

    /// The 99th percentile, in microseconds, of those that were due in each two milliseconds.
    fn p99_over_time(&self) -> BTreeMap<i32, f64> {
        let mut parts = BTreeMap::<i32, Vec<f64>>::new();
        for (due, took) in &self.0 {
            parts.entry((due * 1e3 / 2.0).floor() as i32 * 2).or_default().push(took * 1e6);
        }
        parts.into_iter().map(|(at, micros)| (at, percentile(&micros, 99.0))).collect()
    }
}

/// For each time the median of the rounds.
fn medians<'a>(curves: impl Iterator<Item = &'a BTreeMap<i32, f64>>) -> Vec<(i32, f64)> {
    let mut rounds = BTreeMap::<i32, Vec<f64>>::new();
    for (at, micros) in curves.flatten() {
        rounds.entry(*at).or_default().push(*micros);
    }
    rounds.into_iter().map(|(at, micros)| (at, median(&micros))).collect()
}

/// A request that was not answered at once.
struct Held<F> {
    due: Instant,
    response: Pin<Box<F>>,
    waker: Waker,
}

/// Which of them are to be polled again.
#[derive(Default)]
struct Woken(Mutex<Vec<usize>>);

struct Wakes {
    woken: Arc<Woken>,
    number: usize,
}

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.woken.0.lock().expect("the lock").push(self.number);
    }
}

/// Sends a request whenever one is due.
fn load<S, R>(runtime: &Runtime, mut service: S) -> Log
where
    S: Service<Request<Body>, Response = Response<R>>,
{
    let _entered = runtime.enter();
    let number = (LOAD.as_nanos() / EVERY.as_nanos()) as usize;
    let mut log = Vec::with_capacity(number);
    let mut held: Vec<Option<Held<S::Future>>> = (0..number).map(|_| None).collect();
    let woken = Arc::new(Woken::default());
    let (mut next, mut sent) = (request(), 0);
    let mut due = Instant::now();
    while log.len() < number {
        if sent < number && Instant::now() >= due {
            let mut context = Context::from_waker(Waker::noop());
            assert!(matches!(service.poll_ready(&mut context), Poll::Ready(Ok(()))));
            let mut response = Box::pin(service.call(next));
            let waker = Waker::from(Arc::new(Wakes { woken: Arc::clone(&woken), number: sent }));
            match response.as_mut().poll(&mut Context::from_waker(&waker)) {
                Poll::Ready(answer) => {
                    log.push((due, Instant::now()));
                    drop(answer);
                }
                Poll::Pending => held[sent] = Some(Held { due, response, waker }),
            }
            (next, sent, due) = (request(), sent + 1, due + EVERY);
            continue;
        }
        let ready = std::mem::take(&mut *woken.0.lock().expect("the lock"));
        for number in ready {
            let Some(waiting) = &mut held[number] else { continue };
            let polled = waiting.response.as_mut().poll(&mut Context::from_waker(&waiting.waker));
            if polled.is_ready() {
                log.push((waiting.due, Instant::now()));
                held[number] = None;
            }
        }
    }
    Log(log)
}
