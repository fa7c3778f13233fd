//! Limits how many refreshes of a set run at once. The others wait for their turn, first come, first served.

use std::{
    collections::BTreeMap,
    mem,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use super::in_flight::InFlight;

/// The turns of a set's refreshes. A refresh takes a ticket, [enters](Self::enter) and [leaves](Self::leave).
#[derive(Debug)]
pub(super) struct Turns {
    limit: usize,
    next: AtomicU64,
    refreshes: Mutex<Refreshes>,
}

/// By ticket.
#[derive(Debug, Default)]
struct Refreshes {
    running: BTreeMap<u64, InFlight>,
    waiting: BTreeMap<u64, InFlight>,
}

impl Turns {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit: limit.max(1), next: AtomicU64::new(0), refreshes: Mutex::default() }
    }

    pub(super) fn ticket(&self) -> u64 {
        self.next.fetch_add(1, Relaxed)
    }

    /// Queues a refresh, which begins at once if it can, unless it has begun [out of turn](Self::promote) already.
    pub(super) fn enter(&self, ticket: u64, refresh: InFlight) {
        let mut refreshes = self.lock();
        if !refresh.has_begun() {
            refreshes.waiting.insert(ticket, refresh);
        }
        self.begin_next(refreshes);
    }

    /// Removes a refresh that has ended, running or not.
    pub(super) fn leave(&self, ticket: u64) {
        let mut refreshes = self.lock();
        let left = (refreshes.running.remove(&ticket), refreshes.waiting.remove(&ticket));
        self.begin_next(refreshes);
        // Not under the lock: it may hold the last handle of an engine.
        drop(left);
    }

    /// Lets a refresh begin out of turn, because one that runs waits for it. It does not count towards the limit.
    pub(super) fn promote(&self, ticket: u64, refresh: &InFlight) {
        // First, because another thread may be about to queue it.
        refresh.begin();
        let promoted = self.lock().waiting.remove(&ticket);
        drop(promoted);
    }

    /// Abandons the refreshes that should have ended by themselves: their runtime is not driven.
    pub(super) fn abandon_overdue(&self) {
        let mut refreshes = self.lock();
        let (overdue, running) =
            mem::take(&mut refreshes.running).into_iter().partition(|(_, refresh)| refresh.is_overdue());
        refreshes.running = running;
        self.begin_next(refreshes);
        let overdue: BTreeMap<u64, InFlight> = overdue;
        overdue.values().for_each(InFlight::abandon);
    }

    fn begin_next(&self, mut refreshes: MutexGuard<'_, Refreshes>) {
        let mut begin = Vec::new();
        while refreshes.running.len() < self.limit
            && let Some((ticket, refresh)) = refreshes.waiting.pop_first()
        {
            refreshes.running.insert(ticket, refresh.clone());
            begin.push(refresh);
        }
        drop(refreshes);
        begin.iter().for_each(InFlight::begin);
    }

    fn lock(&self) -> MutexGuard<'_, Refreshes> {
        self.refreshes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
