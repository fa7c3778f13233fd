//! reqwest under the layers, and its requests and responses over them: feature `reqwest`.
//!
//! ```text
//!  reqwest::Request ─▶ Client ─────────▶ SelamLayer, or ───▶ HttpService ────▶ reqwest::Client
//!                      http's types,     any other layers    reqwest's types,
//!  reqwest::Response ◀ and back                              and back
//! ```
//!
//! [`Client`] is all that most programs need: [`SelamLayer`] over a `reqwest::ClientBuilder`. Requests are built
//! with reqwest and given to [`Client::execute`]; what comes back is a `reqwest::Response`, or an
//! [`Error`] that is either an [`AuthError`](crate::AuthError) or a `reqwest::Error`.
//!
//! ```
//! use tower_selam::{ApiKey, AuthErrorKind, Error, SelamLayer, adapter::reqwest::Client};
//! # use tower_selam::{BaseUrl, simulator::{Server, Simulator}};
//!
//! # let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
//! # runtime.block_on(async {
//! # let _ = tokio_rustls::rustls::crypto::ring::default_provider().install_default();
//! # let simulator = Simulator::new();
//! # let server = Server::http(&simulator).await?;
//! # let base_url = BaseUrl::allow_insecure_loopback(server.base_url())?;
//! # let key = ApiKey::new(simulator.issue_key())?;
//! let layer = SelamLayer::builder().with_api_key(key).with_base_url(base_url).build()?;
//! let chat = layer.base_url().endpoint("chat/completions")?.to_string();
//! let selam = Client::new(layer, reqwest::Client::builder())?;
//!
//! let question = r#"{"messages":[{"role":"user","content":"Selam!"}]}"#;
//! // Or `json`, with that feature of reqwest.
//! let request = selam.reqwest().post(&chat).body(question);
//! let response = selam.execute(request).await?;
//! assert!(response.text().await?.contains("You said: Selam!"));
//!
//! let elsewhere = selam.reqwest().post("https://evil.example/v1/chat/completions").body(question);
//! match selam.execute(elsewhere).await {
//!     Err(Error::Auth(error)) => assert_eq!(error.kind(), AuthErrorKind::OriginNotAllowed),
//!     other => panic!("{other:?}"),
//! }
//! # Ok::<(), tower_selam::BoxError>(())
//! # }).unwrap();
//! ```
//!
//! A request that is sent by reqwest's own `send` goes past the layers, and is refused by the API.
//!
//! # A request's own choice
//!
//! [`Client::with_extension`] makes a client for requests that want other credentials, or name their user. It is
//! cheap, and shares all else with the one that it was cloned from:
//!
//! ```
//! # use tower_selam::{RequestAuth, Subject, adapter::reqwest::Client};
//! # fn choose(selam: &Client) {
//! let for_user = selam.clone().with_extension(Subject::new("user-7"));
//! let with_key_alone = selam.clone().with_extension(RequestAuth::ApiKey);
//! # let _ = (for_user, with_key_alone);
//! # }
//! ```
//!
//! A `reqwest::Request` that was made of an `http::Request` keeps its extensions, which count more. Through
//! [`execute`](Client::execute), so does an `http::Request` itself.
//!
//! # Redirects
//!
//! Left to itself, reqwest follows redirects anywhere. It takes `Authorization` off on the way to another origin, but
//! not `X-API-Key`, and says in `Referer` where it comes from, the query with it. The layers do not see that: it
//! happens further in.
//!
//! So [`Client::new`] and [`HttpService::new`] take a `ClientBuilder`, and set [`redirect_policy`] in place of whatever
//! policy it has: redirects within an origin are followed, and the others come up as the responses they are, with
//! their 3xx status. To follow those too, put tower-http's `FollowRedirect` around the layers, with
//! [`Origins::strip_for_other_origins`](crate::Origins::strip_for_other_origins): then each has what the layers let it have.
//!
//! A `reqwest::Client` that is already built does not tell its policy. [`HttpService::dangerous_with_client`] takes it
//! on your word.
//!
//! # What else to know
//!
//! - A body is sent again after a 401 if reqwest can clone it: one of bytes, a string or JSON can be, a stream
//!   cannot, and its 401 is the answer. [`SelamLayer::buffered`] keeps streams as well, with
//!   [`Client::with_layers`].
//! - A timeout, the client's or a request's, counts for each send, and not while a renewal is waited for. For one
//!   over all of it, put tower's `timeout` around the layers.
//! - Headers given to `ClientBuilder::default_headers` are added further in than the layers, to every request that has
//!   none of that name. Keep `Authorization` and `X-API-Key` out of them.
//! - `ClientBuilder::connection_verbose` has reqwest log what it sends, credentials and all.
//! - An error's URL is shown without its query, and so is that of the response to a voice agent's handshake: the
//!   credentials are in it.
//! - [`HttpService`] is a client for token endpoints as well. They should not redirect it, so give it one with
//!   `Policy::none`, by [`HttpService::dangerous_with_client`].

use std::{
    fmt, mem,
    pin::Pin,
    task::{Context, Poll, ready},
};

use ::reqwest::{Body, ClientBuilder, RequestBuilder, ResponseBuilderExt, Url, redirect};
use bytes::Bytes;
use http::{Extensions, Method, Request, Response};
use pin_project_lite::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use crate::{
    BoxError, Error, RequestAuth, Selam, SelamLayer,
    replay::{Replay, ReplayBody},
};

/// Sends reqwest's requests through layers. See the [module docs](self).
///
/// Cheap to clone. It is a `tower::Service` of `reqwest::Request`, too.
#[derive(Clone)]
pub struct Client<S = Selam<HttpService, TryCloneBody>> {
    inner: S,
    reqwest: ::reqwest::Client,
    extensions: Extensions,
}

impl Client {
    /// `layer` over a client of `builder`, with [`redirect_policy`].
    ///
    /// # Errors
    ///
    /// When reqwest cannot build the client.
    pub fn new(layer: SelamLayer, builder: ClientBuilder) -> Result<Self, ::reqwest::Error> {
        Ok(Self::with_layers(&layer.with_replay(TryCloneBody), HttpService::new(builder)?))
    }
}

impl<S> Client<S> {
    /// Any `layers` over `http`: `Layer`s are values of `tower::ServiceBuilder` as well.
    ///
    /// [`SelamLayer`] and [`RefreshLayer`](crate::RefreshLayer) send again by [`TryCloneBody`], since reqwest's body is
    /// no `Clone`.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tower::ServiceBuilder;
    /// use tower_selam::{Error, SelamLayer, adapter::reqwest::{Client, HttpService, TryCloneBody}};
    ///
    /// # fn layered(layer: SelamLayer) -> Result<(), reqwest::Error> {
    /// let layers = ServiceBuilder::new()
    ///     .timeout(Duration::from_secs(60))
    ///     .map_err(Error::into_boxed)
    ///     .layer(layer.with_replay(TryCloneBody));
    /// let selam = Client::with_layers(&layers, HttpService::new(reqwest::Client::builder())?);
    /// # drop(selam.execute(selam.reqwest().get("https://api.selamgpt.com/v1/models")));
    /// # Ok(())
    /// # }
    /// ```
    pub fn with_layers<L>(layers: &L, http: HttpService) -> Self
    where
        L: Layer<HttpService, Service = S>,
    {
        let reqwest = http.0.clone();
        Self { inner: layers.layer(http), reqwest, extensions: Extensions::new() }
    }

    /// Gives every request this extension, unless it has one of that type: a [`RequestAuth`], a
    /// [`Subject`](crate::Subject), or what another of the layers reads.
    #[must_use]
    pub fn with_extension<T: Clone + Send + Sync + 'static>(mut self, extension: T) -> Self {
        self.extensions.insert(extension);
        self
    }

    /// The client furthest in, to build requests with. What it sends by itself has no credentials.
    pub fn reqwest(&self) -> &::reqwest::Client {
        &self.reqwest
    }

    inner_accessors!();

    /// Sends `request` through the layers: a `reqwest::RequestBuilder`, a `reqwest::Request` or an `http::Request`.
    pub fn execute<R>(&self, request: R) -> Execute<S>
    where
        R: IntoRequest,
        S: Service<Request<Body>> + Clone,
    {
        Execute { state: Execution::Readiness { call: Some((self.clone(), request.into_request())) } }
    }

    fn call_now(&mut self, request: Result<::reqwest::Request, ::reqwest::Error>) -> ResponseFuture<S::Future>
    where
        S: Service<Request<Body>>,
    {
        let state = match request.and_then(Request::<Body>::try_from) {
            Ok(mut request) => {
                if !self.extensions.is_empty() {
                    let own = mem::replace(request.extensions_mut(), self.extensions.clone());
                    request.extensions_mut().extend(own);
                }
                Sending::Sent { response: self.inner.call(request) }
            }
            Err(error) => Sending::Refused { error: Some(scrubbed(error)) },
        };
        ResponseFuture { state }
    }
}

impl<S, B> Service<::reqwest::Request> for Client<S>
where
    S: Service<Request<Body>, Response = Response<B>>,
    S::Error: From<::reqwest::Error>,
    B: http_body::Body<Data: Into<Bytes>, Error: Into<BoxError>> + Send + Sync + 'static,
{
    type Response = ::reqwest::Response;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: ::reqwest::Request) -> Self::Future {
        self.call_now(Ok(request))
    }
}

impl<S: fmt::Debug> fmt::Debug for Client<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("inner", &self.inner).finish_non_exhaustive()
    }
}

/// What [`Client::execute`] takes. Not to be implemented by others.
pub trait IntoRequest: sealed::Sealed {
    /// As reqwest has it.
    #[doc(hidden)]
    fn into_request(self) -> Result<::reqwest::Request, ::reqwest::Error>;
}

mod sealed {
    #[expect(unnameable_types, reason = "nobody else is to implement it")]
    pub trait Sealed {}

    impl Sealed for ::reqwest::Request {}
    impl Sealed for ::reqwest::RequestBuilder {}
    impl<B> Sealed for http::Request<B> {}
}

impl IntoRequest for ::reqwest::Request {
    fn into_request(self) -> Result<Self, ::reqwest::Error> {
        Ok(self)
    }
}

impl IntoRequest for RequestBuilder {
    fn into_request(self) -> Result<::reqwest::Request, ::reqwest::Error> {
        self.build()
    }
}

impl<B: Into<Body>> IntoRequest for Request<B> {
    fn into_request(self) -> Result<::reqwest::Request, ::reqwest::Error> {
        self.try_into()
    }
}

pin_project! {
    /// Future of [`Client::execute`]. Nothing is sent before it is polled.
    #[must_use = "nothing is sent before it is awaited"]
    pub struct Execute<S>
    where
        S: Service<Request<Body>>,
    {
        #[pin]
        state: Execution<S, S::Future>,
    }
}

pin_project! {
    #[project = ExecutionProj]
    enum Execution<S, F> {
        Readiness { call: Option<(Client<S>, Result<::reqwest::Request, ::reqwest::Error>)> },
        Response { #[pin] response: ResponseFuture<F> },
    }
}

impl<S, B> Future for Execute<S>
where
    S: Service<Request<Body>, Response = Response<B>>,
    S::Error: From<::reqwest::Error>,
    B: http_body::Body<Data: Into<Bytes>, Error: Into<BoxError>> + Send + Sync + 'static,
{
    type Output = Result<::reqwest::Response, S::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.project().state;
        loop {
            match state.as_mut().project() {
                ExecutionProj::Readiness { call: waiting } => {
                    let Some((client, _)) = waiting else { return Poll::Pending };
                    ready!(client.inner.poll_ready(cx))?;
                    let Some((mut client, request)) = waiting.take() else { return Poll::Pending };
                    state.set(Execution::Response { response: client.call_now(request) });
                }
                ExecutionProj::Response { response } => return response.poll(cx),
            }
        }
    }
}

pin_project! {
    /// Response future of [`Client`] as a service.
    pub struct ResponseFuture<F> {
        #[pin]
        state: Sending<F>,
    }
}

pin_project! {
    #[project = SendingProj]
    enum Sending<F> {
        Sent { #[pin] response: F },
        Refused { error: Option<::reqwest::Error> },
    }
}

impl<F, B, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
    E: From<::reqwest::Error>,
    B: http_body::Body<Data: Into<Bytes>, Error: Into<BoxError>> + Send + Sync + 'static,
{
    type Output = Result<::reqwest::Response, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().state.project() {
            SendingProj::Sent { response } => Poll::Ready(ready!(response.poll(cx)).map(from_http)),
            SendingProj::Refused { error } => match error.take() {
                Some(error) => Poll::Ready(Err(error.into())),
                None => Poll::Pending,
            },
        }
    }
}

/// A `reqwest::Client` as a service of the `http` crate's requests and responses: what layers go over.
///
/// The errors' URLs have no query; their kinds and causes are reqwest's own. Any body that reqwest takes will do, also
/// the [`ReplayBody`] of [`SelamLayer::buffered`].
#[derive(Clone)]
pub struct HttpService(::reqwest::Client);

impl HttpService {
    /// A client of `builder`, with [`redirect_policy`] in place of its own.
    ///
    /// # Errors
    ///
    /// When reqwest cannot build it.
    pub fn new(builder: ClientBuilder) -> Result<Self, ::reqwest::Error> {
        builder.redirect(redirect_policy()).build().map(Self)
    }

    /// A client that was built elsewhere, whose policy is not known.
    ///
    /// Unless it is [`redirect_policy`], or `Policy::none`, redirects take `X-API-Key` to other origins; see the
    /// [module docs](self#redirects).
    #[must_use]
    pub fn dangerous_with_client(client: ::reqwest::Client) -> Self {
        Self(client)
    }

    /// The client within.
    pub fn get_ref(&self) -> &::reqwest::Client {
        &self.0
    }
}

/// Follows redirects within one origin, ten at most, so that credentials stay where a layer let them go. Any other
/// redirect is not followed: its response is the answer.
///
/// For clients that are built elsewhere: `builder.redirect(redirect_policy())`.
#[must_use]
pub fn redirect_policy() -> redirect::Policy {
    // Between two origins that may both have the credentials, reqwest would take off one of the two headers.
    let limited = redirect::Policy::default();
    redirect::Policy::custom(move |attempt| match attempt.previous().last() {
        Some(previous) if previous.origin() == attempt.url().origin() => limited.redirect(attempt),
        _ => attempt.stop(),
    })
}

impl<B: Into<Body>> Service<Request<B>> for HttpService {
    type Response = Response<Body>;
    type Error = ::reqwest::Error;
    type Future = HttpFuture;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(cx).map_err(scrubbed)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let shown = Shown::of(&request);
        let state = match request.try_into() {
            Ok(request) => HttpState::Sent { response: self.0.call(request) },
            Err(error) => HttpState::Refused { error: Some(error) },
        };
        HttpFuture { state, shown }
    }
}

impl fmt::Debug for HttpService {
    /// A client shows its default headers, so this shows no client.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpService").finish_non_exhaustive()
    }
}

pin_project! {
    /// Response future of [`HttpService`].
    pub struct HttpFuture {
        #[pin]
        state: HttpState,
        shown: Shown,
    }
}

pin_project! {
    #[project = HttpStateProj]
    enum HttpState {
        Sent { #[pin] response: <::reqwest::Client as Service<::reqwest::Request>>::Future },
        Refused { error: Option<::reqwest::Error> },
    }
}

impl Future for HttpFuture {
    type Output = Result<Response<Body>, ::reqwest::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let result = match this.state.project() {
            HttpStateProj::Sent { response } => ready!(response.poll(cx)),
            HttpStateProj::Refused { error } => match error.take() {
                Some(error) => Err(error),
                None => return Poll::Pending,
            },
        };
        Poll::Ready(match result {
            Ok(response) => Ok(this.shown.to_http(response)),
            Err(error) => Err(scrubbed(error)),
        })
    }
}

impl fmt::Debug for HttpFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpFuture").finish_non_exhaustive()
    }
}

impl<F> fmt::Debug for ResponseFuture<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}

impl<S: Service<Request<Body>>> fmt::Debug for Execute<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Execute").finish_non_exhaustive()
    }
}

/// How much of its URL a response may show.
#[derive(Clone, Copy, Debug)]
pub(super) enum Shown {
    Whole,
    /// The voice agent's handshake has credentials in the query.
    WithoutQuery,
}

impl Shown {
    pub(super) fn of<B>(request: &Request<B>) -> Self {
        match request.extensions().get() {
            Some(RequestAuth::VoiceAgent) => Self::WithoutQuery,
            _ => Self::Whole,
        }
    }

    /// With the URL where [`from_http`] finds it.
    pub(super) fn to_http(self, response: ::reqwest::Response) -> Response<Body> {
        let mut url = response.url().clone();
        if let Self::WithoutQuery = self {
            url.set_query(None);
        }
        let mut response = Response::<Body>::from(response);
        if let Some(extensions) = Response::builder().url(url).extensions_mut() {
            response.extensions_mut().extend(mem::take(extensions));
        }
        response
    }
}

pub(super) fn from_http<B>(response: Response<B>) -> ::reqwest::Response
where
    B: http_body::Body<Data: Into<Bytes>, Error: Into<BoxError>> + Send + Sync + 'static,
{
    response.map(Body::wrap).into()
}

/// `error` without what its URL may hold beside origin and path.
pub(super) fn scrubbed(mut error: ::reqwest::Error) -> ::reqwest::Error {
    if let Some(url) = error.url_mut() {
        url.set_query(None);
        url.set_fragment(None);
        // Those that cannot have user information refuse.
        let _ = url.set_username("");
        let _ = url.set_password(None);
    }
    error
}

/// Sends a body again if reqwest can clone it: one that is a stream cannot be.
#[derive(Clone, Copy, Debug, Default)]
pub struct TryCloneBody;

impl Replay<Body> for TryCloneBody {
    type Body = Body;
    type Captured = Body;

    fn capture(&self, body: Body) -> (Body, Option<Body>) {
        if body.as_bytes().is_none() {
            return (body, None);
        }
        // Bodies are cloned as part of a request only.
        let Ok(nowhere) = Url::parse("data:") else { return (body, None) };
        let mut request = ::reqwest::Request::new(Method::GET, nowhere);
        *request.body_mut() = Some(body);
        let kept = request.try_clone().and_then(|mut copy| copy.body_mut().take());
        // It is where it was put.
        (request.body_mut().take().unwrap_or_default(), kept)
    }

    fn pass_through(&self, body: Body) -> Body {
        body
    }

    fn restore(&self, kept: Body) -> Option<Body> {
        Some(kept)
    }
}

impl<B> From<ReplayBody<B>> for Body
where
    B: http_body::Body<Error: Into<BoxError>> + Send + Sync + 'static,
{
    fn from(body: ReplayBody<B>) -> Self {
        Self::wrap(body)
    }
}

/// So that `?` works on a request that is built where [`Client::execute`] is called.
impl From<::reqwest::Error> for Error<::reqwest::Error> {
    fn from(error: ::reqwest::Error) -> Self {
        Self::Inner(error)
    }
}
