//! [`Timer`]: a time limit that keeps working when its future moves to another runtime.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    runtime::{self, Handle},
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
    /// `None` if the runtime has no timers or has shut down.
    sleep: Option<Pin<Box<Sleep>>>,
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
        // Polling panics if the runtime has shut down, and there is no way to ask beforehand.
        let polled = catch_unwind(AssertUnwindSafe(|| sleep.as_mut().poll(cx)));
        polled.inspect_err(|_| armed.sleep = None).ok()
    }

    /// Makes a timer of the current runtime, unless there is one.
    fn arm(&mut self) {
        let Ok(current) = Handle::try_current() else { return };
        if self.armed.as_ref().is_some_and(|armed| armed.runtime == current.id()) {
            return;
        }
        // Paused runtimes have separate clocks, and `due` may be far away by this one.
        let due = self.due.min(after(self.limit));
        // Panics if the runtime has no timers, which cannot be asked beforehand either.
        let sleep = catch_unwind(|| Box::pin(sleep_until(due))).ok();
        self.armed = Some(Armed { runtime: current.id(), sleep });
    }
}

/// Whether this thread is on a runtime with timers. A runtime cannot be asked: making a timer panics if it has none.
pub(crate) fn has_timers() -> bool {
    Handle::try_current().is_ok() && catch_unwind(|| drop(sleep_until(monotonic()))).is_ok()
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
