//! Errors of the API and of the token endpoint, and how callers see them.

use std::net::Ipv4Addr;

use bytes::Bytes;
use http::{Response, StatusCode};
use tokio::{io::AsyncWriteExt, net::TcpListener};
use tower_selam::simulator::{Fault, Server, Simulator, TokenFault};

use crate::support::{
    Answer, Api, Caller, Launch, Protocol, Proxy, TlsListener, eventually, full, random, read_head, secret,
};

const BODY: &str = r#"{"messages":[{"role":"user","content":"hi"}]}"#;

/// Bodies of error responses, which must pass unchanged.
fn bodies() -> Vec<Bytes> {
    vec![
        Bytes::from_static(
            b"{\n  \"error\": {\n    \"message\": \"Odd\",\"type\":\"authentication_error\", \"code\":\"invalid_api_key\" }}\n\n",
        ),
        Bytes::new(),
        Bytes::from_static(b"<html>no JSON"),
        Bytes::from_static(&[0x1f, 0x8b, 8, 0, 0xff, 0, 0x80]),
        // Longer than any inspected body.
        Bytes::from(vec![b' '; 300 * 1024]),
    ]
}

#[tokio::test]
async fn a_401_or_403_passes_unchanged() {
    for (callers, apis) in Protocol::PAIRS {
        let mut api = TlsListener::listen(apis).await.exchanges();
        let proxy = Launch::with_key(&api).start().await;
        let caller = Caller::new(&proxy, callers);
        for status in [401, 403] {
            for body in bodies() {
                let calling = tokio::spawn({
                    let caller = caller.clone();
                    async move { caller.post("/v1/chat/completions", BODY).await }
                });
                let response = Response::builder()
                    .status(status)
                    .header("content-type", "application/x-odd")
                    .header("content-encoding", "gzip")
                    .header("www-authenticate", r#"Bearer realm="odd""#)
                    .header("www-authenticate", "Basic")
                    .header("x-request-id", "req_7")
                    .header("x-ratelimit-remaining", "3")
                    .body(full(body.clone()));
                api.next().await.answer(response.unwrap());
                let answer = calling.await.unwrap();
                assert_eq!((answer.status.as_u16(), answer.body), (status, body));
                let challenges: Vec<_> = answer.headers.get_all("www-authenticate").iter().collect();
                assert_eq!(challenges, [r#"Bearer realm="odd""#, "Basic"]);
                for (name, value) in [
                    ("content-type", "application/x-odd"),
                    ("content-encoding", "gzip"),
                    ("x-request-id", "req_7"),
                    ("x-ratelimit-remaining", "3"),
                ] {
                    assert_eq!(answer.headers[name], value);
                }
            }
        }
        // A fixed key cannot be refreshed, so there is no replay.
        api.assert_silent();
    }
}

fn compressed(encoding: &str, text: &[u8]) -> Vec<u8> {
    use flate2::{Compression, read};

    let read_all = |mut reader: Box<dyn std::io::Read + '_>| {
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        bytes
    };
    match encoding {
        "gzip" => read_all(Box::new(read::GzEncoder::new(text, Compression::default()))),
        "zlib" => read_all(Box::new(read::ZlibEncoder::new(text, Compression::default()))),
        "deflate" => read_all(Box::new(read::DeflateEncoder::new(text, Compression::default()))),
        "br" => read_all(Box::new(brotli::CompressorReader::new(text, 4096, 5, 20))),
        _ => text.to_vec(),
    }
}

/// The value of `Content-Encoding`, and the encodings in the order in which they are applied.
const ENCODINGS: [(&str, &[&str]); 7] = [
    ("identity", &[]),
    ("gzip", &["gzip"]),
    ("deflate", &["zlib"]),
    ("deflate", &["deflate"]),
    ("br", &["br"]),
    ("gzip, br", &["gzip", "br"]),
    ("br, deflate", &["br", "zlib"]),
];

/// E6, S2: an echo of the proxy's credentials does not reach callers, however the body is encoded.
#[tokio::test]
async fn an_echoed_key_is_masked() {
    for (callers, apis) in [(Protocol::Http1, Protocol::Http1), (Protocol::Http2, Protocol::Http2)] {
        let mut api = TlsListener::listen(apis).await.exchanges();
        let key = secret(format!("sk-selam-{}", random()));
        let proxy = Launch::for_api(&api).env("SELAM_API_KEY", &key).start().await;
        let caller = Caller::new(&proxy, callers);
        for (value, encodings) in ENCODINGS {
            for echo in
                [key.clone(), key.replace('-', "%2D"), key.replace('-', "\\u002d"), "nothing".to_owned()]
            {
                let text = format!(r#"{{"error":{{"message":"bad {echo}","code":"invalid_api_key"}}}}"#);
                let body = encodings
                    .iter()
                    .fold(text.clone().into_bytes(), |body, encoding| compressed(encoding, &body));
                let calling = tokio::spawn({
                    let caller = caller.clone();
                    async move { caller.post("/v1/chat/completions", BODY).await }
                });
                let response = Response::builder()
                    .status(401)
                    .header("content-encoding", value)
                    .header("content-length", body.len())
                    .body(full(body.clone()));
                api.next().await.answer(response.unwrap());
                let answer = calling.await.unwrap();
                assert_eq!(answer.headers["content-length"], answer.body.len().to_string());
                if echo == "nothing" {
                    assert_eq!(
                        (&answer.body[..], &answer.headers["content-encoding"]),
                        (&body[..], &value.parse().unwrap())
                    );
                } else {
                    assert_eq!(answer.body, text.replace(&echo, &"*".repeat(echo.len())), "{value}");
                    assert_eq!(answer.headers.contains_key("content-encoding"), encodings.is_empty());
                }
            }
        }
    }
}

/// Starts the proxy with a key, and with JWTs from the simulator's token endpoint.
async fn start_with_token_url(simulator: &Simulator, api: &Server) -> Proxy {
    let url = api.base_url().replace("/v1", "/oauth/token");
    let launch = Launch::for_api(api).env("SELAM_API_KEY", secret(simulator.issue_key()));
    launch.env("SELAM_TOKEN_URL", url).start().await
}

/// J11: a missing permission costs neither a JWT nor a second request, and a compressed `invalid_api_key` no JWT.
#[tokio::test]
async fn only_what_a_401_blames_is_refreshed() {
    let simulator = Simulator::new();
    let api = Server::tls(&simulator).await.unwrap();
    let proxy = start_with_token_url(&simulator, &api).await;
    let caller = Caller::http1(&proxy);
    assert_eq!(caller.chat().await.status, 200);
    let (requests, tokens) = (simulator.requests() - simulator.token_requests(), simulator.token_requests());

    let mut sent = requests;
    for (value, encodings) in ENCODINGS {
        for text in [
            r#"{"error":{"code":"insufficient_scope","type":"authentication_error"}}"#,
            r#"{"error":{"message":"You have insufficient permissions. Missing scopes: a.b","code":null}}"#,
            r#"{"detail":{"error":{"code":"invalid_api_key"}}}"#,
        ] {
            let body =
                encodings.iter().fold(text.as_bytes().to_vec(), |body, encoding| compressed(encoding, &body));
            let refusal = Response::builder().status(401).header("content-encoding", value).body(body.into());
            simulator.inject(Fault::Answer(refusal.unwrap()));
            assert_eq!(caller.chat().await.status, 401, "{value} {text}");
            sent += 1;
            assert_eq!(simulator.requests() - simulator.token_requests(), sent, "{value} {text}");
            assert_eq!(simulator.token_requests(), tokens, "{value} {text}");
        }
    }
}

#[tokio::test]
async fn a_rotated_key_is_reread_and_the_request_replayed() {
    let simulator = Simulator::new();
    let api = Server::tls(&simulator).await.unwrap();
    let (old, new) = (secret(simulator.issue_key()), secret(simulator.issue_key()));
    let proxy = Launch::for_api(&api).key_file(&old).start().await;
    let caller = Caller::http1(&proxy);
    assert_eq!(caller.chat().await.status, 200);

    proxy.scratch().write("key", &new);
    simulator.revoke_key(&old);
    let body = format!(r#"{{"messages":[],"x":"{}"}}"#, "y".repeat(40_000));
    assert_eq!(caller.post("/v1/chat/completions?a=%20", body.clone()).await.status, 200);
    // Two requests if the new key was picked up in time, three with a replay.
    let received = simulator.received();
    assert!(matches!(received.len(), 2 | 3), "{received:?}");
    for sent in &received[1..] {
        assert_eq!(sent.uri.path_and_query().unwrap(), "/v1/chat/completions?a=%20");
        assert_eq!(sent.body, body);
    }
    assert_eq!(received.last().unwrap().headers["authorization"], format!("Bearer {new}"));
}

#[tokio::test]
async fn the_second_401_is_returned() {
    let simulator = Simulator::new();
    let api = Server::tls(&simulator).await.unwrap();
    let proxy = start_with_token_url(&simulator, &api).await;
    simulator.reject_jwts(true);
    let answer = Caller::http1(&proxy).post("/v1/audio/agent/sessions", "{}").await;
    answer.assert_error(401, "authentication_error", "invalid_token");
    assert!(
        answer.headers["www-authenticate"].to_str().unwrap().starts_with("Bearer error=\"invalid_token\"")
    );
    let received = simulator.received();
    let calls = received.iter().filter(|request| request.uri.path() == "/v1/audio/agent/sessions").count();
    assert_eq!((calls, simulator.token_requests()), (2, 2));
}

#[tokio::test]
async fn long_requests_are_not_replayed() {
    let simulator = Simulator::new();
    let api = Server::tls(&simulator).await.unwrap();
    let (old, new) = (secret(simulator.issue_key()), secret(simulator.issue_key()));
    let proxy = Launch::for_api(&api).key_file(&old).start().await;
    let caller = Caller::http1(&proxy);
    simulator.revoke_key(&old);
    let long = format!(r#"{{"messages":[],"x":"{}"}}"#, "y".repeat(3 * 1024 * 1024));
    let answer = caller.post("/v1/chat/completions", long.clone()).await;
    answer.assert_error(401, "authentication_error", "invalid_api_key");
    assert_eq!(simulator.requests(), 1);
    proxy.scratch().write("key", &new);
    eventually("the new key is accepted", async || {
        (caller.post("/v1/chat/completions", long.clone()).await.status == 200).then_some(())
    })
    .await;
}

#[tokio::test]
async fn other_errors_pass_unchanged() {
    let simulator = Simulator::new();
    let api = Server::tls(&simulator).await.unwrap();
    let proxy = Launch::for_api(&api).env("SELAM_API_KEY", secret(simulator.issue_key())).start().await;
    let caller = Caller::http2(&proxy);
    simulator.inject(Fault::RateLimited { retry_after: std::time::Duration::from_secs(7) });
    let answer = caller.chat().await;
    answer.assert_error(429, "rate_limit_error", "rate_limit_exceeded");
    assert_eq!(answer.headers["retry-after"], "7");
    simulator.inject(Fault::Unavailable);
    caller.chat().await.assert_error(503, "server_error", "unavailable");
    simulator.inject(Fault::Html(StatusCode::BAD_GATEWAY));
    let answer = caller.chat().await;
    assert_eq!(answer.status, 502);
    assert!(answer.text().starts_with("<!DOCTYPE html>"));
    assert_eq!(simulator.requests(), 3);
}

#[track_caller]
fn assert_no_upstream(answer: &Answer) {
    answer.assert_error(502, "api_error", "upstream_unavailable");
}

#[tokio::test]
async fn an_unreachable_api_is_a_502() {
    // A closed port.
    let gone = TlsListener::listen(Protocol::Http1).await;
    let proxy = Launch::with_key(&gone).start().await;
    drop(gone);
    for protocol in Protocol::BOTH {
        assert_no_upstream(&Caller::new(&proxy, protocol).post("/v1/chat/completions", BODY).await);
    }

    // A host name that does not exist.
    let proxy = Launch::new()
        .env("SELAM_API_KEY", secret(random()))
        .env("SELAM_BASE_URL", "https://nowhere.invalid/v1")
        .start()
        .await;
    assert_no_upstream(&Caller::http1(&proxy).chat().await);

    // A certificate from an untrusted authority.
    let mut untrusted = TlsListener::listen(Protocol::Http1).await.exchanges();
    let proxy = Launch::new()
        .env("SELAM_API_KEY", secret(random()))
        .env("SELAM_BASE_URL", untrusted.base_url())
        .start()
        .await;
    assert_no_upstream(&Caller::http1(&proxy).chat().await);
    untrusted.assert_silent();

    // A port without TLS.
    let plain = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let url = format!("https://localhost:{}/v1", plain.local_addr().unwrap().port());
    let serving = tokio::spawn(async move {
        loop {
            let (mut stream, _) = plain.accept().await.unwrap();
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        }
    });
    let launch = Launch::new().env("SELAM_API_KEY", secret(random()));
    let proxy = launch.env("SELAM_BASE_URL", url).start().await;
    assert_no_upstream(&Caller::http1(&proxy).chat().await);
    serving.abort();
}

#[tokio::test]
async fn invalid_http_from_the_api_is_a_502() {
    let api = TlsListener::listen(Protocol::Http1).await;
    let proxy = Launch::with_key(&api).start().await;
    for answer in [
        &b""[..],
        b"220 mail.example ESMTP\r\n",
        b"HTTP/1.1 20",
        b"HTTP/1.1 200 OK\r\nBad Header\r\n\r\n",
        // No upgrade was requested.
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: other\r\n\r\n",
    ] {
        let caller = Caller::http1(&proxy);
        let calling = tokio::spawn(async move { caller.chat().await });
        let mut connection = api.accept().await;
        read_head(&mut connection).await;
        connection.write_all(answer).await.unwrap();
        connection.shutdown().await.unwrap();
        drop(connection);
        assert_no_upstream(&calling.await.unwrap());
    }
}

#[tokio::test]
async fn an_unavailable_credential_is_a_503() {
    let simulator = Simulator::new();
    let api = Server::tls(&simulator).await.unwrap();
    let proxy = start_with_token_url(&simulator, &api).await;
    let caller = Caller::http1(&proxy);
    simulator.set_token_outage(true);
    for _ in 0..3 {
        let answer = caller.chat().await;
        answer.assert_error(503, "api_error", "credential_unavailable");
        let wait: u64 = answer.headers["retry-after"].to_str().unwrap().parse().unwrap();
        assert!((1..=3600).contains(&wait), "{wait}");
    }
    // No request was sent without a credential.
    assert_eq!(simulator.requests(), simulator.token_requests());
    simulator.set_token_outage(false);
    eventually("a JWT is available", async || (caller.chat().await.status == 200).then_some(())).await;
}

#[tokio::test]
async fn token_endpoint_errors_stay_hidden_from_callers() {
    let simulator = Simulator::new();
    let api = Server::tls(&simulator).await.unwrap();
    let (id, client_secret) = simulator.issue_client();
    let url = api.base_url().replace("/v1", "/oauth/token");
    let proxy = Launch::for_api(&api)
        .env("SELAM_API_KEY", secret(simulator.issue_key()))
        .env("SELAM_TOKEN_URL", url)
        .env("SELAM_CLIENT_ID", id)
        .env("SELAM_CLIENT_SECRET", secret(&client_secret))
        .start()
        .await;
    let body = format!(r#"{{"error":"invalid_client","error_description":"unheard of: {client_secret}"}}"#);
    let denied = Response::builder().status(401).body(body.into()).unwrap();
    simulator.inject_token_fault(TokenFault::Answer(denied));
    let answer = Caller::http1(&proxy).chat().await;
    answer.assert_error(503, "api_error", "credential_unavailable");
    assert!(answer.headers.contains_key("retry-after"));
    assert!(!answer.text().contains("unheard"));
}
