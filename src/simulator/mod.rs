//! SelamAPI as its users meet it, for tests: feature `test-util`.
//!
//! A [`Simulator`] is a `tower::Service` that answers as the API does, in process; with feature `test-server`
//! a `Server` serves it on a loopback port over http or TLS, HTTP/1.1 and HTTP/2. It accepts the keys it
//! issued and the JWTs it minted, refuses the others with the documented errors word for word, and tells what
//! it received.
//!
//! | Request | Needs | Answer |
//! |---|---|---|
//! | `POST /v1/chat/completions` | key | a completion, or server-sent events with `"stream": true` |
//! | `POST /v1/chat/completions/batch` | key | a completion for each of `requests` |
//! | `POST /v1/images/generations` | key with full access | a link |
//! | `POST /v1/audio/speech` | key with full access | a WAV file |
//! | `POST /v1/audio/agent/sessions` | JWT and key | a session; invented, as no HTTP endpoint is documented to need both |
//! | `GET /v1/audio/agent`, `GET /socket.io/` | JWT and key, in the query | the voice agent's WebSocket handshake |
//! | `POST /oauth/token` | client or key | an access token: a JWT that the above accept; invented, as none is documented |
//!
//! Every response has a request id, and every one of the API's the `X-RateLimit-*` headers.
//!
//! The token endpoint speaks OAuth 2.0 ([RFC 6749](https://www.rfc-editor.org/rfc/rfc6749)). It authenticates
//! the clients of [`issue_client`](Simulator::issue_client) by `client_secret_basic` or `client_secret_post`,
//! and an account by its API key as bearer; it refreshes for public clients too, which say their `client_id`
//! and no more. It knows the grants `client_credentials` and `refresh_token`, token exchange
//! ([RFC 8693](https://www.rfc-editor.org/rfc/rfc8693)) and JWT bearer
//! ([RFC 7523](https://www.rfc-editor.org/rfc/rfc7523)). Refresh tokens are for one use: one that comes again
//! revokes all that came of it. The API's faults and rate limit leave the endpoint alone; it has
//! [`TokenFault`]s and [outages](Simulator::set_token_outage) of its own.
//!
//! JWTs are signed and verified by `jsonwebtoken` with its `rust_crypto` backend. A program that turns on
//! another backend of it as well has to choose one, as `jsonwebtoken` asks: `CryptoProvider::install_default`.
//!
//! ```
//! use http::{Request, StatusCode};
//! use tower::{Service, ServiceBuilder, ServiceExt};
//! use tower_selam::{ApiKey, SelamLayer, simulator::Simulator};
//!
//! # tokio_test::block_on(async {
//! let simulator = Simulator::new();
//! let key = ApiKey::new(simulator.issue_key())?;
//! let layer = SelamLayer::builder().with_api_key(key).build()?;
//! let service = ServiceBuilder::new().layer(layer).service(simulator.clone());
//!
//! let request = Request::post("https://api.selamgpt.com/v1/chat/completions")
//!     .body(r#"{"messages":[{"role":"user","content":"Selam!"}]}"#.to_owned())?;
//! assert_eq!(service.oneshot(request).await?.status(), StatusCode::OK);
//! assert_eq!(simulator.received()[0].uri.path(), "/v1/chat/completions");
//! # Ok::<(), tower_selam::BoxError>(())
//! # }).unwrap();
//! ```

mod api;
mod body;
mod fault;
mod jwt;
mod quota;
mod received;
mod refusal;
mod replies;
#[cfg(feature = "test-server")]
mod server;
mod token;

use std::{
    collections::{HashMap, VecDeque},
    convert::Infallible,
    fmt,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use http::{Request, Response};
use http_body::Body;
use p256::elliptic_curve::rand_core::{OsRng, RngCore};
use tower_service::Service;

#[cfg(feature = "test-server")]
pub use self::server::Server;
pub use self::{body::SimulatorBody, fault::Fault, jwt::JwtAlgorithm, received::Received, token::TokenFault};
use self::{
    jwt::{Issuer, SUBJECT},
    quota::Window,
    token::TokenEndpoint,
};
use crate::{
    BoxError,
    util::clock::{Clock, TestClock},
};

/// So many requests are remembered.
const REMEMBERED: usize = 10_000;

/// SelamAPI in process. Clones share one state. See the [module docs](self).
#[derive(Clone)]
pub struct Simulator {
    state: Arc<Mutex<State>>,
}

struct State {
    clock: Clock,
    keys: HashMap<String, Access>,
    issuer: Issuer,
    reject_jwts: bool,
    tokens: TokenEndpoint,
    faults: VecDeque<Fault>,
    window: Window,
    received: VecDeque<Received>,
    requests: u64,
}

/// What a key may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Full,
    /// Chat completions only.
    Limited,
}

impl Simulator {
    /// No keys, no JWTs, no clients, no faults, 600 requests a minute.
    #[must_use]
    pub fn new() -> Self {
        let state = State {
            clock: Clock::default(),
            keys: HashMap::new(),
            issuer: Issuer::new(),
            reject_jwts: false,
            tokens: TokenEndpoint::new(),
            faults: VecDeque::new(),
            window: Window::new(600),
            received: VecDeque::new(),
            requests: 0,
        };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// Has JWTs begin and expire by `clock` instead of the machine's; for every clone.
    #[must_use]
    pub fn with_clock(self, clock: TestClock) -> Self {
        self.state().clock = clock.into();
        self
    }

    /// A new key with access to everything.
    #[must_use]
    pub fn issue_key(&self) -> String {
        self.issue(Access::Full)
    }

    /// A new key with access to chat completions only; the rest answers 403 `insufficient_permissions`.
    #[must_use]
    pub fn issue_limited_key(&self) -> String {
        self.issue(Access::Limited)
    }

    fn issue(&self, access: Access) -> String {
        let key = format!("sk-selam-{}", random_hex());
        self.state().keys.insert(key.clone(), access);
        key
    }

    /// Has the API accept this key from now on.
    pub fn add_key(&self, key: impl Into<String>) {
        self.state().keys.insert(key.into(), Access::Full);
    }

    /// Has the API refuse this key from now on, as it does with one that was found exposed.
    pub fn revoke_key(&self, key: &str) {
        self.state().keys.remove(key);
    }

    /// A new JWT that the API accepts for `lifetime`.
    #[must_use]
    pub fn mint_jwt(&self, algorithm: JwtAlgorithm, lifetime: Duration) -> String {
        let mut state = self.state();
        let now = state.clock.now().wall;
        state.issuer.mint(algorithm, SUBJECT, now, lifetime)
    }

    /// Has the API refuse every JWT minted so far as expired.
    pub fn expire_jwts(&self) {
        self.state().issuer.expire_all();
    }

    /// Whether the API refuses every JWT, however valid.
    pub fn reject_jwts(&self, reject: bool) {
        self.state().reject_jwts = reject;
    }

    /// Allows so many requests a minute; the ones beyond are answered 429. Starts a new minute.
    pub fn set_rate_limit(&self, requests_per_minute: u64) {
        self.state().window = Window::new(requests_per_minute);
    }

    /// Has the API's next request that no earlier fault awaits meet `fault`.
    pub fn inject(&self, fault: Fault) {
        self.state().faults.push_back(fault);
    }

    /// The requests received, the token endpoint's among them, oldest first; the last 10,000.
    #[must_use]
    pub fn received(&self) -> Vec<Received> {
        self.state().received.iter().cloned().collect()
    }

    /// The number of requests received, the token endpoint's among them.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.state().requests
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn remember(&mut self, received: Received) {
        self.requests += 1;
        if self.received.len() == REMEMBERED {
            self.received.pop_front();
        }
        self.received.push_back(received);
    }
}

impl Default for Simulator {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Simulator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state();
        f.debug_struct("Simulator")
            .field("keys", &state.keys.len())
            .field("faults", &state.faults.len())
            .field("requests", &state.requests)
            .finish_non_exhaustive()
    }
}

impl<B> Service<Request<B>> for Simulator
where
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    type Response = Response<SimulatorBody>;
    type Error = Infallible;
    type Future = ResponseFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> ResponseFuture {
        ResponseFuture(Box::pin(api::answer(self.clone(), request)))
    }
}

/// Response future of [`Simulator`].
pub struct ResponseFuture(Pin<Box<dyn Future<Output = Response<SimulatorBody>> + Send>>);

impl Future for ResponseFuture {
    type Output = Result<Response<SimulatorBody>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(cx).map(Ok)
    }
}

impl fmt::Debug for ResponseFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}

fn random_bytes() -> [u8; 16] {
    let mut bytes = [0; 16];
    OsRng.fill_bytes(&mut bytes);
    bytes
}

fn random_hex() -> String {
    random_bytes().iter().map(|byte| format!("{byte:02x}")).collect()
}
