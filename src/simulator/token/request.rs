//! Reads a token request: its form parameters, and the client that sent it.

use std::{borrow::Cow, collections::HashMap};

use base64::{
    Engine as _,
    prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD},
};
use hmac::Mac;
use http::{
    HeaderMap, HeaderValue,
    header::{AUTHORIZATION, CONTENT_TYPE},
};
use percent_encoding::percent_decode_str;
use serde_json::Value;

use crate::simulator::{
    State,
    jwt::{epoch_seconds, hs256},
    refusal::{INVALID_CLIENT, Refusal, invalid_request},
};

/// [RFC 8693 section 2.1](https://www.rfc-editor.org/rfc/rfc8693#section-2.1) allows these more than once.
const REPEATABLE: [&str; 2] = ["audience", "resource"];

const ASSERTION_TYPE: &str = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";

/// Parameters read by the rules of [RFC 6749 section
/// 3.2](https://www.rfc-editor.org/rfc/rfc6749#section-3.2): each at most once, empty ones ignored.
pub(super) struct Form(HashMap<String, String>);

impl Form {
    pub(super) fn read(headers: &HeaderMap, body: &[u8]) -> Result<Self, Refusal> {
        let content_type =
            headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let media_type = content_type.split(';').next().unwrap_or_default().trim();
        if !media_type.eq_ignore_ascii_case("application/x-www-form-urlencoded") {
            return Err(invalid_request("The body is not a form."));
        }
        let not_utf8 = invalid_request("The body is not UTF-8.");
        let body = std::str::from_utf8(body).map_err(|_| not_utf8)?;
        let mut params = HashMap::new();
        for param in body.split('&') {
            let (name, value) = param.split_once('=').unwrap_or((param, ""));
            let (name, value) = decode(name).zip(decode(value)).ok_or(not_utf8)?;
            let may_repeat = name.is_empty() || REPEATABLE.contains(&name.as_str());
            if params.insert(name, value).is_some() && !may_repeat {
                return Err(invalid_request("A parameter came more than once."));
            }
        }
        params.retain(|_, value| !value.is_empty());
        Ok(Self(params))
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    pub(super) fn require(&self, name: &str) -> Result<&str, Refusal> {
        self.get(name).ok_or(invalid_request("A required parameter is missing."))
    }
}

/// `None` if the decoded text is not UTF-8.
fn decode(text: &str) -> Option<String> {
    let text = text.replace('+', " ");
    percent_decode_str(&text).decode_utf8().ok().map(Cow::into_owned)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Caller {
    Authenticated,
    /// States its `client_id` and proves nothing.
    Public,
}

/// Authenticates the client
/// ([RFC 6749 section 2.3](https://www.rfc-editor.org/rfc/rfc6749#section-2.3)).
pub(super) fn authenticate(state: &mut State, headers: &HeaderMap, form: &Form) -> Result<Caller, Refusal> {
    let mut authorization = headers.get_all(AUTHORIZATION).iter();
    let (first, second) = (authorization.next(), authorization.next());
    if second.is_some() {
        return Err(invalid_request("Authorization came more than once."));
    }
    match (first, form.get("client_id"), form.get("client_secret")) {
        (Some(_), _, Some(_)) => Err(invalid_request("The client authenticates in two ways.")),
        (None, id, None) if form.get("client_assertion").is_some() => by_assertion(state, form, id),
        (Some(authorization), id, None) => by_header(state, authorization, id),
        (None, Some(id), Some(secret)) if is_client(state, id, secret) => Ok(Caller::Authenticated),
        (None, Some(_), None) => Ok(Caller::Public),
        (None, None, Some(_)) => Err(invalid_request("The secret came without a client_id.")),
        (None, _, _) => Err(INVALID_CLIENT),
    }
}

/// `form_id` is the `client_id` in the body.
fn by_header(state: &State, authorization: &HeaderValue, form_id: Option<&str>) -> Result<Caller, Refusal> {
    let authorization = authorization.to_str().unwrap_or_default();
    let (scheme, credentials) = authorization.split_once(' ').unwrap_or((authorization, ""));
    if scheme.eq_ignore_ascii_case("bearer") {
        return match form_id {
            Some(_) => Err(invalid_request("A key and a client_id came together.")),
            None if state.keys.contains_key(credentials) => Ok(Caller::Authenticated),
            None => Err(INVALID_CLIENT.with_challenge(r#"Bearer realm="simulator""#)),
        };
    }
    // Any other scheme is challenged to Basic, the one for clients.
    let refusal = INVALID_CLIENT.with_challenge(r#"Basic realm="simulator""#);
    if !scheme.eq_ignore_ascii_case("basic") {
        return Err(refusal);
    }
    let (id, secret) = basic(credentials).ok_or(refusal)?;
    if form_id.is_some_and(|form_id| form_id != id) {
        return Err(invalid_request("Authorization and client_id name two clients."));
    }
    if is_client(state, &id, &secret) { Ok(Caller::Authenticated) } else { Err(refusal) }
}

/// A JWT signed with the client's secret
/// ([RFC 7523 section 3](https://www.rfc-editor.org/rfc/rfc7523#section-3)). No leeway is granted, and each JWT is accepted
/// once.
fn by_assertion(state: &mut State, form: &Form, form_id: Option<&str>) -> Result<Caller, Refusal> {
    if form.require("client_assertion_type")? != ASSERTION_TYPE {
        return Err(invalid_request("There is no such client_assertion_type."));
    }
    let claims = verified(state, form.require("client_assertion")?).ok_or(INVALID_CLIENT)?;
    let now = epoch_seconds(state.clock.now().wall);
    let time = |name: &str| claims[name].as_u64();
    let is_for_us = claims["aud"].as_str().is_some_and(|audience| audience.ends_with(super::PATH));
    let is_theirs = claims["sub"] == claims["iss"] && form_id.is_none_or(|id| claims["iss"] == id);
    let has_come = ["iat", "nbf"].iter().all(|name| time(name).is_none_or(|time| time <= now));
    if !is_for_us || !is_theirs || !has_come || time("exp").is_none_or(|time| time <= now) {
        return Err(INVALID_CLIENT);
    }
    let id = claims["jti"].as_str().ok_or(invalid_request("The assertion has no jti."))?;
    match state.tokens.assertions.insert(id.to_owned()) {
        true => Ok(Caller::Authenticated),
        false => Err(Refusal::oauth(401, "invalid_client", "The assertion was used before.")),
    }
}

/// The claims of an assertion signed by a client, with HMAC and SHA-256.
fn verified(state: &State, jwt: &str) -> Option<Value> {
    let (message, signature) = jwt.rsplit_once('.')?;
    let (_, claims) = message.split_once('.')?;
    let claims: Value = serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(claims).ok()?).ok()?;
    let secret = state.tokens.clients.get(claims["iss"].as_str()?)?;
    let signature = BASE64_URL_SAFE_NO_PAD.decode(signature).ok()?;
    hs256(secret.as_bytes(), message.as_bytes()).verify_slice(&signature).ok().map(|()| claims)
}

/// Id and secret are each form-encoded inside the Base64 ([RFC 6749 section
/// 2.3.1](https://www.rfc-editor.org/rfc/rfc6749#section-2.3.1)).
fn basic(credentials: &str) -> Option<(String, String)> {
    let decoded = BASE64_STANDARD.decode(credentials).ok()?;
    let (id, secret) = std::str::from_utf8(&decoded).ok()?.split_once(':')?;
    decode(id).zip(decode(secret))
}

fn is_client(state: &State, id: &str, secret: &str) -> bool {
    state.tokens.clients.get(id).is_some_and(|known| known == secret)
}
