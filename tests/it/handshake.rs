//! Tests of the voice agent's WebSocket handshake, whose credentials are sent in the query.

use std::time::Duration;

use http::{Method, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::AsyncReadExt;
use tower::{Layer, ServiceBuilder, ServiceExt};
use tower_selam::{
    ApiKey, ApiKeyLayer, AuthErrorKind, BaseUrl, Error, JwtLayer, RequestAuth, Token,
    simulator::{JwtAlgorithm, Server, Simulator},
};

use crate::support::{
    Body, HANG, Http, JWT, KEY, bring_theirs, builder, get, handshake, https, jwt, key, send,
};

const AGENT: &str = "wss://api.selamgpt.com/v1/audio/agent?voice=mekdes";

fn expected() -> String {
    format!("{AGENT}&token={JWT}&api_key={KEY}")
}

#[tokio::test]
async fn credentials_appear_only_in_the_query() {
    let pairs = (
        (JwtLayer::new(jwt()), ApiKeyLayer::x_api_key(key())),
        ServiceBuilder::new().layer(JwtLayer::new(jwt())).layer(ApiKeyLayer::x_api_key(key())).into_inner(),
        ServiceBuilder::new().layer(ApiKeyLayer::x_api_key(key())).layer(JwtLayer::new(jwt())).into_inner(),
    );
    let mut request = handshake(AGENT);
    bring_theirs(&mut request);
    request.headers_mut().insert("referer", "https://api.selamgpt.com/page".parse().unwrap());
    let sent = [
        send(&pairs.0, request.clone()).await.unwrap(),
        send(&pairs.1, request.clone()).await.unwrap(),
        send(&pairs.2, request).await.unwrap(),
    ];
    for sent in sent {
        let uri = sent.uri().to_string();
        for part in [&format!("token={JWT}"), &format!("api_key={KEY}"), "voice=mekdes"] {
            assert_eq!(uri.matches(part).count(), 1, "{part} in {uri}");
        }
        assert_eq!(uri.len(), expected().len());
        assert!(!sent.headers().contains_key("authorization") && !sent.headers().contains_key("x-api-key"));
        assert_eq!(sent.headers()["referer"], "https://api.selamgpt.com/page");
        assert_eq!(sent.headers()["upgrade"], "websocket");
    }
}

/// H3, O4: inbound query credentials are replaced, and a `Referer` that holds ours is removed.
#[tokio::test]
async fn inbound_query_credentials_are_replaced() {
    let mut request = handshake(&format!("{AGENT}&token=theirs&%61pi_key=theirs"));
    request.headers_mut().insert("referer", expected().parse().unwrap());
    let sent = send(&(JwtLayer::new(jwt()), ApiKeyLayer::x_api_key(key())), request).await.unwrap();
    assert_eq!(sent.uri().to_string(), expected());
    assert!(!sent.headers().contains_key("referer"));
}

/// O1, O2, O3: query credentials are written only into a handshake to an allowed `wss` origin.
#[tokio::test]
async fn only_handshakes_to_allowed_origins_are_sent() {
    let layer = (JwtLayer::new(jwt()), ApiKeyLayer::x_api_key(key()));
    let mut no_upgrade = get(AGENT);
    no_upgrade.extensions_mut().insert(RequestAuth::VoiceAgent);
    let refused = send(&layer, no_upgrade).await.unwrap_err();
    assert_eq!(refused.kind(), AuthErrorKind::InvalidRequest);
    for uri in
        ["ws://api.selamgpt.com/", "wss://evil.com/", "wss://api.selamgpt.com@evil.com/", "/v1/audio/agent"]
    {
        let refused = send(&layer, handshake(uri)).await.unwrap_err();
        assert_eq!(refused.kind(), AuthErrorKind::OriginNotAllowed, "{uri}");
        assert!(!format!("{refused} {refused:#?}").contains("token="));
    }
    // Without `RequestAuth::VoiceAgent`, the same request carries its credentials in headers.
    let mut plain = handshake(AGENT);
    plain.extensions_mut().clear();
    let sent = send(&layer, plain).await.unwrap();
    assert_eq!((sent.uri(), sent.headers().len()), (&AGENT.parse().unwrap(), 6));
}

/// E5: the 101 response passes through untouched, and the connection switches protocols.
#[tokio::test]
async fn upgrade_over_tls_passes_through() {
    let simulator = Simulator::new();
    let server = Server::tls(&simulator).await.unwrap();
    let key = simulator.issue_key();
    let jwt = simulator.mint_jwt(JwtAlgorithm::Hs256, Duration::from_secs(60));
    let layer = builder(&server)
        .with_api_key(ApiKey::new(&*key).unwrap())
        .with_jwt(Token::new(&*jwt).unwrap())
        .build()
        .unwrap();
    let request = || {
        let uri = BaseUrl::new(server.base_url()).unwrap().endpoint("audio/agent?voice=mekdes").unwrap();
        handshake(&uri.to_string()).map(|()| Body::default())
    };
    let call = |request| layer.layer(https(&server, Http::One)).oneshot(request);

    let mut response = tokio::time::timeout(HANG, call(request())).await.unwrap().unwrap();
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS, "the upgrade response passes through");
    assert_eq!(response.headers()["sec-websocket-accept"], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    let mut socket = TokioIo::new(hyper::upgrade::on(&mut response).await.unwrap());
    let mut open = [0; 8];
    socket.read_exact(&mut open).await.unwrap();
    assert_eq!(&open[2..], br#"0{"sid"#, "Engine.IO's first packet");

    let received = simulator.received().pop().unwrap();
    assert_eq!((received.method, received.uri.path()), (Method::GET, "/v1/audio/agent"));
    assert!(!received.headers.contains_key("authorization") && !received.headers.contains_key("x-api-key"));

    simulator.expire_jwts();
    let Err(Error::Auth(error)) = call(request()).await else { panic!("the JWT has expired") };
    assert_eq!(error.kind(), AuthErrorKind::TokenRejected);
    simulator.revoke_key(&key);
    let Err(Error::Auth(error)) = call(request()).await else { panic!("the key is revoked") };
    assert_eq!(error.kind(), AuthErrorKind::InvalidApiKey);
    assert!(![&key, &jwt].into_iter().any(|secret| format!("{error} {error:#?}").contains(&**secret)));
}
