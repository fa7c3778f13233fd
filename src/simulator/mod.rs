//! Simulates SelamAPI, for tests of programs that call it: feature `test-util`.
//!
//! A [`Simulator`] is a `tower::Service` that answers in process as the API does. With feature `test-server`, a `Server`
//! puts it on a loopback port over http or TLS, HTTP/1.1 and HTTP/2. It accepts the keys it issued and the JWTs it
//! minted, and refuses all others with the API's documented errors, word for word.
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
//!
//! # Endpoints
//!
//! | Request | Needs | Response |
//! |---|---|---|
//! | `POST /v1/chat/completions` | key | a completion, or server-sent events with `"stream": true` |
//! | `POST /v1/chat/completions/batch` | key | a completion for each of `requests` |
//! | `POST /v1/images/generations` | key with full access | a link |
//! | `POST /v1/audio/speech` | key with full access | a WAV file |
//! | `POST /v1/audio/agent/sessions` | JWT and key | a session; invented, as no documented HTTP endpoint needs both |
//! | `/socket.io/` | JWT and key, in the query | the [voice agent](#the-voice-agent) |
//! | `POST /oauth/token` | client or key | an access token, accepted as a JWT by the above; invented, as none is documented |
//!
//! Every response has an `x-request-id`. Every response of the API also has the `X-RateLimit-*` headers.
//!
//! # The voice agent
//!
//! The voice agent speaks [Socket.IO](https://socket.io/docs/v4/socket-io-protocol/) 5 over Engine.IO 4: polling in process, polling
//! and WebSocket over a `Server`. Clients connect to the namespace `/v1/audio/agent`, which echoes every event, with its
//! attachments, and acknowledges it with its arguments. The credentials are checked in a handshake, a request without `sid`,
//! and once more when the client connects to the namespace. A session that is open stays so when its key is revoked.
//!
//! ```
//! # use std::time::Duration;
//! # use http::Request;
//! # use http_body_util::BodyExt;
//! # use tower::ServiceExt;
//! use tower_selam::simulator::{JwtAlgorithm, Simulator};
//!
//! # tokio_test::block_on(async {
//! let simulator = Simulator::new();
//! let jwt = simulator.mint_jwt(JwtAlgorithm::Hs256, Duration::from_secs(60));
//! let uri = format!("/socket.io/?EIO=4&transport=polling&token={jwt}&api_key={}", simulator.issue_key());
//! let open = simulator.oneshot(Request::get(uri).body(String::new())?).await?;
//! let packet = open.into_body().collect().await?.to_bytes();
//! assert!(packet.starts_with(br#"0{""#));
//! # Ok::<(), tower_selam::BoxError>(())
//! # }).unwrap();
//! ```
//!
//! # Injecting faults
//!
//! [`inject`](Simulator::inject) queues a [`Fault`]: a stalled, truncated or overloaded response, or any response you
//! build. Each API request takes one fault from the queue. To make credentials fail instead, use
//! [`revoke_key`](Simulator::revoke_key), [`expire_jwts`](Simulator::expire_jwts) or
//! [`reject_jwts`](Simulator::reject_jwts); [`set_rate_limit`](Simulator::set_rate_limit) lowers the quota.
//!
//! The token endpoint is separate: API faults and the rate limit do not affect it. It has a queue of [`TokenFault`]s
//! ([`inject_token_fault`](Simulator::inject_token_fault)) and [outages](Simulator::set_token_outage).
//!
//! ```
//! # use std::time::Duration;
//! # use http::{Request, StatusCode};
//! # use tower::ServiceExt;
//! use tower_selam::simulator::{Fault, Simulator};
//!
//! # tokio_test::block_on(async {
//! let simulator = Simulator::new();
//! simulator.inject(Fault::RateLimited { retry_after: Duration::from_secs(2) });
//! # let request = Request::post("/v1/chat/completions").body(String::new())?;
//! let response = simulator.oneshot(request).await?;
//! assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
//! assert_eq!(response.headers()["retry-after"], "2");
//! # Ok::<(), tower_selam::BoxError>(())
//! # }).unwrap();
//! ```
//!
//! # Inspecting requests
//!
//! [`received`](Simulator::received) returns the last 10,000 requests, with all headers and the first 64 KiB of each
//! body. [`requests`](Simulator::requests) and [`token_requests`](Simulator::token_requests) count them;
//! [`reused_refresh_tokens`](Simulator::reused_refresh_tokens) counts refresh tokens that were spent twice.
//!
//! # The token endpoint
//!
//! The token endpoint implements OAuth 2.0 ([RFC 6749](https://www.rfc-editor.org/rfc/rfc6749)). Clients from
//! [`issue_client`](Simulator::issue_client) authenticate by `client_secret_basic`, `client_secret_post` or
//! `client_secret_jwt`, whose assertions are accepted once, and an account by its API key as bearer. A public client, which sends only its `client_id`, can refresh but nothing else.
//!
//! It supports the grants `client_credentials` and `refresh_token`, token exchange
//! ([RFC 8693](https://www.rfc-editor.org/rfc/rfc8693)) and JWT bearer
//! ([RFC 7523](https://www.rfc-editor.org/rfc/rfc7523)). Refresh tokens are single-use: reuse of a spent token revokes
//! every token descended from the same first one.

mod agent;
mod api;
mod body;
mod fault;
mod jwt;
mod quota;
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

use bytes::Bytes;
use http::{HeaderMap, HeaderName, Method, Request, Response, Uri, Version};
use http_body::Body;
use p256::elliptic_curve::rand_core::{OsRng, RngCore};
use tower::Service;

#[cfg(feature = "test-server")]
pub use self::server::Server;
use self::{
    agent::{Agent, Pings},
    jwt::{Issuer, SUBJECT},
    quota::{MINUTE, Window},
    token::TokenEndpoint,
};
pub use self::{
    body::SimulatorBody,
    fault::{Fault, TokenFault},
    jwt::JwtAlgorithm,
};
use crate::{
    BoxError,
    util::clock::{Clock, TestClock},
};

/// How many requests are recorded.
const RECORDED_REQUESTS: usize = 10_000;

/// Simulates SelamAPI in process. Clones share their state. See the [module docs](self).
#[derive(Clone, Default)]
pub struct Simulator {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    clock: Clock,
    keys: HashMap<String, Access>,
    issuer: Issuer,
    reject_jwts: bool,
    tokens: TokenEndpoint,
    agent: Agent,
    faults: VecDeque<Fault>,
    window: Window,
    received: VecDeque<Received>,
    requests: u64,
}

/// What a key gives access to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Full,
    /// Chat completions only.
    Limited,
}

impl Simulator {
    /// Creates a simulator without keys, clients or faults, and with a limit of 600 requests per minute.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Issues and expires JWTs by `clock` instead of the system clock, for every clone.
    #[must_use]
    pub fn with_clock(self, clock: TestClock) -> Self {
        self.state().clock = clock.into();
        self
    }

    /// Issues a key with access to everything.
    #[must_use]
    pub fn issue_key(&self) -> String {
        self.issue(Access::Full)
    }

    /// Issues a key with access to chat completions only. Other endpoints respond 403 `insufficient_permissions`.
    #[must_use]
    pub fn issue_limited_key(&self) -> String {
        self.issue(Access::Limited)
    }

    fn issue(&self, access: Access) -> String {
        let key = format!("sk-selam-{}", random_hex());
        self.state().keys.insert(key.clone(), access);
        key
    }

    /// Accepts this key from now on, with access to everything.
    pub fn add_key(&self, key: impl Into<String>) {
        self.state().keys.insert(key.into(), Access::Full);
    }

    /// Refuses this key from now on, as the API does with a key that was found exposed.
    pub fn revoke_key(&self, key: &str) {
        self.state().keys.remove(key);
    }

    /// Mints a JWT that is accepted for `lifetime`.
    #[must_use]
    pub fn mint_jwt(&self, algorithm: JwtAlgorithm, lifetime: Duration) -> String {
        let mut state = self.state();
        let now = state.clock.now().wall;
        state.issuer.mint(algorithm, SUBJECT, now, lifetime)
    }

    /// Refuses every JWT minted so far as expired.
    pub fn expire_jwts(&self) {
        self.state().issuer.expire_all();
    }

    /// Sets whether every JWT is refused, even a valid one.
    pub fn reject_jwts(&self, reject: bool) {
        self.state().reject_jwts = reject;
    }

    /// Sets how often the voice agent pings its clients, and how long they may take to answer: 25 and 20 seconds by default.
    /// Sessions that are open keep what they were announced.
    pub fn set_voice_agent_pings(&self, interval: Duration, timeout: Duration) {
        self.state().agent.pings = Pings { interval, timeout };
    }

    /// Sets whether the voice agent accepts every handshake, and refuses bad credentials in the namespace with a connect error, as
    /// Socket.IO servers with a middleware do. By default, it refuses the handshake.
    pub fn refuse_in_voice_namespace(&self, refuse: bool) {
        self.state().agent.refuses_in_namespace = refuse;
    }

    /// Sets the rate limit, and starts a new minute. Requests beyond the limit get 429.
    pub fn set_rate_limit(&self, requests_per_minute: u64) {
        self.set_rate_limit_per(MINUTE, requests_per_minute);
    }

    /// Sets the rate limit for windows of another length than a minute, and starts a new one: for tests that run in real
    /// time. Headers still tell whole seconds.
    pub fn set_rate_limit_per(&self, window: Duration, requests: u64) {
        self.state().window = Window::new(requests, window);
    }

    /// Queues `fault`. Each API request takes one fault from the queue, oldest first.
    pub fn inject(&self, fault: Fault) {
        self.state().faults.push_back(fault);
    }

    /// Returns the last 10,000 requests, oldest first, including those to the token endpoint.
    #[must_use]
    pub fn received(&self) -> Vec<Received> {
        self.state().received.iter().cloned().collect()
    }

    /// Returns the number of requests received, including those to the token endpoint.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.state().requests
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn record(&mut self, received: Received) {
        self.requests += 1;
        if self.received.len() == RECORDED_REQUESTS {
            self.received.pop_front();
        }
        self.received.push_back(received);
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

/// A request as it arrived, credentials included.
///
/// `Debug` omits header values, query and body, which may hold secrets.
#[derive(Clone)]
#[non_exhaustive]
pub struct Received {
    /// The method.
    pub method: Method,
    /// The URI: complete in process and over HTTP/2, only path and query over HTTP/1.1.
    pub uri: Uri,
    /// The HTTP version.
    pub version: Version,
    /// The headers.
    pub headers: HeaderMap,
    /// The first 64 KiB of the body.
    pub body: Bytes,
    /// The length of the whole body, in bytes.
    pub body_length: u64,
}

impl fmt::Debug for Received {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Received")
            .field("method", &self.method)
            .field("path", &self.uri.path())
            .field("version", &self.version)
            .field("headers", &self.headers.keys().map(HeaderName::as_str).collect::<Vec<_>>())
            .field("body_length", &self.body_length)
            .finish()
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
        let simulator = self.clone();
        Box::pin(async { Ok(api::answer(simulator, request).await) })
    }
}

/// Response future of [`Simulator`].
pub type ResponseFuture = Pin<Box<dyn Future<Output = Result<Response<SimulatorBody>, Infallible>> + Send>>;

fn random_bytes() -> [u8; 16] {
    let mut bytes = [0; 16];
    OsRng.fill_bytes(&mut bytes);
    bytes
}

fn random_hex() -> String {
    random_bytes().iter().map(|byte| format!("{byte:02x}")).collect()
}
