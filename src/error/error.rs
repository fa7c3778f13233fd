use std::{error::Error as StdError, fmt};

use super::{AuthError, BoxError};

/// Either the client's own error or an [`AuthError`], for clients with a concrete error type.
///
/// The layers keep the error type of the service within, which must be `From<AuthError>`. `BoxError` is;
/// for any other, wrap it first with Tower's `map_err`:
///
/// ```
/// use std::io;
/// use http::{Request, Response};
/// use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
/// use tower_selam::{ApiKey, ApiKeyLayer, AuthErrorKind, Error};
///
/// # tokio_test::block_on(async {
/// let client = service_fn(|_: Request<()>| async { Ok::<_, io::Error>(Response::new(())) });
/// let service = ServiceBuilder::new()
///     .layer(ApiKeyLayer::bearer(ApiKey::new("sk-selam-example").unwrap()))
///     .map_err(Error::Inner)
///     .service(client);
///
/// match service.oneshot(Request::get("http://api.selamgpt.com/v1/models").body(()).unwrap()).await {
///     Err(Error::Auth(error)) => assert_eq!(error.kind(), AuthErrorKind::OriginNotAllowed),
///     other => panic!("{other:?}"),
/// }
/// # });
/// ```
///
/// [`SelamLayer`](crate::SelamLayer) does that by itself.
///
/// There will be no third variant: match on both.
#[derive(Clone, Debug)]
pub enum Error<E> {
    /// The request was refused by the API or not sent at all.
    Auth(AuthError),
    /// The client's own error.
    Inner(E),
}

impl<E> Error<E> {
    /// The [`AuthError`], when it is one.
    pub fn auth(&self) -> Option<&AuthError> {
        match self {
            Self::Auth(error) => Some(error),
            Self::Inner(_) => None,
        }
    }

    /// The error within, boxed; [`AuthError::find`] finds ours in it.
    ///
    /// For stacks whose error is `BoxError` anyway, as `tower::buffer` makes it: `map_err(Error::into_boxed)`.
    pub fn into_boxed(self) -> BoxError
    where
        E: Into<BoxError>,
    {
        match self {
            Self::Auth(error) => error.into(),
            Self::Inner(error) => error.into(),
        }
    }
}

impl<E> From<AuthError> for Error<E> {
    fn from(error: AuthError) -> Self {
        Self::Auth(error)
    }
}

/// One level of the story; the error within is the [`source`](StdError::source).
impl<E> fmt::Display for Error<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auth(_) => "request not authenticated",
            Self::Inner(_) => "request failed",
        })
    }
}

impl<E: StdError + 'static> StdError for Error<E> {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(match self {
            Self::Auth(error) => error,
            Self::Inner(error) => error,
        })
    }
}
