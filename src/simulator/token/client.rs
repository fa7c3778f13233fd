//! Who asks for a token: [RFC 6749 section 2.3](https://www.rfc-editor.org/rfc/rfc6749#section-2.3).

use base64::{Engine as _, prelude::BASE64_STANDARD};
use http::{HeaderMap, HeaderValue, header::AUTHORIZATION};

use super::{
    denial::{Denial, INVALID_CLIENT},
    form::{self, Form},
};
use crate::simulator::State;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Caller {
    Authenticated,
    /// Says who it is and proves nothing.
    Public,
}

pub(super) fn authenticate(state: &State, headers: &HeaderMap, form: &Form) -> Result<Caller, Denial> {
    let mut authorization = headers.get_all(AUTHORIZATION).iter();
    let (first, second) = (authorization.next(), authorization.next());
    if second.is_some() {
        return Err(Denial::invalid_request("Authorization came more than once."));
    }
    match (first, form.get("client_id"), form.get("client_secret")) {
        (Some(_), _, Some(_)) => Err(Denial::invalid_request("The client authenticates in two ways.")),
        (Some(authorization), id, None) => by_header(state, authorization, id),
        (None, Some(id), Some(secret)) if is_client(state, id, secret) => Ok(Caller::Authenticated),
        (None, Some(_), None) => Ok(Caller::Public),
        (None, None, Some(_)) => Err(Denial::invalid_request("The secret came without a client_id.")),
        (None, _, _) => Err(INVALID_CLIENT),
    }
}

/// `id` is the body's `client_id`.
fn by_header(state: &State, authorization: &HeaderValue, id: Option<&str>) -> Result<Caller, Denial> {
    let authorization = authorization.to_str().unwrap_or_default();
    let (scheme, credentials) = authorization.split_once(' ').unwrap_or((authorization, ""));
    if scheme.eq_ignore_ascii_case("bearer") {
        return match id {
            Some(_) => Err(Denial::invalid_request("A key and a client_id came together.")),
            None if state.keys.contains_key(credentials) => Ok(Caller::Authenticated),
            None => Err(INVALID_CLIENT.with_challenge(r#"Bearer realm="simulator""#)),
        };
    }
    // What is neither is challenged to the scheme that there is for clients.
    let denied = INVALID_CLIENT.with_challenge(r#"Basic realm="simulator""#);
    if !scheme.eq_ignore_ascii_case("basic") {
        return Err(denied);
    }
    let (user, password) = basic(credentials).ok_or(denied)?;
    if id.is_some_and(|id| id != user) {
        return Err(Denial::invalid_request("Authorization and client_id name two clients."));
    }
    if is_client(state, &user, &password) { Ok(Caller::Authenticated) } else { Err(denied) }
}

/// Id and secret, each form-encoded inside ([RFC 6749 section
/// 2.3.1](https://www.rfc-editor.org/rfc/rfc6749#section-2.3.1)).
fn basic(credentials: &str) -> Option<(String, String)> {
    let decoded = BASE64_STANDARD.decode(credentials).ok()?;
    let (user, password) = std::str::from_utf8(&decoded).ok()?.split_once(':')?;
    form::decode(user).zip(form::decode(password))
}

fn is_client(state: &State, id: &str, secret: &str) -> bool {
    state.tokens.clients.get(id).is_some_and(|known| known == secret)
}
