//! A limit to what somebody else could draw out: [`Timer`].

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

/// A time from when it is made, wherever it is polled: a runtime drives its own timers alone, and may be gone when a future
/// goes on in another.
pub(crate) struct Timer {
    limit: Duration,
    due: Instant,
    there: Option<There>,
}

/// The timer of one runtime.
struct There {
    runtime: runtime::Id,
    /// `None` where it has no timers, or is gone.
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Timer {
    pub(crate) fn new(limit: Duration) -> Self {
        let limit = limit.min(LONG);
        Self { limit, due: after(limit), there: None }
    }

    /// `None` where no runtime has the time.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Option<Poll<()>> {
        self.follow();
        let there = self.there.as_mut()?;
        let sleep = there.sleep.as_mut()?;
        // It panics where its runtime is gone, and there is no asking.
        let polled = catch_unwind(AssertUnwindSafe(|| sleep.as_mut().poll(cx)));
        polled.inspect_err(|_| there.sleep = None).ok()
    }

    fn follow(&mut self) {
        let Ok(here) = Handle::try_current() else { return };
        if self.there.as_ref().is_some_and(|there| there.runtime == here.id()) {
            return;
        }
        // The time of a test may be another there.
        let due = self.due.min(after(self.limit));
        // There is no asking a runtime whether it has timers either.
        let sleep = catch_unwind(|| Box::pin(sleep_until(due))).ok();
        self.there = Some(There { runtime: here.id(), sleep });
    }
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

    /// How it is polled there, at once and when so much time has passed.
    fn poll_after(runtime: &Runtime, timer: &mut Timer, time: Duration) -> [Option<Poll<()>>; 2] {
        runtime.block_on(async {
            let at_once = poll(timer);
            tokio::time::advance(time).await;
            [at_once, poll(timer)]
        })
    }

    #[test]
    fn f4_it_ends_on_time_where_it_was_made_and_wherever_else_it_is_polled() {
        let [pending, ready] = [Some(Poll::Pending), Some(Poll::Ready(()))];
        for is_gone in [false, true] {
            let (one, other) = (runtime(), runtime());
            let mut timer = one.block_on(async { Timer::new(LIMIT) });
            assert_eq!(poll_after(&one, &mut timer, LIMIT / 2), [pending; 2]);
            if is_gone {
                drop(one);
            }
            assert_eq!(poll_after(&other, &mut timer, LIMIT / 2), [pending; 2]);
            assert_eq!(poll_after(&other, &mut timer, LIMIT), [pending, ready]);
        }
    }

    #[test]
    fn f4_moves_do_not_draw_it_out() {
        let (one, other) = (runtime(), runtime());
        let mut timer = one.block_on(async { Timer::new(LIMIT) });
        let mut turns = 0;
        let half_a_second = Duration::from_millis(500);
        while [&one, &other]
            .iter()
            .all(|runtime| poll_after(runtime, &mut timer, half_a_second) == [Some(Poll::Pending); 2])
        {
            turns += 1;
            assert!(turns <= 10, "it begins anew each time");
        }
    }

    #[test]
    fn f5_no_runtime_or_none_with_timers_or_one_that_is_gone_has_the_time() {
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
    fn a_time_without_end_is_one() {
        let runtime = runtime();
        let mut timer = runtime.block_on(async { Timer::new(Duration::MAX) });
        assert_eq!(poll_after(&runtime, &mut timer, Duration::from_secs(3_600)), [Some(Poll::Pending); 2]);
    }
}
