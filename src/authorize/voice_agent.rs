//! The voice agent's WebSocket handshake: credentials as the query parameters `token` and `api_key`.

use http::{
    HeaderMap, HeaderName, Method, Request, Uri,
    header::{CONNECTION, UPGRADE},
};
use percent_encoding::{percent_decode_str, utf8_percent_encode};

use super::sent::Sent;
use crate::{
    AuthError, AuthErrorKind,
    util::query::{QUERY_VALUE, Query, params},
};

/// The URI of the handshake `request` with the credentials in its query, where they replace parameters of the same names.
pub(super) fn with_query<B>(request: &Request<B>, sent: &Sent) -> Result<Uri, AuthError> {
    if request.method() != Method::GET || !is_websocket(request.headers()) {
        return Err(invalid(
            "credentials go into the query of a WebSocket handshake only, and this is not one",
        ));
    }
    let uri = request.uri();
    let token = sent.jwt.as_ref().map(|jwt| ("token", jwt.credential.expose_secret()));
    let api_key = sent.api_key.as_ref().map(|key| ("api_key", key.credential.expose_secret()));
    let credentials = || token.into_iter().chain(api_key);

    let kept = params(uri).filter(|param| {
        let (name, _) = param.split_once('=').unwrap_or((param, ""));
        !credentials().any(|(replaced, _)| percent_decode_str(name).eq(replaced.bytes()))
    });
    let mut query = Query::with_capacity(uri, credentials().map(|(_, secret)| secret.len()).sum());
    kept.for_each(|param| query.push([param]));
    for (name, secret) in credentials() {
        query.push([name, "="].into_iter().chain(utf8_percent_encode(secret, QUERY_VALUE)));
    }
    query.into_uri(uri).ok_or_else(|| invalid("the URI is too long with credentials in its query"))
}

/// [RFC 6455 section 4.1](https://www.rfc-editor.org/rfc/rfc6455#section-4.1).
fn is_websocket(headers: &HeaderMap) -> bool {
    let has_option = |name: HeaderName, option: &str| {
        let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|value| value.trim().eq_ignore_ascii_case(option))
    };
    has_option(CONNECTION, "upgrade") && has_option(UPGRADE, "websocket")
}

#[cold]
fn invalid(detail: &'static str) -> AuthError {
    AuthError::local(AuthErrorKind::InvalidRequest, detail)
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;
    use crate::{ApiKey, Credentials, Token};

    fn credentials(key: &str, jwt: &str) -> Credentials {
        Credentials::key_and_jwt(ApiKey::new(key).unwrap(), Token::new(jwt).unwrap())
    }

    fn upgrade(connection: &'static str, upgrade: &'static str) -> HeaderMap {
        HeaderMap::from_iter([
            (CONNECTION, HeaderValue::from_static(connection)),
            (UPGRADE, HeaderValue::from_static(upgrade)),
        ])
    }

    fn with(method: &Method, uri: &Uri, headers: &HeaderMap, set: &Credentials) -> Result<Uri, AuthError> {
        let mut request = Request::builder().method(method).uri(uri).body(()).unwrap();
        *request.headers_mut() = headers.clone();
        with_query(&request, &Sent::from(set))
    }

    fn write(uri: &str) -> String {
        let uri = uri.parse().unwrap();
        let headers = upgrade("keep-alive, Upgrade", "WebSocket");
        with(&Method::GET, &uri, &headers, &credentials("sk-selam-k", "a+b/c=")).unwrap().to_string()
    }

    #[test]
    fn credentials_are_appended_percent_encoded() {
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
    fn other_requests_are_refused() {
        let uri = "wss://h/".parse().unwrap();
        for headers in [
            HeaderMap::new(),
            upgrade("close", "websocket"),
            upgrade("upgrade", "h2c"),
            upgrade("upgrades", "websocket"),
        ] {
            let error = with(&Method::GET, &uri, &headers, &credentials("k", "j")).unwrap_err();
            assert_eq!(error.kind(), AuthErrorKind::InvalidRequest);
        }
        let upgrade = upgrade("upgrade", "websocket");
        let error = with(&Method::POST, &uri, &upgrade, &credentials("k", "j"));
        assert_eq!(error.unwrap_err().kind(), AuthErrorKind::InvalidRequest);
        let long = format!("/{}", "a".repeat(65_500)).parse().unwrap();
        let error = with(&Method::GET, &long, &upgrade, &credentials(&"k".repeat(99), "j"));
        assert_eq!(error.unwrap_err().kind(), AuthErrorKind::InvalidRequest);
    }

    proptest! {
        #[test]
        fn written_credentials_are_read_back(key in "[!#-&(-~]{1,40}", jwt in "[!#-&(-~]{1,40}", query in "[a-z=&%0-9]{0,20}") {
            let uri: Uri = format!("wss://h/p?{query}").parse().unwrap();
            let set = credentials(&key, &jwt);
            let written = with(&Method::GET, &uri, &upgrade("upgrade", "websocket"), &set).unwrap();
            let value = |name: &str| {
                let mut found = params(&written).filter_map(|param| param.split_once('=')).filter(|(n, _)| *n == name);
                let value = percent_decode_str(found.next().unwrap().1).decode_utf8().unwrap().into_owned();
                assert!(found.next().is_none());
                value
            };
            prop_assert_eq!(value("token"), jwt);
            prop_assert_eq!(value("api_key"), key);
        }
    }
}
