use std::sync::Arc;

use tower_layer::Layer;

use super::{Selam, SelamLayerBuilder, service::WrapError};
use crate::{
    AuthErrorLayer, BaseUrl, ConfigError,
    authorize::{Authorize, Policy},
};

/// The ready-made stack over any client. See the [module docs](super).
///
/// Cheap to clone.
#[derive(Clone, Debug)]
pub struct SelamLayer {
    errors: AuthErrorLayer,
    policy: Arc<Policy>,
    base_url: Arc<BaseUrl>,
}

impl SelamLayer {
    /// Everything from the environment; see [`SelamLayerBuilder::build_with_env`].
    ///
    /// # Errors
    ///
    /// When `SELAM_API_KEY` is not set, or a variable holds something invalid; the error names it.
    pub fn from_env() -> Result<Self, ConfigError> {
        Self::builder().build_with_env()
    }

    /// Everything as the program says, and what it leaves open from the environment if it wants to.
    pub fn builder() -> SelamLayerBuilder {
        SelamLayerBuilder::default()
    }

    pub(super) fn new(policy: Policy, errors: AuthErrorLayer, base_url: BaseUrl) -> Self {
        Self { errors, policy: Arc::new(policy), base_url: Arc::new(base_url) }
    }

    /// Where the API lives, to make the URIs of requests from.
    #[must_use]
    pub fn base_url(&self) -> &BaseUrl {
        &self.base_url
    }
}

impl<S> Layer<S> for SelamLayer {
    type Service = Selam<S>;

    fn layer(&self, inner: S) -> Self::Service {
        let authorize = Authorize::new(WrapError(inner), Arc::clone(&self.policy));
        Selam(self.errors.layer(authorize))
    }
}
