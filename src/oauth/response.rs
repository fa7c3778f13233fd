//! Parses the responses of a token endpoint (RFC 6749 sections 5.1 and 5.2), and [`OAuthError`].

use std::{borrow::Cow, error::Error as StdError, fmt, time::Duration};

use http::StatusCode;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use zeroize::Zeroizing;

use super::{RefreshToken, client::TokenResponse};
use crate::{
    credential::Token,
    error::{ErrorBody, Redactor, is_code, retry_after, write_excerpt},
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

    /// Returns whether a retry with the same credentials cannot help: the code is one of those in the
    /// [module docs](super#errors), and the status is neither 408, 429 nor 5xx.
    #[must_use]
    pub fn is_permanent(&self) -> bool {
        self.culprit().is_some()
    }

    /// Returns what the code blames. The status counts more: with 408, 429 and 5xx the endpoint blames itself.
    fn culprit(&self) -> Option<Culprit> {
        let Inner { status, fields, .. } = &*self.0;
        if status.is_server_error()
            || matches!(*status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS)
        {
            return None;
        }
        // Some issuers send the code as the message.
        let texts = [fields.code(), fields.error_type(), fields.message()];
        texts.into_iter().flatten().find_map(Culprit::of)
    }

    /// Returns the endpoint's answer, if it caused the source's failure.
    pub(super) fn of(error: &SourceError) -> Option<&Self> {
        error.cause().downcast_ref()
    }

    /// Returns whether the endpoint rejected the client authentication, rather than the grant.
    pub(super) fn blames_client(&self) -> bool {
        self.culprit() == Some(Culprit::Client)
            || (self.0.status == StatusCode::UNAUTHORIZED && !self.blames_grant())
    }

    /// Returns whether the endpoint rejected a token in the request
    /// ([RFC 6749 section 5.2](https://www.rfc-editor.org/rfc/rfc6749#section-5.2)).
    pub(super) fn blames_grant(&self) -> bool {
        self.culprit() == Some(Culprit::Grant)
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

/// What has to change before another attempt can succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Culprit {
    /// The client's id, secret or permissions.
    Client,
    /// The token or assertion that was presented.
    Grant,
    /// The user, who has to log in, consent or do what else the issuer asks for.
    User,
}

/// The permanent codes; any other is transient. Sorted by who has to act, then by where the code comes from.
///
/// `invalid_scope`, `invalid_target`, `unsupported_grant_type` and `invalid_request` are not among them: they may be cured
/// by a change of the issuer's configuration, which nothing here would notice.
const PERMANENT: [(Culprit, &[&str]); 3] = [
    (
        Culprit::Client,
        &[
            // RFC 6749 section 5.2.
            "invalid_client",
            "unauthorized_client",
            // Google.
            "deleted_client",
            "disabled_client",
            // GitHub.
            "incorrect_client_credentials",
            "application_suspended",
            // Salesforce, Slack.
            "invalid_client_id",
            "invalid_client_credentials",
            "bad_client_secret",
        ],
    ),
    (
        Culprit::Grant,
        &[
            // RFC 6749 section 5.2, RFC 6750 section 3.1 (UAA and Spring use it for refresh tokens), RFC 8628 section 3.5.
            "invalid_grant",
            "invalid_token",
            "expired_token",
            // GitHub, HubSpot, Firebase, Slack.
            "bad_refresh_token",
            "bad_verification_code",
            "invalid_refresh_token",
            "token_expired",
            "token_revoked",
            // Supabase.
            "refresh_token_not_found",
            "refresh_token_already_used",
            "session_not_found",
            "session_expired",
            "invalid_credentials",
            // Salesforce, AWS.
            "invalid_session_id",
            "not_authorized",
        ],
    ),
    (
        Culprit::User,
        &[
            // RFC 6749 section 4.1.2.1, RFC 9470 section 3.
            "access_denied",
            "insufficient_user_authentication",
            // OpenID Connect Core section 3.1.2.6, and Unmet Authentication Requirements.
            "interaction_required",
            "login_required",
            "consent_required",
            "account_selection_required",
            "unmet_authentication_requirements",
            // MFA: Auth0, Okta, Ping, Supabase.
            "mfa_required",
            "mfa_registration_required",
            "mfa_enrollment_required",
            "mfa_enroll",
            "mfa_challenge_required",
            "insufficient_aal",
            "reauthentication_needed",
            "requires_verification",
            // Google.
            "admin_policy_enforced",
            "org_internal",
            "invalid_rapt",
            "rapt_required",
            // The account: Salesforce, Firebase, Supabase, GitHub, Keycloak, AWS.
            "inactive_user",
            "inactive_org",
            "user_disabled",
            "user_not_found",
            "user_banned",
            "user_not_confirmed",
            "account_disabled",
            "email_not_confirmed",
            "unverified_user_email",
            "password_expired",
            "password_reset_required",
            "password_change_required",
        ],
    ),
];

impl Culprit {
    /// Looks the code up in whatever spelling the issuer uses: `invalid_grant`, `INVALID-GRANT`, `InvalidGrantException`.
    fn of(code: &str) -> Option<Self> {
        let code = code.strip_suffix("Exception").unwrap_or(code);
        let letters = |code: &'_ str| {
            let letters: Vec<u8> = code.bytes().filter(|byte| !b"_-.".contains(byte)).collect();
            letters.to_ascii_lowercase()
        };
        let code = letters(code);
        let (culprit, _) =
            PERMANENT.iter().find(|(_, codes)| codes.iter().any(|known| letters(known) == code))?;
        Some(*culprit)
    }
}

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
    let mut secrets: Vec<&str> = secrets.into_iter().collect();
    if !response.status.is_success() {
        return Err(refusal(response, &secrets, ""));
    }
    let body = response.body.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&response.body);
    let Ok(Success { access_token, token_type, expires_in, refresh_token }) = serde_json::from_slice(body)
    else {
        return Err(refusal(response, &secrets, NOT_JSON));
    };
    let access_token = access_token.filter(|token| !token.is_empty());
    let fetched = match (access_token, token_type) {
        // Some issuers answer an error with 200.
        (None, _) => {
            secrets.extend(refresh_token.as_deref().map(String::as_str));
            Err(refusal(response, &secrets, NOT_JSON))
        }
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
    match (fetched, refresh_token.and_then(RefreshToken::received)) {
        (Err(error), None) => Err(error),
        (fetched, refresh_token) => Ok(Granted { fetched, refresh_token }),
    }
}

/// Reads the error in a response. Without any, the error says `otherwise`.
fn refusal(response: &TokenResponse, secrets: &[&str], otherwise: &'static str) -> OAuthError {
    let redactor = Redactor::masking(secrets.iter().copied());
    let fields = match ErrorBody::read(&response.body, &redactor) {
        none if none == ErrorBody::default() => {
            ErrorBody::from_json(&plain(&response.body)).redacted(&redactor)
        }
        fields => fields,
    };
    let detail = if fields.code().is_some() || fields.message().is_some() { "" } else { otherwise };
    OAuthError::with_fields(response, detail, fields)
}

/// Reads an error that is not JSON: a form, or nothing but a code.
fn plain(body: &[u8]) -> Value {
    let text = String::from_utf8_lossy(body);
    let text = text.trim();
    if is_code(text) && text.contains('_') {
        return json!({ "error": text });
    }
    // A page may contain an `error=` too, among much that no form contains.
    if text.contains(|letter: char| letter.is_whitespace() || letter == '<') {
        return Value::Null;
    }
    let form = form_urlencoded::parse(text.as_bytes());
    let fields = form.map(|(name, value)| (name.into_owned(), value.into_owned().into()));
    Value::Object(fields.collect::<Map<_, _>>())
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
        let mac = success(r#"{"access_token":"a","token_type":"mac"}"#).err().unwrap();
        assert_eq!(mac.0.detail, NOT_BEARER);
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

    /// An answer of a token endpoint, its code, and what it blames.
    #[derive(Deserialize)]
    struct Seen {
        issuer: String,
        status: u16,
        body: String,
        code: String,
        blames: String,
    }

    /// K7: answers of issuers in use.
    #[test]
    fn answers_of_known_issuers_are_read() {
        let seen: Vec<Seen> = serde_json::from_str(include_str!("../../tests/token-errors.json")).unwrap();
        assert!(seen.len() > 70);
        for Seen { issuer, status, body, code, blames } in seen {
            let error = response(status, &body).err().unwrap();
            assert_eq!(error.code().unwrap_or_default(), code, "{issuer}: {body}");
            let culprit = error.culprit();
            assert_eq!(
                culprit.map_or("transient".into(), |culprit| format!("{culprit:?}")),
                blames,
                "{issuer}: {body}"
            );
            assert_eq!(error.is_permanent(), culprit.is_some());
            // What the endpoint says comes before what we miss.
            let told = error.code().is_some() || error.description().is_some();
            assert_eq!(error.0.detail == NOT_JSON, status == 200 && !told, "{issuer}: {body}");
        }
    }

    /// K7: what a response says of an error does not matter next to a token.
    #[test]
    fn a_token_outweighs_an_error_field() {
        for extra in
            [r#""error":null"#, r#""error":"""#, r#""error":false"#, r#""error":"none","message":"ok""#]
        {
            let body = format!(r#"{{"access_token":"a","token_type":"Bearer",{extra}}}"#);
            assert!(success(&body).unwrap().fetched.is_ok(), "{body}");
        }
        let error =
            success(r#"{"access_token":"","token_type":"Bearer","error":"invalid_grant"}"#).err().unwrap();
        assert_eq!(error.code(), Some("invalid_grant"));
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
        let error = success(body).err().unwrap();
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

        /// K7: no error shows what was sent, nor the tokens of the response, wherever they are echoed.
        #[test]
        fn arbitrary_errors_show_no_secret(
            status in prop::sample::select(vec![200u16, 201, 204, 400, 401, 403, 418, 429, 500, 503]),
            name in "error|errors|detail|message|msg|code|error_code|error_description|status|type|__type|x",
            inner in "error|code|msg|message|x",
            shape in 0..7,
            before in "[a-z {\\[\":=&]{0,6}",
            bytes in prop::collection::vec(any::<u8>(), 0..60),
        ) {
            const NEXT: &str = "next-refresh-token-0123456789";
            let echoed = json!(format!("{before}the-secret {NEXT}"));
            let value = match shape {
                0 => json!({ &name: echoed, "refresh_token": NEXT }),
                1 => json!({ &name: { &inner: echoed }, "refresh_token": NEXT }),
                2 => json!({ &name: [{ &inner: echoed }], "refresh_token": NEXT }),
                3 => json!({ &name: json!({ &inner: echoed }).to_string(), "refresh_token": NEXT }),
                4 => json!({ &name: [echoed], "refresh_token": NEXT }),
                _ => Value::Null,
            };
            let body = match shape {
                5 => format!("{name}={before}the-secret&{inner}=the-secret").into_bytes(),
                6 => bytes,
                _ => value.to_string().into_bytes(),
            };
            let status = StatusCode::from_u16(status).unwrap();
            let response = TokenResponse { status, headers: HeaderMap::new(), body: Zeroizing::new(body) };
            let result = read(&response, ["the-secret"]);
            if let Err(error) = result.and_then(|granted| granted.fetched) {
                let shown = format!("{error} {error:?} {:?} {:?}", error.code(), error.description());
                prop_assert!(!shown.contains("the-secret"), "{}", shown);
                prop_assert!(!status.is_success() || !shown.contains(NEXT), "{}", shown);
            }
        }
    }
}
