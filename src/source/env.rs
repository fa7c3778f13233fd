use std::marker::PhantomData;

use super::{Fetched, Reason, Source, SourceError};
use crate::{ApiKey, Token, credential::Credential, env, error::Place};

/// A [`Source`] of an environment variable, read when there is no credential yet and when the one there was
/// rejected.
///
/// A process does not see its variables change from outside; this is for programs that set them themselves.
/// For what never changes, [`ApiKey::from_env`] is enough.
#[derive(Clone, Debug)]
pub struct EnvSource<C> {
    name: String,
    credential: PhantomData<fn() -> C>,
}

impl EnvSource<ApiKey> {
    /// The key in [`SELAM_API_KEY`](env::SELAM_API_KEY).
    #[must_use]
    pub fn api_key() -> Self {
        Self::new(env::SELAM_API_KEY)
    }
}

impl EnvSource<Token> {
    /// The JWT in [`SELAM_JWT`](env::SELAM_JWT).
    #[must_use]
    pub fn jwt() -> Self {
        Self::new(env::SELAM_JWT)
    }
}

impl<C> EnvSource<C> {
    /// The credential in the variable `name`.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), credential: PhantomData }
    }
}

impl<C: Credential> Source<C> for EnvSource<C> {
    async fn fetch(&self, _: Reason<C>) -> Result<Fetched<C>, SourceError> {
        let place = || Place::EnvVar(self.name.clone());
        let value = env::var(&self.name).map_err(|kind| C::refuse(place(), kind))?;
        Ok(Fetched::new(C::parse(value, place())?))
    }
}
