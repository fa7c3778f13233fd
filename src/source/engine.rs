//! [`EngineHandle`]: the engine, as its source sees it.

use std::{
    fmt,
    sync::{Arc, Weak},
};

#[cfg(feature = "fleet")]
use super::Fetched;
use crate::credential::{Credential, Fingerprint};

/// A handle with which a source reaches the engine that calls it; see [`Source::attach`](super::Source::attach). Keeps no
/// engine alive.
pub struct EngineHandle<C: Credential>(Weak<dyn AskingEngine<C>>);

impl<C: Credential> EngineHandle<C> {
    pub(crate) fn new(engine: Weak<dyn AskingEngine<C>>) -> Self {
        Self(engine)
    }

    /// Withdraws a credential: if it is the current one, no further request is sent with it, and the next request
    /// waits for the source.
    ///
    /// Unlike [`Refreshing::rejected`](crate::Refreshing::rejected), which reports an API's answer, this leaves no doubt.
    pub fn withdraw(&self, credential: &C) {
        let fingerprint = credential.secret().fingerprint();
        self.withdraw_if(|current| current == fingerprint);
    }

    /// Withdraws the current credential if `ended` says so of its fingerprint.
    pub(crate) fn withdraw_if(&self, ended: impl FnOnce(Fingerprint) -> bool) {
        if let Some(engine) = self.0.upgrade()
            && let Some(current) = engine.fingerprint()
            && ended(current)
        {
            engine.withdraw(current);
        }
    }

    /// Whether the engine would use this credential without asking for the next one at once. `None` if it has ended.
    #[cfg(feature = "fleet")]
    pub(crate) fn would_keep(&self, fetched: Fetched<C>) -> Option<bool> {
        self.0.upgrade().map(|engine| engine.would_keep(fetched))
    }

    /// Whether anybody can still ask the engine.
    pub(crate) fn is_alive(&self) -> bool {
        self.0.strong_count() > 0
    }
}

impl<C: Credential> Clone for EngineHandle<C> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<C: Credential> fmt::Debug for EngineHandle<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EngineHandle").field("is_alive", &self.is_alive()).finish()
    }
}

/// What an engine offers its source.
pub(crate) trait AskingEngine<C: Credential>: Send + Sync {
    /// The current credential's fingerprint.
    fn fingerprint(&self) -> Option<Fingerprint>;

    /// Drops the credential with this fingerprint.
    fn withdraw(self: Arc<Self>, fingerprint: Fingerprint);

    /// Whether the engine would keep this credential, rather than refresh it at once.
    #[cfg(feature = "fleet")]
    fn would_keep(&self, fetched: Fetched<C>) -> bool;
}
