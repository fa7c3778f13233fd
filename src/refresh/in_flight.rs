//! A refresh that is running, and the future that waits for it.

use std::{
    fmt,
    future::poll_fn,
    pin::{Pin, pin},
    sync::{Arc, OnceLock},
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    runtime::{self, Handle},
    time::Instant,
};

use super::{
    reentrancy::{has_taken_turn, is_own_refresh, own_source},
    turns::Turns,
};
use crate::{
    AuthError,
    util::{clock::monotonic, sync::watch, timer::Timer},
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
    turn: Option<Turn>,
    /// After this time the refresh ends on its own, provided that its runtime is driven.
    timeout: Duration,
    runtime: Option<runtime::Id>,
    engine: usize,
    abandon: Box<dyn Fn() + Send + Sync>,
}

/// The turn that a refresh waits for before it begins.
struct Turn {
    turns: Arc<Turns>,
    ticket: u64,
    /// When it came.
    began: OnceLock<Instant>,
}

impl InFlight {
    /// `engine` is the engine's address, and `abandon` gives the refresh up. A repeated refresh takes over the `results`,
    /// and with them the waiters, of the one before. With `turns`, the refresh waits for its [turn](Self::turn).
    pub(super) fn new(
        results: Option<Results>,
        turns: Option<Arc<Turns>>,
        timeout: Duration,
        engine: usize,
        abandon: Box<dyn Fn() + Send + Sync>,
    ) -> Self {
        let results = results.unwrap_or_else(|| Arc::new(watch::Sender::new(None)));
        let runtime = Handle::try_current().ok().map(|runtime| runtime.id());
        let turn = turns.map(|turns| Turn { ticket: turns.ticket(), turns, began: OnceLock::new() });
        Self(Arc::new(Flight { results, turn, timeout, runtime, engine, abandon }))
    }

    /// Queues the refresh for its turn, if it needs one.
    pub(super) fn enter(&self) {
        if let Some(Turn { turns, ticket, .. }) = &self.0.turn {
            turns.enter(*ticket, self.clone());
        }
    }

    /// Lets the next refresh have its turn.
    pub(super) fn leave(&self) {
        if let Some(Turn { turns, ticket, .. }) = &self.0.turn {
            turns.leave(*ticket);
        }
    }

    /// Tells the refresh that its turn has come, and its waiters to keep the time from now on.
    pub(super) fn begin(&self) {
        if let Some(turn) = &self.0.turn
            && turn.began.set(monotonic()).is_ok()
        {
            self.0.results.send_if_modified(|_| true);
        }
    }

    pub(super) fn has_begun(&self) -> bool {
        self.0.turn.as_ref().is_none_or(|turn| turn.began.get().is_some())
    }

    /// Whether the refresh should have ended long since.
    pub(super) fn is_overdue(&self) -> bool {
        let began = self.0.turn.as_ref().and_then(|turn| turn.began.get());
        began.is_some_and(|began| began.elapsed() >= self.0.limit())
    }

    pub(super) fn abandon(&self) {
        (self.0.abandon)();
    }

    /// Waits for the turn of this refresh.
    pub(super) async fn turn(&self) {
        let Some(Turn { turns, .. }) = self.0.turn.as_ref().filter(|_| !self.has_begun()) else { return };
        let mut progress = self.0.results.subscribe();
        let mut begun = pin!(progress.wait_for(|_| self.has_begun()));
        let mut timer = Timer::new(self.0.limit());
        poll_fn(|cx| {
            while begun.as_mut().poll(cx).is_pending() {
                match timer.poll(cx) {
                    Some(Poll::Ready(())) => turns.abandon_overdue(),
                    _ => return Poll::Pending,
                }
                timer = Timer::new(self.0.limit());
            }
            Poll::Ready(())
        })
        .await;
    }

    pub(super) fn results(&self) -> Results {
        Arc::clone(&self.0.results)
    }

    /// Wakes all waiters with the result. The first result counts.
    pub(super) fn complete(&self, result: Result<(), AuthError>) {
        self.leave();
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

impl Flight {
    /// After this time others may abandon the refresh.
    fn limit(&self) -> Duration {
        self.timeout.saturating_add(MARGIN)
    }
}

impl fmt::Debug for InFlight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InFlight").finish_non_exhaustive()
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
        let flight = &*self.in_flight.0;
        let here = Handle::try_current().ok().map(|here| here.id());
        if !self.in_flight.has_begun() || (!self.is_watchdog && here.is_some() && here == flight.runtime) {
            return Poll::Pending;
        }
        let timer = self.timer.get_or_insert_with(|| Box::new(Timer::new(flight.limit())));
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
                if let Some(Turn { turns, ticket, .. }) = &in_flight.0.turn
                    && has_taken_turn(Arc::as_ptr(turns).addr())
                {
                    turns.promote(*ticket, in_flight);
                }
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
            self.in_flight.abandon();
            return Poll::Ready(Ok(()));
        }
        Poll::Pending
    }
}

#[cfg(all(test, not(model)))]
mod tests {
    use tokio_test::{assert_pending, assert_ready, task};

    use super::*;
    use crate::refresh::reentrancy::refresh_of;

    fn in_flight() -> InFlight {
        InFlight::new(None, None, Duration::ZERO, 0, Box::new(|| ()))
    }

    /// M2, F7: also if the refresh that waits for it comes before it is queued.
    #[test]
    fn refresh_that_another_waits_for_begins_out_of_turn() {
        let turns = Arc::new(Turns::new(1));
        let [running, next] = [(); 2]
            .map(|()| InFlight::new(None, Some(Arc::clone(&turns)), Duration::ZERO, 0, Box::new(|| ())));
        running.enter();
        let wait = WaitForRefresh::new(next.clone());
        let mut waiter = task::spawn(refresh_of(1, Arc::as_ptr(&turns).addr(), wait));
        assert_pending!(waiter.poll());
        next.enter();
        assert!(running.has_begun() && next.has_begun());

        // It does not count towards the limit.
        running.complete(Ok(()));
        let third = InFlight::new(None, Some(turns), Duration::ZERO, 0, Box::new(|| ()));
        third.enter();
        assert!(third.has_begun());
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
