//! A refresh that is running, and the future that waits for it.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::runtime::{self, Handle};

use super::reentrancy::{is_own_refresh, own_source};
use crate::{
    AuthError,
    util::{sync::watch, timer::Timer},
};

/// How much longer than the refresh itself a waiter gives it before it abandons the refresh.
const MARGIN: Duration = Duration::from_secs(1);

/// The result of a refresh, for all its waiters.
pub(super) type Results = Arc<watch::Sender<Option<Result<(), AuthError>>>>;

/// A refresh that is running.
#[derive(Clone)]
pub(crate) struct InFlight(Arc<Flight>);

struct Flight {
    results: Results,
    /// When the refresh ends on its own, provided that its runtime is driven.
    timeout: Duration,
    runtime: Option<runtime::Id>,
    engine: usize,
    abandon: Box<dyn Fn() + Send + Sync>,
}

impl InFlight {
    /// `engine` is the engine's address, and `abandon` gives the refresh up. A repeated refresh takes over the `results`,
    /// and with them the waiters, of the one before.
    pub(super) fn new(
        results: Option<Results>,
        timeout: Duration,
        engine: usize,
        abandon: Box<dyn Fn() + Send + Sync>,
    ) -> Self {
        let results = results.unwrap_or_else(|| Arc::new(watch::Sender::new(None)));
        let runtime = Handle::try_current().ok().map(|runtime| runtime.id());
        Self(Arc::new(Flight { results, timeout, runtime, engine, abandon }))
    }

    pub(super) fn results(&self) -> Results {
        Arc::clone(&self.0.results)
    }

    /// Wakes all waiters with the result. The first result counts.
    pub(super) fn complete(&self, result: Result<(), AuthError>) {
        self.0.results.send_if_modified(|current| {
            let is_first = current.is_none();
            current.get_or_insert(result);
            is_first
        });
    }

    pub(super) fn result(&self) -> Option<Result<(), AuthError>> {
        self.0.results.borrow().clone()
    }

    #[cfg(all(test, model))]
    pub(super) fn shares_waiters_with(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0.results, &other.0.results)
    }
}

/// Waits until a refresh has ended.
///
/// A refresh whose runtime was shut down, or whose source blocks its thread, never ends on its own; a waiter abandons it
/// after its timeout.
pub(crate) struct WaitForRefresh {
    in_flight: InFlight,
    /// From the first poll on.
    completed: Option<Pin<Box<dyn Future<Output = ()> + Send + Sync>>>,
    /// Whether it keeps the time even on the runtime that runs the refresh. One such watchdog serves all waiters there.
    is_watchdog: bool,
    /// Boxed because most waiters never need it.
    timer: Option<Box<Timer>>,
}

impl WaitForRefresh {
    pub(crate) fn new(in_flight: InFlight) -> Self {
        Self { in_flight, completed: None, is_watchdog: false, timer: None }
    }

    pub(super) fn watchdog(in_flight: InFlight) -> Self {
        Self { is_watchdog: true, ..Self::new(in_flight) }
    }

    fn poll_timeout(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Flight { timeout, runtime, .. } = &*self.in_flight.0;
        let here = Handle::try_current().ok().map(|here| here.id());
        if !self.is_watchdog && here.is_some() && here == *runtime {
            return Poll::Pending;
        }
        let timer = self.timer.get_or_insert_with(|| Box::new(Timer::new(timeout.saturating_add(MARGIN))));
        // Without a runtime that has timers, only the result can end the wait.
        timer.poll(cx).unwrap_or(Poll::Pending)
    }
}

impl Future for WaitForRefresh {
    type Output = Result<(), AuthError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Self { in_flight, completed, .. } = &mut *self;
        let completed = match completed {
            Some(completed) => completed,
            // Another task may have asked on behalf of this one.
            None if is_own_refresh(in_flight.0.engine) => return Poll::Ready(Err(own_source())),
            None => {
                let mut result = in_flight.0.results.subscribe();
                completed.insert(Box::pin(async move {
                    let _ = result.wait_for(Option::is_some).await;
                }))
            }
        };
        if completed.as_mut().poll(cx).is_ready() {
            return Poll::Ready(self.in_flight.result().unwrap_or(Ok(())));
        }
        if self.poll_timeout(cx).is_ready() {
            (self.in_flight.0.abandon)();
            return Poll::Ready(Ok(()));
        }
        Poll::Pending
    }
}

#[cfg(all(test, not(model)))]
mod tests {
    use tokio_test::{assert_pending, assert_ready, task};

    use super::*;

    fn in_flight() -> InFlight {
        InFlight::new(None, Duration::ZERO, 0, Box::new(|| ()))
    }

    /// F1, F2: every waiter gets the first result.
    #[test]
    fn all_waiters_share_the_first_result() {
        let in_flight = in_flight();
        let mut waiters = [(); 3].map(|()| task::spawn(WaitForRefresh::new(in_flight.clone())));
        for waiter in &mut waiters {
            assert_pending!(waiter.poll());
        }
        in_flight.complete(Err(own_source()));
        in_flight.complete(Ok(()));
        for waiter in &mut waiters {
            assert!(waiter.is_woken());
            assert!(assert_ready!(waiter.poll()).is_err());
        }
        assert!(assert_ready!(task::spawn(WaitForRefresh::new(in_flight)).poll()).is_err());
    }

    /// F4: waiters that were dropped leave nothing behind.
    #[test]
    fn dropped_waiters_are_forgotten() {
        let in_flight = in_flight();
        for _ in 0..1_000 {
            let mut waiter = task::spawn(WaitForRefresh::new(in_flight.clone()));
            assert_pending!(waiter.poll());
        }
        assert_eq!(in_flight.0.results.receiver_count(), 0);
        assert_eq!(Arc::strong_count(&in_flight.0), 1);
    }

    /// T2
    #[test]
    fn waiters_are_send_and_sync() {
        fn check<T: Send + Sync + Unpin>() {}
        check::<WaitForRefresh>();
    }
}
