//! Credentials as values: validated on construction, redacted when printed, wiped on drop.

mod api_key;
mod claims;
mod client_secret;
#[expect(clippy::module_inception, reason = "it holds the trait of that name")]
mod credential;
mod credentials;
pub mod env;
mod key_id;
mod request_auth;
mod secret;
mod subject;
mod token;

pub use self::{
    api_key::ApiKey, client_secret::ClientSecret, credential::Credential, credentials::Credentials,
    key_id::KeyId, request_auth::RequestAuth, subject::Subject, token::Token,
};
pub(crate) use self::{
    key_id::Fingerprint,
    secret::{Secret, text},
};
