//! Sends reqwest's requests through the layers, over a reqwest client: feature `reqwest`.
//!
//! ```text
//!  reqwest::Request ─▶ Client ─────────▶ SelamLayer, or ───▶ HttpService ────▶ reqwest::Client
//!                      converts to       any other layers    converts to
//!  reqwest::Response ◀ http's types                          reqwest's types
//! ```
//!
//! Most programs need only [`Client`]: [`SelamLayer`] over a `reqwest::ClientBuilder`. It is used like reqwest's. `send`
//! returns a `reqwest::Response`, or an [`Error`] that holds either an [`AuthError`](crate::AuthError) or a
//! `reqwest::Error`.
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
//! let question = serde_json::json!({ "messages": [{ "role": "user", "content": "Selam!" }] });
//! let response = selam.post(&chat).json(&question).send().await?;
//! assert!(response.text().await?.contains("You said: Selam!"));
//!
//! match selam.post("https://evil.example/v1/chat/completions").json(&question).send().await {
//!     Err(Error::Auth(error)) => assert_eq!(error.kind(), AuthErrorKind::OriginNotAllowed),
//!     other => panic!("{other:?}"),
//! }
//! # Ok::<(), tower_selam::BoxError>(())
//! # }).unwrap();
//! ```
//!
//! [`RequestBuilder`] has the methods that most requests need, and [`map`](RequestBuilder::map) for all others of
//! reqwest's builder. [`Client::execute`] sends requests that were built elsewhere: a `reqwest::Request`, a
//! `reqwest::RequestBuilder` or an `http::Request`. What reqwest's own builder sends bypasses the layers, and the API
//! refuses it.
//!
//! # Credentials of a single request, or of a user
//!
//! [`RequestBuilder::with_extension`] overrides the credentials of one request. [`Client::for_subject`] makes a client
//! whose requests are made for one user, and [`Client::with_extension`] one with any extension. It is cheap and shares
//! everything else with the client it was made from:
//!
//! ```
//! # use tower_selam::{Error, RequestAuth, Subject, adapter::reqwest::Client};
//! # async fn choose(selam: &Client) -> Result<(), Error<reqwest::Error>> {
//! let chat = "https://api.selamgpt.com/v1/chat/completions";
//! let question = r#"{"messages":[{"role":"user","content":"Selam!"}]}"#;
//! let with_key_alone = selam.post(chat).body(question).with_extension(RequestAuth::ApiKey).send().await?;
//! let for_user = selam.for_subject(&Subject::new("user-7"));
//! let of_user = for_user.post(chat).body(question).send().await?;
//! # let _ = (with_key_alone, of_user);
//! # Ok(())
//! # }
//! ```
//!
//! The extensions of a request take precedence over those of its client, also those of an `http::Request`, and of a
//! `reqwest::Request` that was converted from one.
//!
//! # Redirects
//!
//! By default, reqwest follows redirects to any origin. When the origin changes, it removes `Authorization` but keeps
//! `X-API-Key`, and it sends the previous URL, query included, as `Referer`. The layers cannot prevent this: they are
//! outside the reqwest client and do not see the redirect.
//!
//! Therefore [`Client::new`] and [`HttpService::new`] take a `ClientBuilder` and replace its policy with
//! [`redirect_policy`]: redirects within an origin are followed, and any other is returned to the caller as a 3xx
//! response. To follow those too, put tower-http's `FollowRedirect` around the layers and use
//! [`Origins::strip_for_other_origins`](crate::Origins::strip_for_other_origins): the layers then decide for each hop
//! whether it gets credentials.
//!
//! The policy of a `reqwest::Client` that is already built cannot be inspected. [`HttpService::dangerous_with_client`]
//! accepts such a client at your own risk.
//!
//! # Caveats
//!
//! - A request is replayed after a 401 only if reqwest can clone its body: bytes, strings and JSON can be cloned, a
//!   stream cannot, and its 401 is returned to the caller. To replay streams too, use [`SelamLayer::buffered`] with
//!   [`Client::with_layers`].
//! - A timeout of the client or of the request applies to each send separately, and not while the request waits for a
//!   refresh. For one deadline over everything, put tower's `timeout` around the layers.
//! - reqwest adds the headers of `ClientBuilder::default_headers` after the layers, to every request that lacks them.
//!   Keep `Authorization` and `X-API-Key` out of them.
//! - `ClientBuilder::connection_verbose` makes reqwest log everything it sends, credentials included.
//! - Errors show their URL without its query. So does the response to a voice agent's handshake, whose query holds the
//!   credentials.
//! - [`HttpService`] also serves as the client for a token endpoint. Token endpoints should not redirect, so build it
//!   with `Policy::none`, through [`HttpService::dangerous_with_client`].

use std::{
    fmt, mem,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use ::reqwest::{Body, ClientBuilder, IntoUrl, ResponseBuilderExt, Url, redirect};
use bytes::Bytes;
use http::{Extensions, HeaderMap, HeaderName, HeaderValue, Method, Request, Response};
use pin_project_lite::pin_project;
use serde::Serialize;
use tower::{Layer, Service, ServiceExt, util::Oneshot};

use crate::{
    BoxError, Error, RequestAuth, Selam, SelamLayer, Subject,
    replay::{Replay, ReplayBody},
    with_extension::add_missing,
};

/// Sends reqwest's requests through layers. See the [module docs](self).
///
/// Cheap to clone. Also implements `tower::Service<reqwest::Request>`.
#[derive(Clone)]
pub struct Client<S = Selam<HttpService, TryCloneBody>> {
    inner: S,
    reqwest: ::reqwest::Client,
    extensions: Extensions,
}

impl Client {
    /// Builds a client from a `reqwest::ClientBuilder` with [`redirect_policy`], and wraps it in `layer`. For a client that
    /// is already built, see [`HttpService::dangerous_with_client`].
    ///
    /// # Errors
    ///
    /// When reqwest cannot build the client.
    pub fn new(layer: SelamLayer, builder: impl UnbuiltClient) -> Result<Self, ::reqwest::Error> {
        Ok(Self::with_layers(&layer.with_replay(TryCloneBody), HttpService::new(builder)?))
    }
}

impl<S> Client<S> {
    /// Wraps `http` in any `layers`, for example those of a `tower::ServiceBuilder`.
    ///
    /// Give [`SelamLayer`] and [`RefreshLayer`](crate::RefreshLayer) the replay strategy [`TryCloneBody`], because
    /// reqwest's body is not `Clone`.
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
    /// # drop(selam.post("https://api.selamgpt.com/v1/chat/completions").send());
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

    with_extension!();

    /// Returns a client whose requests are made for `subject`: they get its JWT from a
    /// [`PerSubject`](crate::PerSubject). It shares everything with this one.
    #[must_use]
    pub fn for_subject(&self, subject: &Subject) -> Self
    where
        S: Clone,
    {
        self.clone().with_extension(subject.clone())
    }

    /// Starts a `GET` request, which [`send`](RequestBuilder::send) sends through the layers.
    pub fn get(&self, url: impl IntoUrl) -> RequestBuilder<S>
    where
        S: Clone,
    {
        self.request(Method::GET, url)
    }

    /// Starts a `POST` request, which [`send`](RequestBuilder::send) sends through the layers.
    pub fn post(&self, url: impl IntoUrl) -> RequestBuilder<S>
    where
        S: Clone,
    {
        self.request(Method::POST, url)
    }

    /// Starts a request, which [`send`](RequestBuilder::send) sends through the layers.
    pub fn request(&self, method: Method, url: impl IntoUrl) -> RequestBuilder<S>
    where
        S: Clone,
    {
        RequestBuilder { client: self.clone(), request: self.reqwest.request(method, url) }
    }

    /// Returns the innermost client. Requests that it sends itself carry no credentials.
    pub fn reqwest(&self) -> &::reqwest::Client {
        &self.reqwest
    }

    inner_accessors!();

    /// Sends a `reqwest::RequestBuilder`, a `reqwest::Request` or an `http::Request` through the layers. Nothing is sent
    /// before the returned future is polled.
    pub fn execute<R>(&self, request: R) -> Execute<S>
    where
        R: IntoRequest,
        S: Service<Request<Body>> + Clone,
    {
        let request = request.into_request().and_then(|request| self.convert(request));
        ResponseFuture { attempt: Attempt::new(request, |request| self.inner.clone().oneshot(request)) }
    }

    fn convert(&self, request: ::reqwest::Request) -> Result<Request<Body>, ::reqwest::Error> {
        let mut request = Request::<Body>::try_from(request)?;
        add_missing(request.extensions_mut(), &self.extensions);
        Ok(request)
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
        let request = self.convert(request);
        ResponseFuture { attempt: Attempt::new(request, |request| self.inner.call(request)) }
    }
}

impl<S: fmt::Debug> fmt::Debug for Client<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("inner", &self.inner).finish_non_exhaustive()
    }
}

/// A request that is being built, and sent through the layers of a [`Client`]. Made by [`Client::post`] and others.
///
/// Its methods are those of reqwest's builder. Mistakes, such as an invalid URL, are errors of [`send`](Self::send).
#[must_use = "a request does nothing until it is sent"]
pub struct RequestBuilder<S = Selam<HttpService, TryCloneBody>> {
    client: Client<S>,
    request: ::reqwest::RequestBuilder,
}

impl<S> RequestBuilder<S> {
    /// Adds a header.
    pub fn header<K, V>(self, name: K, value: V) -> Self
    where
        HeaderName: TryFrom<K, Error: Into<http::Error>>,
        HeaderValue: TryFrom<V, Error: Into<http::Error>>,
    {
        self.map(|request| request.header(name, value))
    }

    /// Adds headers. They replace those of the same name.
    pub fn headers(self, headers: HeaderMap) -> Self {
        self.map(|request| request.headers(headers))
    }

    /// Sets the body.
    pub fn body(self, body: impl Into<Body>) -> Self {
        self.map(|request| request.body(body))
    }

    /// Sets the body to `value` in JSON, and `Content-Type` if it is not set.
    pub fn json<T: Serialize + ?Sized>(self, value: &T) -> Self {
        self.map(|request| request.json(value))
    }

    /// Sets how long each send may take, from connecting to the end of the response's body. A wait for a refresh does not
    /// count.
    pub fn timeout(self, time: Duration) -> Self {
        self.map(|request| request.timeout(time))
    }

    /// Adds an extension to this request, instead of that of its client: a [`RequestAuth`], a [`Subject`], or any other that
    /// a layer reads.
    pub fn with_extension<T: Clone + Send + Sync + 'static>(mut self, extension: T) -> Self {
        self.client = self.client.with_extension(extension);
        self
    }

    /// Changes the request by reqwest's builder: `.map(|request| request.query(&page))`, with reqwest's feature `query`.
    pub fn map(
        mut self,
        change: impl FnOnce(::reqwest::RequestBuilder) -> ::reqwest::RequestBuilder,
    ) -> Self {
        self.request = change(self.request);
        self
    }

    /// Sends the request through the layers: see [`Client::execute`].
    pub fn send(self) -> Execute<S>
    where
        S: Service<Request<Body>> + Clone,
    {
        self.client.execute(self.request)
    }
}

// reqwest's shows its headers, and the query of its URL.
opaque_debug!(RequestBuilder<S>);

/// A request that [`Client::execute`] can send. Implement it to pass your own request type.
pub trait IntoRequest {
    /// Converts this into reqwest's request.
    ///
    /// # Errors
    ///
    /// When reqwest cannot build the request, for example from an invalid URL. [`Client::execute`] returns the error.
    fn into_request(self) -> Result<::reqwest::Request, ::reqwest::Error>;
}

impl IntoRequest for ::reqwest::Request {
    fn into_request(self) -> Result<Self, ::reqwest::Error> {
        Ok(self)
    }
}

impl IntoRequest for ::reqwest::RequestBuilder {
    fn into_request(self) -> Result<::reqwest::Request, ::reqwest::Error> {
        self.build()
    }
}

impl<B: Into<Body>> IntoRequest for Request<B> {
    fn into_request(self) -> Result<::reqwest::Request, ::reqwest::Error> {
        self.try_into()
    }
}

/// Future of [`Client::execute`].
pub type Execute<S> = ResponseFuture<Oneshot<S, Request<Body>>>;

pin_project! {
    /// Response future of [`Client`].
    #[must_use = "futures do nothing unless polled or awaited"]
    pub struct ResponseFuture<F> {
        #[pin]
        attempt: Attempt<F>,
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
        self.project().attempt.poll(cx).map_ok(into_reqwest)
    }
}

opaque_debug!(ResponseFuture<F>);

pin_project! {
    /// A request that was sent, or that reqwest cannot build.
    #[project = AttemptProj]
    enum Attempt<F> {
        Sent { #[pin] response: F },
        Failed { error: Option<::reqwest::Error> },
    }
}

impl<F> Attempt<F> {
    fn new<R>(request: Result<R, ::reqwest::Error>, send: impl FnOnce(R) -> F) -> Self {
        match request {
            Ok(request) => Self::Sent { response: send(request) },
            Err(error) => Self::Failed { error: Some(redact_url(error)) },
        }
    }
}

impl<F, T, E> Future for Attempt<F>
where
    F: Future<Output = Result<T, E>>,
    E: From<::reqwest::Error>,
{
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        match self.project() {
            AttemptProj::Sent { response } => response.poll(cx),
            AttemptProj::Failed { error } => match error.take() {
                Some(error) => Poll::Ready(Err(error.into())),
                None => Poll::Pending,
            },
        }
    }
}

/// Adapts a `reqwest::Client` to a service of the `http` crate's requests and responses, which layers can wrap.
///
/// Takes any body that converts into reqwest's, including the [`ReplayBody`] of [`SelamLayer::buffered`]. Errors are
/// reqwest's, with the query removed from their URLs.
#[derive(Clone)]
pub struct HttpService(::reqwest::Client);

impl HttpService {
    /// Builds a client from a `reqwest::ClientBuilder`, whose redirect policy is replaced by [`redirect_policy`].
    ///
    /// # Errors
    ///
    /// When reqwest cannot build the client.
    pub fn new(builder: impl UnbuiltClient) -> Result<Self, ::reqwest::Error> {
        builder.into().redirect(redirect_policy()).build().map(Self)
    }

    /// Wraps a client that is already built, and whose redirect policy is therefore unknown.
    ///
    /// Unless the policy is [`redirect_policy`] or `Policy::none`, redirects take `X-API-Key` to other origins. See the
    /// [module docs](self#redirects).
    #[must_use]
    pub fn dangerous_with_client(client: ::reqwest::Client) -> Self {
        Self(client)
    }

    /// Returns the wrapped client.
    pub fn get_ref(&self) -> &::reqwest::Client {
        &self.0
    }
}

/// A `reqwest::ClientBuilder`, whose redirect policy can still be set.
///
/// The trait exists for the compiler message that a client which is already built gets.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a `reqwest::ClientBuilder`",
    label = "expected `reqwest::Client::builder()`",
    note = "the redirect policy must be replaced, because reqwest's own takes `X-API-Key` to other origins",
    note = "a client that is already built: `Client::with_layers(&layer.with_replay(TryCloneBody), \
            HttpService::dangerous_with_client(client))`"
)]
pub trait UnbuiltClient: Into<ClientBuilder> {}

impl UnbuiltClient for ClientBuilder {}

/// Returns a policy that follows at most ten redirects, all within the origin that a layer approved.
///
/// A redirect to another origin is not followed; its response is returned. Use it for clients that you build yourself:
/// `builder.redirect(redirect_policy())`.
#[must_use]
pub fn redirect_policy() -> redirect::Policy {
    // Even a redirect to another allowed origin is not followed: reqwest would remove only one of the two headers.
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
        self.0.poll_ready(cx).map_err(redact_url)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let has_secret_query = has_secret_query(&request);
        let attempt = Attempt::new(request.try_into(), |request| self.0.call(request));
        HttpFuture { attempt, has_secret_query }
    }
}

// The client's `Debug` shows its default headers.
opaque_debug!(HttpService);

pin_project! {
    /// Response future of [`HttpService`].
    pub struct HttpFuture {
        #[pin]
        attempt: Attempt<<::reqwest::Client as Service<::reqwest::Request>>::Future>,
        has_secret_query: bool,
    }
}

impl Future for HttpFuture {
    type Output = Result<Response<Body>, ::reqwest::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let result = ready!(this.attempt.poll(cx));
        Poll::Ready(result.map(|response| to_http(response, *this.has_secret_query)).map_err(redact_url))
    }
}

opaque_debug!(HttpFuture);

/// Whether the query holds credentials, as that of a voice agent's handshake does, and must not be shown.
pub(super) fn has_secret_query<B>(request: &Request<B>) -> bool {
    matches!(request.extensions().get(), Some(RequestAuth::VoiceAgent))
}

/// Converts `response`, storing the URL in the extension that reqwest reads it back from.
pub(super) fn to_http(response: ::reqwest::Response, has_secret_query: bool) -> Response<Body> {
    let mut url = response.url().clone();
    if has_secret_query {
        url.set_query(None);
    }
    let mut response = Response::<Body>::from(response);
    if let Some(extensions) = Response::builder().url(url).extensions_mut() {
        response.extensions_mut().extend(mem::take(extensions));
    }
    response
}

pub(super) fn into_reqwest<B>(response: Response<B>) -> ::reqwest::Response
where
    B: http_body::Body<Data: Into<Bytes>, Error: Into<BoxError>> + Send + Sync + 'static,
{
    response.map(Body::wrap).into()
}

/// Reduces the error's URL to origin and path, because every other part may hold a secret.
pub(super) fn redact_url(mut error: ::reqwest::Error) -> ::reqwest::Error {
    if let Some(url) = error.url_mut() {
        url.set_query(None);
        url.set_fragment(None);
        // These fail only for URLs that cannot have user information.
        let _ = url.set_username("");
        let _ = url.set_password(None);
    }
    error
}

/// Replays a body if reqwest can clone it, which it can unless the body is a stream.
#[derive(Clone, Copy, Debug, Default)]
pub struct TryCloneBody;

impl Replay<Body> for TryCloneBody {
    type Body = Body;
    type Captured = Body;

    fn capture(&self, body: Body) -> (Body, Option<Body>) {
        if body.as_bytes().is_none() {
            return (body, None);
        }
        // reqwest clones bodies only as part of a request.
        let Ok(url) = Url::parse("data:") else { return (body, None) };
        let mut request = ::reqwest::Request::new(Method::GET, url);
        *request.body_mut() = Some(body);
        let captured = request.try_clone().and_then(|mut copy| copy.body_mut().take());
        // Always `Some`: it was set three lines above.
        (request.body_mut().take().unwrap_or_default(), captured)
    }

    fn pass_through(&self, body: Body) -> Body {
        body
    }

    fn restore(&self, captured: Body) -> Option<Body> {
        Some(captured)
    }
}

impl<B> From<ReplayBody<B>> for Body
where
    B: http_body::Body<Data: Send + Sync, Error: Into<BoxError>> + Send + Sync + 'static,
{
    fn from(body: ReplayBody<B>) -> Self {
        Self::wrap(body)
    }
}

/// Lets `?` convert the error of building a request into the error of [`Client::execute`].
impl From<::reqwest::Error> for Error<::reqwest::Error> {
    fn from(error: ::reqwest::Error) -> Self {
        Self::Inner(error)
    }
}
