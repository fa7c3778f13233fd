//! Who competes: the floors, each layer, the stack, and what programs do without this crate.

use std::{
    fmt,
    hint::black_box,
    pin::Pin,
    sync::{Arc, Mutex, RwLock},
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use http::{
    HeaderName, HeaderValue, Request, Response, StatusCode,
    header::{AUTHORIZATION, CONNECTION, HOST},
};
use tokio::runtime::Runtime;
use tower::{Layer, Service, ServiceBuilder, service_fn};
use tower_http::set_header::SetRequestHeaderLayer;
use tower_selam::{
    AnnotateAuthErrorLayer, ApiKey, ApiKeyLayer, AuthErrorLayer, BoxError, JwtLayer, RefreshLayer,
    Refreshing, SelamLayer, Token,
    source::{Fetched, Reason, source_fn},
};

use crate::traffic::{Body, JWT, KEY, answer, client, request, sensitive};

const HOUR: Duration = Duration::from_secs(60 * 60);

pub const BARE: &str = "bare service";
pub const ONE_HEADER: &str = "by hand, 1 header";
pub const TWO_HEADERS: &str = "by hand, 2 headers";
pub const PRIVATE_HEADERS: &str = "by hand, bytes of each clone's own";

/// One row of a table.
pub struct Contender {
    pub name: &'static str,
    pub floor: &'static str,
    /// Whether it is of this crate.
    pub is_ours: bool,
    pub target: Option<Target>,
    pub service: Box<dyn Serve>,
}

/// What a contender may cost.
#[derive(Clone, Copy, Debug)]
pub enum Target {
    /// So many times the floor's total.
    Times(f64),
    /// So many times the floor's total, or so many instructions more.
    TimesOr(f64, f64),
}

/// A service, whatever its type.
pub trait Serve: Send {
    /// Builds so many requests, and has each answered.
    fn round_trips(&mut self, requests: usize);

    /// Has these requests answered.
    fn answers(&mut self, requests: Vec<Request<Body>>);

    /// The same, each by a clone of the service that is made for it.
    fn answers_by_clones(&mut self, requests: Vec<Request<Body>>);

    /// Makes so many clones and drops them.
    fn clones(&self, number: usize);

    fn clone_service(&self) -> Box<dyn Serve>;

    fn service_bytes(&self) -> usize;

    fn future_bytes(&self) -> usize;
}

struct Served<S>(S);

impl<S, R> Serve for Served<S>
where
    S: Service<Request<Body>, Response = Response<R>> + Clone + Send + 'static,
{
    fn round_trips(&mut self, requests: usize) {
        for _ in 0..requests {
            measured_round_trip(&mut self.0);
        }
    }

    fn answers(&mut self, requests: Vec<Request<Body>>) {
        requests.into_iter().for_each(|request| answer(&mut self.0, request));
    }

    fn answers_by_clones(&mut self, requests: Vec<Request<Body>>) {
        requests.into_iter().for_each(|request| answer(&mut self.0.clone(), request));
    }

    fn clones(&self, number: usize) {
        for _ in 0..number {
            drop(black_box(black_box(&self.0).clone()));
        }
    }

    fn clone_service(&self) -> Box<dyn Serve> {
        Box::new(Self(self.0.clone()))
    }

    fn service_bytes(&self) -> usize {
        size_of::<S>()
    }

    fn future_bytes(&self) -> usize {
        size_of::<S::Future>()
    }
}

/// The service, without its type.
pub fn served<S, R>(service: S) -> Box<dyn Serve>
where
    S: Service<Request<Body>, Response = Response<R>> + Clone + Send + 'static,
{
    Box::new(Served(service))
}

/// Counted by name: see the bench `instructions`.
#[inline(never)]
fn measured_round_trip<S, R>(service: &mut S)
where
    S: Service<Request<Body>, Response = Response<R>>,
{
    measured_answer(service, request());
}

/// The same without building the request.
#[inline(never)]
fn measured_answer<S, R>(service: &mut S, request: Request<Body>)
where
    S: Service<Request<Body>, Response = Response<R>>,
{
    answer(service, request);
}

impl fmt::Debug for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Contender").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Where it is among them.
///
/// # Panics
///
/// When it is not.
#[must_use]
pub fn position(contenders: &[Contender], name: &str) -> usize {
    contenders.iter().position(|contender| contender.name == name).expect("a contender of that name")
}

impl Target {
    #[must_use]
    pub fn times(self) -> f64 {
        match self {
            Self::Times(times) | Self::TimesOr(times, _) => times,
        }
    }

    #[must_use]
    pub fn is_met(self, value: f64, floor: f64) -> bool {
        match self {
            Self::Times(times) => value <= floor * times,
            Self::TimesOr(times, more) => value <= (floor * times).max(floor + more),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Times(times) => write!(f, "<= {times:.2} x"),
            Self::TimesOr(times, more) => write!(f, "<= {times:.2} x or +{more}"),
        }
    }
}

/// A key that renews itself, and has just been fetched.
pub fn renewing_key(runtime: &Runtime) -> Refreshing<ApiKey> {
    let keys = Refreshing::new(source_fn(|_: Reason<ApiKey>| async {
        Ok::<_, BoxError>(Fetched::new(ApiKey::new(KEY)?).with_recheck_after(HOUR))
    }));
    runtime.block_on(keys.prefetch()).expect("a key");
    keys
}

/// A JWT that renews itself, and lives for an hour yet.
pub fn renewing_jwt(runtime: &Runtime) -> Refreshing<Token> {
    let jwts = Refreshing::new(source_fn(|_: Reason<Token>| async {
        Ok::<_, BoxError>(Fetched::new(Token::new(JWT)?).with_lifetime(HOUR))
    }));
    runtime.block_on(jwts.prefetch()).expect("a JWT");
    jwts
}

/// What programs write: a token behind a lock, made a header for each request.
pub struct Held {
    pub text: String,
    pub header: HeaderValue,
    pub expires: Instant,
}

impl Held {
    pub fn new() -> Self {
        let bearer = sensitive(&format!("Bearer {JWT}"));
        Self { text: JWT.to_owned(), header: bearer, expires: Instant::now() + HOUR }
    }

    pub fn format(&self) -> HeaderValue {
        assert!(self.expires > Instant::now());
        sensitive(&format!("Bearer {}", self.text))
    }

    pub fn share(&self) -> HeaderValue {
        assert!(self.expires > Instant::now());
        self.header.clone()
    }
}

impl Default for Held {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Held").finish_non_exhaustive()
    }
}

/// All of them, floors before those that are measured by them.
pub fn contenders(runtime: &Runtime) -> Vec<Contender> {
    let _entered = runtime.enter();
    let client = service_fn(client);
    let key = || ApiKey::new(KEY).expect("a key");
    let jwt = || Token::new(JWT).expect("a JWT");
    // An engine for each, as their layers would not share one.
    let (keys, jwts) = (|| renewing_key(runtime), || renewing_jwt(runtime));
    let own = HeaderName::from_static("x-api-key");

    let bearer_key = sensitive(&format!("Bearer {KEY}"));
    let (bearer_jwt, own_key) = (sensitive(&format!("Bearer {JWT}")), sensitive(KEY));
    let set = |name, value: &HeaderValue| SetRequestHeaderLayer::overriding(name, value.clone());
    let one_header = {
        let bearer = bearer_key.clone();
        ServiceBuilder::new()
            .map_request(move |mut request: Request<Body>| {
                request.headers_mut().insert(AUTHORIZATION, bearer.clone());
                request
            })
            .service(client)
    };
    let two_headers = {
        let (bearer, own, key) = (bearer_jwt.clone(), own.clone(), own_key.clone());
        ServiceBuilder::new()
            .map_request(move |mut request: Request<Body>| {
                request.headers_mut().insert(AUTHORIZATION, bearer.clone());
                request.headers_mut().insert(own.clone(), key.clone());
                request
            })
            .service(client)
    };
    let headers = Arc::new(Headers { bearer: bearer_jwt.clone(), own: own.clone(), key: own_key.clone() });
    let checked = Checked { headers, is_kept: false, inner: client };
    let mutex = {
        let (token, own, key) = (Arc::new(Mutex::new(Held::new())), own.clone(), own_key.clone());
        ServiceBuilder::new()
            .map_request(move |mut request: Request<Body>| {
                let bearer = token.lock().expect("the lock").format();
                request.headers_mut().insert(AUTHORIZATION, bearer);
                request.headers_mut().insert(own.clone(), key.clone());
                request
            })
            .service(client)
    };
    let rw_lock = {
        let (token, own, key) = (Arc::new(RwLock::new(Held::new())), own.clone(), own_key.clone());
        ServiceBuilder::new()
            .map_request(move |mut request: Request<Body>| {
                let bearer = token.read().expect("the lock").share();
                request.headers_mut().insert(AUTHORIZATION, bearer);
                request.headers_mut().insert(own.clone(), key.clone());
                request
            })
            .service(client)
    };

    let selam = SelamLayer::builder();
    let stack = |builder: tower_selam::SelamLayerBuilder| builder.build().expect("a layer").layer(client);
    vec![
        contender(BARE, BARE, client),
        contender("AuthErrorLayer", BARE, AuthErrorLayer::new().layer(client)).at_most(1.02, Some(20.0)),
        contender("AnnotateAuthErrorLayer", BARE, AnnotateAuthErrorLayer::new().layer(client))
            .at_most(1.02, Some(20.0)),
        contender("RefreshLayer", BARE, RefreshLayer::new().layer(client)).at_most(1.1, None),
        contender(ONE_HEADER, ONE_HEADER, one_header),
        contender("SetRequestHeaderLayer", ONE_HEADER, set(AUTHORIZATION, &bearer_key).layer(client)),
        contender("ApiKeyLayer, fixed", ONE_HEADER, ApiKeyLayer::bearer(key()).layer(client))
            .at_most(1.1, None),
        contender("ApiKeyLayer, renewing", ONE_HEADER, ApiKeyLayer::bearer(keys()).layer(client))
            .at_most(1.1, None),
        contender("SelamLayer, key fixed", ONE_HEADER, stack(selam.clone().with_api_key(key())))
            .at_most(1.25, None),
        contender("SelamLayer, key renewing", ONE_HEADER, stack(selam.clone().with_api_key(keys())))
            .at_most(1.25, None),
        contender(TWO_HEADERS, TWO_HEADERS, two_headers),
        contender(
            "2 x SetRequestHeaderLayer",
            TWO_HEADERS,
            set(AUTHORIZATION, &bearer_jwt).layer(set(own, &own_key).layer(client)),
        ),
        contender("by hand, 2 headers, checked", TWO_HEADERS, checked.clone()),
        contender("by hand, 2 headers, checked and kept", TWO_HEADERS, Checked { is_kept: true, ..checked }),
        contender("Mutex<Token> and format!", TWO_HEADERS, mutex),
        contender("RwLock<HeaderValue>", TWO_HEADERS, rw_lock),
        contender("JwtLayer, fixed", TWO_HEADERS, JwtLayer::new(jwt(), key()).layer(client))
            .at_most(1.1, None),
        contender("JwtLayer, renewing", TWO_HEADERS, JwtLayer::new(jwts(), keys()).layer(client))
            .at_most(1.1, None),
        contender(
            "JwtLayer beside ApiKeyLayer",
            TWO_HEADERS,
            JwtLayer::beside_api_key(jwt()).layer(ApiKeyLayer::beside_jwt(key()).layer(client)),
        )
        .of_ours(),
        contender(
            "SelamLayer, JWT and key fixed",
            TWO_HEADERS,
            stack(selam.clone().with_api_key(key()).with_jwt(jwt())),
        )
        .at_most(1.25, None),
        contender(
            "SelamLayer, JWT and key renewing",
            TWO_HEADERS,
            stack(selam.with_api_key(keys()).with_jwt(jwts())),
        )
        .at_most(1.25, None),
    ]
}

/// Two headers by hand, whose bytes each clone of the service copies: no two threads share them.
#[must_use]
pub fn private_headers() -> Contender {
    let (bearer, key) = (sensitive(&format!("Bearer {JWT}")), sensitive(KEY));
    let own = HeaderName::from_static("x-api-key");
    contender(PRIVATE_HEADERS, TWO_HEADERS, PrivateHeaders { bearer, own, key, inner: service_fn(client) })
}

struct PrivateHeaders<S> {
    bearer: HeaderValue,
    own: HeaderName,
    key: HeaderValue,
    inner: S,
}

impl<S: Service<Request<Body>>> Service<Request<Body>> for PrivateHeaders<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        request.headers_mut().insert(AUTHORIZATION, self.bearer.clone());
        request.headers_mut().insert(self.own.clone(), self.key.clone());
        self.inner.call(request)
    }
}

impl<S: Clone> Clone for PrivateHeaders<S> {
    fn clone(&self) -> Self {
        let copy = |value: &HeaderValue| {
            let mut value = HeaderValue::from_bytes(value.as_bytes()).expect("it was one");
            value.set_sensitive(true);
            value
        };
        let Self { bearer, own, key, inner } = self;
        Self { bearer: copy(bearer), own: own.clone(), key: copy(key), inner: inner.clone() }
    }
}

/// Two headers by hand, with what keeps a credential from going astray and a 401 from being a riddle: the request's origin
/// and the headers that could change it are looked at, and what was sent is remembered. And if it is to be sent again after
/// a 401, a clone of it is kept.
#[derive(Clone)]
struct Checked<S> {
    headers: Arc<Headers>,
    is_kept: bool,
    inner: S,
}

struct Headers {
    bearer: HeaderValue,
    own: HeaderName,
    key: HeaderValue,
}

struct Remembers<F> {
    response: F,
    sent: Arc<Headers>,
    kept: Option<Request<Body>>,
}

impl<S, R> Service<Request<Body>> for Checked<S>
where
    S: Service<Request<Body>, Response = Response<R>, Future: Unpin>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Remembers<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let uri = request.uri();
        assert!(
            uri.scheme_str() == Some("https") && uri.authority().is_some_and(|at| at == "api.selamgpt.com")
        );
        assert!(!request.headers().keys().any(|name| name == HOST || name == CONNECTION));
        let kept = self.is_kept.then(|| request.clone());
        let Headers { bearer, own, key } = &*self.headers;
        request.headers_mut().insert(AUTHORIZATION, bearer.clone());
        request.headers_mut().insert(own.clone(), key.clone());
        Remembers { response: self.inner.call(request), sent: Arc::clone(&self.headers), kept }
    }
}

impl<F, R, E> Future for Remembers<F>
where
    F: Future<Output = Result<Response<R>, E>> + Unpin,
{
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut response = ready!(Pin::new(&mut self.response).poll(cx))?;
        if response.status() == StatusCode::UNAUTHORIZED {
            response.extensions_mut().insert((Arc::clone(&self.sent), self.kept.take()));
        }
        Poll::Ready(Ok(response))
    }
}

fn contender<S, R>(name: &'static str, floor: &'static str, service: S) -> Contender
where
    S: Service<Request<Body>, Response = Response<R>> + Clone + Send + 'static,
{
    Contender { name, floor, is_ours: false, target: None, service: served(service) }
}

impl Contender {
    fn at_most(self, times: f64, or_more: Option<f64>) -> Self {
        let target = match or_more {
            Some(more) => Target::TimesOr(times, more),
            None => Target::Times(times),
        };
        Self { is_ours: true, target: Some(target), ..self }
    }

    fn of_ours(self) -> Self {
        Self { is_ours: true, ..self }
    }
}
