//! [`TokenEndpoint`]: the URL of a token endpoint, the HTTP client and the client authentication.

use std::fmt;

use bytes::Bytes;
use http::{HeaderValue, Request, Response, Uri};
use http_body::Body;
use tower::Service;

use super::{ClientAuth, TokenClient};
use crate::{
    error::{BoxError, ConfigError, Place, Setting},
    origin::{Origin, parse_url},
};

pub(crate) const USER_AGENT: HeaderValue =
    HeaderValue::from_static(concat!(env!("CARGO_PKG_NAME"), "/", env!("CARGO_PKG_VERSION")));

/// Where tokens are requested, through which HTTP client, and as which OAuth client. Cheap to clone.
///
/// The HTTP client is any Tower service for HTTP requests whose body is `From<Bytes>`, as `Full<Bytes>` and the
/// body types of most clients are. Each token request calls a clone of it. It should not follow redirects.
///
/// See the [module docs](super) for an example. A function that is generic over the client repeats the bounds of
/// [`new`](Self::new):
///
/// ```
/// # use bytes::Bytes;
/// # use http::{Request, Response};
/// # use http_body_util::Full;
/// # use tower::Service;
/// # use tower_selam::{BoxError, ConfigError, oauth::TokenEndpoint};
/// fn endpoint<S, R>(client: S) -> Result<TokenEndpoint, ConfigError>
/// where
///     S: Service<Request<Full<Bytes>>, Response = Response<R>, Error: Into<BoxError>, Future: Send>,
///     S: Clone + Send + 'static,
///     R: http_body::Body<Error: Into<BoxError>> + Send + 'static,
/// {
///     TokenEndpoint::new("https://login.example/oauth/token", client)
/// }
/// # assert!(endpoint(tower_selam::simulator::Simulator::new()).is_ok());
/// ```
#[derive(Clone)]
pub struct TokenEndpoint {
    pub(super) uri: Uri,
    pub(super) client: TokenClient,
    pub(super) auth: ClientAuth,
    pub(super) user_agent: Option<HeaderValue>,
}

impl TokenEndpoint {
    /// Makes an endpoint of an `https` URL, which may have a query
    /// ([RFC 6749 section 3.2](https://www.rfc-editor.org/rfc/rfc6749#section-3.2)).
    ///
    /// `B` is the body type that `client` takes; it is inferred if there is only one.
    ///
    /// # Errors
    ///
    /// Fails if `url` is not an absolute `https` URL, or has user information or a fragment. The error never
    /// contains the URL.
    pub fn new<S, B, R>(url: &str, client: S) -> Result<Self, ConfigError>
    where
        S: Service<Request<B>, Response = Response<R>, Error: Into<BoxError>, Future: Send>,
        S: Clone + Send + 'static,
        B: From<Bytes> + Send + 'static,
        R: Body<Error: Into<BoxError>> + Send + 'static,
    {
        Self::over(TokenClient::new(client), url, Place::Argument, false)
    }

    /// Like [`new`](Self::new), but also accepts a plain `http` URL to a loopback address or `localhost`, for
    /// tests.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new), and if an `http` URL points to any other host.
    pub fn allow_insecure_loopback<S, B, R>(url: &str, client: S) -> Result<Self, ConfigError>
    where
        S: Service<Request<B>, Response = Response<R>, Error: Into<BoxError>, Future: Send>,
        S: Clone + Send + 'static,
        B: From<Bytes> + Send + 'static,
        R: Body<Error: Into<BoxError>> + Send + 'static,
    {
        Self::over(TokenClient::new(client), url, Place::Argument, true)
    }

    pub(crate) fn over(
        client: TokenClient,
        url: &str,
        place: Place,
        allow_insecure_loopback: bool,
    ) -> Result<Self, ConfigError> {
        let parsed = parse_url(url).and_then(|(uri, origin)| {
            origin.check(allow_insecure_loopback)?;
            Ok(Self { uri, client, auth: ClientAuth::none(), user_agent: Some(USER_AGENT) })
        });
        parsed.map_err(|kind| ConfigError::new(Setting::TokenUrl, place, kind))
    }

    /// Sets how the client authenticates; by default the HTTP client does so by itself.
    #[must_use]
    pub fn with_client_auth(mut self, auth: ClientAuth) -> Self {
        self.auth = auth;
        self
    }

    /// Sets the `User-Agent` of token requests; by default `tower-selam/` and the version of this crate, because some
    /// issuers answer 403 to a request without one. `None` leaves it to the HTTP client. A client that writes the header
    /// itself replaces it.
    #[must_use]
    pub fn with_user_agent(mut self, user_agent: impl Into<Option<HeaderValue>>) -> Self {
        self.user_agent = user_agent.into();
        self
    }

    /// Returns the URL without its query, which may hold a secret.
    pub(super) fn audience(&self) -> String {
        Origin::of_uri(&self.uri).map(|origin| format!("{origin}{}", self.uri.path())).unwrap_or_default()
    }
}

impl fmt::Debug for TokenEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("TokenEndpoint");
        debug.field("uri", &format_args!("{}", self.audience()));
        debug.field("auth", &self.auth).finish_non_exhaustive()
    }
}
