//! The error responses of the token endpoint:
//! [RFC 6749 section 5.2](https://www.rfc-editor.org/rfc/rfc6749#section-5.2).

use http::StatusCode;

use crate::simulator::refusal::Refusal;

pub(super) const INVALID_CLIENT: Refusal =
    Refusal::oauth(StatusCode::UNAUTHORIZED, "invalid_client", "The client is not authenticated.");
pub(super) const UNSUPPORTED_GRANT_TYPE: Refusal =
    Refusal::oauth(StatusCode::BAD_REQUEST, "unsupported_grant_type", "There is no such grant type.");

// The RFC defines no code for these.
pub(super) const METHOD_NOT_ALLOWED: Refusal =
    Refusal::oauth(StatusCode::METHOD_NOT_ALLOWED, "invalid_request", "Tokens are requested with POST.");
pub(super) const SERVER_ERROR: Refusal =
    Refusal::oauth(StatusCode::INTERNAL_SERVER_ERROR, "server_error", "Something went wrong.");
pub(super) const UNAVAILABLE: Refusal =
    Refusal::oauth(StatusCode::SERVICE_UNAVAILABLE, "temporarily_unavailable", "Try again later.");
pub(super) const RATE_LIMITED: Refusal =
    Refusal::oauth(StatusCode::TOO_MANY_REQUESTS, "rate_limit_exceeded", "Rate limit exceeded.");

pub(super) const fn invalid_request(description: &'static str) -> Refusal {
    Refusal::oauth(StatusCode::BAD_REQUEST, "invalid_request", description)
}

pub(super) const fn invalid_grant(description: &'static str) -> Refusal {
    Refusal::oauth(StatusCode::BAD_REQUEST, "invalid_grant", description)
}
