//! [`StripCredentialsLayer`]: removes what tells of a caller from headers and query.

use std::{
    borrow::Cow,
    mem,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, Request, Uri, request::Parts, uri::PathAndQuery};
use percent_encoding::percent_decode;
use tower::{Layer, Service};

use super::{
    names::{is_name, starts_with, tells_of_caller},
    websocket,
};

const PARAMETERS: [&str; 2] = ["token", "api_key"];

/// How many layers of percent-encoding are removed from a parameter's name before it is compared.
const MAX_DECODINGS: usize = 3;

/// What separates query parameters. Some servers still accept the obsolete `;`.
const SEPARATORS: [char; 2] = ['&', ';'];

/// Removes the caller's credentials, and what tells of its network or identity, from requests. See the
/// [module docs](super).
///
/// | Removed | Examples | Reason |
/// |---|---|---|
/// | credentials | `Authorization`, `X-API-Key`, `api-key`, `Cookie`, `Proxy-*`, `X-Auth-*`, `DPoP`; names that end with `-Token`, `-API-Key` or `-Authorization`, or have a word such as `Auth`, `JWT`, `OIDC`, `Password` or `Secret` | they are for this server, not for the API |
/// | addresses and routes that an edge or load balancer adds | `Forwarded`, `X-Forwarded-*`, `X-Real-IP`, `True-Client-IP`, `CF-*`, `CloudFront-*`, `X-Amz-Cf-*`, `X-Amzn-*`, `Fastly-*`, `Akamai-*`, `Fly-*`, `X-Azure-*`, `X-ARR-*`, `X-Vercel-*`, `X-NF-*`, `X-Envoy-*`, `X-Original-*`; names with the word `IP` | the API's edge answers 403 to some, and the caller's network is not its business |
/// | identities that a proxy in front verified | `Cf-Access-Jwt-Assertion`, `X-Amzn-Oidc-*`, `X-Goog-*`, `X-MS-*`, `X-Auth-Request-*`, `X-Pomerium-*`, `X-Authentik-*`, `Tailscale-*`, `Remote-*`, `X-WebAuth-*`, `From`, `Baggage`; names with the word `User` or `Email` | live tokens and personal data |
/// | client certificates | `Client-Cert` ([RFC 9440](https://www.rfc-editor.org/rfc/rfc9440)), `X-Client-Cert-*`, `X-SSL-*`, `SSL-*` | the same |
/// | what a browser adds | `Origin`, `Referer`, `Sec-Fetch-*`, `Sec-CH-*` | tells which page the user looks at; the API never meets the page |
/// | overrides | `X-HTTP-Method-Override`, `X-Original-URL`, `X-Rewrite-URL` | the API would read another method or path than was checked |
/// | WebSocket subprotocols that carry a token | `bearer.TOKEN`, `openai-insecure-api-key.TOKEN` | see [`WebSocketProtocols`](super::WebSocketProtocols) |
/// | query parameters | `token`, `api_key` | credentials |
///
/// These stay, among others: `User-Agent`, `X-Request-Id`, `traceparent`, `X-Amzn-Trace-Id`, `Idempotency-Key`, `OpenAI-*`,
/// `X-Stainless-*`, `Via`, and `CDN-Loop`, which [RFC 8586](https://www.rfc-editor.org/rfc/rfc8586#section-2) forbids to
/// remove.
///
/// All occurrences are removed, in every spelling that a server might accept: header names with `_` or other punctuation for
/// `-`; parameter names in any case, percent-encoded, as `token[]`, with `-` or `.` for `_`, or after a `;`. Values are not
/// examined. The rest of the query stays byte for byte the same. Bodies are not inspected, nor are their trailers: use
/// [`strip_trailers`](StripCredentialsLayer::strip_trailers) for those.
///
/// Extensions are kept, including [`RequestAuth`](crate::RequestAuth), because a caller cannot send them.
///
/// ```
/// use std::convert::Infallible;
/// use http::{HeaderName, Request, Response};
/// use tower::{ServiceBuilder, ServiceExt, service_fn};
/// use tower_selam::inbound::StripCredentialsLayer;
///
/// # tokio_test::block_on(async {
/// let layer = StripCredentialsLayer::new()
///     .with_header(HeaderName::from_static("x-session-id"))
///     .with_header_prefix("x-corp-")
///     .with_query_parameter("access_token");
/// let upstream = service_fn(|request: Request<()>| async move {
///     assert_eq!(request.uri(), "/v1/models?limit=5&q=%C3%A9");
///     assert!(request.headers().is_empty());
///     Ok::<_, Infallible>(Response::new(()))
/// });
/// let request = Request::get("/v1/models?limit=5&access%5Ftoken=1&q=%C3%A9&Token=2")
///     .header("x-session-id", "3")
///     .header("x-corp-user", "4")
///     .header("x-forwarded-for", "192.0.2.7")
///     .body(())
///     .unwrap();
/// ServiceBuilder::new().layer(layer).service(upstream).oneshot(request).await.unwrap();
/// # });
/// ```
#[derive(Clone, Debug, Default)]
pub struct StripCredentialsLayer(Arc<Extra>);

/// Changes to the built-in names.
#[derive(Clone, Debug, Default)]
struct Extra {
    headers: Vec<HeaderName>,
    prefixes: Vec<String>,
    kept: Vec<HeaderName>,
    parameters: Vec<String>,
}

impl StripCredentialsLayer {
    /// Removes what the table above lists.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Also removes this header.
    #[must_use]
    pub fn with_header(mut self, name: HeaderName) -> Self {
        Arc::make_mut(&mut self.0).headers.push(name);
        self
    }

    /// Also removes all headers whose names start with this prefix, such as `x-corp-`.
    #[must_use]
    pub fn with_header_prefix(mut self, prefix: impl Into<String>) -> Self {
        Arc::make_mut(&mut self.0).prefixes.push(prefix.into());
        self
    }

    /// Keeps this header, although it belongs to a family that is removed. The API then learns what it tells of the caller.
    ///
    /// Headers of [`with_header`](Self::with_header) and [`with_header_prefix`](Self::with_header_prefix) are removed
    /// nevertheless.
    ///
    /// ```
    /// use http::{HeaderMap, HeaderName, HeaderValue};
    /// use tower_selam::inbound::StripCredentialsLayer;
    ///
    /// let layer = StripCredentialsLayer::new().dangerous_keep_header(HeaderName::from_static("baggage"));
    /// let mut trailers = HeaderMap::new();
    /// trailers.insert("baggage", HeaderValue::from_static("cart=7"));
    /// layer.strip_trailers(&mut trailers);
    /// assert_eq!(trailers["baggage"], "cart=7");
    /// ```
    #[must_use]
    pub fn dangerous_keep_header(mut self, name: HeaderName) -> Self {
        Arc::make_mut(&mut self.0).kept.push(name);
        self
    }

    /// Also removes query parameters with this name, which is given without percent-encoding.
    #[must_use]
    pub fn with_query_parameter(mut self, name: impl Into<String>) -> Self {
        Arc::make_mut(&mut self.0).parameters.push(name.into());
        self
    }

    /// Removes what the layer removes from a request's head, for [hosts that are not Tower services](crate::guide::hosts).
    ///
    /// ```
    /// use http::Request;
    /// use tower_selam::inbound::StripCredentialsLayer;
    ///
    /// let request = Request::post("/v1/chat/completions?api_key=the-callers-own").header("cookie", "session=1");
    /// let (mut head, ()) = request.body(()).unwrap().into_parts();
    /// StripCredentialsLayer::new().strip_head(&mut head);
    /// assert_eq!((head.uri.to_string(), head.headers.len()), ("/v1/chat/completions".to_owned(), 0));
    /// ```
    pub fn strip_head(&self, head: &mut Parts) {
        self.0.strip(&mut head.headers, &mut head.uri);
    }

    /// Removes from trailers what the layer removes from headers, because some servers merge the two. The layer does not
    /// touch the body, so forwarding code calls this on the trailers that it reads.
    ///
    /// ```
    /// use http::{HeaderMap, HeaderValue};
    /// use tower_selam::inbound::StripCredentialsLayer;
    ///
    /// let mut trailers = HeaderMap::new();
    /// trailers.insert("x-api-key", HeaderValue::from_static("the-callers-own"));
    /// trailers.insert("x-checksum", HeaderValue::from_static("1"));
    /// StripCredentialsLayer::new().strip_trailers(&mut trailers);
    /// assert_eq!(trailers.len(), 1);
    /// assert_eq!(trailers["x-checksum"], "1");
    /// ```
    pub fn strip_trailers(&self, trailers: &mut HeaderMap) {
        self.0.strip_headers(trailers);
    }
}

impl<S> Layer<S> for StripCredentialsLayer {
    type Service = StripCredentials<S>;

    fn layer(&self, inner: S) -> Self::Service {
        StripCredentials { inner, extra: Arc::clone(&self.0) }
    }
}

/// Removes what tells of the caller from requests. Made by [`StripCredentialsLayer`]; see the [module docs](super).
#[derive(Clone, Debug)]
pub struct StripCredentials<S> {
    inner: S,
    extra: Arc<Extra>,
}

impl<S> StripCredentials<S> {
    inner_accessors!();
}

impl<S, B> Service<Request<B>> for StripCredentials<S>
where
    S: Service<Request<B>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    #[inline]
    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let mut uri = mem::take(request.uri_mut());
        self.extra.strip(request.headers_mut(), &mut uri);
        *request.uri_mut() = uri;
        self.inner.call(request)
    }
}

impl Extra {
    fn strip(&self, headers: &mut HeaderMap, uri: &mut Uri) {
        self.strip_headers(headers);
        if let Some(without) = self.uri_without(uri) {
            *uri = without;
        }
    }

    fn strip_headers(&self, headers: &mut HeaderMap) {
        let found: Vec<_> = headers.keys().filter(|name| self.is_header(name)).cloned().collect();
        for name in found {
            headers.remove(name);
        }
        websocket::strip(headers);
    }

    fn is_header(&self, name: &HeaderName) -> bool {
        self.headers.iter().any(|removed| is_name(name.as_str(), removed.as_str()))
            || self.prefixes.iter().any(|prefix| starts_with(name.as_str(), prefix))
            || (tells_of_caller(name) && !self.kept.contains(name))
    }

    /// Returns `uri` without credential parameters; `None` if it has none.
    fn uri_without(&self, uri: &Uri) -> Option<Uri> {
        let query = uri.query()?;
        if !query.split(SEPARATORS).any(|parameter| self.is_parameter(parameter)) {
            return None;
        }
        let mut text = String::with_capacity(uri.path().len() + 1 + query.len());
        text.push_str(uri.path());
        self.push_query_without(&mut text, query);

        let mut parts = uri.clone().into_parts();
        parts.path_and_query = PathAndQuery::from_maybe_shared(Bytes::from(text)).ok();
        // Removing parameters keeps the URI valid, so the default is never used; it only avoids a panic.
        Some(Uri::from_parts(parts).unwrap_or_default())
    }

    fn push_query_without(&self, text: &mut String, query: &str) {
        let (mut separator, mut end) = ('?', 0);
        for parameter in query.split(SEPARATORS) {
            end += parameter.len();
            let is_credential = self.is_parameter(parameter);
            if !is_credential {
                text.push(separator);
                text.push_str(parameter);
            }
            // All servers split at `&`, but not all at `;`, so `&` is the separator to keep.
            if !is_credential || separator == ';' {
                separator = query[end..].chars().next().unwrap_or('&');
            }
            end += 1;
        }
    }

    fn is_parameter(&self, parameter: &str) -> bool {
        let name = parameter.split_once('=').map_or(parameter, |(name, _)| name);
        let mut name = Cow::Borrowed(name.as_bytes());
        for _ in 0..MAX_DECODINGS {
            if self.is_name(&name) {
                return true;
            }
            match Cow::from(percent_decode(&name)) {
                Cow::Borrowed(_) => return false,
                Cow::Owned(decoded) => name = Cow::Owned(decoded),
            }
        }
        self.is_name(&name)
    }

    /// Whether a server could read `name` as that of a credential parameter.
    fn is_name(&self, name: &[u8]) -> bool {
        let name = name.split(|byte| matches!(byte, b'[' | b'=')).next().unwrap_or_default();
        let name = trim(name);
        let mut removed = PARAMETERS.iter().copied().chain(self.parameters.iter().map(String::as_str));
        removed.any(|removed| name.iter().copied().map(fold).eq(removed.bytes().map(fold)))
    }
}

/// Removes surrounding blanks, including `+` and control characters.
fn trim(name: &[u8]) -> &[u8] {
    let is_blank = |byte: &u8| matches!(byte, b'+' | b' ') || byte.is_ascii_control();
    let start = name.iter().position(|byte| !is_blank(byte)).unwrap_or(name.len());
    let end = name.iter().rposition(|byte| !is_blank(byte)).map_or(start, |last| last + 1);
    &name[start..end]
}

/// Folds case, and the characters that PHP and others replace by `_` in variable names.
fn fold(byte: u8) -> u8 {
    match byte {
        b'-' | b'.' | b' ' | b'+' => b'_',
        byte => byte.to_ascii_lowercase(),
    }
}
