//! [`Error`], which pairs an [`AuthError`] with the client's own error, and what the layers ask of clients:
//! [`FromAuthError`], [`CloneClient`] and [`HttpClient`].

use std::{error::Error as StdError, fmt};

use http::Request;
use tower::Service;

use super::{AuthError, BoxError};

/// Either the client's own error or an [`AuthError`], for clients with a concrete error type.
///
/// The layers keep the inner service's error type, which must be `From<AuthError>`. `BoxError` already is; wrap
/// any other type with Tower's `map_err`:
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
/// match service.oneshot(Request::post("http://api.selamgpt.com/v1/chat/completions").body(()).unwrap()).await {
///     Err(Error::Auth(error)) => assert_eq!(error.kind(), AuthErrorKind::OriginNotAllowed),
///     other => panic!("{other:?}"),
/// }
/// # });
/// ```
///
/// [`SelamLayer`](crate::SelamLayer) wraps the client's error itself.
///
/// There will be no third variant: match on both.
#[derive(Clone, Debug)]
pub enum Error<E> {
    /// The API answered 401 or 403, or the request was never sent.
    Auth(AuthError),
    /// The client's own error.
    Inner(E),
}

impl<E> Error<E> {
    /// Returns the [`AuthError`], if this is one.
    pub fn auth(&self) -> Option<&AuthError> {
        match self {
            Self::Auth(error) => Some(error),
            Self::Inner(_) => None,
        }
    }

    /// Boxes the contained error, without this wrapper. [`AuthError::find`] finds an `AuthError` in it.
    ///
    /// For stacks whose error is `BoxError` anyway, such as under `tower::buffer`: `map_err(Error::into_boxed)`.
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

/// Shows one level only; the contained error is the [`source`](StdError::source).
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

/// A client error that can hold an [`AuthError`]: `BoxError`, [`Error`], or any other type that is
/// `From<AuthError>`.
///
/// Implemented for all of them. The trait exists for the compiler message that other error types get.
#[diagnostic::on_unimplemented(
    message = "the client's error `{Self}` cannot hold an `AuthError`: wrap it with `map_err(Error::Inner)`",
    label = "the layer cannot return its own errors as this type",
    note = "wrap it directly above the client: `ServiceBuilder::new().layer(…).map_err(tower_selam::Error::Inner)\
            .service(client)`; `SelamLayer` does this itself",
    note = "or implement `From<tower_selam::AuthError>` for your own error type"
)]
pub trait FromAuthError: From<AuthError> {}

#[diagnostic::do_not_recommend]
impl<E: From<AuthError>> FromAuthError for E {}

/// A client that is `Clone`, which the layers need for requests that wait for a credential or are replayed.
///
/// Implemented for every `Clone` type. The trait exists for the compiler message that a client without `Clone` gets.
#[diagnostic::on_unimplemented(
    message = "the client `{Self}` is not `Clone`: wrap it in tower's `buffer`",
    label = "a request that waits for a credential or is replayed needs a clone of the client",
    note = "`ServiceBuilder::new().layer(…).buffer(64).service(client)`"
)]
pub trait CloneClient: Clone {}

#[diagnostic::do_not_recommend]
impl<S: Clone> CloneClient for S {}

/// A client that takes requests of the `http` crate with the body `B`.
///
/// Implemented for every `tower::Service<http::Request<B>>`. The trait exists for the compiler message that other clients
/// get.
#[diagnostic::on_unimplemented(
    message = "the client `{Self}` takes no `http::Request<{B}>`",
    label = "the layers need a `tower::Service` that takes this request",
    note = "for reqwest: `tower_selam::adapter::reqwest::Client::new(layer, reqwest::Client::builder())`",
    note = "any other client must take the body that the requests have"
)]
pub trait HttpClient<B>: Service<Request<B>> {}

#[diagnostic::do_not_recommend]
impl<S: Service<Request<B>>, B> HttpClient<B> for S {}
