//! A request's way through: [`router`].

use std::{
    error::Error as _,
    hash::{BuildHasher, RandomState},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{
        HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, Version,
        header::{CONNECTION, FORWARDED, HOST, UPGRADE, VIA},
    },
    response::{IntoResponse, Response},
    routing::any,
};
use hyper::upgrade::OnUpgrade;
use hyper_util::{client::legacy::Error as ClientError, rt::TokioIo};
use tokio::{io::copy_bidirectional, time};
use tokio_rustls::rustls::ClientConfig;
use tower::{ServiceBuilder, ServiceExt, util::BoxCloneSyncService};
use tower_selam::{
    AuthErrorKind, BaseUrl, BoxError, ChooseAuthLayer, Error, RequestAuth, SelamLayer,
    inbound::{StripCredentialsLayer, StripHopByHopLayer},
};

use crate::{
    callers::{Caller, Callers, Name},
    config::{self, Config},
    metrics::{self, Metrics, Watch},
    reply::Refusal,
    rules::{self, BadPath, Rule},
    server::Ending,
    trailers,
    upstream::{self, Upstream, Versions},
};

/// What is kept of a request's body, to send it once more after a 401. Longer ones are not sent again.
const REPLAYED: usize = 1024 * 1024;

/// The voice agent's WebSocket, which wants JWT and key in its query.
const VOICE_AGENT: &str = "/v1/audio/agent";

/// No URI is longer, says the `http` crate.
const LONGEST_URI: usize = 65_534;

/// The body of a request that is refused is read on for so long and so far, for callers that listen only when they have
/// said everything.
const DRAIN_TIME: Duration = Duration::from_secs(5);
const DRAIN_BYTES: usize = 4 * 1024 * 1024;

/// What is said of callers and their networks, which is not the API's business.
const FORWARDED_FOR: [HeaderName; 2] = [FORWARDED, HeaderName::from_static("x-real-ip")];
const FORWARDED_PREFIX: &str = "x-forwarded-";

/// Everything that a request needs. Cheap to clone.
#[derive(Clone)]
struct Proxy {
    callers: Callers,
    allow: Arc<[Rule]>,
    metrics: Metrics,
    /// Whether everybody may read the metrics.
    open_metrics: bool,
    stack: Stack,
    /// The same over HTTP/1.1 alone, whose connections can be upgraded.
    upgrading: Stack,
    /// Paths of handshakes that get JWT and key in their query.
    voice_agent: bool,
    base_length: usize,
    via: Arc<str>,
    ending: Ending,
}

type Stack = BoxCloneSyncService<Request, Response, Error<ClientError>>;

/// The proxy, as a service for every path.
///
/// # Errors
///
/// When something in the configuration is no good.
pub fn router(config: &Config, metrics: Metrics, ending: Ending) -> Result<Router, config::Error> {
    let tls = upstream::tls(config.ca.as_deref(), !config.allow_insecure_loopback)?;
    // Where tokens come from is asked on its own.
    let token_client = upstream::client(&tls);
    let layer = config.layer(SelamLayer::builder().with_token_client(token_client))?;
    let via: Arc<str> = format!("selam-proxy-{:016x}", RandomState::new().hash_one(())).into();
    let (stack, upgrading) = stacks(config, &layer, &tls, &via)?;
    let proxy = Proxy {
        callers: match &config.client_token_file {
            Some(path) => Callers::from_file(path.clone())?,
            None => Callers::anyone(),
        },
        allow: config.allow.clone().into(),
        metrics,
        open_metrics: config.is_local(),
        stack,
        upgrading,
        voice_agent: config.sends_jwt(VOICE_AGENT),
        base_length: layer.base_url().to_string().len(),
        via,
        ending,
    };
    Ok(Router::new()
        .route("/healthz", any(healthz))
        .route("/metrics", any(show_metrics))
        .fallback(forward)
        .with_state(proxy))
}

/// What a request goes through on its way to the API, and its answer on the way back.
fn stacks(
    config: &Config,
    layer: &SelamLayer,
    tls: &ClientConfig,
    via: &Arc<str>,
) -> Result<(Stack, Stack), config::Error> {
    let choose = match &*config.jwt_paths {
        [] => None,
        prefixes => Some(
            ChooseAuthLayer::jwt_for_paths(prefixes)
                .map_err(|error| config::Error::of_flag("--jwt-path", error))?,
        ),
    };
    let (base, via) = (layer.base_url().clone(), Arc::clone(via));
    let credentials = StripCredentialsLayer::new();
    let outside = ServiceBuilder::new()
        .map_response(|response: axum::http::Response<_>| response.map(Body::new))
        // Off goes what was meant for this connection, and whatever the caller sent of credentials.
        .layer(StripHopByHopLayer::new())
        .layer(credentials.clone())
        .map_request(move |request: Request| request.map(|body| trailers::strip(body, &credentials)))
        // JWT and key, or the key alone, by the path that the caller asked for.
        .option_layer(choose)
        // From here on the URI is the API's.
        .map_request(move |request: Request| to_api(&base, &via, request))
        // Ours go on; a 401 renews them, and the request is sent once more.
        .layer(layer.clone().buffered(REPLAYED).annotated());
    let stack = outside.clone().service(Upstream::new(tls, Versions::All));
    let upgrading = outside.service(Upstream::new(tls, Versions::Http1));
    Ok((BoxCloneSyncService::new(stack), BoxCloneSyncService::new(upgrading)))
}

async fn healthz(request: Request) -> Response {
    match *request.method() {
        Method::GET | Method::HEAD => "ok\n".into_response(),
        _ => Refusal::WrongMethod.into_response(),
    }
}

async fn show_metrics(State(proxy): State<Proxy>, request: Request) -> Response {
    if !proxy.open_metrics
        && let Err(refusal) = proxy.identify(request.headers())
    {
        return refusal.into_response();
    }
    match *request.method() {
        Method::GET | Method::HEAD => {
            let kind = [("content-type", "text/plain; version=0.0.4; charset=utf-8")];
            (kind, proxy.metrics.render()).into_response()
        }
        _ => Refusal::WrongMethod.into_response(),
    }
}

/// Everything else: is it a path of the API's, who asks, may they?
async fn forward(State(proxy): State<Proxy>, request: Request) -> Response {
    let mut watch = Watch::new(request.method(), request.uri().path());
    if let Err(refusal) = proxy.admit(&mut watch, &request) {
        drain(request);
        return watch.answered(refusal.into_response());
    }
    if wants_upgrade(&request) {
        proxy.upgrade(watch, request).await
    } else {
        proxy.exchange(watch, request).await
    }
}

impl Proxy {
    fn identify(&self, headers: &HeaderMap) -> Result<Name, Refusal> {
        match self.callers.find(headers) {
            Caller::Known(name) => Ok(name),
            Caller::Unknown => Err(Refusal::InvalidToken),
            Caller::Silent => Err(Refusal::MissingToken),
            Caller::Foreign => Err(Refusal::ForeignOrigin),
        }
    }

    fn admit(&self, watch: &mut Watch, request: &Request) -> Result<(), Refusal> {
        let path = request.uri().path();
        let found = rules::check(path);
        if found == Err(BadPath::Elsewhere) {
            return Err(Refusal::NotFound);
        }
        watch.set_caller(self.identify(request.headers())?);
        if found.is_err() {
            return Err(Refusal::BadPath);
        }
        if !rules::allow(&self.allow, request.method(), path) {
            return Err(Refusal::NotAllowed);
        }
        let query = request.uri().query().map_or(0, |query| query.len() + 1);
        if request.method() == Method::CONNECT || self.base_length + path.len() + query > LONGEST_URI {
            return Err(Refusal::BadRequest);
        }
        let came_by = request.headers().get_all(VIA).iter();
        if came_by.filter_map(|via| via.to_str().ok()).any(|via| via.contains(&*self.via)) {
            return Err(Refusal::Loop);
        }
        Ok(())
    }

    async fn exchange(self, watch: Watch, mut request: Request) -> Response {
        // An offer of another protocol, which nobody has to take up.
        request.headers_mut().remove(UPGRADE);
        let request = upstream::await_continue(request);
        let mut response = self.send(self.stack.clone(), request).await;
        // The answer to something that was not asked is none.
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            response = Refusal::NoUpstream.into_response();
        }
        watch.answered(response)
    }

    /// A request for another protocol on this connection: if the API agrees, the two connections become one.
    async fn upgrade(self, watch: Watch, mut request: Request) -> Response {
        let caller = hyper::upgrade::on(&mut request);
        if self.voice_agent
            && rules::is_below(request.uri().path(), VOICE_AGENT)
            && is_websocket(request.headers())
        {
            request.extensions_mut().insert(RequestAuth::VoiceAgent);
        }
        let mut response = self.send(self.upgrading.clone(), request).await;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return watch.answered(response);
        }
        let api = hyper::upgrade::on(&mut response);
        let watch = watch.upgraded(&response);
        let busy = self.ending.wait_for();
        tokio::spawn(async move {
            match join(caller, api).await {
                Ok(bytes) => watch.hung_up(bytes),
                Err(error) => tracing::debug!(%error, "an upgraded connection broke off"),
            }
            drop(busy);
        });
        response
    }

    async fn send(&self, stack: Stack, request: Request) -> Response {
        match stack.oneshot(request).await {
            Ok(response) => {
                metrics::rate_limit(response.headers());
                response
            }
            Err(error) => refusal(&error).into_response(),
        }
    }
}

/// Why there is no answer of the API's.
fn refusal(error: &Error<ClientError>) -> Refusal {
    let refusal = match error {
        Error::Auth(error) => match error.kind() {
            AuthErrorKind::InvalidRequest => Refusal::BadRequest,
            _ => Refusal::NoCredential(error.retry_after()),
        },
        Error::Inner(error) if is_callers_fault(error) => Refusal::BadRequest,
        Error::Inner(_) => Refusal::NoUpstream,
    };
    tracing::warn!(refused = refusal.name(), error = chain(error), "the API was not reached");
    refusal
}

/// Whether it is the caller's body that broke off.
fn is_callers_fault(error: &ClientError) -> bool {
    let mut cause = error.source();
    while let Some(error) = cause {
        if error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_user) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// An error and its causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut said = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        said = format!("{said}: {error}");
        cause = error.source();
    }
    said
}

/// The request as the API is to see it.
fn to_api(base: &BaseUrl, via: &str, request: Request) -> Request {
    let (mut parts, body) = request.into_parts();
    let below = rules::check(parts.uri.path()).unwrap_or_default();
    let query = parts.uri.query().map(|query| format!("?{query}")).unwrap_or_default();
    // Its length was looked at; and without an authority it goes nowhere.
    parts.uri = format!("{base}{below}{query}").parse().unwrap_or_else(|_| Uri::default());
    let version = match parts.version {
        Version::HTTP_10 => "1.0",
        Version::HTTP_2 => "2",
        _ => "1.1",
    };
    // The client's connection has a version of its own.
    parts.version = Version::HTTP_11;
    parts.headers.remove(HOST);
    let names: Vec<HeaderName> =
        parts.headers.keys().filter(|name| name.as_str().starts_with(FORWARDED_PREFIX)).cloned().collect();
    for name in names.iter().chain(&FORWARDED_FOR) {
        parts.headers.remove(name);
    }
    if let Ok(via) = HeaderValue::try_from(format!("{version} {via}")) {
        // A caller with too many headers goes without.
        let _ = parts.headers.try_append(VIA, via);
    }
    Request::from_parts(parts, body)
}

/// Whether the caller wants another protocol on this connection. HTTP/2 without TLS is none that a proxy may let through:
/// what is said then, nobody looks at.
fn wants_upgrade(request: &Request) -> bool {
    let headers = request.headers();
    let offers =
        || headers.get_all(UPGRADE).iter().flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
    let is_http = |offer: &[u8]| {
        let offer = offer.trim_ascii().to_ascii_lowercase();
        [&b"h2"[..], b"http", b"tls"].iter().any(|prefix| offer.starts_with(prefix))
    };
    request.version() == Version::HTTP_11
        && names(headers, &CONNECTION, "upgrade")
        && headers.contains_key(UPGRADE)
        && !offers().any(is_http)
}

fn is_websocket(headers: &HeaderMap) -> bool {
    names(headers, &UPGRADE, "websocket")
}

fn names(headers: &HeaderMap, header: &HeaderName, option: &str) -> bool {
    let values = headers.get_all(header).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|named| named.trim().eq_ignore_ascii_case(option))
}

/// Both sides hear each other until both have hung up; how much went to the caller.
async fn join(caller: OnUpgrade, api: OnUpgrade) -> Result<u64, BoxError> {
    let (caller, api) = tokio::try_join!(caller, api)?;
    let (_, heard) = copy_bidirectional(&mut TokioIo::new(caller), &mut TokioIo::new(api)).await?;
    Ok(heard)
}

/// Reads on, beside the answer, what is still to come of a refused request. One that waits for `100 Continue` is not
/// asked for it, and HTTP/2 can say without that it is enough.
fn drain(request: Request) {
    if request.version() == Version::HTTP_2 || upstream::expects_continue(request.headers()) {
        return;
    }
    let mut body = request.into_body();
    if http_body::Body::is_end_stream(&body) {
        return;
    }
    tokio::spawn(async move {
        let mut read = 0;
        let _ = time::timeout(DRAIN_TIME, async {
            while read < DRAIN_BYTES {
                let mut next = pin!(&mut body);
                let frame = std::future::poll_fn(|cx| http_body::Body::poll_frame(next.as_mut(), cx)).await;
                match frame {
                    Some(Ok(frame)) => read += frame.data_ref().map_or(0, |data| data.len()),
                    Some(Err(_)) | None => break,
                }
            }
        })
        .await;
    });
}
