//! What is kept of a request while it is sent, to replay it.

use std::sync::{Arc, Mutex, PoisonError};

use super::head::Head;
use crate::util::per_thread::CacheAligned;

/// What it takes to send a request again.
pub(super) struct Captured<S, B> {
    pub(super) head: Head,
    pub(super) body: B,
    pub(super) spare: Spare<S>,
}

/// A clone of the inner service, for requests that are replayed. Requests share it, because most never need it, and a
/// clone for each would be contended: it counts references to the client's pool and to the layers' configuration. Two threads
/// serve 2.0 times as many requests as one with it, and 1.8 times without (`benches/contention.rs`, on an empty client).
pub(super) struct Spare<S>(Arc<CacheAligned<Mutex<S>>>);

impl<S: Clone> Spare<S> {
    pub(super) fn new(service: &S) -> Self {
        Self(Arc::new(CacheAligned(Mutex::new(service.clone()))))
    }

    /// A service to replay a request with.
    pub(super) fn service(&self) -> S {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl<S> Clone for Spare<S> {
    #[inline]
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}
