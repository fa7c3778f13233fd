//! J7: the request that is sent again, and the 401 that is not answered by one.

use std::sync::atomic::Ordering::SeqCst;

use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use tokio::time::sleep;
use tower::{Layer, ServiceExt};
use tower_selam::{BoxError, JwtLayer, RefreshLayer};

use crate::{
    api::{Api, INVALID_TOKEN, counting, request, stack},
    mint::SECOND,
    support::{Body, MODELS, key},
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
