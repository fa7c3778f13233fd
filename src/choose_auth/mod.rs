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

use std::{
    sync::Arc,
    task::{Context, Poll},
};

use http::{Request, request::Parts};
use tower::{Layer, Service};

use crate::{ConfigError, RequestAuth, inbound::PathRule};

/// Chooses each request's credentials. See the [module docs](self).
#[derive(Clone, Debug)]
pub struct ChooseAuthLayer {
    choice: Choice,
}

#[derive(Clone)]
struct Choice(Arc<ChooseFn>);

type ChooseFn = dyn Fn(&Parts) -> Option<RequestAuth> + Send + Sync;

opaque_debug!(Choice);

impl ChooseAuthLayer {
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
    pub fn new(choice: impl Fn(&Parts) -> Option<RequestAuth> + Send + Sync + 'static) -> Self {
        Self { choice: Choice(Arc::new(choice)) }
    }

    /// Sends JWT and key to some paths and everything below them, and the key alone to all others.
    ///
    /// `/v1/audio` matches `/v1/audio`, `/v1/audio/` and `/v1/audio/speech`, but not `/v1/audiobooks`: whole segments are
    /// compared, case-sensitively.
    ///
    /// Servers may read one path differently. A path gets the JWT only if every reading is below a prefix, so that an unusual
    /// spelling of another path cannot obtain it: `/v1/audio/a%2Fb` gets it, `/v1/audio/..%2Fmodels` and `/v1/%61udio` do
    /// not. [`PathRule`] has the rules.
    ///
    /// # Errors
    ///
    /// If a prefix is not a plain path such as `/v1/audio`. The error says which one by its number.
    pub fn jwt_for_paths<P: AsRef<str>>(prefixes: impl IntoIterator<Item = P>) -> Result<Self, ConfigError> {
        let rules =
            prefixes.into_iter().enumerate().map(|(at, path)| PathRule::subtree_item(at + 1, path.as_ref()));
        let rules = rules.collect::<Result<Vec<_>, _>>()?;
        Ok(Self::new(move |request| {
            Some(match rules.iter().any(|rule| rule.covers(request.uri.path())) {
                true => RequestAuth::ApiKeyAndJwt,
                false => RequestAuth::ApiKey,
            })
        }))
    }
}

impl<S> Layer<S> for ChooseAuthLayer {
    type Service = ChooseAuth<S>;

    fn layer(&self, inner: S) -> Self::Service {
        ChooseAuth { inner, choice: self.choice.clone() }
    }
}

/// Chooses each request's credentials. Made by [`ChooseAuthLayer`]; see the [module docs](self).
#[derive(Clone, Debug)]
pub struct ChooseAuth<S> {
    inner: S,
    choice: Choice,
}

impl<S> ChooseAuth<S> {
    inner_accessors!();
}

impl<S, B> Service<Request<B>> for ChooseAuth<S>
where
    S: Service<Request<B>>,
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
        if let Some(choice) = (self.choice.0)(&parts) {
            parts.extensions.insert(choice);
        }
        self.inner.call(Request::from_parts(parts, body))
    }
}
