//! The official OpenAI client for Python, which uses the proxy with a client token: `tests/openai.py`.

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::BodyExt;
use tokio::{process::Command, time};
use tower::ServiceExt;
use tower_selam::simulator::{Fault, Server, Simulator};

use crate::support::{
    Launch, assert_clean, npm,
    python::{self, TIMEOUT},
    random, secret,
};

/// The requirement that is installed.
const CLIENT: &str = "openai>=1.60,<4";

async fn simulated() -> (Simulator, Server) {
    let simulator = Simulator::new();
    let api = Server::tls(&simulator).await.unwrap();
    (simulator, api)
}

/// The documented response to a request without a key.
fn no_key() -> Response<Bytes> {
    let body = r#"{"error":{"message":"No API key provided.","type":"authentication_error","code":"missing_api_key"}}"#;
    Response::builder().status(401).header("content-type", "application/json").body(body.into()).unwrap()
}

async fn speech(simulator: &Simulator) -> Bytes {
    let request = Request::post("https://localhost/v1/audio/speech")
        .header("authorization", format!("Bearer {}", simulator.issue_key()))
        .body("{}".to_owned());
    let response = simulator.clone().oneshot(request.unwrap()).await.unwrap();
    assert_eq!(response.status(), 200);
    response.into_body().collect().await.unwrap().to_bytes()
}

#[tokio::test]
async fn the_official_client_works() {
    let python = match python::install("openai", CLIENT).await {
        Ok(python) => python,
        Err(why) => return npm::skip("the test with the official openai client", &why),
    };
    let (simulator, api) = simulated().await;
    let (full, limited, revoked) =
        (simulator.issue_key(), simulator.issue_limited_key(), simulator.issue_key());
    simulator.revoke_key(&revoked);
    let (keyless, keyless_api) = simulated().await;
    let missing = keyless.issue_key();
    keyless.inject(Fault::Answer(no_key()));
    let token = secret(format!("caller-{}", random()));
    let mut proxies = Vec::new();
    for (api, key) in [(&api, full), (&api, limited), (&api, revoked), (&keyless_api, missing)] {
        let launch =
            Launch::for_api(api).env("SELAM_API_KEY", secret(key)).callers(&format!("web:{token}\n"));
        proxies.push(launch.start().await);
    }
    // The expected audio, directly from the API.
    let speech = proxies[0].scratch().write("speech.wav", speech(&simulator).await);

    let mut command = Command::new(python);
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/openai.py"));
    for proxy in &proxies {
        command.arg(format!("http://{}/v1", proxy.address()));
    }
    command.arg(speech);
    // The client has the token alone, and connects to the proxy directly.
    command.env("OPENAI_API_KEY", &token).env("NO_PROXY", "*").kill_on_drop(true);
    for name in [
        "OPENAI_BASE_URL",
        "OPENAI_ORG_ID",
        "OPENAI_PROJECT_ID",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "all_proxy",
    ] {
        command.env_remove(name);
    }
    let output = time::timeout(TIMEOUT, command.output()).await.unwrap().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{stdout}{stderr}");
    assert_eq!(stdout.lines().last(), Some("all is well"), "{stdout}{stderr}");
    // The client saw no secret except its own token.
    assert_clean("output of the client", stdout.replace(&token, "").as_bytes());
}
