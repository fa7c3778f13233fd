//! Detects a source that waits for the very credential it is asked to fetch.

use std::sync::Arc;

use crate::{AuthError, AuthErrorKind, util::sync::task_local};

const OWN_SOURCE: &str = "the source of this credential waits for the credential itself; have it send its \
     requests with `RequestAuth::Anonymous` or `RequestAuth::ApiKey`";

task_local! {
    /// The refreshes that the current task is part of.
    static REFRESHING: Arc<Refreshes>;
}

/// An engine that is being refreshed, and the engines whose sources asked it for a credential.
#[derive(Debug)]
struct Refreshes {
    engine: usize,
    /// The address of the `Turns` that the refresh is one of, or zero.
    turns: usize,
    on_behalf_of: Option<Arc<Self>>,
}

impl Refreshes {
    fn contain(&self, engine: usize) -> bool {
        self.engine == engine || self.on_behalf_of.as_ref().is_some_and(|outer| outer.contain(engine))
    }

    fn are_among(&self, turns: usize) -> bool {
        self.turns == turns || self.on_behalf_of.as_ref().is_some_and(|outer| outer.are_among(turns))
    }
}

/// Marks `task` as the refresh of `engine`, an address; `turns` is the address of the turns that it takes one of, or zero.
pub(super) fn refresh_of<F: Future>(engine: usize, turns: usize, task: F) -> impl Future<Output = F::Output> {
    let on_behalf_of = REFRESHING.try_with(Arc::clone).ok();
    REFRESHING.scope(Arc::new(Refreshes { engine, turns, on_behalf_of }), task)
}

/// Whether the current task is part of a refresh that may have taken one of the `turns`, an address.
pub(super) fn has_taken_turn(turns: usize) -> bool {
    REFRESHING.try_with(|refreshes| refreshes.are_among(turns)).unwrap_or(false)
}

/// Whether the current task is part of a refresh of `engine`: waiting for that refresh would never end.
pub(super) fn is_own_refresh(engine: usize) -> bool {
    REFRESHING.try_with(|refreshes| refreshes.contain(engine)).unwrap_or(false)
}

#[cold]
pub(super) fn own_source() -> AuthError {
    AuthError::refresh_failure(AuthErrorKind::RefreshFailed, OWN_SOURCE, None, None)
}

/// Marks `task`, which is about to be spawned, as part of the refreshes that the current task is part of.
pub(crate) fn on_behalf<F: Future>(task: F) -> impl Future<Output = F::Output> {
    let refreshes = REFRESHING.try_with(Arc::clone).ok();
    async move {
        match refreshes {
            Some(refreshes) => REFRESHING.scope(refreshes, task).await,
            None => task.await,
        }
    }
}
