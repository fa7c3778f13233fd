//! No secret appears in any output, log, metric or response.
//!
//! All other tests search the proxy's output and responses too. These tests cause every kind of failure at the most verbose
//! level, with an API that echoes what it was sent.

use std::time::Duration;

use http::{Method, Response};
use tokio::io::AsyncWriteExt;
use tower_selam::simulator::{JwtAlgorithm, Server, Simulator, TokenFault};

use crate::support::{
    Caller, Launch, Protocol, Proxy, TlsListener, assert_clean, empty, eventually, random, raw, read,
    read_to_end, secret,
};

/// Sends valid, invalid and malformed requests.
async fn misbehave(proxy: &Proxy, token: &str) {
    let wrong = secret(format!("wrong-{}", random()));
    for protocol in Protocol::BOTH {
        let caller = Caller::new(proxy, protocol);
        caller.get(&format!("/v1/models?token={token}&api_key={wrong}")).await;
        caller.clone().with_token(&wrong).chat().await;
        let caller = caller.with_token(token);
        caller.chat().await;
        caller.post("/v1/audio/agent/sessions", "{}").await;
        caller.post("/v1/audio/speech", "{}").await;
        caller.get("/v1//models").await;
        caller.get("/elsewhere").await;
        let request =
            caller.request(Method::POST, "/v1/files").header("x-api-key", &wrong).body(empty()).unwrap();
        read(caller.send(request).await).await;
    }
    // Malformed requests with a secret in them.
    for request in [
        format!("GET /v1/models?token={token} HTTP/9.9\r\nAuthorization: {wrong}\r\n\r\n"),
        format!("Authorization: Bearer {token}\r\n\r\n"),
        format!(
            "GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nBad Header {wrong}\r\n\r\n"
        ),
        format!(
            "GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: {wrong}\r\n\r\n"
        ),
        format!("CONNECT {token}:80 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n"),
        format!(
            "GET http://{wrong}@x/v1/models HTTP/1.1\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\r\n"
        ),
    ] {
        let mut caller = raw(proxy).await;
        caller.write_all(request.as_bytes()).await.unwrap();
        caller.shutdown().await.unwrap();
        let mut answer = Vec::new();
        // The connection may be closed without an answer.
        let _ = crate::support::with_timeout(tokio::io::AsyncReadExt::read_to_end(&mut caller, &mut answer))
            .await;
        assert_clean("an answer", &answer);
    }
    let metrics = Caller::http1(proxy).with_token(token).get("/metrics").await;
    assert_eq!(metrics.status, 200);
}

#[tokio::test]
async fn failures_reveal_no_secret() {
    for level in ["debug", "trace"] {
        let simulator = Simulator::new();
        simulator.set_rate_limit(1_000_000);
        let api = Server::tls(&simulator).await.unwrap();
        let (id, client_secret) = simulator.issue_client();
        let token = secret(format!("caller-{}", random()));
        let mut key = secret(simulator.issue_limited_key());
        let url = api.base_url().replace("/v1", "/oauth/token");
        let proxy = Launch::for_api(&api)
            .key_file(&key)
            .env("SELAM_TOKEN_URL", url)
            .env("SELAM_CLIENT_ID", id)
            .env("SELAM_CLIENT_SECRET", secret(&client_secret))
            .env("RUST_LOG", "trace")
            .env("RUST_BACKTRACE", "full")
            .args(["--log", level, "--jwt-path", "/v1/audio"])
            .callers(&format!("web:{token}\n"))
            .start()
            .await;

        // The endpoint echoes the client's secret, then answers garbage.
        let body = format!(r#"{{"error":"invalid_client","error_description":"who is {client_secret}?"}}"#);
        simulator.inject_token_fault(TokenFault::Answer(
            Response::builder().status(400).body(body.into()).unwrap(),
        ));
        misbehave(&proxy, &token).await;
        simulator.inject_token_fault(TokenFault::Garbage);
        simulator.inject_token_fault(TokenFault::Redirect(format!(
            "https://elsewhere.example/?secret={client_secret}"
        )));
        misbehave(&proxy, &token).await;

        // Keys are rotated and revoked, JWTs expire.
        for _ in 0..2 {
            let new = secret(simulator.issue_key());
            proxy.scratch().write("key", &new);
            simulator.revoke_key(&key);
            key = new;
            simulator.expire_jwts();
            misbehave(&proxy, &token).await;
        }
        simulator.reject_jwts(true);
        misbehave(&proxy, &token).await;
        simulator.revoke_key(&key);
        misbehave(&proxy, &token).await;

        // The files become invalid.
        let (bad_key, bad_token) = (secret(format!("sk selam {}", random())), secret(random()));
        proxy.scratch().write("key", &bad_key);
        proxy.scratch().write("tokens", format!("{bad_token}\n"));
        proxy.logs("line 1").await;
        misbehave(&proxy, &token).await;

        // Search for the JWTs and keys that were sent, too.
        for received in simulator.received() {
            for name in ["authorization", "x-api-key"] {
                for value in received.headers.get_all(name) {
                    secret(value.to_str().unwrap().trim_start_matches("Bearer "));
                }
            }
        }
        assert_clean("the log", proxy.errors().as_bytes());
        assert_clean("the metrics", &Caller::http1(&proxy).with_token(&token).get("/metrics").await.body);
        assert!(proxy.errors().lines().count() > 50, "{level}: the log is too short to prove anything");
    }
}

#[tokio::test]
async fn an_echoing_api_is_not_logged() {
    let mut api = TlsListener::listen(Protocol::Http1).await.exchanges();
    let simulator = Simulator::new();
    let key = secret(format!("sk-selam-{}", random()));
    let jwt = secret(simulator.mint_jwt(JwtAlgorithm::Hs256, Duration::from_secs(3600)));
    let proxy = Launch::for_api(&api)
        .env("SELAM_API_KEY", &key)
        .env("SELAM_JWT", &jwt)
        .args(["--log", "trace"])
        .start()
        .await;
    for status in [401, 403, 500] {
        let caller = Caller::http1(&proxy);
        let request = caller.request(Method::GET, "/v1/models").body(empty()).unwrap();
        let calling = tokio::spawn(async move { caller.send(request).await });
        let body = format!(r#"{{"error":{{"message":"bad {key} or {jwt}","type":"{key}","code":"{jwt}"}}}}"#);
        let response = Response::builder()
            .status(status)
            .header("x-request-id", &key)
            .header("www-authenticate", format!("Bearer error=\"{jwt}\""))
            .body(crate::support::full(body.clone()))
            .unwrap();
        api.next().await.answer(response);
        let response = calling.await.unwrap();
        // Only a 401 or 403 is read, and masked without changing its length.
        let stars = |secret: &str| "*".repeat(secret.len());
        if status == 500 {
            let passed = crate::support::with_timeout(http_body_util::BodyExt::collect(response.into_body()));
            assert_eq!(passed.await.unwrap().to_bytes(), body);
        } else {
            let answer = read(response).await;
            assert_eq!(answer.body, body.replace(&key, &stars(&key)).replace(&jwt, &stars(&jwt)));
            assert_eq!(answer.headers["x-request-id"], stars(&key));
        }
    }
    eventually("the log has all three", async || {
        (proxy.errors().matches("path=").count() >= 3).then_some(())
    })
    .await;
    assert_clean("the log", proxy.errors().as_bytes());
    let metrics = Caller::http1(&proxy).get("/metrics").await;
    assert_clean("the metrics", &metrics.body);
}

#[tokio::test]
async fn a_502_reveals_no_secret() {
    let api = TlsListener::listen(Protocol::Http1).await;
    let key = secret(format!("sk-selam-{}", random()));
    let password = secret(format!("hidden-{}", random()));
    let proxy = Launch::for_api(&api).env("SELAM_API_KEY", &key).args(["--log", "trace"]).start().await;
    let mut caller = raw(&proxy).await;
    let request = format!(
        "GET /v1/models?note={password} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-Note: {password}\r\n\r\n"
    );
    caller.write_all(request.as_bytes()).await.unwrap();
    let mut connection = api.accept().await;
    let head = crate::support::read_head(&mut connection).await;
    // The API echoes the head of the request instead of answering.
    connection.write_all(head.as_bytes()).await.unwrap();
    connection.shutdown().await.unwrap();
    drop(connection);
    let answer = read_to_end(&mut caller).await;
    assert!(answer.starts_with(b"HTTP/1.1 502 "));
    assert_clean("the answer", &answer);
}
