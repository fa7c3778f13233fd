//! [`WithExtensionLayer`]: adds extensions to requests whose sender cannot add them, such as the user of a whole client.
//!
//! The layers read [`Subject`](crate::Subject) and [`RequestAuth`](crate::RequestAuth) from a request's extensions. A
//! client that builds its requests itself, such as a generated one, gives no access to them. Give it a service that adds
//! the extension:
//!
//! ```
//! use http::Request;
//! use tower::{Layer, Service, ServiceExt};
//! use tower_selam::{BoxError, PerSubject, SelamLayer, Subject, Token, simulator::Simulator};
//! use tower_selam::{ApiKey, source::{Reason, source_fn}};
//!
//! # tokio_test::block_on(async {
//! # let client = Simulator::new();
//! let jwts = PerSubject::new(|subject: &Subject| {
//!     let jwt = format!("jwt.of.{}", subject.as_str());
//!     source_fn(move |_: Reason<Token>| std::future::ready(Token::new(jwt.clone())))
//! });
//! let layer = SelamLayer::builder().with_api_key(ApiKey::new(client.issue_key())?).with_jwt(jwts).build()?;
//! let chat = layer.base_url().endpoint("chat/completions")?;
//! let selam = layer.layer(client.clone());
//!
//! // One handle for each user. They share credentials, refreshes and connections.
//! for user in ["almaz", "kaleb"] {
//!     let for_user = selam.for_subject(&Subject::new(user));
//!     // The client knows nothing of users. (The API rejects these made-up JWTs.)
//!     let _ = send_question(for_user, &chat).await;
//! }
//! let sent: Vec<_> = client.received().into_iter().map(|sent| sent.headers["authorization"].clone()).collect();
//! assert_eq!(sent, ["Bearer jwt.of.almaz", "Bearer jwt.of.kaleb"]);
//!
//! async fn send_question<S>(service: S, chat: &http::Uri) -> Result<S::Response, S::Error>
//! where
//!     S: Service<Request<String>>,
//! {
//!     let question = r#"{"messages":[{"role":"user","content":"Selam!"}]}"#.to_owned();
//!     service.oneshot(Request::post(chat).body(question).unwrap()).await
//! }
//! # Ok::<(), BoxError>(())
//! # }).unwrap();
//! ```
//!
//! # Which extension wins
//!
//! The request's own, of each type; then that of the outermost service. So a handle sets a default and
//! is no restriction: code that holds the handle of one subject can name another in a request. Nothing is kept from one
//! request for the next.
//!
//! # Order
//!
//! Outside of the layers that write credentials, and inside of those that retry or follow redirects: a redirect to
//! another origin loses the extensions that were added outside.

use std::{
    mem,
    task::{Context, Poll},
};

use http::{Extensions, Request};
use tower::{Layer, Service, ServiceExt};

/// Adds extensions to every request that has none of their types. See the [module docs](self).
///
/// ```
/// use tower::ServiceBuilder;
/// use tower_selam::{ApiKey, SelamLayer, Subject, WithExtensionLayer};
///
/// let layer = SelamLayer::builder().with_api_key(ApiKey::new("sk-selam-example")?).build()?;
/// let layers = ServiceBuilder::new().layer(WithExtensionLayer::new(Subject::new("user-7"))).layer(layer);
/// # let _ = layers;
/// # Ok::<(), tower_selam::ConfigError>(())
/// ```
#[derive(Clone, Debug)]
pub struct WithExtensionLayer {
    extensions: Extensions,
}

impl WithExtensionLayer {
    /// Adds `extension`: a [`Subject`](crate::Subject), a [`RequestAuth`](crate::RequestAuth), or any other that a layer
    /// reads.
    #[must_use]
    pub fn new<T: Clone + Send + Sync + 'static>(extension: T) -> Self {
        Self { extensions: Extensions::new() }.with_extension(extension)
    }

    with_extension!();
}

impl<S> Layer<S> for WithExtensionLayer {
    type Service = WithExtension<S>;

    fn layer(&self, inner: S) -> Self::Service {
        WithExtension { inner, extensions: self.extensions.clone() }
    }
}

/// Adds extensions to every request that has none of their types. Made by [`WithExtensionLayer`],
/// [`Selam::for_subject`](crate::Selam::for_subject) and others; see the [module docs](self).
#[derive(Clone, Debug)]
pub struct WithExtension<S> {
    inner: S,
    extensions: Extensions,
}

impl<S> WithExtension<S> {
    /// Wraps `inner`, whose requests get `extension`.
    #[must_use]
    pub fn new<T: Clone + Send + Sync + 'static>(inner: S, extension: T) -> Self {
        WithExtensionLayer::new(extension).layer(inner)
    }

    with_extension!();

    inner_accessors!();

    /// Sends a request through a clone of the service, as soon as that is ready: like
    /// [`Selam::send`](crate::Selam::send).
    ///
    /// # Errors
    ///
    /// Those of the service.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future drops the request. A refresh that it waits for continues.
    pub async fn send<B>(&self, request: Request<B>) -> Result<S::Response, S::Error>
    where
        S: Service<Request<B>> + Clone,
    {
        self.clone().oneshot(request).await
    }
}

impl<S: Service<Request<B>>, B> Service<Request<B>> for WithExtension<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    #[inline]
    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        add_missing(request.extensions_mut(), &self.extensions);
        self.inner.call(request)
    }
}

/// Adds those of `defaults` whose type is missing from the extensions of a request.
pub(crate) fn add_missing(extensions: &mut Extensions, defaults: &Extensions) {
    if !defaults.is_empty() {
        let own = mem::replace(extensions, defaults.clone());
        extensions.extend(own);
    }
}
