//! The published credential: what requests read without a lock.

use std::sync::{Arc, Weak};

use super::{Rejection, in_flight::InFlight};
use crate::{
    credential::{Credential, Fingerprint},
    util::{
        clock::{Deadline, Time},
        per_thread::{Unshare, Unshared},
        sync::ArcSwapOption,
    },
};

/// A credential that requests are sent with, and the engine to be told when the API rejects it.
#[derive(Debug)]
pub(crate) struct Lease<C: Credential> {
    pub(crate) credential: C,
    /// `None` for a fixed credential. Weak: requests under way do not keep an engine alive.
    engine: Option<Weak<dyn Engine>>,
}

/// An engine, whichever credential it holds: what a 401 or an accepted replay is reported to.
pub(crate) trait Engine: Send + Sync {
    /// Records that the API rejected a credential. Returns the refresh to wait for, if there is one.
    fn report_rejected(self: Arc<Self>, rejected: Fingerprint) -> (Rejection, Option<InFlight>);

    /// Records that the API accepted the credential that replaced `rejected`.
    fn report_accepted(&self, rejected: Fingerprint);

    /// Whether there is another credential than `rejected`.
    fn has_replaced(&self, rejected: Fingerprint) -> bool;
}

impl<C: Credential> Lease<C> {
    pub(crate) fn fixed(credential: C) -> Arc<Self> {
        Arc::new(Self { credential, engine: None })
    }

    pub(super) fn of_engine(credential: C, engine: Weak<dyn Engine>) -> Arc<Self> {
        Arc::new(Self { credential, engine: Some(engine) })
    }

    /// The engine to report to; `None` for a fixed credential, or after the engine's last handle was dropped.
    pub(crate) fn engine(&self) -> Option<Arc<dyn Engine>> {
        self.engine.as_ref()?.upgrade()
    }

    pub(crate) fn fingerprint(&self) -> Fingerprint {
        self.credential.secret().fingerprint()
    }
}

impl<C: Credential> Unshare for Arc<Lease<C>> {
    fn unshare(&self) -> Self {
        let Lease { credential, engine } = &**self;
        Self::new(Lease { credential: credential.unshare(), engine: engine.clone() })
    }
}

/// The lease in force. The driver writes it under its lock; requests read it without one.
pub(super) struct Publication<C: Credential>(ArcSwapOption<Published<C>>);

struct Published<C: Credential> {
    lease: Unshared<Arc<Lease<C>>>,
    until: Deadline,
}

impl<C: Credential> Published<C> {
    fn fingerprint(&self) -> Fingerprint {
        self.lease.original().fingerprint()
    }
}

impl<C: Credential> Publication<C> {
    pub(super) fn empty() -> Self {
        Self(ArcSwapOption::empty())
    }

    /// The lease, if it may be used without asking the engine.
    #[inline]
    pub(super) fn get(&self, now: impl FnOnce() -> Time) -> Option<Arc<Lease<C>>> {
        let published = self.0.load();
        let published = published.as_ref().filter(|published| !published.until.has_come(now()))?;
        Some(Arc::clone(published.lease.local()))
    }

    /// The credential that is published, in force or not.
    pub(super) fn published(&self) -> Option<Fingerprint> {
        Some(self.0.load().as_deref()?.fingerprint())
    }

    /// What was stored last, for the driver, which stores under its lock.
    pub(super) fn stored(&self) -> Option<(Fingerprint, Deadline)> {
        let stored = self.0.load_full()?;
        Some((stored.fingerprint(), stored.until))
    }

    /// `is_shared`: whether many threads will read it.
    pub(super) fn store(&self, lease: Option<(Arc<Lease<C>>, Deadline)>, is_shared: bool) {
        self.0.store(lease.map(|(lease, until)| {
            let lease = if is_shared { Unshared::per_thread(lease) } else { Unshared::single(lease) };
            Arc::new(Published { lease, until })
        }));
    }
}
