//! The service: [`Selam`].

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use http::{Request, Response};
use http_body::Body;
use pin_project_lite::pin_project;
use tower::{Layer, Service, ServiceExt};

use super::SelamLayer;
use crate::{
    BoxError, CloneClient, Error, HttpClient, RefreshLayer, Subject, WithExtension,
    auth_error::{InspectedBody, MapAuthError},
    authorize::Authorize,
    replay::{CloneBody, Refresh, Replay},
};

/// Sends authenticated requests. Made by [`SelamLayer`]; see the [module docs](super).
///
/// Its error is [`Error`]. A `BoxCloneSyncService` of Tower's, whose error is `BoxError`, takes it with
/// `ServiceBuilder::new().map_err(Error::into_boxed).service(selam)`.
#[derive(Clone, Debug)]
pub struct Selam<S, R = CloneBody> {
    inner: Inner<S, R>,
}

type Inner<S, R> = MapAuthError<Refresh<Authorize<WrapError<S>>, R>>;

/// The body of a response: the client's, of which [`RefreshLayer`] and [`AuthErrorLayer`](crate::AuthErrorLayer) may
/// each have read a part.
pub type ResponseBody<B> = InspectedBody<InspectedBody<B>>;

impl<S, R: Clone> Selam<S, R> {
    pub(super) fn new(inner: S, layer: &SelamLayer<R>) -> Self {
        let authorize = Authorize::new(WrapError(inner), Arc::clone(&layer.policy));
        let refresh = RefreshLayer::with_replay(layer.replay.clone());
        let refresh = refresh.disabled_if(!layer.policy.provider.refreshes());
        Self { inner: layer.errors.layer(refresh.layer(authorize)) }
    }
}

impl<S, R> Selam<S, R> {
    /// Returns a reference to the inner client.
    pub fn get_ref(&self) -> &S {
        &self.inner.get_ref().get_ref().get_ref().0
    }

    /// Returns a mutable reference to the inner client.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.inner.get_mut().get_mut().get_mut().0
    }

    /// Returns the inner client without the layers.
    pub fn into_inner(self) -> S {
        self.inner.into_inner().into_inner().into_inner().0
    }

    /// Returns a handle whose requests are made for `subject`: they get its JWT from a
    /// [`PerSubject`](crate::PerSubject). It shares everything with this service. A request that names its own subject
    /// keeps it.
    ///
    /// ```
    /// # use http::{Request, Response};
    /// # use http_body_util::Empty;
    /// # use tower::{BoxError, Layer, service_fn};
    /// use tower_selam::{ApiKey, PerSubject, SelamLayer, Subject, Token, source::{Reason, source_fn}};
    ///
    /// # tokio_test::block_on(async {
    /// # let client = service_fn(|request: Request<()>| async move {
    /// #     assert_eq!(request.headers()["authorization"], "Bearer jwt.of.user-7");
    /// #     Ok::<_, std::convert::Infallible>(Response::new(Empty::<bytes::Bytes>::new()))
    /// # });
    /// let jwts = PerSubject::new(|subject: &Subject| {
    ///     let jwt = format!("jwt.of.{}", subject.as_str());
    ///     source_fn(move |_: Reason<Token>| std::future::ready(Token::new(jwt.clone())))
    /// });
    /// let layer = SelamLayer::builder().with_api_key(ApiKey::new("sk-selam-example")?).with_jwt(jwts).build()?;
    /// let chat = layer.base_url().endpoint("chat/completions")?;
    /// let selam = layer.layer(client);
    ///
    /// let for_user = selam.for_subject(&Subject::new("user-7"));
    /// assert_eq!(for_user.send(Request::post(&chat).body(())?).await?.status(), 200);
    /// // Without a subject, there is no JWT to send, and nothing is sent.
    /// assert!(selam.send(Request::post(&chat).body(())?).await.is_err());
    /// # Ok::<(), BoxError>(())
    /// # }).unwrap();
    /// ```
    #[must_use]
    pub fn for_subject(&self, subject: &Subject) -> WithExtension<Self>
    where
        S: Clone,
        R: Clone,
    {
        WithExtension::new(self.clone(), subject.clone())
    }

    /// Sends a request through a clone of the stack, as soon as that is ready: like tower's `ServiceExt::oneshot`, but the
    /// compiler explains what to do if the client does not fit.
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
    /// [`Error::Auth`] when the API rejected the request or nothing was sent; [`Error::Inner`] when the client failed.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future drops the request. A refresh that it waits for continues.
    pub async fn send<ReqBody, ResBody>(
        &self,
        request: Request<ReqBody>,
    ) -> Result<Response<ResponseBody<ResBody>>, Error<S::Error>>
    where
        S: HttpClient<R::Body, Response = Response<ResBody>> + CloneClient,
        R: Replay<ReqBody> + Clone,
        ResBody: Body,
        ResBody::Error: Into<BoxError>,
    {
        self.clone().oneshot(request).await
    }
}

impl<S, R, ReqBody, ResBody> Service<Request<ReqBody>> for Selam<S, R>
where
    S: HttpClient<R::Body, Response = Response<ResBody>> + CloneClient,
    R: Replay<ReqBody> + Clone,
    ResBody: Body,
    ResBody::Error: Into<BoxError>,
{
    type Response = Response<ResponseBody<ResBody>>;
    type Error = Error<S::Error>;
    type Future = <Inner<S, R> as Service<Request<ReqBody>>>::Future;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    #[inline]
    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        self.inner.call(request)
    }
}

/// Turns the client's error into [`Error::Inner`], so that an [`AuthError`](crate::AuthError) fits next to it.
#[derive(Clone, Debug)]
#[expect(unnameable_types, reason = "a part of `Selam` that only its future shows")]
pub struct WrapError<S>(S);

impl<S: Service<Request<B>>, B> Service<Request<B>> for WrapError<S> {
    type Response = S::Response;
    type Error = Error<S::Error>;
    type Future = WrapErrorFuture<S::Future>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(cx).map_err(Error::Inner)
    }

    #[inline]
    fn call(&mut self, request: Request<B>) -> Self::Future {
        WrapErrorFuture { response: self.0.call(request) }
    }
}

pin_project! {
    #[derive(Debug)]
    pub struct WrapErrorFuture<F> {
        #[pin]
        response: F,
    }
}

impl<F: Future<Output = Result<T, E>>, T, E> Future for WrapErrorFuture<F> {
    type Output = Result<T, Error<E>>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.project().response.poll(cx).map_err(Error::Inner)
    }
}
