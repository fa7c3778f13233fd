//! What the proxy answers itself: errors in the form of SelamAPI's, so that a caller's client reads them as it reads those.
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
/// Why the proxy answers instead of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The caller has no token.
    MissingToken,
    /// The caller has one that nobody was given.
    InvalidToken,
    /// A web page of another machine, while there are no tokens.
    ForeignOrigin,
    /// No `--allow` says so.
    NotAllowed,
    /// Not below `/v1`.
    NotFound,
    /// Neither `/healthz` nor `/metrics` is called so.
    WrongMethod,
    /// A path that could be read in another way.
    BadPath,
    /// A request that cannot be sent on.
    BadRequest,
    /// The request went through this proxy before.
    Loop,
    /// The API does not answer.
    NoUpstream,
    /// There is no key or JWT to send; perhaps there is one later.
    NoCredential(Option<Duration>),
}

/// When nobody knows how long it takes to mend a credential.
const LATER: Duration = Duration::from_secs(30);

impl Refusal {
    /// Its name in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::MissingToken => "missing_token",
            Self::InvalidToken => "invalid_token",
            Self::ForeignOrigin => "foreign_origin",
            Self::NotAllowed => "not_allowed",
            Self::NotFound => "not_found",
            Self::WrongMethod => "wrong_method",
            Self::BadPath => "bad_path",
            Self::BadRequest => "bad_request",
            Self::Loop => "loop",
            Self::NoUpstream => "no_upstream",
            Self::NoCredential(_) => "no_credential",
        }
    }

    fn said(self) -> (StatusCode, &'static str, &'static str, &'static str) {
        match self {
            Self::MissingToken => (
                StatusCode::UNAUTHORIZED,
                "authentication_error",
                "missing_api_key",
                "No API key provided. Send the token that this proxy's operator gave you, as `Authorization: Bearer`.",
            ),
            Self::InvalidToken => (
                StatusCode::UNAUTHORIZED,
                "authentication_error",
                "invalid_api_key",
                "Invalid API key provided. It is not a token that this proxy knows.",
            ),
            Self::ForeignOrigin => (
                StatusCode::FORBIDDEN,
                "authorization_error",
                "insufficient_permissions",
                "Without client tokens, this proxy serves no web pages but those of its own machine.",
            ),
            Self::NotAllowed => (
                StatusCode::FORBIDDEN,
                "authorization_error",
                "insufficient_permissions",
                "This proxy does not let you call this method and path.",
            ),
            Self::NotFound => (
                StatusCode::NOT_FOUND,
                "invalid_request_error",
                "not_found",
                "There is nothing here. The API is below /v1.",
            ),
            Self::WrongMethod => (
                StatusCode::METHOD_NOT_ALLOWED,
                "invalid_request_error",
                "method_not_allowed",
                "This is to be read by GET.",
            ),
            Self::BadPath => (
                StatusCode::BAD_REQUEST,
                "invalid_request_error",
                "invalid_path",
                "The path has dot segments, empty segments, or characters that are encoded without need or not at all.",
            ),
            Self::BadRequest => (
                StatusCode::BAD_REQUEST,
                "invalid_request_error",
                "invalid_request",
                "The request cannot be sent on: it is broken off, too long, or no request of its kind.",
            ),
            Self::Loop => (
                StatusCode::LOOP_DETECTED,
                "api_error",
                "loop_detected",
                "The proxy's base URL leads back to the proxy.",
            ),
            Self::NoUpstream => (
                StatusCode::BAD_GATEWAY,
                "api_error",
                "upstream_unavailable",
                "The API does not answer the proxy.",
            ),
            Self::NoCredential(_) => (
                StatusCode::SERVICE_UNAVAILABLE,
                "api_error",
                "credential_unavailable",
                "The proxy has no valid credential for the API at present.",
            ),
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let (status, kind, code, message) = self.said();
        // None of the three has a character that JSON escapes.
        let body = format!(r#"{{"error":{{"message":"{message}","type":"{kind}","code":"{code}"}}}}"#);
        let length = HeaderValue::from(body.len());
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = status;
        let mut header = |name: HeaderName, value| response.headers_mut().insert(name, value);
        header(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        header(CONTENT_LENGTH, length);
        match self {
            Self::MissingToken | Self::InvalidToken => {
                header(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            Self::WrongMethod => {
                header(ALLOW, HeaderValue::from_static("GET, HEAD"));
            }
            Self::NoCredential(wait) => {
                let wait = wait.unwrap_or(LATER);
                let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
                header(RETRY_AFTER, HeaderValue::from(seconds.max(1)));
            }
            _ => {}
        }
        response.extensions_mut().insert(self);
        response
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[tokio::test]
    async fn every_answer_has_the_shape_of_the_apis_errors() {
        for (refusal, status, kind, code) in [
            (Refusal::MissingToken, 401, "authentication_error", "missing_api_key"),
            (Refusal::InvalidToken, 401, "authentication_error", "invalid_api_key"),
            (Refusal::ForeignOrigin, 403, "authorization_error", "insufficient_permissions"),
            (Refusal::NotAllowed, 403, "authorization_error", "insufficient_permissions"),
            (Refusal::NotFound, 404, "invalid_request_error", "not_found"),
            (Refusal::WrongMethod, 405, "invalid_request_error", "method_not_allowed"),
            (Refusal::BadPath, 400, "invalid_request_error", "invalid_path"),
            (Refusal::BadRequest, 400, "invalid_request_error", "invalid_request"),
            (Refusal::Loop, 508, "api_error", "loop_detected"),
            (Refusal::NoUpstream, 502, "api_error", "upstream_unavailable"),
            (Refusal::NoCredential(None), 503, "api_error", "credential_unavailable"),
        ] {
            let response = refusal.into_response();
            assert_eq!(response.status(), status, "{refusal:?}");
            assert_eq!(response.headers()[CONTENT_TYPE], "application/json");
            assert_eq!(response.headers().contains_key(WWW_AUTHENTICATE), status == 401);
            let body = axum::body::to_bytes(response.into_body(), 4096).await.unwrap();
            let body: Value = serde_json::from_slice(&body).unwrap();
            let error = body["error"].as_object().unwrap();
            assert_eq!((&error["type"], &error["code"]), (&kind.into(), &code.into()));
            assert!(error["message"].as_str().unwrap().ends_with('.'));
        }
    }

    #[test]
    fn a_503_says_when_to_come_back_in_whole_seconds() {
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
