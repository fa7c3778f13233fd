//! Writes credentials into headers.

use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{AUTHORIZATION, CONNECTION},
};

use super::sent::Sent;
use crate::{AuthError, AuthErrorKind, Credentials};

pub(crate) const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// Which headers a layer owns, and what it writes into them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// `Authorization`: the key.
    KeyAsBearer,
    /// `X-API-Key`: the key.
    KeyAsXApiKey,
    /// `Authorization`: the JWT.
    Jwt,
    /// Both headers: the key as bearer, or the JWT as bearer and the key as `X-API-Key`.
    Both,
}

impl Owner {
    pub(super) fn owns_authorization(self) -> bool {
        self != Self::KeyAsXApiKey
    }

    pub(super) fn owns_x_api_key(self) -> bool {
        matches!(self, Self::KeyAsXApiKey | Self::Both)
    }

    pub(super) fn is_present(self, headers: &HeaderMap) -> bool {
        (self.owns_authorization() && headers.contains_key(AUTHORIZATION))
            || (self.owns_x_api_key() && headers.contains_key(X_API_KEY))
    }
}

/// What to do with the two headers that carry credentials.
pub(super) struct HeaderPlan<'a> {
    authorization: HeaderEdit<'a>,
    x_api_key: HeaderEdit<'a>,
}

/// What to do with one header.
enum HeaderEdit<'a> {
    /// Leave it: the layer does not own it.
    Keep,
    Replace(&'a HeaderValue),
    Remove,
}

impl<'a> HeaderPlan<'a> {
    /// The plan for a layer's own credentials.
    #[inline]
    pub(super) fn new(owner: Owner, sent: &'a Sent) -> Self {
        let key = sent.api_key.as_ref().map(|key| &key.credential.0);
        let jwt = sent.jwt.as_ref().map(|jwt| jwt.credential.0.bearer());
        let (authorization, x_api_key) = match owner {
            Owner::Both if jwt.is_some() => (jwt, key.map(|key| key.bare())),
            Owner::Both | Owner::KeyAsBearer => (key.map(|key| key.bearer()), None),
            Owner::KeyAsXApiKey => (None, key.map(|key| key.bare())),
            Owner::Jwt => (jwt, None),
        };
        Self::for_owner(owner, authorization, x_api_key)
    }

    /// The plan for a request's own credentials.
    pub(super) fn custom(owner: Owner, credentials: &'a Credentials) -> Self {
        Self::for_owner(owner, credentials.authorization(), credentials.x_api_key_value())
    }

    #[inline]
    fn for_owner(
        owner: Owner,
        authorization: Option<&'a HeaderValue>,
        x_api_key: Option<&'a HeaderValue>,
    ) -> Self {
        let edit = |is_owned: bool, value: Option<&'a HeaderValue>| match value {
            _ if !is_owned => HeaderEdit::Keep,
            Some(value) => HeaderEdit::Replace(value),
            None => HeaderEdit::Remove,
        };
        Self {
            authorization: edit(owner.owns_authorization(), authorization),
            x_api_key: edit(owner.owns_x_api_key(), x_api_key),
        }
    }

    /// Applies the plan.
    ///
    /// # Errors
    ///
    /// When the map is full. Then neither header is written.
    #[inline]
    pub(super) fn write(self, headers: &mut HeaderMap) -> Result<(), AuthError> {
        // As in `Origins::admit`, comparing names beats a look-up.
        let has_connection = headers.keys().any(|name| *name == CONNECTION);
        self.authorization.apply(headers, AUTHORIZATION)?;
        if let Err(error) = self.x_api_key.apply(headers, X_API_KEY) {
            if let HeaderEdit::Replace(_) = self.authorization {
                headers.remove(AUTHORIZATION);
            }
            return Err(error);
        }
        if has_connection {
            self.remove_from_connection(headers);
        }
        Ok(())
    }

    /// Removes the names of the written headers from `Connection`: a proxy would drop the headers that it names
    /// ([RFC 9110 section 7.6.1](https://www.rfc-editor.org/rfc/rfc9110#section-7.6.1)).
    #[cold]
    fn remove_from_connection(&self, headers: &mut HeaderMap) {
        let edits = [(AUTHORIZATION, &self.authorization), (X_API_KEY, &self.x_api_key)];
        let is_written = |option: &&[u8]| {
            edits.iter().any(|(name, edit)| {
                matches!(edit, HeaderEdit::Replace(_))
                    && option.eq_ignore_ascii_case(name.as_str().as_bytes())
            })
        };
        let values = headers.get_all(CONNECTION).iter();
        let options =
            values.flat_map(|value| value.as_bytes().split(|byte| *byte == b',')).map(<[u8]>::trim_ascii);
        let (removed, mut kept): (Vec<_>, Vec<_>) = options.partition(is_written);
        if removed.is_empty() {
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
}

impl HeaderEdit<'_> {
    #[inline]
    fn apply(&self, headers: &mut HeaderMap, name: HeaderName) -> Result<(), AuthError> {
        match *self {
            Self::Keep => {}
            Self::Remove => {
                headers.remove(name);
            }
            // `insert` would panic if the map is full.
            Self::Replace(value) => {
                headers.try_insert(name, value.clone()).map_err(|_| too_many_headers())?;
            }
        }
        Ok(())
    }
}

#[cold]
fn too_many_headers() -> AuthError {
    AuthError::local(AuthErrorKind::InvalidRequest, "the request has too many headers")
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*, sample::select};

    use super::*;
    use crate::{ApiKey, Token, refresh::Lease};

    const OWNERS: [Owner; 4] = [Owner::KeyAsBearer, Owner::KeyAsXApiKey, Owner::Jwt, Owner::Both];

    fn sent(api_key: bool, jwt: bool) -> Sent {
        let key = || Lease::fixed(ApiKey::new("sk-selam-example").unwrap());
        let token = || Lease::fixed(Token::new("a.b.c").unwrap());
        Sent { api_key: api_key.then(key), jwt: jwt.then(token), subject: None }
    }

    fn values<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Vec<&'a [u8]> {
        headers.get_all(name).iter().map(HeaderValue::as_bytes).collect()
    }

    proptest! {
        /// H0, H1, H2, H3: an owned header has the layer's value alone, and no other header changes.
        #[test]
        fn only_owned_headers_change(
            names in vec(select(vec!["accept", "authorization", "x-api-key", "host", "x-other"]), 0..6),
            is_sensitive in any::<bool>(),
            owner in select(&OWNERS[..]),
            has_key in any::<bool>(),
            has_jwt in any::<bool>(),
        ) {
            let mut headers = HeaderMap::new();
            for name in names {
                let mut value = HeaderValue::from_static("inbound");
                value.set_sensitive(is_sensitive);
                headers.append(name, value);
            }
            let before = headers.clone();
            HeaderPlan::new(owner, &sent(has_key, has_jwt)).write(&mut headers).unwrap();

            let key_as_bearer = has_key && (owner == Owner::KeyAsBearer || owner == Owner::Both && !has_jwt);
            let key_alone = has_key && (owner == Owner::KeyAsXApiKey || owner == Owner::Both && has_jwt);
            let jwt = has_jwt && matches!(owner, Owner::Jwt | Owner::Both);
            let bearer = if jwt { Some(&b"Bearer a.b.c"[..]) } else { key_as_bearer.then_some(&b"Bearer sk-selam-example"[..]) };
            for (name, is_owned, value) in [
                (AUTHORIZATION, owner.owns_authorization(), bearer),
                (X_API_KEY, owner.owns_x_api_key(), key_alone.then_some(&b"sk-selam-example"[..])),
            ] {
                let expected = if is_owned { value.into_iter().collect() } else { values(&before, &name) };
                prop_assert_eq!(values(&headers, &name), expected);
                prop_assert!(value.is_none() || headers[&name].is_sensitive());
                headers.remove(name);
            }
            let mut others = before;
            others.remove(AUTHORIZATION);
            others.remove(X_API_KEY);
            prop_assert_eq!(headers, others);
        }
    }

    /// H3
    #[test]
    fn connection_cannot_remove_what_is_written() {
        for (owner, connection, kept) in [
            (Owner::Both, "Authorization, keep-alive, x-api-key", Some("keep-alive")),
            (Owner::Both, "X-API-Key", None),
            (Owner::Jwt, "x-api-key, authorization", Some("x-api-key")),
            (Owner::KeyAsXApiKey, "x-api-key, authorization", Some("authorization")),
            (Owner::Both, "upgrade, close", Some("upgrade, close")),
        ] {
            let mut headers = HeaderMap::from_iter([(CONNECTION, HeaderValue::from_static(connection))]);
            HeaderPlan::new(owner, &sent(true, true)).write(&mut headers).unwrap();
            assert_eq!(headers.get(CONNECTION).map(|value| value.to_str().unwrap()), kept, "{connection}");
        }
    }

    /// H1: half a pair is never written.
    #[test]
    fn a_full_header_map_is_refused() {
        let mut headers = HeaderMap::new();
        let fill = |headers: &mut HeaderMap, number: usize| {
            let name: HeaderName = format!("x-{number}").parse().unwrap();
            headers.try_insert(name, HeaderValue::from_static("")).is_ok()
        };
        let room = (0..).find(|number| !fill(&mut headers, *number)).unwrap();
        assert!(room > 1_000);
        for removed in [None, Some("x-0")] {
            if let Some(removed) = removed {
                headers.remove(removed);
            }
            let error = HeaderPlan::new(Owner::Both, &sent(true, true)).write(&mut headers).unwrap_err();
            assert_eq!(error.kind(), AuthErrorKind::InvalidRequest);
            assert!(!headers.contains_key(AUTHORIZATION) && !headers.contains_key(X_API_KEY));
        }
    }
}
