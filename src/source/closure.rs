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
/// transient. Map another error type to one of these, with [`permanent`](SourceError::permanent) if a retry cannot help:
///
/// ```
/// use std::{error::Error, fmt};
/// use tower_selam::{Refreshing, Token, source::{Reason, SourceError, source_fn}};
///
/// #[derive(Debug)]
/// struct LoginError;
/// # impl fmt::Display for LoginError {
/// #     fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { f.write_str("the login service is down") }
/// # }
/// # impl Error for LoginError {}
///
/// async fn log_in() -> Result<Token, LoginError> { Err(LoginError) }
///
/// # tokio_test::block_on(async {
/// let jwts = Refreshing::new(source_fn(|_: Reason<Token>| async { log_in().await.map_err(SourceError::transient) }));
/// let error = jwts.token().await.unwrap_err();
/// assert!(error.source().unwrap().is::<LoginError>());
/// # });
/// ```
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
    E: IntoSourceError,
{
    async fn fetch(&self, reason: Reason<C>) -> Result<Fetched<C>, SourceError> {
        (self.fetch)(reason).await.map(Into::into).map_err(Into::into)
    }
}

opaque_debug!(SourceFn<F, C>);

/// An error that the closure of [`source_fn`] may return: whatever is `Into<SourceError>`.
///
/// Implemented for all of them. The trait exists for the compiler message that other error types get.
#[diagnostic::on_unimplemented(
    message = "a source cannot fail with `{Self}`: convert it with `.map_err(SourceError::transient)`",
    label = "not known to be transient or permanent",
    note = "`SourceError::permanent` is for an error after which a retry cannot help; a `BoxError` counts as transient"
)]
pub trait IntoSourceError: Into<SourceError> {}

#[diagnostic::do_not_recommend]
impl<E: Into<SourceError>> IntoSourceError for E {}
