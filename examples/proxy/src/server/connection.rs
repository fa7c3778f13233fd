//! What a caller's connection is doing, and until when it may: [`Connection`]; and those of [`Strangers`].

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{self, Instant},
};

use crate::config::Limits;

/// No head of a request is incomplete.
const NONE: u64 = u64::MAX;

/// How long the incomplete heads of all strangers may be together, apart from the short ones. hyper takes up to three times
/// that.
const STRANGERS_HEADS: usize = 4 * 1024 * 1024;

/// A head that every stranger may send: hyper's smallest buffer.
const SHORT_HEAD: usize = 8 * 1024;

/// One connection of a caller, shared by its socket, its requests and the task that enforces its limits. Every request carries
/// it as an extension.
///
/// The counters are independent of each other, so their order in memory does not matter.
#[derive(Debug)]
pub struct Connection {
    opened: Instant,
    /// Requests whose body or response is incomplete.
    requests: AtomicUsize,
    /// When the last request ended, when the head of the next one began ([`NONE`] without one), and when a byte last moved in
    /// either direction: in milliseconds since `opened`.
    idle_since: AtomicU64,
    head_since: AtomicU64,
    moved_at: AtomicU64,
    http2: AtomicBool,
    /// A request's body was given up, so what the caller still sends is discarded.
    discards: AtomicBool,
    /// The socket is closed without waiting for the caller.
    closes_at_once: AtomicBool,
    known: AtomicBool,
    /// How many bytes arrived of an incomplete head, until the caller is known.
    head_bytes: AtomicUsize,
    id: u64,
    strangers: Arc<Strangers>,
    evicted: Notify,
}

/// What the limits demand of a connection now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// Nothing, until then.
    Later(Instant),
    /// Closing it in an orderly manner.
    Close,
    /// Closing it at once: the head of a request is late.
    Cut,
}

impl Connection {
    pub(super) fn new(strangers: &Arc<Strangers>) -> Arc<Self> {
        let mut known = strangers.lock();
        let id = known.next_id;
        known.next_id += 1;
        let connection = Arc::new(Self {
            opened: Instant::now(),
            requests: AtomicUsize::new(0),
            idle_since: AtomicU64::new(0),
            // The time for the first head begins at once.
            head_since: AtomicU64::new(0),
            moved_at: AtomicU64::new(0),
            http2: AtomicBool::new(false),
            discards: AtomicBool::new(false),
            closes_at_once: AtomicBool::new(false),
            known: AtomicBool::new(false),
            head_bytes: AtomicUsize::new(0),
            id,
            strangers: Arc::clone(strangers),
            evicted: Notify::new(),
        });
        known.oldest_first.insert(id, Arc::downgrade(&connection));
        connection
    }

    /// Records that a request was admitted: the caller is not a stranger any more.
    pub fn admitted(&self) {
        // Looked up first: the swap would take the cache line away from other cores.
        if !self.known.load(Relaxed) && !self.known.swap(true, Relaxed) {
            self.strangers.forget(self.id);
        }
    }

    /// Waits until no byte has moved in either direction for this long.
    pub async fn idle_for(&self, limit: Duration) {
        loop {
            let due = self.moved_at() + limit;
            if Instant::now() >= due {
                return;
            }
            time::sleep_until(due).await;
        }
    }

    pub(super) fn moved_at(&self) -> Instant {
        self.opened + Duration::from_millis(self.moved_at.load(Relaxed))
    }

    pub(super) fn idle_since(&self) -> Instant {
        self.opened + Duration::from_millis(self.idle_since.load(Relaxed))
    }

    pub(super) fn wrote(&self) {
        self.moved_at.store(self.now(), Relaxed);
    }

    pub(super) fn read(&self, length: usize) {
        let now = self.now();
        self.moved_at.store(now, Relaxed);
        if !self.is_idle() {
            return;
        }
        // Over HTTP/2, bytes also arrive without requests: answers to pings.
        if self.head_since.load(Relaxed) == NONE && !self.is_http2() {
            self.head_since.store(now, Relaxed);
        }
        if !self.known.load(Relaxed) {
            let head = self.head_bytes.fetch_add(length, Relaxed) + length;
            let all = self.strangers.head_bytes.fetch_add(length, Relaxed) + length;
            if head > SHORT_HEAD && all > STRANGERS_HEADS {
                self.evicted.notify_one();
            }
        }
    }

    /// Records that no head is incomplete any more.
    fn head_ended(&self) {
        self.head_since.store(NONE, Relaxed);
        let length = self.head_bytes.swap(0, Relaxed);
        self.strangers.head_bytes.fetch_sub(length, Relaxed);
    }

    pub(super) fn set_http2(&self) {
        self.http2.store(true, Relaxed);
    }

    pub(super) fn is_http2(&self) -> bool {
        self.http2.load(Relaxed)
    }

    /// Discards what the caller still sends. Over HTTP/2, other requests would suffer.
    pub(super) fn discard(&self) {
        debug_assert!(!self.is_http2());
        self.discards.store(true, Relaxed);
    }

    pub(super) fn discards(&self) -> bool {
        self.discards.load(Relaxed)
    }

    pub(super) fn close_at_once(&self) {
        self.closes_at_once.store(true, Relaxed);
    }

    pub(super) fn closes_at_once(&self) -> bool {
        self.closes_at_once.load(Relaxed)
    }

    pub(super) fn is_idle(&self) -> bool {
        self.requests.load(Relaxed) == 0
    }

    /// Completes when the connection must make room for another one.
    pub(super) async fn evicted(&self) {
        self.evicted.notified().await;
    }

    pub(super) fn due(&self, limits: &Limits) -> Due {
        let now = Instant::now();
        let next_look = now + limits.keep_alive.min(limits.head_timeout);
        if !self.is_idle() {
            return Due::Later(next_look);
        }
        let (since, limit, due) = match self.head_since.load(Relaxed) {
            NONE => (self.idle_since.load(Relaxed), limits.keep_alive, Due::Close),
            since if self.is_http2() => (since, limits.head_timeout, Due::Close),
            since => (since, limits.head_timeout, Due::Cut),
        };
        let deadline = self.opened + Duration::from_millis(since) + limit;
        if now >= deadline { due } else { Due::Later(deadline.min(next_look)) }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.opened.elapsed().as_millis()).unwrap_or(NONE - 1)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.head_ended();
        if !*self.known.get_mut() {
            self.strangers.forget(self.id);
        }
    }
}

/// Counts a request, or its body, as incomplete until dropped.
#[derive(Debug)]
pub(super) struct InFlight(Arc<Connection>);

impl InFlight {
    pub(super) fn new(connection: &Arc<Connection>) -> Self {
        connection.requests.fetch_add(1, Relaxed);
        connection.head_ended();
        Self(Arc::clone(connection))
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.idle_since.store(self.0.now(), Relaxed);
        self.0.requests.fetch_sub(1, Relaxed);
    }
}

/// The connections without an admitted request so far.
#[derive(Debug, Default)]
pub(super) struct Strangers {
    known: Mutex<Known>,
    /// How many bytes arrived of all their incomplete heads.
    head_bytes: AtomicUsize,
}

#[derive(Debug, Default)]
struct Known {
    next_id: u64,
    oldest_first: BTreeMap<u64, Weak<Connection>>,
}

impl Strangers {
    pub(super) fn count(&self) -> usize {
        self.lock().oldest_first.len()
    }

    /// Closes the oldest one, if it is at least this old. Returns whether it did.
    pub(super) fn evict(&self, age: Duration) -> bool {
        let mut known = self.lock();
        let Some(entry) = known.oldest_first.first_entry() else { return false };
        let Some(connection) = entry.get().upgrade() else {
            // It is being dropped.
            entry.remove();
            return true;
        };
        let old = connection.opened.elapsed() >= age;
        if old {
            entry.remove();
            connection.evicted.notify_one();
        }
        drop(known);
        // Dropped after the lock is released, which its destructor takes.
        drop(connection);
        old
    }

    fn forget(&self, id: u64) {
        self.lock().oldest_first.remove(&id);
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
