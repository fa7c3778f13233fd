use std::{
    borrow::Cow,
    error::Error as StdError,
    fmt::{self, Write as _},
    io,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, Response, StatusCode};
use percent_encoding::percent_decode;
use serde_json::Value;

use super::{
    AuthErrorKind, BoxError, ErrorBody, RateLimit, body::parse_json, challenge::BearerChallenge,
    is_auth_status, rate_limit, redact::Redactor,
};
use crate::{credential::Credentials, util::clock};

const REQUEST_IDS: [HeaderName; 2] =
    [HeaderName::from_static("x-request-id"), HeaderName::from_static("request-id")];

const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// How much of a server's message `Display` shows, in characters.
const SHOWN: usize = 300;

/// Why a request was not authenticated: refused by the API, or never sent.
///
/// One pointer wide and cheap to clone. `Display` says what happened, what the API said of it, and the
/// documented remedy; it shows no body, and in whatever it shows the credentials that were sent are masked.
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
    /// What this crate has to say, where it was not the API that refused.
    detail: Cow<'static, str>,
    answer: Option<Answer>,
    /// When this crate will try again.
    retry_after: Option<Duration>,
    source: Option<BoxError>,
}

/// What the API answered.
struct Answer {
    status: StatusCode,
    fields: ErrorBody,
    retry_after: Option<Duration>,
    rate_limit: Option<RateLimit>,
    body: Bytes,
}

impl AuthError {
    /// Reads a whole response, for code that has no Tower stack around its client.
    ///
    /// `None` when the status is neither 401 nor 403. Masks whatever has the shape of a SelamAPI key or a
    /// JWT; [`AuthErrorLayer`](crate::AuthErrorLayer) also masks the credentials that were sent.
    #[must_use]
    pub fn from_response<B: AsRef<[u8]>>(response: &Response<B>) -> Option<Self> {
        let status = response.status();
        is_auth_status(status)
            .then(|| Self::read(status, response.headers(), response.body().as_ref(), None, None))
    }

    /// Reads a 401 or 403 that answered `sent`; `source` is what broke its body off.
    #[cold]
    pub(crate) fn read(
        status: StatusCode,
        headers: &HeaderMap,
        body: &[u8],
        sent: Option<&Credentials>,
        source: Option<BoxError>,
    ) -> Self {
        let now = clock::now();
        let redactor = Redactor::new(sent);
        let mut json = parse_json(body);
        let mut fields = json.as_ref().map(ErrorBody::from_json).unwrap_or_default();

        let challenge = BearerChallenge::from_headers(headers);
        let token_rejected = challenge.error.as_deref() == Some("invalid_token");
        fields.code = fields.code.or(challenge.error);
        fields.message = fields.message.or_else(|| grpc_message(headers)).or(challenge.description);
        fields.request_id = REQUEST_IDS
            .iter()
            .find_map(|name| Some(headers.get(name)?.to_str().ok()?.trim().to_owned()))
            .filter(|id| !id.is_empty())
            .or(fields.request_id);

        let kind = AuthErrorKind::classify(status, fields.code(), fields.error_type());
        let kind = match kind {
            AuthErrorKind::Unauthorized if token_rejected => AuthErrorKind::TokenRejected,
            kind => kind,
        };

        Self(Arc::new(Inner {
            kind,
            detail: Cow::Borrowed(""),
            answer: Some(Answer {
                status,
                fields: fields.redacted(&redactor),
                retry_after: rate_limit::retry_after(headers, now),
                rate_limit: RateLimit::read(headers, now),
                body: redact_body(&redactor, body, json.as_mut()),
            }),
            retry_after: None,
            source,
        }))
    }

    /// An error of this crate's own: nothing was sent.
    #[cold]
    pub(crate) fn local(kind: AuthErrorKind, detail: impl Into<Cow<'static, str>>) -> Self {
        let detail = detail.into();
        Self(Arc::new(Inner { kind, detail, answer: None, retry_after: None, source: None }))
    }

    /// No credential: its source failed.
    #[cold]
    pub(crate) fn renewal(
        kind: AuthErrorKind,
        detail: impl Into<Cow<'static, str>>,
        retry_after: Option<Duration>,
        source: Option<BoxError>,
    ) -> Self {
        Self(Arc::new(Inner { kind, detail: detail.into(), answer: None, retry_after, source }))
    }

    /// The `AuthError` in `error` or among its causes, through boxes and the errors of Tower's layers.
    ///
    /// ```
    /// use tower_selam::{ApiKey, ApiKeyLayer, AuthError, BoxError};
    /// # async fn send(error: AuthError) -> Result<(), BoxError> { Err(error.into()) }
    /// # tokio_test::block_on(async {
    /// # let response = http::Response::builder().status(401).body("").unwrap();
    /// # let refused = AuthError::from_response(&response).unwrap();
    /// let error: BoxError = send(refused).await.unwrap_err();
    /// assert!(AuthError::find(&*error).is_some_and(AuthError::is_auth));
    /// # });
    /// ```
    #[must_use]
    pub fn find<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a Self> {
        let mut next = Some(error);
        while let Some(error) = next {
            let boxed = || error.downcast_ref::<Box<Self>>().map(|found| &**found);
            let shared = || error.downcast_ref::<Arc<Self>>().map(|found| &**found);
            if let Some(found) = error.downcast_ref::<Self>().or_else(boxed).or_else(shared) {
                return Some(found);
            }
            // `source` of an `io::Error` skips the error that it holds.
            let held = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
            next = held.map(|held| held as _).or_else(|| error.source());
        }
        None
    }

    /// What kind of error it is.
    #[must_use]
    pub fn kind(&self) -> AuthErrorKind {
        self.0.kind
    }

    /// The response's status; `None` when nothing was sent.
    #[must_use]
    pub fn status(&self) -> Option<StatusCode> {
        self.answer().map(|answer| answer.status)
    }

    /// The error code: from the body, else from `WWW-Authenticate`.
    #[must_use]
    pub fn code(&self) -> Option<&str> {
        self.answer()?.fields.code()
    }

    /// The error type: `type` in the body.
    #[must_use]
    pub fn error_type(&self) -> Option<&str> {
        self.answer()?.fields.error_type()
    }

    /// The API's message: from the body, else from `WWW-Authenticate`.
    #[must_use]
    pub fn message(&self) -> Option<&str> {
        self.answer()?.fields.message()
    }

    /// The request id: `X-Request-Id` or `Request-Id`, else `request_id` in the body.
    #[must_use]
    pub fn request_id(&self) -> Option<&str> {
        self.answer()?.fields.request_id()
    }

    /// How long to wait: by the response's `Retry-After`, or, when a renewal failed, until the next one.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        self.0.retry_after.or_else(|| self.answer()?.retry_after)
    }

    /// The account's rate limit, from the response's headers.
    #[must_use]
    pub fn rate_limit(&self) -> Option<&RateLimit> {
        self.answer()?.rate_limit.as_ref()
    }

    /// The response's body as far as it was read, credentials in it masked; empty when nothing was sent.
    ///
    /// One that is spelled with JSON escapes is found where the body is whole JSON.
    #[must_use]
    pub fn body(&self) -> &[u8] {
        self.answer().map(|answer| &*answer.body).unwrap_or_default()
    }

    /// Whether the API refused, with 401 or 403; otherwise this crate did, and nothing was sent.
    #[must_use]
    pub fn is_auth(&self) -> bool {
        self.0.kind.is_auth()
    }

    /// Whether sending the same again cannot help: somebody has to change the key, the account or the code.
    #[must_use]
    pub fn is_permanent(&self) -> bool {
        self.0.kind.is_permanent()
    }

    /// What to do about it: the documented remedy where SelamAPI's authentication page has one.
    #[must_use]
    pub fn remedy(&self) -> Option<&'static str> {
        self.0.kind.remedy()
    }

    fn answer(&self) -> Option<&Answer> {
        self.0.answer.as_ref()
    }
}

/// What gRPC says instead of a body, percent-encoded
/// ([as its protocol has it](https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md#responses)).
pub(crate) fn grpc_message(headers: &HeaderMap) -> Option<String> {
    let encoded = headers.get(GRPC_MESSAGE)?.as_bytes();
    Some(percent_decode(encoded).decode_utf8_lossy().into_owned()).filter(|message| !message.is_empty())
}

/// `body` without credentials. JSON may spell one with escapes, which only its strings show.
fn redact_body(redactor: &Redactor, body: &[u8], json: Option<&mut Value>) -> Bytes {
    let redacted = redactor.bytes(body).into_owned();
    if let Some(json) = json
        && redact_strings(redactor, json)
        && parse_json(&redacted).as_ref() != Some(json)
    {
        return Bytes::from(json.to_string());
    }
    Bytes::from(redacted)
}

/// Redacts every string in `json`; whether there was anything to redact.
fn redact_strings(redactor: &Redactor, json: &mut Value) -> bool {
    match json {
        Value::String(text) => match redactor.bytes(text.as_bytes()) {
            Cow::Borrowed(_) => false,
            Cow::Owned(redacted) => {
                *text = String::from_utf8_lossy(&redacted).into_owned();
                true
            }
        },
        Value::Array(items) => {
            let mut any = false;
            for item in items {
                any |= redact_strings(redactor, item);
            }
            any
        }
        Value::Object(fields) => {
            let mut any = false;
            for (name, mut value) in std::mem::take(fields) {
                any |= redact_strings(redactor, &mut value);
                let redacted = redactor.text(name.clone());
                any |= redacted != name;
                fields.insert(redacted, value);
            }
            any
        }
        _ => false,
    }
}

impl fmt::Display for AuthError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.kind)?;
        if let Some(answer) = self.answer() {
            write!(f, " ({}", answer.status.as_u16())?;
            if let Some(code) = self.code().filter(|code| *code != answer.status.as_str()) {
                f.write_char(' ')?;
                shown(code, f)?;
            }
            f.write_char(')')?;
        }
        if !self.0.detail.is_empty() {
            write!(f, ": {}", self.0.detail)?;
        }
        if let Some(message) = self.message() {
            f.write_str(": ")?;
            shown(message.trim_end_matches('.'), f)?;
        }
        match self.remedy() {
            Some(remedy) => write!(f, "; {remedy}"),
            None => Ok(()),
        }
    }
}

/// A server's words, on one line and not too many of them.
pub(crate) fn shown(text: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for (at, char) in text.chars().enumerate() {
        match char {
            _ if at == SHOWN => return f.write_char('…'),
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
        if let Some(answer) = self.answer() {
            debug
                .field("status", &answer.status)
                .field("code", &self.code())
                .field("type", &self.error_type())
                .field("message", &self.message())
                .field("request_id", &self.request_id())
                .field("retry_after", &answer.retry_after)
                .field("rate_limit", &answer.rate_limit)
                .field("body_bytes", &answer.body.len());
        }
        debug.field("source", &self.0.source).finish()
    }
}

impl StdError for AuthError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}
