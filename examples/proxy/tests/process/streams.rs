//! Streaming: every frame passes at once, and a disconnect on one side reaches the other.
//!
//! Nothing depends on timing: a test sends the next frame only after the previous one has arrived.

use std::time::Duration;

use http::{HeaderName, Method, Response};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::{Semaphore, mpsc},
    time::Instant,
};
use tower_selam::BoxError;

use crate::support::{
    Body, Caller, Exchange, Exchanges, Feed, Launch, Protocol, Proxy, TlsListener, assert_ended,
    channel_body, empty, frame, raw, read, read_head, read_to_end, response_head, with_timeout,
};

/// Reads one event from a body.
async fn event(body: &mut hyper::body::Incoming) -> Vec<u8> {
    let mut event = Vec::new();
    while !event.ends_with(b"\n\n") {
        event.extend_from_slice(frame(body).await.unwrap().unwrap().data_ref().unwrap());
    }
    event
}

fn sse(body: Body) -> Response<Body> {
    Response::builder().header("content-type", "text/event-stream").body(body).unwrap()
}

/// Sends a request on a task of the caller, which returns the head of the response.
async fn begin(
    caller: &Caller,
    method: Method,
    body: Body,
) -> tokio::task::JoinHandle<Result<Response<hyper::body::Incoming>, BoxError>> {
    let caller = caller.clone();
    tokio::spawn(async move {
        let request = caller.request(method, "/v1/chat/completions").body(body)?;
        Ok(caller.try_send(request).await?)
    })
}

/// Opens a stream: the API's side of it, and the response that the caller received.
async fn streaming(caller: &Caller, api: &mut Exchanges) -> (Feed, Response<hyper::body::Incoming>) {
    let calling = begin(caller, Method::POST, empty()).await;
    let (feed, body) = channel_body();
    api.next().await.answer(sse(body));
    (feed, calling.await.unwrap().unwrap())
}

#[tokio::test]
async fn events_pass_one_by_one() {
    for (callers, apis) in Protocol::PAIRS {
        let mut api = TlsListener::listen(apis).await.exchanges();
        let proxy = Launch::with_key(&api).start().await;
        // The head arrives before the first event.
        let (feed, mut response) = streaming(&Caller::new(&proxy, callers), &mut api).await;
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        for number in 0..50 {
            let sent = format!("data: {number}\n\n");
            feed.data(sent.clone()).await;
            assert_eq!(event(response.body_mut()).await, sent.as_bytes());
        }
        drop(feed);
        assert_ended(response.body_mut()).await;
    }
}

#[tokio::test]
async fn both_bodies_stream_concurrently() {
    for (callers, apis) in Protocol::PAIRS {
        let mut api = TlsListener::listen(apis).await.exchanges();
        let proxy = Launch::with_key(&api).start().await;
        let (upload, body) = channel_body();
        let calling = begin(&Caller::new(&proxy, callers), Method::POST, body).await;
        // The API receives the head before any of the body.
        let Exchange { request, answer } = api.next().await;
        let mut received = request.into_body();
        let (download, body) = channel_body();
        answer.send(sse(body)).unwrap();
        let mut response = calling.await.unwrap().unwrap();
        for number in 0..30 {
            let sent = format!("{number}\n\n");
            upload.data(sent.clone()).await;
            assert_eq!(event(&mut received).await, sent.as_bytes());
            download.data(sent.clone()).await;
            assert_eq!(event(response.body_mut()).await, sent.as_bytes());
        }
        // The response continues after the end of the request.
        drop(upload);
        assert_ended(&mut received).await;
        download.data("bye\n\n").await;
        assert_eq!(event(response.body_mut()).await, b"bye\n\n");
        drop(download);
        assert_ended(response.body_mut()).await;
    }
}

#[tokio::test]
async fn trailers_pass_both_ways() {
    for (callers, apis) in Protocol::PAIRS {
        let mut api = TlsListener::listen(apis).await.exchanges();
        let proxy = Launch::with_key(&api).start().await;
        let caller = Caller::new(&proxy, callers);
        let (upload, body) = channel_body();
        let request = caller
            .request(Method::POST, "/v1/chat/completions")
            .header("te", "trailers")
            .header("trailer", "x-asked")
            .body(body)
            .unwrap();
        let calling = tokio::spawn(async move { read(caller.send(request).await).await });
        let Exchange { request, answer } = api.next().await;
        assert_eq!(request.headers()["trailer"], "x-asked");
        upload.data("ask").await;
        upload.trailers("x-asked", "yes").await;
        let received = with_timeout(http_body_util::BodyExt::collect(request.into_body())).await.unwrap();
        assert_eq!(received.trailers().unwrap()["x-asked"], "yes", "{callers:?} {apis:?}");
        assert_eq!(received.to_bytes(), "ask");

        let (download, body) = channel_body();
        answer.send(Response::builder().header("trailer", "x-answered").body(body).unwrap()).unwrap();
        download.data("answer").await;
        download.trailers("x-answered", "well").await;
        let answer = calling.await.unwrap();
        assert_eq!(answer.headers["trailer"], "x-answered");
        assert_eq!(answer.trailers.unwrap()["x-answered"], "well", "{callers:?} {apis:?}");
        assert_eq!(answer.body, "answer");
    }
}

#[tokio::test]
async fn credentials_are_stripped_from_trailers() {
    const SENT: [&str; 6] =
        ["x-api-key", "api_key", "x-goog-api-key", "cookie", "proxy-authorization", "authorization"];
    for (callers, apis) in Protocol::PAIRS {
        let mut api = TlsListener::listen(apis).await.exchanges();
        let proxy = Launch::with_key(&api).start().await;
        let caller = Caller::new(&proxy, callers);
        let (upload, body) = channel_body();
        let request = caller
            .request(Method::POST, "/v1/chat/completions")
            .header("te", "trailers")
            .header("trailer", format!("x-asked, {}", SENT.join(", ")))
            .body(body)
            .unwrap();
        let calling = tokio::spawn(async move { caller.send(request).await });
        let Exchange { request, answer: _unanswered } = api.next().await;
        upload.all_trailers(SENT.into_iter().chain(["x-asked"]).map(|name| (name, "theirs"))).await;
        let received = with_timeout(http_body_util::BodyExt::collect(request.into_body())).await.unwrap();
        let names: Vec<_> = received.trailers().unwrap().keys().map(HeaderName::as_str).collect();
        assert_eq!(names, ["x-asked"], "{callers:?} {apis:?}");
        calling.abort();
    }
}

const EXPECTING: &str = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n\
     Content-Length: 4\r\n\r\n";

#[tokio::test]
async fn continue_is_relayed() {
    let api = TlsListener::listen(Protocol::Http1).await;
    let proxy = Launch::with_key(&api).start().await;
    let mut caller = raw(&proxy).await;
    caller.write_all(EXPECTING.as_bytes()).await.unwrap();
    let mut connection = api.accept().await;
    let head = read_head(&mut connection).await;
    assert!(head.contains("expect: 100-continue\r\n"), "{head}");
    connection.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.unwrap();
    assert!(response_head(&mut caller).await.starts_with("HTTP/1.1 100 "));
    caller.write_all(b"body").await.unwrap();
    let mut body = [0; 4];
    with_timeout(connection.read_exact(&mut body)).await.unwrap();
    assert_eq!(&body, b"body");
    connection.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await.unwrap();
    assert!(response_head(&mut caller).await.starts_with("HTTP/1.1 200 "));
}

/// Sends [`EXPECTING`], lets the API refuse it, and returns the caller's connection, the API's end, and the head of the answer.
async fn refused<T>(proxy: &Proxy, mut refuse: impl AsyncFnMut() -> T) -> (TcpStream, T, String) {
    loop {
        let mut caller = raw(proxy).await;
        let started = Instant::now();
        caller.write_all(EXPECTING.as_bytes()).await.unwrap();
        let refused = refuse().await;
        let head = response_head(&mut caller).await;
        // After a second the proxy rightly asks for the body, which happens on a busy machine.
        if !head.starts_with("HTTP/1.1 100 ") || started.elapsed() < Duration::from_secs(1) {
            return (caller, refused, head);
        }
    }
}

#[tokio::test]
async fn a_final_answer_replaces_continue() {
    let api = TlsListener::listen(Protocol::Http1).await;
    let proxy = Launch::with_key(&api).start().await;
    let (mut caller, _connection, head) = refused(&proxy, async || {
        let mut connection = api.accept().await;
        read_head(&mut connection).await;
        let refusal = b"HTTP/1.1 413 Payload Too Large\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno";
        connection.write_all(refusal).await.unwrap();
        connection
    })
    .await;
    assert!(head.starts_with("HTTP/1.1 413 "), "{head}");
    let mut body = [0; 2];
    with_timeout(caller.read_exact(&mut body)).await.unwrap();
    assert_eq!(&body, b"no");

    // The same over HTTP/2.
    let mut api = TlsListener::listen(Protocol::Http2).await.exchanges();
    let proxy = Launch::with_key(&api).start().await;
    let (_, _unread, head) = refused(&proxy, async || {
        let Exchange { request, answer } = api.next().await;
        answer.send(Response::builder().status(413).body(empty()).unwrap()).unwrap();
        request
    })
    .await;
    assert!(head.starts_with("HTTP/1.1 413 "), "{head}");
}

#[tokio::test]
async fn continue_is_sent_for_an_api_without_it() {
    for protocol in Protocol::BOTH {
        let mut api = TlsListener::listen(protocol).await.exchanges();
        let proxy = Launch::with_key(&api).start().await;
        let mut caller = raw(&proxy).await;
        caller.write_all(EXPECTING.as_bytes()).await.unwrap();
        // This API reads the body before it answers.
        let Exchange { request, answer } = api.next().await;
        let reading = tokio::spawn(http_body_util::BodyExt::collect(request.into_body()));
        let head = response_head(&mut caller).await;
        assert!(head.starts_with("HTTP/1.1 100 "), "{protocol:?} {head}");
        caller.write_all(b"body").await.unwrap();
        assert_eq!(with_timeout(reading).await.unwrap().unwrap().to_bytes(), "body");
        answer.send(Response::new(empty())).unwrap();
        assert!(response_head(&mut caller).await.starts_with("HTTP/1.1 200 "), "{protocol:?}");
    }
}

#[tokio::test]
async fn early_hints_are_dropped() {
    let api = TlsListener::listen(Protocol::Http1).await;
    let proxy = Launch::with_key(&api).start().await;
    let caller = Caller::http1(&proxy);
    let calling = tokio::spawn(async move { caller.get("/v1/models").await });
    let mut connection = api.accept().await;
    read_head(&mut connection).await;
    let answer = b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nwell";
    connection.write_all(answer).await.unwrap();
    let answer = calling.await.unwrap();
    assert_eq!((answer.status.as_u16(), &*answer.body), (200, &b"well"[..]));
    assert!(!answer.headers.contains_key("link"));
}

#[tokio::test]
async fn a_disconnected_caller_cancels_the_request() {
    for (callers, apis) in Protocol::PAIRS {
        let mut api = TlsListener::listen(apis).await.exchanges();
        let proxy = Launch::with_key(&api).start().await;
        let caller = Caller::new(&proxy, callers);
        let (feed, mut response) = streaming(&caller, &mut api).await;
        feed.data("data: 1\n\n").await;
        event(response.body_mut()).await;
        drop(response);
        feed.closed().await;

        // The same before there is an answer.
        let calling = begin(&caller, Method::POST, empty()).await;
        let Exchange { mut answer, .. } = api.next().await;
        calling.abort();
        with_timeout(answer.closed()).await;

        // Other requests are not affected.
        let (feed, mut response) = streaming(&caller, &mut api).await;
        feed.data("data: 2\n\n").await;
        assert_eq!(event(response.body_mut()).await, b"data: 2\n\n", "{callers:?} {apis:?}");
    }
}

#[tokio::test]
async fn an_upload_that_breaks_off_is_an_error_at_the_api() {
    for (callers, apis) in Protocol::PAIRS {
        for disconnects in [true, false] {
            let mut api = TlsListener::listen(apis).await.exchanges();
            let proxy = Launch::with_key(&api).start().await;
            let (upload, body) = channel_body();
            let calling = begin(&Caller::new(&proxy, callers), Method::POST, body).await;
            // `_answer` is kept, since dropping it would end the connection.
            let Exchange { request, answer: _answer } = api.next().await;
            let mut received = request.into_body();
            upload.data("the beginning\n\n").await;
            event(&mut received).await;
            match disconnects {
                true => calling.abort(),
                false => upload.fail().await,
            }
            assert!(matches!(frame(&mut received).await, Some(Err(_))), "{callers:?} {apis:?}");
        }
    }
}

#[tokio::test]
async fn a_failed_stream_is_an_error_for_the_caller() {
    for (callers, apis) in Protocol::PAIRS {
        for length in [None, Some("1000")] {
            let mut api = TlsListener::listen(apis).await.exchanges();
            let proxy = Launch::with_key(&api).start().await;
            let caller = Caller::new(&proxy, callers);
            let calling = begin(&caller, Method::POST, empty()).await;
            let (feed, body) = channel_body();
            let mut answer = sse(body);
            if let Some(length) = length {
                answer.headers_mut().insert("content-length", length.parse().unwrap());
            }
            api.next().await.answer(answer);
            let mut response = calling.await.unwrap().unwrap();
            feed.data("data: 1\n\n").await;
            assert_eq!(event(response.body_mut()).await, b"data: 1\n\n");
            feed.fail().await;
            let end = frame(response.body_mut()).await;
            assert!(matches!(end, Some(Err(_))), "{callers:?} {apis:?} {length:?}: {end:?}");

            // The proxy keeps serving.
            assert_eq!(caller.get("/healthz").await.status, 200);
        }
    }
}

#[tokio::test]
async fn a_closed_connection_does_not_complete_a_chunked_answer() {
    let api = TlsListener::listen(Protocol::Http1).await;
    let proxy = Launch::with_key(&api).start().await;
    let mut caller = raw(&proxy).await;
    caller.write_all(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    let mut connection = api.accept().await;
    read_head(&mut connection).await;
    let half = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n";
    connection.write_all(half).await.unwrap();
    let head = response_head(&mut caller).await;
    assert!(head.contains("transfer-encoding: chunked\r\n"), "{head}");
    let mut chunk = [0; 10];
    with_timeout(caller.read_exact(&mut chunk)).await.unwrap();
    assert_eq!(&chunk, b"5\r\nhello\r\n");
    // Closed properly, but without the last chunk.
    connection.shutdown().await.unwrap();
    drop(connection);
    assert_eq!(read_to_end(&mut caller).await, b"");
}

#[tokio::test]
async fn slow_readers_do_not_block_other_streams() {
    let mut api = TlsListener::listen(Protocol::Http2).await.exchanges();
    let proxy = Launch::with_key(&api).start().await;
    // Unread streams, filled to their limit, on one connection to the API.
    let mut unread = Vec::new();
    for _ in 0..20 {
        let (feed, response) = streaming(&Caller::http1(&proxy), &mut api).await;
        let filling = tokio::spawn(async move {
            for _ in 0..64 {
                if !feed.try_data(vec![b' '; 64 * 1024]).await {
                    break;
                }
            }
        });
        unread.push((response, filling));
    }
    let (feed, mut response) = streaming(&Caller::http2(&proxy), &mut api).await;
    for number in 0..100 {
        let sent = format!("data: {number}\n\n");
        feed.data(sent.clone()).await;
        assert_eq!(event(response.body_mut()).await, sent.as_bytes());
    }
    for (response, filling) in unread {
        drop(response);
        with_timeout(filling).await.unwrap();
    }
}

/// The number of concurrent streams.
const STREAMS: usize = 1000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_streams_run_concurrently() {
    let (started, mut all_started) = mpsc::unbounded_channel();
    let go = std::sync::Arc::new(Semaphore::new(0));
    let api = TlsListener::listen(Protocol::Http2).await.exchanges().answer_all({
        let go = go.clone();
        move |_| {
            let (started, go) = (started.clone(), go.clone());
            async move {
                let (feed, body) = channel_body();
                tokio::spawn(async move {
                    feed.data("data: first\n\n").await;
                    started.send(()).unwrap();
                    go.acquire().await.unwrap().forget();
                    feed.data("data: second\n\n").await;
                });
                sse(body)
            }
        }
    });
    let proxy = Launch::with_key(&api).start().await;
    // A hundred connections with one stream, and nine with a hundred streams: few enough for the usual limit of open files.
    let many: Vec<_> = (0..9).map(|_| Caller::http2(&proxy)).collect();
    let (first, mut first_received) = mpsc::unbounded_channel();
    let mut calling = Vec::new();
    // No stream ends before all have begun on both sides. A hundred begin at once: more handshakes together take a busy machine
    // longer than the proxy waits for a connection.
    for begun in 0..STREAMS {
        let (first, caller) = match begun.checked_sub(100) {
            None => (first.clone(), Caller::http1(&proxy)),
            Some(number) => (first.clone(), many[number / 100].clone()),
        };
        calling.push(tokio::spawn(async move {
            let request = caller.request(Method::POST, "/v1/chat/completions").body(empty()).unwrap();
            let mut response = caller.send(request).await;
            assert_eq!(response.status(), 200);
            assert_eq!(event(response.body_mut()).await, b"data: first\n\n");
            first.send(()).unwrap();
            assert_eq!(event(response.body_mut()).await, b"data: second\n\n");
            assert_ended(response.body_mut()).await;
        }));
        if calling.len().is_multiple_of(100) {
            for _ in 0..100 {
                with_timeout(all_started.recv()).await.unwrap();
                with_timeout(first_received.recv()).await.unwrap();
            }
        }
    }
    go.add_permits(STREAMS);
    for calling in calling {
        with_timeout(calling).await.unwrap();
    }
    assert_eq!(Caller::http1(&proxy).get("/healthz").await.status, 200);
}
