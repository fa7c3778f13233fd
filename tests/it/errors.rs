//! How 401 and 403 become typed errors, and everything else passes through (E1 to E5, E7).

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
    auth_error::InspectedBody,
};

use crate::support::{Body, Fed, HANG, KEY, MODELS, get, jwt, key, response};

/// An error body seen in the wild, with what reading it must give.
#[derive(serde::Deserialize)]
pub(crate) struct SeenBody {
    pub(crate) id: String,
    pub(crate) status: u16,
    content_type: String,
    headers: HashMap<String, String>,
    pub(crate) body: String,
    pub(crate) expect: Value,
}

pub(crate) fn seen() -> Vec<SeenBody> {
    serde_json::from_str(include_str!("../error-bodies.json")).unwrap()
}

impl SeenBody {
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

/// Sends a request through [`AuthErrorLayer`] to an API that answers with `response`.
async fn answered<B>(response: Response<B>) -> Result<Response<InspectedBody<B>>, BoxError>
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

/// Returns the error that `response` becomes.
async fn error<B>(response: Response<B>) -> AuthError
where
    B: http_body::Body<Error: Into<BoxError>>,
{
    let error = answered(response).await.map(|_| ()).unwrap_err();
    AuthError::find(&*error).unwrap().clone()
}

/// E1: the three documented bodies, with their remedies.
#[tokio::test]
async fn documented_errors_are_typed() {
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
            "this feature needs a higher account level",
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

/// E2: every body in `error-bodies.json`.
#[tokio::test]
async fn every_seen_body_is_read() {
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
                assert_eq!(body, seen.body, "{} passes unchanged", seen.id);
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

/// E2: a body of unknown shape.
#[tokio::test]
async fn unknown_bodies_keep_status_and_body() {
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

/// E3: the code decides before the type, the type before the status.
#[tokio::test]
async fn the_code_decides_first() {
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

/// E3, J11: codes count in any spelling, and in the type; a message counts if nothing else does.
#[tokio::test]
async fn codes_are_found_where_servers_put_them() {
    use AuthErrorKind as Kind;
    let bodies = [
        (r#"{"error":{"code":"INSUFFICIENT_SCOPE"}}"#, Kind::InsufficientPermissions),
        (r#"{"error":{"code":"InsufficientPermission"}}"#, Kind::InsufficientPermissions),
        (r#"{"error":{"code":"missing scope"}}"#, Kind::InsufficientPermissions),
        (
            r#"{"error":{"code":"permission-denied","type":"authentication_error"}}"#,
            Kind::InsufficientPermissions,
        ),
        (r#"{"error":{"code":"E1","type":"missing_scopes"}}"#, Kind::InsufficientPermissions),
        (r#"{"error":"insufficient_scope","error_description":"no"}"#, Kind::InsufficientPermissions),
        (r#"{"errors":[{"code":"missing_permission"}]}"#, Kind::InsufficientPermissions),
        (
            r#"{"error":{"message":"Missing scopes: a.b","type":"invalid_request_error"}}"#,
            Kind::InsufficientPermissions,
        ),
        (r#"{"detail":"Missing required scope a.b"}"#, Kind::InsufficientPermissions),
        (r#"{"message":"permission_denied: a.b"}"#, Kind::InsufficientPermissions),
        (r#"{"detail":"Invalid token."}"#, Kind::TokenRejected),
        (r#"{"detail":"Invalid API key"}"#, Kind::InvalidApiKey),
        (r#"{"error":{"code":"invalid_token","message":"Missing scope"}}"#, Kind::TokenRejected),
        (r#"{"error":{"message":"Permission denied: the API key is invalid"}}"#, Kind::Unauthorized),
        (r#"{"error":{"message":"Scope it out. Permission is good."}}"#, Kind::Unauthorized),
        (r#"{"error":{"code":"invalid_api_keys"}}"#, Kind::Unauthorized),
    ];
    for (body, kind) in bodies {
        assert_eq!(error(response(401, body)).await.kind(), kind, "{body}");
    }
    for (challenge, kind) in [
        (r#"Bearer error="insufficient_scope", scope="a.b""#, Kind::InsufficientPermissions),
        (r#"Bearer error="invalid_token""#, Kind::TokenRejected),
        (r#"Bearer error_description="missing scope a.b""#, Kind::InsufficientPermissions),
    ] {
        let mut response = response(401, r#"{"error":{"code":"E1"}}"#);
        response.headers_mut().insert("www-authenticate", challenge.parse().unwrap());
        assert_eq!(error(response).await.kind(), kind, "{challenge}");
    }
}

/// J11: a compressed body is read, whole or cut off.
#[cfg(feature = "decompression")]
#[tokio::test]
async fn compressed_bodies_are_read() {
    use std::io::Read;

    let text = format!(r#"{{"error":{{"code":"invalid_api_key","message":"{}"}}}}"#, "x".repeat(500));
    let mut gzip = Vec::new();
    flate2::read::GzEncoder::new(text.as_bytes(), flate2::Compression::none())
        .read_to_end(&mut gzip)
        .unwrap();
    for length in [gzip.len(), gzip.len() - 100] {
        let mut response = response(401, gzip[..length].to_vec());
        response.headers_mut().insert("content-encoding", "gzip".parse().unwrap());
        let error = error(response).await;
        assert_eq!(error.kind(), AuthErrorKind::InvalidApiKey);
        assert!(text.as_bytes().starts_with(error.body()) && error.body().len() > 300);
    }
}

/// E3: `WWW-Authenticate` supplies what the body lacks.
#[tokio::test]
async fn the_challenge_fills_gaps() {
    let challenged = |body: &'static str, challenge: &str| {
        let mut response = response(401, body);
        response.headers_mut().insert("www-authenticate", challenge.parse().unwrap());
        response
    };
    let expired = r#"Bearer error="invalid_token", error_description="expired""#;

    let found = error(challenged("Unauthorized", expired)).await;
    assert_eq!((found.kind(), found.code()), (AuthErrorKind::TokenRejected, Some("invalid_token")));
    assert_eq!(found.message(), Some("expired"));
    assert!(!found.is_permanent(), "a token can be refreshed");

    // The body's code wins, but the challenge still tells that the token was rejected.
    let found = error(challenged(r#"{"error":{"code":"E17","message":"m"}}"#, expired)).await;
    assert_eq!((found.kind(), found.code()), (AuthErrorKind::TokenRejected, Some("E17")));
    let found = error(challenged(r#"{"error":{"code":"invalid_api_key"}}"#, expired)).await;
    assert_eq!(found.kind(), AuthErrorKind::InvalidApiKey);
}

#[tokio::test]
async fn headers_are_read() {
    let mut forbidden = response(403, r#"{"request_id":"from-body"}"#);
    assert_eq!(error(forbidden.clone()).await.request_id(), Some("from-body"));
    forbidden.headers_mut().insert("request-id", "req_1".parse().unwrap());
    assert_eq!(error(forbidden.clone()).await.request_id(), Some("req_1"));
    forbidden.headers_mut().insert("x-request-id", "req_2".parse().unwrap());
    for (name, value) in [("retry-after", "7"), ("x-ratelimit-limit", "60"), ("x-ratelimit-remaining", "59")]
    {
        forbidden.headers_mut().insert(name, value.parse().unwrap());
    }
    let error = error(forbidden).await;
    assert_eq!(error.request_id(), Some("req_2"));
    assert_eq!(error.retry_after(), Some(Duration::from_secs(7)));
    let limit = error.rate_limit().unwrap();
    assert_eq!((limit.limit, limit.remaining, limit.reset_at), (Some(60), Some(59), None));
}

/// A body that follows a script of frames, errors and pauses.
#[derive(Clone, Debug)]
struct Script(std::collections::VecDeque<Step>);

#[derive(Clone, Debug)]
enum Step {
    Data(Bytes),
    Fail,
    Hang,
    /// An endless series of empty frames.
    EmptyFrames,
}

impl http_body::Body for Script {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if matches!(self.0.front(), Some(Step::EmptyFrames)) {
            return Poll::Ready(Some(Ok(Frame::data(Bytes::new()))));
        }
        match self.0.pop_front() {
            Some(Step::Data(data)) => Poll::Ready(Some(Ok(Frame::data(data)))),
            Some(Step::Fail) => Poll::Ready(Some(Err(io::Error::other("connection reset")))),
            Some(Step::Hang) => {
                self.0.push_front(Step::Hang);
                Poll::Pending
            }
            Some(Step::EmptyFrames) | None => Poll::Ready(None),
        }
    }
}

fn script(steps: impl IntoIterator<Item = Step>) -> Response<Script> {
    Response::builder().status(401).body(Script(steps.into_iter().collect())).unwrap()
}

const INVALID: &str = r#"{"error":{"code":"invalid_api_key"}}"#;

/// E4: an oversize body is cut at the limit.
#[tokio::test]
async fn oversize_bodies_are_cut() {
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

/// E4: a stall beyond the size limit costs no time.
#[tokio::test(start_paused = true)]
async fn a_full_body_is_not_awaited() {
    let started = tokio::time::Instant::now();
    let kilobytes = std::iter::repeat_n(Step::Data(Bytes::from_static(&[b'x'; 1024])), 65);
    let found = error(script(kilobytes.chain([Step::Hang]))).await;
    assert_eq!((found.body().len(), started.elapsed()), (64 * 1024, Duration::ZERO));
}

/// E4: the default time limit is 5 s.
#[tokio::test(start_paused = true)]
async fn stalled_bodies_end_after_five_seconds() {
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
    assert_eq!(error.kind(), AuthErrorKind::InvalidApiKey, "the part that arrived is read");
    assert_eq!(error.body(), INVALID.as_bytes());
}

/// E4: endless empty frames neither block the task's thread nor outlast the time limit.
#[tokio::test(start_paused = true)]
async fn endless_empty_frames_yield_and_end() {
    let api = service_fn(|_: Request<()>| async { Ok::<_, BoxError>(script([Step::EmptyFrames])) });
    let mut service = AuthErrorLayer::new().layer(api);
    let mut call = task::spawn(service.call(get(MODELS)));
    assert_pending!(call.poll());
    assert!(call.is_woken(), "it continues on the next poll");
    tokio::time::advance(Duration::from_secs(6)).await;
    let error = assert_ready_err!(call.poll());
    assert_eq!(AuthError::find(&*error).unwrap().kind(), AuthErrorKind::Unauthorized);
}

/// Asserts that one poll is enough: without a timer, nothing is awaited.
#[track_caller]
fn assert_reads_available_data() {
    let api = service_fn(|_: Request<()>| async {
        Ok::<_, BoxError>(script([Step::Data(INVALID.into()), Step::Hang]))
    });
    let mut service = AuthErrorLayer::new().layer(api);
    let error = assert_ready_err!(task::spawn(service.call(get(MODELS))).poll());
    assert_eq!(AuthError::find(&*error).unwrap().kind(), AuthErrorKind::InvalidApiKey);
}

/// E4: outside a runtime, only available data is read.
#[test]
fn without_a_runtime_nothing_is_awaited() {
    assert_reads_available_data();

    let api = service_fn(|_: Request<()>| async { Ok::<_, BoxError>(script([Step::EmptyFrames])) });
    let mut service = AuthErrorLayer::new().layer(api);
    assert_ready_err!(task::spawn(service.call(get(MODELS))).poll());
}

/// E4: data that arrived before the deadline counts, even if it is polled later.
#[tokio::test(start_paused = true)]
async fn data_that_arrived_in_time_counts() {
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

/// E4: a broken body keeps its cause as the source.
#[tokio::test]
async fn a_broken_body_keeps_its_cause() {
    let found = error(script([Step::Data(Bytes::from_static(b"{\"error\":{")), Step::Fail])).await;
    assert_eq!((found.kind(), found.status().unwrap().as_u16()), (AuthErrorKind::Unauthorized, 401));
    assert_eq!(found.body(), b"{\"error\":{");
    assert_eq!(found.source().unwrap().to_string(), "connection reset");
    assert!(!found.to_string().contains("connection reset"), "a cause is shown once");
}

/// E4: a byte order mark or invalid UTF-8 does not hide the code.
#[tokio::test]
async fn invalid_bytes_do_not_hide_the_code() {
    for body in [
        &b"\xef\xbb\xbf{\"error\":{\"code\":\"invalid_api_key\"}}"[..],
        b"{\"error\":{\"message\":\"caf\xe9\",\"code\":\"invalid_api_key\"}}",
    ] {
        assert_eq!(error(response(401, body)).await.kind(), AuthErrorKind::InvalidApiKey);
    }
}

/// E2: header values made to overflow do not panic.
#[tokio::test]
async fn overflowing_headers_do_not_panic() {
    let mut hostile = response(401, INVALID);
    for name in ["x-ratelimit-reset", "x-ratelimit-reset-after", "retry-after", "x-ratelimit-limit"] {
        hostile.headers_mut().insert(name, "18446744073709551615s1000ms".parse().unwrap());
    }
    let found = error(hostile).await;
    assert_eq!((found.kind(), found.rate_limit()), (AuthErrorKind::InvalidApiKey, None));
}

/// E4: wrong length, encoding and type headers do not matter.
#[tokio::test]
async fn lying_headers_do_not_matter() {
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

/// A body that panics when it is read.
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

/// E5: every other status passes untouched and unread.
#[test]
fn other_statuses_pass_unread() {
    for status in (100..600).filter(|status| !matches!(status, 401 | 403)) {
        let answer = Response::builder().status(status).header("x-mark", "1").body(Untouchable).unwrap();
        let api = service_fn(move |_: Request<()>| std::future::ready(Ok::<_, BoxError>(answer.clone())));
        let mut service = AuthErrorLayer::new().layer(api);
        // One poll without a runtime proves that nothing is awaited.
        let passed = assert_ready_ok!(task::spawn(service.call(get(MODELS))).poll());
        assert_eq!((passed.status().as_u16(), passed.body().size_hint().exact()), (status, Some(7)));
        assert_eq!(passed.headers()["x-mark"], "1");
        assert!(passed.extensions().is_empty());
    }
}

/// E5: the client's own error passes unchanged.
#[tokio::test]
async fn client_errors_pass_unchanged() {
    let api = service_fn(|_: Request<()>| async {
        Err::<Response<Body>, BoxError>(io::Error::other("connection refused").into())
    });
    let stack =
        ServiceBuilder::new().layer(AuthErrorLayer::new()).layer(ApiKeyLayer::bearer(key())).service(api);
    let error = stack.oneshot(get(MODELS)).await.unwrap_err();
    assert_eq!(error.downcast_ref::<io::Error>().unwrap().to_string(), "connection refused");
    assert!(AuthError::find(&*error).is_none());
}

/// E7: one pointer wide, and found through boxes and wrappers.
#[tokio::test]
async fn errors_are_small_and_found() {
    fn assert_bounds<T: Clone + Send + Sync + 'static>() {}
    assert_bounds::<AuthError>();
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

/// Retries errors that are not permanent, at most this many times.
#[derive(Clone)]
struct RetryTransient(u32);

impl<B> Policy<Request<()>, Response<B>, BoxError> for RetryTransient {
    type Future = std::future::Ready<()>;

    fn retry(
        &mut self,
        _: &mut Request<()>,
        result: &mut Result<Response<B>, BoxError>,
    ) -> Option<Self::Future> {
        let error = AuthError::find(&**result.as_ref().err()?)?;
        self.0 = self.0.checked_sub(1)?;
        (!error.is_permanent()).then(|| std::future::ready(()))
    }

    fn clone_request(&mut self, request: &Request<()>) -> Option<Request<()>> {
        Some(request.clone())
    }
}

/// E7: survives `tower::retry`, `buffer` and `timeout`.
#[tokio::test]
async fn errors_survive_tower_layers() {
    for (body, sends) in [(INVALID, 1), (r#"{"error":{"code":"invalid_token"}}"#, 3)] {
        let (mock, mut handle) = tower_test::mock::pair();
        let stack = ServiceBuilder::new()
            .timeout(HANG)
            .buffer(4)
            .retry(RetryTransient(2))
            .layer(AuthErrorLayer::new())
            .layer(JwtLayer::new(jwt()))
            .layer(ApiKeyLayer::x_api_key(key()))
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
        assert_eq!(sent, sends, "a permanent error is not retried");
    }
}

/// S2: a response that echoes the credentials is redacted in every field.
#[tokio::test]
async fn echoed_credentials_are_redacted() {
    /// Without a shape that would be redacted on its own.
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
            stack
                .layer((JwtLayer::new(jwt()), ApiKeyLayer::x_api_key(key())))
                .service(api)
                .oneshot(get(MODELS))
                .await
        } else {
            let stack = stack.layer(JwtLayer::new(jwt())).layer(ApiKeyLayer::x_api_key(key()));
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
async fn long_messages_are_shown_shortened() {
    let body = format!(r#"{{"error":{{"message":"first\nsecond\u001b[31m {}"}}}}"#, "x".repeat(5_000));
    let error = error(response(403, body)).await;
    let shown = error.to_string();
    assert!(shown.starts_with("forbidden (403): first second\\u{1b}[31m xxx"), "{shown}");
    assert!(shown.len() < 500 && !shown.contains(['\n', '\u{1b}']), "{shown}");
    assert!(error.message().unwrap().len() > 5_000, "`message` is complete");
}

/// E4: a runtime without timers reads only available data.
#[test]
fn without_timers_nothing_is_awaited() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let _guard = runtime.enter();
    assert_reads_available_data();
}

/// E4: a body whose reading moves to another runtime keeps its time limit there.
#[test]
fn the_time_limit_moves_between_runtimes() {
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
    let error = error.expect("reading ends").unwrap_err();
    assert_eq!(AuthError::find(&*error).unwrap().kind(), AuthErrorKind::InvalidApiKey);
}

/// T2: a future dropped before its first poll does nothing.
#[tokio::test]
async fn unpolled_futures_do_nothing() {
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
    assert!(polled.load(Ordering::Relaxed), "the control request is seen");
}

/// T3: dropping a call while an error body is read drops the body.
#[tokio::test]
async fn a_dropped_call_drops_the_body() {
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
    assert!(feed.is_closed(), "the response was dropped, which frees its connection");
}
