//! The layers: [`ApiKeyLayer`] and [`JwtLayer`].

use std::sync::Arc;

use tower::Layer;

use super::{
    Authorize,
    headers::Owner,
    policy::{Policy, Settings},
    provider::CredentialProvider,
};
use crate::{ApiKey, JwtProvider, Origins, Provider};

/// Sends an [`ApiKey`] with every request. See the [module docs](super).
#[derive(Clone, Debug)]
pub struct ApiKeyLayer(Arc<Policy>);

/// Sends a JWT with every request. See the [module docs](super).
#[derive(Clone, Debug)]
pub struct JwtLayer(Arc<Policy>);

impl ApiKeyLayer {
    /// Sends the key as `Authorization: Bearer <key>`. Owns `Authorization`.
    #[must_use]
    pub fn bearer(key: impl Into<Provider<ApiKey>>) -> Self {
        Self(policy(Owner::KeyAsBearer, CredentialProvider::new(Some(key.into()), None)))
    }

    /// Sends the key as `X-API-Key: <key>`: alone, or next to a [`JwtLayer`]. Owns `X-API-Key`.
    #[must_use]
    pub fn x_api_key(key: impl Into<Provider<ApiKey>>) -> Self {
        Self(policy(Owner::KeyAsXApiKey, CredentialProvider::new(Some(key.into()), None)))
    }

    /// Has no key: every request brings [`RequestAuth::Custom`](crate::RequestAuth::Custom), and a request without it is
    /// refused. Owns both headers.
    #[must_use]
    pub fn per_request() -> Self {
        Self(policy(Owner::Both, CredentialProvider::default()))
    }
}

impl JwtLayer {
    /// Sends the JWT as `Authorization: Bearer <jwt>`. Owns `Authorization`.
    ///
    /// The JWT is a [`Token`](crate::Token), a [`Refreshing`](crate::Refreshing) one, or
    /// [one per subject](crate::PerSubject). SelamAPI needs the key as well: add [`ApiKeyLayer::x_api_key`], outside or
    /// inside of this layer.
    #[must_use]
    pub fn new(jwt: impl Into<JwtProvider>) -> Self {
        Self(policy(Owner::Jwt, CredentialProvider::new(None, Some(jwt.into()))))
    }
}

fn policy(owner: Owner, provider: CredentialProvider) -> Arc<Policy> {
    Arc::new(Policy { owner, provider: Arc::new(provider), settings: Settings::default() })
}

macro_rules! settings {
    ($layer:ident) => {
        impl $layer {
            /// Sets the origins that receive the credentials; `https://api.selamgpt.com` by default.
            #[must_use]
            pub fn with_origins(mut self, origins: Origins) -> Self {
                Arc::make_mut(&mut self.0).settings.origins = origins;
                self
            }

            /// Leaves a request unchanged that brings a header which the layer owns; by default the header is replaced.
            /// Origin and method are checked all the same.
            #[must_use]
            pub fn if_not_present(mut self) -> Self {
                Arc::make_mut(&mut self.0).settings.if_not_present = true;
                self
            }

            /// Refuses a request without a [`RequestAuth`](crate::RequestAuth) extension; by default it is sent with the
            /// layer's own credentials.
            #[must_use]
            pub fn require_request_auth(mut self) -> Self {
                Arc::make_mut(&mut self.0).settings.require_request_auth = true;
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
