//! The simulator itself, met with hand-written requests: what it accepts is the contract's, not the layers'.

use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use serde_json::{Value, json};
use tokio_test::{assert_pending, task};
use tower::{Service, ServiceExt};
use tower_selam::{
    RateLimit,
    simulator::{Fault, JwtAlgorithm, Simulator, SimulatorBody},
};

async fn call(
    simulator: &Simulator,
    path: &str,
    headers: &[(&str, &str)],
    body: Value,
) -> Response<SimulatorBody> {
    let mut request = Request::post(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    simulator.clone().oneshot(request.body(Full::<Bytes>::from(body.to_string())).unwrap()).await.unwrap()
}

async fn json(response: Response<SimulatorBody>) -> Value {
    serde_json::from_slice(&response.into_body().collect().await.unwrap().to_bytes()).unwrap()
}

const CHAT: &str = "/v1/chat/completions";
const SESSIONS: &str = "/v1/audio/agent/sessions";

#[tokio::test]
async fn credentials_are_judged_by_the_contract() {
    let simulator = Simulator::new();
    let key = simulator.issue_key();
    let bearer = format!("Bearer {key}");
    let minute = Duration::from_secs(60);
    let jwt = format!("Bearer {}", simulator.mint_jwt(JwtAlgorithm::Hs256, minute));
    let other_issuer = format!("Bearer {}", Simulator::new().mint_jwt(JwtAlgorithm::Es256, minute));
    let (auth, own) = ("authorization", "x-api-key");
    for (path, headers, status, code) in [
        (CHAT, &[][..], 401, "missing_api_key"),
        (CHAT, &[(auth, &*bearer)], 200, ""),
        (CHAT, &[(own, &*key)], 200, ""),
        (CHAT, &[(auth, &*jwt), (own, &*key)], 200, ""),
        (CHAT, &[(auth, &*jwt)], 401, "missing_api_key"),
        (CHAT, &[(auth, &*key)], 401, "missing_api_key"),
        (CHAT, &[(auth, "Bearer sk-selam-unknown")], 401, "invalid_api_key"),
        (CHAT, &[(own, "sk-selam-unknown")], 401, "invalid_api_key"),
        (CHAT, &[(auth, &*other_issuer), (own, &*key)], 401, "invalid_token"),
        (CHAT, &[(auth, &*bearer), (auth, &*bearer)], 400, "duplicate_header"),
        (CHAT, &[(own, &*key), (own, &*key)], 400, "duplicate_header"),
        (SESSIONS, &[(auth, &*bearer)], 401, "missing_token"),
        (SESSIONS, &[(auth, &*jwt), (own, &*key)], 200, ""),
        ("/v1/unknown", &[(auth, &*bearer)], 404, "not_found"),
        ("/v1/audio/agent", &[(auth, &*bearer)], 405, "method_not_allowed"),
    ] {
        let response = call(&simulator, path, headers, json!({})).await;
        assert_eq!(response.status().as_u16(), status, "{path} {headers:?}");
        if !code.is_empty() {
            assert_eq!(json(response).await["error"]["code"], code, "{path} {headers:?}");
        }
    }
    simulator.revoke_key(&key);
    assert_eq!(call(&simulator, CHAT, &[(auth, &bearer)], json!({})).await.status(), 401);
}

#[tokio::test]
async fn the_documented_errors_are_word_for_word() {
    let simulator = Simulator::new();
    let limited = simulator.issue_limited_key();
    let seen: Vec<Value> = serde_json::from_str(include_str!("../error-bodies.json")).unwrap();
    for (path, key, id) in [
        (CHAT, Some("sk-selam-unknown"), "seed-invalid-api-key"),
        (CHAT, None, "seed-missing-api-key"),
        ("/v1/audio/speech", Some(&*limited), "seed-insufficient-permissions"),
    ] {
        let headers: Vec<_> = key.map(|key| ("x-api-key", key)).into_iter().collect();
        let response = call(&simulator, path, &headers, json!({})).await;
        let expected = seen.iter().find(|seen| seen["id"] == id).unwrap();
        assert_eq!(response.status().as_u16(), expected["status"]);
        assert_eq!(response.headers()["content-type"], expected["content_type"].as_str().unwrap());
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(body, expected["body"].as_str().unwrap());
    }
}

#[tokio::test]
async fn its_endpoints_answer_in_kind() {
    let simulator = Simulator::new();
    let key = simulator.issue_key();
    let auth = [("x-api-key", &*key)];
    let said = |text: &str| json!({ "model": "m", "messages": [{ "role": "user", "content": text }] });

    let chat = json(call(&simulator, CHAT, &auth, said("ciao")).await).await;
    assert_eq!(chat["choices"][0]["message"]["content"], "Selam! You said: ciao");

    let mut stream = said("ciao");
    stream["stream"] = true.into();
    let response = call(&simulator, CHAT, &auth, stream).await;
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let events = response.into_body().collect().await.unwrap().to_bytes();
    let events: Vec<_> = std::str::from_utf8(&events).unwrap().split_terminator("\n\n").collect();
    assert_eq!(events.last(), Some(&"data: [DONE]"));
    let words = events.iter().filter_map(|event| serde_json::from_str::<Value>(&event[6..]).ok());
    let words: String = words
        .filter_map(|chunk| Some(chunk["choices"][0]["delta"]["content"].as_str()?.to_owned()))
        .collect();
    assert_eq!(words, "Selam! You said: ciao");

    let batch = json!({ "requests": [said("one"), said("two")] });
    let batch = json(call(&simulator, "/v1/chat/completions/batch", &auth, batch).await).await;
    assert_eq!(batch["responses"][1]["choices"][0]["message"]["content"], "Selam! You said: two");

    let audio = call(&simulator, "/v1/audio/speech", &auth, json!({})).await;
    let audio = audio.into_body().collect().await.unwrap().to_bytes();
    assert_eq!((&audio[..4], audio.len()), (&b"RIFF"[..], 844));
    let images = json(call(&simulator, "/v1/images/generations", &auth, json!({})).await).await;
    assert!(images["data"][0]["url"].is_string());

    let garbage = Request::post(CHAT).header("x-api-key", &*key).body(Full::<Bytes>::from("{")).unwrap();
    assert_eq!(simulator.clone().oneshot(garbage).await.unwrap().status(), 400);
}

#[tokio::test(start_paused = true)]
async fn every_response_tells_the_rate_limit_and_it_is_kept() {
    let simulator = Simulator::new();
    simulator.set_rate_limit(2);
    let key = simulator.issue_key();
    let headers = [("x-api-key", &*key)];
    let call = || call(&simulator, CHAT, &headers, json!({}));
    for (status, remaining) in [(200, 1), (200, 0), (429, 0)] {
        let response = call().await;
        assert_eq!(response.status().as_u16(), status);
        let limit = RateLimit::from_headers(response.headers()).unwrap();
        assert_eq!((limit.limit, limit.remaining), (Some(2), Some(remaining)));
        assert_eq!(limit.reset_after, Some(Duration::from_secs(60)));
        assert!(limit.reset_at.is_some());
        assert_eq!(response.headers().contains_key("retry-after"), status == 429);
    }
    tokio::time::advance(Duration::from_secs(60)).await;
    assert_eq!(call().await.status(), 200);
    simulator.set_rate_limit(1);
    assert_eq!(call().await.headers()["x-request-id"], "req_5", "a new limit does not number anew");
}

#[tokio::test]
async fn each_fault_meets_one_request_in_its_turn() {
    let simulator = Simulator::new();
    let key = simulator.issue_key();
    let headers = [("x-api-key", &*key)];
    let call = || call(&simulator, CHAT, &headers, json!({}));
    simulator.inject(Fault::Html(StatusCode::BAD_GATEWAY));
    simulator.inject(Fault::RateLimited { retry_after: Duration::from_secs(9) });
    simulator.inject(Fault::Unavailable);
    simulator.inject(Fault::CutOff { after: 5 });
    assert_eq!(call().await.headers()["content-type"], "text/html; charset=UTF-8");
    let limited = call().await;
    assert_eq!(
        (limited.status(), &limited.headers()["retry-after"]),
        (StatusCode::TOO_MANY_REQUESTS, &"9".parse().unwrap())
    );
    assert_eq!(call().await.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(call().await.into_body().collect().await.is_err());

    simulator.inject(Fault::StallBody { after: 5 });
    let response = call().await;
    let mut body = task::spawn(response.into_body().collect());
    assert_pending!(body.poll());

    simulator.inject(Fault::Stall);
    let mut service = simulator.clone();
    let request = Request::post(CHAT).body(Full::<Bytes>::default()).unwrap();
    let mut stalled = task::spawn(service.call(request));
    assert_pending!(stalled.poll());
    assert_eq!(call().await.status(), StatusCode::OK, "the fault is spent");
    assert_eq!(simulator.requests(), 7);
}

#[tokio::test]
async fn it_tells_what_it_received() {
    let simulator = Simulator::new();
    let long = "x".repeat(100_000);
    call(&simulator, "/v1/chat/completions?a=b", &[("x-mark", "1")], json!(long)).await;
    let [received] = &simulator.received()[..] else { panic!() };
    assert_eq!((received.method.as_str(), received.uri.query()), ("POST", Some("a=b")));
    assert_eq!(received.headers["x-mark"], "1");
    assert_eq!((received.body.len(), received.body_length), (64 * 1024, 100_002));
}
