//! gRPC through [tonic](https://docs.rs/tonic): [`SelamGrpcLayer`], over a `Channel` and under a generated client.
//!
//! ```text
//! GreeterClient ─▶ SelamGrpc ─────────▶ Refresh ─────────▶ Authorize ─▶ Channel
//!                  every refusal is a    16 or 401: renew,   key, or JWT
//!                  `Status` with its     send once more      and key
//!                  `AuthError`
//! ```
//!
//! A tonic interceptor cannot do this: it is synchronous, and a token that has to be renewed is awaited.
//!
//! ```no_run
//! use tonic::body::Body;
//! use tower::Layer;
//! use tower_selam::{SelamLayer, adapter::tonic::SelamGrpcLayer};
//! # #[derive(Clone)] struct Channel;
//! # impl tower::Service<http::Request<Body>> for Channel {
//! #     type Response = http::Response<Body>;
//! #     type Error = tonic::Status;
//! #     type Future = std::future::Ready<Result<Self::Response, Self::Error>>;
//! #     fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Self::Error>> {
//! #         Ok(()).into()
//! #     }
//! #     fn call(&mut self, _: http::Request<Body>) -> Self::Future {
//! #         std::future::ready(Ok(http::Response::default()))
//! #     }
//! # }
//! # struct Endpoint(http::Uri);
//! # impl Endpoint {
//! #     fn from_shared(uri: String) -> Result<Self, http::uri::InvalidUri> { Ok(Self(uri.parse()?)) }
//! #     fn uri(&self) -> &http::Uri { &self.0 }
//! #     fn connect_lazy(&self) -> Channel { Channel }
//! # }
//! # struct GreeterClient<T>(T);
//! # impl<T: tonic::client::GrpcService<Body>> GreeterClient<T> { fn new(inner: T) -> Self { Self(inner) } }
//!
//! let selam = SelamLayer::from_env()?;
//! let endpoint = Endpoint::from_shared(selam.base_url().to_string())?;
//! let layer = SelamGrpcLayer::new(selam, endpoint.uri())?;
//! let greeter = GreeterClient::new(layer.layer(endpoint.connect_lazy()));
//! # Ok::<(), tower_selam::BoxError>(())
//! ```
//!
//! What the server refuses is renewed as over plain HTTP:
//!
//! ```
//! use http::{Request, Response};
//! use tonic::{Code, Status, body::Body};
//! use tower::{Layer, ServiceExt, service_fn};
//! use tower_selam::{
//!     ApiKey, AuthError, AuthErrorKind, BoxError, Refreshing, SelamLayer, Token, adapter::tonic::SelamGrpcLayer,
//!     source::{Reason, source_fn},
//! };
//!
//! # tokio_test::block_on(async {
//! let channel = service_fn(|request: Request<Body>| async move {
//!     let token = &request.headers()["authorization"];
//!     Ok::<_, Status>(match request.uri().path() {
//!         "/selam.Greeter/Delete" => Status::permission_denied("greetings are for ever").into_http(),
//!         _ if token == "Bearer first" => Status::unauthenticated("token expired").into_http(),
//!         _ => Response::new(Body::empty()),
//!     })
//! });
//! let jwts = Refreshing::new(source_fn(|reason: Reason<Token>| async move {
//!     let text = if let Reason::Rejected(_) = reason { "second" } else { "first" };
//!     Ok::<_, BoxError>(Token::new(text)?)
//! }));
//! let selam = SelamLayer::builder().with_api_key(ApiKey::new("sk-selam-example")?).with_jwt(jwts).build()?;
//! let service = SelamGrpcLayer::new(selam, &"https://api.selamgpt.com".parse()?)?.layer(channel);
//!
//! // As tonic's clients make it: a path alone.
//! let greet = Request::post("/selam.Greeter/Greet").body(Body::empty())?;
//! service.clone().oneshot(greet).await?;
//!
//! let delete = Request::post("/selam.Greeter/Delete").body(Body::empty())?;
//! let status = service.oneshot(delete).await.unwrap_err();
//! assert_eq!((status.code(), status.message()), (Code::PermissionDenied, "greetings are for ever"));
//! assert_eq!(AuthError::find(&status).unwrap().kind(), AuthErrorKind::Forbidden);
//! # Ok::<(), BoxError>(())
//! # }).unwrap();
//! ```
//!
//! # The origin
//!
//! tonic's clients make requests of a path alone, and the channel adds where it goes further in. So the layer is
//! told: [`SelamGrpcLayer::new`] takes the URI that the channel connects to, and fails when credentials may not go
//! there, as to a plain `http` one that was not
//! [allowed for loopback](crate::BaseUrl::allow_insecure_loopback). What it is told has to be true: the `uri()` of the
//! `Endpoint`, not the name that `Endpoint::origin` gives it; of several that a channel balances between, each has to
//! be one that may have the credentials.
//!
//! # What a status leads to
//!
//! | The server said | where | then |
//! |---|---|---|
//! | `grpc-status` 16, or HTTP 401 | in headers | the credential is renewed and the request sent once more, [as after any 401](crate::refresh) |
//! | `grpc-status` 16 | in trailers | the credential is renewed for the next call; the status goes up |
//! | `grpc-status` 7, or HTTP 403 | anywhere | the status goes up |
//! | anything else | anywhere | it passes as it came |
//!
//! Servers that check credentials before they answer say 16 in headers, since they have begun no stream. Where it
//! comes in trailers, the call has had its response: its metadata by then, and any number of messages. To hold the
//! response back until the first message or the trailers would allow one more try, and hang every call that waits
//! for the response before it sends a message of its own.
//!
//! # Errors
//!
//! The service's error is [`Status`], which a generated client hands up unchanged. One that is about credentials has
//! the [`AuthError`] as its source, where [`AuthError::find`] finds it:
//!
//! | What happened | Code |
//! |---|---|
//! | the server said 16, or HTTP 401 | `Unauthenticated`, with its message, details and metadata |
//! | the server said 7, or HTTP 403 | `PermissionDenied`, with its message, details and metadata |
//! | there is no credential, or it cannot be sent or renewed, now or ever | `Unauthenticated` |
//! | the origin is not allowed | `PermissionDenied` |
//!
//! A renewal that failed and may succeed later is `Unauthenticated` too, as in grpc-go: the service called is not
//! `Unavailable`, and whoever counts its failures should not count this one.
//! [`is_permanent`](AuthError::is_permanent) and [`retry_after`](AuthError::retry_after) tell whether and when it is
//! worth another try.
//!
//! An error of the channel becomes the status that tonic would make of it, with itself as the source. A server that
//! echoes credentials in a refusal does not get them printed: they are masked in the status as well.
//!
//! # Bodies
//!
//! A request is kept while it is sent, up to [`REPLAY_LIMIT`](SelamGrpcLayer::REPLAY_LIMIT), to be sent again byte by
//! byte. A stream of requests is, too: what was sent before it was refused, then the rest. If more was sent than the
//! limit, the status goes up, and the next call has the new credential. Nothing is kept any more once the response
//! has begun.
//!
//! # Order
//!
//! Directly around the channel. A deadline that is set on a request counts for each time it is sent; for all of it,
//! put `tower::timeout` or tokio's outside.

use std::{
    borrow::Cow,
    fmt,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker, ready},
};

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Uri};
use http_body::{Frame, SizeHint};
use pin_project_lite::pin_project;
use tonic::{Code, Status, body::Body, metadata::MetadataMap};
use tower_layer::Layer;
use tower_service::Service;

use crate::{
    AuthError, AuthErrorKind, BoxError, ConfigError, Credentials, SelamLayer,
    auth_error::{Bounds, Inspect, Read},
    authorize::{self, Authorize, Policy, Sent},
    error::CloneClient,
    error::{Redactor, grpc_message},
    replay::{Blamed, BufferBody, CapturedBody, Refresh, Replay, ReplayBody, Replaying, Stopped, Undecided},
    telemetry::event,
};

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
const GRPC_STATUS_DETAILS: HeaderName = HeaderName::from_static("grpc-status-details-bin");

/// How gRPC writes bytes into headers: padded or not.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new()
        .with_encode_padding(false)
        .with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The ready-made stack over a tonic `Channel`. See the [module docs](self).
///
/// Cheap to clone.
#[derive(Clone, Debug)]
pub struct SelamGrpcLayer {
    policy: Arc<Policy>,
    bounds: Bounds,
    replay: ReplayRequests,
}

impl SelamGrpcLayer {
    /// How much of a request is kept by default: 4 MiB, the largest message that tonic's servers take unless told
    /// otherwise.
    pub const REPLAY_LIMIT: usize = 4 * 1024 * 1024;

    /// What `selam` sends, over a channel to `origin`: the `Endpoint`'s `uri()`.
    ///
    /// # Errors
    ///
    /// When `origin` has no scheme and host, or is not one that `selam` may send credentials to.
    pub fn new(selam: SelamLayer, origin: &Uri) -> Result<Self, ConfigError> {
        let SelamLayer { policy, errors, .. } = selam;
        let mut policy = Arc::unwrap_or_clone(policy);
        let stated = match (origin.scheme_str(), origin.authority()) {
            (Some(scheme), Some(authority)) => format!("{scheme}://{authority}"),
            _ => origin.to_string(),
        };
        policy.origins = policy.origins.with_relative_uri_origin(&stated)?;
        let replay = ReplayRequests(Some(BufferBody::new(Self::REPLAY_LIMIT)));
        Ok(Self { policy: Arc::new(policy), bounds: errors.0, replay })
    }

    /// Keeps up to `bytes` of each request, to send it again if need be.
    #[must_use]
    pub fn with_replay_limit(mut self, bytes: usize) -> Self {
        self.replay = ReplayRequests(Some(BufferBody::new(bytes)));
        self
    }

    /// Keeps nothing and sends no request again: a refusal renews the credential for the next.
    #[must_use]
    pub fn without_replay(mut self) -> Self {
        self.replay = ReplayRequests(None);
        self
    }
}

impl<S> Layer<S> for SelamGrpcLayer {
    type Service = SelamGrpc<S>;

    fn layer(&self, inner: S) -> Self::Service {
        let authorize = Authorize::new(HttpStatus(inner), Arc::clone(&self.policy));
        // What never changes need not be kept for a second time.
        let idle = !self.policy.provider.renews();
        SelamGrpc { stack: Refresh::new(authorize, self.replay).with_idle(idle), bounds: self.bounds }
    }
}

/// Sends authenticated gRPC requests. Made by [`SelamGrpcLayer`]; see the [module docs](self).
#[derive(Clone, Debug)]
pub struct SelamGrpc<S> {
    stack: Refresh<Authorize<HttpStatus<S>>, ReplayRequests>,
    bounds: Bounds,
}

impl<S> SelamGrpc<S> {
    /// The channel within.
    pub fn get_ref(&self) -> &S {
        &self.stack.get_ref().get_ref().0
    }

    /// The channel within, to be changed.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.stack.get_mut().get_mut().0
    }

    /// The channel within, without this one.
    pub fn into_inner(self) -> S {
        self.stack.into_inner().into_inner().0
    }
}

impl<S, B> Service<Request<Body>> for SelamGrpc<S>
where
    S: Service<Request<Body>, Response = Response<B>> + CloneClient,
    S::Error: Into<BoxError>,
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    type Response = Response<ResponseBody<B>>;
    type Error = Status;
    type Future = ResponseFuture<S::Future, S, B>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Status>> {
        self.stack.poll_ready(cx)
    }

    #[inline]
    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let bounds = self.bounds;
        self.stack.send(request, |response| ResponseFuture { inspect: Inspect::new(response, bounds) })
    }
}

pin_project! {
    /// Response future of [`SelamGrpc`]. Dropping it drops the request, or the response whose body it reads, and
    /// leaves a renewal that it waits for running.
    pub struct ResponseFuture<F, S, B>
    where
        B: http_body::Body,
    {
        #[pin]
        inspect: Inspect<Refreshed<F, S, B>, B>,
    }
}

type Refreshed<F, S, B> = Replaying<
    authorize::ResponseFuture<HttpStatusFuture<F>, HttpStatus<S>, Body>,
    Authorize<HttpStatus<S>>,
    ReplayRequests,
    Body,
    B,
>;

impl<S, B> Future for ResponseFuture<S::Future, S, B>
where
    S: Service<Request<Body>, Response = Response<B>> + CloneClient,
    S::Error: Into<BoxError>,
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    type Output = Result<Response<ResponseBody<B>>, Status>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let refuse = |read| Err(Stopped::Refused(read));
        let mut inspect = self.project().inspect;
        let polled = inspect.as_mut().poll_or(cx, |response| response, refuse);
        let response = ready!(polled).map_err(|stopped| match stopped {
            Stopped::Failed(status) => status,
            Stopped::Refused(read) => refused_in_head(*read),
        })?;
        let (mut parts, body) = response.into_parts();
        let undecided = parts.extensions.remove::<Undecided>();
        let sent = undecided.and_then(|_| inspect.response()?.response()?.take_sent());
        Poll::Ready(Ok(Response::from_parts(parts, ResponseBody { body, sent })))
    }
}

impl<F, S, B: http_body::Body> fmt::Debug for ResponseFuture<F, S, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}

pin_project! {
    /// The body of a response, of which the trailers may say that it was refused. Its frames pass as they come.
    pub struct ResponseBody<B> {
        #[pin]
        body: B,
        sent: Option<Sent>,
    }
}

impl<B> http_body::Body for ResponseBody<B>
where
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.project();
        Poll::Ready(match ready!(this.body.poll_frame(cx)) {
            Some(Ok(frame)) => Some(match frame.into_trailers() {
                Ok(trailers) => match refusal(&trailers) {
                    Some(status) => Err(refused_in_trailers(status, trailers, this.sent.take())),
                    None => Ok(Frame::trailers(trailers)),
                },
                Err(frame) => Ok(frame),
            }),
            Some(Err(error)) => Some(Err(Status::from_error(error.into()))),
            None => None,
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl<B> fmt::Debug for ResponseBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseBody").finish_non_exhaustive()
    }
}

/// `Unauthenticated` or `PermissionDenied`, never `Unknown`, with the error as its source.
///
/// See [what has which code](self#errors).
impl From<AuthError> for Status {
    fn from(error: AuthError) -> Self {
        let mut status = Self::new(code(&error), error.to_string());
        status.set_source(Arc::new(error));
        status
    }
}

fn code(error: &AuthError) -> Code {
    match (error.status(), error.kind()) {
        (Some(StatusCode::FORBIDDEN), _) | (None, AuthErrorKind::OriginNotAllowed) => Code::PermissionDenied,
        _ => Code::Unauthenticated,
    }
}

/// What HTTP calls a refusal that gRPC tells in headers or trailers.
fn refusal(headers: &HeaderMap) -> Option<StatusCode> {
    match Code::from_bytes(headers.get(GRPC_STATUS)?.as_bytes()) {
        Code::Unauthenticated => Some(StatusCode::UNAUTHORIZED),
        Code::PermissionDenied => Some(StatusCode::FORBIDDEN),
        _ => None,
    }
}

#[cold]
fn refused_in_head<B>(read: Read<B>) -> Status
where
    B: http_body::Body<Error: Into<BoxError>>,
{
    let http::response::Parts { headers, extensions, .. } = &read.collect.parts;
    let (headers, sent) = (headers.clone(), extensions.get::<Sent>().cloned().map(Sent::joined));
    refused(read.into_error(), headers, sent.as_ref())
}

#[cold]
fn refused_in_trailers(status: StatusCode, trailers: HeaderMap, sent: Option<Sent>) -> Status {
    let credentials = sent.clone().map(Sent::joined);
    let error = AuthError::read(status, &trailers, b"", credentials.as_ref(), None);
    if status == StatusCode::UNAUTHORIZED
        && let Some(blamed) = sent.and_then(|sent| Blamed::of(&sent, error.kind()))
    {
        // It renews without being waited for.
        let _ = blamed.reject();
    }
    event::refused_by_api(&error, credentials.as_ref());
    refused(error, trailers, credentials.as_ref())
}

/// The status that the server gave, without the credentials that it may echo.
#[cold]
fn refused(error: AuthError, mut headers: HeaderMap, sent: Option<&Credentials>) -> Status {
    let redactor = Redactor::new(sent);
    let message = match grpc_message(&headers) {
        Some(message) => redactor.text(message),
        // The server's silence is its own, a proxy's is explained.
        None if headers.contains_key(GRPC_STATUS) => String::new(),
        None => error.to_string(),
    };
    let mut details =
        headers.get(GRPC_STATUS_DETAILS).and_then(|details| BASE64.decode(details).ok()).unwrap_or_default();
    redactor.in_place(&mut details);
    for name in [GRPC_STATUS, GRPC_MESSAGE, GRPC_STATUS_DETAILS] {
        headers.remove(name);
    }
    redact(&mut headers, &redactor);
    let metadata = MetadataMap::from_headers(headers);
    let mut status = Status::with_details_and_metadata(code(&error), message, details.into(), metadata);
    status.set_source(Arc::new(error));
    status
}

fn redact(headers: &mut HeaderMap, redactor: &Redactor) {
    for (name, value) in headers.iter_mut() {
        let binary = name.as_str().ends_with("-bin");
        let redacted = match BASE64.decode(&value).ok().filter(|_| binary) {
            Some(bytes) => {
                let mut masked = bytes.clone();
                redactor.in_place(&mut masked);
                (masked != bytes).then(|| BASE64.encode(masked).into_bytes())
            }
            None => match redactor.bytes(value.as_bytes()) {
                Cow::Borrowed(_) => None,
                Cow::Owned(redacted) => Some(redacted),
            },
        };
        if let Some(redacted) = redacted {
            *value =
                HeaderValue::from_maybe_shared(Bytes::from(redacted)).unwrap_or(HeaderValue::from_static(""));
        }
    }
}

/// Keeps requests to send them again, and hands them on as what tonic's channels take.
#[derive(Clone, Copy, Debug)]
struct ReplayRequests(Option<BufferBody>);

impl Replay<Body> for ReplayRequests {
    type Body = Body;
    type Captured = KeptRequest;

    fn capture(&self, body: Body) -> (Body, Option<KeptRequest>) {
        let Some(buffer) = self.0 else { return (body, None) };
        match buffer.capture(body) {
            (body, None) => (Body::new(body), None),
            (body, Some(kept)) => {
                let loan = Arc::new(Mutex::new(Loan { body: Some(body), waker: None }));
                (Body::new(Lent(Arc::clone(&loan))), Some(KeptRequest { buffer, kept, loan }))
            }
        }
    }

    fn pass_through(&self, body: Body) -> Body {
        body
    }

    fn restore(&self, KeptRequest { buffer, kept, loan }: KeptRequest) -> Option<Body> {
        let Loan { body, waker } = std::mem::take(&mut *lock(&loan));
        // What the connection has not sent is handed over.
        drop(body);
        if let Some(waker) = waker {
            waker.wake();
        }
        buffer.restore(kept).map(Body::new)
    }
}

struct KeptRequest {
    buffer: BufferBody,
    kept: CapturedBody<Body>,
    loan: Arc<Mutex<Loan>>,
}

/// The body of a request, as the connection has it: it can be taken back. A server that refuses a call has ended it,
/// but a stream of requests is let go of only when the connection gets round to it.
struct Lent(Arc<Mutex<Loan>>);

#[derive(Default)]
struct Loan {
    body: Option<ReplayBody<Body>>,
    /// Of the connection.
    waker: Option<Waker>,
}

impl http_body::Body for Lent {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let mut loan = lock(&self.0);
        let Some(body) = &mut loan.body else {
            return Poll::Ready(Some(Err(Status::cancelled("the call was refused, and is made again"))));
        };
        let polled = Pin::new(body).poll_frame(cx);
        loan.waker = polled.is_pending().then(|| cx.waker().clone());
        polled
    }

    fn is_end_stream(&self) -> bool {
        lock(&self.0).body.as_ref().is_some_and(http_body::Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        lock(&self.0).body.as_ref().map_or_else(SizeHint::new, http_body::Body::size_hint)
    }
}

fn lock(loan: &Mutex<Loan>) -> MutexGuard<'_, Loan> {
    loan.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Says in HTTP's words what gRPC says in headers, so that the layers outside know a refusal.
#[derive(Clone, Debug)]
struct HttpStatus<S>(S);

impl<S, B> Service<Request<Body>> for HttpStatus<S>
where
    S: Service<Request<Body>, Response = Response<B>>,
    S::Error: Into<BoxError>,
{
    type Response = Response<B>;
    type Error = Status;
    type Future = HttpStatusFuture<S::Future>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Status>> {
        self.0.poll_ready(cx).map_err(|error| Status::from_error(error.into()))
    }

    #[inline]
    fn call(&mut self, request: Request<Body>) -> Self::Future {
        HttpStatusFuture { response: self.0.call(request) }
    }
}

pin_project! {
    struct HttpStatusFuture<F> {
        #[pin]
        response: F,
    }
}

impl<F, B, E> Future for HttpStatusFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
    E: Into<BoxError>,
{
    type Output = Result<Response<B>, Status>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut response =
            ready!(self.project().response.poll(cx)).map_err(|error| Status::from_error(error.into()))?;
        if let Some(status) = refusal(response.headers()) {
            *response.status_mut() = status;
        } else if response.status() == StatusCode::OK && !response.headers().contains_key(GRPC_STATUS) {
            response.extensions_mut().insert(Undecided);
        }
        Poll::Ready(Ok(response))
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;
    use proptest::prelude::*;
    use tokio::sync::mpsc;
    use tokio_test::{assert_pending, assert_ready, task};
    use tonic::metadata::MetadataValue;

    use super::*;
    use crate::ApiKey;

    fn said(pairs: &[(HeaderName, &[u8])]) -> Status {
        let headers: HeaderMap = pairs
            .iter()
            .filter_map(|(name, value)| Some((name.clone(), HeaderValue::from_bytes(value).ok()?)))
            .collect();
        let status = refusal(&headers).unwrap_or(StatusCode::UNAUTHORIZED);
        let sent = Credentials::bearer(ApiKey::new("opaque+1").unwrap());
        let error = AuthError::read(status, &headers, b"", Some(&sent), None);
        refused(error, headers, Some(&sent))
    }

    #[test]
    fn j8_what_the_server_said_is_taken_out_of_its_headers() {
        let status = said(&[
            (GRPC_STATUS, b"7"),
            (GRPC_MESSAGE, b"not%20for opaque+1 %E2%9C%93"),
            (GRPC_STATUS_DETAILS, b"CghvcGFxdWUrMQ=="),
            (HeaderName::from_static("x-bin"), b"b3BhcXVlKzE"),
            (HeaderName::from_static("x-text"), b"key opaque+1"),
        ]);
        assert_eq!(status.code(), Code::PermissionDenied);
        assert_eq!(status.message(), "not for [redacted] ✓");
        assert_eq!(status.details(), b"\x0a\x08********");
        assert_eq!(status.metadata().get_bin("x-bin").unwrap(), MetadataValue::from_bytes(b"********"));
        assert_eq!(status.metadata().get("x-text").unwrap(), "key [redacted]");
        assert_eq!(status.metadata().len(), 2);
        assert_eq!(AuthError::find(&status).unwrap().message(), Some(status.message()));
    }

    #[test]
    fn e2_what_cannot_be_decoded_does_not_hide_the_refusal() {
        // `Status::from_header_map` panics on the one and says `Unknown` for the other.
        let status =
            said(&[(GRPC_STATUS, b"16"), (GRPC_STATUS_DETAILS, b"no base64"), (GRPC_MESSAGE, b"%ff%4")]);
        assert_eq!((status.code(), status.details()), (Code::Unauthenticated, &b""[..]));
        assert_eq!(status.message(), "\u{fffd}%4");
    }

    #[test]
    fn j7_a_stream_is_taken_back_from_a_connection_that_would_wait_for_its_end() {
        let (send, frames) = mpsc::unbounded_channel();
        let replay = ReplayRequests(Some(BufferBody::new(64)));
        let (mut lent, kept) = replay.capture(Body::new(Fed(frames)));
        let mut polled = task::spawn(lent.frame());
        assert_pending!(polled.poll());
        send.send(Bytes::from_static(b"first")).unwrap();
        assert_eq!(assert_ready!(polled.poll()).unwrap().unwrap().into_data().unwrap(), "first");
        drop(polled);
        let mut polled = task::spawn(lent.frame());
        assert_pending!(polled.poll());

        let mut again = replay.restore(kept.unwrap()).unwrap();
        assert!(polled.is_woken());
        // An error resets the stream: it did not end.
        assert_eq!(assert_ready!(polled.poll()).unwrap().unwrap_err().code(), Code::Cancelled);
        send.send(Bytes::from_static(b"second")).unwrap();
        drop(send);
        for expected in ["first", "second"] {
            let frame = assert_ready!(task::spawn(again.frame()).poll());
            assert_eq!(frame.unwrap().unwrap().into_data().unwrap(), expected);
        }
        assert!(assert_ready!(task::spawn(again.frame()).poll()).is_none());
    }

    struct Fed(mpsc::UnboundedReceiver<Bytes>);

    impl http_body::Body for Fed {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            self.0.poll_recv(cx).map(|data| data.map(|data| Ok(Frame::data(data))))
        }
    }

    proptest! {
        #[test]
        fn e2_no_header_makes_it_panic(
            code in "16|7", message in "\\PC{0,20}|(%[0-9a-f]{0,2}){0,9}", details in "[A-Za-z0-9+/=,]{0,20}"
        ) {
            let other = HeaderName::from_static("other-bin");
            let [code, message, details] = [&code, &message, &details].map(String::as_bytes);
            let status = said(&[
                (GRPC_STATUS, code), (GRPC_MESSAGE, message), (GRPC_STATUS_DETAILS, details), (other, details)
            ]);
            prop_assert!(AuthError::find(&status).is_some());
        }
    }
}
