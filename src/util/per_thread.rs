//! Per-thread copies of values whose reference counts would otherwise be contended.
//!
//! Cloning one `Bytes` or `Arc` from two threads at once makes both wait for the same cache line. A layer serves 1.9
//! times as many requests on two threads as on one when each thread clones its own copy, and 1.4 times when they share
//! one (`benches/contention.rs`).

use std::{
    cell::Cell,
    fmt,
    num::NonZero,
    sync::{
        LazyLock, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    thread::available_parallelism,
};

/// The most slots that a value has; further threads share them.
const MAX_SLOTS: usize = 64;

/// Slots per hardware thread. Thread numbers are handed out in turn, and busy threads need not have adjacent ones.
const SLOTS_PER_CPU: usize = 4;

/// A power of two.
static SLOTS: LazyLock<usize> = LazyLock::new(|| {
    let cpus = available_parallelism().map_or(1, NonZero::get);
    cpus.saturating_mul(SLOTS_PER_CPU).min(MAX_SLOTS).next_power_of_two()
});

/// One lazily made value per thread.
pub(crate) struct PerThread<T> {
    /// The number and value of the thread that asked first.
    first: OnceLock<(usize, T)>,
    /// The values of other threads. Made when the second thread asks, because many owners serve only one: a service that
    /// is made for each request, for example.
    others: OnceLock<Box<[OnceLock<T>]>>,
}

impl<T> PerThread<T> {
    pub(crate) fn new() -> Self {
        Self { first: OnceLock::new(), others: OnceLock::new() }
    }

    /// The calling thread's value, made by `make` when it is first needed.
    #[inline]
    pub(crate) fn get_or_init(&self, make: impl FnOnce() -> T) -> Option<&T> {
        let number = thread_number();
        if let Some((first, value)) = self.first.get()
            && *first == number
        {
            return Some(value);
        }
        match self.others.get().and_then(|others| slot(others, number)?.get()) {
            Some(value) => Some(value),
            None => self.init(number, make),
        }
    }

    #[cold]
    fn init(&self, number: usize, make: impl FnOnce() -> T) -> Option<&T> {
        // Outside of any lock: `make` may run the code of others.
        let value = make();
        let Err((_, value)) = self.first.set((number, value)) else {
            return self.first.get().map(|(_, value)| value);
        };
        let others = self.others.get_or_init(|| (0..*SLOTS).map(|_| OnceLock::new()).collect());
        Some(slot(others, number)?.get_or_init(|| value))
    }
}

/// The slot of the thread with this number.
#[inline]
fn slot<T>(slots: &[OnceLock<T>], number: usize) -> Option<&OnceLock<T>> {
    // The length is a power of two.
    slots.get(number & (slots.len() - 1))
}

/// A value that can be copied without sharing a reference count with the copy.
pub(crate) trait Unshare {
    /// Copies the value together with everything it counts references to.
    fn unshare(&self) -> Self;
}

/// A value that each thread clones from a copy of its own.
pub(crate) struct Unshared<T> {
    original: T,
    /// `None` for values that are cloned too rarely to be worth the memory. There are many of those, so it is small.
    copies: Option<Box<PerThread<T>>>,
}

impl<T: Unshare> Unshared<T> {
    /// Makes the calling thread's copy at once, so that its first request allocates nothing.
    pub(crate) fn per_thread(original: T) -> Self {
        let unshared = Self { original, copies: Some(Box::new(PerThread::new())) };
        let _ = unshared.local();
        unshared
    }

    pub(crate) fn single(original: T) -> Self {
        Self { original, copies: None }
    }

    pub(crate) fn original(&self) -> &T {
        &self.original
    }

    /// The calling thread's copy.
    #[inline]
    pub(crate) fn local(&self) -> &T {
        let copies = self.copies.as_ref();
        copies.and_then(|copies| copies.get_or_init(|| self.original.unshare())).unwrap_or(&self.original)
    }
}

impl<T: fmt::Debug> fmt::Debug for Unshared<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.original.fmt(f)
    }
}

/// Keeps a value, and the reference count in front of it, off the cache lines of its neighbours.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct CacheAligned<T>(pub(crate) T);

impl<T: AsRef<[u8]>> AsRef<[u8]> for CacheAligned<T> {
    fn as_ref(&self) -> &[u8] {
        self.0.as_ref()
    }
}

/// Numbers the threads from one in the order in which they first ask.
#[inline]
fn thread_number() -> usize {
    thread_local! {
        static NUMBER: Cell<usize> = const { Cell::new(0) };
    }

    #[cold]
    fn assign() -> usize {
        static NEXT: AtomicUsize = AtomicUsize::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        NUMBER.set(number);
        number
    }

    match NUMBER.get() {
        0 => assign(),
        number => number,
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, thread};

    use super::*;

    #[derive(Debug)]
    struct Counted(Arc<()>);

    impl Unshare for Counted {
        fn unshare(&self) -> Self {
            Self(Arc::new(()))
        }
    }

    #[test]
    fn threads_do_not_share_a_count() {
        let value = Unshared::per_thread(Counted(Arc::new(())));
        let local = || Arc::as_ptr(&value.local().0).addr();
        // As many threads as slots, at the same time, so that no two share a slot.
        let addresses: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = (0..(*SLOTS).min(8)).map(|_| scope.spawn(|| [local(), local()])).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for (at, [first, second]) in addresses.iter().enumerate() {
            assert_eq!(first, second, "a thread keeps its copy");
            assert!(addresses[..at].iter().all(|other| other[0] != *first), "{addresses:?}");
        }
        assert_eq!(Arc::strong_count(&value.original().0), 1);
    }

    #[test]
    fn one_thread_needs_no_table() {
        let value = PerThread::new();
        assert_eq!((value.get_or_init(|| 1), value.get_or_init(|| 2)), (Some(&1), Some(&1)));
        assert!(value.others.get().is_none());
        let other = thread::scope(|scope| scope.spawn(|| value.get_or_init(|| 3).copied()).join().unwrap());
        assert_eq!((other, value.get_or_init(|| 4)), (Some(3), Some(&1)));
        assert!(value.others.get().is_some());
    }

    #[test]
    fn a_value_may_be_asked_for_while_it_is_made() {
        let value = PerThread::new();
        assert_eq!(value.get_or_init(|| value.get_or_init(|| 1).copied().unwrap_or_default() + 1), Some(&2));
        assert_eq!(value.get_or_init(|| 3), Some(&1), "the inner one was first");
    }

    #[test]
    fn a_single_value_is_not_copied() {
        let value = Unshared::single(Counted(Arc::new(())));
        assert!(Arc::ptr_eq(&value.local().0, &value.original().0));
    }
}
