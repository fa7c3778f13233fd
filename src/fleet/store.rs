//! [`FleetStore`]: where the members of a fleet keep what they share.

use std::{fmt, pin::Pin, time::Duration};

use crate::error::BoxError;

/// Keeps the sealed records of a fleet: anything that can compare and set one value.
///
/// Records are sealed before they get here, so a store needs neither secrets nor encryption. It may lose what it
/// holds: members put it back. Two members must never both succeed in replacing the same revision.
///
/// | Engine | `put` |
/// |---|---|
/// | Redis, Valkey | [`RedisStore`](super::RedisStore) (feature `fleet-redis`) |
/// | files on one machine | [`FileStore`](super::FileStore) |
/// | PostgreSQL | `UPDATE … SET revision = $2, value = $3, written = clock_timestamp() WHERE key = $1 AND revision = $4`, or `INSERT … ON CONFLICT DO NOTHING` |
/// | etcd | a transaction that compares the value, with the revision in front |
///
/// # Cancel safety
///
/// A call that takes longer than the [fleet's patience](super::FleetBuilder::with_store_timeout) is dropped. What it has written by
/// then may arrive or not.
pub trait FleetStore: Send + Sync + 'static {
    /// Returns what stands under `key`.
    ///
    /// # Errors
    ///
    /// Fails if the store cannot be read. The call is repeated once.
    fn get(&self, key: &str) -> impl Future<Output = Result<Option<Entry>, BoxError>> + Send;

    /// Writes under `key` if what stands there has the revision `write.expected`; otherwise returns what stands there.
    ///
    /// # Errors
    ///
    /// Fails if it is unknown whether the store has written. The call is repeated once, and may then meet what it wrote
    /// before.
    fn put(&self, key: &str, write: Write<'_>) -> impl Future<Output = Result<Put, BoxError>> + Send;
}

/// What stands under a key.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The revision that it was written with.
    pub revision: Revision,
    /// The sealed record.
    pub value: Vec<u8>,
    /// How long ago it was written, by the store's own clock. Members never compare their clocks.
    pub age: Duration,
}

/// A conditional write.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Write<'a> {
    /// The revision that is to be replaced; `None` if nothing must stand there.
    pub expected: Option<Revision>,
    /// The new revision.
    pub revision: Revision,
    /// The sealed record, of at most a few kilobytes.
    pub value: &'a [u8],
    /// After this time the entry may be removed; `None` if never.
    pub keep: Option<Duration>,
}

impl<'a> Write<'a> {
    /// Writes `value` with a new `revision`, kept for good. For tests of a store of your own.
    #[must_use]
    pub fn new(expected: Option<Revision>, revision: Revision, value: &'a [u8]) -> Self {
        Self { expected, revision, value, keep: None }
    }

    /// Sets for how long the entry is kept.
    #[must_use]
    pub fn with_keep(mut self, keep: Duration) -> Self {
        self.keep = Some(keep);
        self
    }
}

/// The outcome of a [write](FleetStore::put).
#[derive(Clone, Debug)]
pub enum Put {
    /// It was written.
    Done,
    /// Something else stands there, or nothing.
    Conflict(Option<Entry>),
}

/// Names one write of an entry: random, so that a store that was rolled back never shows an old one as new.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Revision([u8; 16]);

impl Revision {
    /// Restores a revision from its bytes.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Returns its bytes, for storage.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Debug for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Revision({:032x})", u128::from_be_bytes(self.0))
    }
}

type Calling<'a, T> = Pin<Box<dyn Future<Output = Result<T, BoxError>> + Send + 'a>>;

/// [`FleetStore`] as a trait object.
pub(super) trait DynFleetStore: Send + Sync {
    fn get<'a>(&'a self, key: &'a str) -> Calling<'a, Option<Entry>>;

    fn put<'a>(&'a self, key: &'a str, write: Write<'a>) -> Calling<'a, Put>;
}

impl<T: FleetStore> DynFleetStore for T {
    fn get<'a>(&'a self, key: &'a str) -> Calling<'a, Option<Entry>> {
        Box::pin(FleetStore::get(self, key))
    }

    fn put<'a>(&'a self, key: &'a str, write: Write<'a>) -> Calling<'a, Put> {
        Box::pin(FleetStore::put(self, key, write))
    }
}
