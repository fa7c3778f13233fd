//! Streams: each bit passes on before there is another, and whoever leaves is missed on the other side.
//!
//! Nothing is timed: who sends the next bit waits until the one before has come through.

use http::{HeaderName, Method, Response};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::{Semaphore, mpsc},
};
use tower_selam::BoxError;

use crate::support::{
    Body, Caller, Exchange, Exchanges, Feed, Launch, Protocol, Stream, empty, ended, fed, frame, raw, read,
    read_head, read_to_end, response_head, soon,
};

/// The next data of a body, all of one event.
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

/// A request under way: the caller's to answer, and the head that the caller gets.
async fn begun(
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

/// A stream that the caller has the head of.
async fn streaming(caller: &Caller, api: &mut Exchanges) -> (Feed, Response<hyper::body::Incoming>) {
    let calling = begun(caller, Method::POST, empty()).await;
    let (feed, body) = fed();
    api.next().await.answer(sse(body));
    (feed, calling.await.unwrap().unwrap())
}

#[tokio::test]
async fn each_event_passes_on_before_the_api_sends_another() {
    for (callers, apis) in Protocol::PAIRS {
        let mut api = Stream::listen(apis).await.exchanges();
        let proxy = Launch::to(&api).start().await;
        // The head comes before any event does.
        let (feed, mut response) = streaming(&Caller::new(&proxy, callers), &mut api).await;
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        for number in 0..50 {
            let said = format!("data: {number}\n\n");
            feed.data(said.clone()).await;
            assert_eq!(event(response.body_mut()).await, said.as_bytes());
        }
        drop(feed);
        ended(response.body_mut()).await;
    }
}

#[tokio::test]
async fn request_and_answer_stream_at_once() {
    for (callers, apis) in Protocol::PAIRS {
        let mut api = Stream::listen(apis).await.exchanges();
        let proxy = Launch::to(&api).start().await;
        let (asking, body) = fed();
        let calling = begun(&Caller::new(&proxy, callers), Method::POST, body).await;
        // The API has the head before there is any of the body.
        let Exchange { request, answer } = api.next().await;
        let mut heard = request.into_body();
        let (answering, body) = fed();
        answer.send(sse(body)).unwrap();
        let mut response = calling.await.unwrap().unwrap();
        for number in 0..30 {
            let said = format!("{number}\n\n");
            asking.data(said.clone()).await;
            assert_eq!(event(&mut heard).await, said.as_bytes());
            answering.data(said.clone()).await;
            assert_eq!(event(response.body_mut()).await, said.as_bytes());
        }
        // The caller is done, and still hears.
        drop(asking);
        ended(&mut heard).await;
        answering.data("bye\n\n").await;
        assert_eq!(event(response.body_mut()).await, b"bye\n\n");
        drop(answering);
        ended(response.body_mut()).await;
    }
}

#[tokio::test]
async fn trailers_pass_both_ways() {
    for (callers, apis) in Protocol::PAIRS {
        let mut api = Stream::listen(apis).await.exchanges();
        let proxy = Launch::to(&api).start().await;
        let caller = Caller::new(&proxy, callers);
        let (asking, body) = fed();
        let request = caller
            .request(Method::POST, "/v1/chat/completions")
            .header("te", "trailers")
            .header("trailer", "x-asked")
            .body(body)
            .unwrap();
        let calling = tokio::spawn(async move { read(caller.send(request).await).await });
        let Exchange { request, answer } = api.next().await;
        assert_eq!(request.headers()["trailer"], "x-asked");
        asking.data("ask").await;
        asking.trailers("x-asked", "yes").await;
        let heard = soon(http_body_util::BodyExt::collect(request.into_body())).await.unwrap();
        assert_eq!(heard.trailers().unwrap()["x-asked"], "yes", "{callers:?} {apis:?}");
        assert_eq!(heard.to_bytes(), "ask");

        let (answering, body) = fed();
        answer.send(Response::builder().header("trailer", "x-answered").body(body).unwrap()).unwrap();
        answering.data("answer").await;
        answering.trailers("x-answered", "well").await;
        let answer = calling.await.unwrap();
        assert_eq!(answer.headers["trailer"], "x-answered");
        assert_eq!(answer.trailers.unwrap()["x-answered"], "well", "{callers:?} {apis:?}");
        assert_eq!(answer.body, "answer");
    }
}

#[tokio::test]
async fn trailers_carry_no_credentials_of_the_callers() {
    const SENT: [&str; 6] =
        ["x-api-key", "api_key", "x-goog-api-key", "cookie", "proxy-authorization", "authorization"];
    for (callers, apis) in Protocol::PAIRS {
        let mut api = Stream::listen(apis).await.exchanges();
        let proxy = Launch::to(&api).start().await;
        let caller = Caller::new(&proxy, callers);
        let (asking, body) = fed();
        let request = caller
            .request(Method::POST, "/v1/chat/completions")
            .header("te", "trailers")
            .header("trailer", format!("x-asked, {}", SENT.join(", ")))
            .body(body)
            .unwrap();
        let calling = tokio::spawn(async move { caller.send(request).await });
        let Exchange { request, answer: _unanswered } = api.next().await;
        asking.all_trailers(SENT.into_iter().chain(["x-asked"]).map(|name| (name, "theirs"))).await;
        let heard = soon(http_body_util::BodyExt::collect(request.into_body())).await.unwrap();
        let names: Vec<_> = heard.trailers().unwrap().keys().map(HeaderName::as_str).collect();
        assert_eq!(names, ["x-asked"], "{callers:?} {apis:?}");
        calling.abort();
    }
}

const EXPECTING: &str = "POST /v1/chat/completions HTTP/1.1\r\nHost: the.proxy\r\nExpect: 100-continue\r\n\
     Content-Length: 4\r\n\r\n";

#[tokio::test]
async fn a_caller_that_waits_to_continue_is_told_so_when_the_api_says_it() {
    let api = Stream::listen(Protocol::Http1).await;
    let proxy = Launch::to(&api).start().await;
    let mut caller = raw(&proxy).await;
    caller.write_all(EXPECTING.as_bytes()).await.unwrap();
    let mut connection = api.accept().await;
    let head = read_head(&mut connection).await;
    assert!(head.contains("expect: 100-continue\r\n"), "{head}");
    connection.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.unwrap();
    assert!(response_head(&mut caller).await.starts_with("HTTP/1.1 100 "));
    caller.write_all(b"body").await.unwrap();
    let mut body = [0; 4];
    soon(connection.read_exact(&mut body)).await.unwrap();
    assert_eq!(&body, b"body");
    connection.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await.unwrap();
    assert!(response_head(&mut caller).await.starts_with("HTTP/1.1 200 "));
}

#[tokio::test]
async fn a_caller_that_waits_to_continue_is_not_told_so_by_an_api_that_refuses() {
    let api = Stream::listen(Protocol::Http1).await;
    let proxy = Launch::to(&api).start().await;
    let mut caller = raw(&proxy).await;
    caller.write_all(EXPECTING.as_bytes()).await.unwrap();
    let mut connection = api.accept().await;
    read_head(&mut connection).await;
    let refusal = b"HTTP/1.1 413 Payload Too Large\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno";
    connection.write_all(refusal).await.unwrap();
    let head = response_head(&mut caller).await;
    assert!(head.starts_with("HTTP/1.1 413 "), "{head}");
    let mut body = [0; 2];
    soon(caller.read_exact(&mut body)).await.unwrap();
    assert_eq!(&body, b"no");

    // Nor over HTTP/2.
    let mut api = Stream::listen(Protocol::Http2).await.exchanges();
    let proxy = Launch::to(&api).start().await;
    let mut caller = raw(&proxy).await;
    caller.write_all(EXPECTING.as_bytes()).await.unwrap();
    let Exchange { request: _unread, answer } = api.next().await;
    answer.send(Response::builder().status(413).body(empty()).unwrap()).unwrap();
    let head = response_head(&mut caller).await;
    assert!(head.starts_with("HTTP/1.1 413 "), "{head}");
}

#[tokio::test]
async fn a_caller_that_waits_to_continue_is_told_so_for_an_api_that_does_not_know_of_it() {
    for protocol in Protocol::BOTH {
        let mut api = Stream::listen(protocol).await.exchanges();
        let proxy = Launch::to(&api).start().await;
        let mut caller = raw(&proxy).await;
        caller.write_all(EXPECTING.as_bytes()).await.unwrap();
        // Reads the body before it answers.
        let Exchange { request, answer } = api.next().await;
        let reading = tokio::spawn(http_body_util::BodyExt::collect(request.into_body()));
        let head = response_head(&mut caller).await;
        assert!(head.starts_with("HTTP/1.1 100 "), "{protocol:?} {head}");
        caller.write_all(b"body").await.unwrap();
        assert_eq!(soon(reading).await.unwrap().unwrap().to_bytes(), "body");
        answer.send(Response::new(empty())).unwrap();
        assert!(response_head(&mut caller).await.starts_with("HTTP/1.1 200 "), "{protocol:?}");
    }
}

#[tokio::test]
async fn a_hint_that_comes_early_does_no_harm_to_the_answer() {
    let api = Stream::listen(Protocol::Http1).await;
    let proxy = Launch::to(&api).start().await;
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
async fn a_caller_that_leaves_its_stream_ends_it_at_the_api() {
    for (callers, apis) in Protocol::PAIRS {
        let mut api = Stream::listen(apis).await.exchanges();
        let proxy = Launch::to(&api).start().await;
        let caller = Caller::new(&proxy, callers);
        let (feed, mut response) = streaming(&caller, &mut api).await;
        feed.data("data: 1\n\n").await;
        event(response.body_mut()).await;
        drop(response);
        feed.closed().await;

        // So does one that leaves before there is an answer.
        let calling = begun(&caller, Method::POST, empty()).await;
        let Exchange { mut answer, .. } = api.next().await;
        calling.abort();
        soon(answer.closed()).await;

        // Others are not touched.
        let (feed, mut response) = streaming(&caller, &mut api).await;
        feed.data("data: 2\n\n").await;
        assert_eq!(event(response.body_mut()).await, b"data: 2\n\n", "{callers:?} {apis:?}");
    }
}

#[tokio::test]
async fn a_caller_that_leaves_its_upload_does_not_end_it_well_at_the_api() {
    for (callers, apis) in Protocol::PAIRS {
        let mut api = Stream::listen(apis).await.exchanges();
        let proxy = Launch::to(&api).start().await;
        let (asking, body) = fed();
        let calling = begun(&Caller::new(&proxy, callers), Method::POST, body).await;
        // Kept: nobody is told if they are dropped.
        let Exchange { request, answer: _answer } = api.next().await;
        let mut heard = request.into_body();
        asking.data("the beginning\n\n").await;
        event(&mut heard).await;
        calling.abort();
        assert!(matches!(frame(&mut heard).await, Some(Err(_))), "{callers:?} {apis:?}");
    }
}

#[tokio::test]
async fn an_upload_that_breaks_off_does_not_end_well_at_the_api() {
    for (callers, apis) in Protocol::PAIRS {
        let mut api = Stream::listen(apis).await.exchanges();
        let proxy = Launch::to(&api).start().await;
        let (asking, body) = fed();
        let _calling = begun(&Caller::new(&proxy, callers), Method::POST, body).await;
        let Exchange { request, answer: _answer } = api.next().await;
        let mut heard = request.into_body();
        asking.data("the beginning\n\n").await;
        event(&mut heard).await;
        asking.break_off().await;
        assert!(matches!(frame(&mut heard).await, Some(Err(_))), "{callers:?} {apis:?}");
    }
}

#[tokio::test]
async fn an_api_that_breaks_off_does_not_end_the_stream_well_for_the_caller() {
    for (callers, apis) in Protocol::PAIRS {
        for length in [None, Some("1000")] {
            let mut api = Stream::listen(apis).await.exchanges();
            let proxy = Launch::to(&api).start().await;
            let caller = Caller::new(&proxy, callers);
            let calling = begun(&caller, Method::POST, empty()).await;
            let (feed, body) = fed();
            let mut answer = sse(body);
            if let Some(length) = length {
                answer.headers_mut().insert("content-length", length.parse().unwrap());
            }
            api.next().await.answer(answer);
            let mut response = calling.await.unwrap().unwrap();
            feed.data("data: 1\n\n").await;
            assert_eq!(event(response.body_mut()).await, b"data: 1\n\n");
            feed.break_off().await;
            let end = frame(response.body_mut()).await;
            assert!(matches!(end, Some(Err(_))), "{callers:?} {apis:?} {length:?}: {end:?}");

            // The proxy lives on.
            assert_eq!(caller.get("/healthz").await.status, 200);
        }
    }
}

#[tokio::test]
async fn a_connection_that_is_cut_does_not_end_a_chunked_answer() {
    let api = Stream::listen(Protocol::Http1).await;
    let proxy = Launch::to(&api).start().await;
    let mut caller = raw(&proxy).await;
    caller.write_all(b"GET /v1/models HTTP/1.1\r\nHost: the.proxy\r\n\r\n").await.unwrap();
    let mut connection = api.accept().await;
    read_head(&mut connection).await;
    let half = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n";
    connection.write_all(half).await.unwrap();
    let head = response_head(&mut caller).await;
    assert!(head.contains("transfer-encoding: chunked\r\n"), "{head}");
    let mut chunk = [0; 10];
    soon(caller.read_exact(&mut chunk)).await.unwrap();
    assert_eq!(&chunk, b"5\r\nhello\r\n");
    // Even politely.
    connection.shutdown().await.unwrap();
    drop(connection);
    assert_eq!(read_to_end(&mut caller).await, b"");
}

#[tokio::test]
async fn a_caller_that_does_not_read_holds_up_nobody_else() {
    let mut api = Stream::listen(Protocol::Http2).await.exchanges();
    let proxy = Launch::to(&api).start().await;
    // Streams on one connection to the API that nobody reads, full to the brim.
    let mut unread = Vec::new();
    for _ in 0..20 {
        let (feed, response) = streaming(&Caller::http1(&proxy), &mut api).await;
        let filling = tokio::spawn(async move {
            for _ in 0..64 {
                if !feed.offer(vec![b' '; 64 * 1024]).await {
                    break;
                }
            }
        });
        unread.push((response, filling));
    }
    let (feed, mut response) = streaming(&Caller::http2(&proxy), &mut api).await;
    for number in 0..100 {
        let said = format!("data: {number}\n\n");
        feed.data(said.clone()).await;
        assert_eq!(event(response.body_mut()).await, said.as_bytes());
    }
    for (response, filling) in unread {
        drop(response);
        soon(filling).await.unwrap();
    }
}

/// So many at once.
const STREAMS: usize = 1000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_streams_run_at_once() {
    let (began, mut begun) = mpsc::unbounded_channel();
    let go = std::sync::Arc::new(Semaphore::new(0));
    let api = Stream::listen(Protocol::Http2).await.exchanges().answer_all({
        let go = go.clone();
        move |_| {
            let (began, go) = (began.clone(), go.clone());
            async move {
                let (feed, body) = fed();
                tokio::spawn(async move {
                    feed.data("data: first\n\n").await;
                    began.send(()).unwrap();
                    go.acquire().await.unwrap().forget();
                    feed.data("data: second\n\n").await;
                });
                sse(body)
            }
        }
    });
    let proxy = Launch::to(&api).start().await;
    // A hundred connections with a stream each, and nine with a hundred streams each: few enough for the usual limit of
    // open files.
    let many: Vec<_> = (0..9).map(|_| Caller::http2(&proxy)).collect();
    let callers = (0..STREAMS).map(|number| match number.checked_sub(100) {
        None => Caller::http1(&proxy),
        Some(number) => many[number / 100].clone(),
    });
    let (first, mut had_first) = mpsc::unbounded_channel();
    let calling: Vec<_> = callers
        .map(|caller| {
            let first = first.clone();
            tokio::spawn(async move {
                let request = caller.request(Method::POST, "/v1/chat/completions").body(empty()).unwrap();
                let mut response = caller.send(request).await;
                assert_eq!(response.status(), 200);
                assert_eq!(event(response.body_mut()).await, b"data: first\n\n");
                first.send(()).unwrap();
                assert_eq!(event(response.body_mut()).await, b"data: second\n\n");
                ended(response.body_mut()).await;
            })
        })
        .collect();
    // None ends before all have begun, on both sides.
    for _ in 0..STREAMS {
        soon(begun.recv()).await.unwrap();
        soon(had_first.recv()).await.unwrap();
    }
    go.add_permits(STREAMS);
    for calling in calling {
        soon(calling).await.unwrap();
    }
    assert_eq!(Caller::http1(&proxy).get("/healthz").await.status, 200);
}
