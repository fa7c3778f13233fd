//! Client tokens, `--allow`, and requests from web pages.

use std::{path::PathBuf, time::Duration};

use http::Method;
use tokio::time::{self, Instant};
use tower_selam::simulator::{Server, Simulator};

use crate::support::{Caller, Launch, Protocol, Proxy, empty, eventually, random, read, secret};

async fn launch() -> (Simulator, Server, Launch) {
    let simulator = Simulator::new();
    simulator.set_rate_limit(1_000_000);
    let api = Server::tls(&simulator).await.unwrap();
    let launch = Launch::for_api(&api).env("SELAM_API_KEY", secret(simulator.issue_key()));
    (simulator, api, launch)
}

fn token() -> String {
    secret(format!("caller-{}", random()))
}

#[tokio::test]
async fn three_headers_may_carry_the_token() {
    let (simulator, _api, launch) = launch().await;
    let (web, app) = (token(), token());
    let proxy = launch.callers(&format!("# who\nweb:{web}\r\n\napp: {app}")).start().await;
    for protocol in Protocol::BOTH {
        let caller = Caller::new(&proxy, protocol);
        let bearer = format!("Bearer {web}");
        for headers in [
            &[("authorization", &*bearer)][..],
            &[("authorization", &*format!("bearer {app}"))],
            &[("x-api-key", &*web)],
            &[("api-key", &*app)],
            &[("authorization", "Bearer some.other.jwt"), ("x-api-key", &*app)],
        ] {
            assert_eq!(caller.chat_with(headers).await.status, 200, "{headers:?}");
        }
    }
    assert_eq!(simulator.requests(), 10);
}

#[tokio::test]
async fn missing_and_wrong_tokens_are_refused() {
    let (simulator, _api, launch) = launch().await;
    let web = token();
    let proxy = launch.callers(&format!("web:{web}\n")).start().await;
    for protocol in Protocol::BOTH {
        let caller = Caller::new(&proxy, protocol);
        for headers in [
            &[][..],
            &[("authorization", "")],
            &[("authorization", "Bearer ")],
            &[("authorization", &*format!("Basic {web}"))],
            &[("x-goog-api-key", &*web)],
            &[("cookie", &*format!("token={web}"))],
        ] {
            let answer = caller.chat_with(headers).await;
            answer.assert_error(401, "authentication_error", "missing_api_key");
            assert!(answer.headers["www-authenticate"].to_str().unwrap().starts_with("Bearer"));
        }
        let short = &web[..web.len() - 1];
        for headers in [
            &[("authorization", "Bearer wrong")][..],
            &[("authorization", &*format!("Bearer {short}"))],
            &[("authorization", &*format!("Bearer {web}x"))],
            &[("authorization", &*format!("Bearer {}", web.to_uppercase()))],
            &[("authorization", &*format!("Bearer web:{web}"))],
            &[("x-api-key", "web")],
        ] {
            let answer = caller.chat_with(headers).await;
            answer.assert_error(401, "authentication_error", "invalid_api_key");
            assert!(answer.headers.contains_key("www-authenticate"));
        }
        // A token in the query is not accepted, since URLs end up in logs.
        let answer = caller.get(&format!("/v1/models?token={web}&api_key={web}")).await;
        answer.assert_error(401, "authentication_error", "missing_api_key");
    }
    assert_eq!(simulator.requests(), 0);
}

#[tokio::test]
async fn a_refusal_reaches_callers_that_send_first() {
    let (simulator, _api, launch) = launch().await;
    let proxy = launch.callers(&format!("web:{}\n", token())).start().await;
    for protocol in Protocol::BOTH {
        let answer =
            Caller::new(&proxy, protocol).post("/v1/chat/completions", vec![b' '; 2 * 1024 * 1024]).await;
        answer.assert_error(401, "authentication_error", "missing_api_key");
    }
    assert_eq!(simulator.requests(), 0);
}

async fn is_accepted(proxy: &Proxy, token: &str) -> bool {
    match Caller::http1(proxy).with_token(token).chat().await.status.as_u16() {
        200 => true,
        401 => false,
        other => panic!("{other}"),
    }
}

/// Writes the file in place. Returns the longest time between two writes.
async fn write_byte_by_byte(path: PathBuf, lines: String) -> Duration {
    let mut file = std::fs::File::create(path).unwrap();
    let (mut longest, mut last) = (Duration::ZERO, Instant::now());
    for byte in lines.as_bytes() {
        time::sleep(Duration::from_millis(5)).await;
        std::io::Write::write_all(&mut file, &[*byte]).unwrap();
        longest = longest.max(last.elapsed());
        last = Instant::now();
    }
    longest
}

#[tokio::test]
async fn the_token_file_is_reloaded() {
    let (_simulator, _api, launch) = launch().await;
    let (old, new, other) = (token(), token(), token());
    let proxy = launch.callers(&format!("web:{old}\napp:{other}\n")).start().await;
    assert!(is_accepted(&proxy, &old).await);
    proxy.scratch().write("tokens", format!("web:{new}\napp:{other}\n"));
    eventually("the new token is accepted", async || is_accepted(&proxy, &new).await.then_some(())).await;
    assert!(!is_accepted(&proxy, &old).await);
    assert!(is_accepted(&proxy, &other).await);

    // Written in place, instead of replaced by another file.
    std::fs::write(proxy.scratch().path("tokens"), format!("app:{old}\n")).unwrap();
    eventually("the old token is accepted again", async || is_accepted(&proxy, &old).await.then_some(()))
        .await;
    assert!(!is_accepted(&proxy, &new).await && !is_accepted(&proxy, &other).await);

    // Written byte by byte: a table that lacks its end, or a token that is cut off, never takes effect.
    let lines = format!("app:{old}\nlast:{new}{other}\n");
    loop {
        let writing = tokio::spawn(write_byte_by_byte(proxy.scratch().path("tokens"), lines.clone()));
        let mut is_whole = true;
        while !writing.is_finished() {
            is_whole &= is_accepted(&proxy, &old).await && !is_accepted(&proxy, &new).await;
        }
        // After a pause of 200 ms, the proxy takes what it finds for the whole file. On a busy machine there may be one.
        if writing.await.unwrap() < Duration::from_millis(150) {
            assert!(is_whole);
            break;
        }
        proxy.scratch().write("tokens", format!("app:{old}\n"));
        eventually("the old token is accepted alone", async || {
            (is_accepted(&proxy, &old).await && !is_accepted(&proxy, &new).await).then_some(())
        })
        .await;
    }
    let last = format!("{new}{other}");
    eventually("the whole file is loaded", async || is_accepted(&proxy, &last).await.then_some(())).await;
    assert!(is_accepted(&proxy, &old).await && !is_accepted(&proxy, &new).await);
}

#[tokio::test]
async fn an_invalid_token_file_keeps_the_last_tokens() {
    let (_simulator, _api, launch) = launch().await;
    let (good, bad) = (token(), token());
    let proxy = launch.callers(&format!("web:{good}\n")).start().await;

    proxy.scratch().write("tokens", format!("web:{bad}\n{bad}\n"));
    proxy.logs("line 2").await;
    assert!(is_accepted(&proxy, &good).await && !is_accepted(&proxy, &bad).await);

    std::fs::write(proxy.scratch().path("tokens"), "").unwrap();
    proxy.logs("nobody").await;
    assert!(is_accepted(&proxy, &good).await);

    std::fs::remove_file(proxy.scratch().path("tokens")).unwrap();
    proxy.logs("cannot be read").await;
    assert!(is_accepted(&proxy, &good).await);

    // A repaired file takes effect.
    proxy.scratch().write("tokens", format!("web:{bad}\n"));
    eventually("the repaired file is loaded", async || is_accepted(&proxy, &bad).await.then_some(())).await;
    assert!(!is_accepted(&proxy, &good).await);
}

#[tokio::test]
async fn requests_outside_the_rules_are_refused() {
    let (simulator, _api, launch) = launch().await;
    let web = token();
    let proxy = launch
        .callers(&format!("web:{web}\n"))
        .args(["--allow", "POST:/v1/chat/completions", "--allow", "*:/v1/audio/*"])
        .start()
        .await;
    let caller = Caller::http1(&proxy).with_token(&web);
    for (method, path) in [
        ("GET", "/v1/chat/completions"),
        ("HEAD", "/v1/chat/completions"),
        ("POST", "/v1/chat/completions/"),
        ("POST", "/v1/chat/completions/batch"),
        ("POST", "/v1/Chat/completions"),
        ("POST", "/v1/chat"),
        ("POST", "/v1"),
        ("GET", "/v1/audio"),
        ("GET", "/v1/audiobook/x"),
        ("DELETE", "/v1/files/7"),
    ] {
        let request = caller.request(method.parse::<Method>().unwrap(), path).body(empty()).unwrap();
        let answer = read(caller.send(request).await).await;
        assert_eq!(answer.status, 403, "{method} {path}");
        if method != "HEAD" {
            answer.assert_error(403, "authorization_error", "insufficient_permissions");
        }
    }
    assert_eq!(simulator.requests(), 0);
    assert_eq!(caller.chat().await.status, 200);
    assert_eq!(caller.post("/v1/chat/completions?a=1", "{}").await.status, 200);
    assert_eq!(caller.post("/v1/audio/speech", "{}").await.status, 200);
    assert_eq!(simulator.requests(), 3);
    // The token is checked first: without one, a caller does not learn which paths are allowed.
    Caller::http1(&proxy).get("/v1/files").await.assert_error(401, "authentication_error", "missing_api_key");
}

#[tokio::test]
async fn web_pages_on_other_machines_need_a_token() {
    let (simulator, api, launch) = launch().await;
    let proxy = launch.start().await;
    for protocol in Protocol::BOTH {
        let caller = Caller::new(&proxy, protocol);
        for origin in
            ["https://page.example", "http://localhost.page.example", "http://127.0.0.1.page.example", "null"]
        {
            let answer = caller.chat_with(&[("origin", origin)]).await;
            answer.assert_error(403, "authorization_error", "insufficient_permissions");
        }
        assert_eq!(simulator.requests(), 0);
    }
    for origin in ["http://localhost:3000", "http://127.0.0.1:5173"] {
        assert_eq!(Caller::http1(&proxy).chat_with(&[("origin", origin)]).await.status, 200, "{origin}");
    }

    let web = token();
    let launch = Launch::for_api(&api).env("SELAM_API_KEY", secret(simulator.issue_key()));
    let proxy = launch.callers(&format!("web:{web}\n")).start().await;
    let bearer = format!("Bearer {web}");
    let headers = [("origin", "https://page.example"), ("authorization", &*bearer)];
    assert_eq!(Caller::http1(&proxy).chat_with(&headers).await.status, 200);
}
