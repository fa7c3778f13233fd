//! Sends reqwest's requests through the layers, over a reqwest client: feature `reqwest`.
//!
//! ```text
//!  reqwest::Request ─▶ Client ─────────▶ SelamLayer, or ───▶ HttpService ────▶ reqwest::Client
//!                      converts to       any other layers    converts to
//!  reqwest::Response ◀ http's types                          reqwest's types
//! ```
//!
//! Most programs need only [`Client`]: [`SelamLayer`] over a `reqwest::ClientBuilder`. Build requests with reqwest and
//! pass them to [`Client::execute`]. It returns a `reqwest::Response`, or an [`Error`] that holds either an
//! [`AuthError`](crate::AuthError) or a `reqwest::Error`.
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
//! // Or `.json(…)`, with reqwest's feature `json`.
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
//! A request sent with reqwest's own `send` bypasses the layers, and the API refuses it.
//!
//! # Credentials of a single request
//!
//! [`Client::with_extension`] makes a client whose requests use other credentials or name their subject. It is cheap
//! and shares everything else with the client it was cloned from:
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
//! [`execute`](Client::execute) also takes an `http::Request`. Its extensions take precedence over those of the client,
//! as do those of a `reqwest::Request` that was converted from one.
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
};

use ::reqwest::{Body, ClientBuilder, RequestBuilder, ResponseBuilderExt, Url, redirect};
use bytes::Bytes;
use http::{Extensions, Method, Request, Response};
use pin_project_lite::pin_project;
use tower::{Layer, Service, ServiceExt, util::Oneshot};

use crate::{
    BoxError, Error, RequestAuth, Selam, SelamLayer,
    replay::{Replay, ReplayBody},
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
    /// Builds a client from `builder` with [`redirect_policy`], and wraps it in `layer`.
    ///
    /// # Errors
    ///
    /// When reqwest cannot build the client.
    pub fn new(layer: SelamLayer, builder: ClientBuilder) -> Result<Self, ::reqwest::Error> {
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
    /// # drop(selam.execute(selam.reqwest().post("https://api.selamgpt.com/v1/chat/completions")));
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

    /// Adds this extension to every request that has none of its type: a [`RequestAuth`], a
    /// [`Subject`](crate::Subject), or an extension that another layer reads.
    #[must_use]
    pub fn with_extension<T: Clone + Send + Sync + 'static>(mut self, extension: T) -> Self {
        self.extensions.insert(extension);
        self
    }

    /// Returns the innermost client, to build requests with. Requests it sends itself carry no credentials.
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
        if !self.extensions.is_empty() {
            let request_extensions = mem::replace(request.extensions_mut(), self.extensions.clone());
            request.extensions_mut().extend(request_extensions);
        }
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
    /// Builds a client from `builder`, whose redirect policy is replaced by [`redirect_policy`].
    ///
    /// # Errors
    ///
    /// When reqwest cannot build the client.
    pub fn new(builder: ClientBuilder) -> Result<Self, ::reqwest::Error> {
        builder.redirect(redirect_policy()).build().map(Self)
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
