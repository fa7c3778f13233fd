use std::{
    fmt,
    future::poll_fn,
    pin::Pin,
    task::{Context, Poll},
};

use http::{Request, Response};
use http_body::Body;
use pin_project_lite::pin_project;
use tower_service::Service;

use crate::{
    BoxError, Credentials, Error,
    auth_error::{Bounds, Inspect, Stopped},
    authorize::{self, Authorize, is_remembered},
    bounds::CloneClient,
    refresh::{Again, CloneBody, Refresh, Replay, Replaying},
};

/// Sends authenticated requests. Made by [`SelamLayer`](super::SelamLayer); see the [module docs](super).
#[derive(Clone, Debug)]
pub struct Selam<S, R = CloneBody> {
    stack: Refresh<Authorize<WrapError<S>>, R>,
    /// What is read of a 401 or 403, as [`AuthErrorLayer`](crate::AuthErrorLayer) reads it.
    bounds: Bounds,
}

impl<S, R> Selam<S, R> {
    pub(super) fn new(stack: Refresh<Authorize<WrapError<S>>, R>, bounds: Bounds) -> Self {
        Self { stack, bounds }
    }

    /// The client within.
    pub fn get_ref(&self) -> &S {
        &self.stack.get_ref().get_ref().0
    }

    /// The client within.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.stack.get_mut().get_mut().0
    }

    /// The client within.
    pub fn into_inner(self) -> S {
        self.stack.into_inner().into_inner().0
    }
}

impl<S, R> Selam<S, R> {
    /// Sends a request by a clone of the stack, when that is ready: what tower's `ServiceExt::oneshot` does, except that the
    /// compiler says what to do where the client does not fit.
    ///
    /// ```
    /// use http::Request;
    /// use tower::Layer;
    /// use tower_selam::{ApiKey, SelamLayer, simulator::Simulator};
    ///
    /// # tokio_test::block_on(async {
    /// let client = Simulator::new();
    /// let layer = SelamLayer::builder().with_api_key(ApiKey::new(client.issue_key())?).build()?;
    /// let chat = layer.base_url().endpoint("chat/completions")?;
    /// let selam = layer.layer(client);
    /// let question = r#"{"messages":[{"role":"user","content":"Selam!"}]}"#.to_owned();
    /// assert_eq!(selam.send(Request::post(chat).body(question)?).await?.status(), 200);
    /// # Ok::<(), tower_selam::BoxError>(())
    /// # }).unwrap();
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Auth`] when the API refused, or nothing was sent; [`Error::Inner`] when the client failed.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future drops the request, and leaves a renewal that it waits for running.
    pub async fn send<ReqBody, ResBody>(
        &self,
        request: Request<ReqBody>,
    ) -> Result<Response<ResBody>, Error<S::Error>>
    where
        S: Service<Request<R::Body>, Response = Response<ResBody>> + CloneClient,
        R: Replay<ReqBody> + Clone,
        ResBody: Body,
        ResBody::Error: Into<BoxError>,
    {
        let mut selam = self.clone();
        poll_fn(|cx| selam.poll_ready(cx)).await?;
        selam.call(request).await
    }
}

impl<S, R, ReqBody, ResBody> Service<Request<ReqBody>> for Selam<S, R>
where
    S: Service<Request<R::Body>, Response = Response<ResBody>> + CloneClient,
    R: Replay<ReqBody> + Clone,
    ResBody: Body,
    ResBody::Error: Into<BoxError>,
{
    type Response = S::Response;
    type Error = Error<S::Error>;
    type Future = ResponseFuture<S::Future, S, R, ReqBody, ResBody>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.stack.poll_ready(cx)
    }

    #[inline]
    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        let Self { stack, bounds } = self;
        let bounds = *bounds;
        stack.keep(request, |authorize, mut request, again| match authorize.authorize(&mut request) {
            Ok(sent) => {
                let response = authorize.get_mut().0.call(request);
                ResponseFuture { state: State::Sent { response, sent, again: Some(again), bounds } }
            }
            Err(unsent) => {
                let response = authorize.unsent(request, unsent);
                ResponseFuture { state: State::layers(response, again, bounds) }
            }
        })
    }
}

pin_project! {
    /// Response future of [`Selam`]. Dropping it drops the request, or the response whose body it reads, and
    /// leaves a renewal that it waits for running.
    pub struct ResponseFuture<F, S, R, ReqBody, ResBody>
    where
        R: Replay<ReqBody>,
        ResBody: Body,
    {
        #[pin]
        state: State<F, S, R, ReqBody, ResBody>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<F, S, R, ReqBody, ResBody>
    where
        R: Replay<ReqBody>,
        ResBody: Body,
    {
        // The client's response is awaited. Most concern none of the layers, so that one look does for all of them.
        Sent {
            #[pin]
            response: F,
            sent: Option<Credentials>,
            again: Option<Again<Authorize<WrapError<S>>, R, ReqBody>>,
            bounds: Bounds,
        },
        // This one concerns the layers, or the request waits.
        Layers { layers: Pin<Box<Layers<F, S, R, ReqBody, ResBody>>> },
    }
}

/// The future that the layers make, one around the other.
type Layers<F, S, R, ReqBody, ResBody> = Inspect<
    Replaying<
        Authorized<F, S, <R as Replay<ReqBody>>::Body, ResBody>,
        Authorize<WrapError<S>>,
        R,
        ReqBody,
        ResBody,
    >,
    ResBody,
>;

type Authorized<F, S, ReqBody, ResBody> =
    authorize::ResponseFuture<WrapErrorFuture<F, ResBody>, WrapError<S>, ReqBody>;

impl<F, S, R: Replay<ReqBody>, ReqBody, ResBody: Body> State<F, S, R, ReqBody, ResBody> {
    #[cold]
    fn layers(
        response: Authorized<F, S, R::Body, ResBody>,
        again: Again<Authorize<WrapError<S>>, R, ReqBody>,
        bounds: Bounds,
    ) -> Self {
        Self::Layers { layers: Box::pin(Inspect::new(Replaying::new(response, again), bounds)) }
    }
}

impl<S, R, ReqBody, ResBody> Future for ResponseFuture<S::Future, S, R, ReqBody, ResBody>
where
    S: Service<Request<R::Body>, Response = Response<ResBody>> + CloneClient,
    R: Replay<ReqBody>,
    ResBody: Body,
    ResBody::Error: Into<BoxError>,
{
    type Output = Result<S::Response, Error<S::Error>>;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let StateProj::Sent { response, .. } = self.as_mut().project().state.project() else {
            return self.poll_layers(cx);
        };
        match response.poll(cx) {
            Poll::Ready(Ok(response)) if is_remembered(&response) => self.answered(response, cx),
            polled => polled.map_err(Error::Inner),
        }
    }
}

impl<S, R, ReqBody, ResBody> ResponseFuture<S::Future, S, R, ReqBody, ResBody>
where
    S: Service<Request<R::Body>, Response = Response<ResBody>> + CloneClient,
    R: Replay<ReqBody>,
    ResBody: Body,
    ResBody::Error: Into<BoxError>,
{
    #[cold]
    fn answered(
        mut self: Pin<&mut Self>,
        response: Response<ResBody>,
        cx: &mut Context<'_>,
    ) -> Poll<<Self as Future>::Output> {
        let mut state = self.as_mut().project().state;
        if let StateProj::Sent { sent, again, bounds, .. } = state.as_mut().project()
            && let Some(again) = again.take()
        {
            let (sent, bounds) = (sent.take(), *bounds);
            let response = WrapErrorFuture::Answered { response: Some(Box::new(response)) };
            state.set(State::layers(authorize::ResponseFuture::sent(response, sent), again, bounds));
        }
        self.poll_layers(cx)
    }

    #[cold]
    fn poll_layers(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<<Self as Future>::Output> {
        let StateProj::Layers { layers } = self.project().state.project() else { return Poll::Pending };
        layers.as_mut().poll(cx).map_err(|stopped| match stopped.flatten() {
            Stopped::Failed(error) => error,
            Stopped::Refused(read) => read.into_error().into(),
        })
    }
}

impl<F, S, R: Replay<ReqBody>, ReqBody, ResBody: Body> fmt::Debug
    for ResponseFuture<F, S, R, ReqBody, ResBody>
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
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
