//! The error responses of the API and of the token endpoint.

use std::time::Duration;

use http::{
    HeaderValue, StatusCode,
    header::{RETRY_AFTER, WWW_AUTHENTICATE},
};
use serde_json::{Value, json};

use super::{
    SimulatorBody,
    api::Answer,
    quota::whole_seconds,
    replies::{answered, set, uncached_json},
};

#[derive(Clone, Copy, Debug)]
pub(super) struct Refusal {
    status: u16,
    format: Format,
    code: &'static str,
    message: &'static str,
    /// `WWW-Authenticate`.
    challenge: Option<&'static str>,
}

/// The layout of an error body.
#[derive(Clone, Copy, Debug)]
enum Format {
    /// That of SelamAPI's authentication page.
    Api,
    /// [RFC 6749 section 5.2](https://www.rfc-editor.org/rfc/rfc6749#section-5.2).
    OAuth,
    /// Engine.IO's, whose codes are numbers.
    EngineIo,
}

// The three errors that SelamAPI's authentication page documents.
pub(super) const INVALID_API_KEY: Refusal = Refusal::api(401, "invalid_api_key", "Invalid API key provided.");
pub(super) const MISSING_API_KEY: Refusal = Refusal::api(401, "missing_api_key", "No API key provided.");
pub(super) const INSUFFICIENT_PERMISSIONS: Refusal =
    Refusal::api(403, "insufficient_permissions", "Your account does not have access to this feature.");

// The response to a bad JWT is not documented; these follow RFC 6750 section 3.1.
pub(super) const INVALID_JWT: Refusal = Refusal::api(401, "invalid_token", "The token is not valid.")
    .with_challenge(r#"Bearer error="invalid_token", error_description="The token is not valid""#);
pub(super) const MISSING_JWT: Refusal =
    Refusal::api(401, "missing_token", "This feature needs a JWT.").with_challenge("Bearer");

pub(super) const DUPLICATE_HEADER: Refusal =
    Refusal::api(400, "duplicate_header", "A header came more than once.");
pub(super) const BAD_JSON: Refusal = Refusal::api(400, "invalid_json", "The body is not valid JSON.");
pub(super) const TOO_LARGE: Refusal = Refusal::api(413, "request_too_large", "The body is too large.");
pub(super) const NOT_FOUND: Refusal = Refusal::api(404, "not_found", "There is nothing at this path.");
pub(super) const METHOD_NOT_ALLOWED: Refusal =
    Refusal::api(405, "method_not_allowed", "This path does not have that method.");
pub(super) const NO_WEBSOCKET: Refusal =
    Refusal::api(426, "upgrade_required", "This path is for WebSocket connections.");

pub(super) const UNAVAILABLE: Refusal = Refusal::api(503, "unavailable", "Try again later.");
pub(super) const RATE_LIMITED: Refusal = Refusal::api(429, "rate_limit_exceeded", "Rate limit exceeded.");

// Those of the voice agent.
pub(super) const UNKNOWN_TRANSPORT: Refusal = Refusal::engine_io("0", "Transport unknown");
pub(super) const UNKNOWN_SESSION: Refusal = Refusal::engine_io("1", "Session ID unknown");
pub(super) const BAD_HANDSHAKE_METHOD: Refusal = Refusal::engine_io("2", "Bad handshake method");
pub(super) const BAD_REQUEST: Refusal = Refusal::engine_io("3", "Bad request");
pub(super) const UNSUPPORTED_PROTOCOL: Refusal = Refusal::engine_io("5", "Unsupported protocol version");

// Those of the token endpoint.
pub(super) const INVALID_CLIENT: Refusal =
    Refusal::oauth(401, "invalid_client", "The client is not authenticated.");

pub(super) const fn invalid_request(description: &'static str) -> Refusal {
    Refusal::oauth(400, "invalid_request", description)
}

pub(super) const fn invalid_grant(description: &'static str) -> Refusal {
    Refusal::oauth(400, "invalid_grant", description)
}

impl Refusal {
    const fn api(status: u16, code: &'static str, message: &'static str) -> Self {
        Self { status, format: Format::Api, code, message, challenge: None }
    }

    pub(super) const fn oauth(status: u16, code: &'static str, message: &'static str) -> Self {
        Self { status, format: Format::OAuth, code, message, challenge: None }
    }

    const fn engine_io(code: &'static str, message: &'static str) -> Self {
        Self { status: 400, format: Format::EngineIo, code, message, challenge: None }
    }

    pub(super) const fn with_challenge(self, challenge: &'static str) -> Self {
        Self { challenge: Some(challenge), ..self }
    }

    pub(super) fn answer(self) -> Answer {
        let error_type = self.error_type();
        let Self { status, format, code, message, challenge } = self;
        let status = StatusCode::from_u16(status).unwrap_or_default();
        let mut answer = match format {
            Format::Api => {
                // Byte for byte as documented, so not the compact form of `serde_json`.
                let [message, error_type, code] = [message, error_type, code].map(Value::from);
                let body = format!(
                    "{{\n  \"error\": {{\n    \"message\": {message},\n    \"type\": {error_type},\n    \
                     \"code\": {code}\n  }}\n}}"
                );
                answered(status, "application/json", SimulatorBody::whole(body))
            }
            Format::EngineIo => {
                let body = format!(r#"{{"code":{code},"message":"{message}"}}"#);
                answered(status, "application/json", SimulatorBody::whole(body))
            }
            Format::OAuth => uncached_json(status, &json!({ "error": code, "error_description": message })),
        };
        if let Some(challenge) = challenge {
            answer.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
        }
        answer
    }

    fn error_type(self) -> &'static str {
        match self.status {
            401 => "authentication_error",
            403 => "authorization_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// The data of a connect error of Socket.IO, whose `data` is what a middleware adds.
    pub(super) fn connect_error(self) -> Value {
        json!({ "message": self.message, "data": { "type": self.error_type(), "code": self.code } })
    }

    /// Adds `Retry-After` to the response.
    pub(super) fn answer_with_retry_after(self, wait: Duration) -> Answer {
        let mut answer = self.answer();
        set(answer.headers_mut(), &RETRY_AFTER, &whole_seconds(wait).to_string());
        answer
    }
}
