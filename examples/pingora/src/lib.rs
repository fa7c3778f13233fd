//! A pingora proxy in front of SelamAPI: callers send a token of ours, and the API gets our key, or JWT and key.
//!
//! pingora's filters are no Tower services, so the proxy uses `SelamLayer::authorize`:
//!
//! | Filter | Does |
//! |---|---|
//! | `request_filter` | refuses callers without the token, and paths outside `/v1/` |
//! | `upstream_request_filter` | removes the caller's credentials and writes ours, for the API's origin alone |
//! | `upstream_response_filter` | reports the answer; after a 401, waits for the refresh and asks for a retry |
//! | `error_while_proxy` | lets pingora retry a rejected request, also a `POST`, since the API did not process it |
//!
//! pingora keeps the first 64 KiB of a request's body, so a longer request is not replayed: its caller gets the 401, and the
//! credential is refreshed for the next one. The filters see no body of an answer before it is passed on. A 401 therefore
//! blames the JWT if there is one, and a key sent next to a JWT should be re-read on its own, as from a file. Answers are
//! passed on as they arrive, unread: a credential that the API echoes is not masked.

use std::{fmt, io, mem};

use async_trait::async_trait;
use http::{HeaderValue, Uri, header::AUTHORIZATION, header::HOST};
use pingora::{
    Error, ErrorType, Result,
    http::{RequestHeader, ResponseHeader},
    proxy::{ProxyHttp, Session},
    upstreams::peer::HttpPeer,
};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio::net::lookup_host;
use tower_selam::{
    AuthError, AuthErrorKind, Authorized, BoxError, SelamLayer,
    inbound::{PathRule, StripCredentialsLayer},
};

/// The proxy's filters.
pub struct Gateway {
    selam: SelamLayer,
    strip: StripCredentialsLayer,
    allowed: PathRule,
    /// The digest of the callers' token.
    token: [u8; 32],
    api: Uri,
    host: HeaderValue,
}

/// The state of one request.
#[derive(Debug, Default)]
pub struct Request {
    authorized: Option<Authorized>,
    /// Whether it was rejected, and is to be sent once more.
    replays: bool,
}

impl Gateway {
    /// Serves callers that send `token` as bearer.
    ///
    /// # Errors
    ///
    /// When the layer's base URL has no host.
    pub fn new(selam: SelamLayer, token: &str) -> Result<Self, BoxError> {
        let api = selam.base_url().endpoint("")?;
        let host = HeaderValue::from_str(api.authority().ok_or("the base URL has no host")?.as_str())?;
        let (strip, allowed) = (StripCredentialsLayer::new(), PathRule::below("/v1")?);
        Ok(Self { selam, strip, allowed, token: Sha256::digest(token).into(), api, host })
    }

    fn knows(&self, request: &RequestHeader) -> bool {
        let mut values = request.headers.get_all(AUTHORIZATION).iter();
        let (Some(value), None) = (values.next(), values.next()) else { return false };
        let Some((scheme, token)) = value.as_bytes().split_at_checked(b"bearer ".len()) else { return false };
        let digest: [u8; 32] = Sha256::digest(token).into();
        bool::from(digest.ct_eq(&self.token)) && scheme.eq_ignore_ascii_case(b"bearer ")
    }

    /// The URI at the API, whose base URL takes the place of `/v1`. The caller's own host is of no account.
    fn at_api(&self, uri: &Uri) -> Result<Uri> {
        let path = uri.path_and_query().map_or("", |path| path.as_str());
        let uri = self.selam.base_url().endpoint(path.strip_prefix("/v1").unwrap_or(path));
        uri.map_err(|error| Error::because(ErrorType::HTTPStatus(400), "the path is not valid", error))
    }
}

#[async_trait]
impl ProxyHttp for Gateway {
    type CTX = Request;

    fn new_ctx(&self) -> Request {
        Request::default()
    }

    async fn request_filter(&self, session: &mut Session, _: &mut Request) -> Result<bool> {
        let status = match session.req_header() {
            request if !self.knows(request) => 401,
            request if !self.allowed.covers(request.uri.path()) => 404,
            _ => return Ok(false),
        };
        session.respond_error(status).await?;
        Ok(true)
    }

    async fn upstream_peer(&self, _: &mut Session, _: &mut Request) -> Result<Box<HttpPeer>> {
        let (host, tls) = (self.api.host().unwrap_or_default(), self.api.scheme_str() == Some("https"));
        let port = self.api.port_u16().unwrap_or(if tls { 443 } else { 80 });
        let found = lookup_host((host, port)).await.and_then(|mut found| found.next().ok_or_else(no_address));
        let address = found
            .map_err(|error| Error::because(ErrorType::HTTPStatus(502), "the API is not found", error))?;
        Ok(Box::new(HttpPeer::new(address, tls, host.to_owned())))
    }

    async fn upstream_request_filter(
        &self,
        _: &mut Session,
        upstream: &mut RequestHeader,
        request: &mut Request,
    ) -> Result<()> {
        let mut head = upstream.as_owned_parts();
        self.strip.strip_head(&mut head);
        head.uri = self.at_api(&head.uri)?;
        head.headers.insert(HOST, self.host.clone());
        match &mut request.authorized {
            Some(authorized) => authorized.authorize_again(&mut head).await.map_err(not_sent)?,
            None => request.authorized = Some(self.selam.authorize(&mut head).await.map_err(not_sent)?),
        }
        *upstream = head.into();
        Ok(())
    }

    async fn upstream_response_filter(
        &self,
        session: &mut Session,
        answer: &mut ResponseHeader,
        request: &mut Request,
    ) -> Result<()> {
        let Some(authorized) = &mut request.authorized else { return Ok(()) };
        if session.as_ref().retry_buffer_truncated() {
            authorized.forbid_replay();
        }
        match authorized.should_replay(answer.status, &answer.headers, b"").await {
            Ok(true) => {
                request.replays = true;
                Error::e_explain(ErrorType::HTTPStatus(401), "rejected; sent again with another credential")
            }
            Ok(false) => Ok(()),
            Err(error) => {
                log::warn!("{error}");
                Ok(())
            }
        }
    }

    /// Retries what the API rejected, and otherwise what pingora would by default.
    fn error_while_proxy(
        &self,
        peer: &HttpPeer,
        session: &mut Session,
        error: Box<Error>,
        request: &mut Request,
        reused: bool,
    ) -> Box<Error> {
        let mut error = error.more_context(format!("Peer: {peer}"));
        let is_rejected = mem::take(&mut request.replays);
        if session.as_ref().retry_buffer_truncated() {
            error.set_retry(false);
        } else if is_rejected {
            error.set_retry(true);
        } else if session.req_header().method.is_idempotent() {
            error.retry.decide_reuse(reused);
        } else {
            error.set_retry(false);
        }
        error
    }
}

fn no_address() -> io::Error {
    io::Error::other("the name has no address")
}

/// The answer to a caller whose request is not sent.
fn not_sent(error: AuthError) -> Box<Error> {
    let status = match error.kind() {
        AuthErrorKind::InvalidRequest => 400,
        _ => 503,
    };
    Error::because(ErrorType::HTTPStatus(status), "not sent to the API", error)
}

impl fmt::Debug for Gateway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gateway").field("api", &self.api).finish_non_exhaustive()
    }
}
