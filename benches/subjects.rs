//! Measures time per request and bytes per subject, with the tokens of 1, 1,000 and 100,000 subjects.
//!
//! ```console
//! $ cargo bench -p benches --bench subjects
//! ```
//!
//! Each request belongs to a random subject, all equally likely: the hardest case for the processor's caches. The floor
//! finds a ready header in a `HashMap` without a lock and writes the two headers, so its growth from 1 to 100,000
//! subjects is the cost of cache misses alone.

use std::{collections::HashMap, sync::Arc, thread};

use allocation_counter::measure;
use benches::{
    full_or_smoke,
    layers::{HOUR, fixed_key, jwt_and_key_layers, selam_with_jwt},
    requests::{Body, JWT, KEY, client, request, sensitive},
    rounds::{interleave, nanos_per_request},
    serve::{Serve, serve},
    table::Table,
};
use http::{HeaderName, HeaderValue, Request, header::AUTHORIZATION};
use tokio::runtime::{Builder, Runtime};
use tower::{Layer, ServiceBuilder, service_fn};
use tower_selam::{
    BoxError, PerSubject, Subject, Token,
    source::{Fetched, Reason, source_fn},
};

const REQUESTS: usize = 1_000;

/// Makes a service that holds the tokens of this many subjects.
type Make = fn(&Runtime, usize) -> Box<dyn Serve>;

const CONTENDERS: [(&str, Make); 3] = [
    ("by hand, 2 headers, HashMap", by_hand),
    ("JwtLayer + ApiKeyLayer, PerSubject", jwt_and_key),
    ("SelamLayer, PerSubject", selam),
];

/// One row of the table.
struct Row {
    name: &'static str,
    subjects: usize,
    service: Box<dyn Serve>,
    bytes_per_subject: u64,
}

fn main() {
    let rounds = full_or_smoke(101, 2);
    let numbers = full_or_smoke([1, 1_000, 100_000], [1, 10, 1_000]);
    let runtime = Builder::new_current_thread().enable_all().build().expect("the runtime is built");
    let mut rows: Vec<Row> = CONTENDERS
        .iter()
        .flat_map(|&(name, make)| numbers.map(|subjects| Row::new(&runtime, name, make, subjects)))
        .collect();

    // On another thread, whose allocator does not scatter the requests among the freed memory of the set-up.
    let samples = thread::scope(|scope| {
        let measuring = scope.spawn(|| {
            let _entered = runtime.enter();
            let mut random = Random(1);
            interleave(rounds, rows.len(), |at| {
                let Row { subjects, service, .. } = &mut rows[at];
                let requests = (0..REQUESTS).map(|_| request_of(random.below(*subjects))).collect();
                nanos_per_request(&mut **service, requests)
            })
        });
        measuring.join().expect("no request failed")
    });

    let mut table = Table::new(&["", "subjects", "ns", "x one subject", "x floor", "bytes per subject"]);
    for (at, row) in rows.iter().enumerate() {
        let number = at % numbers.len();
        table.row([
            row.name.to_owned(),
            row.subjects.to_string(),
            format!("{:.0}", samples.median(at)),
            format!("{:.2}", samples.ratio(at, at - number)),
            format!("{:.2}", samples.ratio(at, number)),
            row.bytes_per_subject.to_string(),
        ]);
    }
    table.print(&format!(
        "Requests of many subjects: medians of {rounds} interleaved rounds of {REQUESTS} requests"
    ));
    println!(
        "\nThe text of the JWT is {} of the bytes per subject; with one subject, most are the table's.",
        jwt(&subject(0)).len()
    );
}

impl Row {
    fn new(runtime: &Runtime, name: &'static str, make: Make, subjects: usize) -> Self {
        let mut service = None;
        // Counts what is alive after each subject has sent a request.
        let counted = measure(|| {
            let mut made = make(runtime, subjects);
            let _entered = runtime.enter();
            for subject in 0..subjects {
                made.answer_all(vec![request_of(subject)]);
            }
            service = Some(made);
        });
        let bytes_per_subject = u64::try_from(counted.bytes_current).unwrap_or_default() / subjects as u64;
        Self { name, subjects, service: service.expect("the service is made"), bytes_per_subject }
    }
}

fn by_hand(_: &Runtime, subjects: usize) -> Box<dyn Serve> {
    let (x_api_key, key) = (HeaderName::from_static("x-api-key"), sensitive(KEY));
    let bearer = |subject: Subject| {
        let bearer = sensitive(&format!("Bearer {}", jwt(&subject)));
        (subject, bearer)
    };
    let bearers: Arc<HashMap<Subject, HeaderValue>> =
        Arc::new((0..subjects).map(subject).map(bearer).collect());
    let service = ServiceBuilder::new()
        .map_request(move |mut request: Request<Body>| {
            let subject = request.extensions().get::<Subject>().expect("the request has a subject");
            let bearer = bearers[subject].clone();
            request.headers_mut().insert(AUTHORIZATION, bearer);
            request.headers_mut().insert(x_api_key.clone(), key.clone());
            request
        })
        .service_fn(client);
    serve(service)
}

fn jwt_and_key(runtime: &Runtime, subjects: usize) -> Box<dyn Serve> {
    serve(jwt_and_key_layers(tokens(runtime, subjects), fixed_key()).layer(service_fn(client)))
}

fn selam(runtime: &Runtime, subjects: usize) -> Box<dyn Serve> {
    serve(selam_with_jwt(tokens(runtime, subjects), fixed_key()).layer(service_fn(client)))
}

/// Fetches a token for each subject, valid for an hour.
fn tokens(runtime: &Runtime, subjects: usize) -> PerSubject {
    let tokens = PerSubject::new(|subject: &Subject| {
        let subject = subject.clone();
        source_fn(move |_: Reason<Token>| {
            let token = Token::new(jwt(&subject));
            async move { Ok::<_, BoxError>(Fetched::new(token?).with_lifetime(HOUR)) }
        })
    });
    for number in 0..subjects {
        runtime.block_on(tokens.of_subject(&subject(number)).prefetch()).expect("the token is fetched");
    }
    tokens
}

fn subject(number: usize) -> Subject {
    Subject::new(format!("user-{number:06}"))
}

/// A JWT that differs from every other subject's.
fn jwt(subject: &Subject) -> String {
    format!("{JWT}{}", subject.as_str())
}

fn request_of(number: usize) -> Request<Body> {
    let mut request = request();
    request.extensions_mut().insert(subject(number));
    request
}

/// Marsaglia's xorshift: the same numbers in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}
