//! The end of a renewal, and those who wait for it.

use std::{
    mem,
    pin::Pin,
    sync::{Arc, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
    vec,
};

use tokio::runtime::{self, Handle as Timers};

use super::driver::{is_renewed_by_this_task, own_source};
use crate::{
    AuthError,
    util::sync::{Mutex, MutexGuard},
    util::timer::Timer,
};

/// Who waits for a renewal gives it so much longer than it has itself.
const MARGIN: Duration = Duration::from_secs(1);

/// A renewal that is running, for those who wait for it.
#[derive(Clone)]
pub(crate) struct Landing(pub(super) Arc<InFlight>);

/// What is known of it.
pub(super) struct InFlight {
    pub(super) word: Arc<Word>,
    /// It has ended by itself after this time, if its runtime is driven.
    pub(super) limit: Duration,
    pub(super) runtime: Option<runtime::Id>,
    pub(super) engine: usize,
    pub(super) abandon: Box<dyn Fn() + Send + Sync>,
}

/// How a renewal ended: told once, to however many wait for it.
pub(super) struct Word(Mutex<State>);

enum State {
    Awaited(Queue),
    Told(Result<(), AuthError>),
}

/// Those who are woken, all of them though a waker may panic.
struct Awake(vec::IntoIter<Option<Waker>>);

impl Awake {
    fn wake(&mut self) {
        self.0.by_ref().flatten().for_each(Waker::wake);
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        self.wake();
    }
}

/// Those who wait. Who leaves makes room for another.
#[derive(Default)]
struct Queue {
    places: Vec<Option<Waker>>,
    left: Vec<usize>,
}

impl Word {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(State::Awaited(Queue::default()))))
    }

    /// The first word counts.
    pub(super) fn tell(&self, how: Result<(), AuthError>) {
        let mut state = self.state();
        let State::Awaited(queue) = &mut *state else { return };
        let queue = mem::take(queue);
        *state = State::Told(how);
        // What wakers do is others' code.
        drop(state);
        Awake(queue.places.into_iter()).wake();
    }

    /// Who waits has a place, which is its own until the word is told.
    fn poll(&self, place: &mut Option<usize>, cx: &mut Context<'_>) -> Poll<Result<(), AuthError>> {
        let mut state = self.state();
        let queue = match &mut *state {
            State::Awaited(queue) => queue,
            State::Told(how) => {
                *place = None;
                return Poll::Ready(how.clone());
            }
        };
        let former = queue.wait(place, cx.waker());
        drop(state);
        drop(former);
        Poll::Pending
    }

    fn leave(&self, place: usize) {
        let mut state = self.state();
        let State::Awaited(queue) = &mut *state else { return };
        let former = queue.leave(place);
        drop(state);
        drop(former);
    }

    #[cfg(all(test, model))]
    pub(super) fn told(&self) -> Option<Result<(), AuthError>> {
        match &*self.state() {
            State::Awaited(_) => None,
            State::Told(how) => Some(how.clone()),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    /// Takes a place, or keeps it. The waker that was there is for the caller to drop, without the lock.
    fn wait(&mut self, place: &mut Option<usize>, waker: &Waker) -> Option<Waker> {
        let at = *place.get_or_insert_with(|| {
            self.left.pop().unwrap_or_else(|| {
                self.places.push(None);
                self.places.len() - 1
            })
        });
        match self.places.get_mut(at) {
            Some(Some(own)) if own.will_wake(waker) => None,
            Some(own) => own.replace(waker.clone()),
            None => None,
        }
    }

    fn leave(&mut self, place: usize) -> Option<Waker> {
        self.left.push(place);
        self.places.get_mut(place)?.take()
    }
}

/// Future of the end of a renewal. One whose task was dropped has ended without a word, and so has one that nobody drives:
/// it would have ended by now.
pub(crate) struct Wait {
    landing: Landing,
    /// From the first time it is polled.
    place: Option<usize>,
    /// Whether it looks at the time wherever it is polled; else not where the renewal runs: whoever drives that runtime drives
    /// the renewal too.
    is_watch: bool,
    /// Boxed, as many wait and few of them have one.
    timer: Option<Box<Timer>>,
}

impl Wait {
    pub(crate) fn new(landing: Landing) -> Self {
        Self { landing, place: None, is_watch: false, timer: None }
    }

    /// One that looks at the time wherever it is polled.
    pub(super) fn watch(landing: Landing) -> Self {
        Self { landing, place: None, is_watch: true, timer: None }
    }

    fn poll_timer(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let InFlight { limit, runtime, .. } = &*self.landing.0;
        let here = Timers::try_current().ok().map(|here| here.id());
        if !self.is_watch && here.is_some() && here == *runtime {
            return Poll::Pending;
        }
        let timer = self.timer.get_or_insert_with(|| Box::new(Timer::new(limit.saturating_add(MARGIN))));
        // Where no runtime has the time, it waits for the word alone.
        timer.poll(cx).unwrap_or(Poll::Pending)
    }
}

impl Future for Wait {
    type Output = Result<(), AuthError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Self { landing, place, .. } = &mut *self;
        // Another task may have asked for the one that waits.
        if place.is_none() && is_renewed_by_this_task(landing.0.engine) {
            return Poll::Ready(Err(own_source()));
        }
        let told = landing.0.word.poll(place, cx);
        if told.is_pending() && self.poll_timer(cx).is_ready() {
            (self.landing.0.abandon)();
            return Poll::Ready(Ok(()));
        }
        told
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        if let Some(place) = self.place {
            self.landing.0.word.leave(place);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        panic::{AssertUnwindSafe, catch_unwind},
        sync::atomic::{AtomicUsize, Ordering},
        task::Wake,
    };

    use super::*;

    fn landing() -> Landing {
        let (word, abandon) = (Word::new(), Box::new(|| ()));
        Landing(Arc::new(InFlight { word, limit: Duration::ZERO, runtime: None, engine: 0, abandon }))
    }

    /// A waker that counts, and finds the lock free whatever becomes of it.
    struct Looks {
        word: Arc<Word>,
        woken: AtomicUsize,
    }

    impl Looks {
        fn at(landing: &Landing) -> Arc<Self> {
            Arc::new(Self { word: Arc::clone(&landing.0.word), woken: AtomicUsize::new(0) })
        }

        fn woken(&self) -> usize {
            self.woken.load(Ordering::Relaxed)
        }

        fn look(&self) {
            assert!(self.word.0.try_lock().is_ok(), "others' code runs under the lock");
        }
    }

    impl Wake for Looks {
        fn wake(self: Arc<Self>) {
            self.look();
            self.woken.fetch_add(1, Ordering::Relaxed);
        }
    }

    impl Drop for Looks {
        fn drop(&mut self) {
            self.look();
        }
    }

    fn poll(wait: &mut Wait, waker: &Arc<Looks>) -> Poll<Result<(), AuthError>> {
        Pin::new(wait).poll(&mut Context::from_waker(&Waker::from(Arc::clone(waker))))
    }

    #[test]
    fn f1_each_is_woken_once_by_the_waker_it_came_with_last() {
        let landing = landing();
        let mut waits = [(); 3].map(|()| Wait::new(landing.clone()));
        let wakers = [(); 3].map(|()| Looks::at(&landing));
        for _ in 0..2 {
            for (wait, waker) in waits.iter_mut().zip(&wakers) {
                assert!(poll(wait, waker).is_pending());
            }
        }
        let moved = Looks::at(&landing);
        assert!(poll(&mut waits[1], &moved).is_pending());
        assert_eq!(Arc::strong_count(&wakers[1]), 1, "the former waker is kept");

        landing.0.word.tell(Ok(()));
        landing.0.word.tell(Ok(()));
        assert_eq!(wakers.each_ref().map(|waker| waker.woken()), [1, 0, 1]);
        assert_eq!(moved.woken(), 1);
        for wait in &mut waits {
            assert!(matches!(poll(wait, &moved), Poll::Ready(Ok(()))));
        }
    }

    #[test]
    fn f5_a_waker_that_panics_leaves_nobody_waiting() {
        struct Panics;

        impl Wake for Panics {
            fn wake(self: Arc<Self>) {
                panic!("a waker that panics");
            }
        }

        let landing = landing();
        let mut waits = [(); 3].map(|()| Wait::new(landing.clone()));
        let waker = Looks::at(&landing);
        assert!(poll(&mut waits[0], &waker).is_pending());
        let panics = Waker::from(Arc::new(Panics));
        assert!(Pin::new(&mut waits[1]).poll(&mut Context::from_waker(&panics)).is_pending());
        assert!(poll(&mut waits[2], &waker).is_pending());
        assert!(catch_unwind(AssertUnwindSafe(|| landing.0.word.tell(Ok(())))).is_err());
        assert_eq!(waker.woken(), 2);
    }

    #[test]
    fn f4_who_leaves_is_not_woken_and_makes_room() {
        let landing = landing();
        let (stays, leaves) = (Looks::at(&landing), Looks::at(&landing));
        let mut first = Wait::new(landing.clone());
        assert!(poll(&mut first, &stays).is_pending());
        for _ in 0..1_000 {
            let mut other = Wait::new(landing.clone());
            assert!(poll(&mut other, &leaves).is_pending());
        }
        assert_eq!(Arc::strong_count(&leaves), 1);
        let State::Awaited(Queue { places, left }) = &*landing.0.word.state() else {
            panic!("nobody has told anything")
        };
        assert_eq!((places.len(), left.len()), (2, 1));
    }

    #[test]
    fn f8_a_waker_that_is_the_last_of_its_kind_is_dropped_without_the_lock() {
        let landing = landing();
        let last = |wait: &mut Wait| assert!(poll(wait, &Looks::at(&landing)).is_pending());
        let mut left = Wait::new(landing.clone());
        last(&mut left);
        last(&mut left);
        drop(left);
        let mut told = Wait::new(landing.clone());
        last(&mut told);
        landing.0.word.tell(Ok(()));
    }
}
