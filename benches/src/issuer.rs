//! A slow token issuer, and the contenders that refresh from it: this crate's layers, and locks held across the refresh.

use std::{
    fmt::Debug,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use http::{HeaderName, HeaderValue, Request, header::AUTHORIZATION};
use tokio::{runtime::Runtime, time::sleep};
use tower::{Layer, Service, service_fn};
use tower_selam::{
    BoxError, Refreshing, Token,
    source::{Fetched, Reason, source_fn},
};

use crate::{
    layers::{HOUR, fixed_key, jwt_and_key_layers, selam_with_jwt},
    requests::{Body, JWT, KEY, client, sensitive},
};

/// Issues the first token at once, with a short lifetime; the next ones take a while and live for an hour.
#[derive(Debug)]
pub struct Issuer {
    first_lifetime: Duration,
    refresh_takes: Duration,
    issued: AtomicUsize,
    last_refresh: Mutex<Option<(Instant, Instant)>>,
}

impl Issuer {
    #[must_use]
    pub fn new(first_lifetime: Duration, refresh_takes: Duration) -> Arc<Self> {
        let (issued, last_refresh) = Default::default();
        Arc::new(Self { first_lifetime, refresh_takes, issued, last_refresh })
    }

    /// How many tokens were requested after the first one.
    #[must_use]
    pub fn refreshes(&self) -> usize {
        self.issued.load(Ordering::Acquire).saturating_sub(1)
    }

    /// Start and end of the last completed refresh.
    ///
    /// # Panics
    ///
    /// If a refresh panicked.
    #[must_use]
    pub fn last_refresh(&self) -> Option<(Instant, Instant)> {
        *self.last_refresh.lock().expect("the lock is not poisoned")
    }

    async fn issue(&self) -> (String, Duration) {
        let number = self.issued.fetch_add(1, Ordering::AcqRel);
        if number == 0 {
            return (format!("{JWT}{number}"), self.first_lifetime);
        }
        let started = Instant::now();
        sleep(self.refresh_takes).await;
        *self.last_refresh.lock().expect("the lock is not poisoned") = Some((started, Instant::now()));
        (format!("{JWT}{number}"), HOUR)
    }

    async fn prefetched(self: &Arc<Self>) -> Refreshing<Token> {
        let issuer = Arc::clone(self);
        let jwts = Refreshing::new(source_fn(move |_: Reason<Token>| {
            let issuer = Arc::clone(&issuer);
            async move {
                let (token, lifetime) = issuer.issue().await;
                Ok::<_, BoxError>(Fetched::new(Token::new(token)?).with_lifetime(lifetime))
            }
        }));
        jwts.prefetch().await.expect("the first token is issued");
        jwts
    }
}

/// A client that many tasks can call.
pub trait Client: Service<Request<Body>, Error: Debug, Future: Send> + Clone + Send + 'static {}

impl<S> Client for S where S: Service<Request<Body>, Error: Debug, Future: Send> + Clone + Send + 'static {}

/// A measurement of a client of any type.
pub trait Measurement {
    type Output;

    fn run<S: Client>(self, issuer: &Issuer, service: S) -> Self::Output;
}

pub const CONTENDERS: [&str; 4] = [
    "SelamLayer, JWT refreshing",
    "JwtLayer + ApiKeyLayer, JWT refreshing",
    "Mutex<Token> and format!",
    "RwLock<HeaderValue>",
];

/// Runs a measurement on the contender at `index` of [`CONTENDERS`], whose first token is already fetched. The locks
/// refresh `margin` before the token expires.
pub fn measure_contender<M: Measurement>(
    index: usize,
    runtime: &Runtime,
    issuer: &Arc<Issuer>,
    margin: Duration,
    measurement: M,
) -> M::Output {
    let prefetched = || runtime.block_on(issuer.prefetched());
    let bare = service_fn(client);
    match index {
        0 => measurement.run(issuer, selam_with_jwt(prefetched(), fixed_key()).layer(bare)),
        1 => measurement.run(issuer, jwt_and_key_layers(prefetched(), fixed_key()).layer(bare)),
        2 => measurement.run(issuer, runtime.block_on(by_mutex(Arc::clone(issuer), margin))),
        _ => measurement.run(issuer, runtime.block_on(by_rw_lock(Arc::clone(issuer), margin))),
    }
}

/// A token that is used until shortly before it expires.
struct Held {
    text: String,
    header: HeaderValue,
    valid_until: Instant,
}

impl Held {
    async fn fetch(issuer: &Issuer, margin: Duration) -> Self {
        let (text, lifetime) = issuer.issue().await;
        let valid_until = Instant::now() + lifetime.saturating_sub(margin);
        Self { header: sensitive(&format!("Bearer {text}")), text, valid_until }
    }

    fn is_valid(&self) -> bool {
        Instant::now() < self.valid_until
    }
}

/// Holds a `Mutex<Token>` while it refreshes, and formats the header of each request.
async fn by_mutex(issuer: Arc<Issuer>, margin: Duration) -> impl Client {
    let held = Arc::new(tokio::sync::Mutex::new(Held::fetch(&issuer, margin).await));
    service_fn(move |request| {
        let (held, issuer) = (Arc::clone(&held), Arc::clone(&issuer));
        async move {
            let mut held = held.lock().await;
            if !held.is_valid() {
                *held = Held::fetch(&issuer, margin).await;
            }
            let bearer = sensitive(&format!("Bearer {}", held.text));
            drop(held);
            client(with_headers(request, bearer)).await
        }
    })
}

/// Reads a `HeaderValue` through a `RwLock`, and holds the write lock while it refreshes.
async fn by_rw_lock(issuer: Arc<Issuer>, margin: Duration) -> impl Client {
    let held = Arc::new(tokio::sync::RwLock::new(Held::fetch(&issuer, margin).await));
    service_fn(move |request| {
        let (held, issuer) = (Arc::clone(&held), Arc::clone(&issuer));
        async move {
            let read = held.read().await;
            let valid = read.is_valid().then(|| read.header.clone());
            drop(read);
            let bearer = match valid {
                Some(bearer) => bearer,
                None => {
                    let mut write = held.write().await;
                    if !write.is_valid() {
                        *write = Held::fetch(&issuer, margin).await;
                    }
                    write.header.clone()
                }
            };
            client(with_headers(request, bearer)).await
        }
    })
}

fn with_headers(mut request: Request<Body>, bearer: HeaderValue) -> Request<Body> {
    request.headers_mut().insert(AUTHORIZATION, bearer);
    request.headers_mut().insert(HeaderName::from_static("x-api-key"), HeaderValue::from_static(KEY));
    request
}
