//! Tests of the voice agent's requests, whose credentials are sent in the query.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use http::{Method, Request, StatusCode};
use http_body_util::BodyExt;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::AsyncReadExt;
use tower::{Layer, ServiceBuilder, ServiceExt};
use tower_selam::{
    ApiKey, ApiKeyLayer, AuthErrorKind, BoxError, Error, JwtLayer, Refreshing, RequestAuth, SelamLayer,
    Token,
    simulator::{JwtAlgorithm, Server, Simulator},
    source::{Reason, source_fn},
};

use crate::support::{
    Body, HANG, Http, JWT, KEY, bring_theirs, builder, get, handshake, https, jwt, key, send, voice_agent,
};

const AGENT: &str = "wss://api.selamgpt.com/socket.io/?EIO=4&transport=websocket&voice=mekdes";

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

/// O1, O2, O3: query credentials are written only into a request to an allowed `wss` origin.
#[tokio::test]
async fn only_handshakes_to_allowed_origins_are_sent() {
    let layer = (JwtLayer::new(jwt()), ApiKeyLayer::x_api_key(key()));
    let mut no_upgrade = get(AGENT);
    no_upgrade.extensions_mut().insert(RequestAuth::VoiceAgent);
    let refused = send(&layer, no_upgrade).await.unwrap_err();
    assert_eq!(refused.kind(), AuthErrorKind::InvalidRequest);
    for uri in
        ["ws://api.selamgpt.com/", "wss://evil.com/", "wss://api.selamgpt.com@evil.com/", "/socket.io/"]
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
    let request = || handshake(&voice_agent(&server)).map(|()| Body::default());
    let call = |request| layer.layer(https(&server, Http::One)).oneshot(request);

    let mut response = tokio::time::timeout(HANG, call(request())).await.unwrap().unwrap();
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS, "the upgrade response passes through");
    assert_eq!(response.headers()["sec-websocket-accept"], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    let mut socket = TokioIo::new(hyper::upgrade::on(&mut response).await.unwrap());
    let mut open = [0; 8];
    socket.read_exact(&mut open).await.unwrap();
    assert_eq!((open[0], &open[2..4]), (0x81, &b"0{"[..]), "Engine.IO's first packet");

    let received = simulator.received().pop().unwrap();
    assert_eq!((received.method, received.uri.path()), (Method::GET, "/socket.io/"));
    assert!(!received.headers.contains_key("authorization") && !received.headers.contains_key("x-api-key"));

    simulator.expire_jwts();
    let Err(Error::Auth(error)) = call(request()).await else { panic!("the JWT has expired") };
    assert_eq!(error.kind(), AuthErrorKind::TokenRejected);
    simulator.revoke_key(&key);
    let Err(Error::Auth(error)) = call(request()).await else { panic!("the key is revoked") };
    assert_eq!(error.kind(), AuthErrorKind::InvalidApiKey);
    assert!(![&key, &jwt].into_iter().any(|secret| format!("{error} {error:#?}").contains(&**secret)));
}

/// J6, J7: a request that polls is replayed with the new key in its query, and a session outlives the key that opened it.
#[tokio::test]
async fn polling_survives_a_rotated_key() {
    let simulator = Simulator::new();
    let current = Arc::new(Mutex::new(simulator.issue_key()));
    let keys = Refreshing::new(source_fn({
        let current = Arc::clone(&current);
        move |_: Reason<ApiKey>| {
            let key = ApiKey::new(current.lock().unwrap().clone());
            async { Ok::<_, BoxError>(key?) }
        }
    }));
    let jwt = simulator.mint_jwt(JwtAlgorithm::Hs256, Duration::from_secs(60));
    let layer = SelamLayer::builder().with_api_key(keys).with_jwt(Token::new(jwt).unwrap()).build().unwrap();
    let service = layer.layer(simulator.clone());
    let call = async |method: Method, sid: &str, body: &str| {
        let uri = format!("https://api.selamgpt.com/socket.io/?EIO=4&transport=polling&voice=mekdes{sid}");
        let request = Request::builder().method(method).uri(uri).extension(RequestAuth::VoiceAgent);
        let response = service.clone().oneshot(request.body(body.to_owned()).unwrap()).await.unwrap();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        String::from_utf8(body.to_vec()).unwrap()
    };
    let rotate = || {
        let old = std::mem::replace(&mut *current.lock().unwrap(), simulator.issue_key());
        simulator.revoke_key(&old);
    };
    let sid = |open: &str| {
        let open: Value = serde_json::from_str(&open[1..]).unwrap();
        format!("&sid={}", open["sid"].as_str().unwrap())
    };

    let first = sid(&call(Method::GET, "", "").await);
    assert_eq!(call(Method::POST, &first, "40/v1/audio/agent,").await, "ok");
    assert!(call(Method::GET, &first, "").await.starts_with("40/v1/audio/agent,{"));
    rotate();
    assert_eq!(call(Method::POST, &first, r#"42/v1/audio/agent,["a"]"#).await, "ok");
    assert_eq!(call(Method::GET, &first, "").await, r#"42/v1/audio/agent,["a"]"#);

    // The second session is opened with the old key, rejected, and replayed.
    let before = simulator.requests();
    let second = sid(&call(Method::GET, "", "").await);
    assert_eq!(simulator.requests(), before + 2);
    let new = current.lock().unwrap().clone();
    let received = simulator.received();
    for (request, is_new) in received[received.len() - 2..].iter().zip([false, true]) {
        assert_eq!(request.uri.query().unwrap().contains(&new), is_new);
    }
    assert_eq!(call(Method::POST, &second, "40/v1/audio/agent,").await, "ok");
}
