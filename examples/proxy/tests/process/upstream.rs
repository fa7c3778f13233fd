//! Connections to the API: how long they are reused, how large headers may be, and the HTTP proxy on the way.

use std::time::Duration;

use http::{HeaderName, Method, Response, response::Builder};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time,
};

use crate::support::{
    Answer, Caller, Launch, Protocol, REMOTE_HOST, Tls, TlsListener, empty, full, read, read_head, secret,
    with_timeout,
};

/// Sends a `POST`, and answers it on the connection.
async fn exchange(caller: &Caller, connection: &mut Tls, keep_alive: &str) {
    let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n{keep_alive}\r\nok");
    let answering = async {
        assert!(read_head(connection).await.starts_with("POST "));
        connection.read_exact(&mut [0; 2]).await.unwrap();
        connection.write_all(answer.as_bytes()).await.unwrap();
    };
    let (posted, ()) = tokio::join!(caller.post("/v1/files", "hi"), with_timeout(answering));
    assert_eq!(posted.status, 200);
}

/// Sends a `POST`, and returns the connection that it opens.
async fn exchange_on_another(api: &TlsListener, caller: &Caller, keep_alive: &str) -> Tls {
    let (caller, keep_alive) = (caller.clone(), keep_alive.to_owned());
    let posting = tokio::spawn(async move { caller.post("/v1/files", "hi").await });
    let mut connection = api.accept().await;
    read_head(&mut connection).await;
    let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n{keep_alive}\r\nok");
    connection.write_all(answer.as_bytes()).await.unwrap();
    assert_eq!(posting.await.unwrap().status, 200);
    connection.read_exact(&mut [0; 2]).await.unwrap();
    connection
}

#[tokio::test]
async fn connections_are_not_reused_after_their_idle_time() {
    let api = TlsListener::listen(Protocol::Http1).await;
    let proxy = Launch::with_key(&api).env("SELAM_PROXY_API_IDLE", "1").start().await;
    let caller = Caller::http1(&proxy);
    // Whatever longer time the API announces. It does not close the connection.
    let _connection = exchange_on_another(&api, &caller, "Keep-Alive: timeout=60\r\n").await;
    time::sleep(Duration::from_millis(1500)).await;
    exchange_on_another(&api, &caller, "").await;
}

#[tokio::test]
async fn a_shorter_idle_time_of_the_api_counts() {
    let api = TlsListener::listen(Protocol::Http1).await;
    let proxy = Launch::with_key(&api).env("SELAM_PROXY_API_IDLE", "60").start().await;
    let caller = Caller::http1(&proxy);
    let mut connection = exchange_on_another(&api, &caller, "").await;
    exchange(&caller, &mut connection, "Keep-Alive: timeout=60\r\n").await;
    // Only the last announcement counts.
    exchange(&caller, &mut connection, "keep-alive: max=9, Timeout = 1\r\n").await;
    time::sleep(Duration::from_millis(1000)).await;
    let _connection = exchange_on_another(&api, &caller, "Keep-Alive: timeout=0\r\n").await;
    exchange_on_another(&api, &caller, "").await;
}

/// A response is no idle time, however long it takes.
#[tokio::test]
async fn slow_responses_do_not_count_as_idle() {
    let api = TlsListener::listen(Protocol::Http1).await;
    let proxy = Launch::with_key(&api).args(["--api-idle", "2"]).start().await;
    let caller = Caller::http1(&proxy);
    let mut connection = exchange_on_another(&api, &caller, "").await;
    let posting = tokio::spawn({
        let caller = caller.clone();
        async move { caller.post("/v1/files", "hi").await }
    });
    read_head(&mut connection).await;
    with_timeout(connection.read_exact(&mut [0; 2])).await.unwrap();
    time::sleep(Duration::from_millis(2200)).await;
    connection.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
    assert_eq!(posting.await.unwrap().status, 200);
    exchange(&caller, &mut connection, "").await;
}

/// Adds headers of this total size, in so many parts.
fn with_headers<T>(mut builder: T, size: usize, parts: usize, add: impl Fn(T, HeaderName, String) -> T) -> T {
    let value = "v".repeat(size / parts - 6);
    for number in 0..parts {
        builder = add(builder, format!("x-{number:04}").parse().unwrap(), value.clone());
    }
    builder
}

#[tokio::test]
async fn large_headers_pass_over_every_version() {
    for (callers, apis) in Protocol::PAIRS {
        let mut api = TlsListener::listen(apis).await.exchanges();
        let proxy = Launch::with_key(&api).start().await;
        let caller = Caller::new(&proxy, callers);
        for (size, parts, expected) in [
            (20_000, 1, 200),
            (65_000, 1, 200),
            (65_000, 80, 200),
            (65_000, 1_000, 200),
            (66_000, 1, 502),
            (66_000, 1_000, 502),
            (20_000, 1_040, 502),
        ] {
            let request = caller.request(Method::POST, "/v1/files").body(full("hi")).unwrap();
            let calling = tokio::spawn({
                let caller = caller.clone();
                async move { read(caller.send(request).await).await }
            });
            let response = with_headers(Response::builder(), size, parts, Builder::header);
            api.next().await.answer(response.body(empty()).unwrap());
            let answer = calling.await.unwrap();
            let case = format!("{callers:?} {apis:?} {size} in {parts}");
            assert_eq!(answer.status, expected, "{case}");
            if expected == 200 {
                let passed = answer.headers.keys().filter(|name| name.as_str().starts_with("x-0")).count();
                assert_eq!(passed, parts, "{case}");
            } else {
                answer.assert_error(502, "api_error", "response_headers_too_large");
            }
        }
    }
}

/// The request side towards the API, which has no limit of its own.
#[tokio::test]
async fn a_large_request_header_reaches_every_api() {
    for apis in Protocol::BOTH {
        let mut api = TlsListener::listen(apis).await.exchanges();
        let proxy = Launch::with_key(&api).start().await;
        let caller = Caller::http1(&proxy);
        let request = with_headers(
            caller.request(Method::GET, "/v1/models"),
            60_000,
            1,
            http::request::Builder::header,
        );
        let calling =
            tokio::spawn(async move { read(caller.send(request.body(empty()).unwrap()).await).await });
        let received = api.next().await.respond(200, empty());
        assert_eq!(received.headers["x-0000"].len(), 60_000 - 6, "{apis:?}");
        assert_eq!(calling.await.unwrap().status, 200);
    }
}

/// Serves one `CONNECT` of an HTTP proxy: leads to `port` of this machine, and reports the head of the request.
async fn tunnel(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    port: u16,
    heads: mpsc::UnboundedSender<String>,
) {
    heads.send(read_head(&mut stream).await).unwrap();
    let mut server = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    stream.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await.unwrap();
    let _ = copy_bidirectional(&mut stream, &mut server).await;
}

async fn get(caller: &Caller) -> Answer {
    caller.get("/v1/models").await
}

#[tokio::test]
async fn an_http_proxy_leads_to_the_api() {
    for over_tls in [false, true] {
        let api = TlsListener::listen(Protocol::Http2).await;
        let (port, password) = (api.port(), secret("proxy-p%40ss-word"));
        let (sender, mut heads) = mpsc::unbounded_channel();
        let url = if over_tls {
            let listener = TlsListener::listen(Protocol::Http1).await;
            let url = format!("https://user:{password}@localhost:{}", listener.port());
            tokio::spawn(async move {
                loop {
                    tokio::spawn(tunnel(listener.accept().await, port, sender.clone()));
                }
            });
            url
        } else {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("http://user:{password}@127.0.0.1:{}", listener.local_addr().unwrap().port());
            tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    tokio::spawn(tunnel(stream, port, sender.clone()));
                }
            });
            url
        };
        let basic = secret("dXNlcjpwcm94eS1wQHNzLXdvcmQ=");
        let remote = format!("https://{REMOTE_HOST}");
        let proxy = Launch::with_key(&api)
            .env("SELAM_BASE_URL", format!("{remote}/v1"))
            .env("SELAM_TOKEN_URL", format!("{remote}/oauth/token"))
            .env("https_proxy", &url)
            .env("NO_PROXY", "other.example")
            .start()
            .await;
        let shown = url.split('@').next_back().unwrap().to_owned();
        assert!(proxy.logs("through an HTTP proxy").await.contains(&shown));
        let mut api = api.exchanges();
        let calling = tokio::spawn({
            let caller = Caller::http1(&proxy);
            async move { get(&caller).await }
        });
        let token = r#"{"access_token":"an-opaque-token","token_type":"Bearer","expires_in":3600}"#;
        let issued = Response::builder().header("content-type", "application/json").body(full(token));
        for (path, response) in [("/oauth/token", issued.unwrap()), ("/v1/models", Response::new(empty()))] {
            let received = api.next().await.answer(response);
            assert_eq!(received.uri.path(), path);
            assert!(!format!("{:?}", received.headers).contains("proxy-authorization"));
            let head = with_timeout(heads.recv()).await.unwrap().to_ascii_lowercase();
            assert!(head.starts_with(&format!("connect {REMOTE_HOST}:443 http/1.1\r\n")), "{path}");
            assert!(head.contains(&format!("proxy-authorization: basic {}", basic.to_ascii_lowercase())));
        }
        assert_eq!(calling.await.unwrap().status, 200);
    }
}

#[tokio::test]
async fn a_failing_http_proxy_is_a_502() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://127.0.0.1:{}", listener.local_addr().unwrap().port());
    let api = TlsListener::listen(Protocol::Http2).await;
    let launch = || {
        let base = format!("https://{REMOTE_HOST}:1/v1");
        Launch::with_key(&api).env("SELAM_BASE_URL", base).env("ALL_PROXY", &url)
    };
    let proxy = launch().start().await;
    let caller = Caller::http1(&proxy);
    let calling = tokio::spawn(async move { get(&caller).await });
    let (mut stream, _) = with_timeout(listener.accept()).await.unwrap();
    assert!(read_head(&mut stream).await.starts_with(&format!("CONNECT {REMOTE_HOST}:1 ")));
    stream.write_all(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n").await.unwrap();
    calling.await.unwrap().assert_error(502, "api_error", "upstream_unavailable");

    // An exception is connected to directly, which fails here: the host does not exist.
    let proxy = launch().env("no_proxy", REMOTE_HOST).start().await;
    get(&Caller::http1(&proxy)).await.assert_error(502, "api_error", "upstream_unavailable");
    assert!(!proxy.errors().contains("through an HTTP proxy"));
    let pending =
        std::future::poll_fn(|cx| std::task::Poll::Ready(listener.poll_accept(cx).is_pending())).await;
    assert!(pending, "no connection to the HTTP proxy");
}

#[tokio::test]
async fn an_unusable_http_proxy_is_refused_at_the_start() {
    let api = TlsListener::listen(Protocol::Http2).await;
    for (name, value) in
        [("HTTPS_PROXY", "socks5://user:s3cr3t-word@one:1"), ("all_proxy", "http://s3cr3t-word:x")]
    {
        secret("s3cr3t-word");
        let error = Launch::with_key(&api).env(name, value).fail().await;
        assert!(error.starts_with(&format!("proxy: {name}: ")), "{error}");
    }
    // Empty variables count as not set.
    let launch = Launch::with_key(&api).env("HTTPS_PROXY", "").env("NO_PROXY", "").env("ALL_PROXY", "");
    launch.start().await;
}
