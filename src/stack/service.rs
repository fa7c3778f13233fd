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

use super::sending::{Sending, Stack};
use crate::{
    BoxError, Error,
    auth_error::Bounds,
    error::CloneClient,
    replay::{CloneBody, Replay, Stopped},
};

/// Sends authenticated requests. Made by [`SelamLayer`](super::SelamLayer); see the [module docs](super).
#[derive(Clone, Debug)]
pub struct Selam<S, R = CloneBody> {
    stack: Stack<S, R>,
    /// What is read of a 401 or 403, as [`AuthErrorLayer`](crate::AuthErrorLayer) reads it.
    bounds: Bounds,
}

impl<S, R> Selam<S, R> {
    pub(super) fn new(stack: Stack<S, R>, bounds: Bounds) -> Self {
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
        Sending::send(&mut self.stack, request, self.bounds, |sending| ResponseFuture { sending })
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
        sending: Sending<F, S, R, ReqBody, ResBody>,
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
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let stop = |stopped| {
            Err(match stopped {
                Stopped::Failed(error) => error,
                Stopped::Refused(read) => read.into_error().into(),
            })
        };
        self.project().sending.poll_or(cx, |response| response, stop)
    }
}

impl<F, S, R: Replay<ReqBody>, ReqBody, ResBody: Body> fmt::Debug
    for ResponseFuture<F, S, R, ReqBody, ResBody>
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}
