#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod auth_error;
pub mod authorize;
mod base_url;
mod clock;
mod credentials;
pub mod env;
mod error;
mod handshake;
mod origin;
mod plan;
mod query;
mod scrub;
mod secret;
pub mod selam;
#[cfg(feature = "test-util")]
pub mod simulator;

pub use self::{
    auth_error::{AnnotateAuthErrorLayer, AuthErrorLayer},
    authorize::{ApiKeyLayer, JwtLayer},
    base_url::BaseUrl,
    credentials::{Credentials, RequestAuth},
    error::{AuthError, AuthErrorKind, BoxError, ConfigError, ConfigErrorKind, Error, ErrorBody, RateLimit},
    origin::Origins,
    secret::{ApiKey, KeyId, Token},
    selam::{Selam, SelamLayer, SelamLayerBuilder},
};
