//! O1 to O3 through the layers; the comparison itself is tested beside `Origins`.

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

#[tokio::test]
async fn o1_plain_http_and_tricks_are_refused_before_anything_is_sent() {
    for (uri, said) in [
        (
            "http://api.selamgpt.com/v1",
            "credentials are not sent over plain http, as to http://api.selamgpt.com",
        ),
        (
            "ws://api.selamgpt.com/v1",
            "credentials are not sent over plain http, as to http://api.selamgpt.com",
        ),
        ("http://127.0.0.1:8080/", "credentials are not sent over plain http, as to http://127.0.0.1:8080"),
        ("https://evil.com/", "credentials are not sent to https://evil.com"),
        ("https://api.selamgpt.com@evil.com/", "the URI's scheme, host or port is not one"),
        ("ftp://api.selamgpt.com/", "the URI's scheme, host or port is not one"),
    ] {
        let refused = send(&JwtLayer::new(jwt(), key()), get(uri)).await.unwrap_err();
        assert_eq!(refused.kind(), AuthErrorKind::OriginNotAllowed, "{uri}");
        assert!(refused.is_permanent() && !refused.is_auth() && refused.remedy().is_some());
        assert!(refused.to_string().contains(said), "{refused}");
    }
}

#[tokio::test]
async fn o1_loopback_is_for_those_who_ask() {
    let base = BaseUrl::allow_insecure_loopback("http://127.0.0.1:8080/v1").unwrap();
    let selam = SelamLayer::builder().with_api_key(key()).with_base_url(base).build().unwrap();
    assert!(send(&selam, get("http://127.0.0.1:8080/v1/models")).await.is_ok());
    for other in ["http://127.0.0.1.evil.com:8080/", "http://localhost:8080/", "http://127.0.0.1:8081/"] {
        assert!(send(&selam, get(other)).await.is_err(), "{other}");
    }
}

#[test]
fn o1_a_stack_whose_base_url_may_not_have_the_credentials_is_not_built() {
    let builder = SelamLayer::builder().with_api_key(key());
    let gateway = || BaseUrl::new("https://gateway.example/v1").unwrap();
    let error = builder.clone().with_base_url(gateway()).with_origins(Origins::selam()).build().unwrap_err();
    assert_eq!(error.kind(), ConfigErrorKind::NotAllowed);
    let both = Origins::selam().with_origin("https://gateway.example").unwrap();
    assert!(builder.with_base_url(gateway()).with_origins(both).build().is_ok());
}

#[tokio::test]
async fn o2_in_pass_mode_other_origins_get_the_request_without_credentials() {
    let origins = Origins::selam().strip_for_other_origins();
    let layer = JwtLayer::new(jwt(), key()).with_origins(origins.clone());
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

    // Query credentials of ours do not go on either, in the URI or as `Referer`.
    let leaking = format!("https://api.selamgpt.com/socket.io/?token={JWT}&api_key={KEY}&voice=a");
    let request = with_referer(&leaking.replace("api.selamgpt", "evil"), &leaking);
    let sent = send(&layer, request).await.unwrap();
    assert_eq!(sent.uri(), "https://evil.com/socket.io/?voice=a");
    assert!(sent.headers().is_empty());

    // Nor does a request that wants none of ours take them along, wherever it goes.
    for layer in [layer.clone(), JwtLayer::new(jwt(), key())] {
        let mut request = with_referer(&leaking.replace("api.selamgpt", "evil"), &leaking);
        request.extensions_mut().insert(RequestAuth::Anonymous);
        let sent = send(&layer, request).await.unwrap();
        assert_eq!(sent.uri(), "https://evil.com/socket.io/?voice=a");
        assert!(sent.headers().is_empty());
    }

    // Requests with a choice of their own are no exception.
    for choice in [RequestAuth::ApiKey, RequestAuth::VoiceAgent, RequestAuth::ApiKeyAndJwt] {
        let mut request = get("https://evil.com/");
        request.extensions_mut().insert(choice);
        assert!(send(&layer, request).await.unwrap().headers().is_empty());
    }
    let key_alone = ApiKeyLayer::bearer(key()).with_origins(origins);
    assert!(send(&key_alone, with_referer("https://evil.com/", "https://a.example/")).await.is_ok());
}

#[tokio::test]
async fn o2_a_host_header_has_to_name_an_allowed_origin() {
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
        let pass = layer.clone().with_origins(Origins::selam().strip_for_other_origins());
        assert!(!send(&pass, request).await.unwrap().headers().contains_key("authorization"), "{hosts:?}");
    }
    // A `Host` that is allowed does not make up for a URI that is not.
    let elsewhere = with_host("https://evil.com/", &["api.selamgpt.com"]);
    assert!(send(&layer, elsewhere.clone()).await.is_err());
    let pass = layer.clone().with_origins(Origins::selam().strip_for_other_origins());
    assert!(!send(&pass, elsewhere).await.unwrap().headers().contains_key("authorization"));

    // A gateway that is reached by address and told apart by name has both.
    let gateway = Origins::new("https://10.0.0.1").unwrap().with_origin("https://gateway.example").unwrap();
    let layer = layer.with_origins(gateway);
    assert!(send(&layer, with_host("https://10.0.0.1/", &["gateway.example"])).await.is_ok());
}

#[tokio::test]
async fn o4_a_secret_does_not_leave_inside_another_url() {
    let layer = JwtLayer::new(jwt(), key()).with_origins(Origins::selam().strip_for_other_origins());
    let inner = format!("https%3A%2F%2Fapi.selamgpt.com%2F%3Ftoken%3D{JWT}%26api_key%3D{KEY}");
    let sent = send(&layer, get(&format!("https://evil.com/login?next={inner}&lang=am"))).await.unwrap();
    assert_eq!(sent.uri(), "https://evil.com/login?lang=am");
    let refused = send(&layer, get(&format!("https://evil.com/{KEY}/"))).await.unwrap_err();
    assert_eq!(refused.kind(), AuthErrorKind::OriginNotAllowed);
    // Also with credentials of another sort chosen, or none to be had.
    let mut request = get(&format!("https://evil.com/?a={JWT}"));
    request.extensions_mut().insert(RequestAuth::ApiKey);
    assert_eq!(send(&layer, request).await.unwrap().uri(), "https://evil.com/");
}

/// What was sent in a handshake may come back by a redirect when it has been replaced already.
#[tokio::test(start_paused = true)]
async fn o4_a_credential_that_was_replaced_does_not_leave_either() {
    let (jwts, _) = counting();
    let layer = JwtLayer::new(&jwts, key()).with_origins(Origins::selam().strip_for_other_origins());
    let sent = send(&layer, handshake("wss://api.selamgpt.com/v1/audio/agent")).await.unwrap();
    let query = sent.uri().query().unwrap().to_owned();
    assert!(query.contains("token=token-1"), "{query}");
    let leave = async || {
        let back = format!("https://evil.com/v1/audio/agent?x=1&{query}");
        let sent = send(&layer, with_referer(&back, &format!("https://a.example/?{query}"))).await.unwrap();
        assert_eq!(sent.uri(), "https://evil.com/v1/audio/agent?x=1");
        assert!(!sent.headers().contains_key("referer"));
    };
    leave().await;
    jwts.invalidate(&jwts.current().unwrap());
    leave().await;
    jwts.prefetch().await.unwrap();
    leave().await;
    let sent = send(&layer, get(MODELS)).await.unwrap();
    assert_eq!(values(&sent, "authorization"), ["Bearer token-2"]);
    leave().await;
}

#[tokio::test]
async fn o3_a_path_alone_is_refused_unless_the_origin_was_stated() {
    let refused = send(&ApiKeyLayer::bearer(key()), get("/v1/models")).await.unwrap_err();
    assert_eq!(refused.kind(), AuthErrorKind::OriginNotAllowed);
    assert!(refused.to_string().contains("with_relative_uri_origin"), "{refused}");

    // A `Host` header says nothing of where the request goes.
    let mut request = get("/v1/models");
    request.headers_mut().insert("host", "api.selamgpt.com".parse().unwrap());
    assert!(send(&ApiKeyLayer::bearer(key()), request).await.is_err());

    let stated = Origins::selam().with_relative_uri_origin("https://api.selamgpt.com").unwrap();
    let sent = send(&ApiKeyLayer::bearer(key()).with_origins(stated), get("/v1/models")).await.unwrap();
    assert_eq!(values(&sent, "authorization"), [format!("Bearer {KEY}")]);
}
