//! Web pages in Chromium, which use the proxy from listed and unlisted origins: `tests/chromium/`.

use std::{
    fs::File,
    path::PathBuf,
    process::Stdio,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::{SinkExt, StreamExt};
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    process::{Child, ChildStdout, Command},
    time,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{handshake::derive_accept_key, protocol::Role},
};
use tower::ServiceExt;
use tower_selam::simulator::{JwtAlgorithm, Server, Simulator};

use crate::support::{
    Body, Caller, Launch, Protocol, Proxy, Scratch, TlsListener, assert_clean, example, full, npm, random,
    secret, with_timeout,
};

/// Generous, since starting Chromium takes long on busy machines.
const TIMEOUT: Duration = Duration::from_secs(240);

/// Headers of the API that are for no page.
fn hostile() -> HeaderMap {
    let headers = [
        ("access-control-allow-origin", "*"),
        ("access-control-allow-credentials", "true"),
        ("set-cookie", "session=1"),
        ("strict-transport-security", "max-age=60"),
        ("x-not-exposed", "1"),
    ];
    headers
        .map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value)))
        .into_iter()
        .collect()
}

/// Answers as the API: the simulator, and what it has no endpoints for.
async fn answer(simulator: Simulator, mut request: Request<Incoming>) -> Response<Body> {
    let mut response = Response::builder();
    let mut text = "";
    match request.uri().path() {
        "/v1/options" => text = "from the API",
        "/v1/events" => {
            response = response.header("content-type", "text/event-stream");
            text = "data: first\n\ndata: last\n\n";
        }
        "/v1/limited" => {
            for (name, value) in [
                ("retry-after", "2"),
                ("retry-after-ms", "1500"),
                ("x-ratelimit-remaining", "0"),
                ("x-ratelimit-reset-after", "2"),
                ("x-request-id", "req_limited"),
                ("content-type", "application/json"),
            ] {
                response = response.header(name, value);
            }
            response = response.status(429);
            text = r#"{"error":{"message":"Slow down.","type":"rate_limit_error","code":"rate_limit_exceeded"}}"#;
        }
        "/v1/broken" => response = response.header("x-large", "x".repeat(70 * 1024)),
        "/v1/live" => {
            let accepted = derive_accept_key(request.headers()["sec-websocket-key"].as_bytes());
            let upgrade = hyper::upgrade::on(&mut request);
            tokio::spawn(async move {
                let stream = TokioIo::new(upgrade.await.unwrap());
                let mut socket = WebSocketStream::from_raw_socket(stream, Role::Server, None).await;
                while let Some(Ok(message)) = socket.next().await {
                    if message.is_text() {
                        socket.send(message).await.unwrap();
                    }
                }
            });
            let upgraded =
                [("connection", "upgrade"), ("upgrade", "websocket"), ("sec-websocket-accept", &*accepted)];
            response = upgraded
                .into_iter()
                .fold(response.status(101), |response, (name, value)| response.header(name, value));
        }
        _ => return simulator.oneshot(request).await.unwrap().map(BodyExt::boxed_unsync),
    }
    response.body(full(text)).unwrap()
}

/// Returns Node, Chromium, and the folder of the programs for Node; or why there are none.
async fn tools(scratch: &Scratch) -> Result<(PathBuf, PathBuf, PathBuf), String> {
    let node = npm::find_program(&["node"])?;
    let chromium = npm::find_program(&["chromium", "chromium-browser", "google-chrome"])?;
    Ok((node, chromium, npm::install("chromium", scratch).await?))
}

/// Starts a program, and returns the first line of its output.
async fn start(command: &mut Command) -> (Child, BufReader<ChildStdout>, String) {
    let mut child = command.stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    with_timeout(output.read_line(&mut line)).await.unwrap();
    (child, output, line.trim_end().to_owned())
}

#[tokio::test]
async fn pages_in_chromium_use_the_proxy() {
    let scratch = Scratch::new();
    let (node, chromium, folder) = match tools(&scratch).await {
        Ok(tools) => tools,
        Err(why) => return npm::skip("the test in Chromium", &why),
    };
    let errors = scratch.path("errors");
    let mut command = Command::new(node);
    command.arg("driver.js").args([&chromium, &scratch.path("profile")]).current_dir(folder);
    for name in ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"] {
        command.env_remove(name);
    }
    command.stdin(Stdio::piped()).stderr(File::create(&errors).unwrap());
    let (mut driver, mut output, port) = start(&mut command).await;

    let simulator = Simulator::new();
    simulator.set_rate_limit(1_000_000);
    let key = secret(simulator.issue_key());
    let token = secret(format!("caller-{}", random()));
    let received = Arc::new(Mutex::new(Vec::new()));
    let api = TlsListener::listen(Protocol::Http1).await.exchanges().answer_all({
        let (simulator, received) = (simulator.clone(), Arc::clone(&received));
        move |request| {
            received.lock().unwrap().push(format!("{request:?}"));
            let answer = answer(simulator.clone(), request);
            async move {
                let mut response = answer.await;
                response.headers_mut().extend(hostile());
                response
            }
        }
    });
    let origin = format!("http://localhost:{port}");
    let launch = || Launch::for_api(&api).env("SELAM_API_KEY", &key).env("SELAM_PROXY_ALLOW_ORIGIN", &origin);
    let local = launch().start().await;
    let allowed = [
        "POST:/v1/chat/completions",
        "GET:/v1/limited",
        "GET:/v1/broken",
        "OPTIONS:/v1/options",
        "GET:/v1/live",
    ];
    let authenticated = launch()
        .callers(&format!("web:{token}\n"))
        .args(allowed.iter().flat_map(|rule| ["--allow", rule]))
        .start()
        .await;
    // The simulator's own server, which switches to WebSocket for the voice agent.
    let agent = Server::tls(&simulator).await.unwrap();
    let jwt = secret(simulator.mint_jwt(JwtAlgorithm::Hs256, Duration::from_secs(3600)));
    let launch = || {
        let launch = Launch::for_api(&agent).env("SELAM_API_KEY", &key).env("SELAM_JWT", &jwt);
        launch.env("SELAM_PROXY_ALLOW_ORIGIN", &origin).arg("--voice-agent")
    };
    let local_voice = launch().start().await;
    let authenticated_voice = launch().callers(&format!("web:{token}\n")).start().await;
    let mut command = Command::new(example("browser"));
    command.env_clear().env("TMPDIR", scratch.path("")).stderr(Stdio::null());
    let (_demo, _output, link) = start(&mut command).await;

    let url = |proxy: &Proxy| format!("http://{}", proxy.address());
    let input = json!({
        "authenticated": url(&authenticated),
        "local": url(&local),
        "voice": { "authenticated": url(&authenticated_voice), "local": url(&local_voice) },
        "token": token,
        "demo": link.split_whitespace().last(),
        // To look at the page: `SCREENSHOTS=target cargo test …`.
        "screenshots": std::env::var_os("SCREENSHOTS").map(|folder| std::path::absolute(folder).unwrap()),
    });
    driver.stdin.take().unwrap().write_all(format!("{input}\n").as_bytes()).await.unwrap();
    let mut seen = String::new();
    let ended = time::timeout(TIMEOUT, output.read_to_string(&mut seen)).await;
    let errors = std::fs::read_to_string(errors).unwrap();
    assert!(ended.is_ok() && seen.ends_with("all is well\n"), "{seen}{errors}");

    // The pages saw no secret except the token that they have.
    assert_clean("what pages received", seen.replace(&token, "").as_bytes());
    // Nothing of the unlisted page reached the API, not even a request whose answer it cannot read.
    let simulated: Vec<String> = simulator
        .received()
        .iter()
        .map(|sent| format!("{} {:?} {}", sent.uri, sent.headers, String::from_utf8_lossy(&sent.body)))
        .collect();
    assert!(simulated.iter().any(|sent| sent.contains("one two three")));
    for sent in received.lock().unwrap().iter().chain(&simulated) {
        assert!(!sent.contains("unlisted") && !sent.contains(&origin), "{sent}");
    }
    let metrics = Caller::http1(&authenticated).with_token(&token).get("/metrics").await;
    assert!(metrics.text().contains("reason=\"origin_not_allowed\""), "{}", metrics.text());
}
