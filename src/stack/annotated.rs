use std::{
    fmt,
    future::poll_fn,
    pin::Pin,
    task::{Context, Poll},
};

use http::{Request, Response};
use http_body::Body;
use pin_project_lite::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use super::{
    SelamLayer,
    sending::{Sending, Stack},
};
use crate::{
    BaseUrl, Error,
    auth_error::{Bounds, InspectedBody},
    error::CloneClient,
    replay::{CloneBody, Replay, Stopped},
};

/// The ready-made stack for proxies: a 401 or 403 of the API passes as it came, with the [`AuthError`] in its
/// extensions. Made by [`SelamLayer::annotated`].
///
/// ```
/// use http::Request;
/// use http_body_util::BodyExt;
/// use tower::Layer;
/// use tower_selam::{ApiKey, AuthError, AuthErrorKind, ErrorBody, SelamLayer, simulator::Simulator};
///
/// # tokio_test::block_on(async {
/// let client = Simulator::new();
/// let revoked = ApiKey::new("sk-selam-revoked")?;
/// let layer = SelamLayer::builder().with_api_key(revoked).build()?.annotated();
/// let chat = layer.base_url().endpoint("chat/completions")?;
///
/// let response = layer.layer(client).send(Request::post(chat).body(String::new())?).await?;
/// assert_eq!(response.status(), 401);
/// let error: &AuthError = response.extensions().get().unwrap();
/// assert_eq!(error.kind(), AuthErrorKind::InvalidApiKey);
/// let body = response.into_body().collect().await?.to_bytes();
/// assert_eq!(ErrorBody::parse(&body).message(), Some("Invalid API key provided."));
/// # Ok::<(), tower_selam::BoxError>(())
/// # }).unwrap();
/// ```
///
/// What the API never saw is an [`Error::Auth`] all the same: an origin that is not allowed, a credential that cannot be
/// had.
///
/// [`AuthError`]: crate::AuthError
#[derive(Clone, Debug)]
pub struct AnnotatedSelamLayer<R = CloneBody>(pub(super) SelamLayer<R>);

impl<R> AnnotatedSelamLayer<R> {
    /// Where the API lives, to make the URIs of requests from.
    #[must_use]
    pub fn base_url(&self) -> &BaseUrl {
        self.0.base_url()
    }
}

impl<S, R: Clone> Layer<S> for AnnotatedSelamLayer<R> {
    type Service = AnnotatedSelam<S, R>;

    fn layer(&self, inner: S) -> Self::Service {
        AnnotatedSelam { stack: self.0.stack(inner), bounds: self.0.errors.0 }
    }
}

/// Sends authenticated requests, and passes what the API refuses. Made by [`AnnotatedSelamLayer`]; see there.
#[derive(Clone, Debug)]
pub struct AnnotatedSelam<S, R = CloneBody> {
    stack: Stack<S, R>,
    bounds: Bounds,
}

impl<S, R> AnnotatedSelam<S, R> {
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

    /// Sends a request by a clone of the stack, when that is ready; as [`Selam::send`](super::Selam::send).
    ///
    /// # Errors
    ///
    /// [`Error::Auth`] when nothing was sent; [`Error::Inner`] when the client failed.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future drops the request, and leaves a renewal that it waits for running.
    pub async fn send<ReqBody, ResBody>(
        &self,
        request: Request<ReqBody>,
    ) -> Result<Response<InspectedBody<ResBody>>, Error<S::Error>>
    where
        S: Service<Request<R::Body>, Response = Response<ResBody>> + CloneClient,
        R: Replay<ReqBody> + Clone,
        ResBody: Body,
    {
        let mut selam = self.clone();
        poll_fn(|cx| selam.poll_ready(cx)).await?;
        selam.call(request).await
    }
}

impl<S, R, ReqBody, ResBody> Service<Request<ReqBody>> for AnnotatedSelam<S, R>
where
    S: Service<Request<R::Body>, Response = Response<ResBody>> + CloneClient,
    R: Replay<ReqBody> + Clone,
    ResBody: Body,
{
    type Response = Response<InspectedBody<ResBody>>;
    type Error = Error<S::Error>;
    type Future = AnnotatedFuture<S::Future, S, R, ReqBody, ResBody>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.stack.poll_ready(cx)
    }

    #[inline]
    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        Sending::send(&mut self.stack, request, self.bounds, |sending| AnnotatedFuture { sending })
    }
}

pin_project! {
    /// Response future of [`AnnotatedSelam`]. Dropping it drops the request, or the response whose body it reads, and
    /// leaves a renewal that it waits for running.
    pub struct AnnotatedFuture<F, S, R, ReqBody, ResBody>
    where
        R: Replay<ReqBody>,
        ResBody: Body,
    {
        #[pin]
        sending: Sending<F, S, R, ReqBody, ResBody>,
    }
}

impl<S, R, ReqBody, ResBody> Future for AnnotatedFuture<S::Future, S, R, ReqBody, ResBody>
where
    S: Service<Request<R::Body>, Response = Response<ResBody>> + CloneClient,
    R: Replay<ReqBody>,
    ResBody: Body,
{
    type Output = Result<Response<InspectedBody<ResBody>>, Error<S::Error>>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let pass = |response: Response<ResBody>| response.map(InspectedBody::unread);
        self.project().sending.poll_or(cx, pass, |stopped| match stopped {
            Stopped::Refused(read) => Ok(read.into_annotated()),
            Stopped::Failed(error) => Err(error),
        })
    }
}

impl<F, S, R: Replay<ReqBody>, ReqBody, ResBody: Body> fmt::Debug
    for AnnotatedFuture<F, S, R, ReqBody, ResBody>
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AnnotatedFuture").finish_non_exhaustive()
    }
}
