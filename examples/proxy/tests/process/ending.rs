//! How it ends: nothing more is begun, what runs is finished.

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
    time::{self, Instant},
};

use crate::support::{
    Caller, Launch, Protocol, Proxy, Stream, empty, ended, eventually, fed, frame, raw, read, read_head,
    read_to_end, response_head, soon, unguessable, whole,
};

/// What runs has so long.
const GRACE: Duration = Duration::from_secs(30);

/// It ends well, and because nothing runs any more, not because the grace is over.
#[track_caller]
fn ends_well(proxy: &mut Proxy) -> impl Future<Output = ()> {
    let place = std::panic::Location::caller();
    async move {
        match time::timeout(GRACE - Duration::from_secs(10), proxy.ended()).await {
            Ok(status) => assert_eq!(status.code(), Some(0), "at {place}"),
            Err(_) => panic!("it does not end at {place}"),
        }
    }
}

/// Waits until nobody can connect any more.
async fn stopped_accepting(proxy: &Proxy) {
    eventually("it accepts nothing more", async || {
        TcpStream::connect(proxy.address()).await.is_err().then_some(())
    })
    .await;
}

#[tokio::test]
async fn with_nothing_to_do_it_ends_at_once_and_well() {
    for signal in ["TERM", "INT"] {
        let mut proxy = Launch::new().env("SELAM_API_KEY", "sk-selam-x").start().await;
        proxy.signal(signal);
        ends_well(&mut proxy).await;
    }
}

#[tokio::test]
async fn streams_and_requests_under_way_are_finished_and_nothing_more_is_accepted() {
    for (callers, apis) in Protocol::PAIRS {
        let mut api = Stream::listen(apis).await.exchanges();
        let mut proxy = Launch::to(&api).start().await;
        // One stream has begun; one request has no answer yet; one upload is not complete.
        let begin = |body| {
            let caller = Caller::new(&proxy, callers);
            tokio::spawn(async move {
                caller.send(caller.request(Method::POST, "/v1/chat/completions").body(body).unwrap()).await
            })
        };
        let streaming = begin(empty());
        let (feed, body) = fed();
        api.next().await.respond(200, body);
        let mut streaming = soon(streaming).await.unwrap();
        feed.data("before").await;
        assert_eq!(frame(streaming.body_mut()).await.unwrap().unwrap().into_data().unwrap(), "before");
        let waiting = begin(empty());
        let unanswered = api.next().await;
        let (asking, body) = fed();
        let uploading = begin(body);
        let uploaded = api.next().await;

        proxy.terminate();
        stopped_accepting(&proxy).await;
        assert!(proxy.is_running());

        feed.data("after").await;
        assert_eq!(frame(streaming.body_mut()).await.unwrap().unwrap().into_data().unwrap(), "after");
        drop(feed);
        ended(streaming.body_mut()).await;
        assert!(proxy.is_running());
        unanswered.respond(200, whole("late"));
        assert_eq!(read(soon(waiting).await.unwrap()).await.body, "late");
        assert!(proxy.is_running());
        asking.data("upload").await;
        drop(asking);
        let request = uploaded.request;
        assert_eq!(
            soon(http_body_util::BodyExt::collect(request.into_body())).await.unwrap().to_bytes(),
            "upload"
        );
        uploaded.answer.send(Response::new(empty())).unwrap();
        assert_eq!(soon(uploading).await.unwrap().status(), 200);
        ends_well(&mut proxy).await;
    }
}

#[tokio::test]
async fn idle_connections_are_closed() {
    let mut proxy = Launch::new().env("SELAM_API_KEY", "sk-selam-x").start().await;
    // One that has said nothing, and one between two requests; and the same over HTTP/2.
    let mut silent = raw(&proxy).await;
    let mut idle = raw(&proxy).await;
    idle.write_all(b"GET /healthz HTTP/1.1\r\nHost: the.proxy\r\n\r\n").await.unwrap();
    assert!(response_head(&mut idle).await.starts_with("HTTP/1.1 200 "));
    let mut body = [0; 3];
    soon(idle.read_exact(&mut body)).await.unwrap();
    assert_eq!(&body, b"ok\n");
    let http2 = Caller::http2(&proxy);
    assert_eq!(http2.get("/healthz").await.status, 200);

    proxy.terminate();
    ends_well(&mut proxy).await;
    assert_eq!(read_to_end(&mut silent).await, b"");
    assert_eq!(read_to_end(&mut idle).await, b"");
    drop(http2);
}

#[tokio::test]
async fn the_connection_of_the_last_answer_is_closed_behind_it() {
    let mut api = Stream::listen(Protocol::Http2).await.exchanges();
    let mut proxy = Launch::to(&api).start().await;
    let mut caller = raw(&proxy).await;
    caller.write_all(b"GET /v1/models HTTP/1.1\r\nHost: the.proxy\r\n\r\n").await.unwrap();
    let exchange = api.next().await;
    proxy.terminate();
    stopped_accepting(&proxy).await;
    exchange.respond(200, whole("done"));
    let answer = String::from_utf8(read_to_end(&mut caller).await).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(answer.ends_with("\r\n\r\ndone"), "{answer}");
    ends_well(&mut proxy).await;
}

#[tokio::test]
async fn upgraded_connections_are_finished_too() {
    let api = Stream::listen(Protocol::Http1).await;
    let mut proxy = Launch::to(&api).start().await;
    let mut caller = raw(&proxy).await;
    let head = "GET /v1/live HTTP/1.1\r\nHost: the.proxy\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n";
    caller.write_all(head.as_bytes()).await.unwrap();
    let mut connection = api.accept().await;
    read_head(&mut connection).await;
    let switched = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n";
    connection.write_all(switched).await.unwrap();
    response_head(&mut caller).await;

    proxy.terminate();
    stopped_accepting(&proxy).await;
    caller.write_all(b"still").await.unwrap();
    let mut heard = [0; 5];
    soon(connection.read_exact(&mut heard)).await.unwrap();
    assert_eq!(&heard, b"still");
    assert!(proxy.is_running());
    caller.shutdown().await.unwrap();
    assert_eq!(read_to_end(&mut connection).await, b"");
    connection.shutdown().await.unwrap();
    drop(connection);
    assert_eq!(read_to_end(&mut caller).await, b"");
    ends_well(&mut proxy).await;
}

#[tokio::test]
async fn a_second_signal_ends_the_wait() {
    let mut api = Stream::listen(Protocol::Http2).await.exchanges();
    let mut proxy = Launch::to(&api).start().await;
    let caller = Caller::http1(&proxy);
    let calling = tokio::spawn(async move { caller.get("/v1/models").await });
    let _unanswered = api.next().await;
    proxy.terminate();
    stopped_accepting(&proxy).await;
    assert!(proxy.is_running());
    proxy.terminate();
    ends_well(&mut proxy).await;
    assert!(calling.await.is_err());
}

#[tokio::test]
async fn a_file_that_cannot_be_read_to_its_end_holds_it_up_no_longer() {
    let api = Stream::listen(Protocol::Http2).await.exchanges();
    let mut proxy = Launch::to(&api).callers(&format!("web:{}\n", unguessable())).start().await;
    let (tokens, pipe) = (proxy.scratch().path("tokens"), proxy.scratch().path("pipe"));
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    fs::rename(pipe, &tokens).unwrap();
    let (opened, being_read) = oneshot::channel();
    // Opens when somebody reads, who then waits for what is never written.
    std::thread::spawn(move || opened.send(File::options().write(true).open(tokens)));
    let _silent = soon(being_read).await.unwrap().unwrap();
    proxy.terminate();
    ends_well(&mut proxy).await;
}

#[tokio::test]
async fn what_does_not_end_within_the_grace_is_cut_off() {
    let mut api = Stream::listen(Protocol::Http2).await.exchanges();
    let mut proxy = Launch::to(&api).start().await;
    let caller = Caller::http1(&proxy);
    let calling = tokio::spawn(async move {
        caller.send(caller.request(Method::GET, "/v1/models").body(empty()).unwrap()).await
    });
    let (feed, body) = fed();
    api.next().await.respond(200, body);
    let mut response = soon(calling).await.unwrap();
    let told = Instant::now();
    proxy.terminate();
    assert_eq!(proxy.ended().await.code(), Some(0));
    assert!(told.elapsed() >= GRACE - Duration::from_secs(1), "{:?}", told.elapsed());
    assert!(matches!(frame(response.body_mut()).await, Some(Err(_))));
    drop(feed);
}
