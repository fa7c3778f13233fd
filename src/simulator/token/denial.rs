//! What the token endpoint answers when it refuses:
//! [RFC 6749 section 5.2](https://www.rfc-editor.org/rfc/rfc6749#section-5.2).

use std::time::Duration;

use http::{
    HeaderValue, StatusCode,
    header::{CACHE_CONTROL, RETRY_AFTER, WWW_AUTHENTICATE},
};
use serde_json::{Value, json};

use crate::simulator::{
    SimulatorBody,
    api::Answer,
    quota::whole_seconds,
    replies::{answered, set},
};

#[derive(Clone, Copy, Debug)]
pub(super) struct Denial {
    status: StatusCode,
    error: &'static str,
    description: &'static str,
    /// `WWW-Authenticate`.
    challenge: Option<&'static str>,
}

pub(super) const INVALID_CLIENT: Denial =
    Denial::new(StatusCode::UNAUTHORIZED, "invalid_client", "The client is not authenticated.");
pub(super) const UNSUPPORTED_GRANT_TYPE: Denial =
    Denial::new(StatusCode::BAD_REQUEST, "unsupported_grant_type", "There is no such grant type.");

// Those that the RFC has no code for.
pub(super) const METHOD_NOT_ALLOWED: Denial =
    Denial::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request", "Tokens are asked for with POST.");
pub(super) const SERVER_ERROR: Denial =
    Denial::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", "Something went wrong.");
pub(super) const UNAVAILABLE: Denial =
    Denial::new(StatusCode::SERVICE_UNAVAILABLE, "temporarily_unavailable", "Try again later.");
const RATE_LIMITED: Denial =
    Denial::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_exceeded", "Rate limit exceeded.");

pub(super) fn rate_limited(retry_after: Duration) -> Answer {
    let mut answer = RATE_LIMITED.answer();
    set(answer.headers_mut(), &RETRY_AFTER, &whole_seconds(retry_after).to_string());
    answer
}

impl Denial {
    const fn new(status: StatusCode, error: &'static str, description: &'static str) -> Self {
        Self { status, error, description, challenge: None }
    }

    pub(super) const fn invalid_request(description: &'static str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request", description)
    }

    pub(super) const fn invalid_grant(description: &'static str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_grant", description)
    }

    pub(super) const fn with_challenge(self, challenge: &'static str) -> Self {
        Self { challenge: Some(challenge), ..self }
    }

    pub(super) fn answer(self) -> Answer {
        let body = json!({ "error": self.error, "error_description": self.description });
        let mut answer = unstored(self.status, &body);
        if let Some(challenge) = self.challenge {
            answer.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
        }
        answer
    }
}

/// JSON that no cache may keep.
pub(super) fn unstored(status: StatusCode, body: &Value) -> Answer {
    let mut answer = answered(status, "application/json", SimulatorBody::whole(body.to_string()));
    answer.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}
