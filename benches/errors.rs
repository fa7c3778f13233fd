//! What it costs to make the documented 401 an `AuthError`, and what the error layers cost on a 200.
//!
//! ```console
//! $ cargo bench -p benches --bench errors
//! ```
//!
//! The floor of a 401 is what a program has to do that wants to know why: collect the body and read its JSON. Instructions
//! on a 200 are counted by the bench `instructions`, where their target is.

use std::{
    future::{Ready, ready},
    hint::black_box,
    pin::pin,
    task::{Context, Poll, Waker},
    time::Instant,
};

use allocation_counter::measure;
use benches::{
    contenders::BARE,
    or_short, record,
    rounds::interleave,
    table::{Table, verdict},
    traffic::{Body, KEY, client, request},
};
use http::{HeaderValue, Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::BodyExt;
use serde::Deserialize;
use tokio::runtime::Builder;
use tower::{Layer, Service, service_fn};
use tower_selam::{AnnotateAuthErrorLayer, ApiKey, AuthErrorLayer, BoxError, SelamLayer};

const REQUESTS: usize = 500;

/// As documented, with what the API sends beside it.
const REFUSAL: &str = r#"{"error":{"message":"Invalid API key provided.","type":"authentication_error","code":"invalid_api_key"}}"#;

const ROWS: [(&str, &str); 8] = [
    ("200", "bare service"),
    ("200", "AuthErrorLayer"),
    ("200", "AnnotateAuthErrorLayer"),
    ("401", "bare service, unread"),
    ("401", "by hand: collect, serde_json"),
    ("401", "AuthErrorLayer"),
    ("401", "AnnotateAuthErrorLayer"),
    ("401", "SelamLayer, key fixed"),
];
/// Whose time the others are beside.
const FLOORS: [usize; 2] = [0, 4];

type Serve = Box<dyn FnMut(Vec<Request<Body>>)>;

fn main() {
    let rounds = or_short(201, 2);
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    let _entered = runtime.enter();
    let mut services = services();
    let requests = || (0..REQUESTS).map(|_| request()).collect::<Vec<_>>();
    let allocated: Vec<_> = services
        .iter_mut()
        .map(|serve| {
            serve(requests());
            let requests = requests();
            measure(|| serve(requests))
        })
        .collect();
    let samples = interleave(rounds, ROWS.len(), |at| {
        let requests = requests();
        let started = Instant::now();
        services[at](requests);
        started.elapsed().as_nanos() as f64 / REQUESTS as f64
    });

    println!(
        "\nResponses that are no error, and that are one: medians of {rounds} interleaved rounds of {REQUESTS} requests\n"
    );
    let mut table = Table::new(&["", "status", "ns", "net ns", "x floor", "allocations", "bytes"]);
    for (at, (status, name)) in ROWS.iter().enumerate() {
        let (bare, floor) = if *status == "200" { (0, FLOORS[0]) } else { (3, FLOORS[1]) };
        let each = |number: u64| format!("{:.1}", number as f64 / REQUESTS as f64);
        table.row([
            (*name).to_owned(),
            (*status).to_owned(),
            format!("{:.0}", samples.median(at)),
            format!("{:.0}", samples.difference(at, bare)),
            format!("{:.2}", samples.ratio(at, floor)),
            each(allocated[at].count_total),
            each(allocated[at].bytes_total),
        ]);
    }
    table.print();
    println!("\n`net ns` is without the bare service of that status.");
    show_recorded();
}

/// The targets on a 200 are in instructions, which are counted elsewhere.
fn show_recorded() {
    let recorded = record::read();
    let of =
        |name| recorded.iter().find(|recorded| recorded.name == name).map(|recorded| recorded.instructions);
    for name in ["AuthErrorLayer", "AnnotateAuthErrorLayer"] {
        if let (Some(ours), Some(bare)) = (of(name), of(BARE)) {
            let (more, at_most) = (ours - bare, (bare * 0.02).max(20.0));
            let verdict = verdict(more <= at_most);
            println!(
                "{name} on a 200: {more} instructions more than {bare}, target at most {at_most:.0}: {verdict}"
            );
        }
    }
}

/// In the order of their rows.
fn services() -> Vec<Serve> {
    let ok = service_fn(client);
    let refusing = service_fn(refuse);
    let key = ApiKey::new(KEY).expect("a key");
    let selam = SelamLayer::builder().with_api_key(key).build().expect("a layer");
    let by_hand = service_fn(move |request| async move {
        let response = refuse(request).await?;
        let status = response.status();
        let body = response.into_body().collect().await.map_err(BoxError::from)?.to_bytes();
        let Refusal { error } = serde_json::from_slice(&body).expect("an error body");
        Err::<Response<Body>, _>(ByHand::Refused(status, error))
    });
    vec![
        serve(ok),
        serve(AuthErrorLayer::new().layer(ok)),
        serve(AnnotateAuthErrorLayer::new().layer(ok)),
        serve(refusing),
        serve(by_hand),
        serve(AuthErrorLayer::new().layer(refusing)),
        serve(AnnotateAuthErrorLayer::new().layer(refusing)),
        serve(selam.layer(refusing)),
    ]
}

fn serve<S, R>(mut service: S) -> Serve
where
    S: Service<Request<Body>, Response = Response<R>> + 'static,
{
    Box::new(move |requests| {
        for request in requests {
            let mut context = Context::from_waker(Waker::noop());
            assert!(matches!(service.poll_ready(&mut context), Poll::Ready(Ok(()))));
            match pin!(service.call(request)).poll(&mut context) {
                Poll::Ready(response) => drop(black_box(response)),
                Poll::Pending => panic!("the service answers at once"),
            }
        }
    })
}

fn refuse(request: Request<Body>) -> Ready<Result<Response<Body>, BoxError>> {
    drop(black_box(request));
    let mut response = Response::new(Body::from(REFUSAL));
    *response.status_mut() = StatusCode::UNAUTHORIZED;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    ready(Ok(response))
}

/// What a program would read of it.
#[derive(Debug, Deserialize)]
struct Refusal {
    error: Reason,
}

#[derive(Debug, Deserialize)]
#[expect(dead_code, reason = "it is read from JSON, which is the cost")]
struct Reason {
    message: String,
    r#type: String,
    code: String,
}

#[derive(Debug)]
#[expect(dead_code, reason = "it is made, which is the cost")]
enum ByHand {
    Refused(StatusCode, Reason),
    Failed(BoxError),
}

impl From<BoxError> for ByHand {
    fn from(error: BoxError) -> Self {
        Self::Failed(error)
    }
}
