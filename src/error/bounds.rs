//! What the layers ask of a client, so that the compiler says what to do about one that does not have it.
//!
//! Nobody has to implement these traits: what is `Clone`, or `From<AuthError>`, has them.

use crate::AuthError;

/// A client that is `Clone`: a request that waits for a credential, or is sent again, takes a clone of it.
#[diagnostic::on_unimplemented(
    message = "the client `{Self}` is not `Clone`: put it behind tower's `buffer`",
    label = "a request that waits for a credential takes a clone of the client",
    note = "`ServiceBuilder::new().layer(…).buffer(64).service(client)`"
)]
pub trait CloneClient: Clone {}

#[diagnostic::do_not_recommend]
impl<S: Clone> CloneClient for S {}

/// A client's error in which an [`AuthError`] has room: a `BoxError`, [`Error`](crate::Error), or whatever else is
/// `From<AuthError>`.
#[diagnostic::on_unimplemented(
    message = "the client's error `{Self}` has no room for an `AuthError`: make some by `map_err(Error::Inner)`",
    label = "the layer cannot return its own errors as this",
    note = "make room right over the client: `ServiceBuilder::new().layer(…).map_err(tower_selam::Error::Inner)\
            .service(client)`; `SelamLayer` does it by itself",
    note = "or implement `From<tower_selam::AuthError>` for an error of your own"
)]
pub trait FromAuthError: From<AuthError> {}

#[diagnostic::do_not_recommend]
impl<E: From<AuthError>> FromAuthError for E {}
