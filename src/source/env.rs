//! [`EnvSource`]: a credential from an environment variable.

use std::marker::PhantomData;

use super::{Fetched, Reason, Source, SourceError};
use crate::credential::{ApiKey, Credential, Secret, Token, env};

/// A [`Source`] that reads an environment variable: for the first credential, and again when the API rejects
/// it.
///
/// The environment of a running process cannot be changed from outside, so this is for programs that set the
/// variable themselves. For a value that never changes, [`ApiKey::from_env`] is enough.
#[derive(Clone, Debug)]
pub struct EnvSource<C> {
    name: String,
    credential: PhantomData<fn() -> C>,
}

impl EnvSource<ApiKey> {
    /// Reads the key from [`SELAM_API_KEY`](env::SELAM_API_KEY).
    #[must_use]
    pub fn api_key() -> Self {
        Self::new(env::SELAM_API_KEY)
    }
}

impl EnvSource<Token> {
    /// Reads the JWT from [`SELAM_JWT`](env::SELAM_JWT).
    #[must_use]
    pub fn jwt() -> Self {
        Self::new(env::SELAM_JWT)
    }
}

impl<C> EnvSource<C> {
    /// Reads the credential from the variable `name`.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), credential: PhantomData }
    }
}

impl<C: Credential> Source<C> for EnvSource<C> {
    async fn fetch(&self, _: Reason<C>) -> Result<Fetched<C>, SourceError> {
        let secret = Secret::from_env_var(&self.name, C::SETTING)?;
        Ok(Fetched::new(C::from_secret(secret)))
    }
}
