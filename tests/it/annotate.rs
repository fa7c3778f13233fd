//! E6: the response goes on as it was, with the error in its extensions.

use std::{io, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::Body;
use http_body_util::{BodyExt, Empty, Full};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tower::{Layer, ServiceBuilder, ServiceExt, service_fn};
use tower_selam::{
    AnnotateAuthErrorLayer, ApiKeyLayer, AuthError, AuthErrorKind, BoxError, auth_error::InspectedBody,
};

use crate::support::{Fed, KEY, MODELS, get, key};

type Frame = io::Result<http_body::Frame<Bytes>>;

fn fed() -> (UnboundedSender<Frame>, Response<Fed>) {
    let (send, receive) = unbounded_channel();
    (send, refusal(Fed(receive)))
}

fn refusal<B>(body: B) -> Response<B> {
    Response::builder().status(401).header("x-mark", "1").body(body).unwrap()
}

fn data(text: &str) -> Frame {
    Ok(http_body::Frame::data(Bytes::copy_from_slice(text.as_bytes())))
}

async fn annotated<B: Body>(response: Response<B>) -> Response<InspectedBody<B>> {
    let mut response = Some(response);
    let api = service_fn(move |_: Request<()>| {
        std::future::ready(Ok::<_, BoxError>(response.take().expect("one request")))
    });
    AnnotateAuthErrorLayer::new().with_body_limit(64).layer(api).oneshot(get(MODELS)).await.unwrap()
}

fn kind<B>(response: &Response<B>) -> Option<AuthErrorKind> {
    response.extensions().get::<AuthError>().map(AuthError::kind)
}

const INVALID: &str = r#"{"error":{"code":"invalid_api_key"}}"#;

#[tokio::test]
async fn e6_status_headers_body_and_trailers_go_on_as_they_were() {
    let (feed, response) = fed();
    let trailers = HeaderMap::from_iter([("x-trailer".parse().unwrap(), "1".parse().unwrap())]);
    feed.send(data(&INVALID[..10])).unwrap();
    feed.send(data(&INVALID[10..])).unwrap();
    feed.send(Ok(http_body::Frame::trailers(trailers.clone()))).unwrap();
    drop(feed);

    let response = annotated(response).await;
    assert_eq!(kind(&response), Some(AuthErrorKind::InvalidApiKey));
    assert_eq!((response.status().as_u16(), &response.headers()["x-mark"]), (401, &"1".parse().unwrap()));
    assert_eq!(response.body().size_hint().exact(), Some(INVALID.len() as u64));
    assert!(!response.body().is_end_stream());
    let body = response.into_body().collect().await.unwrap();
    assert_eq!(body.trailers(), Some(&trailers));
    assert_eq!(body.to_bytes(), INVALID);
}

#[tokio::test]
async fn e6_an_oversize_body_goes_on_whole() {
    let (feed, response) = fed();
    let long = "x".repeat(100);
    feed.send(data(&long)).unwrap();
    let response = annotated(response).await;
    let error = response.extensions().get::<AuthError>().unwrap();
    assert_eq!((error.kind(), error.body().len()), (AuthErrorKind::Unauthorized, 64));
    feed.send(data("and more")).unwrap();
    drop(feed);
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), format!("{long}and more"));
}

#[tokio::test(start_paused = true)]
async fn e6_a_stalled_body_goes_on_when_it_does() {
    let (feed, response) = fed();
    feed.send(data(INVALID)).unwrap();
    let started = tokio::time::Instant::now();
    let response = annotated(response).await;
    assert_eq!(started.elapsed().as_secs(), 5);
    assert_eq!(kind(&response), Some(AuthErrorKind::InvalidApiKey));
    assert!(!response.body().is_end_stream());
    tokio::time::advance(Duration::from_secs(60)).await;
    feed.send(data(" late")).unwrap();
    drop(feed);
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), format!("{INVALID} late"));
}

#[tokio::test]
async fn e6_a_body_that_breaks_off_breaks_off_in_the_same_place() {
    let (feed, response) = fed();
    feed.send(data("{\"error\"")).unwrap();
    feed.send(Err(io::Error::other("connection reset"))).unwrap();
    let mut response = annotated(response).await;
    assert_eq!(kind(&response), Some(AuthErrorKind::Unauthorized));
    let body = response.body_mut();
    assert!(!body.is_end_stream());
    assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "{\"error\"");
    assert_eq!(body.frame().await.unwrap().unwrap_err().to_string(), "connection reset");
    assert!(body.frame().await.is_none());
}

#[tokio::test]
async fn e6_the_end_is_where_the_last_frame_was() {
    let mut response = annotated(refusal(Full::<Bytes>::from(INVALID))).await;
    let body = response.body_mut();
    assert!(!body.is_end_stream());
    assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), INVALID);
    assert!(body.is_end_stream());
    assert!(body.frame().await.is_none());
}

#[tokio::test]
async fn e6_an_empty_body_stays_empty() {
    let response = annotated(refusal(Empty::<Bytes>::new())).await;
    assert_eq!(kind(&response), Some(AuthErrorKind::Unauthorized));
    assert!(response.body().is_end_stream());
    assert!(response.into_body().collect().await.unwrap().to_bytes().is_empty());
}

#[tokio::test]
async fn e6_other_responses_are_not_annotated_and_stream_on() {
    for status in [200, 400, 429, 500] {
        let (feed, mut response) = fed();
        *response.status_mut() = status.try_into().unwrap();
        let mut response = annotated(response).await;
        assert_eq!(kind(&response), None);
        feed.send(data("first")).unwrap();
        let first = response.body_mut().frame().await.unwrap().unwrap();
        assert_eq!(first.into_data().unwrap(), "first");
    }
}

#[tokio::test]
async fn e6_the_body_keeps_an_echo_that_the_error_masks() {
    let echo = format!(r#"{{"error":{{"message":"bad key {KEY}"}}}}"#);
    let (mock, mut handle) = tower_test::mock::pair::<_, Response<Full<Bytes>>>();
    let stack = ServiceBuilder::new()
        .layer(AnnotateAuthErrorLayer::new())
        .layer(ApiKeyLayer::bearer(key()))
        .service(mock);
    let api = async {
        let (_, send) = handle.next_request().await.unwrap();
        send.send_response(refusal(Full::from(echo.clone())));
    };
    let (response, ()) = tokio::join!(stack.oneshot(get(MODELS)), api);
    let response = response.unwrap();
    let error = response.extensions().get::<AuthError>().unwrap();
    assert_eq!(error.message(), Some("bad key [redacted]"));
    assert!(!format!("{response:?}").contains(KEY));
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), echo);
}
