//! E1 to E5 and E7: what becomes of 401 and 403, and of everything else.

use std::{
    collections::HashMap,
    error::Error as StdError,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::BodyExt;
use serde_json::Value;
use tokio_test::{assert_pending, assert_ready_err, assert_ready_ok, task};
use tower::{Layer, Service, ServiceBuilder, ServiceExt, retry::Policy, service_fn};
use tower_selam::{
    ApiKeyLayer, AuthError, AuthErrorKind, AuthErrorLayer, BoxError, Error, ErrorBody, JwtLayer, Token,
};

use crate::support::{Body, Fed, KEY, MODELS, get, jwt, key, response};

/// One of the bodies seen in the wild.
#[derive(serde::Deserialize)]
pub(crate) struct Seen {
    pub(crate) id: String,
    pub(crate) status: u16,
    content_type: String,
    headers: HashMap<String, String>,
    pub(crate) body: String,
    pub(crate) expect: Value,
}

pub(crate) fn seen() -> Vec<Seen> {
    serde_json::from_str(include_str!("../error-bodies.json")).unwrap()
}

impl Seen {
    pub(crate) fn response(&self) -> Response<Bytes> {
        let mut response = Response::builder().status(self.status);
        if !self.content_type.is_empty() {
            response = response.header("content-type", &self.content_type);
        }
        for (name, value) in &self.headers {
            response = response.header(name, value);
        }
        response.body(self.body.clone().into()).unwrap()
    }
}

async fn answered<B>(response: Response<B>) -> Result<Response<B>, BoxError>
where
    B: http_body::Body<Error: Into<BoxError>>,
{
    let (mock, mut handle) = tower_test::mock::pair();
    let api = async {
        let (_, send) = handle.next_request().await.expect("a request");
        send.send_response(response);
    };
    let call = AuthErrorLayer::new().layer(mock).oneshot(get(MODELS));
    tokio::join!(call, api).0
}

async fn error<B>(response: Response<B>) -> AuthError
where
    B: http_body::Body<Error: Into<BoxError>>,
{
    let error = answered(response).await.map(|_| ()).unwrap_err();
    AuthError::find(&*error).unwrap().clone()
}

#[tokio::test]
async fn e1_the_three_documented_bodies_are_typed_with_their_remedies() {
    for (id, kind, status, code, error_type, message, remedy) in [
        (
            "seed-invalid-api-key",
            AuthErrorKind::InvalidApiKey,
            401,
            "invalid_api_key",
            "authentication_error",
            "Invalid API key provided.",
            "verify the API key and check that it was not revoked",
        ),
        (
            "seed-missing-api-key",
            AuthErrorKind::MissingApiKey,
            401,
            "missing_api_key",
            "authentication_error",
            "No API key provided.",
            "send the API key in a header on all requests",
        ),
        (
            "seed-insufficient-permissions",
            AuthErrorKind::InsufficientPermissions,
            403,
            "insufficient_permissions",
            "authorization_error",
            "Your account does not have access to this feature.",
            "a higher account level has this feature",
        ),
    ] {
        let seen = seen().into_iter().find(|seen| seen.id == id).unwrap();
        let error = error(seen.response().map(Body::new)).await;
        assert_eq!(error.kind(), kind);
        assert_eq!(error.status(), StatusCode::from_u16(status).ok());
        assert_eq!(error.code(), Some(code));
        assert_eq!(error.error_type(), Some(error_type));
        assert_eq!(error.message(), Some(message));
        assert_eq!(error.remedy(), Some(remedy));
        assert_eq!(error.body(), seen.body.as_bytes());
        assert!(error.is_auth() && error.is_permanent());
        let shown = error.to_string();
        assert!(shown.contains(message.trim_end_matches('.')) && shown.ends_with(remedy), "{shown}");
    }
}

#[tokio::test]
async fn e2_every_body_seen_gives_what_it_says() {
    let seen = seen();
    assert_eq!(seen.len(), 18);
    for seen in seen {
        let text = |name: &str| seen.expect[name].as_str().map(str::to_owned);
        let is_auth = seen.expect["auth_error"].as_bool().unwrap();

        let (code, error_type, message) = match answered(seen.response().map(Body::new)).await {
            Err(error) => {
                let error = AuthError::find(&*error).unwrap();
                assert!(is_auth && error.is_auth(), "{}", seen.id);
                assert_eq!(error.status().unwrap(), seen.status, "{}", seen.id);
                assert_eq!(Some(format!("{:?}", error.kind())), text("kind"), "{}", seen.id);
                assert_eq!(error.body(), seen.body.as_bytes(), "{}", seen.id);
                let owned = |text: Option<&str>| text.map(str::to_owned);
                (owned(error.code()), owned(error.error_type()), owned(error.message()))
            }
            Ok(response) => {
                assert!(!is_auth, "{}", seen.id);
                assert_eq!(response.status(), seen.status);
                let body = response.into_body().collect().await.unwrap().to_bytes();
                assert_eq!(body, seen.body, "{} passes as it is", seen.id);
                let body = ErrorBody::parse(&body);
                let owned = |text: Option<&str>| text.map(str::to_owned);
                (owned(body.code()), owned(body.error_type()), owned(body.message()))
            }
        };
        for (name, found) in [("code", &code), ("type", &error_type), ("message", &message)] {
            if seen.expect.get(name).is_some() {
                assert_eq!(*found, text(name), "{} {name}", seen.id);
            }
        }
        if let Some(part) = text("message_contains") {
            assert!(message.as_ref().unwrap().contains(&part), "{} message", seen.id);
        }
    }
}

#[tokio::test]
async fn e2_what_has_no_known_shape_keeps_status_and_body() {
    for body in
        ["", "<html>denied</html>", "File Not Found", "\u{0}\u{1}", "{\"error\":", "[[[[", "null", "{}"]
    {
        for (status, kind) in [(401, AuthErrorKind::Unauthorized), (403, AuthErrorKind::Forbidden)] {
            let error = error(response(status, body)).await;
            assert_eq!((error.kind(), error.status().unwrap().as_u16()), (kind, status));
            assert_eq!((error.code(), error.message()), (None, None), "{body}");
            assert_eq!(error.body(), body.as_bytes());
            assert!(!error.to_string().contains("html"), "HTML is not shown");
        }
    }
    let error = error(response(401, &b"\xff\xfe{\"error\":\"\xc3\x28\"}"[..])).await;
    assert_eq!(error.kind(), AuthErrorKind::Unauthorized);
    assert_eq!(error.body(), b"\xff\xfe{\"error\":\"\xc3\x28\"}");
}

#[tokio::test]
async fn e3_the_code_counts_before_the_type_and_the_type_before_the_status() {
    use AuthErrorKind as Kind;
    for (status, code, error_type, kind) in [
        (401, "invalid_api_key", "invalid_request_error", Kind::InvalidApiKey),
        (403, "invalid_api_key", "authorization_error", Kind::InvalidApiKey),
        (401, "insufficient_permissions", "authentication_error", Kind::InsufficientPermissions),
        (403, "insufficient_scope", "", Kind::InsufficientPermissions),
        (401, "invalid_token", "", Kind::TokenRejected),
        (401, "token_expired", "authentication_error", Kind::TokenRejected),
        (401, "brand_new", "authorization_error", Kind::Forbidden),
        (403, "brand_new", "authentication_error", Kind::Unauthorized),
        (401, "brand_new", "brand_new_error", Kind::Unauthorized),
        (403, "brand_new", "brand_new_error", Kind::Forbidden),
    ] {
        let body = format!(r#"{{"error":{{"message":"m","type":"{error_type}","code":"{code}"}}}}"#);
        let error = error(response(status, body)).await;
        assert_eq!(error.kind(), kind, "{status} {code} {error_type}");
        assert_eq!(error.code(), Some(code), "unknown codes stay usable");
    }
}

#[tokio::test]
async fn e3_the_challenge_counts_where_the_body_says_nothing() {
    let challenged = |body: &'static str, challenge: &str| {
        let mut response = response(401, body);
        response.headers_mut().insert("www-authenticate", challenge.parse().unwrap());
        response
    };
    let expired = r#"Bearer error="invalid_token", error_description="expired""#;

    let found = error(challenged("Unauthorized", expired)).await;
    assert_eq!((found.kind(), found.code()), (AuthErrorKind::TokenRejected, Some("invalid_token")));
    assert_eq!(found.message(), Some("expired"));
    assert!(!found.is_permanent(), "a token can be renewed");

    // The body's own words win, but they do not hide whose fault it was.
    let found = error(challenged(r#"{"error":{"code":"E17","message":"m"}}"#, expired)).await;
    assert_eq!((found.kind(), found.code()), (AuthErrorKind::TokenRejected, Some("E17")));
    let found = error(challenged(r#"{"error":{"code":"invalid_api_key"}}"#, expired)).await;
    assert_eq!(found.kind(), AuthErrorKind::InvalidApiKey);
}

#[tokio::test]
async fn an_error_tells_what_the_headers_say() {
    let mut refused = response(403, r#"{"request_id":"from-body"}"#);
    assert_eq!(error(refused.clone()).await.request_id(), Some("from-body"));
    refused.headers_mut().insert("request-id", "req_1".parse().unwrap());
    assert_eq!(error(refused.clone()).await.request_id(), Some("req_1"));
    refused.headers_mut().insert("x-request-id", "req_2".parse().unwrap());
    for (name, value) in [("retry-after", "7"), ("x-ratelimit-limit", "60"), ("x-ratelimit-remaining", "59")]
    {
        refused.headers_mut().insert(name, value.parse().unwrap());
    }
    let error = error(refused).await;
    assert_eq!(error.request_id(), Some("req_2"));
    assert_eq!(error.retry_after(), Some(Duration::from_secs(7)));
    let limit = error.rate_limit().unwrap();
    assert_eq!((limit.limit, limit.remaining, limit.reset_at), (Some(60), Some(59), None));
}

/// A body of single frames and pauses.
#[derive(Clone, Debug)]
struct Script(std::collections::VecDeque<Step>);

#[derive(Clone, Debug)]
enum Step {
    Data(Bytes),
    Fail,
    Hang,
    /// Frames without bytes, for ever.
    Nothings,
}

impl http_body::Body for Script {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if matches!(self.0.front(), Some(Step::Nothings)) {
            return Poll::Ready(Some(Ok(Frame::data(Bytes::new()))));
        }
        match self.0.pop_front() {
            Some(Step::Data(data)) => Poll::Ready(Some(Ok(Frame::data(data)))),
            Some(Step::Fail) => Poll::Ready(Some(Err(io::Error::other("connection reset")))),
            Some(Step::Hang) => {
                self.0.push_front(Step::Hang);
                Poll::Pending
            }
            Some(Step::Nothings) | None => Poll::Ready(None),
        }
    }
}

fn script(steps: impl IntoIterator<Item = Step>) -> Response<Script> {
    Response::builder().status(401).body(Script(steps.into_iter().collect())).unwrap()
}

const INVALID: &str = r#"{"error":{"code":"invalid_api_key"}}"#;

#[tokio::test]
async fn e4_an_oversize_body_is_read_up_to_its_bound() {
    let megabyte = vec![b'x'; 1 << 20];
    let found = error(response(401, megabyte)).await;
    assert_eq!(found.kind(), AuthErrorKind::Unauthorized);
    assert_eq!(found.body().len(), 64 * 1024);

    let endless = std::iter::repeat_n(Step::Data(Bytes::from_static(&[b'x'; 1000])), 1000);
    assert_eq!(error(script(endless)).await.body().len(), 64 * 1024);

    let api = service_fn(|_: Request<()>| async { Ok::<_, BoxError>(response(401, "0123456789")) });
    let layer = AuthErrorLayer::new().with_body_limit(4);
    let found = layer.layer(api).oneshot(get(MODELS)).await.unwrap_err();
    assert_eq!(AuthError::find(&*found).unwrap().body(), b"0123");
}

#[tokio::test(start_paused = true)]
async fn e4_beyond_its_bound_a_body_is_not_waited_for() {
    let started = tokio::time::Instant::now();
    let kilobytes = std::iter::repeat_n(Step::Data(Bytes::from_static(&[b'x'; 1024])), 65);
    let found = error(script(kilobytes.chain([Step::Hang]))).await;
    assert_eq!((found.body().len(), started.elapsed()), (64 * 1024, Duration::ZERO));
}

#[tokio::test(start_paused = true)]
async fn e4_a_stalled_body_is_waited_for_five_seconds_and_no_longer() {
    let api = service_fn(|_: Request<()>| async {
        Ok::<_, BoxError>(script([Step::Data(INVALID.into()), Step::Hang]))
    });
    let mut service = AuthErrorLayer::new().layer(api);
    let mut call = task::spawn(service.call(get(MODELS)));
    assert_pending!(call.poll());
    tokio::time::advance(Duration::from_millis(4_990)).await;
    assert_pending!(call.poll());
    tokio::time::advance(Duration::from_millis(20)).await;
    assert!(call.is_woken());
    let error = assert_ready_err!(call.poll());
    let error = AuthError::find(&*error).unwrap();
    assert_eq!(error.kind(), AuthErrorKind::InvalidApiKey, "what came counts");
    assert_eq!(error.body(), INVALID.as_bytes());
}

#[tokio::test(start_paused = true)]
async fn e4_a_body_of_nothing_without_end_lets_others_run_and_ends() {
    let api = service_fn(|_: Request<()>| async { Ok::<_, BoxError>(script([Step::Nothings])) });
    let mut service = AuthErrorLayer::new().layer(api);
    let mut call = task::spawn(service.call(get(MODELS)));
    assert_pending!(call.poll());
    assert!(call.is_woken(), "it goes on in its next turn");
    tokio::time::advance(Duration::from_secs(6)).await;
    let error = assert_ready_err!(call.poll());
    assert_eq!(AuthError::find(&*error).unwrap().kind(), AuthErrorKind::Unauthorized);
}

/// In one poll: where nobody has the time, nothing is waited for.
#[track_caller]
fn assert_reads_what_is_there() {
    let api = service_fn(|_: Request<()>| async {
        Ok::<_, BoxError>(script([Step::Data(INVALID.into()), Step::Hang]))
    });
    let mut service = AuthErrorLayer::new().layer(api);
    let error = assert_ready_err!(task::spawn(service.call(get(MODELS))).poll());
    assert_eq!(AuthError::find(&*error).unwrap().kind(), AuthErrorKind::InvalidApiKey);
}

#[test]
fn e4_outside_a_runtime_only_what_is_there_is_read() {
    assert_reads_what_is_there();

    let api = service_fn(|_: Request<()>| async { Ok::<_, BoxError>(script([Step::Nothings])) });
    let mut service = AuthErrorLayer::new().layer(api);
    assert_ready_err!(task::spawn(service.call(get(MODELS))).poll());
}

#[tokio::test(start_paused = true)]
async fn e4_a_body_that_came_while_nobody_looked_still_counts() {
    let (send, receive) = tokio::sync::mpsc::unbounded_channel();
    let mut response = Some(Response::builder().status(401).body(Fed(receive)).unwrap());
    let api = service_fn(move |_: Request<()>| {
        std::future::ready(Ok::<_, BoxError>(response.take().expect("one request")))
    });
    let mut service = AuthErrorLayer::new().layer(api);
    let mut call = task::spawn(service.call(get(MODELS)));
    assert_pending!(call.poll());
    send.send(Ok(Frame::data(INVALID.into()))).unwrap();
    drop(send);
    tokio::time::advance(Duration::from_secs(60)).await;
    let error = assert_ready_err!(call.poll());
    assert_eq!(AuthError::find(&*error).unwrap().kind(), AuthErrorKind::InvalidApiKey);
}

#[tokio::test]
async fn e4_a_body_that_breaks_off_keeps_its_cause() {
    let found = error(script([Step::Data(Bytes::from_static(b"{\"error\":{")), Step::Fail])).await;
    assert_eq!((found.kind(), found.status().unwrap().as_u16()), (AuthErrorKind::Unauthorized, 401));
    assert_eq!(found.body(), b"{\"error\":{");
    assert_eq!(found.source().unwrap().to_string(), "connection reset");
    assert!(!found.to_string().contains("connection reset"), "a cause is told once");
}

#[tokio::test]
async fn e4_one_bad_byte_does_not_hide_what_a_body_says() {
    for body in [
        &b"\xef\xbb\xbf{\"error\":{\"code\":\"invalid_api_key\"}}"[..],
        b"{\"error\":{\"message\":\"caf\xe9\",\"code\":\"invalid_api_key\"}}",
    ] {
        assert_eq!(error(response(401, body)).await.kind(), AuthErrorKind::InvalidApiKey);
    }
}

#[tokio::test]
async fn e2_headers_made_to_overflow_are_no_panic() {
    let mut hostile = response(401, INVALID);
    for name in ["x-ratelimit-reset", "x-ratelimit-reset-after", "retry-after", "x-ratelimit-limit"] {
        hostile.headers_mut().insert(name, "18446744073709551615s1000ms".parse().unwrap());
    }
    let found = error(hostile).await;
    assert_eq!((found.kind(), found.rate_limit()), (AuthErrorKind::InvalidApiKey, None));
}

#[tokio::test]
async fn e4_headers_that_lie_do_not_matter() {
    for (name, value) in [
        ("content-length", "1000000"),
        ("content-length", "1"),
        ("content-encoding", "gzip"),
        ("content-type", "text/html"),
        ("content-type", "image/png"),
    ] {
        let mut lying = response(401, INVALID);
        lying.headers_mut().insert(name, value.parse().unwrap());
        assert_eq!(error(lying).await.kind(), AuthErrorKind::InvalidApiKey, "{name}: {value}");
    }
    let gzip = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03";
    let found = error(response(403, &gzip[..])).await;
    assert_eq!((found.kind(), found.body()), (AuthErrorKind::Forbidden, &gzip[..]));
}

/// A body that nobody may read.
#[derive(Clone, Debug)]
struct Untouchable;

impl http_body::Body for Untouchable {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        panic!("the body was read");
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(7)
    }
}

#[test]
fn e5_every_other_status_passes_untouched_and_unread() {
    for status in (100..600).filter(|status| !matches!(status, 401 | 403)) {
        let answer = Response::builder().status(status).header("x-mark", "1").body(Untouchable).unwrap();
        let api = service_fn(move |_: Request<()>| std::future::ready(Ok::<_, BoxError>(answer.clone())));
        let mut service = AuthErrorLayer::new().layer(api);
        // In one poll, without a runtime: nothing was waited for.
        let passed = assert_ready_ok!(task::spawn(service.call(get(MODELS))).poll());
        assert_eq!((passed.status().as_u16(), passed.body().size_hint().exact()), (status, Some(7)));
        assert_eq!(passed.headers()["x-mark"], "1");
        assert!(passed.extensions().is_empty());
    }
}

#[tokio::test]
async fn e5_the_clients_own_error_passes_as_it_is() {
    let api = service_fn(|_: Request<()>| async {
        Err::<Response<Body>, BoxError>(io::Error::other("connection refused").into())
    });
    let stack =
        ServiceBuilder::new().layer(AuthErrorLayer::new()).layer(ApiKeyLayer::bearer(key())).service(api);
    let error = stack.oneshot(get(MODELS)).await.unwrap_err();
    assert_eq!(error.downcast_ref::<io::Error>().unwrap().to_string(), "connection refused");
    assert!(AuthError::find(&*error).is_none());
}

#[tokio::test]
async fn e7_it_is_small_and_found_through_boxes() {
    fn is_plain<T: Clone + Send + Sync + 'static>() {}
    is_plain::<AuthError>();
    assert_eq!(size_of::<AuthError>(), size_of::<usize>());
    assert_eq!(size_of::<Option<AuthError>>(), size_of::<usize>());

    let error = error(response(401, INVALID)).await;
    let boxed: BoxError = error.clone().into();
    let twice: BoxError = io::Error::other(boxed).into();
    let thrice: BoxError = Error::<io::Error>::Inner(io::Error::other(twice)).into();
    let wrapped: BoxError = Error::<io::Error>::Auth(error.clone()).into();
    let in_a_box: BoxError = Box::<Box<AuthError>>::new(Box::new(error.clone()));
    let shared: BoxError = io::Error::other(Arc::new(error.clone())).into();
    let unboxed = Error::<BoxError>::Auth(error).into_boxed();
    for boxed in [&thrice, &wrapped, &unboxed, &in_a_box, &shared] {
        assert_eq!(AuthError::find(&**boxed).unwrap().kind(), AuthErrorKind::InvalidApiKey);
    }
    assert!(AuthError::find(&io::Error::other("no")).is_none());
    assert!(AuthError::find(&io::Error::from(io::ErrorKind::NotFound)).is_none());
}

#[derive(Clone)]
struct Twice(u32);

impl Policy<Request<()>, Response<Body>, BoxError> for Twice {
    type Future = std::future::Ready<()>;

    fn retry(
        &mut self,
        _: &mut Request<()>,
        result: &mut Result<Response<Body>, BoxError>,
    ) -> Option<Self::Future> {
        let error = AuthError::find(&**result.as_ref().err()?)?;
        self.0 = self.0.checked_sub(1)?;
        (!error.is_permanent()).then(|| std::future::ready(()))
    }

    fn clone_request(&mut self, request: &Request<()>) -> Option<Request<()>> {
        Some(request.clone())
    }
}

#[tokio::test]
async fn e7_it_survives_retry_buffer_and_timeout() {
    for (body, sends) in [(INVALID, 1), (r#"{"error":{"code":"invalid_token"}}"#, 3)] {
        let (mock, mut handle) = tower_test::mock::pair();
        let stack = ServiceBuilder::new()
            .timeout(Duration::from_secs(5))
            .buffer(4)
            .retry(Twice(2))
            .layer(AuthErrorLayer::new())
            .layer(JwtLayer::new(jwt(), key()))
            .service(mock);
        let api = async {
            let mut sent = 0;
            while let Some((_, send)) = handle.next_request().await {
                sent += 1;
                send.send_response(response(401, body));
            }
            sent
        };
        let (result, sent) = tokio::join!(stack.oneshot(get(MODELS)), api);
        let error = result.unwrap_err();
        assert!(AuthError::find(&*error).is_some(), "{error}");
        assert_eq!(sent, sends, "a permanent error is not sent again");
    }
}

#[tokio::test]
async fn s2_an_echo_of_what_was_sent_is_masked_everywhere() {
    /// Of no shape that would be masked by itself.
    const OPAQUE: &str = "opaque:token/of+no=shape";
    let jwt = || Token::new(OPAQUE).unwrap();
    let bodies = [
        format!(r#"{{"error":{{"message":"bad key {KEY} or {OPAQUE}","code":"{KEY}","type":"{OPAQUE}"}}}}"#),
        format!(r#"{{"error":{{"message":"escaped: {}"}}}}"#, OPAQUE.replace('/', "\\/")),
        format!(r#"{{"error":{{"message":"escaped: {}"}}}}"#, KEY.replace('-', "\\u002d")),
        format!(r#"{{"{KEY}":["{OPAQUE}"]}}"#),
        format!("<html>{OPAQUE}</html>"),
        format!("cut off: {}", &OPAQUE[..16]),
    ];
    for (body, in_one_layer) in bodies.iter().flat_map(|body| [(body, true), (body, false)]) {
        let mut echo = response(401, body.clone());
        echo.headers_mut().insert("x-request-id", OPAQUE.parse().unwrap());
        let api = service_fn(move |_: Request<()>| std::future::ready(Ok::<_, BoxError>(echo.clone())));
        let stack = ServiceBuilder::new().layer(AuthErrorLayer::new());
        let result = if in_one_layer {
            stack.layer(JwtLayer::new(jwt(), key())).service(api).oneshot(get(MODELS)).await
        } else {
            let stack = stack.layer(JwtLayer::beside_api_key(jwt())).layer(ApiKeyLayer::beside_jwt(key()));
            stack.service(api).oneshot(get(MODELS)).await
        };
        let error = result.unwrap_err();
        let error = AuthError::find(&*error).unwrap();
        let body = String::from_utf8_lossy(error.body());
        let decoded = serde_json::from_slice::<Value>(error.body()).map(|json| json.to_string());
        let fields = [error.message(), error.code(), error.error_type(), error.request_id()];
        let all = format!("{error} {error:?} {error:#?} {body} {decoded:?} {fields:?}");
        for secret in [KEY, OPAQUE, &OPAQUE[..16]] {
            assert!(!all.contains(secret), "{all}");
        }
        assert!(all.contains("[redacted]"), "{all}");
    }
}

#[tokio::test]
async fn a_long_or_many_lined_message_is_shown_on_one_line_and_shortened() {
    let body = format!(r#"{{"error":{{"message":"first\nsecond\u001b[31m {}"}}}}"#, "x".repeat(5_000));
    let error = error(response(403, body)).await;
    let shown = error.to_string();
    assert!(shown.starts_with("forbidden (403): first second\\u{1b}[31m xxx"), "{shown}");
    assert!(shown.len() < 500 && !shown.contains(['\n', '\u{1b}']), "{shown}");
    assert!(error.message().unwrap().len() > 5_000, "`message` has all of it");
}

#[test]
fn e4_a_runtime_without_timers_reads_what_is_there() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let _guard = runtime.enter();
    assert_reads_what_is_there();
}

#[test]
fn e4_a_body_that_is_read_on_in_another_runtime_has_its_five_seconds_there() {
    let runtime =
        || tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let api = service_fn(|_: Request<()>| async {
        Ok::<_, BoxError>(script([Step::Data(INVALID.into()), Step::Hang]))
    });
    let mut service = AuthErrorLayer::new().layer(api);
    let mut call = task::spawn(service.call(get(MODELS)));
    let (first, second) = (runtime(), runtime());
    {
        let _guard = first.enter();
        assert_pending!(call.poll());
    }
    drop(first);
    let error = second.block_on(async { tokio::time::timeout(Duration::from_secs(6), call).await });
    let error = error.expect("it ends").unwrap_err();
    assert_eq!(AuthError::find(&*error).unwrap().kind(), AuthErrorKind::InvalidApiKey);
}

#[tokio::test]
async fn t2_a_future_dropped_before_its_first_poll_does_nothing() {
    let polled = Arc::new(AtomicBool::new(false));
    let api = {
        let polled = Arc::clone(&polled);
        service_fn(move |_: Request<()>| {
            let polled = Arc::clone(&polled);
            async move {
                polled.store(true, Ordering::Relaxed);
                Ok::<_, BoxError>(response(200, ""))
            }
        })
    };
    let mut stack =
        ServiceBuilder::new().layer(AuthErrorLayer::new()).layer(ApiKeyLayer::bearer(key())).service(api);
    drop(stack.call(get(MODELS)));
    assert!(!polled.load(Ordering::Relaxed));
    stack.call(get(MODELS)).await.unwrap();
    assert!(polled.load(Ordering::Relaxed), "the test can tell");
}

#[tokio::test]
async fn t3_a_call_dropped_while_an_error_body_is_read_lets_go_of_it() {
    let (feed, receive) = tokio::sync::mpsc::unbounded_channel();
    let mut response = Some(Response::builder().status(401).body(Fed(receive)).unwrap());
    let api = service_fn(move |_: Request<()>| {
        std::future::ready(Ok::<_, BoxError>(response.take().expect("one request")))
    });
    let mut service = AuthErrorLayer::new().layer(api);
    let mut call = task::spawn(service.call(get(MODELS)));
    feed.send(Ok(Frame::data(INVALID.into()))).unwrap();
    assert_pending!(call.poll());
    assert!(!feed.is_closed());
    drop(call);
    assert!(feed.is_closed(), "the response is gone, and its connection with it");
}
