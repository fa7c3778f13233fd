//! Connections of callers: answers to uploads that are refused, idle and anonymous connections, and large headers.

use std::{
    io::{self, ErrorKind},
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Response};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    time::Instant,
};

use crate::support::{
    Caller, Exchange, Feed, Launch, Protocol, Proxy, TlsListener, channel_body, empty, eventually, full,
    random, raw, read, read_head, read_to_end, response_head, secret, upgraded, with_timeout,
};

/// More than all buffers between the two sides can hold.
const UPLOAD: usize = 16 * 1024 * 1024;

/// How the caller frames the upload, and the bytes that it sends before it reads.
fn uploads(target: &str, token: &str) -> Vec<(&'static str, Vec<u8>)> {
    let length = format!("Content-Length: {UPLOAD}\r\n");
    let chunks = || {
        let chunk = [b"10000\r\n", &*vec![b'x'; 0x10000], b"\r\n"].concat();
        let mut chunks = chunk.repeat(UPLOAD / 0x10000);
        chunks.extend_from_slice(b"0\r\n\r\n");
        chunks
    };
    let data = || vec![b'x'; UPLOAD];
    [
        ("content-length", "1.1", length.clone(), data()),
        ("chunked", "1.1", "Transfer-Encoding: chunked\r\n".to_owned(), chunks()),
        ("close", "1.1", format!("{length}Connection: close\r\n"), data()),
        ("expect", "1.1", format!("{length}Expect: 100-continue\r\n"), data()),
        ("http/1.0", "1.0", length, data()),
    ]
    .into_iter()
    .map(|(name, version, headers, body)| {
        let head = format!(
            "POST {target} HTTP/{version}\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n{headers}\r\n"
        );
        (name, [head.into_bytes(), body].concat())
    })
    .collect()
}

/// Sends everything, then reads everything.
async fn write_then_read(proxy: &Proxy, sent: &[u8]) -> String {
    let mut caller = raw(proxy).await;
    with_timeout(caller.write_all(sent)).await.unwrap();
    String::from_utf8(read_to_end(&mut caller).await).unwrap()
}

fn assert_answer(answer: &str, status: u16, case: &str) {
    // Some callers ask for `100 Continue`, but do not wait for it.
    let answer = answer.strip_prefix("HTTP/1.1 100 Continue\r\n\r\n").unwrap_or(answer);
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{case}: {answer:?}"));
    let head = head.to_ascii_lowercase();
    let status = format!(" {status} ");
    assert!(head.lines().next().is_some_and(|line| line.contains(&status)), "{case}: {head}");
    assert!(head.contains("connection: close") || head.starts_with("http/1.0"), "{case}: {head}");
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
    assert_eq!(length, body.len().to_string(), "{case}: {answer}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_upload_gets_its_answer() {
    let token = secret(random());
    let proxy = Launch::new()
        .env("SELAM_API_KEY", "sk-selam-x")
        .callers(&format!("web:{token}\n"))
        .args(["--allow", "POST:/v1/files"])
        .start()
        .await;
    for (target, token, status) in
        [("/v1/files", "wrong", 401), ("/v1/other", &*token, 403), ("/elsewhere", &token, 404)]
    {
        for (case, sent) in uploads(target, token) {
            let answer = write_then_read(&proxy, &sent).await;
            assert_answer(&answer, status, &format!("{target} {case}"));
        }
    }
}

/// The API answers before the body, and does not read it. The connection stays open, or is closed at once, which resets it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_early_answer_of_the_api_arrives() {
    let api = TlsListener::listen(Protocol::Http1).await;
    let proxy = Launch::with_key(&api).start().await;
    for (status, length, closes) in [
        (413, 20, false),
        (403, 20, false),
        (500, 0, false),
        (413, UPLOAD, false),
        (413, 20, true),
        (401, 20, true),
        (200, 20, true),
    ] {
        for (case, sent) in uploads("/v1/files", "none") {
            let calling = write_then_read(&proxy, &sent);
            let answering = async {
                let mut connection = api.accept().await;
                read_head(&mut connection).await;
                let answer =
                    format!("HTTP/1.1 {status} No\r\nContent-Length: {length}\r\n\r\n{}", "x".repeat(length));
                with_timeout(connection.write_all(answer.as_bytes())).await.unwrap();
                with_timeout(connection.flush()).await.unwrap();
                (!closes).then_some(connection)
            };
            let (answer, connection) = tokio::join!(calling, answering);
            drop(connection);
            assert_answer(&answer, status, &format!("{status} {case}, closes: {closes}"));
        }
    }
}

/// The proxy refuses after it has forwarded a part of the body: the API breaks off.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_refusal_arrives() {
    let api = TlsListener::listen(Protocol::Http1).await;
    let proxy = Launch::with_key(&api).start().await;
    for (case, sent) in uploads("/v1/files", "none") {
        let calling = write_then_read(&proxy, &sent);
        let breaking = async {
            let mut connection = api.accept().await;
            read_head(&mut connection).await;
            let mut part = vec![0; 1024 * 1024];
            with_timeout(connection.read_exact(&mut part)).await.unwrap();
            drop(connection);
        };
        let (answer, ()) = tokio::join!(calling, breaking);
        assert_answer(&answer, 502, case);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_upload_over_http2_gets_its_answer() {
    let token = secret(random());
    let mut api = TlsListener::listen(Protocol::Http2).await.exchanges();
    let proxy = Launch::with_key(&api).callers(&format!("web:{token}\n")).start().await;
    let caller = Caller::http2(&proxy);
    // One connection carries all of them: a refused upload must not use up its window.
    for round in 0..40 {
        let sent = if round % 8 == 0 { UPLOAD } else { UPLOAD / 64 };
        let (feed, body) = channel_body();
        let refused = caller.request(Method::POST, "/v1/files").body(body).unwrap();
        let calling = tokio::spawn({
            let caller = caller.clone();
            async move { read(caller.send(refused).await).await }
        });
        send_refused(feed, sent).await;
        calling.await.unwrap().assert_error(401, "authentication_error", "missing_api_key");
        if round % 8 == 0 {
            let known = caller.clone().with_token(&token);
            let (feed, body) = channel_body();
            let early = known.request(Method::POST, "/v1/files").body(body).unwrap();
            let calling = tokio::spawn(async move { read(known.send(early).await).await });
            // The request is dropped unread.
            let Exchange { request, answer } = api.next().await;
            answer.send(Response::builder().status(413).body(full("too much")).unwrap()).unwrap();
            drop(request);
            send_refused(feed, UPLOAD).await;
            let answer = calling.await.unwrap();
            assert_eq!((answer.status.as_u16(), answer.text()), (413, "too much"));
        }
    }
}

/// Sends a body whose request is refused. The proxy reads it to its end, but waits for no more than 5 seconds.
async fn send_refused(feed: Feed, length: usize) {
    let (chunk, started) = (Bytes::from(vec![b'x'; 64 * 1024]), Instant::now());
    for _ in 0..length / chunk.len() {
        if !feed.try_data(chunk.clone()).await {
            return assert!(started.elapsed() > Duration::from_secs(5), "the rest is not read");
        }
    }
}

/// The stream is reset after the answer, if the caller sends nothing more.
#[tokio::test]
async fn a_refused_stream_is_reset_without_an_error() {
    let proxy = Launch::new()
        .env("SELAM_API_KEY", "sk-selam-x")
        .callers(&format!("web:{}\n", secret(random())))
        .args(["--keep-alive", "1"])
        .start()
        .await;
    let mut caller = raw_http2(&proxy).await;
    // `POST /v1/files` without its end.
    write_frame(&mut caller, 1, 4, 1, b"\x83\x86\x04\x09/v1/files\x01\x01x").await;
    write_frame(&mut caller, 0, 0, 1, &[b'x'; 1000]).await;
    let frames = frames(caller).await;
    let of_stream: Vec<_> =
        frames.iter().filter(|(_, stream, _)| *stream == 1).map(|(kind, _, _)| *kind).collect();
    // HEADERS, DATA, WINDOW_UPDATE and RST_STREAM.
    assert!(of_stream.starts_with(&[1, 0]) && of_stream.ends_with(&[3]), "{of_stream:?}");
    assert!(frames.contains(&(3, 1, vec![0; 4])), "{frames:?}");
}

/// A short body that was not read does not cost the connection.
#[tokio::test]
async fn a_connection_survives_a_short_refused_request() {
    let proxy = Launch::new()
        .env("SELAM_API_KEY", "sk-selam-x")
        .callers(&format!("web:{}\n", secret(random())))
        .start()
        .await;
    let mut caller = raw(&proxy).await;
    for _ in 0..10 {
        let body = "x".repeat(40_000);
        let head =
            format!("POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n", body.len());
        caller.write_all(head.as_bytes()).await.unwrap();
        let head = response_head(&mut caller).await.to_ascii_lowercase();
        assert!(head.starts_with("http/1.1 401 ") && !head.contains("connection: close"), "{head}");
        // The body comes after the answer.
        caller.write_all(body.as_bytes()).await.unwrap();
        let length: usize = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length: ")?.parse().ok())
            .expect("a length");
        with_timeout(caller.read_exact(&mut vec![0; length])).await.unwrap();
    }
}

/// Begins an HTTP/2 connection on which the test writes every frame itself.
async fn raw_http2(proxy: &Proxy) -> TcpStream {
    let mut caller = raw(proxy).await;
    caller.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    write_frame(&mut caller, 4, 0, 0, b"").await;
    caller
}

async fn write_frame(caller: &mut TcpStream, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let head = [&length[1..], &[kind, flags], &stream.to_be_bytes()].concat();
    caller.write_all(&[&head, payload].concat()).await.unwrap();
}

/// Reads and answers frames until the connection is closed. Returns their kinds, streams and payloads.
async fn frames(mut caller: TcpStream) -> Vec<(u8, u32, Vec<u8>)> {
    let mut frames = Vec::new();
    loop {
        let mut head = [0; 9];
        if with_timeout(caller.read_exact(&mut head)).await.is_err() {
            return frames;
        }
        let [a, b, c, kind, flags, stream @ ..] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        with_timeout(caller.read_exact(&mut payload)).await.unwrap();
        const PING: u8 = 6;
        if kind == PING && flags & 1 == 0 {
            write_frame(&mut caller, PING, 1, 0, &payload).await;
        }
        frames.push((kind, u32::from_be_bytes(stream), payload));
    }
}

/// `GET /healthz` in HPACK, as the only request of stream 1.
async fn request_health(caller: &mut TcpStream) {
    write_frame(caller, 1, 5, 1, b"\x82\x86\x04\x08/healthz\x01\x01x").await;
}

fn has_goaway(frames: &[(u8, u32, Vec<u8>)]) -> bool {
    const GOAWAY: u8 = 7;
    frames.iter().any(|(kind, ..)| *kind == GOAWAY)
}

#[tokio::test]
async fn idle_connections_are_closed_after_the_keep_alive_time() {
    // An idle connection is kept for longer than the head of a request may take.
    let proxy = Launch::new()
        .env("SELAM_API_KEY", "sk-selam-x")
        .args(["--keep-alive", "3", "--head-timeout", "1"])
        .start()
        .await;
    let limit = Duration::from_secs(3);
    let http1 = async {
        let mut caller = raw(&proxy).await;
        caller.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
        let started = Instant::now();
        let answer = String::from_utf8(read_to_end(&mut caller).await).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("ok\n"), "{answer}");
        assert!(started.elapsed() > limit - Duration::from_millis(100), "{:?}", started.elapsed());
    };
    let http2 = async {
        let mut caller = raw_http2(&proxy).await;
        request_health(&mut caller).await;
        let started = Instant::now();
        let frames = frames(caller).await;
        assert!(has_goaway(&frames), "{frames:?}");
        assert!(started.elapsed() > limit - Duration::from_millis(100), "{:?}", started.elapsed());
    };
    // This caller does not answer the ping that precedes the last GOAWAY.
    let silent = async {
        let mut caller = raw_http2(&proxy).await;
        request_health(&mut caller).await;
        assert!(read_to_end(&mut caller).await.len() > 9);
    };
    tokio::join!(http1, http2, silent);
}

#[tokio::test]
async fn late_heads_are_cut_off() {
    let proxy = Launch::new()
        .env("SELAM_API_KEY", "sk-selam-x")
        .args(["--keep-alive", "60", "--head-timeout", "1"])
        .start()
        .await;
    let first: &[&[u8]] = &[b"", b"P", b"PRI * HTTP/2.0\r\n", b"GET /healthz HTTP/1.1\r\nHost:"];
    let mut connections: Vec<_> = Vec::new();
    for part in first {
        let mut caller = raw(&proxy).await;
        caller.write_all(part).await.unwrap();
        connections.push(caller);
    }
    // The second request of a connection.
    let mut caller = raw(&proxy).await;
    caller.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    response_head(&mut caller).await;
    with_timeout(caller.read_exact(&mut [0; 3])).await.unwrap();
    caller.write_all(b"GET /healthz HTT").await.unwrap();
    connections.push(caller);
    for mut caller in connections {
        // A reset is as good: there is no answer to lose.
        let mut rest = Vec::new();
        let _ = with_timeout(caller.read_to_end(&mut rest)).await;
        assert_eq!(rest, b"");
    }

    // An HTTP/2 connection without a request, or with half of one.
    let idle = raw_http2(&proxy).await;
    let mut half = raw_http2(&proxy).await;
    write_frame(&mut half, 1, 1, 1, b"\x82\x86\x04\x08/he").await;
    let (idle, half) = tokio::join!(frames(idle), frames(half));
    assert!(has_goaway(&idle) && has_goaway(&half), "{idle:?} {half:?}");

    // A head that trickles in is late as well.
    let (mut reader, mut writer) = raw(&proxy).await.into_split();
    let trickle = tokio::spawn(async move {
        loop {
            if writer.write_all(b"G").await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let _ = with_timeout(reader.read_to_end(&mut Vec::new())).await;
    with_timeout(trickle).await.unwrap();
}

#[tokio::test]
async fn requests_outlast_every_limit() {
    let outlast = async |protocol| {
        let mut api = TlsListener::listen(Protocol::Http1).await.exchanges();
        let proxy = Launch::with_key(&api).args(["--keep-alive", "1", "--head-timeout", "1"]).start().await;
        let caller = Caller::new(&proxy, protocol);
        let (upload, body) = channel_body();
        let request = caller.request(Method::POST, "/v1/files").body(body).unwrap();
        let calling = tokio::spawn(async move { caller.send(request).await });
        let exchange = api.next().await;
        // Both limits pass while the body, and then the answer, is awaited.
        tokio::time::sleep(Duration::from_millis(2500)).await;
        upload.data("late").await;
        drop(upload);
        tokio::time::sleep(Duration::from_millis(1500)).await;
        exchange.respond(200, full("later"));
        assert_eq!(read(calling.await.unwrap()).await.body, "later");
    };
    tokio::join!(outlast(Protocol::Http1), outlast(Protocol::Http2));
}

#[tokio::test]
async fn strangers_cannot_occupy_all_connections() {
    let token = secret(random());
    let api = TlsListener::listen(Protocol::Http1).await.exchanges();
    let api = api.answer_all(async |_| Response::new(full("fine")));
    let proxy = Launch::with_key(&api)
        .callers(&format!("web:{token}\n"))
        .args(["--max-connections", "16"])
        .start()
        .await;
    let known = Caller::http1(&proxy).with_token(&token);
    assert_eq!(known.get("/v1/models").await.body, "fine");
    let mut strangers = Vec::new();
    for round in 0..60 {
        let stranger = match round % 3 {
            0 => raw(&proxy).await,
            1 => raw_http2(&proxy).await,
            _ => {
                let mut stranger = raw(&proxy).await;
                let request = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n";
                stranger.write_all(request).await.unwrap();
                stranger
            }
        };
        strangers.push(stranger);
        if round % 10 == 0 {
            assert_eq!(known.get("/v1/models").await.body, "fine");
            let other = Caller::new(&proxy, Protocol::BOTH[round / 10 % 2]).with_token(&token);
            assert_eq!(other.get("/v1/models").await.body, "fine");
        }
    }
    // The oldest are closed.
    for stranger in &mut strangers[..30] {
        let _ = with_timeout(stranger.read_to_end(&mut Vec::new())).await;
    }
    // Beyond an eighth, those that are a second old are closed.
    let kept = eventually("strangers are closed", async || {
        let probe = raw(&proxy).await;
        let mut open = 0;
        for stranger in &mut strangers[30..] {
            let mut bytes = [0; 1024];
            loop {
                match stranger.try_read(&mut bytes) {
                    Ok(0) => break,
                    Ok(_) => {}
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        open += 1;
                        break;
                    }
                    Err(_) => break,
                }
            }
        }
        drop(probe);
        (open <= 2).then_some(open)
    })
    .await;
    assert!(kept <= 2);
}

#[tokio::test]
async fn idle_upgraded_connections_are_closed() {
    let api = TlsListener::listen(Protocol::Http1).await;
    let proxy = Launch::with_key(&api).args(["--upgrade-idle", "1", "--keep-alive", "1"]).start().await;
    // Bytes in either direction count.
    for from_caller in [true, false] {
        let (moved, mut caller, mut connection) = loop {
            let (mut caller, mut connection) = upgraded(&proxy, &api).await;
            tokio::time::sleep(Duration::from_millis(600)).await;
            let moved = Instant::now();
            let has_moved = match from_caller {
                true => move_byte(&mut caller, &mut connection).await,
                false => move_byte(&mut connection, &mut caller).await,
            };
            // On a busy machine, the connection may be closed before.
            if has_moved.is_ok() {
                break (moved, caller, connection);
            }
        };
        assert_eq!(read_to_end(&mut caller).await, b"");
        assert!(moved.elapsed() > Duration::from_millis(900), "{from_caller} {:?}", moved.elapsed());
        let _ = with_timeout(connection.read_to_end(&mut Vec::new())).await;
    }
    proxy.logs("end=\"idle\"").await;
}

async fn move_byte(
    from: &mut (impl AsyncWrite + Unpin),
    to: &mut (impl AsyncRead + Unpin),
) -> io::Result<u8> {
    from.write_all(b"a").await?;
    with_timeout(to.read_u8()).await
}

#[tokio::test]
async fn headers_have_the_same_limit_in_each_version() {
    let mut api = TlsListener::listen(Protocol::Http1).await.exchanges();
    let proxy = Launch::with_key(&api).start().await;
    for protocol in Protocol::BOTH {
        let caller = Caller::new(&proxy, protocol);
        for (count, length, fits) in [
            (1, 60_000, true),
            (30, 2_000, true),
            (90, 700, true),
            (60, 1_000, true),
            (1, 65_600, false),
            (30, 2_200, false),
            (70, 1_000, false),
            (1_000, 90, false),
            (1_100, 1, false),
            (15, 7_000, false),
        ] {
            let mut request = caller.request(Method::GET, "/v1/models");
            for index in 0..count {
                request = request.header(format!("x-{index:06}"), "v".repeat(length));
            }
            let request = request.body(empty()).unwrap();
            let calling = caller.send(request);
            let case = format!("{protocol:?} {count} × {length}");
            if fits {
                let (response, ()) = tokio::join!(calling, async {
                    let parts = api.next().await.respond(200, full("fine"));
                    assert_eq!(parts.headers["x-000000"].len(), length, "{case}");
                });
                assert_eq!(response.status(), 200, "{case}");
            } else {
                let answer = read(calling.await).await;
                if count > 1_024 && protocol == Protocol::Http1 {
                    assert_eq!(answer.status, 431, "{case}");
                } else {
                    answer.assert_error(431, "invalid_request_error", "headers_too_large");
                }
            }
        }
        api.assert_silent();
    }
    // Far beyond the limit, the answer arrives as well.
    let mut caller = raw(&proxy).await;
    let head = format!("GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: {}\r\n\r\n", "x".repeat(4_000_000));
    with_timeout(caller.write_all(head.as_bytes())).await.unwrap();
    let answer = String::from_utf8(read_to_end(&mut caller).await).unwrap();
    assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
}

#[tokio::test]
async fn logged_texts_of_callers_are_short() {
    let proxy = Launch::new().env("SELAM_API_KEY", "sk-selam-x").start().await;
    let long = "x".repeat(60_000);
    for request in [
        format!("GET /v1/{long} HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        format!("GET /elsewhere/{long} HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        format!("{long} /v1/models HTTP/1.1\r\nHost: {long}\r\nOrigin: http://{long}\r\n\r\n"),
        format!("GET /v1/%0a%1b[31m{long} HTTP/1.1\r\nHost: localhost\r\nVia: 1.1 {long}\r\n\r\n"),
        format!("GET http://{long}/v1/models?{long} HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    ] {
        let mut caller = raw(&proxy).await;
        caller.write_all(request.as_bytes()).await.unwrap();
        response_head(&mut caller).await;
    }
    eventually("all requests are logged", async || {
        (proxy.errors().matches("end=\"").count() >= 4).then_some(())
    })
    .await;
    let log = proxy.errors();
    assert!(log.lines().all(|line| line.len() < 1024), "{log}");
    assert!(log.bytes().all(|byte| byte == b'\n' || !byte.is_ascii_control()), "{log:?}");
}

#[tokio::test]
async fn half_sent_heads_take_little_memory() {
    let launch = Launch::new().env("SELAM_API_KEY", "sk-selam-x");
    let proxy = launch.arg("--head-timeout").arg("300").start().await;
    let head = format!("GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: {}", "x".repeat(60_000));
    let mut strangers = Vec::new();
    // 6 MB of heads, from fewer strangers than may be connected.
    for _ in 0..100 {
        let mut stranger = raw(&proxy).await;
        // The proxy may close it meanwhile.
        let _ = stranger.write_all(head.as_bytes()).await;
        strangers.push(stranger);
    }
    eventually("some of them are closed", async || {
        let is_open = |stranger: &TcpStream| {
            stranger.try_read(&mut [0]).is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
        };
        (strangers.iter().filter(|stranger| is_open(stranger)).count() < 90).then_some(())
    })
    .await;
    // Short heads are not affected.
    assert_eq!(Caller::http1(&proxy).get("/healthz").await.status, 200);
}

#[tokio::test]
async fn uploads_after_the_answer_end() {
    let api = TlsListener::listen(Protocol::Http1).await;
    let proxy = Launch::with_key(&api).arg("--keep-alive").arg("1").start().await;
    let (mut reader, mut writer) = raw(&proxy).await.into_split();
    let writing = tokio::spawn(async move {
        let head = "POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n\r\n";
        writer.write_all(head.as_bytes()).await.unwrap();
        while writer.write_all(&[b'u'; 64 * 1024]).await.is_ok() {}
    });
    let mut connection = api.accept().await;
    read_head(&mut connection).await;
    // The API answers, and reads nothing more.
    connection.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
    let answer = String::from_utf8(read_to_end(&mut reader).await).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("ok"), "{answer}");
    writing.abort();
}
