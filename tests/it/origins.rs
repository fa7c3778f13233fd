//! Origin checks through the layers (O1 to O4). The comparison itself is tested in `src/origin`.

use http::Request;
use tower_selam::{
    ApiKeyLayer, AuthErrorKind, BaseUrl, ConfigErrorKind, JwtLayer, Origins, RequestAuth, SelamLayer,
};

use crate::{
    api::counting,
    support::{JWT, KEY, MODELS, get, handshake, jwt, key, send, values},
};

fn with_referer(uri: &str, referer: &str) -> Request<()> {
    let mut request = get(uri);
    request.headers_mut().insert("referer", referer.parse().unwrap());
    request.headers_mut().insert("x-api-key", "theirs".parse().unwrap());
    request.headers_mut().insert("authorization", "theirs".parse().unwrap());
    request
}

/// O1: plain http and URI tricks are refused before anything is sent.
#[tokio::test]
async fn plain_http_and_tricks_are_refused() {
    for (uri, detail) in [
        ("http://api.selamgpt.com/v1", "credentials are not sent over plain http: http://api.selamgpt.com"),
        ("ws://api.selamgpt.com/v1", "credentials are not sent over plain http: http://api.selamgpt.com"),
        ("http://127.0.0.1:8080/", "credentials are not sent over plain http: http://127.0.0.1:8080"),
        ("https://evil.com/", "credentials are not sent to https://evil.com"),
        ("https://api.selamgpt.com@evil.com/", "the URI has an unsupported scheme, user information"),
        ("ftp://api.selamgpt.com/", "the URI has an unsupported scheme, user information"),
    ] {
        let refused =
            send(&(JwtLayer::new(jwt()), ApiKeyLayer::x_api_key(key())), get(uri)).await.unwrap_err();
        assert_eq!(refused.kind(), AuthErrorKind::OriginNotAllowed, "{uri}");
        assert!(refused.is_permanent() && !refused.is_auth() && refused.remedy().is_some());
        assert!(refused.to_string().contains(detail), "{refused}");
    }
}

/// O1: http to loopback needs the opt-in, and no other host passes.
#[tokio::test]
async fn loopback_needs_the_opt_in() {
    let base = BaseUrl::allow_insecure_loopback("http://127.0.0.1:8080/v1").unwrap();
    let selam = SelamLayer::builder().with_api_key(key()).with_base_url(base).build().unwrap();
    assert!(send(&selam, get("http://127.0.0.1:8080/v1/models")).await.is_ok());
    for other in ["http://127.0.0.1.evil.com:8080/", "http://localhost:8080/", "http://127.0.0.1:8081/"] {
        assert!(send(&selam, get(other)).await.is_err(), "{other}");
    }
}

/// O1: a stack whose base URL is not an allowed origin is not built.
#[test]
fn the_base_url_must_be_allowed() {
    let builder = SelamLayer::builder().with_api_key(key());
    let gateway = || BaseUrl::new("https://gateway.example/v1").unwrap();
    let error = builder.clone().with_base_url(gateway()).with_origins(Origins::selam()).build().unwrap_err();
    assert_eq!(error.kind(), &ConfigErrorKind::NotAllowed);
    let both = Origins::selam().with_origin("https://gateway.example").unwrap();
    assert!(builder.with_base_url(gateway()).with_origins(both).build().is_ok());
}

/// O2: in strip mode, other origins get the request without credentials.
#[tokio::test]
async fn strip_mode_removes_credentials() {
    let origins = Origins::selam().strip_for_other_origins();
    let layer = (
        JwtLayer::new(jwt()).with_origins(origins.clone()),
        ApiKeyLayer::x_api_key(key()).with_origins(origins.clone()),
    );
    for uri in [
        "https://evil.com/a?b=c",
        "http://api.selamgpt.com/",
        "https://api.selamgpt.com:8443/",
        "https://api.selamgpt.com@evil.com/",
    ] {
        for request in [get(uri), with_referer(uri, "https://api.selamgpt.com/page?x=1")] {
            let had_referer = request.headers().contains_key("referer");
            let sent = send(&layer, request).await.unwrap();
            assert_eq!(sent.uri(), uri);
            assert!(
                !sent.headers().contains_key("authorization") && !sent.headers().contains_key("x-api-key")
            );
            assert_eq!(sent.headers().contains_key("referer"), had_referer);
        }
    }
    assert_eq!(values(&send(&layer, get("https://api.selamgpt.com/")).await.unwrap(), "x-api-key"), [KEY]);

    // Our credentials are also removed from the query and from `Referer`.
    let leaking = format!("https://api.selamgpt.com/socket.io/?token={JWT}&api_key={KEY}&voice=a");
    let request = with_referer(&leaking.replace("api.selamgpt", "evil"), &leaking);
    let sent = send(&layer, request).await.unwrap();
    assert_eq!(sent.uri(), "https://evil.com/socket.io/?voice=a");
    assert!(sent.headers().is_empty());

    // An anonymous request does not carry them either, wherever it goes.
    for layer in [layer.clone(), (JwtLayer::new(jwt()), ApiKeyLayer::x_api_key(key()))] {
        let mut request = with_referer(&leaking.replace("api.selamgpt", "evil"), &leaking);
        request.extensions_mut().insert(RequestAuth::Anonymous);
        let sent = send(&layer, request).await.unwrap();
        assert_eq!(sent.uri(), "https://evil.com/socket.io/?voice=a");
        assert!(sent.headers().is_empty());
    }

    // Requests that choose their credentials are no exception.
    for choice in [RequestAuth::ApiKey, RequestAuth::VoiceAgent, RequestAuth::ApiKeyAndJwt] {
        let mut request = get("https://evil.com/");
        request.extensions_mut().insert(choice);
        assert!(send(&layer, request).await.unwrap().headers().is_empty());
    }
    let key_alone = ApiKeyLayer::bearer(key()).with_origins(origins);
    assert!(send(&key_alone, with_referer("https://evil.com/", "https://a.example/")).await.is_ok());
}

/// O2: a `Host` header has to name an allowed origin too.
#[tokio::test]
async fn the_host_header_is_checked() {
    let with_host = |uri: &str, hosts: &[&str]| {
        let mut request = get(uri);
        for host in hosts {
            request.headers_mut().append("host", host.parse().unwrap());
        }
        request
    };
    let layer = ApiKeyLayer::bearer(key());
    for host in ["api.selamgpt.com", "API.selamgpt.com.", "api.selamgpt.com:443"] {
        assert!(send(&layer, with_host("https://api.selamgpt.com/", &[host])).await.is_ok(), "{host}");
    }
    for hosts in [
        &["evil.com"][..],
        &["api.selamgpt.com:8443"],
        &["api.selamgpt.com", "evil.com"],
        &[""],
        &["api.selamgpt.com:+443"],
    ] {
        let request = with_host("https://api.selamgpt.com/", hosts);
        let refused = send(&layer, request.clone()).await.unwrap_err();
        assert_eq!(refused.kind(), AuthErrorKind::OriginNotAllowed, "{hosts:?}");
        let strip = layer.clone().with_origins(Origins::selam().strip_for_other_origins());
        assert!(!send(&strip, request).await.unwrap().headers().contains_key("authorization"), "{hosts:?}");
    }
    // An allowed `Host` does not make a forbidden URI acceptable.
    let elsewhere = with_host("https://evil.com/", &["api.selamgpt.com"]);
    assert!(send(&layer, elsewhere.clone()).await.is_err());
    let strip = layer.clone().with_origins(Origins::selam().strip_for_other_origins());
    assert!(!send(&strip, elsewhere).await.unwrap().headers().contains_key("authorization"));

    // A gateway may be reached by address and selected by name: both are then allowed origins.
    let gateway = Origins::new("https://10.0.0.1").unwrap().with_origin("https://gateway.example").unwrap();
    let layer = layer.with_origins(gateway);
    assert!(send(&layer, with_host("https://10.0.0.1/", &["gateway.example"])).await.is_ok());
}

/// O4: a secret nested in another URL does not leave.
#[tokio::test]
async fn nested_secrets_do_not_leave() {
    let layer = (
        JwtLayer::new(jwt()).with_origins(Origins::selam().strip_for_other_origins()),
        ApiKeyLayer::x_api_key(key()).with_origins(Origins::selam().strip_for_other_origins()),
    );
    let inner = format!("https%3A%2F%2Fapi.selamgpt.com%2F%3Ftoken%3D{JWT}%26api_key%3D{KEY}");
    let sent = send(&layer, get(&format!("https://evil.com/login?next={inner}&lang=am"))).await.unwrap();
    assert_eq!(sent.uri(), "https://evil.com/login?lang=am");
    let refused = send(&layer, get(&format!("https://evil.com/{KEY}/"))).await.unwrap_err();
    assert_eq!(refused.kind(), AuthErrorKind::OriginNotAllowed);
    // The same holds if the request chose other credentials.
    let mut request = get(&format!("https://evil.com/?a={JWT}"));
    request.extensions_mut().insert(RequestAuth::ApiKey);
    assert_eq!(send(&layer, request).await.unwrap().uri(), "https://evil.com/");
}

/// O4: a redirect may echo a handshake's credential after it was rotated; that one must not leave either.
#[tokio::test(start_paused = true)]
async fn rotated_credentials_do_not_leave() {
    let (jwts, _) = counting();
    let layer = (
        JwtLayer::new(&jwts).with_origins(Origins::selam().strip_for_other_origins()),
        ApiKeyLayer::x_api_key(key()).with_origins(Origins::selam().strip_for_other_origins()),
    );
    let sent =
        send(&layer, handshake("wss://api.selamgpt.com/socket.io/?EIO=4&transport=websocket")).await.unwrap();
    let query = sent.uri().query().unwrap().to_owned();
    assert!(query.contains("token=token-1"), "{query}");
    let assert_stripped = async || {
        let echo = format!("https://evil.com/socket.io/?{query}");
        let sent = send(&layer, with_referer(&echo, &format!("https://a.example/?{query}"))).await.unwrap();
        assert_eq!(sent.uri(), "https://evil.com/socket.io/?EIO=4&transport=websocket");
        assert!(!sent.headers().contains_key("referer"));
    };
    assert_stripped().await;
    jwts.rejected(&jwts.current().unwrap());
    assert_stripped().await;
    jwts.prefetch().await.unwrap();
    assert_stripped().await;
    let sent = send(&layer, get(MODELS)).await.unwrap();
    assert_eq!(values(&sent, "authorization"), ["Bearer token-2"]);
    assert_stripped().await;
}

/// O3: a relative URI is refused unless its origin is stated.
#[tokio::test]
async fn relative_uris_need_a_stated_origin() {
    let refused = send(&ApiKeyLayer::bearer(key()), get("/v1/models")).await.unwrap_err();
    assert_eq!(refused.kind(), AuthErrorKind::OriginNotAllowed);
    assert!(refused.to_string().contains("with_relative_uri_origin"), "{refused}");

    // A `Host` header does not determine where the request is sent.
    let mut request = get("/v1/models");
    request.headers_mut().insert("host", "api.selamgpt.com".parse().unwrap());
    assert!(send(&ApiKeyLayer::bearer(key()), request).await.is_err());

    let stated = Origins::selam().with_relative_uri_origin("https://api.selamgpt.com").unwrap();
    let sent = send(&ApiKeyLayer::bearer(key()).with_origins(stated), get("/v1/models")).await.unwrap();
    assert_eq!(values(&sent, "authorization"), [format!("Bearer {KEY}")]);
}
