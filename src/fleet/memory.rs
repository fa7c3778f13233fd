//! [`MemoryStore`]: a fleet within one process.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::{Entry, FleetStore, Put, Revision, Write};
use crate::{
    error::BoxError,
    util::clock::{Clock, Deadline, Time},
};

/// A [`FleetStore`] in memory, for tests and for several stacks in one process. Clones share their entries.
///
/// ```
/// use tower_selam::{BoxError, Refreshing, Token, fleet::{Fleet, MemoryStore, SealingKey}};
/// use tower_selam::source::{Reason, source_fn};
///
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// # let issue = |_: Reason<Token>| async { Ok::<_, BoxError>(Token::new(format!("token-{}", fastrand::u64(..)))?) };
/// let store = MemoryStore::default();
/// let member = || -> Result<_, BoxError> {
///     let fleet = Fleet::new("billing", store.clone(), SealingKey::new([7; 32]))?;
///     Ok(Refreshing::new(fleet.share("selam", source_fn(issue))))
/// };
/// let (first, second) = (member()?, member()?);
/// assert_eq!(first.token().await?.id(), second.token().await?.id());
/// # Ok::<(), BoxError>(())
/// # }).unwrap();
/// ```
#[derive(Clone, Default)]
pub struct MemoryStore(Arc<Mutex<HashMap<String, Stored>>>);

struct Stored {
    revision: Revision,
    value: Vec<u8>,
    written: Time,
    expires: Option<Deadline>,
}

impl MemoryStore {
    /// Removes all entries, as a restart of a server without persistence does.
    pub fn clear(&self) {
        self.entries().clear();
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<String, Stored>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns what stands under `key`, after removing it if its time is over.
fn find(entries: &mut HashMap<String, Stored>, key: &str, now: Time) -> Option<Entry> {
    if entries.get(key)?.expires.is_some_and(|expires| expires.has_come(now)) {
        entries.remove(key);
    }
    let Stored { revision, value, written, .. } = entries.get(key)?;
    let age = now.since(*written).saturating_add(now.unseen_since(*written));
    Some(Entry { revision: *revision, value: value.clone(), age })
}

impl FleetStore for MemoryStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>, BoxError> {
        Ok(find(&mut self.entries(), key, Clock::default().now()))
    }

    async fn put(&self, key: &str, write: Write<'_>) -> Result<Put, BoxError> {
        let (mut entries, now) = (self.entries(), Clock::default().now());
        let found = find(&mut entries, key, now);
        if found.as_ref().map(|entry| entry.revision) != write.expected {
            return Ok(Put::Conflict(found));
        }
        let expires = write.keep.map(|keep: Duration| now.after(keep));
        let stored = Stored { revision: write.revision, value: write.value.to_vec(), written: now, expires };
        entries.insert(key.to_owned(), stored);
        Ok(Put::Done)
    }
}

opaque_debug!(MemoryStore);
