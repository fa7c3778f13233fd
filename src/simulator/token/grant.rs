//! The grants of the token endpoint (RFC 6749 section 5.1) and its refresh tokens.

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    time::{Duration, UNIX_EPOCH},
};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use http::HeaderMap;
use serde::Deserialize;
use serde_json::{Value, json};

use super::request::{Caller, Form, authenticate};
use crate::simulator::{
    State,
    jwt::{JwtAlgorithm, SUBJECT},
    random_hex,
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
    let mut subject = Cow::Borrowed(SUBJECT);
    match grant_type {
        "client_credentials" => {}
        "refresh_token" => {
            if let Some(next) = state.tokens.refresh.redeem(form.require("refresh_token")?)? {
                granted["refresh_token"] = next.into();
            }
        }
        TOKEN_EXCHANGE => {
            let token = form.require("subject_token")?;
            if let Some(named) = subject_of(token) {
                subject = named;
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
    granted["access_token"] = state.issuer.mint(JwtAlgorithm::Hs256, &subject, issued, lifetime).into();
    granted["expires_in"] = seconds(lifetime);
    Ok(granted)
}

/// The subject of the access token: the `sub` of a subject token that is a JWT, or a short one as it stands.
fn subject_of(token: &str) -> Option<Cow<'_, str>> {
    #[derive(Deserialize)]
    struct Claims {
        sub: String,
    }
    let is_name = token.len() <= 64 && token.bytes().all(|byte| byte.is_ascii_graphic());
    let claims = token.split('.').nth(1).and_then(|claims| BASE64_URL_SAFE_NO_PAD.decode(claims).ok());
    let claims = claims.and_then(|claims| serde_json::from_slice(&claims).ok());
    claims.map(|Claims { sub }| Cow::Owned(sub)).or(is_name.then_some(Cow::Borrowed(token)))
}

fn has_three_parts(assertion: &str) -> bool {
    assertion.split('.').count() == 3 && assertion.split('.').all(|part| !part.is_empty())
}

/// An integer where possible, because some clients accept nothing else.
fn seconds(time: Duration) -> Value {
    if time.subsec_nanos() == 0 { time.as_secs().into() } else { time.as_secs_f64().into() }
}

/// Single-use refresh tokens ([RFC 9700 section 4.14.2](https://www.rfc-editor.org/rfc/rfc9700#section-4.14.2)).
#[derive(Default)]
pub(super) struct RefreshTokens {
    /// Every token ever issued.
    tokens: HashMap<String, RefreshToken>,
    /// The families that are not revoked.
    families: HashSet<u64>,
    families_started: u64,
    /// Whether a token can be used again, and is not rotated.
    pub(super) reusable: bool,
    pub(super) reused: u64,
}

struct RefreshToken {
    /// Shared by all tokens that descend from the same first one.
    family: u64,
    spent: bool,
}

impl RefreshTokens {
    /// Issues the first token of a new family.
    pub(super) fn issue(&mut self) -> String {
        self.families_started += 1;
        self.families.insert(self.families_started);
        self.issue_into(self.families_started)
    }

    fn issue_into(&mut self, family: u64) -> String {
        let token = format!("refresh-{}", random_hex());
        self.tokens.insert(token.clone(), RefreshToken { family, spent: false });
        token
    }

    /// Spends `token` and returns the next one, if tokens rotate.
    ///
    /// Reuse of a spent token revokes its family: the token was copied, and either holder may be the thief.
    pub(super) fn redeem(&mut self, token: &str) -> Result<Option<String>, Refusal> {
        let found = self.tokens.get_mut(token).ok_or(invalid_grant("Unknown refresh token."))?;
        let family = found.family;
        if found.spent {
            self.reused += 1;
            self.families.remove(&family);
            return Err(invalid_grant("The refresh token was used before."));
        }
        if !self.families.contains(&family) {
            return Err(invalid_grant("The refresh token was revoked."));
        }
        if self.reusable {
            return Ok(None);
        }
        found.spent = true;
        Ok(Some(self.issue_into(family)))
    }

    pub(super) fn is_valid(&self, token: &str) -> bool {
        self.tokens.get(token).is_some_and(|found| !found.spent && self.families.contains(&found.family))
    }

    pub(super) fn revoke_all(&mut self) {
        self.families.clear();
    }
}
