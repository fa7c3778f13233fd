//! Authenticates gRPC clients of [tonic](https://docs.rs/tonic): [`SelamGrpcLayer`], around a `Channel`.
//!
//! ```text
//! GreeterClient ─▶ SelamGrpc ─────────▶ Refresh ─────────▶ Authorize ─▶ Channel
//!                  turns auth errors     16 or 401: refresh, writes key,
//!                  into a `Status` with  replay once         or JWT and key
//!                  its `AuthError`
//! ```
//!
//! A tonic interceptor cannot do this: interceptors are synchronous, and a refresh must be awaited.
//!
//! ```no_run
//! use tonic::body::Body;
//! use tower::Layer;
//! use tower_selam::{SelamLayer, adapter::tonic::SelamGrpcLayer};
//! # type Channel = tower::util::BoxCloneService<http::Request<Body>, http::Response<Body>, tonic::Status>;
//! # struct Endpoint(http::Uri);
//! # impl Endpoint {
//! #     fn from_shared(uri: String) -> Result<Self, http::uri::InvalidUri> { Ok(Self(uri.parse()?)) }
//! #     fn uri(&self) -> &http::Uri { &self.0 }
//! #     fn connect_lazy(&self) -> Channel { unimplemented!() }
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
//! A rejected credential is refreshed as over plain HTTP:
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
//!         "/selam.Greeter/Delete" => Status::permission_denied("greetings are permanent").into_http(),
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
//! // Like a generated client, use a URI that is only a path.
//! let greet = Request::post("/selam.Greeter/Greet").body(Body::empty())?;
//! service.clone().oneshot(greet).await?;
//!
//! let delete = Request::post("/selam.Greeter/Delete").body(Body::empty())?;
//! let status = service.oneshot(delete).await.unwrap_err();
//! assert_eq!((status.code(), status.message()), (Code::PermissionDenied, "greetings are permanent"));
//! assert_eq!(AuthError::find(&status).unwrap().kind(), AuthErrorKind::Forbidden);
//! # Ok::<(), BoxError>(())
//! # }).unwrap();
//! ```
//!
//! # The origin
//!
//! tonic's clients build requests whose URI is only a path; the channel adds the origin further down the stack. So
//! [`SelamGrpcLayer::new`] takes the URI that the channel connects to. It fails if credentials may not be sent there,
//! for example over plain `http` that was not [allowed for loopback](crate::BaseUrl::allow_insecure_loopback).
//!
//! The URI must be the real target: the `uri()` of the `Endpoint`, not the name given to `Endpoint::origin`. If a channel
//! balances between several endpoints, every one of them must be allowed to receive the credentials.
//!
//! # Handling of a status
//!
//! | The server sent | in | Effect |
//! |---|---|---|
//! | `grpc-status` 16, or HTTP 401 | headers | the credential is refreshed and the request replayed once, [as after any 401](crate::replay) |
//! | `grpc-status` 16 | trailers | the credential is refreshed for the next call; the status is returned to the caller |
//! | `grpc-status` 16 with a message that says that a permission or scope is missing ([`AuthErrorKind`]) | either | the status is returned to the caller |
//! | `grpc-status` 7, or HTTP 403 | either | the status is returned to the caller |
//! | anything else | either | passes through unchanged |
//!
//! Servers that check credentials before they respond send 16 in headers, because no stream has begun. When 16 arrives
//! in trailers, the caller already has the response metadata and possibly messages. Holding the response back until the
//! first message or the trailers would allow a replay, but it would hang every call that waits for the response before
//! sending its own first message.
//!
//! # Errors
//!
//! The service's error is [`Status`], which a generated client returns unchanged. A status that concerns credentials has
//! the [`AuthError`] as its source; [`AuthError::find`] finds it:
//!
//! | Cause | Code |
//! |---|---|
//! | the server sent 16, or HTTP 401 | `Unauthenticated`, with the server's message, details and metadata |
//! | the server sent 7, or HTTP 403 | `PermissionDenied`, with the server's message, details and metadata |
//! | no credential is available, or it cannot be sent or refreshed, temporarily or permanently | `Unauthenticated` |
//! | the origin is not allowed | `PermissionDenied` |
//!
//! A temporary refresh failure is also `Unauthenticated`, as in grpc-go: the called service is not `Unavailable`, and
//! failure counters for that service should not count it. [`is_permanent`](AuthError::is_permanent) and
//! [`retry_after`](AuthError::retry_after) say whether and when to retry.
//!
//! An error of the channel becomes the status that tonic would build from it, with the error as its source. If a server
//! echoes credentials when it refuses a call, they are masked in the status.
//!
//! # Bodies
//!
//! While a request is sent, up to [`REPLAY_LIMIT`](SelamGrpcLayer::REPLAY_LIMIT) bytes of it are kept, so that it can be
//! replayed byte for byte. This covers request streams: a replay first sends the bytes sent before the rejection, then
//! the rest. If more than the limit was sent, the status is returned to the caller and the next call uses the new
//! credential. The copy is dropped once the response begins.
//!
//! # A user per call
//!
//! With one JWT for each of many users ([`PerSubject`](crate::PerSubject)), a call names its user by a [`Subject`] in its
//! extensions; a [`RequestAuth`](crate::RequestAuth) there overrides its credentials. There are three ways to put it there:
//!
//! | For | Use |
//! |---|---|
//! | one call | `request.extensions_mut().insert(Subject::new("user-7"))` on the `tonic::Request` |
//! | all calls of a client | `GreeterClient::new(selam.for_subject(&Subject::new("user-7")))`: [`SelamGrpc::for_subject`] |
//! | calls whose user an interceptor knows | `GreeterClient::with_interceptor(selam, interceptor)`, which inserts it in the same way |
//!
//! A handle costs little and shares the channel. The call's own extension takes precedence over that of `for_subject`. An
//! interceptor runs after the call is built, so what it inserts replaces the call's. None affects other calls.
//!
//! # Order
//!
//! Place the layer directly around the channel, and interceptors around the layer. What they write into `authorization`
//! or `x-api-key` is replaced; an interceptor inside, next to the channel, would replace ours. A deadline set on a request applies to each send separately; for one
//! deadline over everything, put `tower::timeout` or tokio's around the layer.

use std::{
    borrow::Cow,
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
use tower::{Layer, Service};

use crate::{
    AuthError, AuthErrorKind, BoxError, CloneClient, ConfigError, RefreshLayer, SelamLayer, Subject,
    WithExtension,
    auth_error::{BodyLimits, InspectedBody, Inspection},
    authorize::{Authorize, Policy, Sent, Settings, Undecided},
    error::{Redactor, grpc_message, is_auth_status},
    replay::{Blame, BufferBody, CapturedBody, Refresh, Replay, ReplayBody},
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
    limits: BodyLimits,
    replay: ReplayRequests,
}

impl SelamGrpcLayer {
    /// How much of a request is kept by default: 4 MiB, the largest message that tonic's servers accept by default.
    pub const REPLAY_LIMIT: usize = 4 * 1024 * 1024;

    /// Builds the stack of `selam` for a channel to `origin`: the `uri()` of the `Endpoint`.
    ///
    /// # Errors
    ///
    /// When `origin` has no scheme and host, or `selam` may not send credentials there.
    pub fn new(selam: SelamLayer, origin: &Uri) -> Result<Self, ConfigError> {
        let SelamLayer { policy, errors, .. } = selam;
        let origin = match (origin.scheme_str(), origin.authority()) {
            (Some(scheme), Some(authority)) => format!("{scheme}://{authority}"),
            _ => origin.to_string(),
        };
        let origins = policy.settings.origins.clone().with_relative_uri_origin(&origin)?;
        let settings = Settings { origins, ..policy.settings.clone() };
        let policy = Policy { owner: policy.owner, provider: Arc::clone(&policy.provider), settings };
        let replay = ReplayRequests(Some(BufferBody::new(Self::REPLAY_LIMIT)));
        Ok(Self { policy: Arc::new(policy), limits: errors.limits(), replay })
    }

    /// Keeps up to `bytes` of each request, to replay it if needed.
    #[must_use]
    pub fn with_replay_limit(mut self, bytes: usize) -> Self {
        self.replay = ReplayRequests(Some(BufferBody::new(bytes)));
        self
    }

    /// Replays nothing: a rejection refreshes the credential for the next request.
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
        let refresh = RefreshLayer::with_replay(self.replay).disabled_if(!self.policy.provider.refreshes());
        SelamGrpc { inner: refresh.layer(authorize), limits: self.limits }
    }
}

/// Sends authenticated gRPC requests. Made by [`SelamGrpcLayer`]; see the [module docs](self).
#[derive(Clone, Debug)]
pub struct SelamGrpc<S> {
    inner: Inner<S>,
    limits: BodyLimits,
}

type Inner<S> = Refresh<Authorize<HttpStatus<S>>, ReplayRequests>;

impl<S> SelamGrpc<S> {
    /// Returns a handle whose calls are made for `subject`: see [the module docs](self#a-user-per-call). It shares the
    /// channel and everything else with this service. A call that names its own subject keeps it.
    #[must_use]
    pub fn for_subject(&self, subject: &Subject) -> WithExtension<Self>
    where
        S: Clone,
    {
        WithExtension::new(self.clone(), subject.clone())
    }

    /// Returns a reference to the inner channel.
    pub fn get_ref(&self) -> &S {
        &self.inner.get_ref().get_ref().0
    }

    /// Returns a mutable reference to the inner channel.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.inner.get_mut().get_mut().0
    }

    /// Returns the inner channel without the layers.
    pub fn into_inner(self) -> S {
        self.inner.into_inner().into_inner().0
    }
}

impl<S, B> Service<Request<Body>> for SelamGrpc<S>
where
    S: Service<Request<Body>, Response = Response<B>> + CloneClient,
    S::Error: Into<BoxError>,
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    type Response = Response<ResponseBody<InspectedBody<B>>>;
    type Error = Status;
    type Future = ResponseFuture<S, B>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Status>> {
        self.inner.poll_ready(cx)
    }

    #[inline]
    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let state = State::Response { response: self.inner.call(request) };
        ResponseFuture { state, limits: self.limits }
    }
}

pin_project! {
    /// Response future of [`SelamGrpc`].
    ///
    /// # Cancel safety
    ///
    /// Dropping it drops the request, or the response whose body it reads. A refresh that it waits for continues.
    pub struct ResponseFuture<S, B>
    where
        S: Service<Request<Body>, Response = Response<B>>,
        S: CloneClient,
        S::Error: Into<BoxError>,
        B: http_body::Body,
    {
        #[pin]
        state: State<<Inner<S> as Service<Request<Body>>>::Future, InspectedBody<B>>,
        limits: BodyLimits,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<F, B>
    where
        B: http_body::Body,
    {
        Response { #[pin] response: F },
        // The body of a 401 or 403 is being read.
        Inspecting { inspection: Option<Box<Inspection<B>>> },
    }
}

impl<S, B> Future for ResponseFuture<S, B>
where
    S: Service<Request<Body>, Response = Response<B>> + CloneClient,
    S::Error: Into<BoxError>,
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    type Output = Result<Response<ResponseBody<InspectedBody<B>>>, Status>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        loop {
            match this.state.as_mut().project() {
                StateProj::Response { response } => {
                    let response = ready!(response.poll(cx))?;
                    if !is_auth_status(response.status()) {
                        let (mut parts, body) = response.into_parts();
                        parts.extensions.remove::<Undecided>();
                        let sent = parts.extensions.remove::<Sent>();
                        return Poll::Ready(Ok(Response::from_parts(parts, ResponseBody { body, sent })));
                    }
                    let inspection = Some(Inspection::new(response, *this.limits));
                    this.state.set(State::Inspecting { inspection });
                }
                StateProj::Inspecting { inspection: slot } => {
                    let Some(inspection) = slot else { return Poll::Pending };
                    ready!(inspection.poll(cx));
                    let Some(inspection) = slot.take() else { return Poll::Pending };
                    return Poll::Ready(Err(rejected_in_head(*inspection)));
                }
            }
        }
    }
}

opaque_debug!(ResponseFuture<S, B> where
    S: Service<Request<Body>, Response = Response<B>> + CloneClient,
    S::Error: Into<BoxError>,
    B: http_body::Body,
);

pin_project! {
    /// The body of a response. Its frames pass unchanged, unless the trailers say that the credentials were rejected.
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
                Ok(trailers) => match auth_status(&trailers) {
                    Some(status) => Err(rejected_in_trailers(status, trailers, this.sent.take())),
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

opaque_debug!(ResponseBody<B>);

/// Required by `with_interceptor` of generated clients.
impl<B: Default> Default for ResponseBody<B> {
    fn default() -> Self {
        Self { body: B::default(), sent: None }
    }
}

/// Gives `Unauthenticated` or `PermissionDenied`, never `Unknown`, with the error as the source.
///
/// See [which error has which code](self#errors).
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

/// The HTTP status that `grpc-status` 16 and 7 correspond to.
fn auth_status(headers: &HeaderMap) -> Option<StatusCode> {
    match Code::from_bytes(headers.get(GRPC_STATUS)?.as_bytes()) {
        Code::Unauthenticated => Some(StatusCode::UNAUTHORIZED),
        Code::PermissionDenied => Some(StatusCode::FORBIDDEN),
        _ => None,
    }
}

#[cold]
fn rejected_in_head<B>(inspection: Inspection<B>) -> Status
where
    B: http_body::Body<Error: Into<BoxError>>,
{
    let sent = inspection.sent().cloned().unwrap_or_default();
    let headers = inspection.headers().clone();
    let error = inspection.into_error();
    event::request_rejected(&error, sent.ids());
    rejected(error, headers, &sent)
}

#[cold]
fn rejected_in_trailers(status: StatusCode, trailers: HeaderMap, sent: Option<Sent>) -> Status {
    let sent = sent.unwrap_or_default();
    let error = AuthError::read(status, &trailers, b"", sent.exposed(), None);
    if status == StatusCode::UNAUTHORIZED
        && let Some(blame) = Blame::assign(&sent, error.kind())
    {
        // Refreshes for the next call, which nobody waits for here.
        let _ = blame.reject();
    }
    event::request_rejected(&error, sent.ids());
    rejected(error, trailers, &sent)
}

/// The server's status, without the credentials that it may echo.
#[cold]
fn rejected(error: AuthError, mut headers: HeaderMap, sent: &Sent) -> Status {
    let redactor = Redactor::masking(sent.exposed());
    let message = match grpc_message(&headers) {
        Some(message) => redactor.text(message),
        // A server that sent a status but no message meant that; a proxy's answer is explained.
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

/// Keeps requests for the replay, and passes them on in the body type that tonic's channels take.
#[derive(Clone, Copy, Debug)]
struct ReplayRequests(Option<BufferBody>);

impl Replay<Body> for ReplayRequests {
    type Body = Body;
    type Captured = CapturedRequest;

    fn capture(&self, body: Body) -> (Body, Option<CapturedRequest>) {
        let Some(buffer) = self.0 else { return (body, None) };
        match buffer.capture(body) {
            (body, None) => (Body::new(body), None),
            (body, Some(kept)) => {
                let loan = Arc::new(Mutex::new(Loan { body: Some(body), waker: None }));
                (Body::new(Lent(Arc::clone(&loan))), Some(CapturedRequest { buffer, kept, loan }))
            }
        }
    }

    fn pass_through(&self, body: Body) -> Body {
        body
    }

    fn restore(&self, CapturedRequest { buffer, kept, loan }: CapturedRequest) -> Option<Body> {
        let Loan { body, waker } = std::mem::take(&mut *lock(&loan));
        // This hands over what the connection has not sent.
        drop(body);
        if let Some(waker) = waker {
            waker.wake();
        }
        buffer.restore(kept).map(Body::new)
    }
}

struct CapturedRequest {
    buffer: BufferBody,
    kept: CapturedBody<Body>,
    loan: Arc<Mutex<Loan>>,
}

/// A request body that can be taken back from the connection. A server that rejects a call has ended it, but the connection
/// drops a stream of requests only when it polls it again.
struct Lent(Arc<Mutex<Loan>>);

#[derive(Default)]
struct Loan {
    body: Option<ReplayBody<Body>>,
    /// Wakes the connection.
    waker: Option<Waker>,
}

impl http_body::Body for Lent {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let mut loan = lock(&self.0);
        let Some(body) = &mut loan.body else {
            return Poll::Ready(Some(Err(Status::cancelled("the call was rejected and is being replayed"))));
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

/// Translates `grpc-status` in headers into the HTTP status, for the outer layers.
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
        if let Some(status) = auth_status(response.headers()) {
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
    use crate::{ApiKey, Credentials};

    fn status(pairs: &[(HeaderName, &[u8])]) -> Status {
        let headers: HeaderMap = pairs
            .iter()
            .filter_map(|(name, value)| Some((name.clone(), HeaderValue::from_bytes(value).ok()?)))
            .collect();
        let status = auth_status(&headers).unwrap_or(StatusCode::UNAUTHORIZED);
        let sent = Sent::from(&Credentials::bearer(ApiKey::new("opaque+1").unwrap()));
        let error = AuthError::read(status, &headers, b"", sent.exposed(), None);
        rejected(error, headers, &sent)
    }

    /// J8, S2
    #[test]
    fn secrets_are_masked_in_the_status() {
        let status = status(&[
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

    /// E2
    #[test]
    fn undecodable_headers_do_not_hide_the_rejection() {
        // `Status::from_header_map` panics on the one and says `Unknown` for the other.
        let status =
            status(&[(GRPC_STATUS, b"16"), (GRPC_STATUS_DETAILS, b"no base64"), (GRPC_MESSAGE, b"%ff%4")]);
        assert_eq!((status.code(), status.details()), (Code::Unauthenticated, &b""[..]));
        assert_eq!(status.message(), "\u{fffd}%4");
    }

    /// J11: a missing permission, in headers or trailers, discards nothing and is not replayed.
    #[tokio::test]
    async fn missing_permissions_keep_the_credential() {
        use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

        use crate::{
            Refreshing, Token,
            source::{Reason, source_fn},
        };

        for message in
            ["insufficient_scope", "missing scope: greetings.write", "You have insufficient permissions"]
        {
            for in_trailers in [false, true] {
                let fetches = Arc::new(AtomicUsize::new(0));
                let counter = Arc::clone(&fetches);
                let jwts = Refreshing::new(source_fn(move |_: Reason<Token>| {
                    let number = counter.fetch_add(1, SeqCst);
                    async move { Ok::<_, BoxError>(Token::new(format!("token-{number}"))?) }
                }));
                let sends = Arc::new(AtomicUsize::new(0));
                let counter = Arc::clone(&sends);
                let channel = tower::service_fn(move |_: Request<Body>| {
                    counter.fetch_add(1, SeqCst);
                    let response = Status::unauthenticated(message).into_http::<Body>();
                    std::future::ready(Ok::<_, Status>(match in_trailers {
                        false => response,
                        true => {
                            let trailers = response.headers().clone();
                            let body = http_body_util::Empty::<Bytes>::new();
                            Response::new(Body::new(body.with_trailers(async { Some(Ok(trailers)) })))
                        }
                    }))
                });
                let key = ApiKey::new("sk-selam-example").unwrap();
                let selam = SelamLayer::builder().with_api_key(key).with_jwt(&jwts).build().unwrap();
                let origin = Uri::from_static("https://api.selamgpt.com");
                let service = SelamGrpcLayer::new(selam, &origin).unwrap().layer(channel);
                for call in 1..=2 {
                    let request = Request::post("/selam.Greeter/Greet").body(Body::empty()).unwrap();
                    let status = match tower::ServiceExt::oneshot(service.clone(), request).await {
                        Ok(response) => response.into_body().collect().await.unwrap_err(),
                        Err(status) => status,
                    };
                    assert_eq!((status.code(), status.message()), (Code::Unauthenticated, message));
                    let error = AuthError::find(&status).unwrap();
                    assert_eq!(error.kind(), AuthErrorKind::InsufficientPermissions);
                    assert_eq!((sends.load(SeqCst), fetches.load(SeqCst)), (call, 1), "{message}");
                }
            }
        }
    }

    /// J7
    #[test]
    fn a_stream_is_taken_back_from_the_connection() {
        let (send, frames) = mpsc::unbounded_channel();
        let replay = ReplayRequests(Some(BufferBody::new(64)));
        let (mut lent, kept) = replay.capture(Body::new(ChannelBody(frames)));
        let mut polled = task::spawn(lent.frame());
        assert_pending!(polled.poll());
        send.send(Bytes::from_static(b"first")).unwrap();
        assert_eq!(assert_ready!(polled.poll()).unwrap().unwrap().into_data().unwrap(), "first");
        drop(polled);
        let mut polled = task::spawn(lent.frame());
        assert_pending!(polled.poll());

        let mut restored = replay.restore(kept.unwrap()).unwrap();
        assert!(polled.is_woken());
        // An error resets the stream.
        assert_eq!(assert_ready!(polled.poll()).unwrap().unwrap_err().code(), Code::Cancelled);
        send.send(Bytes::from_static(b"second")).unwrap();
        drop(send);
        for expected in ["first", "second"] {
            let frame = assert_ready!(task::spawn(restored.frame()).poll());
            assert_eq!(frame.unwrap().unwrap().into_data().unwrap(), expected);
        }
        assert!(assert_ready!(task::spawn(restored.frame()).poll()).is_none());
    }

    struct ChannelBody(mpsc::UnboundedReceiver<Bytes>);

    impl http_body::Body for ChannelBody {
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
        /// E2
        #[test]
        fn no_header_causes_a_panic(
            code in "16|7", message in "\\PC{0,20}|(%[0-9a-f]{0,2}){0,9}", details in "[A-Za-z0-9+/=,]{0,20}"
        ) {
            let other = HeaderName::from_static("other-bin");
            let [code, message, details] = [&code, &message, &details].map(String::as_bytes);
            let status = status(&[
                (GRPC_STATUS, code), (GRPC_MESSAGE, message), (GRPC_STATUS_DETAILS, details), (other, details)
            ]);
            prop_assert!(AuthError::find(&status).is_some());
        }
    }
}
