//! The layer, its service and its response future.

use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use http::{Request, Response};
use http_body::Body;
use pin_project_lite::pin_project;
use tower::{Layer, Service};

use super::inspect::{BodyLimits, InspectedBody, Inspection};
use crate::{AuthError, BoxError, FromAuthError, authorize::Sent, error::is_auth_status, telemetry::event};

/// Turns a 401 or 403 into an [`AuthError`]. See the [module docs](super).
#[derive(Clone, Copy, Debug, Default)]
pub struct AuthErrorLayer {
    limits: BodyLimits,
    mode: Mode,
}

/// What becomes of a 401 or 403.
#[derive(Clone, Copy, Debug, Default)]
enum Mode {
    /// It is returned as an error.
    #[default]
    Fail,
    /// It is returned as it came, with the error in its extensions.
    Annotate,
}

impl AuthErrorLayer {
    /// Creates the layer. It reads up to 64 KiB of an error body, for at most 5 seconds.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns a 401 or 403 with its status, headers and body, and the [`AuthError`] in its extensions: for proxies.
    ///
    /// The response stays as it came, except that credentials which were sent and which it echoes are overwritten with `*`. See
    /// [the body](super#the-body).
    ///
    /// ```
    /// use http::{Request, Response, StatusCode};
    /// use http_body_util::{BodyExt, Full};
    /// use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
    /// use tower_selam::{AuthError, AuthErrorKind, AuthErrorLayer, BoxError};
    ///
    /// # tokio_test::block_on(async {
    /// let body = r#"{"error":{"message":"No API key provided.","code":"missing_api_key"}}"#;
    /// let api = service_fn(|_: Request<()>| async move {
    ///     Ok::<_, BoxError>(Response::builder().status(401).body(Full::<bytes::Bytes>::from(body))?)
    /// });
    /// let service = ServiceBuilder::new().layer(AuthErrorLayer::new().annotated()).service(api);
    ///
    /// let response = service.oneshot(Request::new(())).await?;
    /// assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    /// let error: &AuthError = response.extensions().get().unwrap();
    /// assert_eq!(error.kind(), AuthErrorKind::MissingApiKey);
    /// assert_eq!(response.into_body().collect().await?.to_bytes(), body);
    /// # Ok::<(), BoxError>(())
    /// # }).unwrap();
    /// ```
    #[must_use]
    pub fn annotated(mut self) -> Self {
        self.mode = Mode::Annotate;
        self
    }

    /// Reads up to `bytes` of an error body.
    #[must_use]
    pub fn with_body_limit(mut self, bytes: usize) -> Self {
        self.limits.size = bytes;
        self
    }

    pub(crate) fn limits(&self) -> BodyLimits {
        self.limits
    }

    /// Reads an error body for at most `time`.
    #[must_use]
    pub fn with_body_timeout(mut self, time: Duration) -> Self {
        self.limits.time = time;
        self
    }
}

impl<S> Layer<S> for AuthErrorLayer {
    type Service = MapAuthError<S>;

    fn layer(&self, inner: S) -> Self::Service {
        MapAuthError { inner, layer: *self }
    }
}

/// Turns a 401 or 403 into an [`AuthError`]. Made by [`AuthErrorLayer`]; see the [module docs](super).
#[derive(Clone, Copy, Debug)]
pub struct MapAuthError<S> {
    inner: S,
    layer: AuthErrorLayer,
}

impl<S> MapAuthError<S> {
    inner_accessors!();
}

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for MapAuthError<S>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>>,
    S::Error: FromAuthError,
    ResBody: Body,
    ResBody::Error: Into<BoxError>,
{
    type Response = Response<InspectedBody<ResBody>>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future, ResBody>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    #[inline]
    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        let state = State::Response { response: self.inner.call(request) };
        ResponseFuture { state, layer: self.layer }
    }
}

pin_project! {
    /// Response future of [`MapAuthError`].
    ///
    /// # Cancel safety
    ///
    /// Dropping it drops the request, or the response whose body it reads.
    pub struct ResponseFuture<F, B>
    where
        B: Body,
    {
        #[pin]
        state: State<F, B>,
        layer: AuthErrorLayer,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<F, B>
    where
        B: Body,
    {
        // The inner service's response is awaited.
        Response { #[pin] response: F },
        // The body of a 401 or 403 is being read.
        Inspecting { inspection: Option<Box<Inspection<B>>> },
    }
}

impl<F, B, E> Future for ResponseFuture<F, B>
where
    F: Future<Output = Result<Response<B>, E>>,
    E: FromAuthError,
    B: Body,
    B::Error: Into<BoxError>,
{
    type Output = Result<Response<InspectedBody<B>>, E>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        loop {
            match this.state.as_mut().project() {
                StateProj::Response { response } => match ready!(response.poll(cx)) {
                    Ok(response) if is_auth_status(response.status()) => {
                        let inspection = Some(Inspection::new(response, this.layer.limits));
                        this.state.set(State::Inspecting { inspection });
                    }
                    Ok(response) => return Poll::Ready(Ok(response.map(InspectedBody::unread))),
                    Err(error) => return Poll::Ready(Err(error)),
                },
                StateProj::Inspecting { inspection: slot } => {
                    let Some(inspection) = slot else { return Poll::Pending };
                    ready!(inspection.poll(cx));
                    let Some(inspection) = slot.take() else { return Poll::Pending };
                    return Poll::Ready(finish(*inspection, this.layer.mode));
                }
            }
        }
    }
}

#[cold]
fn finish<B, E>(inspection: Inspection<B>, mode: Mode) -> Result<Response<InspectedBody<B>>, E>
where
    B: Body,
    B::Error: Into<BoxError>,
    E: From<AuthError>,
{
    let ids = inspection.sent().map(Sent::ids).unwrap_or_default();
    let is_reported = inspection.is_annotated();
    let (error, response) = match mode {
        Mode::Fail => (inspection.into_error(), None),
        Mode::Annotate => {
            let error = inspection.error();
            (error.clone(), Some(inspection.into_annotated(error)))
        }
    };
    if !is_reported {
        event::request_rejected(&error, ids);
    }
    response.ok_or_else(|| error.into())
}

impl<F, B: Body> fmt::Debug for ResponseFuture<F, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}
