//! Tests of annotate mode: the response passes through unchanged, with the error in its extensions.

use std::{future::ready, io, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::Body;
use http_body_util::{BodyExt, Empty, Full};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tower::{Layer, ServiceBuilder, ServiceExt, service_fn};
use tower_selam::{
    ApiKey, ApiKeyLayer, AuthError, AuthErrorKind, AuthErrorLayer, BoxError, Refreshing, Selam, SelamLayer,
    Token,
    auth_error::InspectedBody,
    simulator::{Fault, JwtAlgorithm, Simulator},
    source::{Reason, source_fn},
};

use crate::support::{CHAT, Fed, KEY, MODELS, get, key};

type Frame = io::Result<http_body::Frame<Bytes>>;

fn channel_response() -> (UnboundedSender<Frame>, Response<Fed>) {
    let (send, receive) = unbounded_channel();
    (send, unauthorized(Fed(receive)))
}

fn unauthorized<B>(body: B) -> Response<B> {
    Response::builder().status(401).header("x-mark", "1").body(body).unwrap()
}

fn data(text: &str) -> Frame {
    Ok(http_body::Frame::data(Bytes::copy_from_slice(text.as_bytes())))
}

async fn annotated<B>(response: Response<B>) -> Response<InspectedBody<B>>
where
    B: Body<Error: Into<BoxError>>,
{
    let mut response = Some(response);
    let api =
        service_fn(move |_: Request<()>| ready(Ok::<_, BoxError>(response.take().expect("one request"))));
    AuthErrorLayer::new().annotated().with_body_limit(64).layer(api).oneshot(get(MODELS)).await.unwrap()
}

fn kind<B>(response: &Response<B>) -> Option<AuthErrorKind> {
    response.extensions().get::<AuthError>().map(AuthError::kind)
}

const INVALID: &str = r#"{"error":{"code":"invalid_api_key"}}"#;

/// E6: status, headers, body and trailers pass through unchanged.
#[tokio::test]
async fn response_passes_through_unchanged() {
    let (feed, response) = channel_response();
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

/// E6: a body beyond the limit passes through whole; the error keeps only its beginning.
#[tokio::test]
async fn oversize_body_passes_through_whole() {
    let (feed, response) = channel_response();
    let long = "x".repeat(100);
    feed.send(data(&long)).unwrap();
    let response = annotated(response).await;
    let error = response.extensions().get::<AuthError>().unwrap();
    assert_eq!((error.kind(), error.body().len()), (AuthErrorKind::Unauthorized, 64));
    feed.send(data("and more")).unwrap();
    drop(feed);
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), format!("{long}and more"));
}

/// E6: a stalled body delays the response up to the time limit, and the rest still arrives.
#[tokio::test(start_paused = true)]
async fn stalled_body_passes_through_later() {
    let (feed, response) = channel_response();
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

/// E6: a body error reaches the caller after the same frames.
#[tokio::test]
async fn body_error_stays_in_place() {
    let (feed, response) = channel_response();
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

/// E6: `is_end_stream` turns true with the last frame.
#[tokio::test]
async fn stream_ends_after_the_last_frame() {
    let mut response = annotated(unauthorized(Full::<Bytes>::from(INVALID))).await;
    let body = response.body_mut();
    assert!(!body.is_end_stream());
    assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), INVALID);
    assert!(body.is_end_stream());
    assert!(body.frame().await.is_none());
}

/// E6: an empty body stays empty.
#[tokio::test]
async fn empty_body_stays_empty() {
    let response = annotated(unauthorized(Empty::<Bytes>::new())).await;
    assert_eq!(kind(&response), Some(AuthErrorKind::Unauthorized));
    assert!(response.body().is_end_stream());
    assert!(response.into_body().collect().await.unwrap().to_bytes().is_empty());
}

/// E5, E6: responses other than 401 and 403 are not annotated, and their bodies stream.
#[tokio::test]
async fn other_responses_stream_without_annotation() {
    for status in [200, 400, 429, 500] {
        let (feed, mut response) = channel_response();
        *response.status_mut() = status.try_into().unwrap();
        let mut response = annotated(response).await;
        assert_eq!(kind(&response), None);
        feed.send(data("first")).unwrap();
        let first = response.body_mut().frame().await.unwrap().unwrap();
        assert_eq!(first.into_data().unwrap(), "first");
    }
}

/// E6, S2: an echoed secret is overwritten in body, headers and trailers, and every length stays.
#[tokio::test]
async fn echoed_secrets_are_masked_in_place() {
    let escaped = KEY.replace('-', "\\u002d");
    for (body, masked) in [
        (format!(r#"{{"error":{{"message":"bad key {KEY}"}}}}"#), KEY),
        (format!(r#"{{"error":{{"message":"bad key {escaped}"}}}}"#), &*escaped),
    ] {
        let (feed, receive) = unbounded_channel();
        for part in body.as_bytes().chunks(9) {
            feed.send(data(std::str::from_utf8(part).unwrap())).unwrap();
        }
        let trailers = HeaderMap::from_iter([("x-key".parse().unwrap(), KEY.parse().unwrap())]);
        feed.send(Ok(http_body::Frame::trailers(trailers))).unwrap();
        drop(feed);
        let echo = Response::builder()
            .status(401)
            .header("www-authenticate", format!("Bearer error_description=\"{KEY}\""))
            .header("content-length", body.len())
            .header("content-digest", "sha-256=:stale:")
            .header("x-example", "sk-selam-another-key");
        let (mock, mut handle) = tower_test::mock::pair::<_, Response<Fed>>();
        let stack = ServiceBuilder::new()
            .layer(AuthErrorLayer::new().annotated())
            .layer(ApiKeyLayer::bearer(key()))
            .service(mock);
        let api = async {
            let (_, send) = handle.next_request().await.unwrap();
            send.send_response(echo.body(Fed(receive)).unwrap());
        };
        let (response, ()) = tokio::join!(stack.oneshot(get(MODELS)), api);
        let response = response.unwrap();
        let error = response.extensions().get::<AuthError>().unwrap();
        assert_eq!(error.message(), Some("bad key [redacted]"));
        let stars = "*".repeat(KEY.len());
        let challenge = format!("Bearer error_description=\"{stars}\"");
        assert_eq!(response.headers()["www-authenticate"], challenge);
        assert_eq!(response.headers()["content-length"], body.len().to_string());
        assert_eq!(response.headers()["x-example"], "sk-selam-another-key", "not a secret that was sent");
        assert!(!response.headers().contains_key("content-digest"));
        let passed = response.into_body().collect().await.unwrap();
        assert_eq!(passed.trailers().unwrap()["x-key"], stars);
        assert_eq!(passed.to_bytes(), body.replace(masked, &"*".repeat(masked.len())));
    }
}

/// E6, S2: a compressed body that echoes a secret is sent decompressed, and any other as it came.
#[cfg(feature = "decompression")]
#[tokio::test]
async fn compressed_echo_is_sent_decompressed() {
    use std::io::Read;

    for (text, is_whole) in
        [(format!("bad key {KEY}"), true), ("no key".to_owned(), true), (format!("bad key {KEY}"), false)]
    {
        let mut gzip = Vec::new();
        flate2::read::GzEncoder::new(text.as_bytes(), flate2::Compression::none())
            .read_to_end(&mut gzip)
            .unwrap();
        if !is_whole {
            // Longer than what is read of it.
            gzip.truncate(text.len() + 15);
            gzip.extend([0; 1 << 17]);
        }
        let echo = Response::builder()
            .status(401)
            .header("content-encoding", "gzip")
            .header("content-length", gzip.len())
            .body(Full::<Bytes>::from(gzip.clone()));
        let (mock, mut handle) = tower_test::mock::pair();
        let stack = ServiceBuilder::new()
            .layer(AuthErrorLayer::new().annotated())
            .layer(ApiKeyLayer::bearer(key()))
            .service(mock);
        let api = async {
            let (_, send) = handle.next_request().await.unwrap();
            send.send_response(echo.unwrap());
        };
        let (response, ()) = tokio::join!(stack.oneshot(get(MODELS)), api);
        let (parts, body) = response.unwrap().into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        assert_eq!(parts.headers["content-length"], body.len().to_string());
        if text.contains(KEY) {
            assert_eq!(body, text.replace(KEY, &"*".repeat(KEY.len())));
            assert!(!parts.headers.contains_key("content-encoding"));
        } else {
            assert_eq!((&*body, &parts.headers["content-encoding"]), (&*gzip, &"gzip".parse().unwrap()));
        }
    }
}

/// Returns a simulator and an annotating stack over it whose JWTs are refreshed.
fn refreshing_stack() -> (Simulator, Selam<Simulator>) {
    let simulator = Simulator::new();
    let issuer = simulator.clone();
    let jwts = Refreshing::new(source_fn(move |_: Reason<Token>| {
        let jwt = issuer.mint_jwt(JwtAlgorithm::Hs256, Duration::from_secs(600));
        async { Ok::<_, BoxError>(Token::new(jwt)?) }
    }));
    let key = ApiKey::new(simulator.issue_key()).unwrap();
    let layer = SelamLayer::builder().with_api_key(key).with_jwt(jwts).build().unwrap().annotated();
    let selam = layer.layer(simulator.clone());
    (simulator, selam)
}

fn chat() -> Request<String> {
    Request::post("https://api.selamgpt.com/v1/chat/completions").body(CHAT.to_owned()).unwrap()
}

/// E6: the stack refreshes and replays before it annotates anything.
#[tokio::test]
async fn stack_refreshes_and_replays_first() {
    let (simulator, selam) = refreshing_stack();
    assert_eq!(selam.send(chat()).await.unwrap().status(), 200);
    simulator.expire_jwts();
    let response = selam.send(chat()).await.unwrap();
    assert_eq!((response.status().as_u16(), kind(&response)), (200, None));
    let body = response.into_body().collect().await.unwrap().to_bytes();
    assert!(body.windows(15).any(|text| text == b"You said: Selam"), "{body:?}");
    assert_eq!(simulator.requests(), 3);
}

/// E6, J4: the second 401 is returned unchanged, after exactly two sends.
#[tokio::test]
async fn second_401_is_returned_unchanged() {
    let (simulator, selam) = refreshing_stack();
    let refusal = |n: u16| {
        let response =
            Response::builder().status(401).header("x-answer", n).header("www-authenticate", "Bearer");
        Fault::Answer(
            response.body(Bytes::from(format!(r#"{{"error":{{"code":"jwt_expired"}},"n":{n}}}"#))).unwrap(),
        )
    };
    simulator.inject(refusal(1));
    simulator.inject(refusal(2));
    let response = selam.send(chat()).await.unwrap();
    assert_eq!(simulator.requests(), 2);
    assert_eq!((response.status().as_u16(), kind(&response)), (401, Some(AuthErrorKind::TokenRejected)));
    assert_eq!(
        (&response.headers()["x-answer"], &response.headers()["www-authenticate"]),
        (&"2".parse().unwrap(), &"Bearer".parse().unwrap())
    );
    let body = response.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(body, r#"{"error":{"code":"jwt_expired"},"n":2}"#);
}

/// E6: an error body of any size passes through whole, however much of it each layer has read.
#[tokio::test]
async fn error_body_of_any_size_survives_the_stack() {
    for status in [401, 403] {
        for size in [0, 1, 65_535, 65_536, 65_537, 300_000] {
            let (simulator, selam) = refreshing_stack();
            let sent = Bytes::from(" ".repeat(size));
            for _ in 0..2 {
                let answer =
                    Response::builder().status(status).header("content-length", size).body(sent.clone());
                simulator.inject(Fault::Answer(answer.unwrap()));
            }
            let response = selam.send(chat()).await.unwrap();
            assert_eq!(simulator.requests(), if status == 401 { 2 } else { 1 });
            assert!(kind(&response).is_some());
            assert_eq!(response.body().size_hint().exact(), Some(size as u64), "{status} of {size}");
            assert_eq!(response.body().is_end_stream(), size == 0);
            assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), sent);
        }
    }
}

/// E6: a stalled 401 that is not replayed streams through, although two layers read its beginning.
#[tokio::test(start_paused = true)]
async fn stalled_401_streams_through_the_stack() {
    let (feed, response) = channel_response();
    let mut response = Some(response);
    let api =
        service_fn(move |_: Request<()>| ready(Ok::<_, BoxError>(response.take().expect("one request"))));
    let jwts =
        Refreshing::new(source_fn(|_: Reason<Token>| async { Ok::<_, BoxError>(Token::new("a.b.c")?) }));
    let layer = SelamLayer::builder().with_api_key(key()).with_jwt(jwts).build().unwrap();
    let selam = layer.without_replay().annotated().layer(tower::buffer::Buffer::new(api, 1));
    feed.send(data(INVALID)).unwrap();
    let response = selam.send(get(MODELS)).await.unwrap();
    assert_eq!(kind(&response), Some(AuthErrorKind::InvalidApiKey));
    assert!(!response.body().is_end_stream());
    let trailers = HeaderMap::from_iter([("x-trailer".parse().unwrap(), "1".parse().unwrap())]);
    feed.send(data(" late")).unwrap();
    feed.send(Ok(http_body::Frame::trailers(trailers.clone()))).unwrap();
    drop(feed);
    let body = response.into_body().collect().await.unwrap();
    assert_eq!(body.trailers(), Some(&trailers));
    assert_eq!(body.to_bytes(), format!("{INVALID} late"));
}

/// E6: the documented errors keep the headers and bytes that the API sent.
#[tokio::test]
async fn documented_errors_keep_the_api_bytes() {
    let simulator = Simulator::new();
    let (revoked, limited) = (simulator.issue_key(), simulator.issue_limited_key());
    simulator.revoke_key(&revoked);
    for (key, path, expected) in [
        (&revoked, "chat/completions", AuthErrorKind::InvalidApiKey),
        (&limited, "images/generations", AuthErrorKind::InsufficientPermissions),
    ] {
        let request = |authorization: Option<String>| {
            let request = Request::post(format!("https://api.selamgpt.com/v1/{path}"));
            let request = authorization
                .into_iter()
                .fold(request, |request, value| request.header("authorization", value));
            request.body(CHAT.to_owned()).unwrap()
        };
        let direct = simulator.clone().oneshot(request(Some(format!("Bearer {key}")))).await.unwrap();
        let layer =
            SelamLayer::builder().with_api_key(ApiKey::new(&**key).unwrap()).build().unwrap().annotated();
        let response = layer.layer(simulator.clone()).send(request(None)).await.unwrap();
        assert_eq!(kind(&response), Some(expected));
        assert_eq!(response.status(), direct.status());
        assert!(direct.headers().keys().all(|name| response.headers().contains_key(name)));
        assert_eq!(response.headers().len(), direct.headers().len());
        let direct = direct.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), direct);
        assert!(!direct.is_empty());
    }
}

/// E6: a request that is not sent has no response to annotate, and is an error.
#[tokio::test]
async fn unsent_request_is_an_error() {
    let (simulator, selam) = refreshing_stack();
    let refused =
        selam.send(Request::get("http://api.selamgpt.com/v1/models").body(String::new()).unwrap()).await;
    assert_eq!(refused.unwrap_err().auth().unwrap().kind(), AuthErrorKind::OriginNotAllowed);

    let none = Refreshing::new(source_fn(|_: Reason<ApiKey>| async {
        Err::<ApiKey, _>(BoxError::from("no key today"))
    }));
    let layer = SelamLayer::builder().with_api_key(none).build().unwrap().annotated();
    let failed = layer.layer(simulator.clone()).send(chat()).await.unwrap_err();
    assert_eq!(failed.auth().unwrap().kind(), AuthErrorKind::RefreshFailed);
    assert_eq!(simulator.requests(), 0);
}
