//! An in-process API that accepts one credential and records the requests it receives.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use tokio::sync::Semaphore;
use tower::{Layer, Service, service_fn};
use tower_selam::{
    ApiKeyLayer, BoxError, JwtLayer, RefreshLayer, Refreshing, RequestAuth, Token,
    authorize::Authorize,
    source::{Reason, source_fn},
};

use crate::support::{Body, MODELS, key};

pub(crate) const INVALID_KEY: &str =
    r#"{"error":{"message":"Invalid API key provided.","code":"invalid_api_key"}}"#;
pub(crate) const INVALID_TOKEN: &str =
    r#"{"error":{"message":"The token is not valid.","code":"invalid_token"}}"#;

/// An API that accepts one bearer credential or all of them, and records the requests it receives.
#[derive(Clone)]
pub(crate) struct Api {
    accepts: Arc<Mutex<Option<String>>>,
    error_body: &'static str,
    pub(crate) received: Arc<Mutex<Vec<Received>>>,
    /// Each response takes a permit of this semaphore.
    gate: Arc<Semaphore>,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Received {
    pub(crate) bearer: String,
    pub(crate) key: String,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Api {
    pub(crate) fn accepting_all() -> Self {
        let api = Self::accepting("", "");
        *api.accepts.lock().unwrap() = None;
        api
    }

    pub(crate) fn accepting(credential: &str, error_body: &'static str) -> Self {
        Self {
            accepts: Arc::new(Mutex::new(Some(credential.to_owned()))),
            error_body,
            received: Arc::default(),
            gate: Arc::new(Semaphore::new(Semaphore::MAX_PERMITS)),
        }
    }

    /// Counts how often each bearer credential was received.
    pub(crate) fn tally(&self) -> BTreeMap<String, usize> {
        let mut tally = BTreeMap::new();
        self.bearers().into_iter().for_each(|bearer| *tally.entry(bearer).or_default() += 1);
        tally
    }

    /// Returns the same API, with responses that each take a permit of `gate`.
    pub(crate) fn gated(&self, gate: &Arc<Semaphore>) -> Self {
        Self { gate: Arc::clone(gate), ..self.clone() }
    }

    pub(crate) fn accept(&self, credential: &str) {
        *self.accepts.lock().unwrap() = Some(credential.to_owned());
    }

    pub(crate) fn bearers(&self) -> Vec<String> {
        self.received.lock().unwrap().iter().map(|received| received.bearer.clone()).collect()
    }

    pub(crate) fn service<B>(
        &self,
    ) -> impl Service<Request<B>, Response = Response<Body>, Error = BoxError, Future: Send> + Clone + use<B>
    where
        B: http_body::Body<Data: Send, Error: std::fmt::Debug> + Send + 'static,
    {
        let api = self.clone();
        service_fn(move |request: Request<B>| {
            let api = api.clone();
            async move {
                let (parts, body) = request.into_parts();
                let bearer = parts.headers.get("authorization").map_or(Ok(""), |value| value.to_str())?;
                let key = parts.headers.get("x-api-key").map_or(Ok(""), |value| value.to_str())?.to_owned();
                let mut others = parts.headers.clone();
                others.remove("authorization");
                let head = format!("{} {} {:?} {others:?}", parts.method, parts.uri, parts.version);
                let collected = body.collect().await.map_err(|error| format!("{error:?}"))?;
                let trailers = collected.trailers().cloned();
                let head = format!("{head} {trailers:?} {:?}", parts.extensions.get::<u8>());
                let body = collected.to_bytes().to_vec();
                let bearer = bearer.trim_start_matches("Bearer ").to_owned();
                let accepted = api.accepts.lock().unwrap().as_ref().is_none_or(|accepts| *accepts == bearer);
                api.received.lock().unwrap().push(Received { bearer, key, head, body });
                api.gate.acquire().await?.forget();
                let (status, body) = if accepted { (200, "") } else { (401, api.error_body) };
                Ok(Response::builder().status(status).body(Full::from(body))?)
            }
        })
    }
}

pub(crate) fn request() -> Request<Body> {
    Request::post(MODELS).body(Full::from("the body")).unwrap()
}

/// Makes a request with this choice of credentials.
pub(crate) fn request_with(choice: Option<RequestAuth>) -> Request<Body> {
    let mut request = request();
    if let Some(choice) = choice {
        request.extensions_mut().insert(choice);
    }
    request
}

/// Returns a source of `token-1`, `token-2`, …, and the number of calls to it.
pub(crate) fn counting() -> (Refreshing<Token>, Arc<AtomicUsize>) {
    let calls = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&calls);
    let source = source_fn(move |_: Reason<Token>| {
        let number = counter.fetch_add(1, SeqCst) + 1;
        async move {
            tokio::time::sleep(Duration::from_millis(50)).await;
            Ok::<_, BoxError>(Token::new(format!("token-{number}"))?)
        }
    });
    (Refreshing::new(source), calls)
}

pub(crate) fn stack<S: Clone>(
    jwts: &Refreshing<Token>,
    inner: S,
) -> <RefreshLayer as Layer<Authorize<Authorize<S>>>>::Service {
    RefreshLayer::new().layer((JwtLayer::new(jwts), ApiKeyLayer::x_api_key(key())).layer(inner))
}
