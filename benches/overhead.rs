//! What each layer costs over a bare service, beside writing the header by hand and beside tower-http.
//!
//! ```console
//! $ cargo bench --bench overhead
//! ```
//!
//! Every contender gets the same requests. Rounds are interleaved, so that drift of the machine meets all of
//! them alike, and the medians are shown. It fails when a layer allocates.

#![allow(clippy::print_stdout, reason = "the table is what this is for")]
#![allow(clippy::disallowed_methods, reason = "it measures real time")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failure ends the benchmark")]

use std::{
    convert::Infallible,
    future::{Ready, ready},
    hint::black_box,
    pin::pin,
    process::ExitCode,
    task::{Context, Poll, Waker},
    time::Instant,
};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, Response, header::AUTHORIZATION};
use http_body_util::Full;
use tower::{Layer, Service, ServiceBuilder, service_fn};
use tower_http::set_header::SetRequestHeaderLayer;
use tower_selam::{
    AnnotateAuthErrorLayer, ApiKey, ApiKeyLayer, AuthErrorLayer, Error, JwtLayer, SelamLayer, Token,
};

const ROUNDS: usize = 300;
const REQUESTS: usize = 1_000;

const KEY: &str = "sk-selam-0123456789abcdef0123456789abcdef";
const JWT: &str = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJiZW5jaG1hcmsifQ.c2lnbmF0dXJlLW9mLWEtYmVuY2htYXJr";

type Body = Full<Bytes>;

/// One row of the table: a service behind a closure that serves a batch of requests.
struct Contender {
    name: &'static str,
    headers: usize,
    serve: Box<dyn FnMut(Vec<Request<Body>>)>,
    allocations: u64,
    future: usize,
    times: Vec<f64>,
}

fn contender<S, R>(name: &'static str, headers: usize, mut service: S) -> Contender
where
    S: Service<Request<Body>, Response = Response<R>> + 'static,
{
    let mut request = Some(request());
    let counted = allocation_counter::measure(|| serve(&mut service, request.take().unwrap()));
    Contender {
        name,
        headers,
        serve: Box::new(move |requests| {
            requests.into_iter().for_each(|request| serve(&mut service, request))
        }),
        allocations: counted.count_total,
        future: size_of::<S::Future>(),
        times: Vec::with_capacity(ROUNDS),
    }
}

fn serve<S, R>(service: &mut S, request: Request<Body>)
where
    S: Service<Request<Body>, Response = Response<R>>,
{
    let mut context = Context::from_waker(Waker::noop());
    let _ = black_box(service.poll_ready(&mut context));
    let future = pin!(service.call(request));
    match future.poll(&mut context) {
        Poll::Ready(Ok(response)) => drop(black_box(response)),
        _ => panic!("the service answers at once"),
    }
}

fn request() -> Request<Body> {
    Request::post("https://api.selamgpt.com/v1/chat/completions")
        .header("content-type", "application/json")
        .header("accept", "application/json")
        .header("user-agent", "overhead/1.0")
        .body(Body::default())
        .unwrap()
}

fn client(request: Request<Body>) -> Ready<Result<Response<Body>, Infallible>> {
    ready(Ok(Response::new(black_box(request).into_body())))
}

fn sensitive(value: &str) -> HeaderValue {
    let mut value = HeaderValue::from_str(value).unwrap();
    value.set_sensitive(true);
    value
}

fn contenders() -> Vec<Contender> {
    let client = service_fn(client);
    let inner = ServiceBuilder::new().map_err(Error::<Infallible>::Inner).service(client);
    let key = || ApiKey::new(KEY).unwrap();
    let jwt = || Token::new(JWT).unwrap();
    let own = HeaderName::from_static("x-api-key");

    let floor_1 = sensitive(&format!("Bearer {KEY}"));
    let floor_2 = (sensitive(&format!("Bearer {JWT}")), sensitive(KEY));
    let set = |name, value: &HeaderValue| SetRequestHeaderLayer::overriding(name, value.clone());
    let by_hand_1 = ServiceBuilder::new().map_request({
        let bearer = floor_1.clone();
        move |mut request: Request<Body>| {
            request.headers_mut().insert(AUTHORIZATION, bearer.clone());
            request
        }
    });
    let by_hand_2 = ServiceBuilder::new().map_request({
        let ((bearer, key), own) = (floor_2.clone(), own.clone());
        move |mut request: Request<Body>| {
            request.headers_mut().insert(AUTHORIZATION, bearer.clone());
            request.headers_mut().insert(own.clone(), key.clone());
            request
        }
    });
    let selam = SelamLayer::builder().with_api_key(key());
    vec![
        contender("bare service", 0, client),
        contender("by hand, 1 header", 1, by_hand_1.service(client)),
        contender("tower-http SetRequestHeader", 1, set(AUTHORIZATION, &floor_1).layer(client)),
        contender("ApiKeyLayer", 1, ApiKeyLayer::bearer(key()).layer(inner.clone())),
        contender("SelamLayer, key", 1, selam.clone().build().unwrap().layer(client)),
        contender("by hand, 2 headers", 2, by_hand_2.service(client)),
        contender(
            "2 x tower-http SetRequestHeader",
            2,
            set(AUTHORIZATION, &floor_2.0).layer(set(own, &floor_2.1).layer(client)),
        ),
        contender("JwtLayer", 2, JwtLayer::new(jwt(), key()).layer(inner.clone())),
        contender(
            "JwtLayer beside ApiKeyLayer",
            2,
            JwtLayer::beside_api_key(jwt()).layer(ApiKeyLayer::beside_jwt(key()).layer(inner.clone())),
        ),
        contender("SelamLayer, JWT and key", 2, selam.with_jwt(jwt()).build().unwrap().layer(client)),
        contender("AuthErrorLayer", 0, AuthErrorLayer::new().layer(inner)),
        contender("AnnotateAuthErrorLayer", 0, AnnotateAuthErrorLayer::new().layer(client)),
    ]
}

fn main() -> ExitCode {
    // Cargo passes `--bench`, or `--test` to a run that is only to show that it works.
    let rounds = if std::env::args().any(|argument| argument == "--test") { 3 } else { ROUNDS };
    let mut contenders = contenders();
    for _ in 0..rounds {
        for contender in &mut contenders {
            let requests: Vec<_> = (0..REQUESTS).map(|_| request()).collect();
            let started = Instant::now();
            (contender.serve)(requests);
            contender.times.push(started.elapsed().as_nanos() as f64 / REQUESTS as f64);
        }
    }

    let medians: Vec<f64> = contenders.iter_mut().map(|contender| median(&mut contender.times)).collect();
    let floor = |headers: usize| {
        let floors = ["bare service", "by hand, 1 header", "by hand, 2 headers"];
        contenders.iter().position(|contender| contender.name == floors[headers]).map(|at| medians[at])
    };
    if cfg!(debug_assertions) {
        println!("Not optimized: only the allocations say something.");
    }
    println!("Per request, median of {rounds} interleaved rounds of {REQUESTS} requests\n");
    println!(
        "{:<33}{:>9}{:>9}{:>10}{:>13}{:>13}",
        "", "ns", "net ns", "x floor", "allocations", "future bytes"
    );
    for (contender, median) in contenders.iter().zip(&medians) {
        println!(
            "{:<33}{:>9.1}{:>9.1}{:>10.2}{:>13}{:>13}",
            contender.name,
            median,
            median - medians[0],
            median / floor(contender.headers).unwrap_or(f64::NAN),
            contender.allocations,
            contender.future,
        );
    }
    println!(
        "\n`net ns` is without the bare service, `x floor` the total beside writing as many headers by hand."
    );

    let allocations: u64 = contenders.iter().map(|contender| contender.allocations).sum();
    println!("{allocations} allocations per request.");
    if allocations == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
