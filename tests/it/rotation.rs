//! Rotation under load: key and JWT of one request stay consistent (H5), and each rotation costs one refresh (J1, J2).

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use http::{Request, Response, StatusCode};
use tokio::{sync::Semaphore, task::yield_now};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_selam::{
    ApiKey, BoxError, RefreshPolicy, Refreshing, SelamLayer, Token,
    source::{Reason, Source, source_fn},
};

use crate::{
    api::{INVALID_TOKEN, request, stack},
    mint::settle,
    support::{Body, MODELS, get, response},
};

type Sent = Arc<Mutex<Vec<(u64, u64)>>>;

/// A source of the numbers 1, 2, 3, …; each fetch waits for a permit.
fn numbers<C: tower_selam::Credential>(
    gate: &Arc<Semaphore>,
    make: fn(String) -> C,
) -> impl Source<C> + use<C> {
    let (gate, last) = (Arc::clone(gate), AtomicU64::new(0));
    source_fn(move |_: Reason<C>| {
        let (gate, number) = (Arc::clone(&gate), last.fetch_add(1, SeqCst) + 1);
        async move {
            gate.acquire().await?.forget();
            Ok::<_, BoxError>(make(number.to_string()))
        }
    })
}

fn keys(gate: &Arc<Semaphore>) -> Refreshing<ApiKey> {
    Refreshing::with_policy(numbers(gate, |text| ApiKey::new(text).unwrap()), unspaced())
}

fn jwts(gate: &Arc<Semaphore>) -> Refreshing<Token> {
    Refreshing::with_policy(numbers(gate, |text| Token::new(text).unwrap()), unspaced())
}

/// Rejections are not spaced.
fn unspaced() -> RefreshPolicy {
    RefreshPolicy::new().with_backoff(Duration::ZERO, Duration::ZERO)
}

/// Reports the current credential as rejected and waits until there is another.
async fn rotate<C: tower_selam::Credential>(refreshing: &Refreshing<C>, number: impl Fn(&C) -> String) {
    let old = refreshing.current().unwrap();
    refreshing.rejected(&old);
    while refreshing.current().is_none_or(|current| number(&current) == number(&old)) {
        yield_now().await;
    }
}

fn open_gate() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(Semaphore::MAX_PERMITS))
}

fn closed_gate() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(0))
}

/// An API that records the number of the key and of the JWT in each request.
fn recording(
    sent: &Sent,
) -> impl Service<Request<()>, Response = Response<Body>, Error = BoxError, Future: Send> + Clone + use<> {
    let sent = Arc::clone(sent);
    service_fn(move |request: Request<()>| {
        let number = |name: &str, scheme| {
            let value = request.headers()[name].to_str().unwrap();
            value.strip_prefix(scheme).unwrap().parse::<u64>().unwrap()
        };
        sent.lock().unwrap().push((number("x-api-key", ""), number("authorization", "Bearer ")));
        std::future::ready(Ok(response(200, "")))
    })
}

/// H5: under load, every key and JWT sent together were current together while both rotate.
#[tokio::test(flavor = "multi_thread", worker_threads = 6)]
async fn pairs_stay_consistent_while_both_rotate() {
    let (keys, jwts, sent) = (keys(&open_gate()), jwts(&open_gate()), Sent::default());
    keys.prefetch().await.unwrap();
    jwts.prefetch().await.unwrap();
    let selam = SelamLayer::builder().with_api_key(&keys).with_jwt(&jwts).build().unwrap();
    let stack = selam.layer(recording(&sent));
    let stop = Arc::new(AtomicBool::new(false));
    let load: Vec<_> = (0..8)
        .map(|_| {
            let (stack, stop) = (stack.clone(), Arc::clone(&stop));
            tokio::spawn(async move {
                while !stop.load(SeqCst) {
                    stack.clone().oneshot(get(MODELS)).await.unwrap();
                    yield_now().await;
                }
            })
        })
        .collect();

    // The key rotates before the JWT, so its number equals that of the JWT or is one higher.
    for _ in 0..500 {
        rotate(&keys, |key| key.expose_secret().to_owned()).await;
        rotate(&jwts, |jwt| jwt.expose_secret().to_owned()).await;
    }
    stop.store(true, SeqCst);
    for task in load {
        task.await.unwrap();
    }
    let sent = sent.lock().unwrap();
    let inconsistent: Vec<_> = sent.iter().filter(|(key, jwt)| key != jwt && *key != jwt + 1).collect();
    assert!(inconsistent.is_empty(), "{} of {}: {inconsistent:?}", inconsistent.len(), sent.len());
    assert!(sent.iter().any(|(key, _)| *key > 1), "the load saw a rotation");
}

/// H5: a request that waited for a JWT is not sent with a key that was rejected meanwhile.
#[tokio::test(start_paused = true)]
async fn waiting_request_does_not_use_a_stale_key() {
    let (key_gate, jwt_gate) = (closed_gate(), closed_gate());
    let (keys, jwts, sent) = (keys(&key_gate), jwts(&jwt_gate), Sent::default());
    key_gate.add_permits(1);
    keys.prefetch().await.unwrap();
    let selam = SelamLayer::builder().with_api_key(&keys).with_jwt(&jwts).build().unwrap();
    let stack = selam.layer(recording(&sent));
    let request = tokio::spawn(stack.oneshot(get(MODELS)));
    settle().await;

    // The second key arrives, and is accepted and then rejected before the JWT arrives.
    keys.rejected(&keys.current().unwrap());
    key_gate.add_permits(1);
    settle().await;
    keys.accepted(&keys.current().unwrap());
    keys.rejected(&keys.current().unwrap());
    jwt_gate.add_permits(1);
    settle().await;
    assert!(sent.lock().unwrap().is_empty(), "nothing is sent with a rejected key");

    key_gate.add_permits(1);
    tokio::time::timeout(Duration::from_secs(1), request).await.unwrap().unwrap().unwrap();
    assert_eq!(*sent.lock().unwrap(), [(3, 1)]);
}

/// J1, J2: under load, each rotation costs one refresh, and no request is sent more than twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn rotation_under_load_costs_one_refresh() {
    const ROTATIONS: u64 = 200;
    // The API rejects tokens with a number below `floor`.
    let (floor, issued) = (Arc::new(AtomicU64::new(1)), Arc::new(AtomicU64::new(0)));
    let counter = Arc::clone(&issued);
    let source = source_fn(move |_: Reason<Token>| {
        let number = counter.fetch_add(1, SeqCst) + 1;
        async move {
            yield_now().await;
            Ok::<_, BoxError>(Token::new(number.to_string())?)
        }
    });
    let jwts = Refreshing::with_policy(source, unspaced());
    jwts.prefetch().await.unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let load: Vec<_> = (0..8)
        .map(|_| {
            let (jwts, stop) = (jwts.clone(), Arc::clone(&stop));
            let (floor, accepted_from) = (Arc::clone(&floor), Arc::clone(&floor));
            tokio::spawn(async move {
                let sends = Arc::new(AtomicU64::new(0));
                let counter = Arc::clone(&sends);
                let api = service_fn(move |request: Request<Body>| {
                    counter.fetch_add(1, SeqCst);
                    let bearer = request.headers()["authorization"].to_str().unwrap();
                    let number: u64 = bearer.strip_prefix("Bearer ").unwrap().parse().unwrap();
                    let accepted = number >= accepted_from.load(SeqCst);
                    let answer = if accepted { response(200, "") } else { response(401, INVALID_TOKEN) };
                    async move {
                        // Some 401s arrive only after the refresh that the others caused.
                        for _ in 0..number % 5 {
                            yield_now().await;
                        }
                        Ok::<_, BoxError>(answer)
                    }
                });
                let service = stack(&jwts, api);
                while !stop.load(SeqCst) {
                    let (before, rotation) = (sends.load(SeqCst), floor.load(SeqCst));
                    let status = service.clone().oneshot(request()).await.unwrap().status();
                    let sends = sends.load(SeqCst) - before;
                    assert!((1..=2).contains(&sends), "{sends} sends");
                    // A second rotation may happen while the request is in flight.
                    assert!(status == StatusCode::OK || floor.load(SeqCst) > rotation, "{status}");
                    yield_now().await;
                }
            })
        })
        .collect();
    for _ in 0..ROTATIONS {
        let next = issued.load(SeqCst) + 1;
        floor.store(next, SeqCst);
        while jwts.current().is_none_or(|token| token.expose_secret() != next.to_string()) {
            yield_now().await;
        }
    }
    stop.store(true, SeqCst);
    for task in load {
        task.await.unwrap();
    }
    assert_eq!(issued.load(SeqCst), ROTATIONS + 1);
}
