//! [`Client`]: sealed reads and writes, bounded in time, and given up for a while when the store fails.

use std::{
    error::Error,
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use zeroize::Zeroizing;

use super::{
    Entry, Put, Revision, Write,
    seal::{SealError, SealingKeys, random},
    store::DynFleetStore,
};
use crate::{
    error::BoxError,
    telemetry::event::{self, StoreCall},
    util::{
        clock::{Clock, Deadline},
        timer::timeout,
    },
};

/// After so many failed calls in a row, there is one call per [`PAUSE`].
const MAX_FAILURES: u32 = 3;

/// No longer, so that logins work again as soon as the store does. A member calls a healthy store as often.
const PAUSE: Duration = Duration::from_secs(1);

/// The store of a fleet, as its members use it.
pub(super) struct Client {
    store: Box<dyn DynFleetStore>,
    pub(super) keys: SealingKeys,
    pub(super) patience: Duration,
    /// One for each kind of call: a store may answer reads and fail writes.
    breakers: Mutex<[Breaker; 2]>,
}

/// Stops calls to a store that fails, except for one at a time that finds out whether it is back.
#[derive(Clone, Copy, Default)]
struct Breaker {
    failures: u32,
    open_until: Option<Deadline>,
}

/// An entry whose seal was checked.
pub(super) struct Opened {
    pub(super) revision: Revision,
    pub(super) age: Duration,
    pub(super) content: Result<Zeroizing<Vec<u8>>, SealError>,
    /// Whether a former key sealed it.
    pub(super) is_former: bool,
}

/// What became of a write.
pub(super) enum Written {
    Done(Revision),
    Conflict(Option<Opened>),
}

/// The store cannot be used now.
#[derive(Debug)]
pub(super) struct Unavailable {
    /// `None` if it was not asked, because it failed before.
    cause: Option<BoxError>,
    pub(super) retry_after: Duration,
}

impl Client {
    pub(super) fn new(store: Box<dyn DynFleetStore>, keys: SealingKeys, patience: Duration) -> Self {
        Self { store, keys, patience, breakers: Mutex::default() }
    }

    pub(super) async fn get(&self, key: &str) -> Result<Option<Opened>, Unavailable> {
        let entry = self.call(StoreCall::Get, false, || self.store.get(key)).await?;
        Ok(entry.map(|entry| self.open(key, entry)))
    }

    /// Writes if the store still holds the revision `expected`. `insists` calls the store also if it has failed before.
    pub(super) async fn put(
        &self,
        key: &str,
        expected: Option<Revision>,
        record: &[u8],
        keep: Option<Duration>,
        insists: bool,
    ) -> Result<Written, Unavailable> {
        let sealed = random().and_then(|bytes| Ok((bytes, self.keys.seal(key.as_bytes(), record)?)));
        let (revision, value) = match sealed {
            Ok((bytes, value)) => (Revision::from_bytes(bytes), value),
            Err(error) => return Err(Unavailable { cause: Some(error.into()), retry_after: PAUSE }),
        };
        let write = Write { expected, revision, value: &value, keep };
        Ok(match self.call(StoreCall::Put, insists, || self.store.put(key, write)).await? {
            Put::Done => Written::Done(revision),
            // The reply to the first attempt was lost.
            Put::Conflict(Some(entry)) if entry.revision == revision => Written::Done(revision),
            Put::Conflict(entry) => Written::Conflict(entry.map(|entry| self.open(key, entry))),
        })
    }

    fn open(&self, key: &str, Entry { revision, value, age }: Entry) -> Opened {
        let (content, is_former) = (self.keys.open(key.as_bytes(), &value), self.keys.is_former(&value));
        Opened { revision, age, content, is_former }
    }

    /// Calls the store, and once more if that fails: a connection may have died unnoticed, or a packet was lost.
    async fn call<T, F>(
        &self,
        call: StoreCall,
        insists: bool,
        mut start: impl FnMut() -> F,
    ) -> Result<T, Unavailable>
    where
        F: Future<Output = Result<T, BoxError>>,
    {
        if !insists {
            self.may_call(call)?;
        }
        let mut result = timeout(self.patience, start()).await;
        if !matches!(result, Ok(Ok(_))) {
            result = timeout(self.patience, start()).await;
        }
        event::fleet_store_called(call, result.as_ref().is_ok_and(Result::is_ok));
        let error = match result {
            Ok(Ok(value)) => {
                self.succeeded(call);
                return Ok(value);
            }
            Ok(Err(error)) => error,
            Err(error) => BoxError::from(error),
        };
        self.failed(call, &*error);
        Err(Unavailable { cause: Some(error), retry_after: PAUSE })
    }

    fn may_call(&self, call: StoreCall) -> Result<(), Unavailable> {
        let now = Clock::default().now();
        let breaker = &mut self.breakers()[call as usize];
        match breaker.open_until {
            Some(until) if !until.has_come(now) => Err(Unavailable { cause: None, retry_after: PAUSE }),
            Some(_) => {
                // This call finds out. The others wait for it.
                breaker.open_until = Some(now.after(self.patience.saturating_mul(3)));
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn succeeded(&self, call: StoreCall) {
        let mut breakers = self.breakers();
        let before = std::mem::take(&mut breakers[call as usize]);
        let is_back = before.open_until.is_some() && breakers.iter().all(|other| other.open_until.is_none());
        drop(breakers);
        if is_back {
            event::fleet_store_back();
        }
    }

    fn failed(&self, call: StoreCall, error: &(dyn Error + 'static)) {
        let mut breakers = self.breakers();
        let was_open = breakers.iter().any(|breaker| breaker.open_until.is_some());
        let breaker = &mut breakers[call as usize];
        breaker.failures = breaker.failures.saturating_add(1);
        let is_open = breaker.failures >= MAX_FAILURES;
        if is_open {
            breaker.open_until = Some(Clock::default().now().after(PAUSE));
        }
        drop(breakers);
        if is_open && !was_open {
            event::fleet_store_lost(error);
        }
    }

    fn breakers(&self) -> MutexGuard<'_, [Breaker; 2]> {
        self.breakers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.cause {
            Some(_) => "the fleet's store failed",
            None => "the fleet's store has failed, and is not asked again yet",
        })
    }
}

impl Error for Unavailable {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.cause.as_ref().map(|cause| &**cause as _)
    }
}
