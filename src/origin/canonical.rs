//! [`Origin`]: parsing, canonical form and comparison of scheme, host and port.

use std::{
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
};

use http::Uri;

use crate::error::{ConfigError, ConfigErrorKind, Place, Setting};

/// An origin in canonical form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Origin {
    /// Whether the scheme is `https`, rather than `http`.
    pub(super) is_https: bool,
    /// Host and port as a URI usually spells them: in lower case, without a trailing dot and the default port.
    authority: String,
    is_loopback: bool,
}

impl Origin {
    /// `https://api.selamgpt.com`.
    pub(crate) fn selam() -> Self {
        Self { is_https: true, authority: "api.selamgpt.com".to_owned(), is_loopback: false }
    }

    /// Parses an origin without path, query or fragment, and checks it.
    pub(super) fn parse(
        origin: &str,
        check: impl FnOnce(&Self) -> Result<(), ConfigErrorKind>,
    ) -> Result<Self, ConfigError> {
        let parsed = parse_url(origin).and_then(|(uri, origin)| match uri.query() {
            None if uri.path() == "/" => check(&origin).map(|()| origin),
            _ => Err(ConfigErrorKind::UnexpectedPart),
        });
        parsed.map_err(|kind| ConfigError::new(Setting::Origin, Place::Argument, kind))
    }

    /// Returns the origin of an absolute URI.
    pub(crate) fn of_uri(uri: &Uri) -> Result<Self, ConfigErrorKind> {
        match (uri.scheme_str(), uri.authority()) {
            (Some(scheme), Some(authority)) => Self::from_parts(scheme, authority.as_str()),
            _ => Err(ConfigErrorKind::InvalidUrl),
        }
    }

    pub(super) fn from_parts(scheme: &str, authority: &str) -> Result<Self, ConfigErrorKind> {
        let is = |name: &str| scheme.eq_ignore_ascii_case(name);
        let (is_https, default_port) = match () {
            () if is("https") || is("wss") => (true, 443),
            () if is("http") || is("ws") => (false, 80),
            () => return Err(ConfigErrorKind::NotHttps),
        };
        if authority.contains('@') {
            return Err(ConfigErrorKind::UserInfo);
        }
        let (host, port) = match authority.rfind([':', ']']) {
            Some(at) if authority.as_bytes()[at] == b':' => (&authority[..at], &authority[at + 1..]),
            _ => (authority, ""),
        };
        let (mut authority, is_loopback) = canonical_host(host).ok_or(ConfigErrorKind::InvalidHost)?;
        // `u16::from_str` would also accept a sign.
        if !port.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(ConfigErrorKind::InvalidPort);
        }
        if !port.is_empty() {
            let port: u16 = port.parse().map_err(|_| ConfigErrorKind::InvalidPort)?;
            if port != default_port {
                authority.push_str(&format!(":{port}"));
            }
        }
        Ok(Self { is_https, authority, is_loopback })
    }

    /// Checks that the origin is https, or plain http to loopback if that is allowed.
    pub(crate) fn check(&self, allow_insecure_loopback: bool) -> Result<(), ConfigErrorKind> {
        match allow_insecure_loopback {
            _ if self.is_https => Ok(()),
            true => self.check_loopback(),
            false => Err(ConfigErrorKind::NotHttps),
        }
    }

    pub(super) fn check_loopback(&self) -> Result<(), ConfigErrorKind> {
        if self.is_loopback { Ok(()) } else { Err(ConfigErrorKind::NotLoopback) }
    }

    /// Whether `uri` spells this origin in its canonical form. If not, it may still be the same origin.
    #[inline]
    pub(super) fn matches_exactly(&self, uri: &Uri) -> bool {
        let has_scheme = match uri.scheme_str() {
            Some("https") => self.is_https,
            Some("http") => !self.is_https,
            _ => false,
        };
        has_scheme && uri.authority().is_some_and(|authority| authority.as_str() == self.authority)
    }

    /// Whether a `Host` header names this origin. The header has no scheme, so the origin's own is assumed.
    pub(super) fn matches_host(&self, host: &str) -> bool {
        self.authority == host || Self::from_parts(self.scheme(), host).is_ok_and(|origin| origin == *self)
    }

    fn scheme(&self) -> &'static str {
        if self.is_https { "https" } else { "http" }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme(), self.authority)
    }
}

/// Returns the canonical form of a host, and whether it is on the loopback interface.
fn canonical_host(host: &str) -> Option<(String, bool)> {
    if let Some(inner) = host.strip_prefix('[') {
        let address: Ipv6Addr = inner.strip_suffix(']')?.parse().ok()?;
        return Some((format!("[{address}]"), address.is_loopback()));
    }
    if let Ok(address) = host.parse::<Ipv4Addr>() {
        return Some((address.to_string(), address.is_loopback()));
    }
    let name = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
    let is_valid = |label: &str| {
        !label.is_empty()
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
    };
    // Some resolvers read `127.1` and `0x7f.1` as addresses, so they are not accepted as names.
    let last = name.rsplit('.').next()?;
    let is_numeric = last.bytes().all(|byte| byte.is_ascii_digit()) || last.starts_with("0x");
    let is_loopback = name == "localhost";
    (name.split('.').all(is_valid) && !is_numeric).then_some((name, is_loopback))
}

/// Parses an absolute URL without a fragment from configuration, trimming surrounding white space.
pub(crate) fn parse_url(url: &str) -> Result<(Uri, Origin), ConfigErrorKind> {
    let url = url.trim();
    if url.is_empty() {
        return Err(ConfigErrorKind::Empty);
    }
    if let Some(at) = url.bytes().position(|byte| !byte.is_ascii()) {
        return Err(ConfigErrorKind::NonAscii { at });
    }
    let uri: Uri = url.parse().map_err(|_| ConfigErrorKind::InvalidUrl)?;
    let origin = Origin::of_uri(&uri)?;
    if url.contains('#') { Err(ConfigErrorKind::UnexpectedPart) } else { Ok((uri, origin)) }
}
