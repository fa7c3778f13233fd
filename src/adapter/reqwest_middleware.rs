//! Runs the layers as a middleware of reqwest-middleware: feature `reqwest-middleware`.
//!
//! ```
//! use reqwest_middleware::ClientBuilder;
//! use tower_selam::{ApiKey, AuthError, AuthErrorKind, SelamLayer};
//! use tower_selam::adapter::{reqwest::redirect_policy, reqwest_middleware::AuthMiddleware};
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
//!
//! let client = reqwest::Client::builder().redirect(redirect_policy()).build()?;
//! let client = ClientBuilder::new(client)
//!     // Logging and tracing go here.
//!     .with(AuthMiddleware::new(layer))
//!     .build();
//!
//! let question = r#"{"messages":[{"role":"user","content":"Selam!"}]}"#;
//! let response = client.post(&chat).body(question).send().await?;
//! assert!(response.text().await?.contains("You said: Selam!"));
//!
//! let refused = client.post("http://api.selamgpt.com/v1/chat/completions").send().await.unwrap_err();
//! assert_eq!(AuthError::find(&refused).unwrap().kind(), AuthErrorKind::OriginNotAllowed);
//! # Ok::<(), tower_selam::BoxError>(())
//! # }).unwrap();
//! ```
//!
//! # Credentials of a single request, or of a user
//!
//! A single request overrides its credentials or names its subject through `RequestBuilder::with_extension`, with a
//! [`RequestAuth`] or a [`Subject`]. A generated client that takes a `ClientWithMiddleware` hides its
//! requests: give it one for each user, whose last middleware is [`AuthMiddleware::for_subject`]. They share credentials
//! and connections:
//!
//! ```
//! use reqwest_middleware::{ClientBuilder, ClientWithMiddleware};
//! use tower_selam::{Subject, adapter::reqwest_middleware::AuthMiddleware};
//!
//! // `base` has all middlewares but this one.
//! fn for_user(base: &ClientWithMiddleware, auth: &AuthMiddleware, user: &str) -> ClientWithMiddleware {
//!     ClientBuilder::from_client(base.clone()).with(auth.for_subject(&Subject::new(user))).build()
//! }
//! ```
//!
//! The request's own extension takes precedence. (`reqwest_middleware::Extension`, which sets extensions for a client too,
//! does so only for requests that its builder sends, and not for those that are built first and then given to `execute`.)
//!
//! # Redirects
//!
//! Middlewares do not see redirects: the client below them follows these itself, and takes `X-API-Key` to other origins
//! by default. Build the client with [`redirect_policy`](super::reqwest::redirect_policy), as above.
//!
//! # Order
//!
//! Add this middleware last, next to the client. Middlewares after it see the credentials, and can change the response
//! before the layers see it.
//!
//! # Retries
//!
//! `reqwest-retry` retries each 5xx with any method, a POST that was processed included, and does not read `Retry-After`.
//! With the feature `retry`, use this crate's policy and throttle instead, in the same middleware:
//!
//! ```
//! # #[cfg(feature = "retry")]
//! # {
//! use tower::ServiceBuilder;
//! use tower_selam::{ApiKey, SelamLayer, retry::{RetryPolicy, ThrottleLayer}};
//! use tower_selam::adapter::{reqwest::TryCloneBody, reqwest_middleware::AuthMiddleware};
//!
//! let layer = SelamLayer::builder().with_api_key(ApiKey::new("sk-selam-example")?).build()?;
//! let layers = ServiceBuilder::new()
//!     .retry(RetryPolicy::new().with_clone(TryCloneBody))
//!     .layer(ThrottleLayer::new())
//!     .layer(layer.with_replay(TryCloneBody));
//! let middleware = AuthMiddleware::with_layers(layers);
//! # let _ = middleware;
//! # }
//! # Ok::<(), tower_selam::BoxError>(())
//! ```
//!
//! If you keep `reqwest-retry`, add it before this middleware. Each attempt then gets a credential that is fresh at that
//! moment, however long the wait before it; a 401 is handled within one attempt, by a refresh and a replay; and
//! `reqwest-retry` treats an [`AuthError`] as final, as it does every error of a middleware. In the opposite order it would
//! retry with the old credential, and run through all its attempts a second time after a 401.
//!
//! # Errors
//!
//! Errors of the client keep their type, so that other middlewares can match on them; only the query is removed from
//! their URLs. An [`AuthError`] arrives as `reqwest_middleware::Error::Middleware`. [`AuthError::find`] finds it there,
//! and inside the errors that other middlewares wrap around it.
//!
//! In a voice agent's handshake, whose query holds the credentials, an error from a middleware after this one is
//! replaced by its text, with the credentials masked.

use std::{
    convert::Infallible,
    io, mem,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use ::reqwest::Body;
use ::reqwest_middleware::{Error, Middleware, Next};
use async_trait::async_trait;
use bytes::Bytes;
use http::{Extensions, Request, Response};
use tower::{Layer, Service, ServiceExt};
use zeroize::Zeroizing;

use super::reqwest::{TryCloneBody, has_secret_query, into_reqwest, redact_url, to_http};
use crate::{
    AuthError, BoxError, RequestAuth, SelamLayer, Subject,
    error::{Redactor, with_causes},
    with_extension::add_missing,
};

/// Sends requests through layers. See the [module docs](self).
#[derive(Clone, Debug)]
pub struct AuthMiddleware<L = SelamLayer<TryCloneBody>> {
    layers: L,
    extensions: Extensions,
}

impl AuthMiddleware {
    /// Runs every request through `layer`. Replays bodies that reqwest can clone.
    #[must_use]
    pub fn new(layer: SelamLayer) -> Self {
        Self::with_layers(layer.with_replay(TryCloneBody))
    }
}

impl<L> AuthMiddleware<L> {
    /// Runs every request through any `layers`, for example those of a `tower::ServiceBuilder`.
    ///
    /// Their error must convert into `reqwest_middleware::Error`, as the errors of this crate's layers do.
    ///
    /// `Layer::layer` is called for each request, which is cheap for the layers of this crate. State that spans requests, such as a concurrency limit, must be
    /// shared by the layer itself.
    #[must_use]
    pub fn with_layers(layers: L) -> Self
    where
        L: for<'a> Layers<'a>,
    {
        Self { layers, extensions: Extensions::new() }
    }

    with_extension!();

    /// Returns a middleware that makes requests for `subject`. It shares the layers with this one.
    #[must_use]
    pub fn for_subject(&self, subject: &Subject) -> Self
    where
        L: Clone,
    {
        self.clone().with_extension(subject.clone())
    }
}

#[async_trait]
impl<L> Middleware for AuthMiddleware<L>
where
    L: for<'a> Layers<'a> + Send + Sync + 'static,
{
    async fn handle(
        &self,
        request: ::reqwest::Request,
        extensions: &mut Extensions,
        next: Next<'_>,
    ) -> Result<::reqwest::Response, Error> {
        let mut request = Request::<Body>::try_from(request).map_err(redact_url)?;
        request.extensions_mut().extend(extensions.clone());
        add_missing(request.extensions_mut(), &self.extensions);
        let shared = Arc::new(Mutex::new(extensions.clone()));
        let result = self.layers.send(NextService { next, extensions: Arc::clone(&shared) }, request).await;
        // Hand back what the inner middlewares stored, but no choice that was made for this request: the caller may use its
        // extensions for a request of another user.
        let mut stored = mem::take(&mut *shared.lock().unwrap_or_else(PoisonError::into_inner));
        if extensions.get::<Subject>().is_none() {
            stored.remove::<Subject>();
        }
        if extensions.get::<RequestAuth>().is_none() {
            stored.remove::<RequestAuth>();
        }
        *extensions = stored;
        result
    }
}

/// Layers that [`AuthMiddleware`] can run.
///
/// Implemented for every `tower::Layer` over [`NextService`] whose service takes `http::Request<reqwest::Body>`, returns
/// `http::Response`, and has an error that converts into `reqwest_middleware::Error`.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be used as a middleware",
    note = "its service must take `http::Request<reqwest::Body>` and return `http::Response`",
    note = "its error must be `Into<reqwest_middleware::Error>`: convert any other with `tower::util::MapErrLayer`",
    note = "`SelamLayer` and `RefreshLayer` need `with_replay(TryCloneBody)`, because reqwest's body is not `Clone`"
)]
pub trait Layers<'a> {
    /// Wraps `next` in the layers and sends one request through them.
    fn send(
        &self,
        next: NextService<'a>,
        request: Request<Body>,
    ) -> impl Future<Output = Result<::reqwest::Response, Error>> + Send;
}

impl<'a, L, S, B> Layers<'a> for L
where
    L: Layer<NextService<'a>, Service = S>,
    S: Service<Request<Body>, Response = Response<B>, Error: Into<Error>, Future: Send> + Send + 'a,
    B: http_body::Body<Data: Into<Bytes>, Error: Into<BoxError>> + Send + Sync + 'static,
{
    fn send(
        &self,
        next: NextService<'a>,
        request: Request<Body>,
    ) -> impl Future<Output = Result<::reqwest::Response, Error>> + Send {
        let response = self.layer(next).oneshot(request);
        async { response.await.map(into_reqwest).map_err(Into::into) }
    }
}

/// The remaining middlewares and the client, as a `tower::Service`.
#[derive(Clone)]
pub struct NextService<'a> {
    next: Next<'a>,
    extensions: Arc<Mutex<Extensions>>,
}

impl<'a, B: Into<Body>> Service<Request<B>> for NextService<'a> {
    type Response = Response<Body>;
    type Error = Error;
    type Future = NextFuture<'a>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> NextFuture<'a> {
        let Self { next, extensions } = self.clone();
        let has_secret_query = has_secret_query(&request);
        let request_extensions = request.extensions().clone();
        let query = request.uri().query().filter(|_| has_secret_query);
        let query = query.map(|query| Zeroizing::new(query.to_owned()));
        let request = ::reqwest::Request::try_from(request);
        Box::pin(async move {
            let request = request.map_err(redact_url)?;
            let mut current = extensions.lock().unwrap_or_else(PoisonError::into_inner).clone();
            current.extend(request_extensions);
            let result = next.run(request, &mut current).await;
            *extensions.lock().unwrap_or_else(PoisonError::into_inner) = current;
            match result {
                Ok(response) => Ok(to_http(response, has_secret_query)),
                Err(Error::Reqwest(error)) => Err(Error::Reqwest(redact_url(error))),
                Err(error) if has_secret_query => Err(redact_middleware_error(query.as_ref(), error)),
                Err(error) => Err(error),
            }
        })
    }
}

/// Replaces an inner middleware's error by its redacted text.
///
/// The middleware may have wrapped an error of the client, whose URL holds the handshake's credentials.
fn redact_middleware_error(query: Option<&Zeroizing<String>>, error: Error) -> Error {
    if let Some(found) = AuthError::find(&error) {
        return found.clone().into();
    }
    let redactor = Redactor::masking(query.map(|query| query.as_str()));
    Error::middleware(io::Error::other(redactor.text(with_causes(&error))))
}

opaque_debug!(NextService<'a>);

/// Response future of [`NextService`].
pub type NextFuture<'a> = Pin<Box<dyn Future<Output = Result<Response<Body>, Error>> + Send + 'a>>;

/// Wraps the [`AuthError`] as `Error::Middleware`.
impl From<AuthError> for Error {
    fn from(error: AuthError) -> Self {
        // `Error::Middleware` is transparent: its `source()` skips the wrapped error. The extra level keeps the
        // `AuthError` in the chain for `AuthError::find`.
        Self::middleware(crate::Error::<Infallible>::Auth(error))
    }
}

impl From<crate::Error<Self>> for Error {
    fn from(error: crate::Error<Self>) -> Self {
        match error {
            crate::Error::Auth(error) => error.into(),
            crate::Error::Inner(error) => error,
        }
    }
}
