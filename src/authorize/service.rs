use std::{
    sync::Arc,
    task::{Context, Poll},
};

use http::{Request, Response};
use tower_service::Service;

use super::ResponseFuture;
use crate::{
    AuthError, Credentials, Origins,
    plan::{Head, Plan, Rules},
};

/// Writes credentials into each request. Made by [`ApiKeyLayer`](super::ApiKeyLayer) and
/// [`JwtLayer`](super::JwtLayer); see the [module docs](super).
#[derive(Clone, Debug)]
pub struct Authorize<S> {
    inner: S,
    policy: Arc<Policy>,
}

/// What is written, and when.
#[derive(Clone, Debug)]
pub(crate) struct Policy {
    /// `None` when every request brings its own.
    pub(crate) credentials: Option<Credentials>,
    pub(crate) origins: Origins,
    pub(crate) if_absent: bool,
    pub(crate) require_choice: bool,
}

impl Policy {
    pub(super) fn new(credentials: Option<Credentials>) -> Self {
        Self { credentials, origins: Origins::selam(), if_absent: false, require_choice: false }
    }

    #[inline]
    fn authorize<B>(&self, request: &mut Request<B>) -> Result<Option<Credentials>, AuthError> {
        let Self { if_absent, require_choice, .. } = *self;
        let rules = Rules {
            credentials: self.credentials.as_ref(),
            origins: &self.origins,
            if_absent,
            require_choice,
        };
        let head = Head {
            method: Some(request.method()),
            uri: request.uri(),
            headers: request.headers(),
            extensions: request.extensions(),
        };
        let plan = Plan::new(rules, head)?;
        plan.apply(request.headers_mut())?;
        let (uri, credentials) = plan.into_parts();
        if let Some(uri) = uri {
            *request.uri_mut() = *uri;
        }
        Ok(credentials)
    }
}

impl<S> Authorize<S> {
    pub(crate) fn new(inner: S, policy: Arc<Policy>) -> Self {
        Self { inner, policy }
    }

    inner_accessors!();
}

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for Authorize<S>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>>,
    S::Error: From<AuthError>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    #[inline]
    fn call(&mut self, mut request: Request<ReqBody>) -> Self::Future {
        match self.policy.authorize(&mut request) {
            Ok(credentials) => ResponseFuture::sent(self.inner.call(request), credentials),
            Err(error) => ResponseFuture::refused(error),
        }
    }
}
