//! [`StripHopByHopLayer`]: removes headers that concern one connection only.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use http::{
    HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Version,
    header::{CONNECTION, CONTENT_LENGTH, TE, TRANSFER_ENCODING, UPGRADE, VIA},
};
use pin_project_lite::pin_project;
use tower::{Layer, Service};

/// Headers that stay although `Connection` names them: those that are handled apart, and those that detect loops, which only
/// an attacker would have removed ([RFC 8586 section 2](https://www.rfc-editor.org/rfc/rfc8586#section-2)).
const NOT_REMOVED: [HeaderName; 5] = [CONNECTION, TE, UPGRADE, VIA, HeaderName::from_static("cdn-loop")];

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// Removes hop-by-hop headers from requests and responses, as
/// [RFC 9110 section 7.6.1](https://www.rfc-editor.org/rfc/rfc9110#section-7.6.1) requires of intermediaries. See the
/// [module docs](super).
///
/// Removes `Connection` and every header that it names, `Keep-Alive`, `Proxy-Connection`, `TE`, `Transfer-Encoding` and
/// `Upgrade`, and a `Content-Length` that `Transfer-Encoding` overrides. Keeps:
///
/// - `Via` and `CDN-Loop`, even if `Connection` names them: they detect loops.
/// - `TE: trailers`, which gRPC needs, and `Trailer`, which is end-to-end.
/// - `Connection: upgrade` and `Upgrade` of an HTTP/1.1 request that asks for an upgrade, and of the 101 that answers
///   it. An upgrade to another HTTP version or to TLS is not forwarded, because the proxy would not see the requests
///   inside.
///
/// ```
/// use std::convert::Infallible;
/// use http::{Request, Response};
/// use tower::{ServiceBuilder, ServiceExt, service_fn};
/// use tower_selam::inbound::StripHopByHopLayer;
///
/// # tokio_test::block_on(async {
/// let upstream = service_fn(|request: Request<()>| async move {
///     assert_eq!(request.headers()["connection"], "upgrade");
///     assert_eq!(request.headers()["upgrade"], "websocket");
///     assert!(!request.headers().contains_key("x-mine"));
///     let switching = Response::builder().status(101).header("connection", "Upgrade").header("upgrade", "websocket");
///     Ok::<_, Infallible>(switching.header("keep-alive", "timeout=5").body(()).unwrap())
/// });
/// let request = Request::get("/v1/audio/agent")
///     .header("connection", "x-mine, Upgrade")
///     .header("x-mine", "1")
///     .header("upgrade", "websocket")
///     .body(())
///     .unwrap();
/// let response = ServiceBuilder::new().layer(StripHopByHopLayer::new()).service(upstream).oneshot(request).await.unwrap();
/// assert_eq!(response.headers()["upgrade"], "websocket");
/// assert!(!response.headers().contains_key("keep-alive"));
/// # });
/// ```
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct StripHopByHopLayer;

impl StripHopByHopLayer {
    /// Creates the layer.
    #[must_use]
    pub fn new() -> Self {
        Self
    }
}

impl<S> Layer<S> for StripHopByHopLayer {
    type Service = StripHopByHop<S>;

    fn layer(&self, inner: S) -> Self::Service {
        StripHopByHop { inner }
    }
}

/// Removes hop-by-hop headers from requests and responses. Made by [`StripHopByHopLayer`]; see there.
#[derive(Clone, Copy, Debug)]
pub struct StripHopByHop<S> {
    inner: S,
}

impl<S> StripHopByHop<S> {
    inner_accessors!();
}

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for StripHopByHop<S>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>>,
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
        let http1 = request.version() == Version::HTTP_11;
        let upgrade = strip_request(request.headers_mut(), http1);
        ResponseFuture { response: self.inner.call(request), upgrade }
    }
}

pin_project! {
    /// Response future of [`StripHopByHop`]. Dropping it drops the request.
    pub struct ResponseFuture<F> {
        #[pin]
        response: F,
        // Whether the request asked for an upgrade that was forwarded.
        upgrade: bool,
    }
}

impl<F, B, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
{
    type Output = F::Output;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let mut response = ready!(this.response.poll(cx))?;
        let upgrade = *this.upgrade && response.status() == StatusCode::SWITCHING_PROTOCOLS;
        let headers = response.headers_mut();
        strip(headers, upgrade && headers.contains_key(UPGRADE));
        headers.remove(TE);
        Poll::Ready(Ok(response))
    }
}

opaque_debug!(ResponseFuture<F>);

/// Strips a request, and returns whether it asks for an upgrade that is forwarded.
fn strip_request(headers: &mut HeaderMap, http1: bool) -> bool {
    let upgrade = http1 && items(headers, CONNECTION).any(is("upgrade")) && keep_upgrades(headers);
    strip(headers, upgrade);
    let takes_trailers = items(headers, TE).any(is("trailers"));
    headers.remove(TE);
    if takes_trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    upgrade
}

/// Removes all hop-by-hop headers except `TE`.
fn strip(headers: &mut HeaderMap, upgrade: bool) {
    if headers.contains_key(CONNECTION) {
        let named: Vec<_> = items(headers, CONNECTION)
            .filter_map(|name| HeaderName::from_bytes(name).ok())
            .filter(|name| !NOT_REMOVED.contains(name))
            .collect();
        for name in named {
            headers.remove(name);
        }
    }
    // `Transfer-Encoding` overrides `Content-Length` (RFC 9112 section 6.3).
    if headers.remove(TRANSFER_ENCODING).is_some() {
        headers.remove(CONTENT_LENGTH);
    }
    headers.remove(KEEP_ALIVE);
    headers.remove(PROXY_CONNECTION);
    if upgrade {
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    } else {
        headers.remove(CONNECTION);
        headers.remove(UPGRADE);
    }
}

/// Removes the protocols that are not forwarded from `Upgrade`, and returns whether any are left.
fn keep_upgrades(headers: &mut HeaderMap) -> bool {
    let hides_requests = |protocol: &&[u8]| {
        let name = protocol.split(|byte| *byte == b'/').next().unwrap_or_default();
        ["h2c", "h2", "http", "tls"].iter().any(|hides| name.eq_ignore_ascii_case(hides.as_bytes()))
    };
    let (hidden, kept): (Vec<_>, Vec<_>) = items(headers, UPGRADE).partition(hides_requests);
    if hidden.is_empty() || kept.is_empty() {
        return !kept.is_empty();
    }
    let Ok(kept) = HeaderValue::from_bytes(&kept.join(&b", "[..])) else { return false };
    headers.insert(UPGRADE, kept);
    true
}

/// Iterates over the items of a comma-separated header, across all its lines.
fn items(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = &[u8]> {
    let values = headers.get_all(name).into_iter();
    let items = values.flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
    items.map(<[u8]>::trim_ascii).filter(|item| !item.is_empty())
}

fn is(expected: &str) -> impl FnMut(&[u8]) -> bool {
    move |item| item.eq_ignore_ascii_case(expected.as_bytes())
}
