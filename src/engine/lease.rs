//! What requests read without a lock.

use crate::{
    clock::Deadline,
    sync::{ArcSwapOption, AtomicU64, Ordering},
};

/// A value that may be used without asking until a deadline.
#[derive(Clone, Debug)]
pub(crate) struct Lease<V> {
    pub(crate) value: V,
    pub(crate) until: Deadline,
}

/// Tells one state of a [`Published`] from the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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

    /// First the lease, then the epoch: who has read an epoch has not seen a lease older than it.
    pub(crate) fn store(&self, lease: Option<Lease<V>>) {
        self.lease.store(lease.map(Into::into));
        self.epoch.fetch_add(1, Ordering::Release);
    }

    #[inline]
    pub(crate) fn epoch(&self) -> Epoch {
        Epoch(self.epoch.load(Ordering::Acquire))
    }
}
