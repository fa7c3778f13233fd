//! The voice agent's handshake: credentials in its query, and nowhere else.

use std::time::Duration;

use http::{Method, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::AsyncReadExt;
use tower::{Layer, ServiceBuilder, ServiceExt};
use tower_selam::{
    ApiKey, ApiKeyLayer, AuthErrorKind, BaseUrl, Credentials, Error, JwtLayer, Origins, RequestAuth, Token,
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
async fn the_credentials_go_into_the_query_and_nowhere_else() {
    let pairs = (
        JwtLayer::new(jwt(), key()),
        ServiceBuilder::new()
            .layer(JwtLayer::beside_api_key(jwt()))
            .layer(ApiKeyLayer::beside_jwt(key()))
            .into_inner(),
        ServiceBuilder::new()
            .layer(ApiKeyLayer::beside_jwt(key()))
            .layer(JwtLayer::beside_api_key(jwt()))
            .into_inner(),
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

#[tokio::test]
async fn theirs_are_replaced_and_a_referer_with_ours_is_taken_off() {
    let mut request = handshake(&format!("{AGENT}&token=theirs&%61pi_key=theirs"));
    request.headers_mut().insert("referer", expected().parse().unwrap());
    let sent = send(&JwtLayer::new(jwt(), key()), request).await.unwrap();
    assert_eq!(sent.uri().to_string(), expected());
    assert!(!sent.headers().contains_key("referer"));
}

#[tokio::test]
async fn anything_else_than_a_handshake_to_an_allowed_origin_is_refused() {
    let layer = JwtLayer::new(jwt(), key());
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
    // Without the choice, the same request has them in its headers, as every other.
    let mut plain = handshake(AGENT);
    plain.extensions_mut().clear();
    let sent = send(&layer, plain).await.unwrap();
    assert_eq!((sent.uri(), sent.headers().len()), (&AGENT.parse().unwrap(), 6));
}

#[test]
fn the_imperative_form_serves_websocket_clients() {
    let credentials = Credentials::key_and_jwt(key(), jwt());
    let (mut parts, ()) = handshake(AGENT).into_parts();
    credentials.apply(&Origins::selam(), &mut parts).unwrap();
    assert_eq!(parts.uri.to_string(), expected());

    // Credentials of its own, in the headers of a handshake.
    parts.extensions.insert(RequestAuth::Custom(Credentials::x_api_key(key())));
    credentials.apply(&Origins::selam(), &mut parts).unwrap();
    assert_eq!(parts.headers["x-api-key"], KEY);
}

#[tokio::test]
async fn over_tls_the_connection_switches_protocols() {
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
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS, "E5: passes untouched");
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
