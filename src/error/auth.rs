//! [`AuthError`]: why a request was not authenticated, and how it is read from a response.

use std::{
    borrow::Cow,
    error::Error as StdError,
    fmt::{self, Write as _},
    iter,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, Response, StatusCode};
use percent_encoding::percent_decode;
use zeroize::Zeroizing;

use super::{
    AuthErrorKind, BoxError, ErrorBody, RateLimit, body::parse_json, cause_of, challenge::BearerChallenge,
    decoded, is_auth_status, rate_limit, redact::Redactor, with_causes,
};
use crate::util::clock::{self, Countdown};

const REQUEST_IDS: [HeaderName; 2] =
    [HeaderName::from_static("x-request-id"), HeaderName::from_static("request-id")];

const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// How much of a compressed body is decompressed.
const MAX_DECODED: usize = 64 * 1024;

/// How many characters of a server's message `Display` shows.
const MAX_EXCERPT: usize = 300;

/// Why a request was not authenticated: the API answered 401 or 403, or the request was never sent.
///
/// One pointer wide and cheap to clone. `Display` shows what happened, the API's message and the documented remedy,
/// but not the body. The credentials that were sent are redacted everywhere.
///
/// It shows one level of the chain. If a source failed, it says `the source failed`, and [`source`](StdError::source) says why:
/// print the whole chain, as `anyhow`'s `{error:#}` does.
///
/// ```
/// use bytes::Bytes;
/// use http::Response;
/// use tower_selam::{AuthError, AuthErrorKind};
///
/// let body = br#"{"error":{"message":"Invalid API key provided.","type":"authentication_error","code":"invalid_api_key"}}"#;
/// let response = Response::builder().status(401).body(Bytes::from_static(body)).unwrap();
///
/// let error = AuthError::from_response(&response).unwrap();
/// assert_eq!(error.kind(), AuthErrorKind::InvalidApiKey);
/// assert_eq!(error.code(), Some("invalid_api_key"));
/// assert_eq!(
///     error.to_string(),
///     "invalid API key (401 invalid_api_key): Invalid API key provided; \
///      verify the API key and check that it was not revoked",
/// );
/// ```
#[derive(Clone)]
pub struct AuthError(Arc<Inner>);

struct Inner {
    kind: AuthErrorKind,
    /// This crate's explanation; empty if the API answered.
    detail: Cow<'static, str>,
    /// `None` if nothing was sent.
    response: Option<ApiResponse>,
    /// Until this crate tries another refresh.
    next_attempt: Option<Countdown>,
    source: Option<BoxError>,
}

/// The 401 or 403, with credentials redacted.
struct ApiResponse {
    status: StatusCode,
    fields: ErrorBody,
    retry_after: Option<Duration>,
    rate_limit: Option<RateLimit>,
    body: Bytes,
}

impl AuthError {
    /// Reads a complete response, for code without a Tower stack around its client.
    ///
    /// Returns `None` if the status is neither 401 nor 403. Redacts text shaped like a SelamAPI key or a JWT;
    /// [`AuthErrorLayer`](crate::AuthErrorLayer) and [`Authorized::should_replay`](crate::Authorized::should_replay) also
    /// redact the exact credentials that were sent.
    #[must_use]
    pub fn from_response<B: AsRef<[u8]>>(response: &Response<B>) -> Option<Self> {
        let (status, headers, body) = (response.status(), response.headers(), response.body().as_ref());
        is_auth_status(status).then(|| Self::of_answer(status, headers, body, []))
    }

    /// Reads a 401 or 403 whose body is at hand. `secrets` are the credentials of the request.
    #[cold]
    pub(crate) fn of_answer<'a>(
        status: StatusCode,
        headers: &HeaderMap,
        body: &[u8],
        secrets: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        let decoded = decoded(headers, body, MAX_DECODED);
        Self::read(status, headers, decoded.as_deref().map_or(body, Vec::as_slice), secrets, None)
    }

    /// Reads a 401 or 403 with its decoded body. `secrets` are the credentials of the request; `source` is the error that cut
    /// the body off.
    #[cold]
    pub(crate) fn read<'a>(
        status: StatusCode,
        headers: &HeaderMap,
        body: &[u8],
        secrets: impl IntoIterator<Item = &'a str>,
        source: Option<BoxError>,
    ) -> Self {
        let now = clock::now();
        let redactor = Redactor::masking(secrets);
        let mut fields = parse_json(body).map(|json| ErrorBody::from_json(&json)).unwrap_or_default();

        let challenge = BearerChallenge::from_headers(headers);
        fields.message = fields.message.or_else(|| grpc_message(headers)).or(challenge.description);
        let codes = [fields.code(), challenge.error.as_deref()];
        let kind = AuthErrorKind::classify(status, codes, fields.error_type(), fields.message());
        fields.code = fields.code.or(challenge.error);
        fields.request_id = REQUEST_IDS
            .iter()
            .find_map(|name| Some(headers.get(name)?.to_str().ok()?.trim().to_owned()))
            .filter(|id| !id.is_empty())
            .or(fields.request_id);

        Self(Arc::new(Inner {
            kind,
            detail: Cow::Borrowed(""),
            response: Some(ApiResponse {
                status,
                fields: fields.redacted(&redactor),
                retry_after: rate_limit::retry_after(headers, now),
                rate_limit: RateLimit::read(headers, now),
                body: redactor.bytes(body).into_owned().into(),
            }),
            next_attempt: None,
            source: source.map(|source| redact_source(&redactor, source)),
        }))
    }

    /// Makes an error for a request that was never sent.
    #[cold]
    pub(crate) fn local(kind: AuthErrorKind, detail: impl Into<Cow<'static, str>>) -> Self {
        Self::refresh_failure(kind, detail, None, None)
    }

    /// Makes an error for a request that was never sent because refreshing its credential failed.
    #[cold]
    pub(crate) fn refresh_failure(
        kind: AuthErrorKind,
        detail: impl Into<Cow<'static, str>>,
        next_attempt: Option<Countdown>,
        source: Option<BoxError>,
    ) -> Self {
        Self(Arc::new(Inner { kind, detail: detail.into(), response: None, next_attempt, source }))
    }

    /// Finds the `AuthError` in `error` or its chain of sources, through boxes and the errors of Tower's layers.
    ///
    /// ```
    /// use tower_selam::{ApiKey, ApiKeyLayer, AuthError, BoxError};
    /// # async fn send(error: AuthError) -> Result<(), BoxError> { Err(error.into()) }
    /// # tokio_test::block_on(async {
    /// # let response = http::Response::builder().status(401).body("").unwrap();
    /// # let rejected = AuthError::from_response(&response).unwrap();
    /// let error: BoxError = send(rejected).await.unwrap_err();
    /// assert!(AuthError::find(&*error).is_some_and(AuthError::is_auth));
    /// # });
    /// ```
    #[must_use]
    pub fn find<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a Self> {
        iter::successors(Some(error), |&error| cause_of(error)).find_map(|error| {
            let boxed = || error.downcast_ref::<Box<Self>>().map(|found| &**found);
            let shared = || error.downcast_ref::<Arc<Self>>().map(|found| &**found);
            error.downcast_ref::<Self>().or_else(boxed).or_else(shared)
        })
    }

    /// Returns the kind of error.
    #[must_use]
    pub fn kind(&self) -> AuthErrorKind {
        self.0.kind
    }

    /// Returns the response's status; `None` if nothing was sent.
    #[must_use]
    pub fn status(&self) -> Option<StatusCode> {
        self.response().map(|response| response.status)
    }

    /// Returns the error code: from the body or, failing that, from `WWW-Authenticate`.
    #[must_use]
    pub fn code(&self) -> Option<&str> {
        self.response()?.fields.code()
    }

    /// Returns the error type (`type` in the body).
    #[must_use]
    pub fn error_type(&self) -> Option<&str> {
        self.response()?.fields.error_type()
    }

    /// Returns the API's message: from the body, `grpc-message` or `WWW-Authenticate`, in this order.
    #[must_use]
    pub fn message(&self) -> Option<&str> {
        self.response()?.fields.message()
    }

    /// Returns the request id: from `X-Request-Id`, `Request-Id` or `request_id` in the body, in this order.
    #[must_use]
    pub fn request_id(&self) -> Option<&str> {
        self.response()?.fields.request_id()
    }

    /// Returns how long to wait: what the response says, as [`RateLimit::retry_after`] reads it; or, if a refresh failed,
    /// the time that is left until the next attempt, which becomes shorter as time passes.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        let next_attempt = self.0.next_attempt.as_ref().map(Countdown::remaining);
        next_attempt.or_else(|| self.response()?.retry_after)
    }

    /// Returns the account's rate limit, as [`RateLimit::from_headers`] reads it from the response.
    #[must_use]
    pub fn rate_limit(&self) -> Option<&RateLimit> {
        self.response()?.rate_limit.as_ref()
    }

    /// Returns the response body as far as it was read, with credentials redacted; empty if nothing was sent.
    ///
    /// With the feature `decompression`, a compressed body is decompressed.
    #[must_use]
    pub fn body(&self) -> &[u8] {
        self.response().map(|response| &*response.body).unwrap_or_default()
    }

    /// Returns whether the API answered 401 or 403. Otherwise this crate refused the request, and nothing was sent.
    #[must_use]
    pub fn is_auth(&self) -> bool {
        self.0.kind.is_auth()
    }

    /// Returns whether retrying cannot help, because the key, the account or the code has to change first.
    #[must_use]
    pub fn is_permanent(&self) -> bool {
        self.0.kind.is_permanent()
    }

    /// Returns what to do about the error, in the words of SelamAPI's documentation where it has one.
    #[must_use]
    pub fn remedy(&self) -> Option<&'static str> {
        self.0.kind.remedy()
    }

    fn response(&self) -> Option<&ApiResponse> {
        self.0.response.as_ref()
    }
}

/// Decodes gRPC's error message, which is a percent-encoded header
/// ([gRPC over HTTP/2](https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md#responses)).
pub(crate) fn grpc_message(headers: &HeaderMap) -> Option<String> {
    let encoded = headers.get(GRPC_MESSAGE)?.as_bytes();
    Some(percent_decode(encoded).decode_utf8_lossy().into_owned()).filter(|message| !message.is_empty())
}

/// Replaces a foreign error that shows a secret by its redacted text.
fn redact_source(redactor: &Redactor, source: BoxError) -> BoxError {
    let shown = Zeroizing::new(format!("{source:?}"));
    let text = with_causes(&*source);
    match redactor.find(shown.as_bytes()).is_empty() && redactor.find(text.as_bytes()).is_empty() {
        true => source,
        false => redactor.text(text).into(),
    }
}

impl fmt::Display for AuthError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.kind)?;
        if let Some(response) = self.response() {
            write!(f, " ({}", response.status.as_u16())?;
            if let Some(code) = self.code().filter(|code| *code != response.status.as_str()) {
                f.write_char(' ')?;
                write_excerpt(code, f)?;
            }
            f.write_char(')')?;
        }
        if !self.0.detail.is_empty() {
            write!(f, ": {}", self.0.detail)?;
        }
        let wait = self.0.next_attempt.as_ref().map(Countdown::remaining);
        if let Some(wait) = wait.filter(|wait| !wait.is_zero()) {
            write!(f, "; next attempt in {wait:.1?} at the earliest")?;
        }
        if let Some(message) = self.message() {
            f.write_str(": ")?;
            write_excerpt(message.trim_end_matches('.'), f)?;
        }
        match self.remedy() {
            Some(remedy) => write!(f, "; {remedy}"),
            None => Ok(()),
        }
    }
}

/// Writes a server's text on one line, shortened and with control characters escaped.
pub(crate) fn write_excerpt(text: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for (at, char) in text.chars().enumerate() {
        match char {
            _ if at == MAX_EXCERPT => return f.write_char('…'),
            char if char.is_whitespace() => f.write_char(' ')?,
            char if char.is_control() => write!(f, "{}", char.escape_default())?,
            char => f.write_char(char)?,
        }
    }
    Ok(())
}

impl fmt::Debug for AuthError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("AuthError");
        debug.field("kind", &self.0.kind);
        if !self.0.detail.is_empty() {
            debug.field("detail", &self.0.detail);
        }
        if let Some(response) = self.response() {
            debug
                .field("status", &response.status)
                .field("code", &self.code())
                .field("type", &self.error_type())
                .field("message", &self.message())
                .field("request_id", &self.request_id())
                .field("retry_after", &response.retry_after)
                .field("rate_limit", &response.rate_limit)
                .field("body_bytes", &response.body.len());
        }
        debug.field("source", &self.0.source).finish()
    }
}

impl StdError for AuthError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}
