//! Bodies that are far larger than what the proxy may take of memory.

use http::Method;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::{io::AsyncWriteExt, task::JoinHandle};

use crate::support::{Caller, Exchange, Launch, Protocol, Proxy, Stream, fed, raw, response_head, soon};

const GIB: u64 = 1024 * 1024 * 1024;

/// What it may take more of memory than before, in KiB.
const ALLOWED: u64 = 32 * 1024;

/// Counts a body, and looks at the proxy's memory on the way.
fn counting(mut body: Incoming) -> JoinHandle<u64> {
    tokio::spawn(async move {
        let mut counted = 0;
        while let Some(frame) = soon(body.frame()).await {
            let data = frame.unwrap().into_data().unwrap();
            // Not a byte of it is another.
            assert!(data.iter().step_by(509).all(|byte| *byte == b'u'));
            counted += data.len() as u64;
        }
        counted
    })
}

/// The most memory that the proxy ever took, where the system tells.
fn peak(proxy: &Proxy) -> u64 {
    proxy.peak_memory().unwrap_or_default()
}

#[track_caller]
fn assert_little(proxy: &Proxy, before: u64) {
    let more = peak(proxy).saturating_sub(before);
    assert!(more < ALLOWED, "{more} KiB more than before");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_of_a_gib_takes_little_memory() {
    let mut api = Stream::listen(Protocol::Http1).await.exchanges();
    let proxy = Launch::to(&api).start().await;
    let before = peak(&proxy);
    let mut caller = raw(&proxy).await;
    let head = format!("POST /v1/files HTTP/1.1\r\nHost: the.proxy\r\nContent-Length: {GIB}\r\n\r\n");
    caller.write_all(head.as_bytes()).await.unwrap();
    let Exchange { request, answer } = api.next().await;
    assert_eq!(request.headers()["content-length"], GIB.to_string());
    let counting = counting(request.into_body());
    let chunk = vec![b'u'; 1024 * 1024];
    for _ in 0..GIB / chunk.len() as u64 {
        soon(caller.write_all(&chunk)).await.unwrap();
    }
    assert_eq!(counting.await.unwrap(), GIB);
    answer.send(http::Response::new(crate::support::empty())).unwrap();
    assert!(response_head(&mut caller).await.starts_with("HTTP/1.1 200 "));
    assert_little(&proxy, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_over_http2_takes_little_memory_too() {
    const LENGTH: u64 = GIB / 8;
    let mut api = Stream::listen(Protocol::Http2).await.exchanges();
    let proxy = Launch::to(&api).start().await;
    let before = peak(&proxy);
    let caller = Caller::http2(&proxy);
    let (feed, body) = fed();
    let request = caller.request(Method::POST, "/v1/files").body(body).unwrap();
    let calling = tokio::spawn(async move { caller.send(request).await });
    let Exchange { request, answer } = api.next().await;
    let counting = counting(request.into_body());
    let chunk = bytes::Bytes::from(vec![b'u'; 1024 * 1024]);
    for _ in 0..LENGTH / chunk.len() as u64 {
        feed.data(chunk.clone()).await;
    }
    drop(feed);
    assert_eq!(counting.await.unwrap(), LENGTH);
    answer.send(http::Response::new(crate::support::empty())).unwrap();
    assert_eq!(calling.await.unwrap().status(), 200);
    assert_little(&proxy, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_download_takes_little_memory() {
    const LENGTH: u64 = GIB / 8;
    for (callers, apis) in [(Protocol::Http1, Protocol::Http2), (Protocol::Http2, Protocol::Http1)] {
        let mut api = Stream::listen(apis).await.exchanges();
        let proxy = Launch::to(&api).start().await;
        let before = peak(&proxy);
        let caller = Caller::new(&proxy, callers);
        let request = caller.request(Method::GET, "/v1/files/7").body(crate::support::empty()).unwrap();
        let calling = tokio::spawn(async move { caller.send(request).await });
        let (feed, body) = fed();
        api.next().await.respond(200, body);
        let counting = counting(calling.await.unwrap().into_body());
        let chunk = bytes::Bytes::from(vec![b'u'; 1024 * 1024]);
        for _ in 0..LENGTH / chunk.len() as u64 {
            feed.data(chunk.clone()).await;
        }
        drop(feed);
        assert_eq!(counting.await.unwrap(), LENGTH);
        assert_little(&proxy, before);
    }
}
