//! J7: the request that is sent again, and the 401 that is not answered by one.

use std::{
    sync::{Arc, Mutex, atomic::Ordering::SeqCst},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use tokio::{
    sync::mpsc::unbounded_channel,
    time::{Instant, sleep},
};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_selam::{BoxError, JwtLayer, RefreshLayer};

use crate::{
    api::{Api, INVALID_TOKEN, counting, request, stack},
    mint::SECOND,
    support::{Body, Fed, MODELS, key, response},
};

#[tokio::test(start_paused = true)]
async fn j7_what_is_sent_again_is_what_was_sent() {
    let (jwts, _) = counting();
    jwts.prefetch().await.unwrap();
    let api = Api::accepting("token-2", INVALID_TOKEN);
    let mut request = Request::put("https://api.selamgpt.com/v1/models?a=b")
        .version(http::Version::HTTP_2)
        .header("x-many", "one")
        .header("x-other", "three")
        .header("x-many", "two")
        .extension(7_u8)
        .body(Body::from("the body"))
        .unwrap();
    request.headers_mut().append("x-many", "four".parse().unwrap());
    stack(&jwts, api.service()).oneshot(request).await.unwrap();
    let received = api.received.lock().unwrap();
    let [first, second] = &received[..] else { panic!("{received:?}") };
    assert_eq!((&first.head, &first.body), (&second.head, &second.body));
    assert_eq!(second.body, b"the body");
    assert!(second.head.contains("Some(7)"), "{}", second.head);
}

#[tokio::test(start_paused = true)]
async fn j7_a_stream_is_kept_and_sent_again_up_to_its_limit() {
    for (limit, sends) in [(10, 2), (9, 1), (0, 1)] {
        let (jwts, asked) = counting();
        jwts.prefetch().await.unwrap();
        let api = Api::accepting("token-2", INVALID_TOKEN);
        let frames = ["01234", "56789"].map(|data| Ok::<_, BoxError>(Frame::data(Bytes::from(data))));
        let trailers = HeaderMap::from_iter([("x-sum".parse().unwrap(), "1".parse().unwrap())]);
        let frames = frames.into_iter().chain([Ok(Frame::trailers(trailers))]);
        let body = StreamBody::new(tokio_stream(frames));
        let service = RefreshLayer::buffered(limit).layer(JwtLayer::new(&jwts, key()).layer(api.service()));
        let response = service.oneshot(Request::post(MODELS).body(body).unwrap()).await.unwrap();
        let received = std::mem::take(&mut *api.received.lock().unwrap());
        assert_eq!(received.len(), sends, "limit {limit}");
        assert!(received.iter().all(|sent| sent.body == b"0123456789" && sent.head.contains("x-sum")));
        assert_eq!(response.status() == StatusCode::OK, sends == 2);
        sleep(SECOND).await;
        assert_eq!(asked.load(SeqCst), 2, "the token is renewed all the same");
    }
}

/// Items as a stream.
fn tokio_stream<I: Iterator>(items: I) -> impl futures_core::Stream<Item = I::Item> {
    let mut items = Box::new(items);
    struct Items<F>(F);
    impl<T, F: FnMut() -> Option<T> + Unpin> futures_core::Stream for Items<F> {
        type Item = T;
        fn poll_next(
            mut self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
        ) -> std::task::Poll<Option<T>> {
            std::task::Poll::Ready((self.0)())
        }
    }
    Items(move || items.next())
}

#[tokio::test(start_paused = true)]
async fn j7_without_replay_the_401_goes_up_intact_and_the_token_is_renewed() {
    let (jwts, _) = counting();
    let api = Api::accepting("token-2", INVALID_TOKEN);
    let service = RefreshLayer::without_replay().layer(JwtLayer::new(&jwts, key()).layer(api.service()));
    let response = service.clone().oneshot(request()).await.unwrap();
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), INVALID_TOKEN);
    assert_eq!(service.oneshot(request()).await.unwrap().status(), StatusCode::OK);
}

type Part = Result<Frame<Bytes>, BoxError>;

fn data(text: &'static str) -> Part {
    Ok(Frame::data(Bytes::from(text)))
}

/// What the API does with the body of a request that it refuses.
#[derive(Clone, Copy, Debug)]
enum Reads {
    /// So many frames, and lets go of it.
    Frames(usize),
    /// So many frames, and sends the rest later.
    Keeps(usize),
    /// So many frames, and reads the rest, or lets go of it, a second after it has answered.
    GoesOn(usize),
    DropsLater(usize),
}

/// An API that refuses `token-1` without reading all of the body: what it read of each, and their size hints.
fn hasty<B>(
    reads: Reads,
    read: &Read,
) -> impl Service<Request<B>, Response = Response<Body>, Error = BoxError, Future: Send> + Clone + use<B>
where
    B: http_body::Body<Data = Bytes, Error: Into<BoxError>> + Send + Unpin + 'static,
{
    let (read, kept) = (Arc::clone(read), Arc::new(Mutex::new(None)));
    service_fn(move |request: Request<B>| {
        let (read, kept) = (Arc::clone(&read), Arc::clone(&kept));
        async move {
            let refused = request.headers()["authorization"] == "Bearer token-1";
            let mut body = request.into_body();
            let hint = body.size_hint().exact();
            let frames = match reads {
                _ if !refused => usize::MAX,
                Reads::Frames(frames) | Reads::Keeps(frames) => frames,
                Reads::GoesOn(frames) | Reads::DropsLater(frames) => frames,
            };
            let mut text = String::new();
            for _ in 0..frames {
                let Some(frame) = body.frame().await else { break };
                match frame.map_err(Into::into) {
                    Ok(frame) => {
                        text.push_str(std::str::from_utf8(frame.data_ref().unwrap_or(&Bytes::new()))?);
                    }
                    Err(_) => text.push_str(" (broken)"),
                }
            }
            match reads {
                _ if !refused => {}
                Reads::Frames(_) => {}
                Reads::Keeps(_) => *kept.lock().unwrap() = Some(body),
                Reads::GoesOn(_) | Reads::DropsLater(_) => {
                    tokio::spawn(async move {
                        sleep(SECOND).await;
                        if let Reads::GoesOn(_) = reads {
                            while let Some(Ok(_)) = body.frame().await {}
                        }
                    });
                }
            }
            read.lock().unwrap().push((text, hint));
            Ok(if refused { response(401, INVALID_TOKEN) } else { response(200, "") })
        }
    })
}

type Read = Arc<Mutex<Vec<(String, Option<u64>)>>>;

#[tokio::test(start_paused = true)]
async fn j7_a_refusal_before_the_body_was_read_leads_to_the_whole_body_or_to_none() {
    let whole = "0123456789";
    for (reads, broken, again) in [
        (Reads::Frames(0), false, true),
        (Reads::Frames(1), false, true),
        (Reads::Frames(2), false, true),
        (Reads::Frames(9), false, true),
        // The client is still sending it, for a while.
        (Reads::GoesOn(0), false, true),
        (Reads::GoesOn(2), false, true),
        (Reads::GoesOn(0), true, false),
        (Reads::DropsLater(0), false, true),
        (Reads::DropsLater(1), false, true),
        // Or for good.
        (Reads::Keeps(0), false, false),
        (Reads::Keeps(1), false, false),
        // All of it was sent, whoever holds on to it.
        (Reads::Keeps(9), false, true),
        // It broke off, so nobody has all of it.
        (Reads::Frames(9), true, false),
    ] {
        let case = format!("{reads:?}, broken: {broken}");
        let (jwts, asked) = counting();
        jwts.prefetch().await.unwrap();
        let frames = [data("0123"), data("456"), if broken { Err("broken".into()) } else { data("789") }];
        let body = StreamBody::new(tokio_stream(frames.into_iter()));
        let read = Read::default();
        let service =
            RefreshLayer::buffered(10).layer(JwtLayer::new(&jwts, key()).layer(hasty(reads, &read)));
        let began = Instant::now();
        let answered = service.oneshot(Request::post(MODELS).body(body).unwrap()).await.unwrap();
        let waited = match reads {
            Reads::Frames(_) => Duration::ZERO,
            Reads::GoesOn(_) | Reads::DropsLater(_) => SECOND,
            // Nobody waits for a client longer than this.
            Reads::Keeps(_) => {
                if again {
                    Duration::ZERO
                } else {
                    5 * SECOND
                }
            }
        };
        assert!(
            waited <= began.elapsed() && began.elapsed() <= waited + SECOND / 10,
            "{case}: {:?}",
            began.elapsed()
        );
        let read = std::mem::take(&mut *read.lock().unwrap());
        if again {
            assert_eq!(answered.status(), StatusCode::OK, "{case}");
            assert_eq!((read.len(), read[1].0.as_str()), (2, whole), "{case}");
        } else {
            assert_eq!((answered.status(), read.len()), (StatusCode::UNAUTHORIZED, 1), "{case}");
            let intact = answered.into_body().collect().await.unwrap().to_bytes();
            assert_eq!(intact, INVALID_TOKEN, "{case}");
        }
        sleep(SECOND).await;
        assert_eq!(asked.load(SeqCst), 2, "the token is renewed all the same: {case}");
    }
}

#[tokio::test(start_paused = true)]
async fn j7_a_body_of_known_length_has_that_length_the_second_time() {
    for reads in [Reads::Frames(0), Reads::Frames(9)] {
        let (jwts, _) = counting();
        jwts.prefetch().await.unwrap();
        let read = Read::default();
        let service =
            RefreshLayer::buffered(100).layer(JwtLayer::new(&jwts, key()).layer(hasty(reads, &read)));
        assert_eq!(service.oneshot(request()).await.unwrap().status(), StatusCode::OK);
        let sizes: Vec<_> = read.lock().unwrap().iter().map(|(_, size)| *size).collect();
        assert_eq!(sizes, [Some(8), Some(8)]);
        assert_eq!(read.lock().unwrap()[1].0, "the body");
    }
}

#[tokio::test(start_paused = true)]
async fn j7_what_one_request_had_does_not_go_out_with_another() {
    // Heads are copied into boxes that are used again: by requests that are refused and by those that are not.
    let (jwts, _) = counting();
    let api = Api::accepting("token-1", INVALID_TOKEN);
    let send = |name: &'static str, method: Method, number: u8| {
        let service = stack(&jwts, api.service());
        let mut request =
            Request::builder().method(method).uri(format!("{MODELS}?{name}")).header(name, name);
        if number > 0 {
            request = request.extension(number);
        }
        service.oneshot(request.body(Body::from(name)).unwrap())
    };
    send("x-first", Method::PUT, 7).await.unwrap();
    api.accept("token-2");
    send("x-second", Method::DELETE, 0).await.unwrap();
    send("x-third", Method::PATCH, 9).await.unwrap();
    sleep(2 * SECOND).await;
    api.accept("token-3");
    send("x-fourth", Method::POST, 0).await.unwrap();
    let received = api.received.lock().unwrap();
    let bodies: Vec<_> = received.iter().map(|sent| std::str::from_utf8(&sent.body).unwrap()).collect();
    assert_eq!(bodies, ["x-first", "x-second", "x-second", "x-third", "x-fourth", "x-fourth"]);
    for (first, second) in [(1, 2), (4, 5)] {
        assert_eq!(
            (&received[first].head, &received[first].key),
            (&received[second].head, &received[second].key)
        );
    }
    for sent in received.iter() {
        let of_others = ["x-first", "x-second", "x-third", "x-fourth"]
            .iter()
            .filter(|name| name.as_bytes() != sent.body && sent.head.contains(**name));
        assert_eq!(of_others.count(), 0, "{sent:?}");
        assert_eq!(
            sent.head.contains("Some("),
            sent.head.contains("x-first") || sent.head.contains("x-third")
        );
    }
}

#[tokio::test(start_paused = true)]
async fn j7_nothing_of_a_request_is_kept_once_it_is_answered() {
    let (jwts, _) = counting();
    jwts.prefetch().await.unwrap();
    let api = Api::accepting("token-2", INVALID_TOKEN);
    let held = Arc::new(());
    // The first is sent twice, the second once.
    for sends in [2, 3] {
        let mut request = request();
        request.extensions_mut().insert(Arc::clone(&held));
        stack(&jwts, api.service()).oneshot(request).await.unwrap();
        assert_eq!((api.bearers().len(), Arc::strong_count(&held)), (sends, 1));
    }
}

#[tokio::test(start_paused = true)]
async fn j7_the_401_that_goes_up_is_the_one_that_came_however_long_or_slow_its_body() {
    // Its trailers too. Of the first 64 KiB is read what it says; the rest may be longer or slower.
    for (length, slow) in [(10, false), (100_000, false), (10, true), (100_000, true)] {
        let (jwts, asked) = counting();
        let (feed, fed) = unbounded_channel();
        let fed = Arc::new(Mutex::new(Some(fed)));
        let api = service_fn(move |_: Request<Body>| {
            let body = Fed(fed.lock().unwrap().take().expect("one send"));
            std::future::ready(
                Response::builder()
                    .status(401)
                    .header("x-of-the-api", "1")
                    .body(body)
                    .map_err(BoxError::from),
            )
        });
        let mut whole = INVALID_TOKEN.as_bytes().to_vec();
        whole.resize(INVALID_TOKEN.len() + length, b' ');
        for chunk in whole.chunks(10_000) {
            feed.send(Ok(Frame::data(Bytes::copy_from_slice(chunk)))).unwrap();
        }
        let trailers = HeaderMap::from_iter([("x-sum".parse().unwrap(), "1".parse().unwrap())]);
        let finish = move || {
            feed.send(Ok(Frame::data(Bytes::from("the end")))).unwrap();
            feed.send(Ok(Frame::trailers(trailers))).unwrap();
        };
        let service = RefreshLayer::without_replay().layer(JwtLayer::new(&jwts, key()).layer(api));
        jwts.prefetch().await.unwrap();
        let began = Instant::now();
        let answered = if slow {
            let answered = service.oneshot(request()).await.unwrap();
            finish();
            answered
        } else {
            finish();
            service.oneshot(request()).await.unwrap()
        };
        assert_eq!(answered.headers()["x-of-the-api"], "1");
        let waited = if slow && length < 64 * 1024 { 5 * SECOND } else { Duration::ZERO };
        assert_eq!(began.elapsed(), waited, "{length}, slow: {slow}");
        let collected = answered.into_body().collect().await.unwrap();
        assert_eq!(collected.trailers().unwrap()["x-sum"], "1");
        whole.extend_from_slice(b"the end");
        assert_eq!(collected.to_bytes(), whole);
        sleep(SECOND).await;
        assert_eq!(asked.load(SeqCst), 2, "the token is renewed");
    }
}
