//! Graceful shutdown: no new connections are accepted, and requests in flight are finished.

use std::{
    fs::{self, File},
    process::Command,
    time::Duration,
};

use http::{Method, Response};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::oneshot,
    time,
};

use crate::support::{
    Caller, Launch, Protocol, Proxy, TlsListener, assert_ended, channel_body, empty, eventually, frame, full,
    random, raw, read, read_to_end, response_head, upgraded, with_timeout,
};

/// How long requests in flight have to finish.
const GRACE: Duration = Duration::from_secs(30);

/// Asserts that the proxy exits with 0, before the grace period is over.
#[track_caller]
fn exits(proxy: &mut Proxy) -> impl Future<Output = ()> {
    let place = std::panic::Location::caller();
    async move {
        match time::timeout(GRACE - Duration::from_secs(10), proxy.exit_status()).await {
            Ok(status) => assert_eq!(status.code(), Some(0), "at {place}"),
            Err(_) => panic!("the proxy does not exit, at {place}"),
        }
    }
}

/// Waits until connections are refused.
async fn stopped_accepting(proxy: &Proxy) {
    eventually("connections are refused", async || {
        TcpStream::connect(proxy.address()).await.is_err().then_some(())
    })
    .await;
}

#[tokio::test]
async fn an_idle_proxy_exits_at_once() {
    for signal in ["TERM", "INT"] {
        let mut proxy = Launch::new().env("SELAM_API_KEY", "sk-selam-x").start().await;
        proxy.signal(signal);
        exits(&mut proxy).await;
    }
}

#[tokio::test]
async fn requests_in_flight_are_finished() {
    for (callers, apis) in Protocol::PAIRS {
        let mut api = TlsListener::listen(apis).await.exchanges();
        let mut proxy = Launch::with_key(&api).start().await;
        // A stream has begun, a request has no answer yet, and an upload is incomplete.
        let begin = |body| {
            let caller = Caller::new(&proxy, callers);
            tokio::spawn(async move {
                caller.send(caller.request(Method::POST, "/v1/chat/completions").body(body).unwrap()).await
            })
        };
        let streaming = begin(empty());
        let (feed, body) = channel_body();
        api.next().await.respond(200, body);
        let mut streaming = with_timeout(streaming).await.unwrap();
        feed.data("before").await;
        assert_eq!(frame(streaming.body_mut()).await.unwrap().unwrap().into_data().unwrap(), "before");
        let waiting = begin(empty());
        let unanswered = api.next().await;
        let (upload, body) = channel_body();
        let uploading = begin(body);
        let uploaded = api.next().await;

        proxy.terminate();
        stopped_accepting(&proxy).await;
        assert!(proxy.is_running());

        feed.data("after").await;
        assert_eq!(frame(streaming.body_mut()).await.unwrap().unwrap().into_data().unwrap(), "after");
        drop(feed);
        assert_ended(streaming.body_mut()).await;
        assert!(proxy.is_running());
        unanswered.respond(200, full("late"));
        assert_eq!(read(with_timeout(waiting).await.unwrap()).await.body, "late");
        assert!(proxy.is_running());
        upload.data("upload").await;
        drop(upload);
        let request = uploaded.request;
        assert_eq!(
            with_timeout(http_body_util::BodyExt::collect(request.into_body())).await.unwrap().to_bytes(),
            "upload"
        );
        uploaded.answer.send(Response::new(empty())).unwrap();
        assert_eq!(with_timeout(uploading).await.unwrap().status(), 200);
        exits(&mut proxy).await;
    }
}

#[tokio::test]
async fn idle_connections_are_closed() {
    let mut proxy = Launch::new().env("SELAM_API_KEY", "sk-selam-x").start().await;
    // One without a request yet, one between two requests, and one over HTTP/2.
    let mut silent = raw(&proxy).await;
    let mut idle = raw(&proxy).await;
    idle.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    assert!(response_head(&mut idle).await.starts_with("HTTP/1.1 200 "));
    let mut body = [0; 3];
    with_timeout(idle.read_exact(&mut body)).await.unwrap();
    assert_eq!(&body, b"ok\n");
    let http2 = Caller::http2(&proxy);
    assert_eq!(http2.get("/healthz").await.status, 200);

    proxy.terminate();
    exits(&mut proxy).await;
    assert_eq!(read_to_end(&mut silent).await, b"");
    assert_eq!(read_to_end(&mut idle).await, b"");
    drop(http2);
}

#[tokio::test]
async fn a_connection_closes_after_its_last_answer() {
    let mut api = TlsListener::listen(Protocol::Http2).await.exchanges();
    let mut proxy = Launch::with_key(&api).start().await;
    let mut caller = raw(&proxy).await;
    caller.write_all(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    let exchange = api.next().await;
    proxy.terminate();
    stopped_accepting(&proxy).await;
    exchange.respond(200, full("done"));
    let answer = String::from_utf8(read_to_end(&mut caller).await).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(answer.ends_with("\r\n\r\ndone"), "{answer}");
    exits(&mut proxy).await;
}

#[tokio::test]
async fn upgraded_connections_are_finished() {
    let api = TlsListener::listen(Protocol::Http1).await;
    let mut proxy = Launch::with_key(&api).start().await;
    let (mut caller, mut connection) = upgraded(&proxy, &api).await;

    proxy.terminate();
    stopped_accepting(&proxy).await;
    caller.write_all(b"still").await.unwrap();
    let mut heard = [0; 5];
    with_timeout(connection.read_exact(&mut heard)).await.unwrap();
    assert_eq!(&heard, b"still");
    assert!(proxy.is_running());
    caller.shutdown().await.unwrap();
    assert_eq!(read_to_end(&mut connection).await, b"");
    connection.shutdown().await.unwrap();
    drop(connection);
    assert_eq!(read_to_end(&mut caller).await, b"");
    exits(&mut proxy).await;
}

/// What is in flight is cut off, as it is when the grace period is over.
#[tokio::test]
async fn a_second_signal_ends_the_grace_period() {
    let mut api = TlsListener::listen(Protocol::Http2).await.exchanges();
    let mut proxy = Launch::with_key(&api).start().await;
    let caller = Caller::http1(&proxy);
    let begin = || {
        let caller = caller.clone();
        tokio::spawn(async move {
            caller.try_send(caller.request(Method::GET, "/v1/models").body(empty()).unwrap()).await
        })
    };
    let streaming = begin();
    let (_feed, body) = channel_body();
    api.next().await.respond(200, body);
    let mut streaming = with_timeout(streaming).await.unwrap().unwrap();
    let waiting = begin();
    let _unanswered = api.next().await;
    proxy.terminate();
    stopped_accepting(&proxy).await;
    assert!(proxy.is_running());
    proxy.terminate();
    exits(&mut proxy).await;
    assert!(waiting.await.unwrap().is_err());
    assert!(matches!(frame(streaming.body_mut()).await, Some(Err(_))));
}

#[tokio::test]
async fn a_blocked_file_read_does_not_delay_the_exit() {
    let api = TlsListener::listen(Protocol::Http2).await.exchanges();
    let mut proxy = Launch::with_key(&api).callers(&format!("web:{}\n", random())).start().await;
    let (tokens, pipe) = (proxy.scratch().path("tokens"), proxy.scratch().path("pipe"));
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    fs::rename(pipe, &tokens).unwrap();
    let (opened, pipe_opened) = oneshot::channel();
    // The pipe can be opened once the proxy reads it; the proxy then waits for data that is never written.
    std::thread::spawn(move || opened.send(File::options().write(true).open(tokens)));
    let _silent = with_timeout(pipe_opened).await.unwrap().unwrap();
    proxy.terminate();
    exits(&mut proxy).await;
}
