//! What a request was sent with.

use std::sync::Arc;

use http::Response;

use crate::{
    ApiKey, Credentials, KeyId, Token,
    credential::Secret,
    refresh::{Lease, SubjectEngine},
};

/// The credentials that a request was sent with. On a 401 or 403 they are in the response's extensions, for the outer
/// layers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sent {
    pub(crate) api_key: Option<Arc<Lease<ApiKey>>>,
    pub(crate) jwt: Option<Arc<Lease<Token>>>,
    /// Keeps the subject's engine, which the request may have to be replayed with.
    pub(crate) subject: Option<SubjectEngine>,
}

impl Sent {
    /// Adds the credentials to a response. If two layers wrote credentials, the inner one has added its own before.
    #[cold]
    pub(super) fn add_to<B>(self, response: &mut Response<B>) {
        if self.api_key.is_none() && self.jwt.is_none() {
            return;
        }
        let inner = response.extensions_mut().remove::<Self>().unwrap_or_default();
        let sent = Self {
            api_key: inner.api_key.or(self.api_key),
            jwt: inner.jwt.or(self.jwt),
            subject: inner.subject.or(self.subject),
        };
        response.extensions_mut().insert(sent);
    }

    /// The secrets, to mask them in what the API answers.
    pub(crate) fn exposed(&self) -> Vec<&str> {
        self.secrets().map(Secret::expose).collect()
    }

    fn secrets(&self) -> impl Iterator<Item = &Secret> {
        let key = self.api_key.as_ref().map(|key| &key.credential.0);
        key.into_iter().chain(self.jwt.as_ref().map(|jwt| &jwt.credential.0))
    }

    /// The ids of the key and of the token.
    pub(crate) fn ids(&self) -> [Option<KeyId>; 2] {
        [
            self.api_key.as_ref().map(|key| key.credential.id()),
            self.jwt.as_ref().map(|jwt| jwt.credential.id()),
        ]
    }
}

impl From<&Credentials> for Sent {
    fn from(credentials: &Credentials) -> Self {
        let api_key = Some(Lease::fixed(credentials.api_key().clone()));
        Self { api_key, jwt: credentials.jwt().cloned().map(Lease::fixed), subject: None }
    }
}
