//! What the proxy writes into requests instead: the key alone, or JWT and key.

use std::time::Duration;

use http::{HeaderMap, Method};
use tower_selam::simulator::{JwtAlgorithm, Received, Server, Simulator};

use crate::support::{Caller, Launch, Protocol, empty, secret};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// An account with a key, and a JWT that is good for a day.
async fn account() -> (Simulator, Server, String, String) {
    let simulator = Simulator::new();
    let api = Server::tls(&simulator).await.unwrap();
    let key = secret(simulator.issue_key());
    let jwt = secret(simulator.mint_jwt(JwtAlgorithm::Hs256, DAY));
    (simulator, api, key, jwt)
}

/// `Authorization` and `X-API-Key`, which stand there once or not at all.
#[track_caller]
fn written(headers: &HeaderMap) -> (Option<&str>, Option<&str>) {
    let one = |name| {
        let mut values = headers.get_all(name).iter();
        let value = values.next().map(|value| value.to_str().unwrap());
        assert_eq!(values.next(), None, "{name} comes more than once");
        value
    };
    for name in ["api-key", "x-goog-api-key", "cookie"] {
        assert!(!headers.contains_key(name));
    }
    (one("authorization"), one("x-api-key"))
}

fn last(simulator: &Simulator) -> Received {
    simulator.received().pop().unwrap()
}

/// Calls with credentials of its own, all to be replaced.
async fn call(caller: &Caller, path: &str) -> u16 {
    let request = caller
        .request(Method::POST, path)
        .header("authorization", "Bearer theirs")
        .header("x-api-key", "theirs")
        .header("x-api-key", "theirs too")
        .header("connection", "authorization, x-api-key")
        .body(crate::support::whole("{}"));
    crate::support::read(caller.send(request.unwrap()).await).await.status.as_u16()
}

#[tokio::test]
async fn without_a_jwt_every_request_has_the_key_as_bearer() {
    let (simulator, api, key, _) = account().await;
    let proxy = Launch::toward(&api).env("SELAM_API_KEY", &key).start().await;
    assert_eq!(call(&Caller::http1(&proxy), "/v1/chat/completions").await, 200);
    let bearer = format!("Bearer {key}");
    assert_eq!(written(&last(&simulator).headers), (Some(&*bearer), None));
    // White space around it is no part of it.
    let proxy = Launch::toward(&api).key_file(&format!("{key}\r\n")).start().await;
    assert_eq!(call(&Caller::http1(&proxy), "/v1/chat/completions").await, 200);
    assert_eq!(written(&last(&simulator).headers), (Some(&*bearer), None));
}

#[tokio::test]
async fn with_a_jwt_every_request_has_the_jwt_as_bearer_and_the_key_beside_it() {
    let (simulator, api, key, jwt) = account().await;
    let in_file = Launch::toward(&api).env("SELAM_API_KEY", &key);
    let file = in_file.scratch().write("jwt", format!("{jwt}\n"));
    for launch in [
        Launch::toward(&api).env("SELAM_API_KEY", &key).env("SELAM_JWT", &jwt),
        in_file.env("SELAM_JWT_FILE", file),
    ] {
        let proxy = launch.start().await;
        for path in ["/v1/audio/agent/sessions", "/v1/chat/completions"] {
            assert_eq!(call(&Caller::http1(&proxy), path).await, 200);
            let sent = last(&simulator).headers;
            assert_eq!(written(&sent), (Some(&*format!("Bearer {jwt}")), Some(&*key)));
        }
    }
}

#[tokio::test]
async fn with_jwt_paths_the_others_have_the_key_alone() {
    let (_, _, key, jwt) = account().await;
    for protocol in Protocol::BOTH {
        let mut api = crate::support::Stream::listen(protocol).await.exchanges();
        let proxy = Launch::toward(&api)
            .env("SELAM_API_KEY", &key)
            .env("SELAM_JWT", &jwt)
            .args(["--jwt-path", "/v1/audio/agent", "--jwt-path", "/v1/images/"])
            .start()
            .await;
        let caller = Caller::http1(&proxy);
        for (path, has_jwt) in [
            ("/v1/audio/agent", true),
            ("/v1/audio/agent/sessions", true),
            ("/v1/audio/agent?x=1", true),
            ("/v1/images/generations", true),
            ("/v1/audio/agents", false),
            ("/v1/audio", false),
            ("/v1/Audio/Agent", false),
            ("/v1/chat/completions?path=/v1/audio/agent", false),
        ] {
            let calling = tokio::spawn({
                let caller = caller.clone();
                async move { call(&caller, path).await }
            });
            let request = api.next().await.respond(200, empty());
            let (with_jwt, alone) = (format!("Bearer {jwt}"), format!("Bearer {key}"));
            let expected = if has_jwt { (Some(&*with_jwt), Some(&*key)) } else { (Some(&*alone), None) };
            assert_eq!(written(&request.headers), expected, "{path}");
            assert_eq!(calling.await.unwrap(), 200);
        }
    }
}

#[tokio::test]
async fn jwts_come_from_a_token_endpoint() {
    let (simulator, api, key, _) = account().await;
    let (client, client_secret) = simulator.issue_client();
    let url = api.base_url().replace("/v1", "/oauth/token");
    let launch = || Launch::toward(&api).env("SELAM_API_KEY", &key).env("SELAM_TOKEN_URL", &url);
    let as_client =
        launch().env("SELAM_CLIENT_ID", &client).env("SELAM_CLIENT_SECRET", secret(&client_secret));
    for launch in [launch(), as_client] {
        let asked = simulator.token_requests();
        let proxy = launch.start().await;
        for _ in 0..3 {
            assert_eq!(call(&Caller::http1(&proxy), "/v1/audio/agent/sessions").await, 200);
        }
        assert_eq!(simulator.token_requests(), asked + 1);
        let sent = last(&simulator).headers;
        let (bearer, beside) = written(&sent);
        secret(bearer.unwrap().trim_start_matches("Bearer "));
        assert_eq!(beside, Some(&*key));
    }
}

#[tokio::test]
async fn a_jwt_that_expires_is_renewed_and_its_request_sent_again() {
    let (simulator, api, key, _) = account().await;
    let url = api.base_url().replace("/v1", "/oauth/token");
    let proxy = Launch::toward(&api).env("SELAM_API_KEY", &key).env("SELAM_TOKEN_URL", &url).start().await;
    let caller = Caller::http2(&proxy);
    assert_eq!(call(&caller, "/v1/audio/agent/sessions").await, 200);
    simulator.expire_jwts();
    assert_eq!(call(&caller, "/v1/audio/agent/sessions").await, 200);
    assert_eq!(simulator.token_requests(), 2);
    // Token, request; request, token, request again.
    assert_eq!(simulator.requests(), 5);
    for received in simulator.received() {
        if let Some(jwt) = received.headers["authorization"].to_str().unwrap().strip_prefix("Bearer ") {
            secret(jwt);
        }
    }
}
