use std::fmt;

use bytes::Bytes;
use http::{Request, Response, Uri};
use http_body::Body;
use tower_service::Service;

use super::{ClientAuth, TokenClient};
use crate::{
    BoxError, ConfigError, ConfigErrorKind,
    error::{Place, Subject},
    origin::{Origin, parse_url},
};

/// Where tokens are asked for, through which client, and as whom. Cheap to clone.
///
/// The client is any Tower service for HTTP requests whose body is `From<Bytes>`, as `Full<Bytes>` and most clients' own
/// are; a clone of it is called for each token. It should not follow redirects by itself.
///
/// See the [module docs](super) for an example.
#[derive(Clone)]
pub struct TokenEndpoint {
    pub(super) uri: Uri,
    pub(super) client: TokenClient,
    pub(super) auth: ClientAuth,
}

impl TokenEndpoint {
    /// The endpoint at an `https` URL, which may have a query
    /// ([RFC 6749 section 3.2](https://www.rfc-editor.org/rfc/rfc6749#section-3.2)).
    ///
    /// `B` is the body that `client` takes; most clients take but one.
    ///
    /// # Errors
    ///
    /// When it is no absolute `https` URL, or has user information or a fragment. The error never holds the value.
    pub fn new<S, B, R>(url: &str, client: S) -> Result<Self, ConfigError>
    where
        S: Service<Request<B>, Response = Response<R>, Error: Into<BoxError>, Future: Send>
            + Clone
            + Send
            + 'static,
        B: From<Bytes> + Send + 'static,
        R: Body<Data: Send, Error: Into<BoxError> + Send> + Send + 'static,
    {
        Self::over(TokenClient::new(client), url, Place::Argument, false)
    }

    /// The same, or one at a plain `http` URL to a loopback address or `localhost`, for tests.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new), and when an `http` URL leads anywhere else.
    pub fn allow_insecure_loopback<S, B, R>(url: &str, client: S) -> Result<Self, ConfigError>
    where
        S: Service<Request<B>, Response = Response<R>, Error: Into<BoxError>, Future: Send>
            + Clone
            + Send
            + 'static,
        B: From<Bytes> + Send + 'static,
        R: Body<Data: Send, Error: Into<BoxError> + Send> + Send + 'static,
    {
        Self::over(TokenClient::new(client), url, Place::Argument, true)
    }

    pub(crate) fn over(
        client: TokenClient,
        url: &str,
        place: Place,
        allow_insecure_loopback: bool,
    ) -> Result<Self, ConfigError> {
        let parse = || {
            let uri = parse_url(url)?;
            Origin::of_uri(&uri)?.check(allow_insecure_loopback)?;
            if url.contains('#') { Err(ConfigErrorKind::Excess) } else { Ok(uri) }
        };
        match parse() {
            Ok(uri) => Ok(Self { uri, client, auth: ClientAuth::none() }),
            Err(kind) => Err(ConfigError::new(Subject::TokenUrl, place, kind)),
        }
    }

    /// How the endpoint knows who asks; by default the HTTP client sees to it.
    #[must_use]
    pub fn with_client_auth(mut self, auth: ClientAuth) -> Self {
        self.auth = auth;
        self
    }
}

impl fmt::Debug for TokenEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("TokenEndpoint");
        if let Ok(origin) = Origin::of_uri(&self.uri) {
            // A query may hold a secret.
            debug.field("uri", &format_args!("{origin}{}", self.uri.path()));
        }
        debug.field("auth", &self.auth).finish_non_exhaustive()
    }
}
