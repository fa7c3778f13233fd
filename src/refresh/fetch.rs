//! One call of a source: bounded in time, guarded against panics, and its failures put into words.

use std::{
    future::poll_fn,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::pin,
    task::Poll,
    time::Duration,
};

use super::{schedule::Unusable, state::RefreshFailure};
use crate::{
    AuthError, AuthErrorKind,
    credential::Credential,
    source::{DynSource, Fetched, Reason, SourceError},
    telemetry::event::RefreshOutcome,
    util::{
        clock::Countdown,
        timer::{TimeoutError, timeout},
    },
};

/// Why a source fetched nothing.
pub(super) struct Failed {
    pub(super) how: RefreshOutcome,
    pub(super) error: SourceError,
}

impl From<SourceError> for Failed {
    fn from(error: SourceError) -> Self {
        let how = if error.is_permanent() { RefreshOutcome::Rejected } else { RefreshOutcome::Failed };
        Self { how, error }
    }
}

/// Asks the source, for at most `limit`, and catches panics where they unwind.
pub(super) async fn fetch<C: Credential>(
    source: &dyn DynSource<C>,
    reason: Reason<C>,
    limit: Duration,
) -> Result<Fetched<C>, Failed> {
    let fetching = async { source.fetch(reason).await };
    let mut fetching = pin!(fetching);
    let guarded = poll_fn(|cx| {
        let Ok(polled) = catch_unwind(AssertUnwindSafe(|| fetching.as_mut().poll(cx))) else {
            // The panic's payload may contain a secret.
            let error = SourceError::transient("the source panicked");
            return Poll::Ready(Err(Failed { how: RefreshOutcome::Panicked, error }));
        };
        polled.map_err(Failed::from)
    });
    timeout(limit, guarded).await.unwrap_or_else(|error| match error {
        TimeoutError::NoTimers => Err(SourceError::transient(error).into()),
        TimeoutError::Elapsed => {
            let error = SourceError::transient(format!("the source did not answer within {limit:?}"));
            Err(Failed { how: RefreshOutcome::TimedOut, error })
        }
    })
}

/// The error that all waiters of a failed refresh share.
pub(super) fn describe(
    failure: RefreshFailure,
    next_attempt: Countdown,
    cause: Option<SourceError>,
) -> AuthError {
    let permanent = cause.as_ref().is_some_and(SourceError::is_permanent);
    let kind = if permanent { AuthErrorKind::RefreshRejected } else { AuthErrorKind::RefreshFailed };
    let detail = match failure {
        RefreshFailure::Source => "the source failed",
        RefreshFailure::Aborted => "the task was dropped, as happens when a runtime shuts down",
        RefreshFailure::Unusable(Unusable::Expired) => {
            "the source returned an expired credential; if it is new, this machine's clock is ahead"
        }
        RefreshFailure::Unusable(Unusable::NoExpiry) => "the source returned a token without an expiry",
        RefreshFailure::Older => "the source returned a token that expires sooner than the current one",
        RefreshFailure::Stale => "the source returned a token that is about to expire",
    };
    let next_attempt = (!permanent).then_some(next_attempt);
    AuthError::refresh_failure(kind, detail, next_attempt, cause.map(SourceError::into_cause))
}
