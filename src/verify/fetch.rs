//! [`Publisher`]: where an issuer publishes its keys, and one fetch of them.

use std::time::Duration;

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Request, StatusCode, Uri,
    header::{ACCEPT, AGE, CACHE_CONTROL, USER_AGENT},
};
use secrecy::ExposeSecret;
use serde::Deserialize;
use zeroize::Zeroizing;

use super::keys::VerifyingKeys;
use crate::{
    error::{BoxError, ConfigErrorKind},
    oauth::{self, TokenClient},
    origin::{Origin, parse_url},
    source::SettledFile,
    util::{clock::LONG, timer::timeout},
};

/// How long a fetch may take, with discovery.
const TIMEOUT: Duration = Duration::from_secs(10);

/// How long fetched keys are used without another look, by the publisher's `Cache-Control`.
const MIN_FRESH: Duration = Duration::from_secs(30);
const DEFAULT_FRESH: Duration = Duration::from_secs(10 * 60);
const MAX_FRESH: Duration = Duration::from_secs(60 * 60);

/// The same for a file.
const FILE_FRESH: Duration = Duration::from_millis(600);

/// How long fetched keys are used while the issuer is down.
const KEPT: Duration = Duration::from_secs(24 * 60 * 60);

/// The time between two fetches for the sake of JWTs that name an unknown key.
const UNKNOWN_KEY_INTERVAL: Duration = Duration::from_secs(30);
const UNKNOWN_KEY_INTERVAL_OF_FILE: Duration = Duration::from_secs(1);

/// Where keys come from.
pub(super) enum Publisher {
    /// They never change.
    Fixed,
    File(SettledFile),
    /// The URL of a JWK set.
    Url(Uri, TokenClient),
    Issuer {
        issuer: String,
        /// Of the discovery document.
        url: Uri,
        client: TokenClient,
        allow_insecure_loopback: bool,
    },
}

impl Publisher {
    pub(super) fn of_issuer(
        issuer: &str,
        client: TokenClient,
        allow_insecure_loopback: bool,
    ) -> Result<Self, ConfigErrorKind> {
        let (uri, origin) = parse_url(issuer)?;
        origin.check(allow_insecure_loopback)?;
        if uri.query().is_some() {
            return Err(ConfigErrorKind::UnexpectedPart);
        }
        let issuer = issuer.trim().to_owned();
        // OpenID Connect Discovery 1.0 section 4.1.
        let url = format!("{}/.well-known/openid-configuration", issuer.trim_end_matches('/'));
        let url = url.parse().map_err(|_| ConfigErrorKind::InvalidUrl)?;
        Ok(Self::Issuer { issuer, url, client, allow_insecure_loopback })
    }

    pub(super) fn of_url(
        url: &str,
        client: TokenClient,
        allow_insecure_loopback: bool,
    ) -> Result<Self, ConfigErrorKind> {
        checked(url, allow_insecure_loopback).map(|url| Self::Url(url, client))
    }

    /// How long keys are used if no fetch succeeds.
    pub(super) fn kept_for(&self) -> Duration {
        match self {
            Self::Fixed | Self::File(_) => LONG,
            Self::Url(..) | Self::Issuer { .. } => KEPT,
        }
    }

    /// The longest pause after failures. A file that is repaired is read again as soon as one that changes.
    pub(super) fn max_backoff(&self) -> Duration {
        match self {
            Self::Fixed | Self::File(_) => Duration::from_secs(1),
            Self::Url(..) | Self::Issuer { .. } => Duration::from_secs(60),
        }
    }

    /// The time between two fetches for the sake of JWTs that name an unknown key; `None` if there are none.
    pub(super) fn unknown_key_interval(&self) -> Option<Duration> {
        match self {
            Self::Fixed => None,
            Self::File(_) => Some(UNKNOWN_KEY_INTERVAL_OF_FILE),
            Self::Url(..) | Self::Issuer { .. } => Some(UNKNOWN_KEY_INTERVAL),
        }
    }

    /// Fetches the keys, and returns how long to use them without another look.
    pub(super) async fn fetch(&self) -> Result<(VerifyingKeys, Duration), BoxError> {
        match self {
            Self::Fixed => Err("these keys are fixed".into()),
            Self::File(file) => {
                let content = file.read().await.map_err(|kind| format!("the file {kind}"))?;
                let keys = parse(file, content.expose_secret())?;
                Ok((keys, FILE_FRESH))
            }
            Self::Url(url, client) => timeout(TIMEOUT, key_set(url, client)).await?,
            Self::Issuer { issuer, url, client, allow_insecure_loopback } => {
                let fetch = async {
                    let url = discover(issuer, url, client, *allow_insecure_loopback).await?;
                    key_set(&url, client).await
                };
                timeout(TIMEOUT, fetch).await?
            }
        }
    }
}

/// Parses the content of a file, at start-up or later.
fn parse(file: &SettledFile, content: &[u8]) -> Result<VerifyingKeys, BoxError> {
    VerifyingKeys::parse(content).map_err(|kind| format!("the file {} {kind}", file.path().display()).into())
}

fn checked(url: &str, allow_insecure_loopback: bool) -> Result<Uri, ConfigErrorKind> {
    let (uri, origin) = parse_url(url)?;
    origin.check(allow_insecure_loopback)?;
    Ok(uri)
}

/// Returns the URL of the key set, from the discovery document.
async fn discover(
    issuer: &str,
    url: &Uri,
    client: &TokenClient,
    allow_insecure_loopback: bool,
) -> Result<Uri, BoxError> {
    #[derive(Deserialize)]
    struct Document {
        issuer: String,
        jwks_uri: String,
    }
    let (_, body) = get(url, client).await?;
    let document: Document =
        serde_json::from_slice(&body).map_err(|_| format!("{} is not a discovery document", Shown(url)))?;
    // OpenID Connect Discovery 1.0 section 4.3. Otherwise one issuer could publish keys for another.
    if document.issuer != issuer {
        return Err(format!("{} is the document of another issuer, {:?}", Shown(url), document.issuer).into());
    }
    checked(&document.jwks_uri, allow_insecure_loopback)
        .map_err(|kind| format!("the `jwks_uri` in {} {kind}", Shown(url)).into())
}

async fn key_set(url: &Uri, client: &TokenClient) -> Result<(VerifyingKeys, Duration), BoxError> {
    let (headers, body) = get(url, client).await?;
    let keys = VerifyingKeys::parse(&body).map_err(|kind| format!("{} {kind}", Shown(url)))?;
    Ok((keys, fresh_for(&headers)))
}

async fn get(url: &Uri, client: &TokenClient) -> Result<(HeaderMap, Zeroizing<Vec<u8>>), BoxError> {
    let mut request = Request::new(Bytes::new());
    *request.uri_mut() = url.clone();
    request.headers_mut().insert(ACCEPT, HeaderValue::from_static("application/json"));
    request.headers_mut().insert(USER_AGENT, oauth::USER_AGENT);
    let response = client.send(request, None).await?;
    // Not even a redirect: it could lead to a host that is not the issuer's, or to plain http.
    if response.status != StatusCode::OK {
        return Err(format!("{} answered {}", Shown(url), response.status.as_u16()).into());
    }
    Ok((response.headers, response.body))
}

/// A URL without its query, for messages.
struct Shown<'a>(&'a Uri);

impl std::fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Ok(origin) = Origin::of_uri(self.0) {
            write!(f, "{origin}")?;
        }
        f.write_str(self.0.path())
    }
}

/// How long a response stays fresh ([RFC 9111 section 4.2](https://www.rfc-editor.org/rfc/rfc9111#section-4.2)), within our
/// bounds.
fn fresh_for(headers: &HeaderMap) -> Duration {
    let values = headers.get_all(CACHE_CONTROL).iter().filter_map(|value| value.to_str().ok());
    let mut directives =
        values.flat_map(|value| value.split(',')).map(|item| item.trim().to_ascii_lowercase());
    let max_age = directives.find_map(|directive| match &*directive {
        "no-cache" | "no-store" => Some(0),
        directive => directive.strip_prefix("max-age=")?.trim_matches('"').parse().ok(),
    });
    let age = headers.get(AGE).and_then(|age| age.to_str().ok()?.parse().ok()).unwrap_or(0);
    let fresh = max_age.map(|max_age: u64| Duration::from_secs(max_age.saturating_sub(age)));
    fresh.unwrap_or(DEFAULT_FRESH).clamp(MIN_FRESH, MAX_FRESH)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// V3
    #[test]
    fn cache_control_is_obeyed_within_bounds() {
        for (headers, seconds) in [
            (&[][..], 600),
            (&[("cache-control", "max-age=300")], 300),
            (&[("cache-control", "public, Max-Age=300, must-revalidate")], 300),
            (&[("cache-control", "public"), ("cache-control", "max-age=\"300\"")], 300),
            (&[("cache-control", "max-age=300"), ("age", "100")], 200),
            (&[("cache-control", "max-age=300"), ("age", "4000")], 30),
            (&[("cache-control", "s-maxage=300")], 600),
            (&[("cache-control", "max-age=x")], 600),
            (&[("cache-control", "max-age=5")], 30),
            (&[("cache-control", "no-store, max-age=300")], 30),
            (&[("cache-control", "max-age=86400")], 3600),
            (&[("cache-control", "max-age=99999999999999999999")], 600),
        ] {
            let map = headers.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
            assert_eq!(fresh_for(&map.collect()), Duration::from_secs(seconds), "{headers:?}");
        }
    }
}
