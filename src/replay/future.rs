use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use http::{Request, Response, StatusCode};
use http_body::Body;
use pin_project_lite::pin_project;
use tower_service::Service;

use super::{Replay, head::HeadCopy, service::Spare};
use crate::{
    AuthErrorKind, Credentials,
    auth_error::{Bounds, Collect, End, InspectedBody, Read},
    authorize::Sent,
    authorize::provider::Part,
    error::CloneClient,
    refresh::{Landing, Rejection, Wait},
    telemetry::event,
    util::cold::Cold,
    util::timer::Timer,
};

/// How long a client may take to let go of the body of a request that was refused.
const PATIENCE: Duration = Duration::from_secs(5);

pin_project! {
    /// Response future of [`Refresh`](super::Refresh). Dropping it drops the request, and leaves a renewal that
    /// it waits for running.
    pub struct ResponseFuture<F, S, R, ReqBody, ResBody>
    where
        R: Replay<ReqBody>,
        ResBody: Body,
    {
        #[pin]
        replaying: Replaying<F, S, R, ReqBody, ResBody>,
    }
}

impl<F, S, R: Replay<ReqBody>, ReqBody, ResBody: Body> ResponseFuture<F, S, R, ReqBody, ResBody> {
    #[inline]
    pub(super) fn new(replaying: Replaying<F, S, R, ReqBody, ResBody>) -> Self {
        Self { replaying }
    }
}

impl<S, R, ReqBody, ResBody> Future for ResponseFuture<S::Future, S, R, ReqBody, ResBody>
where
    S: Service<Request<R::Body>, Response = Response<ResBody>> + CloneClient,
    R: Replay<ReqBody>,
    ResBody: Body,
{
    type Output = Result<Response<InspectedBody<ResBody>>, S::Error>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.project().replaying.poll_or(
            cx,
            |response| response.map(InspectedBody::unread),
            |stopped| match stopped {
                Stopped::Refused(read) => Ok(read.into_response()),
                Stopped::Failed(error) => Err(error),
            },
        )
    }
}

impl<F, S, R: Replay<ReqBody>, ReqBody, ResBody: Body> fmt::Debug
    for ResponseFuture<F, S, R, ReqBody, ResBody>
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}

pin_project! {
    /// The same, before it is known what becomes of a 401 that goes up.
    pub(crate) struct Replaying<F, S, R, ReqBody, ResBody>
    where
        R: Replay<ReqBody>,
        ResBody: Body,
    {
        #[pin]
        state: State<F, S, R::Body, ResBody>,
        again: Again<S, R, ReqBody>,
    }
}

/// On a response that can yet turn out to be a refusal, in its trailers.
#[derive(Clone, Copy)]
pub(crate) struct Undecided;

/// What comes of [`Replaying`] instead of a response that passes: a 401 that goes up has been read.
pub(crate) enum Stopped<E, B: Body> {
    Failed(E),
    Refused(Box<Read<B>>),
}

/// What it takes to send a request again.
pub(crate) struct Again<S, R: Replay<ReqBody>, ReqBody> {
    pub(super) kept: Option<Kept<S, R::Captured>>,
    pub(super) replay: R,
}

pub(super) struct Kept<S, B> {
    pub(super) head: HeadCopy,
    pub(super) body: B,
    pub(super) spare: Spare<S>,
}

pin_project! {
    #[project = StateProj]
    enum State<F, S, B, ResBody>
    where
        ResBody: Body,
    {
        // The first response is awaited.
        First { #[pin] response: F },
        // It is a 401: seldom, and one state, so that the usual one is dropped as quickly as can be.
        Refused { step: Cold<Step<F, S, B, ResBody>> },
    }
}

/// What is awaited since the API refused.
enum Step<F, S, B, ResBody: Body> {
    /// What the 401 says.
    Reading { refusal: Box<Refusal<ResBody>> },
    /// Another credential.
    Refreshing { refusal: Box<Refusal<ResBody>>, renewal: Option<Box<Wait>> },
    /// The client, which may still be sending the body.
    LettingGo { refusal: Box<Refusal<ResBody>>, patience: Timer },
    /// The service, to be called again.
    Readiness { again: Box<(S, Request<B>)>, blamed: Option<Box<Blamed>> },
    /// The second response, which goes up whatever it is.
    Second { response: Pin<Box<F>>, blamed: Option<Box<Blamed>> },
}

/// A 401, and what it is about.
struct Refusal<B: Body> {
    collect: Box<Collect<B>>,
    end: Option<End<B::Error>>,
    blamed: Option<Blamed>,
}

/// What the API refused, and where another can come from.
pub(crate) struct Blamed {
    part: Part,
    sent: Credentials,
}

impl<F, S, R: Replay<ReqBody>, ReqBody, ResBody: Body> Replaying<F, S, R, ReqBody, ResBody> {
    #[inline]
    pub(crate) fn new(response: F, again: Again<S, R, ReqBody>) -> Self {
        Self { state: State::First { response }, again }
    }

    /// What the response is of that went up.
    #[cfg(feature = "tonic")]
    pub(crate) fn response(self: Pin<&mut Self>) -> Option<Pin<&mut F>> {
        match self.project().state.project() {
            StateProj::First { response } => Some(response),
            StateProj::Refused { step } => match step.as_mut()? {
                Step::Second { response, .. } => Some(response.as_mut()),
                _ => None,
            },
        }
    }
}

impl<S, R, ReqBody, ResBody> Future for Replaying<S::Future, S, R, ReqBody, ResBody>
where
    S: Service<Request<R::Body>, Response = Response<ResBody>> + CloneClient,
    R: Replay<ReqBody>,
    ResBody: Body,
{
    type Output = Result<Response<ResBody>, Stopped<S::Error, ResBody>>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.poll_or(cx, |response| response, Err)
    }
}

impl<S, R, ReqBody, ResBody> Replaying<S::Future, S, R, ReqBody, ResBody>
where
    S: Service<Request<R::Body>, Response = Response<ResBody>> + CloneClient,
    R: Replay<ReqBody>,
    ResBody: Body,
{
    /// Polls for the response that passes, and what comes instead is for `stop` to say.
    #[inline]
    fn poll_or<T, E>(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pass: impl FnOnce(Response<ResBody>) -> T,
        stop: impl FnOnce(Stopped<S::Error, ResBody>) -> Result<T, E>,
    ) -> Poll<Result<T, E>> {
        let polled = match self.as_mut().project().state.project() {
            StateProj::First { response } => match response.poll(cx) {
                Poll::Ready(Ok(response)) if response.status() == StatusCode::UNAUTHORIZED => {
                    self.refused(response, cx)
                }
                Poll::Ready(Ok(response)) => return Poll::Ready(Ok(pass(response))),
                polled => polled.map_err(Stopped::Failed),
            },
            _ => self.poll_refused(cx),
        };
        Poll::Ready(match ready!(polled) {
            Ok(response) => Ok(pass(response)),
            Err(stopped) => stop(stopped),
        })
    }

    #[cold]
    fn refused(
        mut self: Pin<&mut Self>,
        response: Response<ResBody>,
        cx: &mut Context<'_>,
    ) -> Poll<<Self as Future>::Output> {
        if !can_be_renewed(&response) {
            return Poll::Ready(Ok(response));
        }
        let step = Cold::new(Step::Reading { refusal: Refusal::new(response) });
        self.as_mut().project().state.set(State::Refused { step });
        self.poll_refused(cx)
    }

    #[cold]
    fn poll_refused(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<<Self as Future>::Output> {
        let this = self.project();
        let StateProj::Refused { step } = this.state.project() else { return Poll::Pending };
        loop {
            let Some(current) = step.as_mut() else { return Poll::Pending };
            if let Step::Second { response, blamed } = current {
                let second = ready!(response.as_mut().poll(cx));
                if let (Ok(response), Some(blamed)) = (&second, blamed)
                    && is_accepted(response)
                {
                    blamed.accept();
                }
                event::sent_again(second.as_ref().ok().map(Response::status));
                return Poll::Ready(second.map_err(Stopped::Failed));
            }
            ready!(current.poll(this.again, cx)).map_err(Stopped::Failed)?;
            let Some(current) = step.take() else { return Poll::Pending };
            *step = Cold::new(current.next(this.again)?);
        }
    }
}

impl<S, B, ResBody> Step<S::Future, S, B, ResBody>
where
    S: Service<Request<B>, Response = Response<ResBody>> + CloneClient,
    ResBody: Body,
{
    /// Waits until there is a next step.
    fn poll<R, ReqBody>(
        &mut self,
        again: &mut Again<S, R, ReqBody>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), S::Error>>
    where
        R: Replay<ReqBody, Body = B>,
    {
        match self {
            Self::Reading { refusal } => ready!(refusal.poll_read(cx)),
            Self::Refreshing { renewal: Some(wait), .. } => {
                // Whether it succeeded shows in what there is.
                let _ = ready!(Pin::new(wait).poll(cx));
            }
            Self::LettingGo { patience, .. } => {
                if again.poll_kept(cx).is_pending() {
                    ready!(patience.poll(cx).unwrap_or(Poll::Ready(())));
                }
            }
            Self::Readiness { again, .. } => ready!(again.0.poll_ready(cx))?,
            Self::Refreshing { renewal: None, .. } | Self::Second { .. } => {}
        }
        Poll::Ready(Ok(()))
    }

    /// The next step, unless the 401 goes up.
    fn next<R, ReqBody>(self, again: &mut Again<S, R, ReqBody>) -> Result<Self, Stopped<S::Error, ResBody>>
    where
        R: Replay<ReqBody, Body = B>,
    {
        Ok(match self {
            Self::Reading { mut refusal } => {
                let renewal = match refusal.reject() {
                    _ if again.kept.is_none() => return Err(refusal.stop()),
                    (Rejection::Superseded, _) => None,
                    (_, Some(landing)) => Some(Box::new(Wait::new(landing))),
                    (_, None) => return Err(refusal.stop()),
                };
                Self::Refreshing { refusal, renewal }
            }
            Self::Refreshing { refusal, .. } if refusal.has_other() => {
                Self::LettingGo { refusal, patience: Timer::new(PATIENCE) }
            }
            Self::Refreshing { refusal, .. } => return Err(refusal.stop()),
            Self::LettingGo { refusal, .. } => match again.take() {
                Some(again) => {
                    Self::Readiness { again: Box::new(again), blamed: refusal.blamed.map(Box::new) }
                }
                None => return Err(refusal.stop()),
            },
            Self::Readiness { again, blamed } => {
                let (mut service, request) = *again;
                Self::Second { response: Box::pin(service.call(request)), blamed }
            }
            second @ Self::Second { .. } => second,
        })
    }
}

impl<S, R: Replay<ReqBody>, ReqBody> Again<S, R, ReqBody> {
    /// A request that is not sent yet still has its head.
    pub(crate) fn forget_head(&mut self) {
        if let Some(kept) = &mut self.kept {
            kept.head = HeadCopy::default();
        }
    }

    /// The request is about to be sent.
    pub(crate) fn keep_head(&mut self, request: &Request<R::Body>) {
        if let Some(kept) = &mut self.kept {
            kept.head = HeadCopy::of(request);
        }
    }
}

impl<S: Clone, R: Replay<ReqBody>, ReqBody> Again<S, R, ReqBody> {
    fn poll_kept(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.kept {
            Some(kept) => self.replay.poll_captured(&mut kept.body, cx),
            None => Poll::Ready(()),
        }
    }

    /// The request as it was, and a service to send it with; `None` if either cannot be had.
    fn take(&mut self) -> Option<(S, Request<R::Body>)> {
        let Kept { head, body, spare } = self.kept.take()?;
        let request = head.into_request(self.replay.restore(body)?)?;
        Some((spare.service()?, request))
    }
}

/// Whether a 401 is on what can be another.
fn can_be_renewed<B>(refusal: &Response<B>) -> bool {
    refusal.extensions().get::<Sent>().is_some_and(|sent| sent.parts().any(renews))
}

impl<B: Body> Refusal<B> {
    fn new(response: Response<B>) -> Box<Self> {
        Box::new(Self { collect: Collect::new(response, Bounds::default()), end: None, blamed: None })
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.end.is_none() {
            self.end = Some(ready!(self.collect.poll(cx)));
        }
        Poll::Ready(())
    }

    /// Rejects what is at fault: how, and what to wait for.
    fn reject(&mut self) -> (Rejection, Option<Landing>) {
        let sent = self.collect.parts.extensions.get::<Sent>().cloned();
        let kind = self.collect.error(None).kind();
        self.blamed = sent.as_ref().and_then(|sent| Blamed::of(sent, kind));
        // The layer that reads the error for the caller needs it as well.
        if let Some(sent) = sent {
            self.collect.parts.extensions.insert(sent);
        }
        self.blamed.as_ref().map_or((Rejection::Ignored, None), Blamed::reject)
    }

    /// It goes up.
    fn stop<E>(self) -> Stopped<E, B> {
        let Self { collect, end, .. } = self;
        Stopped::Refused(Box::new(Read { collect: *collect, end: end.unwrap_or(End::OutOfBounds) }))
    }

    fn has_other(&self) -> bool {
        self.blamed.as_ref().is_some_and(Blamed::has_other)
    }
}

impl Blamed {
    /// What is at fault when `sent` was refused so; `None` when it is nothing that renews.
    pub(crate) fn of(sent: &Sent, kind: AuthErrorKind) -> Option<Self> {
        let with = |part: Part| {
            let has = |sent: &&Credentials| match part {
                Part::Key => sent.api_key().is_some(),
                Part::Jwt => sent.jwt().is_some(),
            };
            sent.parts().find(has).map(|sent| (part, sent))
        };
        let (part, sent) = match kind {
            AuthErrorKind::InvalidApiKey => with(Part::Key),
            AuthErrorKind::MissingApiKey => None,
            _ => with(Part::Jwt).or_else(|| with(Part::Key)),
        }?;
        let sent = sent.clone();
        sent.provenance().is_some().then_some(Self { part, sent })
    }

    /// Rejects it: how, and what to wait for.
    pub(crate) fn reject(&self) -> (Rejection, Option<Landing>) {
        let from = self.sent.provenance();
        from.map_or((Rejection::Ignored, None), |from| from.reject(self.part, &self.sent))
    }

    fn has_other(&self) -> bool {
        self.sent.provenance().is_some_and(|from| from.has_other(self.part, &self.sent))
    }

    /// The API took another.
    fn accept(&self) {
        if let Some(from) = self.sent.provenance() {
            from.accept(self.part, &self.sent);
        }
    }
}

/// Whether the credentials were good. A server that fails, limits or redirects may not have looked at them.
fn is_accepted<B>(response: &Response<B>) -> bool {
    let status = response.status();
    (status.is_success() || status == StatusCode::SWITCHING_PROTOCOLS)
        && response.extensions().get::<Undecided>().is_none()
}

fn renews(sent: &Credentials) -> bool {
    sent.provenance().is_some()
}
