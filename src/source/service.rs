//! [`ServiceSource`]: a Tower service as a [`Source`].

use std::sync::{Mutex, PoisonError};

use tower::{Service, ServiceExt};

use super::{Fetched, Reason, Source, SourceError};
use crate::{credential::Credential, error::BoxError};

/// A [`Source`] backed by a Tower service, so that layers such as a timeout, a limit or a buffer fit around it.
///
/// The request is the [`Reason`], the response a credential or a [`Fetched`].
///
/// ```
/// use std::time::Duration;
/// use tower::{BoxError, ServiceBuilder, service_fn};
/// use tower_selam::{ApiKey, Refreshing, source::{Reason, ServiceSource}};
///
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// let vault = ServiceBuilder::new()
///     .timeout(Duration::from_secs(5))
///     .service_fn(|_: Reason<ApiKey>| async { Ok::<_, BoxError>(ApiKey::new("sk-selam-from-the-vault")?) });
/// let keys = Refreshing::new(ServiceSource::new(vault));
/// assert_eq!(keys.api_key().await?.expose_secret(), "sk-selam-from-the-vault");
/// # Ok::<(), BoxError>(())
/// # }).unwrap();
/// ```
pub struct ServiceSource<S>(Mutex<S>);

impl<S> ServiceSource<S> {
    /// Wraps `service`. Each fetch calls a clone of it.
    pub fn new(service: S) -> Self {
        Self(Mutex::new(service))
    }
}

impl<C, S> Source<C> for ServiceSource<S>
where
    C: Credential,
    S: Service<Reason<C>, Response: Into<Fetched<C>>, Error: Into<BoxError>, Future: Send>,
    S: Clone + Send + 'static,
{
    async fn fetch(&self, reason: Reason<C>) -> Result<Fetched<C>, SourceError> {
        let service = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        service.oneshot(reason).await.map(Into::into).map_err(|error| error.into().into())
    }
}

opaque_debug!(ServiceSource<S>);
