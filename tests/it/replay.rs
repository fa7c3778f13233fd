//! J7: the replayed request, and the 401 that is returned where nothing is replayed.

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
use tower_selam::{ApiKeyLayer, BoxError, JwtLayer, RefreshLayer};

use crate::{
    api::{Api, INVALID_TOKEN, counting, request, stack},
    mint::SECOND,
    support::{Body, Fed, MODELS, key, response},
};

/// J7: the replay has the same method, URI, version, headers, extensions and body.
#[tokio::test(start_paused = true)]
async fn replay_is_identical_to_the_first_send() {
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

/// J7: a streamed body and its trailers are replayed if they fit the limit.
#[tokio::test(start_paused = true)]
async fn streamed_body_is_replayed_within_the_limit() {
    for (limit, sends) in [(10, 2), (9, 1), (0, 1)] {
        let (jwts, fetches) = counting();
        jwts.prefetch().await.unwrap();
        let api = Api::accepting("token-2", INVALID_TOKEN);
        let frames = ["01234", "56789"].map(|data| Ok::<_, BoxError>(Frame::data(Bytes::from(data))));
        let trailers = HeaderMap::from_iter([("x-sum".parse().unwrap(), "1".parse().unwrap())]);
        let frames = frames.into_iter().chain([Ok(Frame::trailers(trailers))]);
        let body = StreamBody::new(stream_of(frames));
        let service = RefreshLayer::buffered(limit)
            .layer((JwtLayer::new(&jwts), ApiKeyLayer::x_api_key(key())).layer(api.service()));
        let response = service.oneshot(Request::post(MODELS).body(body).unwrap()).await.unwrap();
        let received = std::mem::take(&mut *api.received.lock().unwrap());
        assert_eq!(received.len(), sends, "limit {limit}");
        assert!(received.iter().all(|sent| sent.body == b"0123456789" && sent.head.contains("x-sum")));
        assert_eq!(response.status() == StatusCode::OK, sends == 2);
        sleep(SECOND).await;
        assert_eq!(fetches.load(SeqCst), 2, "the token is refreshed in any case");
    }
}

/// A stream of the items of an iterator.
fn stream_of<I: Iterator>(items: I) -> impl futures_core::Stream<Item = I::Item> {
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

/// J7: without replay the 401 is returned intact, and the token is refreshed all the same.
#[tokio::test(start_paused = true)]
async fn without_replay_the_401_is_returned_intact() {
    let (jwts, _) = counting();
    let api = Api::accepting("token-2", INVALID_TOKEN);
    let service = RefreshLayer::without_replay()
        .layer((JwtLayer::new(&jwts), ApiKeyLayer::x_api_key(key())).layer(api.service()));
    let response = service.clone().oneshot(request()).await.unwrap();
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), INVALID_TOKEN);
    assert_eq!(service.oneshot(request()).await.unwrap().status(), StatusCode::OK);
}

type BodyFrame = Result<Frame<Bytes>, BoxError>;

fn data(text: &'static str) -> BodyFrame {
    Ok(Frame::data(Bytes::from(text)))
}

/// What the API does with the rest of a rejected request's body, after it has read this many frames.
#[derive(Clone, Copy, Debug)]
enum Rest {
    /// Drops it before answering.
    Dropped(usize),
    /// Holds it forever.
    Held(usize),
    /// Reads it one second after answering.
    ReadLater(usize),
    /// Drops it one second after answering.
    DroppedLater(usize),
}

/// What an API read of each body, and the body's exact size hint.
type ReadLog = Arc<Mutex<Vec<(String, Option<u64>)>>>;

/// An API that rejects `token-1` without reading the whole body.
fn rejecting_early<B>(
    rest: Rest,
    log: &ReadLog,
) -> impl Service<Request<B>, Response = Response<Body>, Error = BoxError, Future: Send> + Clone + use<B>
where
    B: http_body::Body<Data = Bytes, Error: Into<BoxError>> + Send + Unpin + 'static,
{
    let (log, held) = (Arc::clone(log), Arc::new(Mutex::new(None)));
    service_fn(move |request: Request<B>| {
        let (log, held) = (Arc::clone(&log), Arc::clone(&held));
        async move {
            let rejected = request.headers()["authorization"] == "Bearer token-1";
            let mut body = request.into_body();
            let hint = body.size_hint().exact();
            let frames = match rest {
                _ if !rejected => usize::MAX,
                Rest::Dropped(frames) | Rest::Held(frames) => frames,
                Rest::ReadLater(frames) | Rest::DroppedLater(frames) => frames,
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
            match rest {
                _ if !rejected => {}
                Rest::Dropped(_) => {}
                Rest::Held(_) => *held.lock().unwrap() = Some(body),
                Rest::ReadLater(_) | Rest::DroppedLater(_) => {
                    tokio::spawn(async move {
                        sleep(SECOND).await;
                        if let Rest::ReadLater(_) = rest {
                            while let Some(Ok(_)) = body.frame().await {}
                        }
                    });
                }
            }
            log.lock().unwrap().push((text, hint));
            Ok(if rejected { response(401, INVALID_TOKEN) } else { response(200, "") })
        }
    })
}

/// J7: a 401 sent before the body was read leads to a replay with the whole body or to no replay.
#[tokio::test(start_paused = true)]
async fn early_401_replays_the_whole_body_or_nothing() {
    let whole = "0123456789";
    for (rest, broken, replayed) in [
        (Rest::Dropped(0), false, true),
        (Rest::Dropped(1), false, true),
        (Rest::Dropped(2), false, true),
        (Rest::Dropped(9), false, true),
        // The inner service holds the body for one more second.
        (Rest::ReadLater(0), false, true),
        (Rest::ReadLater(2), false, true),
        (Rest::ReadLater(0), true, false),
        (Rest::DroppedLater(0), false, true),
        (Rest::DroppedLater(1), false, true),
        // The inner service holds the body forever.
        (Rest::Held(0), false, false),
        (Rest::Held(1), false, false),
        // The whole body was read, so the copy is complete even while the body is held.
        (Rest::Held(9), false, true),
        // The body failed midway, so no copy is complete.
        (Rest::Dropped(9), true, false),
    ] {
        let case = format!("{rest:?}, broken: {broken}");
        let (jwts, fetches) = counting();
        jwts.prefetch().await.unwrap();
        let frames = [data("0123"), data("456"), if broken { Err("broken".into()) } else { data("789") }];
        let body = StreamBody::new(stream_of(frames.into_iter()));
        let log = ReadLog::default();
        let service = RefreshLayer::buffered(10)
            .layer((JwtLayer::new(&jwts), ApiKeyLayer::x_api_key(key())).layer(rejecting_early(rest, &log)));
        let started = Instant::now();
        let answered = service.oneshot(Request::post(MODELS).body(body).unwrap()).await.unwrap();
        let waited = match rest {
            Rest::Dropped(_) => Duration::ZERO,
            Rest::ReadLater(_) | Rest::DroppedLater(_) => SECOND,
            // The layer waits no longer than this for the inner service to release the body.
            Rest::Held(_) => {
                if replayed {
                    Duration::ZERO
                } else {
                    5 * SECOND
                }
            }
        };
        assert!(
            waited <= started.elapsed() && started.elapsed() <= waited + SECOND / 10,
            "{case}: {:?}",
            started.elapsed()
        );
        let log = std::mem::take(&mut *log.lock().unwrap());
        if replayed {
            assert_eq!(answered.status(), StatusCode::OK, "{case}");
            assert_eq!((log.len(), log[1].0.as_str()), (2, whole), "{case}");
        } else {
            assert_eq!((answered.status(), log.len()), (StatusCode::UNAUTHORIZED, 1), "{case}");
            let intact = answered.into_body().collect().await.unwrap().to_bytes();
            assert_eq!(intact, INVALID_TOKEN, "{case}");
        }
        sleep(SECOND).await;
        assert_eq!(fetches.load(SeqCst), 2, "the token is refreshed in any case: {case}");
    }
}

/// J12, J7: a body that the client did not begin to send is replayed, whatever its length.
#[tokio::test(start_paused = true)]
async fn unsent_body_is_replayed_at_any_length() {
    for (read, replayed) in [(0, true), (1, false)] {
        let (jwts, _) = counting();
        jwts.prefetch().await.unwrap();
        let log = ReadLog::default();
        let service = RefreshLayer::buffered(10).layer(
            (JwtLayer::new(&jwts), ApiKeyLayer::x_api_key(key()))
                .layer(rejecting_early(Rest::Dropped(read), &log)),
        );
        let request = Request::post(MODELS).header("expect", "100-continue");
        let answered = service.oneshot(request.body(Body::from("longer than ten")).unwrap()).await.unwrap();
        let log = std::mem::take(&mut *log.lock().unwrap());
        assert_eq!((answered.status() == StatusCode::OK, log.len() == 2), (replayed, replayed));
        assert!(!replayed || log[1].0 == "longer than ten", "{log:?}");
    }
}

/// J7: the replayed body has the same exact size hint as the first.
#[tokio::test(start_paused = true)]
async fn replayed_body_keeps_its_exact_length() {
    for rest in [Rest::Dropped(0), Rest::Dropped(9)] {
        let (jwts, _) = counting();
        jwts.prefetch().await.unwrap();
        let log = ReadLog::default();
        let service = RefreshLayer::buffered(100)
            .layer((JwtLayer::new(&jwts), ApiKeyLayer::x_api_key(key())).layer(rejecting_early(rest, &log)));
        assert_eq!(service.oneshot(request()).await.unwrap().status(), StatusCode::OK);
        let sizes: Vec<_> = log.lock().unwrap().iter().map(|(_, size)| *size).collect();
        assert_eq!(sizes, [Some(8), Some(8)]);
        assert_eq!(log.lock().unwrap()[1].0, "the body");
    }
}

/// J7: no header, extension or body of one request is sent with another.
#[tokio::test(start_paused = true)]
async fn nothing_leaks_into_another_request() {
    // The layer reuses the boxes that hold copies of request heads, for accepted and for rejected requests.
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
        let foreign = ["x-first", "x-second", "x-third", "x-fourth"]
            .iter()
            .filter(|name| name.as_bytes() != sent.body && sent.head.contains(**name));
        assert_eq!(foreign.count(), 0, "{sent:?}");
        assert_eq!(
            sent.head.contains("Some("),
            sent.head.contains("x-first") || sent.head.contains("x-third")
        );
    }
}

/// J7: nothing of a request is kept once it is answered.
#[tokio::test(start_paused = true)]
async fn answered_request_is_dropped_completely() {
    let (jwts, _) = counting();
    jwts.prefetch().await.unwrap();
    let api = Api::accepting("token-2", INVALID_TOKEN);
    let marker = Arc::new(());
    // The first request is replayed, the second is not.
    for sends in [2, 3] {
        let mut request = request();
        request.extensions_mut().insert(Arc::clone(&marker));
        stack(&jwts, api.service()).oneshot(request).await.unwrap();
        assert_eq!((api.bearers().len(), Arc::strong_count(&marker)), (sends, 1));
    }
}

/// J7: the returned 401 has its headers, whole body and trailers, even if the body is long or slow.
#[tokio::test(start_paused = true)]
async fn returned_401_has_its_whole_body() {
    // The layer inspects at most the first 64 KiB and waits for them at most 5 s.
    for (length, slow) in [(10, false), (100_000, false), (10, true), (100_000, true)] {
        let (jwts, fetches) = counting();
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
        let service = RefreshLayer::without_replay()
            .layer((JwtLayer::new(&jwts), ApiKeyLayer::x_api_key(key())).layer(api));
        jwts.prefetch().await.unwrap();
        let started = Instant::now();
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
        assert_eq!(started.elapsed(), waited, "{length}, slow: {slow}");
        let collected = answered.into_body().collect().await.unwrap();
        assert_eq!(collected.trailers().unwrap()["x-sum"], "1");
        whole.extend_from_slice(b"the end");
        assert_eq!(collected.to_bytes(), whole);
        sleep(SECOND).await;
        assert_eq!(fetches.load(SeqCst), 2, "the token is refreshed");
    }
}
