//! Streams bodies that are far larger than the memory the proxy may use.

use http::{Method, Response};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::{
    io::AsyncWriteExt,
    sync::mpsc,
    task::{JoinHandle, JoinSet},
};

use crate::support::{
    Caller, Exchange, Launch, Protocol, Proxy, TlsListener, channel_body, frame, full, raw, response_head,
    with_timeout,
};

/// The length of each body, far more than the proxy's memory may rise.
const LENGTH: u64 = 128 * 1024 * 1024;

/// How far the proxy's peak memory may rise, in KiB.
const MAX_INCREASE: u64 = 32 * 1024;

/// Counts the bytes of a body, and checks their content.
fn count(mut body: Incoming) -> JoinHandle<u64> {
    tokio::spawn(async move {
        let mut counted = 0;
        while let Some(frame) = with_timeout(body.frame()).await {
            let data = frame.unwrap().into_data().unwrap();
            // A sample is enough: checking every byte would be slow.
            assert!(data.iter().step_by(509).all(|byte| *byte == b'u'));
            counted += data.len() as u64;
        }
        counted
    })
}

/// The proxy's peak memory in KiB, or 0 on systems that do not report it.
fn peak(proxy: &Proxy) -> u64 {
    proxy.peak_memory().unwrap_or_default()
}

#[track_caller]
fn assert_memory_bounded(proxy: &Proxy, before: u64) {
    let increase = peak(proxy).saturating_sub(before);
    assert!(increase < MAX_INCREASE, "peak memory rose by {increase} KiB");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_streams() {
    let mut api = TlsListener::listen(Protocol::Http1).await.exchanges();
    let proxy = Launch::with_key(&api).start().await;
    let before = peak(&proxy);
    let mut caller = raw(&proxy).await;
    let head = format!("POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: {LENGTH}\r\n\r\n");
    caller.write_all(head.as_bytes()).await.unwrap();
    let Exchange { request, answer } = api.next().await;
    assert_eq!(request.headers()["content-length"], LENGTH.to_string());
    let counted = count(request.into_body());
    let chunk = vec![b'u'; 1024 * 1024];
    for _ in 0..LENGTH / chunk.len() as u64 {
        with_timeout(caller.write_all(&chunk)).await.unwrap();
    }
    assert_eq!(counted.await.unwrap(), LENGTH);
    answer.send(http::Response::new(crate::support::empty())).unwrap();
    assert!(response_head(&mut caller).await.starts_with("HTTP/1.1 200 "));
    assert_memory_bounded(&proxy, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_over_http2_streams() {
    let mut api = TlsListener::listen(Protocol::Http2).await.exchanges();
    let proxy = Launch::with_key(&api).start().await;
    let before = peak(&proxy);
    let caller = Caller::http2(&proxy);
    let (feed, body) = channel_body();
    let request = caller.request(Method::POST, "/v1/files").body(body).unwrap();
    let calling = tokio::spawn(async move { caller.send(request).await });
    let Exchange { request, answer } = api.next().await;
    let counted = count(request.into_body());
    let chunk = bytes::Bytes::from(vec![b'u'; 1024 * 1024]);
    for _ in 0..LENGTH / chunk.len() as u64 {
        feed.data(chunk.clone()).await;
    }
    drop(feed);
    assert_eq!(counted.await.unwrap(), LENGTH);
    answer.send(http::Response::new(crate::support::empty())).unwrap();
    assert_eq!(calling.await.unwrap().status(), 200);
    assert_memory_bounded(&proxy, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_download_streams() {
    for (callers, apis) in [(Protocol::Http1, Protocol::Http2), (Protocol::Http2, Protocol::Http1)] {
        let mut api = TlsListener::listen(apis).await.exchanges();
        let proxy = Launch::with_key(&api).start().await;
        let before = peak(&proxy);
        let caller = Caller::new(&proxy, callers);
        let request = caller.request(Method::GET, "/v1/files/7").body(crate::support::empty()).unwrap();
        let calling = tokio::spawn(async move { caller.send(request).await });
        let (feed, body) = channel_body();
        api.next().await.respond(200, body);
        let counted = count(calling.await.unwrap().into_body());
        let chunk = bytes::Bytes::from(vec![b'u'; 1024 * 1024]);
        for _ in 0..LENGTH / chunk.len() as u64 {
            feed.data(chunk.clone()).await;
        }
        drop(feed);
        assert_eq!(counted.await.unwrap(), LENGTH);
        assert_memory_bounded(&proxy, before);
    }
}

/// How much memory the proxy may take in all, in KiB.
const MAX_MEMORY: u64 = 64 * 1024;

/// How many bytes each caller uploads one by one.
const TINY_CHUNKS: usize = 128 * 1024;

/// M1: a thousand streams are open, while four callers upload bodies in chunks of one byte.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tiny_chunks_and_a_thousand_streams_take_little_memory() {
    let (started, mut all_started) = mpsc::unbounded_channel();
    let api = TlsListener::listen(Protocol::Http2).await.exchanges().answer_all(move |request| {
        let started = started.clone();
        async move {
            if request.method() == Method::PUT {
                return Response::new(full(count(request.into_body()).await.unwrap().to_string()));
            }
            let (feed, body) = channel_body();
            feed.data("data: first\n\n").await;
            started.send(feed).unwrap();
            Response::new(body)
        }
    });
    let proxy = Launch::with_key(&api).start().await;
    // As few descriptors as the usual limit allows.
    let many: Vec<_> = (0..9).map(|_| Caller::http2(&proxy)).collect();
    let mut open = Vec::new();
    // A hundred streams begin at once: more handshakes together take a busy machine longer than the proxy waits for a connection.
    for hundred in 0..10_usize {
        let mut streams = JoinSet::new();
        for _ in 0..100 {
            let caller = match hundred.checked_sub(1) {
                None => Caller::http1(&proxy),
                Some(number) => many[number].clone(),
            };
            let request = caller.request(Method::POST, "/v1/chat/completions").body(full("{}")).unwrap();
            streams.spawn(async move {
                let mut response = caller.send(request).await;
                assert_eq!(response.status(), 200);
                assert!(frame(response.body_mut()).await.unwrap().is_ok());
                response
            });
        }
        open.extend(with_timeout(streams.join_all()).await);
    }
    let mut feeds = Vec::new();
    for _ in &open {
        feeds.push(with_timeout(all_started.recv()).await.unwrap());
    }
    let mut uploads = JoinSet::new();
    for _ in 0..4 {
        let mut caller = raw(&proxy).await;
        uploads.spawn(async move {
            let host = caller.peer_addr().unwrap();
            let head =
                format!("PUT /v1/files HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\r\n");
            caller.write_all(head.as_bytes()).await.unwrap();
            let chunks = b"1\r\nu\r\n".repeat(TINY_CHUNKS / 64);
            for _ in 0..64 {
                with_timeout(caller.write_all(&chunks)).await.unwrap();
            }
            caller.write_all(b"0\r\n\r\n").await.unwrap();
            assert!(response_head(&mut caller).await.starts_with("HTTP/1.1 200 "));
        });
    }
    uploads.join_all().await;
    assert!(peak(&proxy) < MAX_MEMORY, "{} KiB", peak(&proxy));
    drop((open, feeds));
}
