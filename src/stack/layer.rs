//! The layer: [`SelamLayer`].

use std::sync::Arc;

use tower::Layer;

use super::{Selam, SelamLayerBuilder};
use crate::{
    AuthError, AuthErrorLayer, BaseUrl, ConfigError,
    authorize::Policy,
    replay::{BufferBody, CloneBody, NoReplay},
};

/// The ready-made stack over any client. See the [module docs](super).
///
/// Cheap to clone.
#[derive(Clone, Debug)]
pub struct SelamLayer<R = CloneBody> {
    pub(crate) errors: AuthErrorLayer,
    pub(super) replay: R,
    pub(crate) policy: Arc<Policy>,
    base_url: Arc<BaseUrl>,
}

impl SelamLayer {
    /// Builds the layer from the environment; see [`SelamLayerBuilder::build_with_env`].
    ///
    /// # Errors
    ///
    /// When there is no key, or a variable contains something invalid; the error names the variable.
    pub fn from_env() -> Result<Self, ConfigError> {
        Self::builder().build_with_env()
    }

    /// Starts a builder: from the program, and from the environment where the program says nothing.
    pub fn builder() -> SelamLayerBuilder {
        SelamLayerBuilder::default()
    }

    pub(super) fn new(policy: Policy, errors: AuthErrorLayer, base_url: BaseUrl) -> Self {
        Self { errors, replay: CloneBody, policy: Arc::new(policy), base_url: Arc::new(base_url) }
    }

    /// Replays nothing after a 401, so that bodies may be of any type. The credential is refreshed for the next request.
    #[must_use]
    pub fn without_replay(self) -> SelamLayer<NoReplay> {
        self.with_replay(NoReplay)
    }

    /// Keeps up to `limit` bytes of each request's body while it is sent, to replay it after a 401: see
    /// [`RefreshLayer::buffered`](crate::RefreshLayer::buffered). The client gets a
    /// [`ReplayBody`](crate::replay::ReplayBody).
    #[must_use]
    pub fn buffered(self, limit: usize) -> SelamLayer<BufferBody> {
        self.with_replay(BufferBody::new(limit))
    }
}

impl<R> SelamLayer<R> {
    /// Keeps and restores bodies with `replay`, for a client with its own body type.
    #[must_use]
    pub fn with_replay<T>(self, replay: T) -> SelamLayer<T> {
        let Self { errors, policy, base_url, .. } = self;
        SelamLayer { errors, replay, policy, base_url }
    }

    /// Returns a 401 or 403 instead of an error, with the [`AuthError`](crate::AuthError) in its extensions: for proxies. Refresh and
    /// replay come first.
    ///
    /// ```
    /// use http::Request;
    /// use http_body_util::BodyExt;
    /// use tower::Layer;
    /// use tower_selam::{ApiKey, AuthError, AuthErrorKind, ErrorBody, SelamLayer, simulator::Simulator};
    ///
    /// # tokio_test::block_on(async {
    /// let client = Simulator::new();
    /// let revoked = ApiKey::new("sk-selam-revoked")?;
    /// let layer = SelamLayer::builder().with_api_key(revoked).build()?.annotated();
    /// let chat = layer.base_url().endpoint("chat/completions")?;
    ///
    /// let response = layer.layer(client).send(Request::post(chat).body(String::new())?).await?;
    /// assert_eq!(response.status(), 401);
    /// let error: &AuthError = response.extensions().get().unwrap();
    /// assert_eq!(error.kind(), AuthErrorKind::InvalidApiKey);
    /// let body = response.into_body().collect().await?.to_bytes();
    /// assert_eq!(ErrorBody::parse(&body).message(), Some("Invalid API key provided."));
    /// # Ok::<(), tower_selam::BoxError>(())
    /// # }).unwrap();
    /// ```
    ///
    /// A request that is not sent is an [`Error::Auth`](crate::Error::Auth) all the same: its origin is not allowed, or no
    /// credential is available.
    #[must_use]
    pub fn annotated(mut self) -> Self {
        self.errors = self.errors.annotated();
        self
    }

    /// Fetches the key and the JWT now, unless valid ones are at hand: at start-up, so that the first request does not wait,
    /// and as a readiness probe. A JWT for [each subject](crate::PerSubject) is fetched when a request needs it.
    ///
    /// A probe fails while requests would: when a source fails and no valid credential is left. It succeeds in an outage as
    /// long as one is. It asks the sources no more often than requests do, and does not call the API, so it does not notice
    /// that a key was revoked.
    ///
    /// ```
    /// use tower_selam::{ApiKey, AuthErrorKind, BoxError, Refreshing, SelamLayer, source::{Reason, SourceError, source_fn}};
    ///
    /// # tokio_test::block_on(async {
    /// let keys = Refreshing::new(source_fn(|_: Reason<ApiKey>| async {
    ///     Err::<ApiKey, _>(SourceError::transient("the vault is sealed"))
    /// }));
    /// let layer = SelamLayer::builder().with_api_key(keys).build()?;
    ///
    /// let error = layer.prefetch().await.unwrap_err();
    /// assert_eq!(error.kind(), AuthErrorKind::RefreshFailed); // not ready yet
    /// # Ok::<(), BoxError>(())
    /// # }).unwrap();
    /// ```
    ///
    /// # Errors
    ///
    /// [`RefreshFailed`](crate::AuthErrorKind::RefreshFailed) or [`RefreshRejected`](crate::AuthErrorKind::RefreshRejected),
    /// with the source's error as the cause.
    ///
    /// # Cancel safety
    ///
    /// A refresh continues without its caller.
    #[doc(alias("readiness", "health_check"))]
    pub async fn prefetch(&self) -> Result<(), AuthError> {
        self.policy.provider.prefetch().await
    }

    /// Returns where the API lives, to build the URIs of requests from.
    #[must_use]
    pub fn base_url(&self) -> &BaseUrl {
        &self.base_url
    }
}

impl<S, R: Clone> Layer<S> for SelamLayer<R> {
    type Service = Selam<S, R>;

    fn layer(&self, inner: S) -> Self::Service {
        Selam::new(inner, self)
    }
}
