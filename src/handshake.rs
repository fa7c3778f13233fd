//! The voice agent's WebSocket handshake, the one request with credentials in its query: `token` and `api_key`.

use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, Uri,
    header::{CONNECTION, UPGRADE},
    uri::PathAndQuery,
};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use zeroize::Zeroizing;

use crate::{
    credentials::Credentials,
    error::{AuthError, AuthErrorKind},
};

/// Everything but the unreserved characters of
/// [RFC 3986 section 2.3](https://www.rfc-editor.org/rfc/rfc3986#section-2.3).
pub(crate) const QUERY_VALUE: &AsciiSet =
    &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// `uri` with the credentials in its query, in place of any that it came with.
pub(crate) fn with_query(
    uri: &Uri,
    headers: &HeaderMap,
    credentials: &Credentials,
) -> Result<Uri, AuthError> {
    if !is_websocket(headers) {
        return Err(invalid("credentials go into the query of a WebSocket handshake only, and this is none"));
    }
    let token = credentials.jwt().map(|jwt| ("token", jwt.expose_secret()));
    let api_key = credentials.api_key().map(|key| ("api_key", key.expose_secret()));
    let ours = || token.into_iter().chain(api_key);

    let kept = params(uri).filter(|param| {
        let (name, _) = param.split_once('=').unwrap_or((param, ""));
        !ours().any(|(ours, _)| percent_decode_str(name).eq(ours.bytes()))
    });
    let mut query = Query::with_capacity(uri, ours().map(|(_, secret)| secret.len()).sum());
    kept.for_each(|param| query.push([param]));
    for (name, secret) in ours() {
        query.push([name, "="].into_iter().chain(utf8_percent_encode(secret, QUERY_VALUE)));
    }
    query.into_uri(uri).ok_or_else(|| invalid("the URI is too long with credentials in its query"))
}

/// `uri` without query parameters that hold one of the credentials; `None` when it has none.
pub(crate) fn without_secrets(uri: &Uri, credentials: &Credentials) -> Option<Uri> {
    let is_secret = |param: &&str| {
        let (_, value) = param.split_once('=').unwrap_or(("", param));
        credentials.secrets().any(|secret| percent_decode_str(value).eq(secret.expose().bytes()))
    };
    params(uri).find(is_secret)?;
    let mut query = Query::with_capacity(uri, 0);
    params(uri).filter(|param| !is_secret(param)).for_each(|param| query.push([param]));
    query.into_uri(uri)
}

/// [RFC 6455 section 4.1](https://www.rfc-editor.org/rfc/rfc6455#section-4.1).
fn is_websocket(headers: &HeaderMap) -> bool {
    let names = |name: HeaderName, option: &str| {
        let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|value| value.trim().eq_ignore_ascii_case(option))
    };
    names(CONNECTION, "upgrade") && names(UPGRADE, "websocket")
}

fn params(uri: &Uri) -> impl Iterator<Item = &str> {
    uri.query().unwrap_or_default().split('&').filter(|param| !param.is_empty())
}

#[cold]
fn invalid(detail: &'static str) -> AuthError {
    AuthError::local(AuthErrorKind::InvalidRequest, detail)
}

/// A path and query in the making, wiped like every other buffer that holds a secret.
struct Query {
    text: Zeroizing<Vec<u8>>,
    separator: &'static str,
}

impl Query {
    /// For `uri` with secrets of so many bytes: all it can grow to, as growing leaves copies behind.
    fn with_capacity(uri: &Uri, secrets: usize) -> Self {
        let own = uri.path_and_query().map_or(0, |path| path.as_str().len());
        let mut text = Zeroizing::new(Vec::with_capacity(own + "?token=&api_key=".len() + 3 * secrets));
        text.extend_from_slice(uri.path().as_bytes());
        Self { text, separator: "?" }
    }

    fn push<'a>(&mut self, parts: impl IntoIterator<Item = &'a str>) {
        self.text.extend_from_slice(self.separator.as_bytes());
        self.separator = "&";
        parts.into_iter().for_each(|part| self.text.extend_from_slice(part.as_bytes()));
    }

    fn into_uri(self, uri: &Uri) -> Option<Uri> {
        let mut parts = uri.clone().into_parts();
        parts.path_and_query = Some(PathAndQuery::from_maybe_shared(Bytes::from_owner(self.text)).ok()?);
        Uri::from_parts(parts).ok()
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;
    use crate::{ApiKey, Token};

    fn credentials(key: &str, jwt: &str) -> Credentials {
        Credentials::key_and_jwt(ApiKey::new(key).unwrap(), Token::new(jwt).unwrap())
    }

    fn upgrade(connection: &'static str, upgrade: &'static str) -> HeaderMap {
        HeaderMap::from_iter([
            (CONNECTION, HeaderValue::from_static(connection)),
            (UPGRADE, HeaderValue::from_static(upgrade)),
        ])
    }

    fn write(uri: &str) -> String {
        let uri = uri.parse().unwrap();
        let headers = upgrade("keep-alive, Upgrade", "WebSocket");
        with_query(&uri, &headers, &credentials("sk-selam-k", "a+b/c=")).unwrap().to_string()
    }

    #[test]
    fn credentials_are_percent_encoded_beside_what_is_there() {
        for (uri, expected) in [
            ("wss://h/v1/audio/agent", "wss://h/v1/audio/agent?token=a%2Bb%2Fc%3D&api_key=sk-selam-k"),
            ("wss://h", "wss://h/?token=a%2Bb%2Fc%3D&api_key=sk-selam-k"),
            ("wss://h/?voice=a%20b", "wss://h/?voice=a%20b&token=a%2Bb%2Fc%3D&api_key=sk-selam-k"),
            (
                "wss://h/?token=theirs&x=1&api_key=theirs&token&%74oken=theirs&tokens=2",
                "wss://h/?x=1&tokens=2&token=a%2Bb%2Fc%3D&api_key=sk-selam-k",
            ),
        ] {
            assert_eq!(write(uri), expected);
        }
    }

    #[test]
    fn anything_but_a_websocket_handshake_is_refused() {
        let uri = "wss://h/".parse().unwrap();
        for headers in [
            HeaderMap::new(),
            upgrade("close", "websocket"),
            upgrade("upgrade", "h2c"),
            upgrade("upgrades", "websocket"),
        ] {
            let error = with_query(&uri, &headers, &credentials("k", "j")).unwrap_err();
            assert_eq!(error.kind(), AuthErrorKind::InvalidRequest);
        }
        let long = format!("/{}", "a".repeat(65_500)).parse().unwrap();
        let error = with_query(&long, &upgrade("upgrade", "websocket"), &credentials(&"k".repeat(99), "j"));
        assert_eq!(error.unwrap_err().kind(), AuthErrorKind::InvalidRequest);
    }

    #[test]
    fn only_parameters_that_hold_a_secret_are_taken_off() {
        let strip = |uri: &str| {
            without_secrets(&uri.parse().unwrap(), &credentials("sk-k", "a+b")).map(|uri| uri.to_string())
        };
        assert_eq!(strip("https://h/p?token=theirs"), None);
        assert_eq!(strip("https://h/p"), None);
        assert_eq!(strip("https://h/p?token=a%2Bb&x=1&q=sk-k").as_deref(), Some("https://h/p?x=1"));
        assert_eq!(strip("https://h/p?sk-k").as_deref(), Some("https://h/p"));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(key in "[!#-&(-~]{1,40}", jwt in "[!#-&(-~]{1,40}", query in "[a-z=&%0-9]{0,20}") {
            let uri: Uri = format!("wss://h/p?{query}").parse().unwrap();
            let set = credentials(&key, &jwt);
            let written = with_query(&uri, &upgrade("upgrade", "websocket"), &set).unwrap();
            let value = |name: &str| {
                let mut found = params(&written).filter_map(|param| param.split_once('=')).filter(|(n, _)| *n == name);
                let value = percent_decode_str(found.next().unwrap().1).decode_utf8().unwrap().into_owned();
                assert!(found.next().is_none());
                value
            };
            prop_assert_eq!(value("token"), jwt);
            prop_assert_eq!(value("api_key"), key);
            let stripped = without_secrets(&written, &set).unwrap().to_string();
            prop_assert!(!stripped.contains("token=") || query.contains("token="));
        }
    }
}
