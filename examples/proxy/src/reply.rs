//! The proxy's own error responses, in the shape of SelamAPI's errors, so that a caller's client can parse both: [`Refusal`].
//!
//! ```json
//! {"error":{"message":"…","type":"authentication_error","code":"invalid_api_key"}}
//! ```

use std::time::Duration;

use axum::{
    body::Body,
    http::{
        HeaderName, HeaderValue, StatusCode,
        header::{ALLOW, CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE},
    },
    response::{IntoResponse, Response},
};
use tower_selam::verify::VerifyError;

/// Why the proxy answers instead of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The request has no token.
    MissingToken,
    /// The token is not in the file.
    InvalidToken,
    /// A web page sent the request that `--allow-origin` does not list.
    OriginNotAllowed,
    /// The JWT is not valid.
    InvalidJwt(VerifyError),
    /// The JWT has expired.
    ExpiredJwt,
    /// The JWT lacks a claim that this proxy demands.
    NotPermitted,
    /// The keys that verify JWTs cannot be fetched now. With the time after which to retry.
    IdentityUnavailable(Duration),
    /// Without client tokens: a web page sent the request, or the user followed a link on one.
    ForeignOrigin,
    /// Without client tokens: the request names another host than this machine.
    ForeignHost,
    /// Without client tokens: the request passed through a reverse proxy or a tunnel.
    Forwarded,
    /// No `--allow` covers the method and path.
    NotAllowed,
    /// The path is not below `/v1`.
    NotFound,
    /// `/healthz` or `/metrics` with another method than `GET` or `HEAD`.
    WrongMethod,
    /// The path is ambiguous.
    BadPath,
    /// The header fields are too long, or too many.
    LargeHeaders,
    /// The request cannot be forwarded.
    BadRequest,
    /// The request has already passed through this proxy.
    Loop,
    /// The API does not respond.
    NoUpstream,
    /// The headers of the API's response are too large.
    LargeResponse,
    /// Voice agent: not a request of Engine.IO 4.
    BadVoiceRequest,
    /// Voice agent: the session is not open here, or another caller's.
    UnknownSession,
    /// Voice agent: a packet that no client sends.
    BadPacket,
    /// Voice agent: a packet of another namespace.
    OtherNamespace,
    /// Voice agent: the body is too long.
    LargePacket,
    /// No key or JWT is available. With the time after which to retry, if known.
    NoCredential(Option<Duration>),
}

/// The `Retry-After` of a 503 when the time is unknown.
const DEFAULT_RETRY_AFTER: Duration = Duration::from_secs(30);

impl Refusal {
    /// The name in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::MissingToken => "missing_token",
            Self::InvalidToken => "invalid_token",
            Self::OriginNotAllowed => "origin_not_allowed",
            Self::InvalidJwt(_) => "invalid_jwt",
            Self::ExpiredJwt => "expired_jwt",
            Self::NotPermitted => "missing_claim",
            Self::IdentityUnavailable(_) => "identity_unavailable",
            Self::ForeignOrigin => "foreign_origin",
            Self::ForeignHost => "foreign_host",
            Self::Forwarded => "forwarded",
            Self::NotAllowed => "not_allowed",
            Self::NotFound => "not_found",
            Self::WrongMethod => "wrong_method",
            Self::BadPath => "bad_path",
            Self::LargeHeaders => "large_headers",
            Self::BadRequest => "bad_request",
            Self::Loop => "loop",
            Self::NoUpstream => "no_upstream",
            Self::LargeResponse => "large_response",
            Self::BadVoiceRequest => "bad_voice_request",
            Self::UnknownSession => "unknown_session",
            Self::BadPacket => "bad_packet",
            Self::OtherNamespace => "other_namespace",
            Self::LargePacket => "large_packet",
            Self::NoCredential(_) => "no_credential",
        }
    }

    /// Whether another token of the request may say more about why it is refused.
    pub fn says_little(self) -> bool {
        matches!(self, Self::MissingToken | Self::InvalidToken | Self::InvalidJwt(VerifyError::Malformed))
    }

    /// What is wrong with a JWT, for the log.
    pub fn why(self) -> Option<VerifyError> {
        match self {
            Self::InvalidJwt(why) => Some(why),
            _ => None,
        }
    }

    /// Status, and the error's `type`, `code` and `message`.
    fn parts(self) -> (StatusCode, &'static str, &'static str, &'static str) {
        match self {
            Self::MissingToken => (
                StatusCode::UNAUTHORIZED,
                "authentication_error",
                "missing_api_key",
                "No API key provided. Send your client token for this proxy as `Authorization: Bearer`.",
            ),
            Self::InvalidToken => (
                StatusCode::UNAUTHORIZED,
                "authentication_error",
                "invalid_api_key",
                "Invalid API key provided. Ask the operator of this proxy for a client token.",
            ),
            Self::OriginNotAllowed => (
                StatusCode::FORBIDDEN,
                "authorization_error",
                "origin_not_allowed",
                "This proxy does not serve pages of this origin. Start it with --allow-origin ORIGIN to list one more.",
            ),
            Self::InvalidJwt(_) => (
                StatusCode::UNAUTHORIZED,
                "authentication_error",
                "invalid_token",
                "The token is not valid for this service. Log in again.",
            ),
            Self::ExpiredJwt => (
                StatusCode::UNAUTHORIZED,
                "authentication_error",
                "token_expired",
                "The token has expired. Refresh it, or log in again.",
            ),
            Self::NotPermitted => (
                StatusCode::FORBIDDEN,
                "authorization_error",
                "insufficient_permissions",
                "Your account does not have access to this service.",
            ),
            Self::IdentityUnavailable(_) => (
                StatusCode::SERVICE_UNAVAILABLE,
                "api_error",
                "identity_unavailable",
                "Logins cannot be verified at the moment. Retry later.",
            ),
            Self::ForeignOrigin => (
                StatusCode::FORBIDDEN,
                "authorization_error",
                "insufficient_permissions",
                "Without client tokens, this proxy does not serve web pages on other machines or ports. Start it with --allow-origin ORIGIN to list one, or with --client-token-file.",
            ),
            Self::ForeignHost => (
                StatusCode::FORBIDDEN,
                "authorization_error",
                "insufficient_permissions",
                "Without client tokens, this proxy must be called as localhost, 127.0.0.1 or [::1]. Start it with --client-token-file for other names.",
            ),
            Self::Forwarded => (
                StatusCode::FORBIDDEN,
                "authorization_error",
                "insufficient_permissions",
                "Requests through a reverse proxy, a load balancer or a tunnel require a client token. Start the proxy with --client-token-file.",
            ),
            Self::NotAllowed => (
                StatusCode::FORBIDDEN,
                "authorization_error",
                "insufficient_permissions",
                "This proxy does not allow this method and path.",
            ),
            Self::NotFound => (
                StatusCode::NOT_FOUND,
                "invalid_request_error",
                "not_found",
                "No such path. The API is below /v1.",
            ),
            Self::WrongMethod => (
                StatusCode::METHOD_NOT_ALLOWED,
                "invalid_request_error",
                "method_not_allowed",
                "Method not allowed. Use GET.",
            ),
            Self::BadPath => (
                StatusCode::BAD_REQUEST,
                "invalid_request_error",
                "invalid_path",
                "The path is ambiguous: remove dot segments and empty segments, and percent-encode only characters that need it.",
            ),
            Self::LargeHeaders => (
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                "invalid_request_error",
                "headers_too_large",
                "The request has more than 64 KiB of headers, or more than 1024 of them.",
            ),
            Self::BadRequest => (
                StatusCode::BAD_REQUEST,
                "invalid_request_error",
                "invalid_request",
                "The request cannot be forwarded: its body is incomplete, its URI is too long, its method is not supported, or its Host header is missing, repeated or differs from the URI.",
            ),
            Self::Loop => (
                StatusCode::LOOP_DETECTED,
                "api_error",
                "loop_detected",
                "The base URL of this proxy points back to the proxy.",
            ),
            Self::NoUpstream => (
                StatusCode::BAD_GATEWAY,
                "api_error",
                "upstream_unavailable",
                "The API did not respond to the proxy.",
            ),
            Self::LargeResponse => (
                StatusCode::BAD_GATEWAY,
                "api_error",
                "response_headers_too_large",
                "The headers of the API's response exceed 64 KiB, or 1,024 fields.",
            ),
            Self::BadVoiceRequest => (
                StatusCode::BAD_REQUEST,
                "invalid_request_error",
                "invalid_request",
                "The voice agent is called by a Socket.IO client of version 3 or later: EIO=4, transport=polling or websocket.",
            ),
            Self::UnknownSession => (
                StatusCode::BAD_REQUEST,
                "invalid_request_error",
                "unknown_session",
                "No such session of this caller. Connect again.",
            ),
            Self::BadPacket => (
                StatusCode::BAD_REQUEST,
                "invalid_request_error",
                "invalid_packet",
                "The body is not a sequence of Engine.IO packets.",
            ),
            Self::OtherNamespace => (
                StatusCode::FORBIDDEN,
                "authorization_error",
                "insufficient_permissions",
                "This proxy allows the namespace /v1/audio/agent only.",
            ),
            Self::LargePacket => (
                StatusCode::PAYLOAD_TOO_LARGE,
                "invalid_request_error",
                "request_too_large",
                "Packets of the voice agent may take 1 MiB.",
            ),
            Self::NoCredential(_) => (
                StatusCode::SERVICE_UNAVAILABLE,
                "api_error",
                "credential_unavailable",
                "The proxy currently has no valid credential for the API. Retry later.",
            ),
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let (status, kind, code, message) = self.parts();
        // None of these contains a character that JSON escapes.
        let body = format!(r#"{{"error":{{"message":"{message}","type":"{kind}","code":"{code}"}}}}"#);
        let length = HeaderValue::from(body.len());
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = status;
        let mut header = |name: HeaderName, value| response.headers_mut().insert(name, value);
        header(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        header(CONTENT_LENGTH, length);
        match self {
            Self::MissingToken => {
                header(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            // RFC 6750 section 3.1.
            Self::InvalidToken | Self::InvalidJwt(_) => {
                header(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer error=\"invalid_token\""));
            }
            Self::ExpiredJwt => {
                let challenge =
                    "Bearer error=\"invalid_token\", error_description=\"The access token expired\"";
                header(WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
            }
            Self::NotPermitted => {
                header(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer error=\"insufficient_scope\""));
            }
            Self::WrongMethod => {
                header(ALLOW, HeaderValue::from_static("GET, HEAD"));
            }
            Self::NoCredential(wait) => {
                header(RETRY_AFTER, seconds(wait.unwrap_or(DEFAULT_RETRY_AFTER)));
            }
            Self::IdentityUnavailable(wait) => {
                header(RETRY_AFTER, seconds(wait));
            }
            _ => {}
        }
        response.extensions_mut().insert(self);
        response
    }
}

/// Rounds up, to one second at least.
fn seconds(wait: Duration) -> HeaderValue {
    let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
    HeaderValue::from(seconds.max(1))
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[tokio::test]
    async fn refusals_have_the_shape_of_api_errors() {
        for (refusal, status, kind, code) in [
            (Refusal::MissingToken, 401, "authentication_error", "missing_api_key"),
            (Refusal::InvalidToken, 401, "authentication_error", "invalid_api_key"),
            (Refusal::OriginNotAllowed, 403, "authorization_error", "origin_not_allowed"),
            (Refusal::InvalidJwt(VerifyError::Signature), 401, "authentication_error", "invalid_token"),
            (Refusal::ExpiredJwt, 401, "authentication_error", "token_expired"),
            (Refusal::NotPermitted, 403, "authorization_error", "insufficient_permissions"),
            (Refusal::IdentityUnavailable(Duration::ZERO), 503, "api_error", "identity_unavailable"),
            (Refusal::ForeignOrigin, 403, "authorization_error", "insufficient_permissions"),
            (Refusal::ForeignHost, 403, "authorization_error", "insufficient_permissions"),
            (Refusal::Forwarded, 403, "authorization_error", "insufficient_permissions"),
            (Refusal::NotAllowed, 403, "authorization_error", "insufficient_permissions"),
            (Refusal::NotFound, 404, "invalid_request_error", "not_found"),
            (Refusal::WrongMethod, 405, "invalid_request_error", "method_not_allowed"),
            (Refusal::BadPath, 400, "invalid_request_error", "invalid_path"),
            (Refusal::LargeHeaders, 431, "invalid_request_error", "headers_too_large"),
            (Refusal::BadRequest, 400, "invalid_request_error", "invalid_request"),
            (Refusal::Loop, 508, "api_error", "loop_detected"),
            (Refusal::NoUpstream, 502, "api_error", "upstream_unavailable"),
            (Refusal::LargeResponse, 502, "api_error", "response_headers_too_large"),
            (Refusal::BadVoiceRequest, 400, "invalid_request_error", "invalid_request"),
            (Refusal::UnknownSession, 400, "invalid_request_error", "unknown_session"),
            (Refusal::BadPacket, 400, "invalid_request_error", "invalid_packet"),
            (Refusal::OtherNamespace, 403, "authorization_error", "insufficient_permissions"),
            (Refusal::LargePacket, 413, "invalid_request_error", "request_too_large"),
            (Refusal::NoCredential(None), 503, "api_error", "credential_unavailable"),
        ] {
            let response = refusal.into_response();
            assert_eq!(response.status(), status, "{refusal:?}");
            assert_eq!(response.headers()[CONTENT_TYPE], "application/json");
            let challenges = status == 401 || refusal == Refusal::NotPermitted;
            assert_eq!(response.headers().contains_key(WWW_AUTHENTICATE), challenges, "{refusal:?}");
            let body = axum::body::to_bytes(response.into_body(), 4096).await.unwrap();
            let body: Value = serde_json::from_slice(&body).unwrap();
            let error = body["error"].as_object().unwrap();
            assert_eq!((&error["type"], &error["code"]), (&kind.into(), &code.into()));
            assert!(error["message"].as_str().unwrap().ends_with('.'));
        }
    }

    #[test]
    fn challenges_say_what_is_wrong_with_a_token() {
        for (refusal, expected) in [
            (Refusal::MissingToken, "Bearer"),
            (Refusal::InvalidToken, "Bearer error=\"invalid_token\""),
            (Refusal::InvalidJwt(VerifyError::Audience), "Bearer error=\"invalid_token\""),
            (
                Refusal::ExpiredJwt,
                "Bearer error=\"invalid_token\", error_description=\"The access token expired\"",
            ),
            (Refusal::NotPermitted, "Bearer error=\"insufficient_scope\""),
        ] {
            assert_eq!(refusal.into_response().headers()[WWW_AUTHENTICATE], expected);
        }
        let response = Refusal::IdentityUnavailable(Duration::from_millis(2500)).into_response();
        assert_eq!(response.headers()[RETRY_AFTER], "3");
    }

    #[test]
    fn retry_after_is_rounded_up_to_seconds() {
        for (wait, expected) in [
            (None, "30"),
            (Some(Duration::from_millis(1200)), "2"),
            (Some(Duration::from_millis(3)), "1"),
            (Some(Duration::ZERO), "1"),
        ] {
            let response = Refusal::NoCredential(wait).into_response();
            assert_eq!(response.headers()[RETRY_AFTER], expected, "{wait:?}");
        }
    }
}
