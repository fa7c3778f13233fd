use std::sync::Arc;

use tower_layer::Layer;

use super::{
    AnnotatedSelamLayer, Selam, SelamLayerBuilder,
    sending::{Stack, WrapError},
};
use crate::{
    AuthErrorLayer, BaseUrl, ConfigError,
    authorize::{Authorize, Policy},
    replay::{BufferBody, CloneBody, NoReplay, Refresh},
};

/// The ready-made stack over any client. See the [module docs](super).
///
/// Cheap to clone.
#[derive(Clone, Debug)]
pub struct SelamLayer<R = CloneBody> {
    pub(crate) errors: AuthErrorLayer,
    replay: R,
    pub(crate) policy: Arc<Policy>,
    base_url: Arc<BaseUrl>,
}

impl SelamLayer {
    /// Everything from the environment; see [`SelamLayerBuilder::build_with_env`].
    ///
    /// # Errors
    ///
    /// When no key is named, or a variable holds something invalid; the error names it.
    pub fn from_env() -> Result<Self, ConfigError> {
        Self::builder().build_with_env()
    }

    /// Everything as the program says, and what it leaves open from the environment if it wants to.
    pub fn builder() -> SelamLayerBuilder {
        SelamLayerBuilder::default()
    }

    pub(super) fn new(policy: Policy, errors: AuthErrorLayer, base_url: BaseUrl) -> Self {
        Self { errors, replay: CloneBody, policy: Arc::new(policy), base_url: Arc::new(base_url) }
    }

    /// Sends no request again after a 401, so that the body may be of any type. A 401 renews the credential for
    /// the next request.
    #[must_use]
    pub fn without_replay(self) -> SelamLayer<NoReplay> {
        self.with_replay(NoReplay)
    }

    /// Keeps up to `limit` bytes of each request's body while it is sent, to send it again after a 401; the
    /// client gets a [`ReplayBody`](crate::replay::ReplayBody).
    #[must_use]
    pub fn buffered(self, limit: usize) -> SelamLayer<BufferBody> {
        self.with_replay(BufferBody::new(limit))
    }
}

impl<R> SelamLayer<R> {
    /// Sends requests again after a 401 as `replay` says: for a body type of its own.
    #[must_use]
    pub fn with_replay<T>(self, replay: T) -> SelamLayer<T> {
        let Self { errors, policy, base_url, .. } = self;
        SelamLayer { errors, replay, policy, base_url }
    }

    /// The same stack in annotate mode, for proxies: a 401 or 403 passes as it came, with the
    /// [`AuthError`](crate::AuthError) in its extensions, after a renewal and a replay had their chance.
    #[must_use]
    pub fn annotated(self) -> AnnotatedSelamLayer<R> {
        AnnotatedSelamLayer(self)
    }

    /// Where the API lives, to make the URIs of requests from.
    #[must_use]
    pub fn base_url(&self) -> &BaseUrl {
        &self.base_url
    }
}

impl<R: Clone> SelamLayer<R> {
    /// All but the layer that reads errors.
    pub(super) fn stack<S>(&self, inner: S) -> Stack<S, R> {
        let authorize = Authorize::new(WrapError(inner), Arc::clone(&self.policy));
        // What never changes need not be kept for a second time.
        let idle = !self.policy.provider.renews();
        Refresh::new(authorize, self.replay.clone()).with_idle(idle)
    }
}

impl<S, R: Clone> Layer<S> for SelamLayer<R> {
    type Service = Selam<S, R>;

    fn layer(&self, inner: S) -> Self::Service {
        Selam::new(self.stack(inner), self.errors.0)
    }
}
