//! One of a thing for each of a few threads, so that threads that use it at once do not wait for one another's reference
//! counts: [`Shards`].

use std::{
    cell::Cell,
    num::NonZero,
    sync::{
        LazyLock,
        atomic::{AtomicUsize, Ordering},
    },
    thread::available_parallelism,
};

/// More threads than this share.
const MOST: usize = 64;

/// For each thread that can run at once there are so many: the numbers of those that do need not follow each other.
const SPREAD: usize = 4;

static COUNT: LazyLock<usize> = LazyLock::new(|| {
    let threads = available_parallelism().map_or(1, NonZero::get);
    threads.saturating_mul(SPREAD).min(MOST).next_power_of_two()
});

/// The first number is that of the first shard.
static NEXT: AtomicUsize = AtomicUsize::new(MOST);

thread_local! {
    /// Zero until it has one.
    static NUMBER: Cell<usize> = const { Cell::new(0) };
}

/// A few of a thing for each thread that can run at once. Threads get theirs by turns, and keep it.
#[derive(Clone, Debug)]
pub(crate) struct Shards<T> {
    first: T,
    /// One less than a power of two.
    others: Box<[T]>,
}

/// A thing so far from others that no thread's writing to it disturbs the next: what holds the count of a shard.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Apart<T>(pub(crate) T);

impl<T> Shards<T> {
    pub(crate) fn new(mut make: impl FnMut() -> T) -> Self {
        Self { first: make(), others: (1..*COUNT).map(|_| make()).collect() }
    }

    /// The present thread's.
    #[inline]
    pub(crate) fn local(&self) -> &T {
        self.of(number())
    }

    #[inline]
    fn of(&self, thread: usize) -> &T {
        match thread & self.others.len() {
            0 => &self.first,
            at => self.others.get(at - 1).unwrap_or(&self.first),
        }
    }
}

/// The present thread's number: the first thread that asks has the first.
#[inline]
fn number() -> usize {
    match NUMBER.get() {
        0 => enumerate(),
        number => number,
    }
}

#[cold]
fn enumerate() -> usize {
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    NUMBER.set(number);
    number
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn threads_get_theirs_by_turns_and_keep_it() {
        let mut made = 0;
        let shards = Shards::new(|| {
            made += 1;
            made
        });
        assert_eq!(made, *COUNT);
        assert!((0..3 * made).map(|thread| *shards.of(thread)).eq((1..=made).cycle().take(3 * made)));

        let ask = || (number(), *shards.local(), *shards.local());
        let asked: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(ask)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for (at, (thread, one, again)) in asked.iter().enumerate() {
            assert_eq!((one, again), (shards.of(*thread), one));
            assert!(asked[..at].iter().all(|(other, ..)| other != thread), "{asked:?}");
        }
    }
}
