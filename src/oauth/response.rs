//! Parses the responses of a token endpoint (RFC 6749 sections 5.1 and 5.2), and [`OAuthError`].

use std::{borrow::Cow, error::Error as StdError, fmt, time::Duration};

use http::StatusCode;
use serde::Deserialize;
use serde_json::Value;
use zeroize::Zeroizing;

use super::{RefreshToken, client::TokenResponse};
use crate::{
    credential::Token,
    error::{ErrorBody, Redactor, retry_after, write_excerpt},
    source::{Fetched, SourceError},
    util::clock,
};

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

const REDIRECT: &str = "redirects are not followed: configure the URL that this one leads to";
const NOT_JSON: &str = "the response is not a JSON object with an `access_token` and a `token_type`";
const NOT_BEARER: &str = "the `token_type` is not `Bearer`";

/// Why a token endpoint returned no token. It is a cause of the [`AuthError`](crate::AuthError) that requests fail
/// with.
///
/// Its text quotes the endpoint, with the credentials of the request redacted.
///
/// ```
/// use bytes::Bytes;
/// use http_body_util::Full;
/// use std::error::Error;
/// use tower_selam::{Refreshing, simulator::Simulator};
/// use tower_selam::oauth::{ClientAuth, OAuthError, OAuthSource, TokenEndpoint};
///
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// let auth = ClientAuth::client_secret_basic("nobody", "knows")?;
/// let endpoint = TokenEndpoint::new::<_, Full<Bytes>, _>("https://api.selamgpt.com/oauth/token", Simulator::new())?;
/// let jwts = Refreshing::new(OAuthSource::client_credentials(endpoint.with_client_auth(auth)));
///
/// let error = jwts.token().await.unwrap_err();
/// let cause = error.source().and_then(|cause| cause.downcast_ref::<OAuthError>()).unwrap();
/// assert_eq!(cause.code(), Some("invalid_client"));
/// assert_eq!(
///     cause.to_string(),
///     "the token endpoint answered 401 invalid_client: The client is not authenticated",
/// );
/// # Ok::<(), tower_selam::BoxError>(())
/// # }).unwrap();
/// ```
#[derive(Clone, Debug)]
pub struct OAuthError(Box<Inner>);

#[derive(Clone, Debug)]
struct Inner {
    status: StatusCode,
    fields: ErrorBody,
    detail: Cow<'static, str>,
    retry_after: Option<Duration>,
}

impl OAuthError {
    fn new(response: &TokenResponse, detail: impl Into<Cow<'static, str>>) -> Self {
        Self::with_fields(response, detail, ErrorBody::default())
    }

    #[cold]
    fn with_fields(
        response: &TokenResponse,
        detail: impl Into<Cow<'static, str>>,
        fields: ErrorBody,
    ) -> Self {
        let retry_after = retry_after(&response.headers, clock::now());
        Self(Box::new(Inner { status: response.status, fields, detail: detail.into(), retry_after }))
    }

    /// Returns the status of the response.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        self.0.status
    }

    /// Returns the error code, the `error` field.
    #[must_use]
    pub fn code(&self) -> Option<&str> {
        self.0.fields.code()
    }

    /// Returns the human-readable `error_description`.
    #[must_use]
    pub fn description(&self) -> Option<&str> {
        self.0.fields.message()
    }

    /// Returns how long to wait before the next attempt: `Retry-After`.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        self.0.retry_after
    }

    /// Returns whether a retry with the same credentials cannot help.
    #[must_use]
    pub fn is_permanent(&self) -> bool {
        self.0.status.is_client_error()
            && matches!(self.code(), Some("invalid_grant" | "invalid_client" | "unauthorized_client"))
    }

    /// Returns the endpoint's answer, if it caused the source's failure.
    pub(super) fn of(error: &SourceError) -> Option<&Self> {
        error.cause().downcast_ref()
    }

    /// Returns whether the endpoint rejected the client authentication, rather than the grant.
    pub(super) fn blames_client(&self) -> bool {
        self.code() == Some("invalid_client")
            || (self.0.status == StatusCode::UNAUTHORIZED && !self.blames_grant())
    }

    /// Returns whether the endpoint rejected a token in the request. RFC 8693 section 2.2.2 uses `invalid_request`
    /// for that.
    pub(super) fn blames_grant(&self) -> bool {
        self.0.status.is_client_error() && matches!(self.code(), Some("invalid_grant" | "invalid_request"))
    }
}

impl From<OAuthError> for SourceError {
    fn from(error: OAuthError) -> Self {
        Self::of(error.is_permanent(), error.0.retry_after, error)
    }
}

impl fmt::Display for OAuthError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the token endpoint answered {}", self.0.status.as_u16())?;
        if let Some(code) = self.code() {
            f.write_str(" ")?;
            write_excerpt(code, f)?;
        }
        if !self.0.detail.is_empty() {
            write!(f, ": {}", self.0.detail)?;
        }
        if let Some(description) = self.description() {
            f.write_str(": ")?;
            write_excerpt(description.trim_end_matches('.'), f)?;
        }
        Ok(())
    }
}

impl StdError for OAuthError {}

/// A successful response ([RFC 6749 section 5.1](https://www.rfc-editor.org/rfc/rfc6749#section-5.1)). Required fields
/// are optional here, so that the refresh token is kept even if they are missing.
#[derive(Deserialize)]
struct Success {
    access_token: Option<Zeroizing<String>>,
    token_type: Option<String>,
    expires_in: Option<Value>,
    refresh_token: Option<Zeroizing<String>>,
}

/// The result of an exchange.
pub(super) struct Granted {
    /// An error if the access token is unusable. The refresh token next to it must be kept even then.
    pub(super) fetched: Result<Fetched<Token>, OAuthError>,
    pub(super) refresh_token: Option<RefreshToken>,
}

/// Parses the response to a request that carried `secrets`.
pub(super) fn read<'a>(
    response: &TokenResponse,
    secrets: impl IntoIterator<Item = &'a str>,
) -> Result<Granted, OAuthError> {
    if response.status.is_redirection() {
        return Err(OAuthError::new(response, REDIRECT));
    }
    if !response.status.is_success() {
        let fields = ErrorBody::read(&response.body, &Redactor::masking(secrets));
        return Err(OAuthError::with_fields(response, "", fields));
    }
    let body = response.body.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&response.body);
    let Ok(Success { access_token, token_type, expires_in, refresh_token }) = serde_json::from_slice(body)
    else {
        return Err(OAuthError::new(response, NOT_JSON));
    };
    let fetched = match (access_token, token_type) {
        (Some(token), Some(kind)) if kind.eq_ignore_ascii_case("bearer") => {
            // `ConfigError` never contains the value.
            Token::parse(&token)
                .map_err(|error| OAuthError::new(response, format!("in `access_token`: {error}")))
        }
        (Some(_), Some(_)) => Err(OAuthError::new(response, NOT_BEARER)),
        _ => Err(OAuthError::new(response, NOT_JSON)),
    };
    let fetched = fetched.map(|token| match expires_in.as_ref().and_then(seconds) {
        Some(lifetime) => Fetched::new(token).with_lifetime(lifetime),
        None => Fetched::new(token),
    });
    Ok(Granted { fetched, refresh_token: refresh_token.and_then(RefreshToken::received) })
}

/// Parses `expires_in`, which some endpoints send as a string. A value that is not a number is ignored.
fn seconds(value: &Value) -> Option<Duration> {
    let seconds = match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    };
    let seconds = seconds.filter(|seconds: &f64| !seconds.is_nan())?;
    if seconds <= 0.0 {
        return Some(Duration::ZERO);
    }
    Some(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX))
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;
    use proptest::prelude::*;

    use super::*;

    fn success(body: &str) -> Result<Granted, OAuthError> {
        response(200, body)
    }

    fn response(status: u16, body: &str) -> Result<Granted, OAuthError> {
        let status = StatusCode::from_u16(status).unwrap();
        let body = Zeroizing::new(body.as_bytes().to_vec());
        read(&TokenResponse { status, headers: HeaderMap::new(), body }, ["the-secret"])
    }

    /// R4: zero, negative, huge and invalid values.
    #[test]
    fn odd_expires_in_never_panics() {
        let second = Duration::from_secs(1);
        for (value, expected) in [
            ("3600", Some(3600 * second)),
            ("0.5", Some(second / 2)),
            (r#""3599""#, Some(3599 * second)),
            ("0", Some(Duration::ZERO)),
            ("-1", Some(Duration::ZERO)),
            ("-0.0", Some(Duration::ZERO)),
            (r#""-inf""#, Some(Duration::ZERO)),
            ("1e300", Some(Duration::MAX)),
            ("18446744073709551616", Some(Duration::MAX)),
            (r#""inf""#, Some(Duration::MAX)),
            (r#""NaN""#, None),
            (r#""soon""#, None),
            ("null", None),
            ("true", None),
            ("[3600]", None),
        ] {
            let body = format!(r#"{{"access_token":"a","token_type":"Bearer","expires_in":{value}}}"#);
            let fetched = success(&body).unwrap().fetched.unwrap();
            assert_eq!(fetched.lifetime, expected, "{value}");
        }
        let without = r#"{"access_token":"a","token_type":"Bearer"}"#;
        assert_eq!(success(without).unwrap().fetched.unwrap().lifetime, None);
    }

    /// K3: RFC 6749 section 5.1.
    #[test]
    fn required_fields_must_be_present() {
        for body in [
            "",
            "null",
            "[]",
            "<html>",
            r#"{"access_token":"a"}"#,
            r#"{"token_type":"Bearer"}"#,
            r#"{"access_token":1,"token_type":"Bearer"}"#,
            r#"{"access_token":"a","token_type":"Bearer"} more"#,
            r#"{"access_token":"a","access_token":"b","token_type":"Bearer"}"#,
        ] {
            let error = success(body).and_then(|granted| granted.fetched).err().unwrap();
            assert_eq!(error.0.detail, NOT_JSON, "{body}");
        }
        assert!(
            success("\u{feff}{\"access_token\":\"a\",\"token_type\":\"Bearer\"}").unwrap().fetched.is_ok()
        );
        assert!(success(r#"{"access_token":"a","token_type":"bEARER"}"#).unwrap().fetched.is_ok());
        let mac = success(r#"{"access_token":"a","token_type":"mac"}"#).unwrap();
        assert_eq!(mac.fetched.err().unwrap().0.detail, NOT_BEARER);
    }

    /// K2: also next to an unusable access token.
    #[test]
    fn refresh_token_is_always_kept() {
        for body in [
            r#"{"access_token":"not a token","token_type":"Bearer","refresh_token":"next"}"#,
            r#"{"access_token":"a","token_type":"N_A","refresh_token":"next"}"#,
            r#"{"access_token":"a","refresh_token":"next"}"#,
            r#"{"token_type":"Bearer","refresh_token":"next"}"#,
        ] {
            let granted = success(body).unwrap();
            assert!(granted.fetched.is_err());
            assert_eq!(granted.refresh_token.unwrap().expose_secret(), "next");
        }
        for none in ["null", r#""""#] {
            let body = format!(r#"{{"access_token":"a","token_type":"Bearer","refresh_token":{none}}}"#);
            assert!(success(&body).unwrap().refresh_token.is_none());
        }
    }

    /// K3: an error is permanent by its code, and only with a 4xx status.
    #[test]
    fn code_and_status_decide_permanence() {
        for (status, code, permanent) in [
            (400, "invalid_grant", true),
            (401, "invalid_client", true),
            (400, "invalid_client", true),
            (400, "unauthorized_client", true),
            (400, "invalid_scope", false),
            (400, "temporarily_unavailable", false),
            (503, "invalid_grant", false),
            (500, "", false),
        ] {
            let error = response(status, &format!(r#"{{"error":"{code}"}}"#)).err().unwrap();
            assert_eq!(error.is_permanent(), permanent, "{status} {code}");
        }
    }

    /// S2: the endpoint's text is shown without the secrets of the request.
    #[test]
    fn echoed_secrets_are_masked() {
        let body = r#"{"error":"invalid_grant","error_description":"What is the-secret?\nA line."}"#;
        let error = response(400, body).err().unwrap();
        assert_eq!(
            error.to_string(),
            "the token endpoint answered 400 invalid_grant: What is [redacted]? A line"
        );
        assert!(!format!("{error:?}").contains("the-secret"));
        let body = r#"{"access_token":"the-secret and more","token_type":"Bearer"}"#;
        let error = success(body).unwrap().fetched.err().unwrap();
        assert_eq!(
            error.to_string(),
            "the token endpoint answered 200: in `access_token`: JWT has white space at byte 10"
        );
    }

    proptest! {
        /// K3: no response makes the parser panic.
        #[test]
        fn arbitrary_responses_never_panic(status in 100u16..1000, body in "\\PC{0,60}|\\{\"access_token\":\"[ -~]{0,9}\",\"token_type\":\"Bearer\",\"expires_in\":[-+0-9eE.]{1,25}\\}") {
            match response(status, &body) {
                Ok(granted) => prop_assert!((200..300).contains(&status) || granted.fetched.is_err()),
                Err(error) => { let _ = SourceError::from(error); }
            }
        }
    }
}
