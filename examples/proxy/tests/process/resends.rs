//! Requests that fail on their way to the API: which are sent once more, and which never.

use http::Method;
use tokio::{io::AsyncWriteExt, task::JoinHandle};

use crate::support::{
    Answer, Caller, Launch, Protocol, Proxy, Tls, TlsListener, channel_body, frames, frames::Frames, full,
    read, read_head, with_timeout,
};

const BODY: &str = "a body that is sent again";

/// Sends a request on a task.
fn call(caller: &Caller, method: &Method) -> JoinHandle<Answer> {
    let (caller, method) = (caller.clone(), method.clone());
    let body = if method == Method::GET { "" } else { BODY };
    let request = caller.request(method, "/v1/chat/completions").body(full(body)).unwrap();
    tokio::spawn(async move { read(caller.send(request).await).await })
}

/// How an API says that it has not processed a request.
#[derive(Clone, Copy, Debug)]
enum Unprocessed {
    Reset,
    GoAway(u32),
}

impl Unprocessed {
    const ALL: [Self; 4] = [
        Self::Reset,
        Self::GoAway(frames::NO_ERROR),
        Self::GoAway(frames::INTERNAL_ERROR),
        Self::GoAway(frames::ENHANCE_YOUR_CALM),
    ];

    async fn tell(self, connection: &mut Frames, stream: u32) {
        match self {
            Self::Reset => connection.reset(stream, frames::REFUSED_STREAM).await,
            Self::GoAway(code) => connection.go_away(stream - 1, code).await,
        }
    }
}

#[tokio::test]
async fn unprocessed_requests_are_sent_again() {
    let api = TlsListener::listen(Protocol::Http2).await;
    let proxy = Launch::with_key(&api).start().await;
    let caller = Caller::http2(&proxy);
    let calling = call(&caller, &Method::GET);
    let mut connection = Frames::accept(&api).await;
    let (stream, _) = connection.request().await;
    connection.ok(stream).await;
    assert_eq!(calling.await.unwrap().status, 200);
    let mut refusing = Vec::new();
    for unprocessed in Unprocessed::ALL {
        for method in [Method::GET, Method::POST, Method::DELETE, Method::PATCH] {
            let calling = call(&caller, &method);
            let (stream, first) = connection.request().await;
            unprocessed.tell(&mut connection, stream).await;
            // The refusing connection stays open, and gets nothing more.
            let mut next = Frames::accept(&api).await;
            let (stream, second) = next.request().await;
            assert_eq!(second, first, "{unprocessed:?} {method}");
            next.ok(stream).await;
            assert_eq!(calling.await.unwrap().status, 200, "{unprocessed:?} {method}");
            refusing.push(std::mem::replace(&mut connection, next));
        }
    }
    assert_silent(proxy, refusing).await;
}

#[tokio::test]
async fn unprocessed_requests_are_sent_twice_at_most() {
    let api = TlsListener::listen(Protocol::Http2).await;
    let proxy = Launch::with_key(&api).start().await;
    let mut connections = Vec::new();
    for unprocessed in Unprocessed::ALL {
        let calling = call(&Caller::http1(&proxy), &Method::POST);
        for _ in 0..2 {
            let mut connection = Frames::accept(&api).await;
            let (stream, _) = connection.request().await;
            unprocessed.tell(&mut connection, stream).await;
            connections.push(connection);
        }
        calling.await.unwrap().assert_error(502, "api_error", "upstream_unavailable");
    }
    assert_silent(proxy, connections).await;
}

/// Ends the proxy, and asserts that no further request has arrived on these connections.
async fn assert_silent(proxy: Proxy, connections: Vec<Frames>) {
    drop(proxy);
    for mut connection in connections {
        assert!(!connection.gets_more().await);
    }
}

/// An earlier request on the connection continues after a `GOAWAY`.
#[tokio::test]
async fn earlier_streams_outlive_a_goaway() {
    let api = TlsListener::listen(Protocol::Http2).await;
    let proxy = Launch::with_key(&api).start().await;
    let caller = Caller::http2(&proxy);
    let early = call(&caller, &Method::POST);
    let mut connection = Frames::accept(&api).await;
    let (first, _) = connection.request().await;
    let late = call(&caller, &Method::POST);
    connection.request().await;
    connection.go_away(first, frames::NO_ERROR).await;
    let mut next = Frames::accept(&api).await;
    let (stream, _) = next.request().await;
    next.ok(stream).await;
    assert_eq!(late.await.unwrap().status, 200);
    connection.ok(first).await;
    assert_eq!(early.await.unwrap().status, 200);
}

#[tokio::test]
async fn other_resets_are_not_sent_again() {
    let api = TlsListener::listen(Protocol::Http2).await;
    let proxy = Launch::with_key(&api).start().await;
    let caller = Caller::http1(&proxy);
    let mut connection = None;
    for method in [Method::GET, Method::POST] {
        for code in [frames::NO_ERROR, frames::INTERNAL_ERROR, frames::CANCEL, frames::ENHANCE_YOUR_CALM] {
            let calling = call(&caller, &method);
            let mut frames = match connection.take() {
                Some(frames) => frames,
                None => Frames::accept(&api).await,
            };
            let (stream, _) = frames.request().await;
            frames.reset(stream, code).await;
            calling.await.unwrap().assert_error(502, "api_error", "upstream_unavailable");
            connection = Some(frames);
        }
    }
    // The next request on the same connection is a new one.
    let mut connection = connection.unwrap();
    let calling = call(&caller, &Method::GET);
    let (stream, _) = connection.request().await;
    assert_eq!(stream, 17);
    connection.ok(stream).await;
    assert_eq!(calling.await.unwrap().status, 200);
}

/// A body of which more has been sent than is kept cannot be sent again, and no part of it is.
#[tokio::test]
async fn bodies_over_the_limit_are_not_sent_again() {
    let api = TlsListener::listen(Protocol::Http2).await;
    let proxy = Launch::with_key(&api).start().await;
    let caller = Caller::http2(&proxy);
    let (feed, body) = channel_body();
    let request = caller.request(Method::POST, "/v1/files").body(body).unwrap();
    let calling = tokio::spawn(async move { read(caller.send(request).await).await });
    let feeding = tokio::spawn(async move { while feed.try_data(vec![b'u'; 64 * 1024]).await {} });
    let mut connection = Frames::accept(&api).await;
    let stream = connection.head().await;
    connection.data(stream, 1024 * 1024 + 1).await;
    connection.reset(stream, frames::REFUSED_STREAM).await;
    calling.await.unwrap().assert_error(502, "api_error", "upstream_unavailable");
    feeding.abort();
    // The next connection carries the next request, not a second attempt.
    let calling = call(&Caller::http2(&proxy), &Method::POST);
    let mut next = Frames::accept(&api).await;
    let (stream, body) = next.request().await;
    assert_eq!(body, BODY.as_bytes());
    next.ok(stream).await;
    assert_eq!(calling.await.unwrap().status, 200);
}

/// How an API ends a connection.
#[derive(Clone, Copy, Debug)]
enum Ends {
    Closed,
    Reset,
}

impl Ends {
    async fn end(self, mut connection: Tls) {
        match self {
            Self::Closed => connection.shutdown().await.unwrap(),
            Self::Reset => connection.get_ref().0.set_zero_linger().unwrap(),
        }
    }
}

const OK: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";

/// Opens a connection over HTTP/1.1 that has answered once.
async fn answered_once(api: &TlsListener, caller: &Caller) -> Tls {
    let calling = call(caller, &Method::GET);
    let mut connection = api.accept().await;
    read_head(&mut connection).await;
    connection.write_all(OK).await.unwrap();
    assert_eq!(calling.await.unwrap().status, 200);
    connection
}

#[tokio::test]
async fn idempotent_requests_survive_a_closed_connection() {
    let api = TlsListener::listen(Protocol::Http1).await;
    let proxy = Launch::with_key(&api).start().await;
    let caller = Caller::http1(&proxy);
    for ends in [Ends::Closed, Ends::Reset] {
        for method in [Method::GET, Method::DELETE, Method::PUT] {
            let mut connection = answered_once(&api, &caller).await;
            let calling = call(&caller, &method);
            // The API closes while the request is on its way.
            read_head(&mut connection).await;
            ends.end(connection).await;
            let mut connection = api.accept().await;
            assert!(read_head(&mut connection).await.starts_with(method.as_str()));
            connection
                .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                .await
                .unwrap();
            assert_eq!(calling.await.unwrap().status, 200, "{ends:?} {method}");
        }
    }
}

#[tokio::test]
async fn a_post_on_a_closed_connection_is_not_sent_twice() {
    let api = TlsListener::listen(Protocol::Http1).await;
    let proxy = Launch::with_key(&api).start().await;
    let caller = Caller::http1(&proxy);
    for ends in [Ends::Closed, Ends::Reset] {
        let mut connection = answered_once(&api, &caller).await;
        let calling = call(&caller, &Method::POST);
        read_head(&mut connection).await;
        ends.end(connection).await;
        calling.await.unwrap().assert_error(502, "api_error", "upstream_unavailable");
    }
    // The next connection carries the next request, not a second attempt.
    let calling = call(&caller, &Method::GET);
    let mut connection = api.accept().await;
    assert!(read_head(&mut connection).await.starts_with("GET "));
    connection.write_all(OK).await.unwrap();
    assert_eq!(calling.await.unwrap().status, 200);
}

/// A request that closes each connection could be one that the API fails at.
#[tokio::test]
async fn requests_on_new_connections_are_not_sent_again() {
    for protocol in Protocol::BOTH {
        let api = TlsListener::listen(protocol).await;
        let proxy = Launch::with_key(&api).start().await;
        let caller = Caller::http1(&proxy);
        let calling = call(&caller, &Method::GET);
        match protocol {
            Protocol::Http1 => drop({
                let mut connection = api.accept().await;
                read_head(&mut connection).await;
                connection
            }),
            Protocol::Http2 => {
                Frames::accept(&api).await.head().await;
            }
        }
        with_timeout(calling).await.unwrap().assert_error(502, "api_error", "upstream_unavailable");
    }
}
