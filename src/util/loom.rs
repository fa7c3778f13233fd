//! Of what loom has none: a pointer that is swapped, a runtime's tasks, a task's own variables.
//!
//! What is shared here beside loom's types is never held while another thread may run.

use std::{
    cell::{Cell, RefCell},
    fmt, mem,
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

/// As weak as can be: a load acquires what the store before it released. `arc-swap` promises more, that all its
/// operations have one order; nothing here may depend on it.
pub(crate) struct ArcSwapOption<T> {
    /// All there ever were; the pointer is an index. None is dropped before the end.
    values: Mutex<Vec<Option<Arc<T>>>>,
    current: AtomicUsize,
}

impl<T> ArcSwapOption<T> {
    pub(crate) fn empty() -> Self {
        Self { values: Mutex::new(vec![None]), current: AtomicUsize::new(0) }
    }

    pub(crate) fn load(&self) -> Option<Arc<T>> {
        let at = self.current.load(Ordering::Acquire);
        self.values.lock().unwrap_or_else(PoisonError::into_inner)[at].clone()
    }

    pub(crate) fn store(&self, value: Option<Arc<T>>) {
        let at = {
            let mut values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
            values.push(value);
            values.len() - 1
        };
        self.current.swap(at, Ordering::AcqRel);
    }
}

impl<T> fmt::Debug for ArcSwapOption<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ArcSwapOption").finish_non_exhaustive()
    }
}

/// What becomes of a task that a thread spawns.
#[derive(Clone, Copy)]
pub(crate) enum Tasks {
    /// It runs on a thread of its own.
    OnThreads,
    /// It has ended when its spawning has. Spares threads, of which loom allows five.
    AtOnce,
    /// It is dropped, as by a runtime that shuts down.
    Dropped,
}

::loom::thread_local! {
    static TASKS: Cell<Tasks> = Cell::new(Tasks::OnThreads);
}

thread_local! {
    /// The threads of tasks. In a variable of std's, which all of loom's threads share: one of loom's would put in
    /// order what uses it.
    static THREADS: RefCell<Vec<JoinHandle<()>>> = const { RefCell::new(Vec::new()) };
}

impl Tasks {
    /// For those that are spawned meanwhile.
    pub(crate) fn during<T>(self, run: impl FnOnce() -> T) -> T {
        let before = TASKS.with(|tasks| tasks.replace(self));
        let done = run();
        TASKS.with(|tasks| tasks.set(before));
        done
    }

    /// Waits for all, and for those that they spawned.
    pub(crate) fn join() {
        while let Some(thread) = THREADS.with_borrow_mut(Vec::pop) {
            thread.join().unwrap();
        }
    }
}

/// A runtime whose tasks never have to wait.
pub(crate) struct Handle;

impl Handle {
    pub(crate) fn try_current() -> Result<Self, TryCurrentError> {
        Ok(Self)
    }

    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) -> Spawned {
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
        Spawned(abort)
    }
}

/// A thread with enough of a stack for a debug build.
pub(crate) fn spawn<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    const WORDS: usize = 0x8000;
    ::loom::thread::Builder::new().stack_size(WORDS).spawn(run).unwrap()
}

pub(crate) struct Spawned(AbortHandle);

impl Spawned {
    pub(crate) fn abort_handle(self) -> AbortHandle {
        self.0
    }
}

/// Drops a task that has not begun. One that has begun does not wait, so there is nowhere for it to be dropped.
pub(crate) struct AbortHandle(Arc<AtomicBool>);

impl AbortHandle {
    pub(crate) fn abort(&self) {
        self.0.store(true, Ordering::Release);
    }
}

/// All of loom's threads are one to std, and what a task sets for itself would be seen by all.
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

    /// `None` where tokio's has an error.
    pub(crate) fn try_with<R>(&self, read: impl FnOnce(&T) -> R) -> Result<R, Unset> {
        let value = self.0.try_with(|slot| slot.borrow().as_ref().map(read));
        value.ok().flatten().ok_or(Unset)
    }
}

#[derive(Debug)]
pub(crate) struct Unset;

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
