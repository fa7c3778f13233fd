//! Stand-ins for what loom lacks: a swappable pointer, a watch channel, a runtime's tasks and task locals.
//!
//! State that is not of loom's types is never held while another thread may run.

use std::{
    cell::{Cell, RefCell},
    mem,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, Waker, ready},
};

use ::loom::{
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread::{JoinHandle, LocalKey},
};
use pin_project_lite::pin_project;
use tokio::runtime::TryCurrentError;

/// The weakest `ArcSwapOption` possible: a load acquires what the store before it released. `arc-swap` also promises a
/// total order of its operations; nothing may depend on that.
pub(crate) struct ArcSwapOption<T> {
    /// All values ever stored; the pointer is an index. None is dropped before the end.
    values: Mutex<Vec<Option<Arc<T>>>>,
    current: AtomicUsize,
    /// Changes with each store and is read by each load. loom remembers one access of each atomic: a thread that loads the
    /// pointer and then stores it would hide its race with the loads of others.
    stores: AtomicUsize,
}

impl<T> ArcSwapOption<T> {
    pub(crate) fn empty() -> Self {
        Self { values: Mutex::new(vec![None]), current: AtomicUsize::new(0), stores: AtomicUsize::new(0) }
    }

    pub(crate) fn load(&self) -> Option<Arc<T>> {
        self.stores.fetch_add(0, Ordering::Relaxed);
        self.load_full()
    }

    /// For the thread that stores.
    pub(crate) fn load_full(&self) -> Option<Arc<T>> {
        let at = self.current.load(Ordering::Acquire);
        self.values.lock().unwrap_or_else(PoisonError::into_inner)[at].clone()
    }

    pub(crate) fn store(&self, value: Option<Arc<T>>) {
        let at = {
            let mut values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
            values.push(value);
            values.len() - 1
        };
        self.stores.fetch_add(1, Ordering::Relaxed);
        self.current.swap(at, Ordering::AcqRel);
    }
}

opaque_debug!(ArcSwapOption<T>);

/// The part of `tokio::sync::watch` that the engine uses.
pub(crate) mod watch {
    use std::{
        future::poll_fn,
        sync::Arc,
        task::{Poll, Waker},
    };

    use ::loom::sync::Mutex;

    pub(crate) struct Sender<T>(Arc<Mutex<Watched<T>>>);

    struct Watched<T> {
        value: T,
        wakers: Vec<Waker>,
    }

    pub(crate) struct Receiver<T>(Arc<Mutex<Watched<T>>>);

    impl<T> Sender<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(Arc::new(Mutex::new(Watched { value, wakers: Vec::new() })))
        }

        pub(crate) fn send_if_modified(&self, modify: impl FnOnce(&mut T) -> bool) -> bool {
            let mut watched = self.0.lock().unwrap();
            let is_modified = modify(&mut watched.value);
            let wakers = if is_modified { std::mem::take(&mut watched.wakers) } else { Vec::new() };
            drop(watched);
            wakers.into_iter().for_each(Waker::wake);
            is_modified
        }

        /// A copy, where tokio's returns a guard.
        pub(crate) fn borrow(&self) -> T
        where
            T: Clone,
        {
            self.0.lock().unwrap().value.clone()
        }

        pub(crate) fn subscribe(&self) -> Receiver<T> {
            Receiver(Arc::clone(&self.0))
        }
    }

    impl<T> Receiver<T> {
        pub(crate) async fn wait_for(&mut self, is_awaited: impl Fn(&T) -> bool) {
            poll_fn(|cx| {
                let mut watched = self.0.lock().unwrap();
                if is_awaited(&watched.value) {
                    return Poll::Ready(());
                }
                watched.wakers.push(cx.waker().clone());
                Poll::Pending
            })
            .await;
        }
    }
}

/// What happens to a task that a thread spawns.
#[derive(Clone, Copy)]
pub(crate) enum Tasks {
    /// It runs on its own thread.
    OnThreads,
    /// It runs before `spawn` returns. Saves threads, of which loom allows five.
    AtOnce,
    /// It is dropped, as a runtime that shuts down does.
    Dropped,
}

::loom::thread_local! {
    static TASKS: Cell<Tasks> = Cell::new(Tasks::OnThreads);
}

thread_local! {
    /// The threads of tasks, in a thread local of std, which all loom threads share: a lock of loom's would order the threads
    /// that use it.
    static THREADS: RefCell<Vec<JoinHandle<()>>> = const { RefCell::new(Vec::new()) };
}

impl Tasks {
    /// Applies to tasks that are spawned while `run` runs.
    pub(crate) fn during<T>(self, run: impl FnOnce() -> T) -> T {
        let before = TASKS.with(|tasks| tasks.replace(self));
        let done = run();
        TASKS.with(|tasks| tasks.set(before));
        done
    }

    /// Waits for all tasks, and for those that they spawned.
    pub(crate) fn join() {
        while let Some(thread) = THREADS.with_borrow_mut(Vec::pop) {
            thread.join().unwrap();
        }
    }
}

/// A runtime whose tasks never wait.
pub(crate) struct Handle;

impl Handle {
    pub(crate) fn try_current() -> Result<Self, TryCurrentError> {
        Ok(Self)
    }

    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        let aborted = Arc::new(AtomicBool::new(false));
        let abort = AbortHandle(Arc::clone(&aborted));
        let run = move || {
            let mut task = Box::pin(task);
            if !aborted.load(Ordering::Acquire) {
                let polled = task.as_mut().poll(&mut Context::from_waker(Waker::noop()));
                assert!(polled.is_ready(), "a task waits");
            }
        };
        match TASKS.with(Cell::get) {
            Tasks::OnThreads => {
                let thread = spawn(run);
                THREADS.with_borrow_mut(|threads| threads.push(thread));
            }
            Tasks::AtOnce => run(),
            Tasks::Dropped => drop(run),
        }
        abort
    }
}

/// Spawns a thread whose stack is large enough for a debug build.
pub(crate) fn spawn<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    const WORDS: usize = 0x8000;
    ::loom::thread::Builder::new().stack_size(WORDS).spawn(run).unwrap()
}

/// Drops a task that has not begun. A task that has begun never waits, so it cannot be dropped midway.
pub(crate) struct AbortHandle(Arc<AtomicBool>);

impl AbortHandle {
    /// For the caller of `spawn`, which returns a `JoinHandle` in tokio.
    pub(crate) fn abort_handle(self) -> Self {
        self
    }

    pub(crate) fn abort(&self) {
        self.0.store(true, Ordering::Release);
    }
}

/// To std, all loom threads are one, so its task locals would be visible to all of them.
macro_rules! task_local {
    ($(#[$attribute:meta])* static $name:ident: $value:ty;) => {
        $(#[$attribute])*
        static $name: $crate::util::loom::TaskLocal<$value> = {
            ::loom::thread_local! {
                static SLOT: std::cell::RefCell<Option<$value>> = std::cell::RefCell::new(None);
            }
            $crate::util::loom::TaskLocal(&SLOT)
        };
    };
}
pub(crate) use task_local;

pub(crate) struct TaskLocal<T: 'static>(pub(crate) &'static LocalKey<RefCell<Option<T>>>);

impl<T> TaskLocal<T> {
    pub(crate) fn scope<F>(&self, value: T, task: F) -> Scoped<T, F> {
        Scoped { slot: self.0, value: Some(value), task }
    }

    pub(crate) fn try_with<R>(&self, read: impl FnOnce(&T) -> R) -> Result<R, ()> {
        let value = self.0.try_with(|slot| slot.borrow().as_ref().map(read));
        value.ok().flatten().ok_or(())
    }
}

pin_project! {
    pub(crate) struct Scoped<T: 'static, F> {
        slot: &'static LocalKey<RefCell<Option<T>>>,
        value: Option<T>,
        #[pin]
        task: F,
    }
}

impl<T, F: Future> Future for Scoped<T, F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let slot = *this.slot;
        slot.with(|slot| mem::swap(&mut *slot.borrow_mut(), this.value));
        let output = this.task.poll(cx);
        slot.with(|slot| mem::swap(&mut *slot.borrow_mut(), this.value));
        Poll::Ready(ready!(output))
    }
}
