//! [`StripResponsesLayer`]: removes headers from responses that would speak for the server that forwards them.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use http::{HeaderMap, Request, Response};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tower::{Layer, Service};

const NAMES: [&str; 41] = [
    "accept-ch",
    "accept-ch-lifetime",
    "activate-storage-access",
    "alt-svc",
    "alt-used",
    "authentication-control",
    "authentication-info",
    "clear-site-data",
    "critical-ch",
    "document-policy",
    "document-policy-report-only",
    "expect-ct",
    "expect-staple",
    "feature-policy",
    "idp-signin-status",
    "nel",
    "observe-browsing-topics",
    "origin-agent-cluster",
    "origin-isolation",
    "origin-trial",
    "p3p",
    "permissions-policy",
    "permissions-policy-report-only",
    "referrer-policy",
    "report-to",
    "reporting-endpoints",
    "server",
    "service-worker-allowed",
    "service-worker-navigation-preload",
    "set-cookie",
    "set-cookie2",
    "set-login",
    "speculation-rules",
    "strict-transport-security",
    "supports-loading-mode",
    "timing-allow-origin",
    "x-frame-options",
    "x-permitted-cross-domain-policies",
    "x-reproxy-url",
    "x-sendfile",
    "x-xss-protection",
];

const PREFIXES: [&str; 17] = [
    "access-control-",
    "ad-auction-",
    "attribution-reporting-",
    "content-security-policy",
    "cross-origin-",
    "integrity-policy",
    "private-network-access-",
    "proxy-",
    "public-key-pins",
    "sec-session-",
    "sec-shared-storage-",
    "secure-session-",
    "use-as-dictionary",
    "x-accel-redirect",
    "x-content-security-policy",
    "x-lighttpd-send-",
    "x-webkit-csp",
];

/// Removes from responses, their trailers included, the headers that would act for the server that forwards them.
///
/// A browser applies these headers to the origin that it called, which is the proxy's. The upstream must not set the proxy's
/// cookies, move its callers to another address, or switch its port to TLS for a year. Removed are:
///
/// | Headers | What the upstream could do |
/// |---|---|
/// | `Set-Cookie`, `Clear-Site-Data`, `Set-Login`, `Sec-Session-*` | set or delete the proxy's cookies and logins |
/// | `Strict-Transport-Security`, `Alt-Svc`, `Public-Key-Pins`, `Expect-CT`, `Expect-Staple` | change how the proxy is reached |
/// | `NEL`, `Report-To`, `Reporting-Endpoints` | have browsers report the proxy's traffic |
/// | `Accept-CH`, `Critical-CH`, `Permissions-Policy`, `Content-Security-Policy*`, `Cross-Origin-*`, `Origin-Agent-Cluster`, `Origin-Trial`, `Service-Worker-Allowed`, `Referrer-Policy`, `X-Frame-Options` and others | set policies for the proxy's pages |
/// | `Access-Control-*`, `Timing-Allow-Origin` | let web pages of its choice read the proxy's responses |
/// | `Server` | name the wrong software |
/// | `Proxy-*`, `Authentication-Info` | talk about a connection or login that is not the caller's |
/// | `X-Accel-Redirect`, `X-Sendfile`, `X-Reproxy-URL` | make a web server in front of the proxy send one of its files |
///
/// `WWW-Authenticate` stays: a 401 must have one, and clients read the error in it. `Location` stays as well; a proxy whose
/// paths differ from the upstream's has to rewrite it.
///
/// ```
/// use std::convert::Infallible;
/// use http::{Request, Response};
/// use http_body_util::Empty;
/// use tower::{ServiceBuilder, ServiceExt, service_fn};
/// use tower_selam::inbound::StripResponsesLayer;
///
/// # tokio_test::block_on(async {
/// let upstream = service_fn(|_: Request<()>| async {
///     let response = Response::builder().header("set-cookie", "session=1").header("x-request-id", "req_1");
///     Ok::<_, Infallible>(response.body(Empty::<&[u8]>::new()).unwrap())
/// });
/// let service = ServiceBuilder::new().layer(StripResponsesLayer::new()).service(upstream);
/// let response = service.oneshot(Request::new(())).await.unwrap();
/// assert_eq!(response.headers().len(), 1);
/// assert_eq!(response.headers()["x-request-id"], "req_1");
/// # });
/// ```
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct StripResponsesLayer;

impl StripResponsesLayer {
    /// Creates the layer.
    #[must_use]
    pub fn new() -> Self {
        Self
    }

    /// Removes the same headers from a map: for informational responses such as 103 (Early Hints), which no service returns.
    pub fn strip_headers(self, headers: &mut HeaderMap) {
        let found: Vec<_> = headers.keys().filter(|name| is_removed(name.as_str())).cloned().collect();
        for name in found {
            headers.remove(name);
        }
    }
}

fn is_removed(name: &str) -> bool {
    NAMES.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

impl<S> Layer<S> for StripResponsesLayer {
    type Service = StripResponses<S>;

    fn layer(&self, inner: S) -> Self::Service {
        StripResponses { inner }
    }
}

/// Removes headers from responses. Made by [`StripResponsesLayer`]; see there.
#[derive(Clone, Copy, Debug)]
pub struct StripResponses<S> {
    inner: S,
}

impl<S> StripResponses<S> {
    inner_accessors!();
}

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for StripResponses<S>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>>,
{
    type Response = Response<StrippedBody<ResBody>>;
    type Error = S::Error;
    type Future = StrippedResponseFuture<S::Future>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    #[inline]
    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        StrippedResponseFuture { response: self.inner.call(request) }
    }
}

pin_project! {
    /// Response future of [`StripResponses`]. Dropping it drops the request.
    pub struct StrippedResponseFuture<F> {
        #[pin]
        response: F,
    }
}

impl<F, B, E> Future for StrippedResponseFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
{
    type Output = Result<Response<StrippedBody<B>>, E>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut response = ready!(self.project().response.poll(cx))?;
        StripResponsesLayer.strip_headers(response.headers_mut());
        Poll::Ready(Ok(response.map(|body| StrippedBody { body })))
    }
}

opaque_debug!(StrippedResponseFuture<F>);

pin_project! {
    /// Response body of [`StripResponses`]: removes the same headers from the trailers.
    #[derive(Clone, Debug, Default)]
    pub struct StrippedBody<B> {
        #[pin]
        body: B,
    }
}

impl<B: Body> Body for StrippedBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    #[inline]
    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let mut frame = ready!(self.project().body.poll_frame(cx));
        if let Some(Ok(frame)) = &mut frame
            && let Some(trailers) = frame.trailers_mut()
        {
            StripResponsesLayer.strip_headers(trailers);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
