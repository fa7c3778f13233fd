use std::{
    borrow::Cow,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, Request, Uri, uri::PathAndQuery};
use percent_encoding::percent_decode;
use tower_layer::Layer;
use tower_service::Service;

/// Those that begin with `proxy-` go as well.
const HEADERS: [&str; 5] = ["authorization", "x-api-key", "api-key", "x-goog-api-key", "cookie"];

const PARAMETERS: [&str; 2] = ["token", "api_key"];

/// So often a parameter's name may have been percent-encoded.
const ENCODED: usize = 3;

/// What parts one parameter from the next: some servers read the older of the two as well.
const SEPARATORS: [char; 2] = ['&', ';'];

/// Takes the caller's credentials off requests. See the [module docs](super).
///
/// | | |
/// |---|---|
/// | headers | `Authorization`, `X-API-Key`, `api-key`, `x-goog-api-key`, `Cookie`, and all that begin with `Proxy-` |
/// | query parameters | `token`, `api_key` |
///
/// However often they come, and however a server might spell them: header names with `_` for `-`; parameters in any case,
/// percent-encoded, as `token[]`, with `-` or `.` for `_`, or after a `;`. The rest of the query stays byte for byte as it
/// was. Bodies are not looked at, nor the trailers in them: [`strip_trailers`](StripCredentialsLayer::strip_trailers) is for
/// those.
///
/// Extensions stay, a [`RequestAuth`](crate::RequestAuth) among them: no caller can send one.
///
/// ```
/// use std::convert::Infallible;
/// use http::{HeaderName, Request, Response};
/// use tower::{ServiceBuilder, ServiceExt, service_fn};
/// use tower_selam::inbound::StripCredentialsLayer;
///
/// # tokio_test::block_on(async {
/// let layer = StripCredentialsLayer::new()
///     .with_header(HeaderName::from_static("x-session"))
///     .with_query_parameter("access_token");
/// let upstream = service_fn(|request: Request<()>| async move {
///     assert_eq!(request.uri(), "/v1/models?limit=5&q=%C3%A9");
///     assert!(request.headers().is_empty());
///     Ok::<_, Infallible>(Response::new(()))
/// });
/// let request = Request::get("/v1/models?limit=5&access%5Ftoken=1&q=%C3%A9&Token=2").header("x-session", "3").body(()).unwrap();
/// ServiceBuilder::new().layer(layer).service(upstream).oneshot(request).await.unwrap();
/// # });
/// ```
#[derive(Clone, Debug, Default)]
pub struct StripCredentialsLayer(Arc<More>);

/// What is taken off beside what always is.
#[derive(Clone, Debug, Default)]
struct More {
    headers: Vec<HeaderName>,
    parameters: Vec<String>,
}

impl StripCredentialsLayer {
    /// Takes off what the table above lists.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Also takes off this header.
    #[must_use]
    pub fn with_header(mut self, name: HeaderName) -> Self {
        Arc::make_mut(&mut self.0).headers.push(name);
        self
    }

    /// Also takes off query parameters of this name, given as it is before it is percent-encoded.
    #[must_use]
    pub fn with_query_parameter(mut self, name: impl Into<String>) -> Self {
        Arc::make_mut(&mut self.0).parameters.push(name.into());
        self
    }

    /// Takes off trailers what the layer takes off headers: some servers read both as one. They come with the body, which
    /// the layer leaves to you.
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
        StripCredentials { inner, more: Arc::clone(&self.0) }
    }
}

/// Takes the caller's credentials off requests. Made by [`StripCredentialsLayer`]; see the [module docs](super).
#[derive(Clone, Debug)]
pub struct StripCredentials<S> {
    inner: S,
    more: Arc<More>,
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
        self.more.strip_headers(request.headers_mut());
        if let Some(uri) = self.more.uri_without(request.uri()) {
            *request.uri_mut() = uri;
        }
        self.inner.call(request)
    }
}

impl More {
    fn strip_headers(&self, headers: &mut HeaderMap) {
        let found: Vec<_> = headers.keys().filter(|name| self.is_header(name.as_str())).cloned().collect();
        for name in found {
            headers.remove(name);
        }
    }

    fn is_header(&self, name: &str) -> bool {
        let ours = HEADERS.iter().copied().chain(self.headers.iter().map(HeaderName::as_str));
        begins_with(name, "proxy-") || { ours }
            .any(|ours| name.len() == ours.len() && begins_with(name, ours))
    }

    /// `uri` without the parameters that are credentials; `None` when it has none.
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
        // A part of a URI is one. If it were not: this is one that no credential of ours goes to.
        Some(Uri::from_parts(parts).unwrap_or_default())
    }

    fn push_query_without(&self, text: &mut String, query: &str) {
        let mut separator = '?';
        let mut rest = Some(query);
        while let Some(left) = rest {
            let at = left.find(SEPARATORS);
            let (parameter, next) = left.split_at(at.unwrap_or(left.len()));
            rest = at.map(|at| &left[at + 1..]);
            let credential = self.is_parameter(parameter);
            if !credential {
                text.push(separator);
                text.push_str(parameter);
            }
            separator = match (separator, next.chars().next()) {
                ('?', _) if credential => '?',
                // All servers part there where one of the two did.
                ('&', _) if credential => '&',
                (_, next) => next.unwrap_or('&'),
            };
        }
    }

    fn is_parameter(&self, parameter: &str) -> bool {
        let name = parameter.split_once('=').map_or(parameter, |(name, _)| name);
        let mut name = Cow::Borrowed(name.as_bytes());
        for _ in 0..ENCODED {
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

    /// Whether a server could read `name` as one of ours.
    fn is_name(&self, name: &[u8]) -> bool {
        let name = name.split(|byte| matches!(byte, b'[' | b'=')).next().unwrap_or_default();
        let name = trimmed(name);
        let mut ours = PARAMETERS.iter().copied().chain(self.parameters.iter().map(String::as_str));
        ours.any(|ours| name.iter().copied().map(folded).eq(ours.bytes().map(folded)))
    }
}

/// As servers compare header names that hand them on as variables: `_` is `-`.
fn begins_with(name: &str, prefix: &str) -> bool {
    let same = |(byte, other): (u8, u8)| {
        byte == other || (matches!(byte, b'_' | b'-') && matches!(other, b'_' | b'-'))
    };
    name.len() >= prefix.len() && name.bytes().zip(prefix.bytes()).all(same)
}

/// Without the blanks around it.
fn trimmed(name: &[u8]) -> &[u8] {
    let blank = |byte: &u8| matches!(byte, b'+' | b' ') || byte.is_ascii_control();
    let start = name.iter().position(|byte| !blank(byte)).unwrap_or(name.len());
    let end = name.iter().rposition(|byte| !blank(byte)).map_or(start, |last| last + 1);
    &name[start..end]
}

/// In lower case, and with `_` for what some languages have no variables with.
fn folded(byte: u8) -> u8 {
    match byte {
        b'-' | b'.' | b' ' | b'+' => b'_',
        byte => byte.to_ascii_lowercase(),
    }
}
