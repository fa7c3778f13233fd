//! Cost per request and bytes per subject, with the tokens of 1, 1,000 and 100,000 users.
//!
//! ```console
//! $ cargo bench -p benches --bench subjects
//! ```
//!
//! Each request is of a user taken by chance. The floor looks a ready header up by the user's name, in a `HashMap` without a
//! lock, and writes the two headers: what it takes for 100,000 over one is what the machine's caches take.

use std::{
    collections::HashMap,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use allocation_counter::measure;
use benches::{
    contenders::{Serve, served},
    or_short,
    rounds::interleave,
    table::{Table, verdict},
    traffic::{Body, JWT, KEY, client, request, sensitive},
};
use http::{HeaderName, HeaderValue, Request, header::AUTHORIZATION};
use tokio::runtime::{Builder, Runtime};
use tower::{Layer, ServiceBuilder, service_fn};
use tower_selam::{
    ApiKey, BoxError, JwtLayer, PerSubject, SelamLayer, Subject, Token,
    source::{Fetched, Reason, source_fn},
};

const HOUR: Duration = Duration::from_secs(60 * 60);
const REQUESTS: usize = 1_000;
const TIMES: f64 = 2.0;
const BYTES: u64 = 1_024;

/// A service with the tokens of so many users.
type Make = fn(&Runtime, usize) -> Box<dyn Serve>;

const CONTENDERS: [(&str, Make); 3] = [
    ("by hand, 2 headers, HashMap", by_hand),
    ("JwtLayer, PerSubject", jwt_layer),
    ("SelamLayer, PerSubject", selam),
];

/// A contender with its users.
struct Served {
    name: &'static str,
    users: usize,
    service: Box<dyn Serve>,
    bytes: u64,
}

fn main() {
    let rounds = or_short(101, 2);
    let numbers = or_short([1, 1_000, 100_000], [1, 10, 1_000]);
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    let mut all: Vec<Served> = CONTENDERS
        .iter()
        .flat_map(|&(name, make)| numbers.map(|users| (name, make, users)))
        .map(|(name, make, users)| Served::new(&runtime, name, make, users))
        .collect();

    // On a thread of its own, with memory of its own: requests would else lie scattered in what the users left free.
    let samples = thread::scope(|scope| {
        let measuring = scope.spawn(|| {
            let _entered = runtime.enter();
            let mut chance = Chance(1);
            interleave(rounds, all.len(), |at| {
                let Served { users, service, .. } = &mut all[at];
                let requests: Vec<_> = (0..REQUESTS).map(|_| request_of(chance.below(*users))).collect();
                let started = Instant::now();
                service.answers(requests);
                started.elapsed().as_nanos() as f64 / REQUESTS as f64
            })
        });
        measuring.join().expect("no request failed")
    });

    println!("\nRequests of many users: medians of {rounds} interleaved rounds of {REQUESTS} requests\n");
    let mut table = Table::new(&[
        "",
        "users",
        "ns",
        "x one user",
        "target",
        "",
        "x floor",
        "bytes per user",
        "target",
        "",
    ]);
    for (at, Served { name, users, bytes, .. }) in all.iter().enumerate() {
        let of_one = at - at % numbers.len();
        let ratio = samples.ratio(at, of_one);
        let (is_ours, is_most) = (of_one != 0, *users == numbers[2]);
        let text = |yes: bool, text: String| if yes { text } else { String::new() };
        table.row([
            (*name).to_owned(),
            users.to_string(),
            format!("{:.0}", samples.median(at)),
            format!("{ratio:.2}"),
            text(is_ours && is_most, format!("<= {TIMES}")),
            text(is_ours && is_most, verdict(ratio <= TIMES)),
            format!("{:.2}", samples.ratio(at, at % numbers.len())),
            bytes.to_string(),
            text(is_ours && is_most, format!("< {BYTES}")),
            text(is_ours && is_most, verdict(*bytes < BYTES)),
        ]);
    }
    table.print();
    let floor = samples.ratio(numbers.len() - 1, 0);
    println!("\nThe floor itself is {floor:.2} times as dear for {} users as for one.", numbers[2]);
    println!(
        "Of the bytes per user, the text of the JWT is {}; with one user, most are the table's.",
        jwt(&subject(0)).len()
    );
}

impl Served {
    fn new(runtime: &Runtime, name: &'static str, make: Make, users: usize) -> Self {
        let mut service = None;
        // What is alive when each user has had a request.
        let counted = measure(|| {
            let mut made = make(runtime, users);
            let _entered = runtime.enter();
            for user in 0..users {
                made.answers(vec![request_of(user)]);
            }
            service = Some(made);
        });
        let bytes = u64::try_from(counted.bytes_current).unwrap_or_default() / users as u64;
        Self { name, users, service: service.expect("it was made"), bytes }
    }
}

fn by_hand(_: &Runtime, users: usize) -> Box<dyn Serve> {
    let (own, key) = (HeaderName::from_static("x-api-key"), sensitive(KEY));
    let bearers: HashMap<Subject, HeaderValue> = (0..users)
        .map(subject)
        .map(|user| {
            let bearer = sensitive(&format!("Bearer {}", jwt(&user)));
            (user, bearer)
        })
        .collect();
    let bearers = Arc::new(bearers);
    let service = ServiceBuilder::new()
        .map_request(move |mut request: Request<Body>| {
            let subject = request.extensions().get::<Subject>().expect("a subject");
            let bearer = bearers[subject].clone();
            request.headers_mut().insert(AUTHORIZATION, bearer);
            request.headers_mut().insert(own.clone(), key.clone());
            request
        })
        .service_fn(client);
    served(service)
}

fn jwt_layer(runtime: &Runtime, users: usize) -> Box<dyn Serve> {
    let layer = JwtLayer::new(tokens(runtime, users), ApiKey::new(KEY).expect("a key"));
    served(layer.layer(service_fn(client)))
}

fn selam(runtime: &Runtime, users: usize) -> Box<dyn Serve> {
    let key = ApiKey::new(KEY).expect("a key");
    let layer = SelamLayer::builder().with_api_key(key).with_jwt(tokens(runtime, users)).build();
    served(layer.expect("a layer").layer(service_fn(client)))
}

/// A token for each user, from a source that knows its name, each good for an hour.
fn tokens(runtime: &Runtime, users: usize) -> PerSubject {
    let tokens = PerSubject::new(|subject: &Subject| {
        let subject = subject.clone();
        source_fn(move |_: Reason<Token>| {
            let token = Token::new(jwt(&subject));
            async move { Ok::<_, BoxError>(Fetched::new(token?).with_lifetime(HOUR)) }
        })
    });
    for user in 0..users {
        runtime.block_on(tokens.of_subject(&subject(user)).prefetch()).expect("a token");
    }
    tokens
}

fn subject(user: usize) -> Subject {
    Subject::new(format!("user-{user:06}"))
}

/// A JWT of this user's.
fn jwt(subject: &Subject) -> String {
    format!("{JWT}{}", subject.as_str())
}

fn request_of(user: usize) -> Request<Body> {
    let mut request = request();
    request.extensions_mut().insert(subject(user));
    request
}

/// Numbers that are the same in each run.
#[derive(Debug)]
struct Chance(u64);

impl Chance {
    /// Xorshift, by George Marsaglia.
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}
