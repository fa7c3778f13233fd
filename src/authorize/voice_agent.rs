//! The voice agent's requests: credentials as the query parameters `token` and `api_key`.

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

/// The URI of `request` with the credentials in its query, where they replace parameters of the same names.
pub(super) fn with_query<B>(request: &Request<B>, sent: &Sent) -> Result<Uri, AuthError> {
    if !is_engine_io(request) {
        return Err(invalid(
            "credentials go into the query of a request of Engine.IO only, and this is not one: `/socket.io/?EIO=4&transport=…`",
        ));
    }
    let uri = request.uri();
    let token = sent.jwt.as_ref().map(|jwt| ("token", jwt.credential.expose_secret()));
    let api_key = sent.api_key.as_ref().map(|key| ("api_key", key.credential.expose_secret()));
    let credentials = || token.into_iter().chain(api_key);

    let kept = params(uri).filter(|param| !credentials().any(|(replaced, _)| is_named(param, replaced)));
    let mut query = Query::with_capacity(uri, credentials().map(|(_, secret)| secret.len()).sum());
    kept.for_each(|param| query.push([param]));
    for (name, secret) in credentials() {
        query.push([name, "="].into_iter().chain(utf8_percent_encode(secret, QUERY_VALUE)));
    }
    query.into_uri(uri).ok_or_else(|| invalid("the URI is too long with credentials in its query"))
}

/// Whether this is a request of an [Engine.IO](https://socket.io/docs/v4/engine-io-protocol/) client: one that polls, or a
/// WebSocket handshake.
fn is_engine_io<B>(request: &Request<B>) -> bool {
    let uri = request.uri();
    let only = |name: &str| {
        let mut found = params(uri).filter(|param| is_named(param, name));
        let (_, value) = found.next()?.split_once('=')?;
        found.next().is_none().then_some(value)
    };
    let is_transport = match only("transport") {
        Some("polling") => matches!(*request.method(), Method::GET | Method::POST),
        Some("websocket") => request.method() == Method::GET && is_websocket(request.headers()),
        _ => false,
    };
    is_transport && matches!(only("EIO"), Some("3" | "4")) && uri.path().ends_with("/socket.io/")
}

/// Whether the name of this parameter is `name` once it is decoded.
fn is_named(param: &str, name: &str) -> bool {
    let (found, _) = param.split_once('=').unwrap_or((param, ""));
    percent_decode_str(found).eq(name.bytes())
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
    use proptest::{prelude::*, sample::select};

    use super::*;
    use crate::{ApiKey, Credentials, Token};

    const POLL: &str = "https://h/socket.io/?EIO=4&transport=polling";

    fn credentials(key: &str, jwt: &str) -> Credentials {
        Credentials::key_and_jwt(ApiKey::new(key).unwrap(), Token::new(jwt).unwrap())
    }

    fn upgrade(connection: &'static str, upgrade: &'static str) -> HeaderMap {
        HeaderMap::from_iter([
            (CONNECTION, HeaderValue::from_static(connection)),
            (UPGRADE, HeaderValue::from_static(upgrade)),
        ])
    }

    fn with(method: &Method, uri: &str, headers: &HeaderMap, set: &Credentials) -> Result<Uri, AuthError> {
        let mut request = Request::builder().method(method).uri(uri).body(()).unwrap();
        *request.headers_mut() = headers.clone();
        with_query(&request, &Sent::from(set))
    }

    fn written(method: &Method, uri: &str, headers: &HeaderMap) -> Result<String, AuthErrorKind> {
        let written = with(method, uri, headers, &credentials("sk-selam-k", "a+b/c="));
        written.map(|uri| uri.to_string()).map_err(|error| error.kind())
    }

    #[test]
    fn credentials_are_appended_percent_encoded() {
        let ours = "token=a%2Bb%2Fc%3D&api_key=sk-selam-k";
        for (query, kept) in [
            ("EIO=4&transport=polling", "EIO=4&transport=polling"),
            ("EIO=4&transport=polling&voice=a%20b&sid=x", "EIO=4&transport=polling&voice=a%20b&sid=x"),
            (
                "token=theirs&x=1&api_key=theirs&token&%74oken=theirs&tokens=2&EIO=3&%74ransport=polling",
                "x=1&tokens=2&EIO=3&%74ransport=polling",
            ),
        ] {
            for method in [Method::GET, Method::POST] {
                let uri = written(&method, &format!("https://h/socket.io/?{query}"), &HeaderMap::new());
                assert_eq!(uri.unwrap(), format!("https://h/socket.io/?{kept}&{ours}"), "{method}");
            }
        }
        let socket = "wss://h/gateway/socket.io/?EIO=4&transport=websocket";
        let uri = written(&Method::GET, socket, &upgrade("keep-alive, Upgrade", "WebSocket"));
        assert_eq!(uri.unwrap(), format!("{socket}&{ours}"));
    }

    #[test]
    fn other_requests_are_refused() {
        let refused = Err(AuthErrorKind::InvalidRequest);
        let (none, websocket) = (HeaderMap::new(), upgrade("upgrade", "websocket"));
        for uri in [
            "https://h/",
            "https://h/v1/audio/agent?voice=x",
            "https://h/v1/audio/agent?EIO=4&transport=polling",
            "https://h/socket.io?EIO=4&transport=polling",
            "https://h/socket.io/",
            "https://h/socket.io/?EIO=4",
            "https://h/socket.io/?transport=polling",
            "https://h/socket.io/?EIO=5&transport=polling",
            "https://h/socket.io/?EIO=4&transport=webtransport",
            "https://h/socket.io/?EIO=4&transport=polling&transport=polling",
            "https://h/socket.io/?EIO=4&EIO=4&transport=polling",
            "https://h/socket.io/?EIO=4&transport=polling&transpor%74",
        ] {
            for headers in [&none, &websocket] {
                assert_eq!(written(&Method::GET, uri, headers), refused, "{uri}");
            }
        }
        for method in [Method::HEAD, Method::PUT, Method::OPTIONS, Method::DELETE] {
            assert_eq!(written(&method, POLL, &none), refused, "{method}");
        }
        let socket = "wss://h/socket.io/?EIO=4&transport=websocket";
        for headers in [
            none.clone(),
            upgrade("close", "websocket"),
            upgrade("upgrade", "h2c"),
            upgrade("upgrades", "websocket"),
        ] {
            assert_eq!(written(&Method::GET, socket, &headers), refused, "{headers:?}");
        }
        assert_eq!(written(&Method::POST, socket, &websocket), refused);
        let long = format!("{POLL}&x={}", "a".repeat(65_450));
        let error = with(&Method::GET, &long, &none, &credentials(&"k".repeat(99), "j")).unwrap_err();
        assert_eq!(error.kind(), AuthErrorKind::InvalidRequest);
    }

    proptest! {
        #[test]
        fn written_credentials_are_read_back(
            key in "[!#-&(-~]{1,40}",
            jwt in "[!#-&(-~]{1,40}",
            query in "[a-z=&%0-9]{0,20}",
            method in select(vec![Method::GET, Method::POST]),
        ) {
            let uri = format!("{POLL}&{query}");
            let set = credentials(&key, &jwt);
            let written = with(&method, &uri, &HeaderMap::new(), &set).unwrap();
            let value = |name: &str| {
                let mut found = params(&written).filter_map(|param| param.split_once('=')).filter(|(n, _)| *n == name);
                let value = percent_decode_str(found.next().unwrap().1).decode_utf8().unwrap().into_owned();
                assert!(found.next().is_none());
                value
            };
            prop_assert_eq!(value("token"), jwt);
            prop_assert_eq!(value("api_key"), key);
            prop_assert_eq!(value("transport"), "polling");
        }

        /// No credential is written into a request that an Engine.IO client would not send.
        #[test]
        fn arbitrary_requests_are_refused(
            path in "(/[a-z.]{0,9}){0,3}",
            query in "[a-zEIO=&%0-9]{0,40}",
            method in select(vec![Method::GET, Method::POST, Method::PUT, Method::HEAD]),
            is_websocket in any::<bool>(),
        ) {
            let uri: Uri = format!("https://h{path}?{query}").parse().unwrap();
            prop_assume!(!path.ends_with("/socket.io/") || !query.contains("EIO"));
            let headers = if is_websocket { upgrade("upgrade", "websocket") } else { HeaderMap::new() };
            prop_assert_eq!(written(&method, &uri.to_string(), &headers), Err(AuthErrorKind::InvalidRequest));
        }
    }
}
