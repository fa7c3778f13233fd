//! [`ThrottleLayer`]: lets requests wait while the account's rate limit is used up.

use std::{
    mem,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use http::Response;
use pin_project_lite::pin_project;
use tokio::sync::Notify;
use tower::{Layer, Service};

use super::{
    MAX_WAIT,
    window::{Answer, Ticket, Window},
};
use crate::{
    CloneClient,
    util::{clock::monotonic, timer},
};

/// Lets requests wait while the account's rate limit is used up. See the [module docs](super#throttling).
///
/// Clones, and the services that they make, share one view of the limit. Use one layer for each account.
#[doc(alias("rate_limit", "RateLimitLayer"))]
#[derive(Clone, Debug)]
pub struct ThrottleLayer {
    line: Arc<Line>,
    max_wait: Duration,
}

impl ThrottleLayer {
    /// Creates the layer. A request waits for at most 90 seconds.
    #[must_use]
    pub fn new() -> Self {
        let (window, front, changed) =
            (Mutex::new(Window::new()), tokio::sync::Mutex::new(()), Notify::new());
        Self { line: Arc::new(Line { window, front, changed }), max_wait: MAX_WAIT }
    }

    /// Limits how long a request waits. Then it is sent, and the API decides. The default is 90 seconds: the API's window of
    /// a minute, and a margin.
    #[must_use]
    pub fn with_max_wait(mut self, wait: Duration) -> Self {
        self.max_wait = wait;
        self
    }
}

impl Default for ThrottleLayer {
    fn default() -> Self {
        Self::new()
    }
}

impl<S> Layer<S> for ThrottleLayer {
    type Service = Throttle<S>;

    fn layer(&self, inner: S) -> Throttle<S> {
        Throttle { inner, line: Arc::clone(&self.line), max_wait: self.max_wait }
    }
}

/// The requests of one account: a window, and those that wait for it.
#[derive(Debug)]
struct Line {
    window: Mutex<Window>,
    /// Held by the request at the front of the line, which alone watches the window. The others queue for it, first come,
    /// first served, so that one end of a window does not wake them all.
    front: tokio::sync::Mutex<()>,
    /// Wakes the request at the front.
    changed: Notify,
}

impl Line {
    fn window(&self) -> MutexGuard<'_, Window> {
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Admits a request at once, if nobody waits and the window allows it.
    fn try_admit(self: &Arc<Self>) -> Option<Permit> {
        let _front = self.front.try_lock().ok()?;
        let ticket = self.window().admit(monotonic()).ok()?;
        Some(self.permit(ticket))
    }

    /// Waits for the request's turn.
    async fn wait(&self) -> Ticket {
        let _front = self.front.lock().await;
        loop {
            let admitted = self.window().admit(monotonic());
            match admitted {
                Ok(ticket) => return ticket,
                Err(None) => self.changed.notified().await,
                Err(Some(ends)) => {
                    let left = ends.saturating_duration_since(monotonic());
                    // Either way, the window is asked again.
                    let _ = timer::timeout(left, self.changed.notified()).await;
                }
            }
        }
    }

    fn permit(self: &Arc<Self>, ticket: Ticket) -> Permit {
        Permit { line: Arc::clone(self), ticket: Some(ticket) }
    }
}

/// Waits for a permit, and takes one without a turn after `max_wait` or where there are no timers.
async fn admit(line: Arc<Line>, max_wait: Duration) -> Permit {
    let ticket =
        timer::timeout(max_wait, line.wait()).await.unwrap_or_else(|_| line.window().force(monotonic()));
    line.permit(ticket)
}

/// A request in flight. Dropping it ends the request without a response.
struct Permit {
    line: Arc<Line>,
    ticket: Option<Ticket>,
}

impl Permit {
    fn finish(&mut self, answer: Answer) {
        if let Some(ticket) = self.ticket.take() {
            self.line.window().finish(ticket, answer, monotonic());
            self.line.changed.notify_one();
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.finish(Answer::Unknown);
    }
}

/// Lets requests wait while the account's rate limit is used up. Made by [`ThrottleLayer`]; see the
/// [module docs](super#throttling).
#[derive(Clone, Debug)]
pub struct Throttle<S> {
    inner: S,
    line: Arc<Line>,
    max_wait: Duration,
}

impl<S> Throttle<S> {
    inner_accessors!();
}

impl<S, Req, B> Service<Req> for Throttle<S>
where
    S: Service<Req, Response = Response<B>> + CloneClient,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = ResponseFuture<S, Req>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Req) -> Self::Future {
        let state = match self.line.try_admit() {
            Some(permit) => State::Sent { response: self.inner.call(request), permit },
            None => {
                // Readiness may hold a permit of the inner service, which others can use while this request waits.
                let clone = self.inner.clone();
                drop(mem::replace(&mut self.inner, clone));
                let turn = Turn::Waiting(Box::pin(admit(Arc::clone(&self.line), self.max_wait)));
                State::Waiting {
                    waiting: Some(Box::new(Waiting { turn, service: self.inner.clone(), request })),
                }
            }
        };
        ResponseFuture { state }
    }
}

pin_project! {
    /// Response future of [`Throttle`].
    ///
    /// # Cancel safety
    ///
    /// Dropping it while it waits gives the place in line away, and nothing is sent.
    pub struct ResponseFuture<S, Req>
    where
        S: Service<Req>,
    {
        #[pin]
        state: State<S::Future, S, Req>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<F, S, Req> {
        // The request was sent, and its response is awaited.
        Sent { #[pin] response: F, permit: Permit },
        // The request waits for its turn, or for the service to be ready.
        Waiting { waiting: Option<Box<Waiting<S, Req>>> },
    }
}

/// A request that is not sent yet.
struct Waiting<S, Req> {
    turn: Turn,
    service: S,
    request: Req,
}

enum Turn {
    Waiting(Pin<Box<dyn Future<Output = Permit> + Send + Sync>>),
    Come(Permit),
}

impl<S, Req, B> Future for ResponseFuture<S, Req>
where
    S: Service<Req, Response = Response<B>>,
{
    type Output = Result<S::Response, S::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.project().state;
        loop {
            match state.as_mut().project() {
                StateProj::Sent { response, permit } => {
                    let result = ready!(response.poll(cx));
                    permit.finish(match &result {
                        Ok(response) => Answer::read(response.status(), response.headers()),
                        Err(_) => Answer::Unknown,
                    });
                    return Poll::Ready(result);
                }
                StateProj::Waiting { waiting: slot } => {
                    let Some(waiting) = slot else { return Poll::Pending };
                    if let Turn::Waiting(turn) = &mut waiting.turn {
                        waiting.turn = Turn::Come(ready!(turn.as_mut().poll(cx)));
                    }
                    ready!(waiting.service.poll_ready(cx))?;
                    let Some(waiting) = slot.take() else { return Poll::Pending };
                    let Waiting { turn: Turn::Come(permit), mut service, request } = *waiting else {
                        return Poll::Pending;
                    };
                    let response = service.call(request);
                    state.set(State::Sent { response, permit });
                }
            }
        }
    }
}

opaque_debug!(ResponseFuture<S, Req> where S: Service<Req>);
