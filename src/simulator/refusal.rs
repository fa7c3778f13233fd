//! What the API answers when it refuses.

use std::time::Duration;

use http::{
    HeaderValue, StatusCode,
    header::{RETRY_AFTER, WWW_AUTHENTICATE},
};
use serde_json::Value;

use super::{
    SimulatorBody,
    api::Answer,
    quota::whole_seconds,
    replies::{answered, set},
};

#[derive(Clone, Copy, Debug)]
pub(super) struct Refusal {
    status: StatusCode,
    error_type: &'static str,
    code: &'static str,
    message: &'static str,
    /// `WWW-Authenticate`.
    challenge: Option<&'static str>,
}

// The three that SelamAPI's authentication page documents.
pub(super) const INVALID_API_KEY: Refusal = Refusal::new(
    StatusCode::UNAUTHORIZED,
    "authentication_error",
    "invalid_api_key",
    "Invalid API key provided.",
);
pub(super) const MISSING_API_KEY: Refusal =
    Refusal::new(StatusCode::UNAUTHORIZED, "authentication_error", "missing_api_key", "No API key provided.");
pub(super) const INSUFFICIENT_PERMISSIONS: Refusal = Refusal::new(
    StatusCode::FORBIDDEN,
    "authorization_error",
    "insufficient_permissions",
    "Your account does not have access to this feature.",
);

// What it answers to a bad JWT is not documented: as RFC 6750 section 3.1 has it.
pub(super) const INVALID_JWT: Refusal = Refusal {
    challenge: Some(r#"Bearer error="invalid_token", error_description="The token is not valid""#),
    ..Refusal::new(
        StatusCode::UNAUTHORIZED,
        "authentication_error",
        "invalid_token",
        "The token is not valid.",
    )
};
pub(super) const MISSING_JWT: Refusal = Refusal {
    challenge: Some("Bearer"),
    ..Refusal::new(
        StatusCode::UNAUTHORIZED,
        "authentication_error",
        "missing_token",
        "This feature needs a JWT.",
    )
};

pub(super) const DUPLICATE_HEADER: Refusal =
    Refusal::bad_request(StatusCode::BAD_REQUEST, "duplicate_header", "A header came more than once.");
pub(super) const BAD_JSON: Refusal =
    Refusal::bad_request(StatusCode::BAD_REQUEST, "invalid_json", "The body is not valid JSON.");
pub(super) const TOO_LARGE: Refusal =
    Refusal::bad_request(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", "The body is too large.");
pub(super) const NOT_FOUND: Refusal =
    Refusal::bad_request(StatusCode::NOT_FOUND, "not_found", "There is nothing at this path.");
pub(super) const METHOD_NOT_ALLOWED: Refusal = Refusal::bad_request(
    StatusCode::METHOD_NOT_ALLOWED,
    "method_not_allowed",
    "This path does not have that method.",
);
pub(super) const NO_WEBSOCKET: Refusal = Refusal::bad_request(
    StatusCode::UPGRADE_REQUIRED,
    "upgrade_required",
    "This path is for WebSocket connections.",
);

pub(super) const UNAVAILABLE: Refusal =
    Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", "unavailable", "Try again later.");
const RATE_LIMITED: Refusal = Refusal::new(
    StatusCode::TOO_MANY_REQUESTS,
    "rate_limit_error",
    "rate_limit_exceeded",
    "Rate limit exceeded.",
);

pub(super) fn rate_limited(retry_after: Duration) -> Answer {
    let mut answer = RATE_LIMITED.answer();
    set(answer.headers_mut(), &RETRY_AFTER, &whole_seconds(retry_after).to_string());
    answer
}

impl Refusal {
    const fn new(
        status: StatusCode,
        error_type: &'static str,
        code: &'static str,
        message: &'static str,
    ) -> Self {
        Self { status, error_type, code, message, challenge: None }
    }

    const fn bad_request(status: StatusCode, code: &'static str, message: &'static str) -> Self {
        Self::new(status, "invalid_request_error", code, message)
    }

    /// Laid out as on SelamAPI's authentication page.
    pub(super) fn answer(self) -> Answer {
        let [message, error_type, code] = [self.message, self.error_type, self.code].map(Value::from);
        let body = format!(
            "{{\n  \"error\": {{\n    \"message\": {message},\n    \"type\": {error_type},\n    \
             \"code\": {code}\n  }}\n}}"
        );
        let mut answer = answered(self.status, "application/json", SimulatorBody::whole(body));
        if let Some(challenge) = self.challenge {
            answer.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
        }
        answer
    }
}
