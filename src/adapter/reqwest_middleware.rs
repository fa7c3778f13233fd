//! The layers as a middleware of reqwest-middleware: feature `reqwest-middleware`.
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
//!     // here what retries, logs, traces
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
//! A request chooses its credentials, or names its user, by `RequestBuilder::with_extension`, with a
//! [`RequestAuth`](crate::RequestAuth) or a [`Subject`](crate::Subject).
//!
//! # Redirects
//!
//! Middlewares do not see redirects: the client that they are over follows them, and takes `X-API-Key` to other
//! origins unless it is told not to. Build it with [`redirect_policy`](super::reqwest::redirect_policy), as above.
//!
//! # Order
//!
//! Last in the list, next to the client: middlewares further in see the credentials, and the layers see what those
//! make of the answer.
//!
//! `reqwest-retry` goes before it. Then each try has a credential that is fresh when it is made, however long the
//! wait was; a 401 is renewed, and sent once more, within one try; and what comes up instead is an error of a
//! middleware's, which `reqwest-retry` takes as final. The other way round the old credential is tried again and again,
//! and the whole of it once more after a 401. What a middleware further in makes of an error of a voice agent's handshake is
//! shown by its words alone, with the credentials masked.
//!
//! # Errors
//!
//! The client's own errors stay what they are, so that other middlewares can tell them, except for the query of their
//! URLs. An [`AuthError`] comes as `reqwest_middleware::Error::Middleware`, and [`AuthError::find`] finds it there and
//! through what others wrap around it.

use std::{
    convert::Infallible,
    error::Error as StdError,
    fmt,
    future::poll_fn,
    mem,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use ::reqwest::Body;
use ::reqwest_middleware::{Error, Middleware, Next};
use async_trait::async_trait;
use bytes::Bytes;
use http::{Extensions, Request, Response};
use tower_layer::Layer;
use tower_service::Service;
use zeroize::Zeroizing;

use super::reqwest::{Shown, TryCloneBody, from_http, scrubbed};
use crate::{
    AuthError, BoxError, SelamLayer,
    error::{Redactor, with_causes},
};

type SendFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Sends requests through layers. See the [module docs](self).
#[derive(Clone, Copy, Debug)]
pub struct AuthMiddleware<L = SelamLayer<TryCloneBody>> {
    layers: L,
}

impl AuthMiddleware {
    /// All of `layer`; bodies that reqwest can clone are sent again after a 401.
    #[must_use]
    pub fn new(layer: SelamLayer) -> Self {
        Self::with_layers(layer.with_replay(TryCloneBody))
    }
}

impl<L> AuthMiddleware<L> {
    /// Any `layers`, also a `tower::ServiceBuilder` of them. Their error has to become a `reqwest_middleware::Error`,
    /// as those of this crate's layers do.
    ///
    /// The layers are put around each request anew: what counts across requests, like a limit of how many are
    /// sent at once, has to be shared by the layer itself.
    #[must_use]
    pub fn with_layers(layers: L) -> Self
    where
        L: for<'a> Layers<'a>,
    {
        Self { layers }
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
        let mut request = Request::<Body>::try_from(request).map_err(scrubbed)?;
        request.extensions_mut().extend(extensions.clone());
        let seen = Arc::new(Mutex::new(extensions.clone()));
        let result = self.layers.send(NextService { next, extensions: Arc::clone(&seen) }, request).await;
        // What the middlewares further in had to say.
        *extensions = mem::take(&mut *seen.lock().unwrap_or_else(PoisonError::into_inner));
        result
    }
}

/// What [`AuthMiddleware`] takes: layers over a [`NextService`] whose error becomes a `reqwest_middleware::Error`.
#[diagnostic::on_unimplemented(
    message = "`{Self}` does not make a middleware",
    note = "its service takes `http::Request<reqwest::Body>` and gives `http::Response`",
    note = "its error is `Into<reqwest_middleware::Error>`: for another, put `tower::util::MapErrLayer` around it",
    note = "`SelamLayer` and `RefreshLayer` need `with_replay(TryCloneBody)`, as reqwest's body is no `Clone`"
)]
pub trait Layers<'a> {
    /// Sends one request.
    #[doc(hidden)]
    fn send(
        &self,
        next: NextService<'a>,
        request: Request<Body>,
    ) -> SendFuture<'a, Result<::reqwest::Response, Error>>;
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
    ) -> SendFuture<'a, Result<::reqwest::Response, Error>> {
        let mut service = self.layer(next);
        Box::pin(async move {
            poll_fn(|cx| service.poll_ready(cx)).await.map_err(Into::into)?;
            service.call(request).await.map(from_http).map_err(Into::into)
        })
    }
}

/// The rest of the middlewares and the client, as a service.
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
        let shown = Shown::of(&request);
        let of_request = request.extensions().clone();
        let query = request.uri().query().map(|query| Zeroizing::new(query.to_owned()));
        let request = ::reqwest::Request::try_from(request);
        NextFuture(Box::pin(async move {
            let request = request.map_err(scrubbed)?;
            let mut seen = extensions.lock().unwrap_or_else(PoisonError::into_inner).clone();
            seen.extend(of_request);
            let result = next.run(request, &mut seen).await;
            *extensions.lock().unwrap_or_else(PoisonError::into_inner) = seen;
            match result {
                Ok(response) => Ok(shown.to_http(response)),
                Err(Error::Reqwest(error)) => Err(Error::Reqwest(scrubbed(error))),
                Err(error) => Err(without_query(shown, query.as_ref(), error)),
            }
        }))
    }
}

/// A middleware further in may have wrapped an error of the client's, with its URL; of a handshake, that has the
/// credentials in its query. Then its words are kept, and not the error.
fn without_query(shown: Shown, query: Option<&Zeroizing<String>>, error: Error) -> Error {
    let Shown::WithoutQuery = shown else { return error };
    if let Some(found) = AuthError::find(&error) {
        return found.clone().into();
    }
    let redactor = Redactor::masking(query.map(|query| query.as_str()));
    Error::middleware(Said(redactor.text(with_causes(&error))))
}

/// What a middleware's error said.
#[derive(Debug)]
struct Said(String);

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl StdError for Said {}

impl fmt::Debug for NextService<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NextService").finish_non_exhaustive()
    }
}

/// Response future of [`NextService`].
pub struct NextFuture<'a>(SendFuture<'a, Result<Response<Body>, Error>>);

impl Future for NextFuture<'_> {
    type Output = Result<Response<Body>, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(cx)
    }
}

impl fmt::Debug for NextFuture<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NextFuture").finish_non_exhaustive()
    }
}

/// As an error of a middleware's.
impl From<AuthError> for Error {
    fn from(error: AuthError) -> Self {
        // It shows no level of its own, so ours goes one further down, for `AuthError::find`.
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
