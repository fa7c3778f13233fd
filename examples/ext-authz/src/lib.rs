//! An authorization service for nginx's `auth_request` and Envoy's HTTP ext_authz: it says whether a caller may call SelamAPI,
//! and which headers to send there.
//!
//! | It answers | when |
//! |---|---|
//! | 200, with `Authorization` and perhaps `X-API-Key` | the caller's token is known |
//! | 401 | it is not |
//! | 403 | the request's method never carries credentials |
//! | 503, with `Retry-After` | no credential is available at the moment |
//!
//! The server in front of it sends these headers to SelamAPI, and to no other origin. `README.md` says how.

use std::{fmt, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::State,
    http::{
        HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode,
        header::{AUTHORIZATION, CACHE_CONTROL, RETRY_AFTER, WWW_AUTHENTICATE},
    },
    response::{IntoResponse, Response},
    routing::{any, get},
};
use sha2::{Digest, Sha256};
use subtle::{ConditionallySelectable, ConstantTimeEq};
use tower_selam::{AuthError, AuthErrorKind, BoxError, SelamLayer, Subject};

/// Names the headers that Envoy removes from the caller's request; nginx ignores it.
const REMOVED_HEADERS: HeaderName = HeaderName::from_static("x-envoy-auth-headers-to-remove");

/// Authorizes callers.
#[derive(Debug)]
pub struct Authorizer {
    layer: SelamLayer,
    callers: Callers,
    per_caller: bool,
}

impl Authorizer {
    /// Sends the layer's credentials for all callers.
    pub fn new(layer: SelamLayer, callers: Callers) -> Self {
        Self { layer, callers, per_caller: false }
    }

    /// Sends the JWT of each caller, whose name is the [`Subject`]. The layer has to be built with JWTs
    /// [per subject](tower_selam::PerSubject).
    #[must_use]
    pub fn per_caller(mut self) -> Self {
        self.per_caller = true;
        self
    }

    /// Returns the service: `/authorize` for requests, `/ready` for readiness probes.
    pub fn router(self) -> Router {
        Router::new()
            .route("/authorize", any(authorize))
            // Envoy appends the request's path.
            .route("/authorize/{*path}", any(authorize))
            .route("/ready", get(ready))
            .with_state(Arc::new(self))
    }

    async fn authorize(&self, method: Method, headers: &HeaderMap) -> Result<Response, Refusal> {
        let caller = self.callers.identify(headers).ok_or(Refusal::UnknownCaller)?;
        // The credentials are for the API: host and path of the caller's request do not matter.
        let mut request = Request::new(());
        *request.method_mut() = method;
        *request.uri_mut() = self.layer.base_url().endpoint("").map_err(|_| Refusal::Misconfigured)?;
        if self.per_caller {
            request.extensions_mut().insert(Subject::new(caller));
        }
        let (mut head, ()) = request.into_parts();
        let authorized = self.layer.authorize(&mut head).await?;
        let mut response = StatusCode::OK.into_response();
        for (name, value) in authorized.headers() {
            match value {
                Some(value) => response.headers_mut().append(name, value.clone()),
                None => response.headers_mut().append(REMOVED_HEADERS, HeaderValue::from_name(name.clone())),
            };
        }
        Ok(response)
    }
}

async fn authorize(
    State(authorizer): State<Arc<Authorizer>>,
    method: Method,
    headers: HeaderMap,
) -> Response {
    no_store(authorizer.authorize(method, &headers).await.unwrap_or_else(Refusal::into_response))
}

async fn ready(State(authorizer): State<Arc<Authorizer>>) -> Response {
    let ready = authorizer.layer.prefetch().await.map_err(Refusal::from);
    no_store(ready.map_or_else(Refusal::into_response, IntoResponse::into_response))
}

/// An answer holds credentials, or depends on the caller's: no cache may keep it.
fn no_store(mut response: Response) -> Response {
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// Why a request gets no credentials.
#[derive(Debug)]
enum Refusal {
    UnknownCaller,
    Unsuitable,
    Misconfigured,
    Unavailable { retry_after: Option<Duration> },
}

impl From<AuthError> for Refusal {
    fn from(error: AuthError) -> Self {
        match error.kind() {
            AuthErrorKind::InvalidRequest => Self::Unsuitable,
            _ => Self::Unavailable { retry_after: error.retry_after() },
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        match self {
            Self::UnknownCaller => (StatusCode::UNAUTHORIZED, [(WWW_AUTHENTICATE, "Bearer")]).into_response(),
            Self::Unsuitable => StatusCode::FORBIDDEN.into_response(),
            Self::Misconfigured => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
            Self::Unavailable { retry_after } => {
                // Rounded up, so that nobody comes too early.
                let wait = retry_after.unwrap_or_default();
                let seconds = (wait.as_secs() + u64::from(wait.subsec_nanos() > 0)).max(1);
                (StatusCode::SERVICE_UNAVAILABLE, [(RETRY_AFTER, HeaderValue::from(seconds))]).into_response()
            }
        }
    }
}

/// The callers' names, each with the digest of its token.
#[derive(Clone, Default)]
pub struct Callers(Vec<(String, [u8; 32])>);

impl Callers {
    /// Parses `name:token` pairs, separated by white space.
    ///
    /// # Errors
    ///
    /// When there is none, a name is not made of letters, digits, `-` and `_`, or a token is shorter than 16 characters.
    pub fn parse(pairs: &str) -> Result<Self, BoxError> {
        let is_word = |char: char| char.is_ascii_alphanumeric() || matches!(char, '-' | '_');
        let parse = |(number, pair): (usize, &str)| match pair.split_once(':') {
            Some((name, token)) if !name.is_empty() && name.chars().all(is_word) && token.len() >= 16 => {
                Ok((name.to_owned(), Sha256::digest(token).into()))
            }
            // Not the pair itself, which holds a token.
            _ => {
                Err(format!("caller {} is not NAME:TOKEN, with a token of 16 characters or more", number + 1))
            }
        };
        let callers: Vec<_> = pairs.split_whitespace().enumerate().map(parse).collect::<Result<_, _>>()?;
        if callers.is_empty() { Err("there are no callers".into()) } else { Ok(Self(callers)) }
    }

    /// Finds the caller whose token the headers have, in a time that does not depend on the tokens.
    fn identify(&self, headers: &HeaderMap) -> Option<&str> {
        let mut values = headers.get_all(AUTHORIZATION).iter();
        let (value, None) = (values.next()?, values.next()) else { return None };
        let (scheme, token) = value.as_bytes().split_at_checked(b"bearer ".len())?;
        let digest: [u8; 32] = Sha256::digest(token.trim_ascii()).into();
        let mut found = u32::MAX;
        for (index, (_, known)) in (0..).zip(&self.0) {
            found.conditional_assign(&index, digest.ct_eq(known));
        }
        let (name, _) = self.0.get(usize::try_from(found).ok()?)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then_some(name)
    }
}

impl fmt::Debug for Callers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.iter().map(|(name, _)| name)).finish()
    }
}
