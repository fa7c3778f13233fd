//! What happens that nobody is told of by a result: events of `tracing`, with the feature of that name.
//!
//! The target is `tower_selam`, and no field holds a secret.

use std::error::Error;

#[cfg(feature = "tracing")]
use crate::error::Redactor;
use crate::oauth::RefreshToken;

/// A store of refresh tokens has failed: `error`, and the `id` of the token.
#[cfg(feature = "tracing")]
#[cold]
pub(crate) fn refresh_token_not_saved(token: &RefreshToken, error: &dyn Error) {
    let redactor = Redactor::masking([token.expose_secret()]);
    let mut said = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        said = format!("{said}: {error}");
        cause = error.source();
    }
    tracing::warn!(
        target: "tower_selam",
        id = %token.id(),
        error = redactor.text(said),
        "the new refresh token was not saved and is kept in memory alone",
    );
}

#[cfg(not(feature = "tracing"))]
#[inline]
pub(crate) fn refresh_token_not_saved(_: &RefreshToken, _: &dyn Error) {}
