use std::sync::Arc;

use tower_layer::Layer;

use super::{
    Authorize,
    policy::{LayerCredentials, Policy},
};
use crate::{ApiKey, JwtProvider, Origins, Provider, credential::Form};

/// Sends an [`ApiKey`] with every request. See the [module docs](super).
#[derive(Clone, Debug)]
pub struct ApiKeyLayer(Arc<Policy>);

/// Sends a JWT, and the [`ApiKey`] beside it, with every request. See the [module docs](super).
#[derive(Clone, Debug)]
pub struct JwtLayer(Arc<Policy>);

impl ApiKeyLayer {
    /// The key as `Authorization: Bearer <key>`, and no `X-API-Key`.
    #[must_use]
    pub fn bearer(key: impl Into<Provider<ApiKey>>) -> Self {
        Self::of(LayerCredentials::new(Form::Bearer, Some(key.into()), None))
    }

    /// The key as `X-API-Key`, and no `Authorization`.
    #[must_use]
    pub fn x_api_key(key: impl Into<Provider<ApiKey>>) -> Self {
        Self::of(LayerCredentials::new(Form::Header, Some(key.into()), None))
    }

    /// The key as `X-API-Key` beside a [`JwtLayer::beside_api_key`], inside or outside of this one, which
    /// writes `Authorization`. Without one, the API gets the key alone.
    #[must_use]
    pub fn beside_jwt(key: impl Into<Provider<ApiKey>>) -> Self {
        Self::of(LayerCredentials::new(Form::KeyHalf, Some(key.into()), None))
    }

    /// No credentials of its own: every request brings [`RequestAuth::Custom`](crate::RequestAuth::Custom), and
    /// one without is refused.
    #[must_use]
    pub fn per_request() -> Self {
        Self::of(LayerCredentials::Nothing)
    }

    fn of(provider: LayerCredentials) -> Self {
        Self(Arc::new(Policy::new(provider)))
    }
}

impl JwtLayer {
    /// The JWT as `Authorization: Bearer <jwt>` and the key as `X-API-Key`.
    ///
    /// The JWT is a [`Token`](crate::Token), a [`Refreshing`](crate::Refreshing) one, or
    /// [one for each user](crate::PerSubject).
    #[must_use]
    pub fn new(jwt: impl Into<JwtProvider>, key: impl Into<Provider<ApiKey>>) -> Self {
        Self::of(LayerCredentials::new(Form::Pair, Some(key.into()), Some(jwt.into())))
    }

    /// The JWT as `Authorization: Bearer <jwt>` beside an [`ApiKeyLayer::beside_jwt`], inside or outside of
    /// this one, which writes `X-API-Key`. Without one, the API gets the JWT alone and refuses it.
    #[must_use]
    pub fn beside_api_key(jwt: impl Into<JwtProvider>) -> Self {
        Self::of(LayerCredentials::new(Form::JwtHalf, None, Some(jwt.into())))
    }

    fn of(provider: LayerCredentials) -> Self {
        Self(Arc::new(Policy::new(provider)))
    }
}

macro_rules! settings {
    ($layer:ident) => {
        impl $layer {
            /// Sends the credentials to these origins, instead of `https://api.selamgpt.com` alone.
            #[must_use]
            pub fn with_origins(mut self, origins: Origins) -> Self {
                Arc::make_mut(&mut self.0).origins = origins;
                self
            }

            /// Leaves a request alone that came with credentials in a header this layer minds (`IfAbsent`);
            /// the default is to replace them. The origin is checked all the same.
            #[must_use]
            pub fn if_not_present(mut self) -> Self {
                Arc::make_mut(&mut self.0).if_not_present = true;
                self
            }

            /// Refuses a request without a [`RequestAuth`](crate::RequestAuth) extension; the default is to
            /// send this layer's credentials with it.
            #[must_use]
            pub fn require_request_auth(mut self) -> Self {
                Arc::make_mut(&mut self.0).require_request_auth = true;
                self
            }
        }

        impl<S> Layer<S> for $layer {
            type Service = Authorize<S>;

            fn layer(&self, inner: S) -> Self::Service {
                Authorize::new(inner, Arc::clone(&self.0))
            }
        }
    };
}

settings!(ApiKeyLayer);
settings!(JwtLayer);
