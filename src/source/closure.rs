//! [`source_fn`]: an async closure as a [`Source`].

use std::marker::PhantomData;

use super::{Fetched, Reason, Source, SourceError};
use crate::credential::Credential;

/// A [`Source`] backed by an async closure, made by [`source_fn`].
pub struct SourceFn<F, C> {
    fetch: F,
    credential: PhantomData<fn() -> C>,
}

/// Turns an async closure into a [`Source`]. See the [module docs](super) for an example.
///
/// The closure returns an [`ApiKey`](crate::ApiKey), a [`Token`](crate::Token), or a [`Fetched`] that also
/// carries a lifetime. Its error is a [`SourceError`], or a [`BoxError`](crate::BoxError), which counts as
/// transient.
pub fn source_fn<C, F, R>(fetch: F) -> SourceFn<F, C>
where
    F: Fn(Reason<C>) -> R,
{
    SourceFn { fetch, credential: PhantomData }
}

impl<C, F, R, T, E> Source<C> for SourceFn<F, C>
where
    C: Credential,
    F: Fn(Reason<C>) -> R + Send + Sync + 'static,
    R: Future<Output = Result<T, E>> + Send + 'static,
    T: Into<Fetched<C>>,
    E: Into<SourceError>,
{
    async fn fetch(&self, reason: Reason<C>) -> Result<Fetched<C>, SourceError> {
        (self.fetch)(reason).await.map(Into::into).map_err(Into::into)
    }
}

opaque_debug!(SourceFn<F, C>);
