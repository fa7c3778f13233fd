use std::{
    fmt,
    pin::Pin,
    sync::{Arc, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use http::{Request, Response, StatusCode};
use http_body::Body;
use pin_project_lite::pin_project;
use tower_service::Service;

use super::{Replay, copy::HeadCopy, service::Spare};
use crate::{
    AuthErrorKind, Credentials,
    auth_error::{Bounds, Collect, End, InspectedBody, Timer},
    authorize::Sent,
    bounds::CloneClient,
    engine::{Landing, Rejection, wait},
    event,
    supply::{Part, Sources},
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
        state: State<F, S, R::Body, ResBody>,
        kept: Option<(HeadCopy, R::Kept)>,
        replay: R,
        spare: Option<Spare<S>>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<F, S, B, ResBody>
    where
        ResBody: Body,
    {
        // The first response is awaited.
        First { #[pin] response: F },
        // It is a 401, and what it says is read.
        Reading { refusal: Option<Box<Refusal<ResBody>>> },
        // Another credential is awaited.
        Renewing { refusal: Option<Box<Refusal<ResBody>>>, renewal: Renewal },
        // The client is awaited, which may still be sending the body.
        LettingGo { refusal: Option<Box<Refusal<ResBody>>>, patience: Timer },
        // The service is awaited, to be called again.
        Readiness { again: Option<Box<(S, Request<B>)>> },
        // The second response is awaited, and goes up whatever it is.
        Second { #[pin] response: F },
    }
}

type Renewal = Pin<Box<dyn Future<Output = ()> + Send + Sync>>;

/// A 401, and what it is about.
struct Refusal<B: Body> {
    collect: Box<Collect<B>>,
    end: Option<End<B::Error>>,
    sent: Sent,
    blamed: Option<Blamed>,
}

/// What the API refused, and where another can come from.
pub(crate) struct Blamed {
    part: Part,
    sent: Credentials,
    sources: Arc<Sources>,
}

impl<F, S, R: Replay<ReqBody>, ReqBody, ResBody: Body> ResponseFuture<F, S, R, ReqBody, ResBody> {
    #[inline]
    pub(super) fn new(
        response: F,
        kept: Option<(HeadCopy, R::Kept)>,
        replay: R,
        spare: Option<Spare<S>>,
    ) -> Self {
        Self { state: State::First { response }, kept, replay, spare }
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
        let mut this = self.project();
        loop {
            match this.state.as_mut().project() {
                StateProj::First { response } => {
                    let response = ready!(response.poll(cx))?;
                    match Refusal::of(response) {
                        Ok(response) => return Poll::Ready(Ok(response.map(InspectedBody::unread))),
                        Err(refusal) => this.state.set(State::Reading { refusal: Some(refusal) }),
                    }
                }
                StateProj::Reading { refusal: reading } => {
                    let Some(refusal) = reading else { return Poll::Pending };
                    ready!(refusal.poll_read(cx));
                    let (rejection, landed) = refusal.reject();
                    let Some(refusal) = reading.take() else { return Poll::Pending };
                    match (rejection, landed) {
                        _ if this.kept.is_none() => return Poll::Ready(Ok(refusal.into_response())),
                        (Rejection::Superseded, _) => {
                            let renewal = Box::pin(std::future::ready(()));
                            this.state.set(State::Renewing { refusal: Some(refusal), renewal });
                        }
                        (_, Some(landed)) => {
                            // Whether it succeeded shows in what there is afterwards.
                            let renewal = Box::pin(async move {
                                let _ = wait(landed).await;
                            });
                            this.state.set(State::Renewing { refusal: Some(refusal), renewal });
                        }
                        (_, None) => return Poll::Ready(Ok(refusal.into_response())),
                    }
                }
                StateProj::Renewing { refusal, renewal } => {
                    ready!(renewal.as_mut().poll(cx));
                    let Some(refusal) = refusal.take() else { return Poll::Pending };
                    if !refusal.has_other() {
                        return Poll::Ready(Ok(refusal.into_response()));
                    }
                    this.state
                        .set(State::LettingGo { refusal: Some(refusal), patience: Timer::new(PATIENCE) });
                }
                StateProj::LettingGo { refusal, patience } => {
                    let kept = this.kept.as_mut().map(|(_, kept)| kept);
                    if kept.is_some_and(|kept| this.replay.poll_kept(kept, cx).is_pending()) {
                        ready!(patience.poll(cx));
                    }
                    let Some(refusal) = refusal.take() else { return Poll::Pending };
                    let again =
                        this.kept.take().and_then(|(head, kept)| head.into_request(this.replay.again(kept)?));
                    let spare = this
                        .spare
                        .as_ref()
                        .and_then(|spare| spare.get())
                        .map(|spare| spare.lock().unwrap_or_else(PoisonError::into_inner).clone());
                    match (spare, again) {
                        (Some(spare), Some(request)) => {
                            let again = Some(Box::new((spare, request)));
                            this.state.set(State::Readiness { again });
                        }
                        _ => return Poll::Ready(Ok(refusal.into_response())),
                    }
                }
                StateProj::Readiness { again } => {
                    let Some(waiting) = again else { return Poll::Pending };
                    ready!(waiting.0.poll_ready(cx))?;
                    let Some((mut service, request)) = again.take().map(|again| *again) else {
                        return Poll::Pending;
                    };
                    let response = service.call(request);
                    this.state.set(State::Second { response });
                }
                StateProj::Second { response } => {
                    let second = ready!(response.poll(cx));
                    event::sent_again(second.as_ref().ok().map(Response::status));
                    return Poll::Ready(second.map(|response| response.map(InspectedBody::unread)));
                }
            }
        }
    }
}

impl<B: Body> Refusal<B> {
    /// The response back, if there is nothing to be renewed about it.
    #[inline]
    fn of(response: Response<B>) -> Result<Response<B>, Box<Self>> {
        if response.status() != StatusCode::UNAUTHORIZED {
            return Ok(response);
        }
        match response.extensions().get::<Sent>().filter(|sent| sent.parts().any(renews)).cloned() {
            None => Ok(response),
            Some(sent) => {
                let collect = Collect::new(response, Bounds::default());
                Err(Box::new(Self { collect, end: None, sent, blamed: None }))
            }
        }
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.end.is_none() {
            self.end = Some(ready!(self.collect.poll(cx)));
        }
        Poll::Ready(())
    }

    /// Rejects what is at fault: how, and what to wait for.
    fn reject(&mut self) -> (Rejection, Option<Landing>) {
        let kind = self.collect.error(None).kind();
        // The layer that reads the error for the caller needs it as well.
        self.collect.parts.extensions.insert(self.sent.clone());

        self.blamed = Blamed::of(&self.sent, kind);
        self.blamed.as_ref().map_or((Rejection::Ignored, None), Blamed::reject)
    }

    /// The 401 as it came.
    fn into_response(self) -> Response<InspectedBody<B>> {
        self.collect.into_response(self.end.unwrap_or(End::OutOfBounds))
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
        Some(Self { part, sent: sent.clone(), sources: Arc::clone(sent.sources()?) })
    }

    /// Rejects it: how, and what to wait for.
    pub(crate) fn reject(&self) -> (Rejection, Option<Landing>) {
        self.sources.reject(self.part, &self.sent)
    }

    fn has_other(&self) -> bool {
        self.sources.has_other(self.part, &self.sent)
    }
}

fn renews(sent: &Credentials) -> bool {
    sent.sources().is_some()
}

impl<F, S, R: Replay<ReqBody>, ReqBody, ResBody: Body> fmt::Debug
    for ResponseFuture<F, S, R, ReqBody, ResBody>
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}
