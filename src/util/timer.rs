//! [`Timer`]: a time limit that keeps working when its future moves to another runtime; [`timeout`] on top of it.
//!
//! Making or polling a timer of tokio's panics if the runtime has no timers or has shut down, and neither can be asked
//! beforehand. Where panics unwind, they are caught here. Where they abort the program, a thread of this module keeps the time.

use std::{
    error::Error,
    fmt,
    future::poll_fn,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::{Pin, pin},
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    runtime::{self, Handle},
    task::{Unconstrained, unconstrained},
    time::{Instant, Sleep, sleep_until},
};

use crate::util::clock::{LONG, monotonic};

/// A time limit, counted from the creation of the timer.
///
/// A `tokio::time::Sleep` belongs to one runtime, which may shut down while the future that polls it continues on another.
/// So the timer makes a new one on each runtime that polls it.
pub(crate) struct Timer {
    limit: Duration,
    due: Instant,
    armed: Option<Armed>,
}

/// The timer of one runtime.
struct Armed {
    runtime: runtime::Id,
    /// `None` if the runtime has no timers or has shut down. Unconstrained, so that the limit also holds for a future that
    /// uses up its task's budget.
    sleep: Option<Pin<Box<Unconstrained<Sleep>>>>,
}

impl Timer {
    pub(crate) fn new(limit: Duration) -> Self {
        let limit = limit.min(LONG);
        Self { limit, due: after(limit), armed: None }
    }

    /// Whether the limit is over; `None` if no runtime with timers polls this.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Option<Poll<()>> {
        self.arm();
        let armed = self.armed.as_mut()?;
        let sleep = armed.sleep.as_mut()?;
        let polled = catch_unwind(AssertUnwindSafe(|| sleep.as_mut().poll(cx)));
        polled.inspect_err(|_| armed.sleep = None).ok()
    }

    /// Makes a timer of the current runtime, unless there is one.
    fn arm(&mut self) {
        let Some(timekeeper) = timekeeper() else { return };
        if self.armed.as_ref().is_some_and(|armed| armed.runtime == timekeeper.id()) {
            return;
        }
        // Paused runtimes have separate clocks, and `due` may be far away by this one.
        let due = self.due.min(after(self.limit));
        self.armed = Some(Armed { runtime: timekeeper.id(), sleep: start(&timekeeper, due) });
    }
}

/// Whether this thread is on a runtime, and timers work here.
pub(crate) fn has_timers() -> bool {
    Handle::try_current().is_ok()
        && timekeeper().is_some_and(|timekeeper| start(&timekeeper, monotonic()).is_some())
}

/// Bounds a future in time. It is not polled where there are no timers.
pub(crate) async fn timeout<F: Future>(limit: Duration, future: F) -> Result<F::Output, TimeoutError> {
    let mut timer = Timer::new(limit);
    let mut future = pin!(future);
    poll_fn(|cx| {
        let Some(over) = timer.poll(cx) else { return Poll::Ready(Err(TimeoutError::NoTimers)) };
        match future.as_mut().poll(cx) {
            Poll::Ready(output) => Poll::Ready(Ok(output)),
            Poll::Pending => over.map(|()| Err(TimeoutError::Elapsed)),
        }
    })
    .await
}

/// Waits; forever, where there are no timers.
pub(crate) async fn sleep(time: Duration) {
    let mut timer = Timer::new(time);
    poll_fn(|cx| timer.poll(cx).unwrap_or(Poll::Pending)).await;
}

/// Why a future did not end within its time limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TimeoutError {
    Elapsed,
    NoTimers,
}

impl fmt::Display for TimeoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Elapsed => "it took too long",
            Self::NoTimers => "a refresh needs a tokio runtime with its timers enabled",
        })
    }
}

impl Error for TimeoutError {}

fn start(timekeeper: &Handle, due: Instant) -> Option<Pin<Box<Unconstrained<Sleep>>>> {
    let _entered = timekeeper.enter();
    catch_unwind(|| Box::pin(unconstrained(sleep_until(due)))).ok()
}

/// The runtime whose timers are used here: the current one, whose time tests may have paused.
#[cfg(not(panic = "abort"))]
fn timekeeper() -> Option<Handle> {
    Handle::try_current().ok()
}

/// The runtime whose timers are used: it never shuts down, and runs on a thread that starts when it is first needed.
#[cfg(panic = "abort")]
fn timekeeper() -> Option<Handle> {
    use std::{
        future::pending,
        sync::{Mutex, PoisonError, mpsc},
        thread,
    };

    static TIMEKEEPER: Mutex<Option<Handle>> = Mutex::new(None);

    // No runtime can be entered while a thread ends.
    if Handle::try_current().is_err_and(|error| error.is_thread_local_destroyed()) {
        return None;
    }
    let mut timekeeper = TIMEKEEPER.lock().unwrap_or_else(PoisonError::into_inner);
    if timekeeper.is_none() {
        let (started, handle) = mpsc::sync_channel(1);
        let run = move || {
            if let Ok(runtime) = runtime::Builder::new_current_thread().enable_time().build() {
                let _ = started.send(runtime.handle().clone());
                runtime.block_on(pending::<()>());
            }
        };
        thread::Builder::new().name("tower-selam-timer".into()).spawn(run).ok()?;
        *timekeeper = handle.recv().ok();
    }
    timekeeper.clone()
}

fn after(limit: Duration) -> Instant {
    let now = monotonic();
    now.checked_add(limit).unwrap_or(now)
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use tokio::runtime::{Builder, Runtime};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    fn runtime() -> Runtime {
        Builder::new_current_thread().enable_time().start_paused(true).build().unwrap()
    }

    fn poll(timer: &mut Timer) -> Option<Poll<()>> {
        timer.poll(&mut Context::from_waker(Waker::noop()))
    }

    /// Polls the timer on `runtime`, at once and after `time`.
    fn poll_after(runtime: &Runtime, timer: &mut Timer, time: Duration) -> [Option<Poll<()>>; 2] {
        runtime.block_on(async {
            let at_once = poll(timer);
            tokio::time::advance(time).await;
            [at_once, poll(timer)]
        })
    }

    /// F4: also if the runtime that it was made on has shut down.
    #[test]
    fn a_moved_timer_ends_on_time() {
        let [pending, ready] = [Some(Poll::Pending), Some(Poll::Ready(()))];
        for shuts_down in [false, true] {
            let (first, second) = (runtime(), runtime());
            let mut timer = first.block_on(async { Timer::new(LIMIT) });
            assert_eq!(poll_after(&first, &mut timer, LIMIT / 2), [pending; 2]);
            if shuts_down {
                drop(first);
            }
            assert_eq!(poll_after(&second, &mut timer, LIMIT / 2), [pending; 2]);
            assert_eq!(poll_after(&second, &mut timer, LIMIT), [pending, ready]);
        }
    }

    /// F4: moving back and forth between runtimes does not restart the timer.
    #[test]
    fn moves_do_not_extend_the_limit() {
        let (first, second) = (runtime(), runtime());
        let mut timer = first.block_on(async { Timer::new(LIMIT) });
        let mut turns = 0;
        let half_a_second = Duration::from_millis(500);
        while [&first, &second]
            .iter()
            .all(|runtime| poll_after(runtime, &mut timer, half_a_second) == [Some(Poll::Pending); 2])
        {
            turns += 1;
            assert!(turns <= 10, "each move restarts the timer");
        }
    }

    /// F5: without a runtime, without its timers, and after its shutdown.
    #[test]
    fn polls_without_timers_return_none() {
        let mut timer = Timer::new(LIMIT);
        assert_eq!(poll(&mut timer), None);
        let without = Builder::new_current_thread().build().unwrap();
        assert_eq!(without.block_on(async { poll(&mut timer) }), None);

        let with = runtime();
        assert_eq!(poll_after(&with, &mut timer, Duration::ZERO), [Some(Poll::Pending); 2]);
        let handle = with.handle().clone();
        drop(with);
        let _entered = handle.enter();
        assert_eq!([poll(&mut timer), poll(&mut timer)], [None; 2]);
    }

    #[test]
    fn the_longest_limit_does_not_overflow() {
        let runtime = runtime();
        let mut timer = runtime.block_on(async { Timer::new(Duration::MAX) });
        assert_eq!(poll_after(&runtime, &mut timer, Duration::from_secs(3_600)), [Some(Poll::Pending); 2]);
    }
}
