//! What the stack and its twin in annotate mode have in common: the layers that write credentials and renew them, and the
//! future that goes past them where they have nothing to do.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use http::{Request, Response};
use http_body::Body;
use pin_project_lite::pin_project;
use tower_service::Service;

use crate::{
    Credentials, Error,
    auth_error::{Bounds, Inspect},
    authorize::{self, Authorize, Later, Unsent},
    error::CloneClient,
    error::is_auth_status,
    replay::{Again, Refresh, Replay, Replaying, Stopped},
    util::cold::Cold,
};

/// All but the layer that reads errors.
pub(super) type Stack<S, R> = Refresh<Authorize<WrapError<S>>, R>;

pin_project! {
    /// A request on its way.
    #[project = SendingProj]
    #[project_replace = SendingReplaced]
    pub(super) enum Sending<F, S, R, ReqBody, ResBody>
    where
        R: Replay<ReqBody>,
        ResBody: Body,
    {
        // The client's response is awaited. Most concern none of the layers, so that one look does for all of them.
        Client {
            #[pin]
            response: F,
            sent: Option<Credentials>,
            again: Again<Authorize<WrapError<S>>, R, ReqBody>,
            bounds: Bounds,
        },
        // Anything else: one state, so that one look tells it from the usual.
        Unusual { case: Cold<Unusual<F, S, R, ReqBody, ResBody>> },
    }
}

pub(super) enum Unusual<F, S, R, ReqBody, ResBody>
where
    R: Replay<ReqBody>,
    ResBody: Body,
{
    /// The request waits for credentials.
    Waits {
        later: Box<Later<WrapError<S>, R::Body>>,
        again: Again<Authorize<WrapError<S>>, R, ReqBody>,
        bounds: Bounds,
    },
    /// This response concerns the layers, or the request is refused.
    Layers(Layers<F, S, R, ReqBody, ResBody>),
}

/// The future that the layers make, one around the other.
type Layers<F, S, R, ReqBody, ResBody> = Pin<
    Box<
        Inspect<
            Replaying<
                Authorized<F, S, <R as Replay<ReqBody>>::Body, ResBody>,
                Authorize<WrapError<S>>,
                R,
                ReqBody,
                ResBody,
            >,
            ResBody,
        >,
    >,
>;

type Polled<B, E> = Poll<Result<Response<B>, Stopped<Error<E>, B>>>;

type Authorized<F, S, ReqBody, ResBody> =
    authorize::ResponseFuture<WrapErrorFuture<F, ResBody>, WrapError<S>, ReqBody>;

impl<S, R, ReqBody, ResBody> Sending<S::Future, S, R, ReqBody, ResBody>
where
    S: Service<Request<R::Body>, Response = Response<ResBody>> + CloneClient,
    R: Replay<ReqBody>,
    ResBody: Body,
{
    /// Sends a request, or has it wait. `wrap` makes the future, where it goes.
    #[inline]
    pub(super) fn send<T>(
        stack: &mut Stack<S, R>,
        request: Request<ReqBody>,
        bounds: Bounds,
        wrap: impl FnOnce(Self) -> T,
    ) -> T
    where
        R: Clone,
    {
        stack.keep(request, |authorize, mut request, again| {
            let sent = match authorize.policy().authorize_usual(&mut request) {
                Some(credentials) => Some(credentials),
                None => match authorize.policy().authorize_any(&mut request) {
                    Ok(credentials) => credentials,
                    Err(Unsent::Waits(waiting)) => {
                        return wrap(Self::waits(authorize.later(request, waiting), again, bounds));
                    }
                    Err(Unsent::Refused(error)) => {
                        return wrap(Self::layers(authorize.refused(error), again, bounds));
                    }
                },
            };
            let response = authorize.get_mut().0.call(request);
            wrap(Self::Client { response, sent, again, bounds })
        })
    }

    #[cold]
    fn waits(
        later: Box<Later<WrapError<S>, R::Body>>,
        mut again: Again<Authorize<WrapError<S>>, R, ReqBody>,
        bounds: Bounds,
    ) -> Self {
        // There may be many who wait, and each has its head still.
        again.forget_head();
        Self::Unusual { case: Cold::new(Unusual::Waits { later, again, bounds }) }
    }

    #[cold]
    fn layers(
        response: Authorized<S::Future, S, R::Body, ResBody>,
        again: Again<Authorize<WrapError<S>>, R, ReqBody>,
        bounds: Bounds,
    ) -> Self {
        let layers = Box::pin(Inspect::new(Replaying::new(response, again), bounds));
        Self::Unusual { case: Cold::new(Unusual::Layers(layers)) }
    }

    /// Polls for the response that passes, and what comes instead is for `stop` to say.
    #[inline]
    pub(super) fn poll_or<T, E>(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pass: impl FnOnce(Response<ResBody>) -> T,
        stop: impl FnOnce(Stopped<Error<S::Error>, ResBody>) -> Result<T, E>,
    ) -> Poll<Result<T, E>> {
        let polled = match self.as_mut().project() {
            SendingProj::Client { response, .. } => match response.poll(cx) {
                Poll::Ready(Ok(response)) if is_auth_status(response.status()) => self.answered(response, cx),
                Poll::Ready(Ok(response)) => return Poll::Ready(Ok(pass(response))),
                polled => polled.map_err(|error| Stopped::Failed(Error::Inner(error))),
            },
            SendingProj::Unusual { .. } => self.poll_later(cx),
        };
        Poll::Ready(match ready!(polled) {
            Ok(response) => Ok(pass(response)),
            Err(stopped) => stop(stopped),
        })
    }

    /// Hands a response to the layers.
    #[cold]
    fn answered(
        mut self: Pin<&mut Self>,
        response: Response<ResBody>,
        cx: &mut Context<'_>,
    ) -> Polled<ResBody, S::Error> {
        let nothing = Self::Unusual { case: Cold::default() };
        if let SendingReplaced::Client { sent, again, bounds, .. } = self.as_mut().project_replace(nothing) {
            let response = WrapErrorFuture::Answered { response: Some(Box::new(response)) };
            self.set(Self::layers(authorize::ResponseFuture::sent(response, sent), again, bounds));
        }
        self.poll_later(cx)
    }

    /// What is not the client's response to a request that was sent at once.
    #[cold]
    fn poll_later(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Polled<ResBody, S::Error> {
        let SendingProj::Unusual { case } = self.as_mut().project() else { return Poll::Pending };
        let credentials = match case.as_mut() {
            None => return Poll::Pending,
            Some(Unusual::Layers(layers)) => {
                let stop = |read| Err(Stopped::Refused(read));
                return layers.as_mut().poll_or(cx, |response| response, stop);
            }
            Some(Unusual::Waits { later, .. }) => ready!(later.poll(cx)).map_err(Stopped::Failed)?,
        };
        let Some(Unusual::Waits { later, mut again, bounds }) = case.take() else { return Poll::Pending };
        let written = later.write(&credentials, |request| again.keep_head(request));
        let (mut service, request, sent) = written.map_err(|error| Stopped::Failed(error.into()))?;
        let response = service.0.call(request);
        self.set(Self::Client { response, sent, again, bounds });
        self.poll_or(cx, |response| response, Err)
    }
}

/// Makes the client's error `Error::Inner`, next to which an `AuthError` has room.
#[derive(Clone, Debug)]
pub(super) struct WrapError<S>(pub(super) S);

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for WrapError<S>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>>,
{
    type Response = S::Response;
    type Error = Error<S::Error>;
    type Future = WrapErrorFuture<S::Future, ResBody>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(cx).map_err(Error::Inner)
    }

    #[inline]
    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        WrapErrorFuture::Client { response: self.0.call(request) }
    }
}

pin_project! {
    #[project = WrapErrorProj]
    pub(super) enum WrapErrorFuture<F, B> {
        Client { #[pin] response: F },
        // The client has answered, and what the layers do about it is yet to come.
        Answered { response: Option<Box<Response<B>>> },
    }
}

impl<F, B, E> Future for WrapErrorFuture<F, B>
where
    F: Future<Output = Result<Response<B>, E>>,
{
    type Output = Result<Response<B>, Error<E>>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project() {
            WrapErrorProj::Client { response } => response.poll(cx).map_err(Error::Inner),
            WrapErrorProj::Answered { response } => match response.take() {
                Some(response) => Poll::Ready(Ok(*response)),
                None => Poll::Pending,
            },
        }
    }
}
