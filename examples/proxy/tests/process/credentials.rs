//! Credentials that the proxy writes into requests: the key alone, or JWT and key.

use std::time::Duration;

use http::{HeaderMap, Method};
use tower_selam::simulator::{JwtAlgorithm, Received, Server, Simulator};

use crate::support::{Caller, Launch, Protocol, empty, secret};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// A simulated API with a key, and a JWT valid for a day.
async fn account() -> (Simulator, Server, String, String) {
    let simulator = Simulator::new();
    let api = Server::tls(&simulator).await.unwrap();
    let key = secret(simulator.issue_key());
    let jwt = secret(simulator.mint_jwt(JwtAlgorithm::Hs256, DAY));
    (simulator, api, key, jwt)
}

/// Returns `Authorization` and `X-API-Key`, each of which must occur at most once.
#[track_caller]
fn credentials(headers: &HeaderMap) -> (Option<&str>, Option<&str>) {
    let one = |name| {
        let mut values = headers.get_all(name).iter();
        let value = values.next().map(|value| value.to_str().unwrap());
        assert_eq!(values.next(), None, "more than one {name}");
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

/// Sends a request whose own credentials must all be replaced.
async fn call(caller: &Caller, path: &str) -> u16 {
    let request = caller
        .request(Method::POST, path)
        .header("authorization", "Bearer theirs")
        .header("x-api-key", "theirs")
        .header("x-api-key", "theirs too")
        .header("connection", "authorization, x-api-key")
        .body(crate::support::full("{}"));
    crate::support::read(caller.send(request.unwrap()).await).await.status.as_u16()
}

#[tokio::test]
async fn without_a_jwt_the_key_is_the_bearer() {
    let (simulator, api, key, _) = account().await;
    let proxy = Launch::for_api(&api).env("SELAM_API_KEY", &key).start().await;
    assert_eq!(call(&Caller::http1(&proxy), "/v1/chat/completions").await, 200);
    let bearer = format!("Bearer {key}");
    assert_eq!(credentials(&last(&simulator).headers), (Some(&*bearer), None));
    // Surrounding white space is trimmed.
    let proxy = Launch::for_api(&api).key_file(&format!("{key}\r\n")).start().await;
    assert_eq!(call(&Caller::http1(&proxy), "/v1/chat/completions").await, 200);
    assert_eq!(credentials(&last(&simulator).headers), (Some(&*bearer), None));
}

#[tokio::test]
async fn with_a_jwt_both_are_sent() {
    let (simulator, api, key, jwt) = account().await;
    let in_file = Launch::for_api(&api).env("SELAM_API_KEY", &key);
    let file = in_file.scratch().write("jwt", format!("{jwt}\n"));
    for launch in [
        Launch::for_api(&api).env("SELAM_API_KEY", &key).env("SELAM_JWT", &jwt),
        in_file.env("SELAM_JWT_FILE", file),
    ] {
        let proxy = launch.start().await;
        for path in ["/v1/audio/agent/sessions", "/v1/chat/completions"] {
            assert_eq!(call(&Caller::http1(&proxy), path).await, 200);
            let sent = last(&simulator).headers;
            assert_eq!(credentials(&sent), (Some(&*format!("Bearer {jwt}")), Some(&*key)));
        }
    }
}

#[tokio::test]
async fn outside_jwt_paths_the_key_is_sent_alone() {
    let (_, _, key, jwt) = account().await;
    for protocol in Protocol::BOTH {
        let mut api = crate::support::TlsListener::listen(protocol).await.exchanges();
        let proxy = Launch::for_api(&api)
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
            assert_eq!(credentials(&request.headers), expected, "{path}");
            assert_eq!(calling.await.unwrap(), 200);
        }
    }
}

#[tokio::test]
async fn jwts_are_fetched_from_a_token_endpoint() {
    let (simulator, api, key, _) = account().await;
    let (client, client_secret) = simulator.issue_client();
    let url = api.base_url().replace("/v1", "/oauth/token");
    let launch = || Launch::for_api(&api).env("SELAM_API_KEY", &key).env("SELAM_TOKEN_URL", &url);
    let as_client =
        launch().env("SELAM_CLIENT_ID", &client).env("SELAM_CLIENT_SECRET", secret(&client_secret));
    for launch in [launch(), as_client] {
        let before = simulator.token_requests();
        let proxy = launch.start().await;
        for _ in 0..3 {
            assert_eq!(call(&Caller::http1(&proxy), "/v1/audio/agent/sessions").await, 200);
        }
        assert_eq!(simulator.token_requests(), before + 1);
        let sent = last(&simulator).headers;
        let (bearer, key_header) = credentials(&sent);
        secret(bearer.unwrap().trim_start_matches("Bearer "));
        assert_eq!(key_header, Some(&*key));
    }
}

#[tokio::test]
async fn an_expired_jwt_is_refreshed_and_the_request_replayed() {
    let (simulator, api, key, _) = account().await;
    let url = api.base_url().replace("/v1", "/oauth/token");
    let proxy = Launch::for_api(&api).env("SELAM_API_KEY", &key).env("SELAM_TOKEN_URL", &url).start().await;
    let caller = Caller::http2(&proxy);
    assert_eq!(call(&caller, "/v1/audio/agent/sessions").await, 200);
    simulator.expire_jwts();
    assert_eq!(call(&caller, "/v1/audio/agent/sessions").await, 200);
    assert_eq!(simulator.token_requests(), 2);
    // Token, request; request with the expired JWT, token, replay.
    assert_eq!(simulator.requests(), 5);
    for received in simulator.received() {
        if let Some(jwt) = received.headers["authorization"].to_str().unwrap().strip_prefix("Bearer ") {
            secret(jwt);
        }
    }
}
