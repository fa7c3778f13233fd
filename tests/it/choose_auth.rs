//! Choosing a request's credentials by its path or by a closure.

use std::time::Duration;

use http::{Method, Request, request::Parts};
use tower::{ServiceBuilder, ServiceExt};
use tower_selam::{
    ApiKey, BoxError, ChooseAuthLayer, ConfigErrorKind, Refreshing, RequestAuth, SelamLayer, Subject, Token,
    simulator::{JwtAlgorithm, Simulator},
    source::{Reason, source_fn},
};

use crate::support::{CHAT, JWT, KEY, get, jwt, key, send, values};

/// Sends a request to `path` through `layer`, and returns its `Authorization` and `X-API-Key`.
async fn written(layer: ChooseAuthLayer, mut request: Request<()>, path: &str) -> (Vec<String>, Vec<String>) {
    *request.uri_mut() = format!("https://api.selamgpt.com{path}").parse().unwrap();
    let selam = SelamLayer::builder().with_api_key(key()).with_jwt(jwt()).build().unwrap();
    let layer = ServiceBuilder::new().layer(layer).layer(selam);
    let sent = send(&layer, request).await.unwrap();
    (values(&sent, "authorization"), values(&sent, "x-api-key"))
}

fn pair() -> (Vec<String>, Vec<String>) {
    (vec![format!("Bearer {JWT}")], vec![KEY.to_owned()])
}

fn key_alone() -> (Vec<String>, Vec<String>) {
    (vec![format!("Bearer {KEY}")], vec![])
}

#[tokio::test]
async fn listed_paths_get_the_jwt() {
    let layer = || ChooseAuthLayer::jwt_for_paths(["/v1/audio", "/v1/images"]).unwrap();
    for path in ["/v1/audio", "/v1/audio/speech?x=/v1/models", "/v1/images/generations"] {
        assert_eq!(written(layer(), get("/"), path).await, pair(), "{path}");
    }
    for path in [
        "/v1/models",
        "/v1/audiobooks",
        "/v1/models?x=/v1/audio",
        "/v1/audio/../models",
        "/v1/audio/%2e%2e/models",
        "/v1/audio/..%2fmodels",
        "",
    ] {
        assert_eq!(written(layer(), get("/"), path).await, key_alone(), "{path}");
    }
    let error = ChooseAuthLayer::jwt_for_paths(["/v1/audio", "v1/images"]).unwrap_err();
    assert_eq!(error.kind(), &ConfigErrorKind::InvalidPath);
    assert_eq!(error.to_string(), "path prefix number 2 is not a plain path such as /v1/audio");
}

#[tokio::test]
async fn an_existing_choice_is_kept() {
    let layer = || ChooseAuthLayer::jwt_for_paths(["/v1/audio"]).unwrap();
    for (choice, expected) in [
        (RequestAuth::ApiKey, key_alone()),
        (RequestAuth::ApiKeyAndJwt, pair()),
        (RequestAuth::Anonymous, (vec![], vec![])),
    ] {
        for path in ["/v1/audio", "/v1/models"] {
            let mut request = get("/");
            request.extensions_mut().insert(choice.clone());
            assert_eq!(written(layer(), request, path).await, expected);
        }
    }
}

#[tokio::test]
async fn a_closure_chooses_or_defers() {
    let layer = ChooseAuthLayer::new(|request: &Parts| {
        assert!(request.extensions.get::<Subject>().is_none());
        (request.method == Method::HEAD).then_some(RequestAuth::ApiKey)
    });
    assert_eq!(written(layer.clone(), get("/"), "/v1/models").await, pair());
    let mut head = get("/");
    *head.method_mut() = Method::HEAD;
    head.headers_mut().insert("accept", "*/*".parse().unwrap());
    assert_eq!(written(layer, head, "/v1/models").await, key_alone());
}

#[tokio::test]
async fn a_replay_keeps_its_choice() {
    let simulator = Simulator::new();
    let minting = simulator.clone();
    let jwts = Refreshing::new(source_fn(move |_: Reason<Token>| {
        let jwt = minting.mint_jwt(JwtAlgorithm::Hs256, Duration::from_secs(600));
        async { Ok::<_, BoxError>(Token::new(jwt)?) }
    }));
    let keys = [simulator.issue_key(), simulator.issue_key()];
    let (first, second) = (keys[0].clone(), keys[1].clone());
    let rotating = Refreshing::new(source_fn(move |reason: Reason<ApiKey>| {
        let key = if let Reason::Rejected(_) = reason { second.clone() } else { first.clone() };
        async { Ok::<_, BoxError>(ApiKey::new(key)?) }
    }));
    let layer = SelamLayer::builder().with_api_key(rotating).with_jwt(jwts).build().unwrap();
    let layer =
        ServiceBuilder::new().layer(ChooseAuthLayer::jwt_for_paths(["/v1/audio"]).unwrap()).layer(layer);
    simulator.revoke_key(&keys[0]);
    let chat = Request::post("https://api.selamgpt.com/v1/chat/completions").body(CHAT.to_owned()).unwrap();
    assert_eq!(layer.service(simulator.clone()).oneshot(chat).await.unwrap().status(), 200);
    let sent: Vec<_> = simulator.received().into_iter().map(|received| received.headers).collect();
    assert_eq!(sent.len(), 2);
    for (headers, key) in sent.iter().zip(keys) {
        assert_eq!(headers["authorization"], format!("Bearer {key}"));
        assert!(!headers.contains_key("x-api-key"));
    }
}
