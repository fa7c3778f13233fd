//! Credentials as values: validated on construction, redacted when printed, wiped on drop.

mod api_key;
#[expect(clippy::module_inception, reason = "the trait of that name")]
mod credential;
mod credentials;
pub mod env;
mod key_id;
mod secret;
mod subject;
mod token;

pub use self::{
    api_key::ApiKey,
    credential::Credential,
    credentials::{Credentials, RequestAuth},
    key_id::KeyId,
    subject::Subject,
    token::Token,
};
pub(crate) use self::{
    credentials::{Copies, Form, Kept, Slot, Values},
    key_id::Fingerprint,
    secret::{MIN_SECRET, Secret, text},
};
