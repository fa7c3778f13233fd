//! Client authentication at the token endpoint:
//! [RFC 6749 section 2.3](https://www.rfc-editor.org/rfc/rfc6749#section-2.3).

use base64::{Engine as _, prelude::BASE64_STANDARD};
use http::{HeaderMap, HeaderValue, header::AUTHORIZATION};

use super::{
    form::{self, Form},
    refusal::{INVALID_CLIENT, invalid_request},
};
use crate::simulator::{State, refusal::Refusal};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Caller {
    Authenticated,
    /// States its `client_id` and proves nothing.
    Public,
}

pub(super) fn authenticate(state: &State, headers: &HeaderMap, form: &Form) -> Result<Caller, Refusal> {
    let mut authorization = headers.get_all(AUTHORIZATION).iter();
    let (first, second) = (authorization.next(), authorization.next());
    if second.is_some() {
        return Err(invalid_request("Authorization came more than once."));
    }
    match (first, form.get("client_id"), form.get("client_secret")) {
        (Some(_), _, Some(_)) => Err(invalid_request("The client authenticates in two ways.")),
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

/// Id and secret are each form-encoded inside the Base64 ([RFC 6749 section
/// 2.3.1](https://www.rfc-editor.org/rfc/rfc6749#section-2.3.1)).
fn basic(credentials: &str) -> Option<(String, String)> {
    let decoded = BASE64_STANDARD.decode(credentials).ok()?;
    let (id, secret) = std::str::from_utf8(&decoded).ok()?.split_once(':')?;
    form::decode(id).zip(form::decode(secret))
}

fn is_client(state: &State, id: &str, secret: &str) -> bool {
    state.tokens.clients.get(id).is_some_and(|known| known == secret)
}
