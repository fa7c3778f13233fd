//! [`Line`]: one member's connection to a store, which can fail.

use std::{
    future::pending,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::time::sleep;
use tower_selam::{
    BoxError,
    fleet::{Entry, FleetStore, MemoryStore, Put, Revision, Write},
};

/// What happens to calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum State {
    #[default]
    Up,
    /// They fail at once, and have no effect.
    Down,
    /// They are never answered, and have no effect.
    Silent,
    /// Writes have their effect and fail, until they are repeated.
    DropsReplies,
    /// Every other call has its effect, and is answered too late.
    Slow,
    /// Entries arrive with a changed bit.
    Corrupts,
}

/// One member's connection to a store.
#[derive(Clone)]
pub(crate) struct Line {
    store: MemoryStore,
    pub(crate) shared: Arc<Mutex<Shared>>,
}

#[derive(Default)]
pub(crate) struct Shared {
    state: State,
    calls: usize,
    news: usize,
    written: Vec<Vec<u8>>,
    /// The revision of the last write.
    last: Option<Revision>,
}

impl Line {
    pub(crate) fn new(store: &MemoryStore) -> Self {
        Self { store: store.clone(), shared: Arc::default() }
    }

    pub(crate) fn set(&self, state: State) {
        self.shared.lock().unwrap().state = state;
    }

    pub(crate) fn calls(&self) -> usize {
        self.shared.lock().unwrap().calls
    }

    /// Without those of the task that reads the news.
    pub(crate) fn calls_but_news(&self) -> usize {
        let shared = self.shared.lock().unwrap();
        shared.calls - shared.news
    }

    /// All keys and values that were written.
    pub(crate) fn written(&self) -> Vec<Vec<u8>> {
        self.shared.lock().unwrap().written.clone()
    }

    fn corrupt(&self, mut entry: Entry) -> Entry {
        if self.shared.lock().unwrap().state == State::Corrupts {
            *entry.value.last_mut().unwrap() ^= 1;
        }
        entry
    }

    async fn through<T>(
        &self,
        key: &str,
        call: impl Future<Output = Result<T, BoxError>>,
    ) -> Result<T, BoxError> {
        let (state, number) = {
            let mut shared = self.shared.lock().unwrap();
            shared.calls += 1;
            shared.news += usize::from(key.ends_with(":news"));
            (shared.state, shared.calls)
        };
        match state {
            State::Down => return Err("the store is down".into()),
            State::Silent => return pending().await,
            State::Up | State::DropsReplies | State::Slow | State::Corrupts => {}
        }
        let result = call.await;
        match state {
            State::Slow if number % 2 == 0 => {
                sleep(Duration::from_secs(1)).await;
                result
            }
            _ => result,
        }
    }
}

impl FleetStore for Line {
    async fn get(&self, key: &str) -> Result<Option<Entry>, BoxError> {
        let entry = self.through(key, self.store.get(key)).await?;
        Ok(entry.map(|entry| self.corrupt(entry)))
    }

    async fn put(&self, key: &str, write: Write<'_>) -> Result<Put, BoxError> {
        let is_repeated = {
            let mut shared = self.shared.lock().unwrap();
            shared.written.extend([key.as_bytes().to_vec(), write.value.to_vec()]);
            shared.last.replace(write.revision) == Some(write.revision)
        };
        let put = self.put_through(key, write).await?;
        if !is_repeated && self.shared.lock().unwrap().state == State::DropsReplies {
            return Err("the reply was lost".into());
        }
        Ok(put)
    }
}

impl Line {
    async fn put_through(&self, key: &str, write: Write<'_>) -> Result<Put, BoxError> {
        Ok(match self.through(key, self.store.put(key, write)).await? {
            Put::Conflict(Some(entry)) => Put::Conflict(Some(self.corrupt(entry))),
            put => put,
        })
    }
}
