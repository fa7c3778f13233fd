//! The grants of the token endpoint: [RFC 6749 section
//! 5.1](https://www.rfc-editor.org/rfc/rfc6749#section-5.1).

use std::time::{Duration, UNIX_EPOCH};

use http::HeaderMap;
use serde_json::{Value, json};

use super::request::{Caller, Form, authenticate};
use crate::simulator::{
    State,
    jwt::{JwtAlgorithm, SUBJECT},
    refusal::{INVALID_CLIENT, Refusal, invalid_grant},
};

const TOKEN_EXCHANGE: &str = "urn:ietf:params:oauth:grant-type:token-exchange";
const JWT_BEARER: &str = "urn:ietf:params:oauth:grant-type:jwt-bearer";
const JWT_TYPE: &str = "urn:ietf:params:oauth:token-type:jwt";

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(60 * 60);

/// Carries out the request and returns the JSON of the response. With `is_expired`, its access token expired a minute
/// ago.
pub(super) fn carry_out(
    state: &mut State,
    headers: &HeaderMap,
    body: &[u8],
    is_expired: bool,
) -> Result<Value, Refusal> {
    let form = Form::read(headers, body)?;
    let caller = authenticate(state, headers, &form)?;
    let grant_type = form.require("grant_type")?;
    if caller == Caller::Public && grant_type != "refresh_token" {
        return Err(INVALID_CLIENT);
    }
    let mut granted = json!({ "token_type": "Bearer" });
    let mut subject = SUBJECT;
    match grant_type {
        "client_credentials" => {}
        "refresh_token" => {
            if let Some(next) = state.tokens.refresh.redeem(form.require("refresh_token")?)? {
                granted["refresh_token"] = next.into();
            }
        }
        TOKEN_EXCHANGE => {
            let token = form.require("subject_token")?;
            if is_short_name(token) {
                subject = token;
            }
            form.require("subject_token_type")?;
            granted["issued_token_type"] = JWT_TYPE.into();
        }
        JWT_BEARER => {
            if !has_three_parts(form.require("assertion")?) {
                return Err(invalid_grant("The assertion is not a JWT."));
            }
        }
        _ => return Err(Refusal::oauth(400, "unsupported_grant_type", "There is no such grant type.")),
    }
    if let Some(scope) = form.get("scope") {
        granted["scope"] = scope.into();
    }
    let now = state.clock.now().wall;
    let (issued, lifetime) = match is_expired {
        false => (now, state.tokens.lifetime.unwrap_or(HOUR)),
        true => (now.checked_sub(MINUTE).unwrap_or(UNIX_EPOCH), Duration::ZERO),
    };
    granted["access_token"] = state.issuer.mint(JwtAlgorithm::Hs256, subject, issued, lifetime).into();
    granted["expires_in"] = seconds(lifetime);
    Ok(granted)
}

/// Whether a subject token can serve as the `sub` of the access token as it stands.
fn is_short_name(token: &str) -> bool {
    token.len() <= 64 && token.bytes().all(|byte| byte.is_ascii_graphic())
}

fn has_three_parts(assertion: &str) -> bool {
    assertion.split('.').count() == 3 && assertion.split('.').all(|part| !part.is_empty())
}

/// An integer where possible, because some clients accept nothing else.
fn seconds(time: Duration) -> Value {
    if time.subsec_nanos() == 0 { time.as_secs().into() } else { time.as_secs_f64().into() }
}
