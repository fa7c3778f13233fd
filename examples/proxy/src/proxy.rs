//! The path of a request from the caller to the API: [`router`].

use std::{
    error::Error as _,
    hash::{BuildHasher, RandomState},
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{
        HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, Version,
        header::{CONNECTION, HOST, SEC_WEBSOCKET_PROTOCOL, UPGRADE, VIA},
    },
    middleware,
    response::{IntoResponse, Response},
    routing::any,
};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::copy_bidirectional;
use tower::{ServiceBuilder, ServiceExt, util::BoxCloneSyncService};
use tower_selam::{
    AuthErrorKind, BaseUrl, BoxError, ChooseAuthLayer, Error, RequestAuth, SelamLayer, Subject,
    fleet::Fleet,
    inbound::{StripHopByHopLayer, StripResponsesLayer, WebSocketProtocols},
    oauth::SubjectTokens,
};

use crate::{
    browsers::{self, Origins},
    callers::{Callers, Identity},
    config::{self, Config},
    local,
    location::RewriteLocation,
    login::User,
    metrics::{self, Metrics, RequestTracker},
    reply::Refusal,
    rules::{self, BadPath, Rule},
    server::{self, Connection, Shutdown},
    trailers,
    upstream::{self, HttpProxy, Upstream, Versions},
    voice::{self, Call, Voice},
};

/// How much of a request's body is kept for a replay after a 401. Longer requests are not replayed.
const REPLAY_LIMIT: usize = 1024 * 1024;

/// How much of it is kept, until the response begins, to send a request once more that the API has not processed.
const RESEND_LIMIT: usize = 256 * 1024;

/// The subject of callers with a client token, where each user of the app has a JWT of its own. No digest of a user is this short.
const OWN_SUBJECT: &str = "proxy";

/// The longest URI that the `http` crate accepts.
const MAX_URI_LENGTH: usize = 65_534;

/// The state shared by all requests. Cheap to clone.
#[derive(Clone)]
struct Proxy {
    callers: Callers,
    /// The JWTs of the app's users, if they are exchanged for others.
    subjects: Option<SubjectTokens>,
    allow: Arc<[Rule]>,
    metrics: Metrics,
    stack: Stack,
    /// The same stack over HTTP/1.1 alone, whose connections can be upgraded.
    upgrade_stack: Stack,
    /// Where the voice agent is served.
    voice: Option<Voice>,
    base_url_length: usize,
    /// This process's name in `Via`, to detect loops.
    via: Arc<str>,
    shutdown: Shutdown,
    /// How long an upgraded connection may be idle.
    upgrade_idle: Duration,
}

type Stack = BoxCloneSyncService<Request, Response, Error<upstream::Error>>;

/// Builds the proxy as a service for every path. Its JWTs are shared with `fleet`.
///
/// # Errors
///
/// A setting is invalid.
pub fn router(
    config: &Config,
    fleet: Option<&Fleet>,
    metrics: Metrics,
    shutdown: Shutdown,
) -> Result<Router, config::Error> {
    let tls = upstream::tls(config.ca.as_deref(), !config.allow_insecure_loopback)?;
    let http_proxy = HttpProxy::from_env(|name| std::env::var_os(name))?;
    let settings = upstream::Settings::new(tls, http_proxy, config.api_idle, RESEND_LIMIT);
    let subjects = config.exchanges.then(|| SubjectTokens::new().with_own_subject(Subject::new(OWN_SUBJECT)));
    let mut builder = SelamLayer::builder().with_token_client(settings.token_client());
    if let Some(subjects) = &subjects {
        builder = builder.with_subject_tokens(subjects.clone());
    }
    if let Some(fleet) = fleet {
        builder = builder.with_fleet(fleet.clone());
    }
    let layer = config.layer(builder)?;
    if let Ok(api) = layer.base_url().to_string().parse()
        && let Some((variable, proxy)) = settings.proxy.describe(&api)
    {
        tracing::info!(proxy, variable, "connecting to the API through an HTTP proxy");
    }
    let via: Arc<str> = format!("selam-proxy-{:016x}", RandomState::new().hash_one(())).into();
    let (stack, upgrade_stack) = stacks(config, &layer, &settings, &via)?;
    let pages = Origins::new(config.allow_origins.clone());
    let callers = Callers::new(
        config.client_token_file.clone(),
        config.login(settings.token_client())?,
        pages.clone(),
    )?;
    let voice = config.voice_agent.then(|| {
        metrics::describe_voice();
        Voice::new(callers.clone())
    });
    let proxy = Proxy {
        callers,
        subjects,
        allow: config.allow.clone().into(),
        metrics,
        stack,
        upgrade_stack,
        voice,
        base_url_length: layer.base_url().to_string().len(),
        via,
        shutdown,
        upgrade_idle: config.limits.upgrade_idle,
    };
    let router = Router::new()
        .route("/healthz", any(healthz))
        .route("/metrics", any(show_metrics))
        .fallback(forward)
        .with_state(proxy);
    Ok(match &*config.allow_origins {
        [] => router,
        _ => router.layer(middleware::from_fn_with_state(pages, browsers::share)),
    })
}

/// Builds the layers between caller and API: once over all versions of HTTP, once over HTTP/1.1 alone.
fn stacks(
    config: &Config,
    layer: &SelamLayer,
    settings: &upstream::Settings,
    via: &Arc<str>,
) -> Result<(Stack, Stack), config::Error> {
    let choose = match &*config.jwt_paths {
        [] => None,
        prefixes => Some(
            ChooseAuthLayer::jwt_for_paths(prefixes)
                .map_err(|error| config::Error::for_flag("--jwt-path", error))?,
        ),
    };
    let (base, via) = (layer.base_url().clone(), Arc::clone(via));
    let credentials = config.strip_credentials();
    let layers = ServiceBuilder::new()
        .map_response(|response: axum::http::Response<_>| response.map(Body::new))
        // Strip from responses what would speak for the proxy.
        .layer(StripResponsesLayer::new())
        // Strip what belongs to the caller's connection, and what tells of the caller.
        .layer(StripHopByHopLayer::new())
        .layer(credentials.clone())
        .map_request(move |request: Request| request.map(|body| trailers::strip(body, &credentials)))
        // Choose JWT and key, or the key alone, by the path that the caller requested.
        .option_layer(choose)
        // Rewrite the URI to the API's.
        .map_request(move |request: Request| to_api(&base, &via, request))
        // Add our credentials. After a 401, refresh them and replay the request once.
        .layer(layer.clone().buffered(REPLAY_LIMIT).annotated());
    // Keep callers on the proxy.
    let upstream = |versions| {
        RewriteLocation::new(Upstream::new(settings, versions), &layer.base_url().to_string())
            .map_err(|error| config::Error::for_flag("--base-url", error))
    };
    let stack = layers.clone().service(upstream(Versions::All)?);
    let upgrade_stack = layers.service(upstream(Versions::Http1)?);
    Ok((BoxCloneSyncService::new(stack), BoxCloneSyncService::new(upgrade_stack)))
}

async fn healthz(request: Request) -> Response {
    match *request.method() {
        Method::GET | Method::HEAD => "ok\n".into_response(),
        _ => Refusal::WrongMethod.into_response(),
    }
}

async fn show_metrics(State(proxy): State<Proxy>, request: Request) -> Response {
    if let Err(refusal) = proxy.identify(request.version(), request.uri(), request.headers()).await {
        return refusal.into_response();
    }
    match *request.method() {
        Method::GET | Method::HEAD => {
            let content_type = [("content-type", "text/plain; version=0.0.4; charset=utf-8")];
            (content_type, proxy.metrics.render()).into_response()
        }
        _ => Refusal::WrongMethod.into_response(),
    }
}

/// Handles every other path: checks the request, then sends it to the API.
async fn forward(State(proxy): State<Proxy>, mut request: Request) -> Response {
    let connection = request.extensions_mut().remove::<Arc<Connection>>();
    let mut tracker = RequestTracker::new(request.method(), request.uri().path());
    if proxy.voice_for(&request).is_some() {
        voice::move_credentials(&mut request);
    }
    let caller = match proxy.screen(&request) {
        Ok(()) => proxy.identify(request.version(), request.uri(), request.headers()).await,
        Err(refusal) => Err(refusal),
    };
    let admitted = caller.and_then(|caller| {
        tracker.set_caller(caller.clone());
        proxy.permit(&request).map(|()| caller)
    });
    let caller = match admitted {
        Ok(caller) => caller,
        Err(refusal) => return tracker.track_response(refusal.into_response()),
    };
    if let Some(connection) = &connection {
        connection.admitted();
    }
    let protocols = proxy.take_protocols(request.headers_mut());
    proxy.name_subject(&caller, &mut request);
    let connection = connection.filter(|_| wants_upgrade(&request));
    let call = match proxy.prepare_voice(&caller, request, connection.is_some()).await {
        Ok((prepared, call)) => {
            request = prepared;
            call
        }
        Err(refusal) => return tracker.track_response(refusal.into_response()),
    };
    match connection {
        Some(connection) => proxy.upgrade(tracker, request, &protocols, connection, call).await,
        None => proxy.exchange(tracker, request, call).await,
    }
}

impl Proxy {
    /// Decides whether to ask who the caller is. Callers without a valid token learn nothing about paths below `/v1`.
    fn screen(&self, request: &Request) -> Result<(), Refusal> {
        if server::has_large_headers(request.headers()) {
            return Err(Refusal::LargeHeaders);
        }
        if self.check_path(request) == Err(BadPath::OutsideApi) {
            return Err(Refusal::NotFound);
        }
        let via = request.headers().get_all(VIA).iter();
        if via.filter_map(|via| via.to_str().ok()).any(|via| via.contains(&*self.via)) {
            return Err(Refusal::Loop);
        }
        Ok(())
    }

    /// Decides whether a known caller's request may be forwarded.
    fn permit(&self, request: &Request) -> Result<(), Refusal> {
        let (method, path) = (request.method(), request.uri().path());
        if self.check_path(request).is_err() {
            return Err(Refusal::BadPath);
        }
        if !rules::is_forwardable(method) || (self.allow.is_empty() && !rules::METHODS.contains(method)) {
            return Err(Refusal::BadRequest);
        }
        if !rules::is_allowed(&self.allow, method, path) {
            return Err(Refusal::NotAllowed);
        }
        let query = request.uri().query().map_or(0, |query| query.len() + 1);
        if self.base_url_length + path.len() + query > MAX_URI_LENGTH {
            return Err(Refusal::BadRequest);
        }
        Ok(())
    }

    /// Whether the path is one that is served.
    fn check_path(&self, request: &Request) -> Result<(), BadPath> {
        match self.voice_for(request) {
            Some(_) => Ok(()),
            None => rules::check(request.uri().path()).map(drop),
        }
    }

    /// Names the user whose JWT the API gets, and keeps the JWT that was verified for the next exchange.
    fn name_subject(&self, caller: &Identity, request: &mut Request) {
        let Some(subjects) = &self.subjects else { return };
        let subject = match &caller.user {
            Some(user) => {
                subjects.present(&user.subject, &user.jwt);
                request.extensions_mut().insert(Arc::clone(user));
                user.subject.clone()
            }
            None => Subject::new(OWN_SUBJECT),
        };
        request.extensions_mut().insert(subject);
    }

    /// Returns who the caller is.
    async fn identify(&self, version: Version, uri: &Uri, headers: &HeaderMap) -> Result<Identity, Refusal> {
        local::named_host(version, uri, headers)?;
        self.callers.identify(version, uri, headers).await
    }

    /// Takes the caller's token out of the WebSocket subprotocols.
    fn take_protocols(&self, headers: &mut HeaderMap) -> WebSocketProtocols {
        let mut protocols = WebSocketProtocols::from_headers(headers);
        if headers.contains_key(SEC_WEBSOCKET_PROTOCOL) {
            protocols.remove_if(|candidate| self.callers.may_know(candidate));
            protocols.write(headers);
        }
        protocols
    }

    /// Returns what serves the request if it belongs to the voice agent.
    fn voice_for(&self, request: &Request) -> Option<&Voice> {
        self.voice.as_ref().filter(|_| voice::is_path(request.uri().path()))
    }

    /// Checks a request of the voice agent, and prepares it. Other requests stay as they are.
    async fn prepare_voice(
        &self,
        caller: &Identity,
        request: Request,
        upgrades: bool,
    ) -> Result<(Request, Option<Call>), Refusal> {
        let Some(voice) = self.voice_for(&request) else { return Ok((request, None)) };
        let call = voice.call(&request, caller, upgrades)?;
        let mut request = voice.prepare(&call, request).await?;
        request.extensions_mut().insert(RequestAuth::VoiceAgent);
        Ok((request, Some(call)))
    }

    async fn exchange(self, tracker: RequestTracker, mut request: Request, call: Option<Call>) -> Response {
        // An upgrade that is not forwarded is ignored, as RFC 9110 section 7.8 allows.
        request.headers_mut().remove(UPGRADE);
        // Only `upgrade` may take over the caller's connection; a replay must not hold it either.
        request.extensions_mut().remove::<OnUpgrade>();
        let mut response = self.send(self.stack.clone(), request).await;
        // The API must not switch protocols without being asked.
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            response = Refusal::NoUpstream.into_response();
        }
        tracker.track_response(self.finish_voice(call, response).await)
    }

    /// Checks a response of the voice agent. Other responses stay as they are.
    async fn finish_voice(&self, call: Option<Call>, response: Response) -> Response {
        match self.voice.as_ref().zip(call) {
            Some((voice, call)) => voice.finish(call, response).await,
            None => response,
        }
    }

    /// Forwards a request to switch protocols. If the API agrees, joins the two connections.
    async fn upgrade(
        self,
        tracker: RequestTracker,
        mut request: Request,
        protocols: &WebSocketProtocols,
        connection: Arc<Connection>,
        call: Option<Call>,
    ) -> Response {
        let caller = hyper::upgrade::on(&mut request);
        let mut response = self.send(self.upgrade_stack.clone(), request).await;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return tracker.track_response(self.finish_voice(call, response).await);
        }
        // The caller would have to close a connection with a subprotocol that it did not offer.
        if !protocols.accepts(response.headers()) {
            tracing::warn!("the API chose a WebSocket subprotocol that was not offered");
            return tracker.track_response(Refusal::NoUpstream.into_response());
        }
        let relay = match self.voice.as_ref().zip(call) {
            None => None,
            Some((voice, call)) => match voice.relay(call, &mut response) {
                Ok(relay) => Some(relay),
                Err(refusal) => return tracker.track_response(refusal.into_response()),
            },
        };
        protocols.choose(response.headers_mut());
        let api = hyper::upgrade::on(&mut response);
        let tracker = tracker.track_upgrade(&response);
        let guard = self.shutdown.guard();
        tokio::spawn(async move {
            let joined = async {
                match relay {
                    Some(relay) => relay.run(caller, api).await,
                    None => join(caller, api).await,
                }
            };
            tokio::select! {
                joined = joined => match joined {
                    Ok(bytes) => tracker.upgrade_closed(bytes),
                    Err(error) => tracing::debug!(%error, "upgraded connection failed"),
                },
                () = connection.idle_for(self.upgrade_idle) => tracker.upgrade_idle(),
            }
            drop(guard);
        });
        response
    }

    async fn send(&self, stack: Stack, request: Request) -> Response {
        let user = request.extensions().get::<Arc<User>>().cloned();
        match stack.oneshot(request).await {
            Ok(response) => {
                metrics::record_rate_limit(response.headers());
                response
            }
            Err(error) => match refusal(&error) {
                // It expired before it could be exchanged: another one helps, and waiting does not.
                Refusal::NoCredential(_) if user.as_ref().is_some_and(|user| user.has_expired()) => {
                    Refusal::ExpiredJwt
                }
                refusal => refusal,
            }
            .into_response(),
        }
    }
}

/// Maps an error of the stack to the proxy's own response, and logs it.
fn refusal(error: &Error<upstream::Error>) -> Refusal {
    let refusal = match error {
        Error::Auth(error) => match error.kind() {
            AuthErrorKind::InvalidRequest => Refusal::BadRequest,
            _ => Refusal::NoCredential(error.retry_after()),
        },
        Error::Inner(error) if is_callers_fault(error) => Refusal::BadRequest,
        Error::Inner(upstream::Error::LargeHeaders) => Refusal::LargeResponse,
        Error::Inner(_) => Refusal::NoUpstream,
    };
    tracing::warn!(
        refused = refusal.name(),
        error = metrics::shorten(&chain(error), metrics::LOGGED_ERROR),
        "request not answered by the API"
    );
    refusal
}

/// Whether the caller's request body failed.
fn is_callers_fault(error: &upstream::Error) -> bool {
    let mut cause = error.source();
    while let Some(error) = cause {
        if error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_user) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// Formats an error and its causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// Rewrites a request for the API: its URI and `Via`.
fn to_api(base: &BaseUrl, via: &str, request: Request) -> Request {
    let (mut parts, body) = request.into_parts();
    let query = parts.uri.query().map(|query| format!("?{query}")).unwrap_or_default();
    let uri = if voice::is_path(parts.uri.path()) {
        format!("{}{}{query}", origin(base), voice::PATH)
    } else {
        format!("{base}{}{query}", rules::check(parts.uri.path()).unwrap_or_default())
    };
    // `permit` has checked the length. A default URI would have no authority, and so would not be sent.
    parts.uri = uri.parse().unwrap_or_else(|_| Uri::default());
    let version = match parts.version {
        Version::HTTP_10 => "1.0",
        Version::HTTP_2 => "2",
        _ => "1.1",
    };
    // The client picks the version for its own connection.
    parts.version = Version::HTTP_11;
    parts.headers.remove(HOST);
    if let Ok(via) = HeaderValue::try_from(format!("{version} {via}")) {
        // Left out if the caller already sent the maximum number of headers.
        let _ = parts.headers.try_append(VIA, via);
    }
    Request::from_parts(parts, body)
}

/// The base URL without its path.
fn origin(base: &BaseUrl) -> String {
    let base = base.to_string();
    let host = base.find("://").map_or(0, |at| at + "://".len());
    let end = base[host..].find('/').map_or(base.len(), |at| host + at);
    base[..end].to_owned()
}

/// Whether the caller asks to switch protocols on this connection. An upgrade to another version of HTTP (`h2c`) does not
/// count: requests on the upgraded connection would bypass every check.
fn wants_upgrade(request: &Request) -> bool {
    let headers = request.headers();
    let mut offers =
        headers.get_all(UPGRADE).iter().flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
    let is_http = |offer: &[u8]| {
        let offer = offer.trim_ascii().to_ascii_lowercase();
        [&b"h2"[..], b"http", b"tls"].iter().any(|prefix| offer.starts_with(prefix))
    };
    request.version() == Version::HTTP_11
        && lists(headers, &CONNECTION, "upgrade")
        && headers.contains_key(UPGRADE)
        && !offers.any(is_http)
}

/// Whether the comma-separated header contains this item.
fn lists(headers: &HeaderMap, header: &HeaderName, item: &str) -> bool {
    let values = headers.get_all(header).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|listed| listed.trim().eq_ignore_ascii_case(item))
}

/// Relays bytes between the two connections until both sides have closed. Returns how many the caller received.
async fn join(caller: OnUpgrade, api: OnUpgrade) -> Result<u64, BoxError> {
    let (caller, api) = tokio::try_join!(caller, api)?;
    let (_, received) = copy_bidirectional(&mut TokioIo::new(caller), &mut TokioIo::new(api)).await?;
    Ok(received)
}
