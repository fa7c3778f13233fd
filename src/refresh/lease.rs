//! What requests read without a lock.

use std::sync::Arc;

use crate::{
    util::clock::Deadline,
    util::sync::{ArcSwapOption, AtomicU64, Ordering},
};

/// A value that may be used without asking until a deadline.
#[derive(Clone, Debug)]
pub(crate) struct Lease<V> {
    pub(crate) value: V,
    pub(crate) until: Deadline,
    /// The one it was published in.
    pub(crate) epoch: Epoch,
}

/// Tells one state of a [`Published`] from the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd)]
pub(crate) struct Epoch(u64);

/// The lease that is in force. Written under the engine's lock, read without one.
#[derive(Debug)]
pub(crate) struct Published<V> {
    lease: ArcSwapOption<Lease<V>>,
    epoch: AtomicU64,
}

impl<V> Published<V> {
    pub(crate) fn new() -> Self {
        Self { lease: ArcSwapOption::empty(), epoch: AtomicU64::new(0) }
    }

    #[inline]
    pub(crate) fn load<T>(&self, read: impl FnOnce(&Lease<V>) -> Option<T>) -> Option<T> {
        self.lease.load().as_deref().and_then(read)
    }

    /// First the epoch, then the lease: who has seen a lease does not see the epoch before its own.
    pub(crate) fn store(&self, lease: Option<(V, Deadline)>) {
        let epoch = Epoch(self.epoch.fetch_add(1, Ordering::Relaxed) + 1);
        self.lease.store(lease.map(|(value, until)| Arc::new(Lease { value, until, epoch })));
    }

    /// Puts nothing in order: the lease does, which is released and acquired.
    #[inline]
    pub(crate) fn epoch(&self) -> Epoch {
        Epoch(self.epoch.load(Ordering::Relaxed))
    }
}
