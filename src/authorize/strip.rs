//! Takes our credentials out of a request to somewhere that may not have them.

use std::{
    collections::VecDeque,
    iter::successors,
    sync::{Mutex, MutexGuard, PoisonError},
};

use http::{HeaderMap, Uri, header::REFERER};
use percent_encoding::percent_decode;
use zeroize::Zeroizing;

use crate::{
    credential::Credentials,
    credential::{Fingerprint, MIN_SECRET},
    error::{AuthError, AuthErrorKind},
    util::query::{Query, params},
};

/// So many times a secret may have been percent-encoded: in a query, in a URL in a query, and once more.
const ENCODED: usize = 3;

/// So many of those that were replaced are remembered.
const FORMER: usize = 16;

/// What may not go along: what there is, and what there was.
#[derive(Clone, Copy)]
pub(crate) struct Secrets<'a>(pub(crate) [Option<&'a Credentials>; 2], pub(crate) Option<&'a Former>);

/// Secrets that were replaced, by their fingerprints: what was sent of them may come back, and they themselves are wiped.
#[derive(Default)]
pub(crate) struct Former(Mutex<VecDeque<Fingerprint>>);

impl Former {
    pub(crate) fn remember(&self, former: Fingerprint) {
        let mut all = self.all();
        if !all.contains(&former) {
            all.truncate(FORMER - 1);
            all.push_front(former);
        }
    }

    /// Whether one stands in `text` by itself, as a parameter or a part of a path does, and percent-encoded or not.
    fn are_in(&self, text: &[u8]) -> bool {
        let all = self.all();
        !all.is_empty()
            && text.split(|byte| b"&=?#/;, ".contains(byte)).any(|part| {
                decodings(part).any(|part| part.len() >= MIN_SECRET && all.contains(&Fingerprint::of(&part)))
            })
    }

    fn all(&self) -> MutexGuard<'_, VecDeque<Fingerprint>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `text`, and what comes of decoding it time and again.
fn decodings(text: &[u8]) -> impl Iterator<Item = Zeroizing<Vec<u8>>> {
    let first = Some(Zeroizing::new(text.to_vec()));
    let next = |text: &Zeroizing<Vec<u8>>| {
        // What comes of it is never longer, so this does not grow and leave copies behind.
        let mut decoded = Zeroizing::new(Vec::with_capacity(text.len()));
        decoded.extend(percent_decode(text));
        (*decoded != **text).then_some(decoded)
    };
    successors(first, next).take(ENCODED + 1)
}

impl Secrets<'_> {
    /// `uri` without the query parameters that hold one of them; `None` when it is clean as it is.
    ///
    /// One in the path cannot be taken out and is an error.
    pub(crate) fn uri_without(self, uri: &Uri) -> Result<Option<Uri>, AuthError> {
        let refused = || {
            let detail = "the URI holds a credential, and its origin is not one that may have it";
            AuthError::local(AuthErrorKind::OriginNotAllowed, detail)
        };
        if self.are_in(uri.path().as_bytes()) {
            return Err(refused());
        }
        if !params(uri).any(|param| self.are_in(param.as_bytes())) {
            return Ok(None);
        }
        let mut query = Query::with_capacity(uri, 0);
        params(uri).filter(|param| !self.are_in(param.as_bytes())).for_each(|param| query.push([param]));
        query.into_uri(uri).map(Some).ok_or_else(refused)
    }

    pub(crate) fn are_in_referer(self, headers: &HeaderMap) -> bool {
        headers.get_all(REFERER).iter().any(|referer| self.are_in(referer.as_bytes()))
    }

    fn are_in(self, text: &[u8]) -> bool {
        decodings(text).any(|text| self.are_in_plain(&text))
    }

    fn are_in_plain(self, text: &[u8]) -> bool {
        let mut secrets = self.0.into_iter().flatten().flat_map(Credentials::secrets);
        secrets.any(|secret| {
            let secret = secret.expose().as_bytes();
            secret.len() >= MIN_SECRET && text.windows(secret.len()).any(|window| window == secret)
        }) || self.1.is_some_and(|former| former.are_in(text))
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;
    use crate::{ApiKey, Token};

    fn credentials() -> Credentials {
        Credentials::key_and_jwt(ApiKey::new("sk-key").unwrap(), Token::new("jw+t").unwrap())
    }

    #[test]
    fn parameters_that_hold_a_secret_are_taken_off_and_no_others() {
        let credentials = credentials();
        let strip = |uri: &str| {
            let stripped = Secrets([Some(&credentials), None], None).uri_without(&uri.parse().unwrap());
            stripped.unwrap().map(|uri| uri.to_string())
        };
        assert_eq!(strip("https://h/p?token=theirs"), None);
        assert_eq!(strip("https://h/p"), None);
        for (uri, expected) in [
            ("https://h/p?token=jw%2Bt&x=1&q=sk-key", "https://h/p?x=1"),
            ("https://h/p?sk-key", "https://h/p"),
            ("https://h/p?a=Bearer%20sk-key&x=1", "https://h/p?x=1"),
            ("https://h/?x=1&next=https%3A%2F%2Fa%2F%3Ftoken%3Djw%252Bt", "https://h/?x=1"),
            ("https://h/?x=1&%73k-key=2", "https://h/?x=1"),
        ] {
            assert_eq!(strip(uri).as_deref(), Some(expected));
        }
    }

    #[test]
    fn o4_one_that_was_replaced_is_known_by_its_fingerprint() {
        let former = Former::default();
        let secrets = Secrets([None, None], Some(&former));
        let strip =
            |uri: &str| secrets.uri_without(&uri.parse().unwrap()).unwrap().map(|uri| uri.to_string());
        assert_eq!(strip("https://h/p?token=a+b/c%3D"), None);
        former.remember(Fingerprint::of(b"a+b/c="));
        for (uri, expected) in [
            ("https://h/p?token=a%2Bb%2Fc%3D&x=1", "https://h/p?x=1"),
            ("https://h/?x=1&next=https%3A%2F%2Fa%2F%3Ftoken%3Da%252Bb%252Fc%253D%26y", "https://h/?x=1"),
        ] {
            assert_eq!(strip(uri).as_deref(), Some(expected));
        }
        for number in 0..20 {
            former.remember(Fingerprint::of(format!("sk-{number}").as_bytes()));
        }
        assert_eq!(strip("https://h/p?token=a%2Bb%2Fc%3D"), None, "so many are remembered");
        assert_eq!(strip("https://h/p?q=Bearer%20sk-4&x").as_deref(), Some("https://h/p?x"));
        assert!(secrets.uri_without(&"https://h/sk-19/p".parse().unwrap()).is_err());
    }

    #[test]
    fn one_in_the_path_is_refused() {
        let credentials = credentials();
        let secrets = Secrets([None, Some(&credentials)], None);
        for uri in ["https://h/p/sk-key", "https://h/p/jw%2Bt?x=1", "https://h/p/jw%252Bt"] {
            let refused = secrets.uri_without(&uri.parse().unwrap()).unwrap_err();
            assert_eq!(refused.kind(), AuthErrorKind::OriginNotAllowed);
            assert!(!format!("{refused} {refused:?}").contains("jw"));
        }
    }

    #[test]
    fn one_in_any_referer_is_found() {
        let credentials = credentials();
        let found = |referers: &[&[u8]]| {
            let mut headers = HeaderMap::new();
            for referer in referers {
                headers.append(REFERER, HeaderValue::from_bytes(referer).unwrap());
            }
            Secrets([Some(&credentials), None], None).are_in_referer(&headers)
        };
        assert!(found(&[b"https://a.example/?token=jw%2Bt"]));
        assert!(found(&[b"https://a.example/", b"not a \xff uri sk-key"]));
        assert!(!found(&[b"https://a.example/"]));
    }
}
