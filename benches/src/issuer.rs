//! An issuer of tokens that takes its time, and what programs wait for it with where they do not have this crate.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use http::{HeaderName, HeaderValue, Request, Response, header::AUTHORIZATION};
use tokio::time::sleep;
use tower::{Service, service_fn};
use tower_selam::{
    BoxError, Refreshing, Token,
    source::{Fetched, Reason, source_fn},
};

use crate::traffic::{Body, JWT, KEY, client, sensitive};

const HOUR: Duration = Duration::from_secs(60 * 60);

/// The first token is there at once and is soon to be renewed; every other takes a while and lives for an hour.
#[derive(Debug)]
pub struct Issuer {
    lifetime: Duration,
    takes: Duration,
    asked: AtomicUsize,
    /// When the last renewal began and ended.
    busy: Mutex<Option<(Instant, Instant)>>,
}

impl Issuer {
    #[must_use]
    pub fn new(lifetime: Duration, takes: Duration) -> Arc<Self> {
        Arc::new(Self { lifetime, takes, asked: AtomicUsize::new(0), busy: Mutex::default() })
    }

    /// How often it was asked for more than the first.
    #[must_use]
    pub fn renewals(&self) -> usize {
        self.asked.load(Ordering::Acquire).saturating_sub(1)
    }

    /// From when to when the last renewal ran.
    ///
    /// # Panics
    ///
    /// When a renewal has.
    #[must_use]
    pub fn busy(&self) -> Option<(Instant, Instant)> {
        *self.busy.lock().expect("the lock")
    }

    async fn issue(&self) -> (String, Duration) {
        let number = self.asked.fetch_add(1, Ordering::AcqRel);
        if number == 0 {
            return (format!("{JWT}{number}"), self.lifetime);
        }
        let began = Instant::now();
        sleep(self.takes).await;
        *self.busy.lock().expect("the lock") = Some((began, Instant::now()));
        (format!("{JWT}{number}"), HOUR)
    }

    /// The first token and every other, by this crate.
    #[must_use]
    pub fn renewing(self: &Arc<Self>) -> Refreshing<Token> {
        let issuer = Arc::clone(self);
        Refreshing::new(source_fn(move |_: Reason<Token>| {
            let issuer = Arc::clone(&issuer);
            async move {
                let (token, lifetime) = issuer.issue().await;
                Ok::<_, BoxError>(Fetched::new(Token::new(token)?).with_lifetime(lifetime))
            }
        }))
    }
}

/// A token, good until shortly before it expires.
struct Held {
    text: String,
    header: HeaderValue,
    good_until: Instant,
}

impl Held {
    async fn of(issuer: &Issuer, margin: Duration) -> Self {
        let (text, lifetime) = issuer.issue().await;
        let good_until = Instant::now() + lifetime.saturating_sub(margin);
        Self { header: sensitive(&format!("Bearer {text}")), text, good_until }
    }

    fn is_good(&self) -> bool {
        Instant::now() < self.good_until
    }
}

/// Tower's idea of a client that can be called from many tasks.
pub trait Client:
    Service<Request<Body>, Response = Response<Body>, Error = BoxError, Future: Send> + Clone + Send + 'static
{
}

impl<S> Client for S where
    S: Service<Request<Body>, Response = Response<Body>, Error = BoxError, Future: Send>
        + Clone
        + Send
        + 'static
{
}

/// `Mutex<Token>` and `format!`: whoever finds the token stale renews it under the lock.
pub async fn by_mutex(issuer: Arc<Issuer>, margin: Duration) -> impl Client {
    let held = Arc::new(tokio::sync::Mutex::new(Held::of(&issuer, margin).await));
    service_fn(move |request| {
        let (held, issuer) = (Arc::clone(&held), Arc::clone(&issuer));
        async move {
            let mut held = held.lock().await;
            if !held.is_good() {
                *held = Held::of(&issuer, margin).await;
            }
            let bearer = sensitive(&format!("Bearer {}", held.text));
            drop(held);
            client(with_headers(request, bearer)).await
        }
    })
}

/// `RwLock` of a header: whoever finds it stale renews it under the lock for writers.
pub async fn by_rw_lock(issuer: Arc<Issuer>, margin: Duration) -> impl Client {
    let held = Arc::new(tokio::sync::RwLock::new(Held::of(&issuer, margin).await));
    service_fn(move |request| {
        let (held, issuer) = (Arc::clone(&held), Arc::clone(&issuer));
        async move {
            let reading = held.read().await;
            let good = reading.is_good().then(|| reading.header.clone());
            drop(reading);
            let bearer = match good {
                Some(bearer) => bearer,
                None => {
                    let mut writing = held.write().await;
                    if !writing.is_good() {
                        *writing = Held::of(&issuer, margin).await;
                    }
                    writing.header.clone()
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
