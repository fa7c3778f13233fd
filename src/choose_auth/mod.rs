//! [`ChooseAuthLayer`]: chooses each request's credentials by its method, path or other parts.
//!
//! Only a few API operations need a JWT in addition to the key. If one stack serves all operations, this layer tells
//! them apart:
//!
//! ```
//! use http::Request;
//! use tower::{ServiceBuilder, ServiceExt};
//! use tower_selam::{ApiKey, ChooseAuthLayer, SelamLayer, Token, simulator::{JwtAlgorithm, Simulator}};
//!
//! # tokio_test::block_on(async {
//! # let client = Simulator::new();
//! # let jwt = client.mint_jwt(JwtAlgorithm::Hs256, std::time::Duration::from_secs(60));
//! let layer = SelamLayer::builder().with_api_key(ApiKey::new(client.issue_key())?).with_jwt(Token::new(jwt)?).build()?;
//! let (speech, chat) = (layer.base_url().endpoint("audio/speech")?, layer.base_url().endpoint("chat/completions")?);
//! let service = ServiceBuilder::new()
//!     .layer(ChooseAuthLayer::jwt_for_paths(["/v1/audio"])?)
//!     .layer(layer)
//!     .service(client.clone());
//!
//! service.clone().oneshot(Request::post(speech).body(r#"{"input":"Selam!"}"#.to_owned())?).await?;
//! service.oneshot(Request::post(chat).body(r#"{"messages":[{"role":"user","content":"Selam!"}]}"#.to_owned())?).await?;
//!
//! let received = client.received();
//! assert!(received[0].headers.contains_key("x-api-key"), "JWT and key");
//! assert!(!received[1].headers.contains_key("x-api-key"), "the key alone, as bearer");
//! # Ok::<(), tower_selam::BoxError>(())
//! # }).unwrap();
//! ```
//!
//! The choice is stored as a [`RequestAuth`] in the request's extensions. A request that already has one keeps it.
//!
//! # Order
//!
//! Outside of the layers that write credentials. The layer matches the path that it sees, so it must be inside of layers
//! that rewrite paths.

mod paths;

use std::task::{Context, Poll};

use http::{Request, request::Parts};
use tower_layer::Layer;
use tower_service::Service;

pub use self::paths::JwtPaths;
use crate::{ConfigError, RequestAuth};

/// Chooses each request's credentials. See the [module docs](self).
#[derive(Clone, Copy, Debug)]
pub struct ChooseAuthLayer<C> {
    choice: C,
}

impl<F> ChooseAuthLayer<F>
where
    F: Fn(&Parts) -> Option<RequestAuth>,
{
    /// Chooses by calling `choice`. If it returns `None`, the request gets the layers' default credentials.
    ///
    /// ```
    /// use http::{Method, request::Parts};
    /// use tower_selam::{ChooseAuthLayer, RequestAuth};
    ///
    /// let layer = ChooseAuthLayer::new(|request: &Parts| {
    ///     (request.method == Method::GET).then_some(RequestAuth::ApiKey)
    /// });
    /// # let _ = layer;
    /// ```
    #[must_use]
    pub fn new(choice: F) -> Self {
        Self { choice }
    }
}

impl ChooseAuthLayer<JwtPaths> {
    /// Sends JWT and key to these paths and everything below them, and the key alone to all others. See [`JwtPaths`] for
    /// what counts as below.
    ///
    /// # Errors
    ///
    /// If a prefix is not a plain path such as `/v1/audio`. The error says which one by its number.
    pub fn jwt_for_paths<P: AsRef<str>>(prefixes: impl IntoIterator<Item = P>) -> Result<Self, ConfigError> {
        Ok(Self { choice: JwtPaths::new(prefixes)? })
    }
}

impl<S, C: Clone> Layer<S> for ChooseAuthLayer<C> {
    type Service = ChooseAuth<S, C>;

    fn layer(&self, inner: S) -> Self::Service {
        ChooseAuth { inner, choice: self.choice.clone() }
    }
}

/// Chooses each request's credentials. Made by [`ChooseAuthLayer`]; see the [module docs](self).
#[derive(Clone, Copy, Debug)]
pub struct ChooseAuth<S, C> {
    inner: S,
    choice: C,
}

impl<S, C> ChooseAuth<S, C> {
    inner_accessors!();
}

impl<S, C, B> Service<Request<B>> for ChooseAuth<S, C>
where
    S: Service<Request<B>>,
    C: Choice,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    #[inline]
    fn call(&mut self, request: Request<B>) -> Self::Future {
        if request.extensions().get::<RequestAuth>().is_some() {
            return self.inner.call(request);
        }
        let (mut parts, body) = request.into_parts();
        if let Some(choice) = self.choice.choose(&parts) {
            parts.extensions.insert(choice);
        }
        self.inner.call(Request::from_parts(parts, body))
    }
}

/// How a [`ChooseAuthLayer`] chooses: by a closure or by [`JwtPaths`].
///
/// Sealed: pass a closure to [`ChooseAuthLayer::new`] for any other rule.
pub trait Choice: sealed::Sealed {
    /// Returns the credentials for `request`, or `None` for the layers' default.
    fn choose(&self, request: &Parts) -> Option<RequestAuth>;
}

mod sealed {
    use super::{JwtPaths, Parts, RequestAuth};

    #[expect(unnameable_types, reason = "sealed: nobody outside implements it")]
    pub trait Sealed {}

    impl Sealed for JwtPaths {}

    impl<F> Sealed for F where F: Fn(&Parts) -> Option<RequestAuth> {}
}

impl<F> Choice for F
where
    F: Fn(&Parts) -> Option<RequestAuth>,
{
    fn choose(&self, request: &Parts) -> Option<RequestAuth> {
        self(request)
    }
}
