//! Removes credentials from a request to an origin that is not allowed to receive them.

use std::iter::successors;

use http::{
    HeaderMap, Uri,
    header::{AUTHORIZATION, REFERER},
};
use percent_encoding::percent_decode;
use zeroize::Zeroizing;

use super::headers::{Owner, X_API_KEY};
use crate::{
    AuthError, AuthErrorKind,
    credential::{Fingerprint, Secret},
    error::{MIN_SECRET, Redactor},
    util::query::{Query, params},
};

/// How often a secret may have been percent-encoded: in a query, in a URL in a query, and once more.
const MAX_ENCODINGS: usize = 3;

/// Secrets that may not leave with a request.
#[derive(Default)]
pub(super) struct Secrets {
    current: Vec<Secret>,
    /// Secrets that were replaced. They are wiped, but a redirect may bring back a URL that one of them was sent in.
    replaced: Vec<Fingerprint>,
}

/// Removes the headers that a layer owns, and `Referer` if it contains a secret.
#[cold]
pub(super) fn remove_headers(headers: &mut HeaderMap, owner: Owner, secrets: &Secrets) {
    if owner.owns_authorization() {
        headers.remove(AUTHORIZATION);
    }
    if owner.owns_x_api_key() {
        headers.remove(X_API_KEY);
    }
    if headers.get_all(REFERER).iter().any(|referer| secrets.are_in(referer.as_bytes())) {
        headers.remove(REFERER);
    }
}

impl Secrets {
    pub(super) fn extend_current(&mut self, secrets: impl IntoIterator<Item = Secret>) {
        self.current.extend(secrets);
    }

    pub(super) fn extend_replaced(&mut self, fingerprints: impl IntoIterator<Item = Fingerprint>) {
        self.replaced.extend(fingerprints);
    }

    /// `uri` without the query parameters that contain a secret; `None` if there are none.
    ///
    /// # Errors
    ///
    /// When the path contains a secret, which cannot be removed.
    pub(super) fn uri_without(&self, uri: &Uri) -> Result<Option<Uri>, AuthError> {
        let refused = || {
            let detail = "the URI contains a credential, and its origin is not allowed to receive it";
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

    /// Whether `text` contains one of the secrets or a part of it, encoded or not.
    fn are_in(&self, text: &[u8]) -> bool {
        let current = Redactor::masking_only(self.current.iter().map(Secret::expose));
        !current.find(text).is_empty() || decodings(text).any(|text| self.has_replaced(&text))
    }

    /// A replaced secret is known by its fingerprint only, so it is found where it is a whole parameter or path segment.
    fn has_replaced(&self, text: &[u8]) -> bool {
        !self.replaced.is_empty()
            && text.split(|byte| b"&=?#/;, ".contains(byte)).any(|part| {
                decodings(part)
                    .any(|part| part.len() >= MIN_SECRET && self.replaced.contains(&Fingerprint::of(&part)))
            })
    }
}

/// `text`, and the results of percent-decoding it repeatedly.
fn decodings(text: &[u8]) -> impl Iterator<Item = Zeroizing<Vec<u8>>> {
    let first = Some(Zeroizing::new(text.to_vec()));
    let next = |text: &Zeroizing<Vec<u8>>| {
        // Decoding never lengthens a text, so this does not reallocate and leave copies behind.
        let mut decoded = Zeroizing::new(Vec::with_capacity(text.len()));
        decoded.extend(percent_decode(text));
        (*decoded != **text).then_some(decoded)
    };
    successors(first, next).take(MAX_ENCODINGS + 1)
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;
    use crate::{ApiKey, Token};

    fn secrets() -> Secrets {
        let current = vec![ApiKey::new("sk-key").unwrap().0, Token::new("jw+t").unwrap().0];
        Secrets { current, replaced: Vec::new() }
    }

    fn strip(secrets: &Secrets, uri: &str) -> Option<String> {
        secrets.uri_without(&uri.parse().unwrap()).unwrap().map(|uri| uri.to_string())
    }

    /// O4
    #[test]
    fn parameters_with_a_secret_are_removed() {
        let secrets = secrets();
        assert_eq!(strip(&secrets, "https://h/p?token=theirs"), None);
        assert_eq!(strip(&secrets, "https://h/p"), None);
        for (uri, expected) in [
            ("https://h/p?token=jw%2Bt&x=1&q=sk-key", "https://h/p?x=1"),
            ("https://h/p?sk-key", "https://h/p"),
            ("https://h/p?a=Bearer%20sk-key&x=1", "https://h/p?x=1"),
            ("https://h/?x=1&next=https%3A%2F%2Fa%2F%3Ftoken%3Djw%252Bt", "https://h/?x=1"),
            ("https://h/?x=1&%73k-key=2", "https://h/?x=1"),
            ("https://h/?x=1&q=c2sta2V5", "https://h/?x=1"),
        ] {
            assert_eq!(strip(&secrets, uri).as_deref(), Some(expected));
        }
    }

    /// O4
    #[test]
    fn replaced_secrets_are_removed() {
        let mut secrets = Secrets::default();
        assert_eq!(strip(&secrets, "https://h/p?token=a+b/c%3D"), None);
        secrets.extend_replaced([Fingerprint::of(b"a+b/c="), Fingerprint::of(b"sk-4")]);
        for (uri, expected) in [
            ("https://h/p?token=a%2Bb%2Fc%3D&x=1", "https://h/p?x=1"),
            ("https://h/?x=1&next=https%3A%2F%2Fa%2F%3Ftoken%3Da%252Bb%252Fc%253D%26y", "https://h/?x=1"),
            ("https://h/p?q=Bearer%20sk-4&x", "https://h/p?x"),
        ] {
            assert_eq!(strip(&secrets, uri).as_deref(), Some(expected));
        }
        assert!(secrets.uri_without(&"https://h/sk-4/p".parse().unwrap()).is_err());
    }

    /// O4
    #[test]
    fn a_secret_in_the_path_is_refused() {
        let secrets = secrets();
        for uri in ["https://h/p/sk-key", "https://h/p/jw%2Bt?x=1", "https://h/p/jw%252Bt"] {
            let error = secrets.uri_without(&uri.parse().unwrap()).unwrap_err();
            assert_eq!(error.kind(), AuthErrorKind::OriginNotAllowed);
            assert!(!format!("{error} {error:?}").contains("jw"));
        }
    }

    /// O4
    #[test]
    fn a_secret_in_any_referer_is_found() {
        let secrets = secrets();
        let is_removed = |referers: &[&[u8]]| {
            let mut headers = HeaderMap::new();
            for referer in referers {
                headers.append(REFERER, HeaderValue::from_bytes(referer).unwrap());
            }
            remove_headers(&mut headers, Owner::Both, &secrets);
            headers.is_empty()
        };
        assert!(is_removed(&[b"https://a.example/?token=jw%2Bt"]));
        assert!(is_removed(&[b"https://a.example/", b"not a \xff uri sk-key"]));
        assert!(!is_removed(&[b"https://a.example/"]));
    }
}
