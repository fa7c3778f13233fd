//! The response future: passes a response on, or replays the request after a 401.

use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use http::{Request, Response, StatusCode};
use http_body::Body;
use pin_project_lite::pin_project;
use tower::Service;

use super::{
    Replay,
    blame::{Blame, is_accepted},
    captured::Captured,
};
use crate::{
    CloneClient,
    auth_error::{BodyLimits, InspectedBody, Inspection},
    authorize::Undecided,
    refresh::{Rejection, WaitForRefresh},
    telemetry::{event, span::Span},
    util::timer::Timer,
};

/// How long a client may take to let go of the body of a request that was rejected before it was sent completely.
const BODY_RELEASE_TIMEOUT: Duration = Duration::from_secs(5);

pin_project! {
    /// Response future of [`Refresh`](super::Refresh).
    ///
    /// # Cancel safety
    ///
    /// Dropping it drops the request. A refresh that it waits for continues.
    pub struct ResponseFuture<F, A> {
        // `None` once the request is being replayed.
        #[pin]
        first: Option<F>,
        attempt: A,
    }
}

/// A request under way, and what it takes to replay it.
#[expect(unnameable_types, reason = "an opaque parameter of `ResponseFuture`")]
pub struct Attempt<S, R, ReqBody, ResBody>
where
    S: Service<Request<R::Body>>,
    R: Replay<ReqBody>,
    ResBody: Body,
{
    replay: R,
    captured: Option<Captured<S, R::Captured>>,
    recovery: Option<Box<Recovery<S, R::Body, ResBody>>>,
}

/// What happens after a 401.
enum Recovery<S, B, ResBody>
where
    S: Service<Request<B>>,
    ResBody: Body,
{
    /// The body of the 401 is being read.
    Reading { rejected: Box<Inspection<ResBody>> },
    /// A refresh is awaited, if one is needed.
    Refreshing { rejected: Box<Inspection<ResBody>>, blame: Blame, refresh: Option<WaitForRefresh> },
    /// The client may still be sending the request's body.
    ReleasingBody { rejected: Box<Inspection<ResBody>>, blame: Blame, timeout: Timer },
    /// The service is not ready for the replay.
    NotReady { service: S, request: Request<B>, blame: Blame },
    /// The second response is awaited, which is returned whatever it is.
    Replaying { response: Pin<Box<S::Future>>, blame: Blame, span: Span },
}

/// What follows a step.
enum Next<S, B, ResBody, E>
where
    S: Service<Request<B>>,
    ResBody: Body,
{
    Step(Recovery<S, B, ResBody>),
    Return(Result<Response<InspectedBody<ResBody>>, E>),
}

impl<F, A> ResponseFuture<F, A> {
    #[inline]
    pub(super) fn new(response: F, attempt: A) -> Self {
        Self { first: Some(response), attempt }
    }
}

impl<S, R, ReqBody, ResBody> Attempt<S, R, ReqBody, ResBody>
where
    S: Service<Request<R::Body>>,
    R: Replay<ReqBody>,
    ResBody: Body,
{
    #[inline]
    pub(super) fn new(replay: R, captured: Option<Captured<S, R::Captured>>) -> Self {
        Self { replay, captured, recovery: None }
    }
}

impl<S, R, ReqBody, ResBody> Future for ResponseFuture<S::Future, Attempt<S, R, ReqBody, ResBody>>
where
    S: Service<Request<R::Body>, Response = Response<ResBody>> + CloneClient,
    R: Replay<ReqBody>,
    ResBody: Body,
{
    type Output = Result<Response<InspectedBody<ResBody>>, S::Error>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        if let Some(first) = this.first.as_mut().as_pin_mut() {
            match ready!(first.poll(cx)) {
                Ok(response) if response.status() == StatusCode::UNAUTHORIZED && can_recover(&response) => {
                    let rejected = Inspection::new(response, BodyLimits::default());
                    this.attempt.recovery = Some(Box::new(Recovery::Reading { rejected }));
                    this.first.set(None);
                }
                Ok(response) => return Poll::Ready(Ok(response.map(InspectedBody::unread))),
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        this.attempt.poll_recovery(cx)
    }
}

/// Whether a 401 concerns a credential that can be replaced.
#[cold]
fn can_recover<B>(response: &Response<B>) -> bool {
    response.extensions().get().is_some_and(Blame::is_possible)
}

impl<S, R, ReqBody, ResBody> Attempt<S, R, ReqBody, ResBody>
where
    S: Service<Request<R::Body>, Response = Response<ResBody>> + CloneClient,
    R: Replay<ReqBody>,
    ResBody: Body,
{
    #[cold]
    fn poll_recovery(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Response<InspectedBody<ResBody>>, S::Error>> {
        loop {
            let Some(step) = &mut self.recovery else { return Poll::Pending };
            match &mut **step {
                Recovery::Reading { rejected } => ready!(rejected.poll(cx)),
                Recovery::Refreshing { refresh: Some(refresh), .. } => {
                    // Whether it succeeded shows in whether there is a replacement.
                    let _ = ready!(Pin::new(refresh).poll(cx));
                }
                Recovery::Refreshing { refresh: None, .. } => {}
                Recovery::ReleasingBody { timeout, .. } => {
                    if let Some(captured) = &mut self.captured
                        && self.replay.poll_captured(&mut captured.body, cx).is_pending()
                    {
                        ready!(timeout.poll(cx).unwrap_or(Poll::Ready(())));
                    }
                }
                Recovery::NotReady { service, .. } => ready!(service.poll_ready(cx))?,
                Recovery::Replaying { response, blame, span } => {
                    let second = ready!(span.in_scope(|| response.as_mut().poll(cx)));
                    match &second {
                        Ok(response) => span.responded(response.status()),
                        Err(_) => span.failed(),
                    }
                    if second.as_ref().is_ok_and(accepts) {
                        blame.accept();
                    }
                    event::request_replayed(second.as_ref().ok().map(Response::status));
                    return Poll::Ready(second.map(|response| response.map(InspectedBody::unread)));
                }
            }
            let Some(step) = self.recovery.take() else { return Poll::Pending };
            match self.next(*step) {
                Next::Step(step) => self.recovery = Some(Box::new(step)),
                Next::Return(result) => return Poll::Ready(result),
            }
        }
    }

    /// Continues after a step has been completed.
    fn next(&mut self, step: Recovery<S, R::Body, ResBody>) -> Next<S, R::Body, ResBody, S::Error> {
        let give_up = |rejected: Box<Inspection<ResBody>>| Next::Return(Ok(rejected.into_response()));
        Next::Step(match step {
            Recovery::Reading { rejected } => {
                let kind = rejected.error().kind();
                let Some(blame) = rejected.sent().and_then(|sent| Blame::assign(sent, kind)) else {
                    return give_up(rejected);
                };
                // Even if this request cannot be replayed, the next one needs another credential.
                let refresh = match blame.reject() {
                    _ if self.captured.is_none() => return give_up(rejected),
                    (Rejection::Superseded, _) => None,
                    (_, Some(in_flight)) => Some(WaitForRefresh::new(in_flight)),
                    (_, None) => return give_up(rejected),
                };
                Recovery::Refreshing { rejected, blame, refresh }
            }
            Recovery::Refreshing { rejected, blame, .. } if blame.has_replacement() => {
                Recovery::ReleasingBody { rejected, blame, timeout: Timer::new(BODY_RELEASE_TIMEOUT) }
            }
            Recovery::Refreshing { rejected, .. } => return give_up(rejected),
            Recovery::ReleasingBody { rejected, blame, .. } => match self.restore() {
                Some((service, request)) => Recovery::NotReady { service, request, blame },
                None => return give_up(rejected),
            },
            Recovery::NotReady { mut service, request, blame } => {
                let span = Span::http_request(request.method(), request.uri(), Some(1));
                let response = span.in_scope(|| Box::pin(service.call(request)));
                Recovery::Replaying { response, blame, span }
            }
            replaying @ Recovery::Replaying { .. } => replaying,
        })
    }

    /// The request as it was, and a service to send it with; `None` if its body cannot be sent again.
    fn restore(&mut self) -> Option<(S, Request<R::Body>)> {
        let Captured { head, body, spare } = self.captured.take()?;
        let body = self.replay.restore(body)?;
        Some((spare.service(), head.into_request(body)?))
    }
}

/// Whether the response accepts the credentials, whatever its trailers may say.
fn accepts<B>(response: &Response<B>) -> bool {
    is_accepted(response.status()) && response.extensions().get::<Undecided>().is_none()
}

impl<S, R, ReqBody, ResBody> fmt::Debug for Attempt<S, R, ReqBody, ResBody>
where
    S: Service<Request<R::Body>>,
    R: Replay<ReqBody>,
    ResBody: Body,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attempt").finish_non_exhaustive()
    }
}

impl<F, A> fmt::Debug for ResponseFuture<F, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}
