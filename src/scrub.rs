//! Takes our credentials out of a request to somewhere that may not have them.

use http::{HeaderMap, Uri, header::REFERER};
use percent_encoding::percent_decode;
use zeroize::Zeroizing;

use crate::{
    credentials::Credentials,
    error::{AuthError, AuthErrorKind},
    query::{Query, params},
    secret::MIN_SECRET,
};

/// So many times a secret may have been percent-encoded: in a query, in a URL in a query, and once more.
const ENCODED: usize = 3;

/// What may not go along.
#[derive(Clone, Copy)]
pub(crate) struct Secrets<'a>(pub(crate) [Option<&'a Credentials>; 2]);

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
        // What comes of decoding is never longer, so this does not grow and leave copies behind.
        let mut text = Zeroizing::new(text.to_vec());
        for _ in 0..=ENCODED {
            if self.are_in_plain(&text) {
                return true;
            }
            let mut decoded = Zeroizing::new(Vec::with_capacity(text.len()));
            decoded.extend(percent_decode(&text));
            if *decoded == *text {
                return false;
            }
            text = decoded;
        }
        false
    }

    fn are_in_plain(self, text: &[u8]) -> bool {
        let mut secrets = self.0.into_iter().flatten().flat_map(Credentials::secrets);
        secrets.any(|secret| {
            let secret = secret.expose().as_bytes();
            secret.len() >= MIN_SECRET && text.windows(secret.len()).any(|window| window == secret)
        })
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
            let stripped = Secrets([Some(&credentials), None]).uri_without(&uri.parse().unwrap());
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
    fn one_in_the_path_is_refused() {
        let credentials = credentials();
        let secrets = Secrets([None, Some(&credentials)]);
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
            Secrets([Some(&credentials), None]).are_in_referer(&headers)
        };
        assert!(found(&[b"https://a.example/?token=jw%2Bt"]));
        assert!(found(&[b"https://a.example/", b"not a \xff uri sk-key"]));
        assert!(!found(&[b"https://a.example/"]));
    }
}
