//! What one request gets: decided from its URI, headers and extensions, then written into its headers.
//!
//! Every way of sending credentials comes through here, the layers as well as [`Credentials::apply`].

use http::{
    Extensions, HeaderMap, HeaderName, HeaderValue, Method, Uri,
    header::{AUTHORIZATION, CONNECTION, HOST, REFERER},
};

use crate::{
    authorize::strip::{Former, Secrets},
    authorize::voice_agent,
    credential::{Credentials, Form, RequestAuth, Slot, Values},
    error::{AuthError, AuthErrorKind},
    origin::{Admission, Origins},
};

pub(crate) const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");

const NO_CHOICE: &str = "the request has no `RequestAuth` extension, and this layer requires one";
const NO_OWN: &str = "the request asks for the layer's own credentials, and it has none";
const NO_JWT: &str = "the request asks for a JWT beside the key, and there is none";

/// The head of a request.
#[derive(Clone, Copy)]
pub(crate) struct Head<'a> {
    /// `None` where it is not known.
    pub(crate) method: Option<&'a Method>,
    pub(crate) uri: &'a Uri,
    pub(crate) headers: &'a HeaderMap,
    pub(crate) extensions: &'a Extensions,
}

/// What a layer, or a caller by hand, wants done.
#[derive(Clone, Copy)]
pub(crate) struct Rules<'a> {
    /// `None` when every request brings its own.
    pub(crate) credentials: Option<&'a Credentials>,
    pub(crate) origins: &'a Origins,
    pub(crate) if_not_present: bool,
    pub(crate) require_request_auth: bool,
    /// What was sent before.
    pub(crate) former: Option<&'a Former>,
}

pub(crate) struct Plan {
    action: Action,
    /// Instead of the request's own, where credentials go into it or come out of it.
    uri: Option<Box<Uri>>,
    /// `Referer` has a secret in it.
    drop_referer: bool,
    /// What the request came with stays in a header that the layer beside this one writes.
    keep_theirs: bool,
}

enum Action {
    /// Write these into the headers.
    Write(Credentials),
    /// These went into the query; take both headers off.
    Query(Credentials),
    /// Nothing of ours may go along; take both headers off.
    Scrub,
    /// The layer beside this one writes both headers.
    Yield,
    /// The headers stay as they are.
    Leave,
}

/// Writes `credentials` into a request that has no header which says where it goes, nor one that is taken off.
/// `false`: it has, or there is no room for more, and a [`Plan`] is to be made.
///
/// For a request without a choice of its own, to an origin that is allowed as it is spelled, the usual one: what a `Plan`
/// would come to, at less cost.
#[inline]
pub(crate) fn write_usual(headers: &mut HeaderMap, credentials: &Credentials, if_not_present: bool) -> bool {
    let Values { authorization, x_api_key, takes_off } = credentials.values();
    let (minds_authorization, minds_x_api_key) =
        (takes_off.authorization | if_not_present, takes_off.x_api_key | if_not_present);
    // One look at each name costs less than a few look-ups: a request has few.
    let is_minded = |name: &HeaderName| {
        *name == HOST
            || *name == CONNECTION
            || (minds_authorization && *name == AUTHORIZATION)
            || (minds_x_api_key && *name == X_API_KEY)
    };
    if headers.keys().any(is_minded) {
        return false;
    }
    match authorization {
        Some(value) => {
            if headers.try_insert(AUTHORIZATION, value.clone()).is_err() {
                return false;
            }
        }
        None if takes_off.authorization => {}
        None => yield_to_other(headers, &AUTHORIZATION),
    }
    match x_api_key {
        Some(value) => {
            if headers.try_insert(X_API_KEY, value.clone()).is_err() {
                // Not to be taken for what the request came with. What the other layer wrote stays.
                if authorization.is_some() {
                    headers.remove(AUTHORIZATION);
                }
                return false;
            }
        }
        None if takes_off.x_api_key => {}
        None => yield_to_other(headers, &X_API_KEY),
    }
    true
}

impl Plan {
    pub(crate) fn new(rules: Rules<'_>, head: Head<'_>) -> Result<Self, AuthError> {
        if let Some(choice) = head.extensions.get::<RequestAuth>() {
            return Self::chosen(choice, rules, head);
        }
        let own = rules.credentials.filter(|_| !rules.require_request_auth);
        let plan = Self::send(own, rules, head)?;
        Ok(if rules.if_not_present { plan.if_not_present(head.headers) } else { plan })
    }

    fn chosen(choice: &RequestAuth, rules: Rules<'_>, head: Head<'_>) -> Result<Self, AuthError> {
        let own = || rules.credentials.ok_or_else(|| unavailable(NO_OWN));
        match choice {
            RequestAuth::Anonymous => Self::scrub(None, rules, head),
            RequestAuth::Custom(credentials) => Self::send(Some(credentials), rules, head),
            RequestAuth::ApiKey => match own()?.key_alone() {
                Some(key) => Self::send(Some(key), rules, head),
                // The layer beside this one has the key, and writes both headers.
                None => Self::send(Some(own()?), rules, head).map(|plan| plan.instead(Action::Yield)),
            },
            RequestAuth::ApiKeyAndJwt => Self::send(Some(with_jwt(own()?)?), rules, head),
            RequestAuth::VoiceAgent => {
                let credentials = with_jwt(own()?)?;
                match Self::send(Some(credentials), rules, head)?.action {
                    Action::Write(credentials) => Ok(Self {
                        uri: Some(Box::new(voice_agent::with_query(head, &credentials)?)),
                        drop_referer: Secrets([Some(&credentials), None], rules.former)
                            .are_in_referer(head.headers),
                        action: Action::Query(credentials),
                        keep_theirs: false,
                    }),
                    _ => Self::scrub(Some(credentials), rules, head),
                }
            }
        }
    }

    /// Writes `credentials` if they may go there.
    fn send(credentials: Option<&Credentials>, rules: Rules<'_>, head: Head<'_>) -> Result<Self, AuthError> {
        match (rules.origins.admit(head.uri, head.headers)?, credentials) {
            (Admission::Write, Some(credentials)) => Ok(Self::of(Action::Write(credentials.clone()))),
            (Admission::Write, None) => Err(unavailable(NO_CHOICE)),
            (Admission::Scrub, credentials) => Self::scrub(credentials, rules, head),
        }
    }

    /// Sends nothing of ours, neither the layer's own nor what the request chose.
    #[cold]
    fn scrub(credentials: Option<&Credentials>, rules: Rules<'_>, head: Head<'_>) -> Result<Self, AuthError> {
        let secrets = Secrets([rules.credentials, credentials], rules.former);
        Ok(Self {
            action: Action::Scrub,
            uri: secrets.uri_without(head.uri)?.map(Box::new),
            drop_referer: secrets.are_in_referer(head.headers),
            keep_theirs: false,
        })
    }

    fn of(action: Action) -> Self {
        Self { action, uri: None, drop_referer: false, keep_theirs: false }
    }

    /// Does something else where credentials would be written.
    fn instead(self, action: Action) -> Self {
        match self.action {
            Action::Write(_) => Self::of(action),
            _ => self,
        }
    }

    /// Leaves a request alone that came with credentials in a header that would be written.
    fn if_not_present(self, headers: &HeaderMap) -> Self {
        let Action::Write(credentials) = &self.action else { return self };
        let present =
            |name: &HeaderName, slot: Slot<'_>| !matches!(slot, Slot::Yield) && headers.contains_key(name);
        let [authorization, x_api_key] = credentials.slots();
        let brought = present(&AUTHORIZATION, authorization) || present(&X_API_KEY, x_api_key);
        if brought { self.instead(Action::Leave) } else { Self { keep_theirs: true, ..self } }
    }

    pub(crate) fn apply(&self, headers: &mut HeaderMap) -> Result<(), AuthError> {
        match &self.action {
            Action::Write(credentials) => return write(headers, credentials, self.keep_theirs),
            Action::Yield => {
                yield_to_other(headers, &AUTHORIZATION);
                yield_to_other(headers, &X_API_KEY);
            }
            Action::Leave => {}
            Action::Query(_) | Action::Scrub => {
                headers.remove(AUTHORIZATION);
                headers.remove(&X_API_KEY);
                if self.drop_referer {
                    headers.remove(REFERER);
                }
            }
        }
        Ok(())
    }

    /// The URI to send the request to, where it is another than the request came with, and the credentials
    /// that go along.
    pub(crate) fn into_parts(self) -> (Option<Box<Uri>>, Option<Credentials>) {
        match self.action {
            Action::Write(credentials) | Action::Query(credentials) => (self.uri, Some(credentials)),
            Action::Scrub | Action::Yield | Action::Leave => (self.uri, None),
        }
    }
}

fn with_jwt(credentials: &Credentials) -> Result<&Credentials, AuthError> {
    match credentials.form() {
        Form::Bearer | Form::Header => Err(unavailable(NO_JWT)),
        Form::Pair | Form::KeyHalf | Form::JwtHalf => Ok(credentials),
    }
}

#[cold]
fn unavailable(detail: &'static str) -> AuthError {
    AuthError::local(AuthErrorKind::CredentialUnavailable, detail)
}

fn write(headers: &mut HeaderMap, credentials: &Credentials, keep_theirs: bool) -> Result<(), AuthError> {
    let [authorization, x_api_key] = credentials.slots();
    put(headers, &AUTHORIZATION, authorization, keep_theirs)?;
    put(headers, &X_API_KEY, x_api_key, keep_theirs)?;
    if headers.contains_key(CONNECTION) {
        keep_from_connection(headers);
    }
    Ok(())
}

fn put(
    headers: &mut HeaderMap,
    name: &HeaderName,
    slot: Slot<'_>,
    keep_theirs: bool,
) -> Result<(), AuthError> {
    match slot {
        Slot::Write(value) => {
            // `insert` would panic on a full map.
            let inserted = headers.try_insert(name, value.clone());
            inserted.map_err(|_| {
                AuthError::local(AuthErrorKind::InvalidRequest, "the request has too many headers")
            })?;
        }
        Slot::Remove => {
            headers.remove(name);
        }
        Slot::Yield if keep_theirs => {}
        Slot::Yield => yield_to_other(headers, name),
    }
    Ok(())
}

/// Takes off what the request came with, and leaves what the layer beside this one wrote, if it is outside.
///
/// They are told apart by the sensitive mark: all that we write has it, and nothing that is parsed from a
/// connection does.
// Out of line: only halves of a pair come here.
#[inline(never)]
fn yield_to_other(headers: &mut HeaderMap, name: &HeaderName) {
    if headers.get_all(name).iter().any(|value| !value.is_sensitive()) {
        headers.remove(name);
    }
}

/// Takes our headers out of `Connection`: whoever forwards the request would drop what it names
/// ([RFC 9110 section 7.6.1](https://www.rfc-editor.org/rfc/rfc9110#section-7.6.1)).
#[cold]
fn keep_from_connection(headers: &mut HeaderMap) {
    let is_ours = |option: &&[u8]| {
        [&AUTHORIZATION, &X_API_KEY].iter().any(|name| option.eq_ignore_ascii_case(name.as_str().as_bytes()))
    };
    let values = headers.get_all(CONNECTION).iter();
    let options =
        values.flat_map(|value| value.as_bytes().split(|byte| *byte == b',')).map(<[u8]>::trim_ascii);
    let (ours, mut kept): (Vec<_>, Vec<_>) = options.partition(is_ours);
    if ours.is_empty() {
        return;
    }
    kept.retain(|option| !option.is_empty());
    match HeaderValue::from_bytes(&kept.join(&b", "[..])) {
        Ok(kept) if !kept.is_empty() => {
            headers.insert(CONNECTION, kept);
        }
        _ => {
            headers.remove(CONNECTION);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*, sample::select};

    use super::*;
    use crate::{ApiKey, Token};

    proptest! {
        #[test]
        fn h3_the_usual_request_gets_what_any_other_way_would_give_it(
            names in vec(
                select(vec!["accept", "authorization", "x-api-key", "host", "connection", "x-other"]), 0..6
            ),
            sensitive in any::<bool>(),
            form in 0..5,
            if_not_present in any::<bool>(),
        ) {
            let key = ApiKey::new("sk-selam-example").unwrap();
            let jwt = Token::new("a.b.c").unwrap();
            let credentials = match form {
                0 => Credentials::bearer(key),
                1 => Credentials::x_api_key(key),
                2 => Credentials::key_and_jwt(key, jwt),
                3 => Credentials::new(Form::KeyHalf, Some(key), None),
                _ => Credentials::jwt_beside_key(jwt),
            };
            let mut headers = HeaderMap::new();
            for name in names {
                let mut value = HeaderValue::from_static("api.selamgpt.com");
                value.set_sensitive(sensitive);
                headers.append(name, value);
            }
            let (origins, uri) = (Origins::selam(), Uri::from_static("https://api.selamgpt.com/v1/models"));
            let rules = Rules { credentials: Some(&credentials), origins: &origins, if_not_present, require_request_auth: false, former: None };
            let head = Head { method: None, uri: &uri, headers: &headers, extensions: &Extensions::new() };
            let (mut planned, mut usual) = (headers.clone(), headers.clone());
            Plan::new(rules, head).unwrap().apply(&mut planned).unwrap();
            if write_usual(&mut usual, &credentials, if_not_present) {
                prop_assert_eq!(usual, planned);
            } else {
                prop_assert_eq!(usual, headers, "nothing was written");
            }
        }
    }

    #[test]
    fn h1_where_there_is_room_for_one_header_no_half_is_taken_for_the_requests_own() {
        let pair =
            Credentials::key_and_jwt(ApiKey::new("sk-selam-example").unwrap(), Token::new("a.b.c").unwrap());
        let mut full = HeaderMap::new();
        let mut number = 0;
        while full
            .try_insert(format!("x-{number}").parse::<HeaderName>().unwrap(), HeaderValue::from_static(""))
            .is_ok()
        {
            number += 1;
        }
        full.remove("x-0");
        for if_not_present in [false, true] {
            let mut headers = full.clone();
            assert!(!write_usual(&mut headers, &pair, if_not_present));
            assert!(!headers.contains_key(AUTHORIZATION) && !headers.contains_key(&X_API_KEY));
        }

        // Nor does the half with the key take off what the layer beside it wrote, which would make room.
        let mut theirs = HeaderValue::from_static("Bearer a.b.c");
        theirs.set_sensitive(true);
        full.insert(AUTHORIZATION, theirs);
        let key = Credentials::new(Form::KeyHalf, Some(ApiKey::new("sk-selam-example").unwrap()), None);
        assert!(!write_usual(&mut full, &key, false));
        assert!(full.contains_key(AUTHORIZATION) && !full.contains_key(&X_API_KEY));
        assert!(write(&mut full, &key, false).is_err());
    }
}
