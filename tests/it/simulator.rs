//! Tests the simulator against the API contract, with hand-written requests instead of the layers.

use std::time::{Duration, UNIX_EPOCH};

use base64::{
    Engine as _,
    prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD},
};
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Value, json};
use tokio_test::{assert_pending, assert_ready, task};
use tower::{Service, ServiceExt};
use tower_selam::{
    RateLimit, TestClock,
    simulator::{Fault, JwtAlgorithm, Simulator, SimulatorBody, TokenFault},
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
async fn credentials_are_checked_by_the_contract() {
    let simulator = Simulator::new();
    let key = simulator.issue_key();
    let bearer = format!("Bearer {key}");
    let minute = Duration::from_secs(60);
    let jwt = format!("Bearer {}", simulator.mint_jwt(JwtAlgorithm::Hs256, minute));
    let other_issuer = format!("Bearer {}", Simulator::new().mint_jwt(JwtAlgorithm::Es256, minute));
    let (auth, x_api_key) = ("authorization", "x-api-key");
    for (path, headers, status, code) in [
        (CHAT, &[][..], 401, "missing_api_key"),
        (CHAT, &[(auth, &*bearer)], 200, ""),
        (CHAT, &[(x_api_key, &*key)], 200, ""),
        (CHAT, &[(auth, &*jwt), (x_api_key, &*key)], 200, ""),
        (CHAT, &[(auth, &*jwt)], 401, "missing_api_key"),
        (CHAT, &[(auth, &*key)], 401, "missing_api_key"),
        (CHAT, &[(auth, "Bearer sk-selam-unknown")], 401, "invalid_api_key"),
        (CHAT, &[(x_api_key, "sk-selam-unknown")], 401, "invalid_api_key"),
        (CHAT, &[(auth, &*other_issuer), (x_api_key, &*key)], 401, "invalid_token"),
        (CHAT, &[(auth, &*bearer), (auth, &*bearer)], 400, "duplicate_header"),
        (CHAT, &[(x_api_key, &*key), (x_api_key, &*key)], 400, "duplicate_header"),
        (SESSIONS, &[(auth, &*bearer)], 401, "missing_token"),
        (SESSIONS, &[(auth, &*jwt), (x_api_key, &*key)], 200, ""),
        ("/v1/unknown", &[(auth, &*bearer)], 404, "not_found"),
        ("/v1/audio/agent", &[(auth, &*bearer)], 404, "not_found"),
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
async fn documented_errors_match_word_for_word() {
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
async fn each_endpoint_sends_its_response_type() {
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
async fn rate_limit_is_announced_and_enforced() {
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
    assert_eq!(call().await.headers()["x-request-id"], "req_5", "a new limit does not reset the request ids");
}

#[tokio::test]
async fn each_fault_affects_one_request_in_order() {
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
async fn received_requests_are_recorded() {
    let simulator = Simulator::new();
    let long = "x".repeat(100_000);
    call(&simulator, "/v1/chat/completions?a=b", &[("x-mark", "1")], json!(long)).await;
    let [received] = &simulator.received()[..] else { panic!() };
    assert_eq!((received.method.as_str(), received.uri.query()), ("POST", Some("a=b")));
    assert_eq!(received.headers["x-mark"], "1");
    assert_eq!((received.body.len(), received.body_length), (64 * 1024, 100_002));
}

#[tokio::test]
async fn reject_jwts_can_be_turned_off() {
    let simulator = Simulator::new();
    let key = simulator.issue_key();
    let jwt = format!("Bearer {}", simulator.mint_jwt(JwtAlgorithm::Hs256, Duration::from_secs(60)));
    let headers = [("authorization", &*jwt), ("x-api-key", &*key)];
    let call = || call(&simulator, SESSIONS, &headers, json!({}));
    simulator.reject_jwts(true);
    assert_eq!(json(call().await).await["error"]["code"], "invalid_token");
    simulator.reject_jwts(false);
    assert_eq!(call().await.status(), StatusCode::OK);
}

// The token endpoint:

const TOKEN_EXCHANGE: &str = "urn:ietf:params:oauth:grant-type:token-exchange";
const JWT_BEARER: &str = "urn:ietf:params:oauth:grant-type:jwt-bearer";
const JWT_TYPE: &str = "urn:ietf:params:oauth:token-type:jwt";

type Pairs<'a> = &'a [(&'a str, &'a str)];

const CLIENT_CREDENTIALS: Pairs<'static> = &[("grant_type", "client_credentials")];

/// Requests a token with a form of these parameters.
async fn request_token(
    simulator: &Simulator,
    headers: Pairs<'_>,
    form: Pairs<'_>,
) -> Response<SimulatorBody> {
    let form: Vec<_> =
        form.iter().map(|(name, value)| format!("{}={}", encoded(name), encoded(value))).collect();
    request_token_raw(simulator, headers, form.join("&")).await
}

async fn request_token_raw(
    simulator: &Simulator,
    headers: Pairs<'_>,
    body: String,
) -> Response<SimulatorBody> {
    let mut request =
        Request::post("/oauth/token").header("content-type", "application/x-www-form-urlencoded");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    simulator.clone().oneshot(request.body(Full::<Bytes>::from(body)).unwrap()).await.unwrap()
}

/// Refreshes as a public client.
async fn refresh(simulator: &Simulator, token: &str) -> Response<SimulatorBody> {
    let form = [("grant_type", "refresh_token"), ("refresh_token", token), ("client_id", "app")];
    request_token(simulator, &[], &form).await
}

fn encoded(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string().replace("%20", "+")
}

fn basic(id: &str, secret: &str) -> String {
    format!("Basic {}", BASE64_STANDARD.encode(format!("{id}:{secret}")))
}

fn claims(granted: &Value) -> Value {
    let claims = granted["access_token"].as_str().unwrap().split('.').nth(1).unwrap();
    serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(claims).unwrap()).unwrap()
}

#[tokio::test]
async fn clients_and_accounts_authenticate() {
    let simulator = Simulator::new();
    let (id, secret) = simulator.issue_client();
    assert!(id.starts_with("client-"), "{id}");
    let key = simulator.issue_key();
    let authorized = basic(&encoded(&id), &encoded(&secret));
    let (raw, wrong) = (basic(&id, &secret), basic(&id, "wrong"));
    let (bearer, unknown) = (format!("Bearer {key}"), "Bearer sk-selam-unknown");
    let (auth, grant) = ("authorization", CLIENT_CREDENTIALS[0]);
    let (challenge, bearer_challenge) = (r#"Basic realm="simulator""#, r#"Bearer realm="simulator""#);
    let (client_id, client_secret) = (("client_id", &*id), ("client_secret", &*secret));

    let cases: &[(Pairs<'_>, Pairs<'_>, u16, &str, &str)] = &[
        (&[(auth, &authorized)], &[grant], 200, "", ""),
        (&[(auth, &authorized)], &[grant, client_id], 200, "", ""),
        (&[], &[grant, client_id, client_secret], 200, "", ""),
        (&[(auth, &bearer)], &[grant], 200, "", ""),
        (&[], &[grant], 401, "invalid_client", ""),
        (&[], &[grant, client_id], 401, "invalid_client", ""),
        (&[], &[grant, client_id, ("client_secret", "wrong")], 401, "invalid_client", ""),
        (&[(auth, &wrong)], &[grant], 401, "invalid_client", challenge),
        (&[(auth, &raw)], &[grant], 401, "invalid_client", challenge),
        (&[(auth, "Basic !")], &[grant], 401, "invalid_client", challenge),
        (&[(auth, "Digest a=b")], &[grant], 401, "invalid_client", challenge),
        (&[(auth, unknown)], &[grant], 401, "invalid_client", bearer_challenge),
        (&[(auth, &authorized)], &[grant, client_id, client_secret], 400, "invalid_request", ""),
        (&[(auth, &authorized)], &[grant, ("client_id", "other")], 400, "invalid_request", ""),
        (&[(auth, &bearer)], &[grant, client_id, client_secret], 400, "invalid_request", ""),
        (&[(auth, &bearer)], &[grant, client_id], 400, "invalid_request", ""),
        (&[(auth, &bearer), (auth, &bearer)], &[grant], 400, "invalid_request", ""),
        (&[], &[grant, client_secret], 400, "invalid_request", ""),
    ];
    for &(headers, form, status, error, challenge) in cases {
        let answer = request_token(&simulator, headers, form).await;
        assert_eq!(answer.status().as_u16(), status, "{headers:?} {form:?}");
        let challenged = answer.headers().get("www-authenticate").map(|value| value.to_str().unwrap());
        assert_eq!(challenged.unwrap_or_default(), challenge, "{headers:?} {form:?}");
        let answer = json(answer).await;
        assert_eq!(answer["error"].as_str().unwrap_or_default(), error, "{headers:?} {form:?}");
        assert_eq!(answer["access_token"].is_string(), status == 200);
    }
    simulator.revoke_key(&key);
    assert_eq!(request_token(&simulator, &[(auth, &bearer)], CLIENT_CREDENTIALS).await.status(), 401);
}

#[tokio::test]
async fn grants_follow_their_rfcs() {
    let simulator = Simulator::new();
    let bearer = format!("Bearer {}", simulator.issue_key());
    let token = simulator.issue_refresh_token();
    let long = "x".repeat(65);
    let grant = |grant| ("grant_type", grant);
    let subject = |token| ("subject_token", token);
    let subject_type = ("subject_token_type", JWT_TYPE);

    let cases: &[(Pairs<'_>, &str, Value)] = &[
        (&[grant("client_credentials")], "simulated-user", json!({})),
        (&[grant("client_credentials"), ("scope", "a b")], "simulated-user", json!({ "scope": "a b" })),
        (&[grant("refresh_token"), ("refresh_token", &token)], "simulated-user", json!({})),
        (
            &[grant(TOKEN_EXCHANGE), subject("selam"), subject_type, ("audience", "a"), ("audience", "b")],
            "selam",
            json!({ "issued_token_type": JWT_TYPE }),
        ),
        (
            &[grant(TOKEN_EXCHANGE), subject(&*long), subject_type],
            "simulated-user",
            json!({ "issued_token_type": JWT_TYPE }),
        ),
        (&[grant(JWT_BEARER), ("assertion", "a.b.c")], "simulated-user", json!({})),
    ];
    for (form, subject, more) in cases {
        let answer = request_token(&simulator, &[("authorization", &bearer)], form).await;
        assert_eq!(answer.status(), StatusCode::OK, "{form:?}");
        assert_eq!(answer.headers()["content-type"], "application/json");
        assert_eq!(answer.headers()["cache-control"], "no-store");
        assert!(answer.headers().contains_key("x-request-id"));
        let mut granted = json(answer).await;
        assert_eq!(claims(&granted)["sub"], *subject);
        let granted = granted.as_object_mut().unwrap();
        assert!(granted.remove("access_token").is_some());
        assert_eq!(granted.remove("refresh_token").is_some(), form[0].1 == "refresh_token");
        let mut expected = json!({ "token_type": "Bearer", "expires_in": 3600 });
        expected.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        assert_eq!(Value::from(granted.clone()), expected, "{form:?}");
    }
    simulator.set_token_lifetime(Duration::from_millis(1_500));
    let granted =
        json(request_token(&simulator, &[("authorization", &bearer)], CLIENT_CREDENTIALS).await).await;
    assert_eq!(granted["expires_in"], 1.5);
}

#[tokio::test]
async fn invalid_token_requests_are_refused() {
    let simulator = Simulator::new();
    let bearer = format!("Bearer {}", simulator.issue_key());
    let headers = [("authorization", &*bearer)];
    let exchange = encoded(TOKEN_EXCHANGE);
    let jwt_bearer = encoded(JWT_BEARER);
    for (body, error) in [
        (String::new(), "invalid_request"),
        ("grant_type=".to_owned(), "invalid_request"),
        ("grant_type=password".to_owned(), "unsupported_grant_type"),
        ("grant_type=client_credentials&grant_type=client_credentials".to_owned(), "invalid_request"),
        ("grant_type=client_credentials&scope=a&scope=".to_owned(), "invalid_request"),
        ("grant_type=client_credentials&scope=%ff".to_owned(), "invalid_request"),
        ("grant_type=refresh_token".to_owned(), "invalid_request"),
        ("grant_type=refresh_token&refresh_token=unknown".to_owned(), "invalid_grant"),
        (format!("grant_type={exchange}&subject_token=a"), "invalid_request"),
        (format!("grant_type={exchange}&subject_token=&subject_token_type=b"), "invalid_request"),
        (format!("grant_type={jwt_bearer}"), "invalid_request"),
        (format!("grant_type={jwt_bearer}&assertion=a.b"), "invalid_grant"),
        (format!("grant_type={jwt_bearer}&assertion=a..c"), "invalid_grant"),
    ] {
        let answer = request_token_raw(&simulator, &headers, body.clone()).await;
        assert_eq!(answer.status(), StatusCode::BAD_REQUEST, "{body}");
        assert_eq!(answer.headers()["content-type"], "application/json");
        assert_eq!(answer.headers()["cache-control"], "no-store");
        let answer = json(answer).await;
        assert_eq!(answer["error"], error, "{body}");
        assert!(answer["error_description"].is_string());
    }

    let get = Request::get("/oauth/token").body(Full::<Bytes>::default()).unwrap();
    let answer = simulator.clone().oneshot(get).await.unwrap();
    assert_eq!(answer.status(), StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(answer.headers()["allow"], "POST");

    let answer = call(&simulator, "/oauth/token", &headers, json!({})).await;
    assert_eq!(json(answer).await["error"], "invalid_request", "the body is not a form");
}

#[tokio::test]
async fn refresh_token_reuse_revokes_the_family() {
    let simulator = Simulator::new();
    let (first, other) = (simulator.issue_refresh_token(), simulator.issue_refresh_token());
    let next = async |token: &str| {
        json(refresh(&simulator, token).await).await["refresh_token"].as_str().unwrap().to_owned()
    };
    let second = next(&first).await;
    let third = next(&second).await;
    assert_eq!(
        [&first, &second, &third].map(|token| simulator.is_refresh_token_valid(token)),
        [false, false, true]
    );
    assert_eq!(simulator.reused_refresh_tokens(), 0);

    let answer = refresh(&simulator, &first).await;
    assert_eq!(answer.status(), StatusCode::BAD_REQUEST);
    assert_eq!(json(answer).await["error"], "invalid_grant");
    assert_eq!(simulator.reused_refresh_tokens(), 1);
    assert!(!simulator.is_refresh_token_valid(&third));
    assert_eq!(json(refresh(&simulator, &third).await).await["error"], "invalid_grant");
    assert_eq!(simulator.reused_refresh_tokens(), 1, "the newest token was revoked, not spent");

    assert!(simulator.is_refresh_token_valid(&other), "another family");
    simulator.revoke_refresh_tokens();
    assert_eq!(json(refresh(&simulator, &other).await).await["error"], "invalid_grant");
}

#[tokio::test]
async fn refresh_token_without_rotation_stays_valid() {
    let simulator = Simulator::new();
    simulator.rotate_refresh_tokens(false);
    let token = simulator.issue_refresh_token();
    for _ in 0..2 {
        let granted = json(refresh(&simulator, &token).await).await;
        assert!(granted["access_token"].is_string() && granted["refresh_token"].is_null());
    }
    assert!(simulator.is_refresh_token_valid(&token));
    assert_eq!(simulator.reused_refresh_tokens(), 0);
}

#[tokio::test]
async fn unauthenticated_client_spends_no_refresh_token() {
    let simulator = Simulator::new();
    let token = simulator.issue_refresh_token();
    let form = [("grant_type", "refresh_token"), ("refresh_token", &*token)];
    let wrong = basic("app", "wrong");
    let none: Pairs<'_> = &[];
    for headers in [none, &[("authorization", &*wrong)]] {
        assert_eq!(json(request_token(&simulator, headers, &form).await).await["error"], "invalid_client");
    }
    assert!(simulator.is_refresh_token_valid(&token));
}

#[tokio::test]
async fn each_token_fault_affects_one_request_in_order() {
    let clock = TestClock::new(UNIX_EPOCH + Duration::from_secs(1_900_000_000));
    let simulator = Simulator::new().with_clock(clock);
    let token = simulator.issue_refresh_token();
    for fault in [
        TokenFault::ServerError,
        TokenFault::Unavailable,
        TokenFault::RateLimited { retry_after: Duration::from_millis(8_500) },
        TokenFault::InvalidGrant,
        TokenFault::Garbage,
        TokenFault::Html,
        TokenFault::Redirect("https://elsewhere.example/token".to_owned()),
        TokenFault::Answer(Response::builder().status(418).body(Bytes::from_static(b"tea")).unwrap()),
    ] {
        simulator.inject_token_fault(fault);
    }
    let request = || refresh(&simulator, &token);

    assert_eq!(request().await.status(), StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(request().await.status(), StatusCode::SERVICE_UNAVAILABLE);
    let limited = request().await;
    assert_eq!(limited.status(), StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(limited.headers()["retry-after"], "9");
    let denied = request().await;
    assert_eq!(denied.status(), StatusCode::BAD_REQUEST);
    assert_eq!(json(denied).await["error"], "invalid_grant");
    let garbage = request().await;
    assert_eq!(garbage.status(), StatusCode::OK);
    let garbage = garbage.into_body().collect().await.unwrap().to_bytes();
    assert!(!garbage.is_empty() && serde_json::from_slice::<Value>(&garbage).is_err());
    let page = request().await;
    assert_eq!(page.status(), StatusCode::OK);
    assert_eq!(page.headers()["content-type"], "text/html; charset=UTF-8");
    let redirect = request().await;
    assert_eq!(redirect.status(), StatusCode::TEMPORARY_REDIRECT);
    assert_eq!(redirect.headers()["location"], "https://elsewhere.example/token");
    let tea = request().await;
    assert_eq!(tea.status(), StatusCode::IM_A_TEAPOT);
    assert_eq!(tea.into_body().collect().await.unwrap().to_bytes(), "tea");
    assert!(simulator.is_refresh_token_valid(&token), "none of these faults spends it");

    simulator.inject_token_fault(TokenFault::Expired);
    let expired = json(request().await).await;
    assert_eq!(expired["expires_in"], 0);
    // Time is not paused, so a little of it passes.
    let exp = claims(&expired)["exp"].as_f64().unwrap();
    assert!((1_899_999_940.0..1_900_000_000.0).contains(&exp), "{exp}");
    assert!(!simulator.is_refresh_token_valid(&token), "spent");

    let next = expired["refresh_token"].as_str().unwrap();
    simulator.inject_token_fault(TokenFault::CutOff);
    let cut_off = refresh(&simulator, next).await;
    assert_eq!(cut_off.status(), StatusCode::OK);
    assert!(cut_off.into_body().collect().await.is_err());
    assert!(!simulator.is_refresh_token_valid(next), "spent");
    assert_eq!(simulator.token_requests(), 10);
}

#[tokio::test(start_paused = true)]
async fn slow_response_spends_the_token_first() {
    let simulator = Simulator::new();
    let token = simulator.issue_refresh_token();
    simulator.inject_token_fault(TokenFault::Slow(Duration::from_secs(30)));
    let mut slow = task::spawn(refresh(&simulator, &token));
    assert_pending!(slow.poll());
    assert!(!simulator.is_refresh_token_valid(&token));
    tokio::time::advance(Duration::from_secs(29)).await;
    assert_pending!(slow.poll());
    tokio::time::advance(Duration::from_secs(2)).await;
    let granted = json(assert_ready!(slow.poll())).await;
    assert!(simulator.is_refresh_token_valid(granted["refresh_token"].as_str().unwrap()));
}

#[tokio::test(start_paused = true)]
async fn hanging_request_is_counted_and_spends_nothing() {
    let simulator = Simulator::new();
    let token = simulator.issue_refresh_token();
    simulator.inject_token_fault(TokenFault::Hang);
    let mut hanging = task::spawn(refresh(&simulator, &token));
    assert_pending!(hanging.poll());
    tokio::time::advance(Duration::from_secs(86_400)).await;
    assert_pending!(hanging.poll());
    assert_eq!((simulator.token_requests(), simulator.is_refresh_token_valid(&token)), (1, true));
    assert_eq!(refresh(&simulator, &token).await.status(), StatusCode::OK, "the fault is spent");
}

#[tokio::test]
async fn faults_wait_until_an_outage_ends() {
    let simulator = Simulator::new();
    let token = simulator.issue_refresh_token();
    simulator.inject_token_fault(TokenFault::ServerError);
    simulator.set_token_outage(true);
    for _ in 0..3 {
        assert_eq!(refresh(&simulator, &token).await.status(), StatusCode::SERVICE_UNAVAILABLE);
    }
    simulator.set_token_outage(false);
    assert_eq!(refresh(&simulator, &token).await.status(), StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(refresh(&simulator, &token).await.status(), StatusCode::OK);
}

#[tokio::test]
async fn api_faults_and_limit_spare_the_token_endpoint() {
    let simulator = Simulator::new();
    simulator.set_rate_limit(1);
    simulator.inject(Fault::Unavailable);
    simulator.inject_token_fault(TokenFault::InvalidGrant);
    let key = simulator.issue_key();
    let bearer = format!("Bearer {key}");
    let headers = [("authorization", &*bearer)];

    assert_eq!(
        request_token(&simulator, &headers, CLIENT_CREDENTIALS).await.status(),
        StatusCode::BAD_REQUEST
    );
    let granted = request_token(&simulator, &headers, CLIENT_CREDENTIALS).await;
    assert_eq!(granted.status(), StatusCode::OK);
    assert!(RateLimit::from_headers(granted.headers()).is_none());
    let unavailable = call(&simulator, CHAT, &headers, json!({})).await;
    assert_eq!(unavailable.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(unavailable.headers()["x-ratelimit-remaining"], "0");
    assert_eq!(unavailable.headers()["x-request-id"], "req_3");
    assert_eq!((simulator.requests(), simulator.token_requests()), (3, 2));
    assert_eq!(simulator.received()[0].uri.path(), "/oauth/token");
}

#[tokio::test(start_paused = true)]
async fn access_token_is_accepted_for_its_lifetime() {
    let clock = TestClock::new(UNIX_EPOCH + Duration::from_millis(1_900_000_000_700));
    let simulator = Simulator::new().with_clock(clock.clone());
    simulator.set_token_lifetime(Duration::from_secs(2));
    let key = simulator.issue_key();
    let bearer = format!("Bearer {key}");
    let granted =
        json(request_token(&simulator, &[("authorization", &bearer)], CLIENT_CREDENTIALS).await).await;
    assert_eq!(granted["expires_in"], 2);
    let jwt = format!("Bearer {}", granted["access_token"].as_str().unwrap());
    let headers = [("authorization", &*jwt), ("x-api-key", &*key)];
    let call = || call(&simulator, SESSIONS, &headers, json!({}));

    assert_eq!(call().await.status(), StatusCode::OK);
    tokio::time::advance(Duration::from_millis(1_999)).await;
    assert_eq!(call().await.status(), StatusCode::OK);
    tokio::time::advance(Duration::from_millis(1)).await;
    assert_eq!(json(call().await).await["error"]["code"], "invalid_token");
    clock.jump_back(Duration::from_secs(1));
    assert_eq!(call().await.status(), StatusCode::OK, "expiry follows the wall clock");
}

#[test]
fn token_fault_debug_shows_no_body() {
    let answer = Response::builder().status(400).body(Bytes::from_static(b"secret")).unwrap();
    assert_eq!(format!("{:?}", TokenFault::Answer(answer)), "Answer(400 Bad Request)");
    let limited = TokenFault::RateLimited { retry_after: Duration::from_secs(9) };
    assert_eq!(format!("{limited:?}"), "RateLimited { retry_after: 9s }");
}
