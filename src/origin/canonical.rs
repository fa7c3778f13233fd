//! [`Origin`]: parsing, canonical form and comparison of scheme, host and port.

use std::{
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
};

use http::Uri;

use crate::error::{ConfigError, ConfigErrorKind, Place, Setting};

const SELAM_HOST: &str = "api.selamgpt.com";

/// An origin in canonical form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Origin {
    pub(super) scheme: Scheme,
    host: Host,
    port: u16,
    /// Host and port as a URI usually spells them, without the default port.
    authority: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scheme {
    Https,
    Http,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Host {
    /// In lower case, without a trailing dot.
    Name(String),
    V4(Ipv4Addr),
    V6(Ipv6Addr),
}

impl Origin {
    /// `https://api.selamgpt.com`.
    pub(crate) fn selam() -> Self {
        let authority = SELAM_HOST.to_owned();
        Self { scheme: Scheme::Https, host: Host::Name(authority.clone()), port: 443, authority }
    }

    /// Parses an `https` origin.
    pub(super) fn parse_https(origin: &str) -> Result<Self, ConfigError> {
        let origin = Self::parse(origin)?;
        origin.check(false).map_err(|kind| ConfigError::new(Setting::Origin, Place::Argument, kind))?;
        Ok(origin)
    }

    /// Parses an `http` or `https` origin on the loopback interface.
    pub(super) fn parse_loopback(origin: &str) -> Result<Self, ConfigError> {
        let origin = Self::parse(origin)?;
        match origin.is_loopback() {
            true => Ok(origin),
            false => Err(ConfigError::new(Setting::Origin, Place::Argument, ConfigErrorKind::NotLoopback)),
        }
    }

    /// Parses an origin of either scheme, without path, query or fragment.
    pub(super) fn parse(origin: &str) -> Result<Self, ConfigError> {
        let parse = || {
            let uri = parse_url(origin)?;
            let is_bare = uri.query().is_none() && uri.path() == "/" && !origin.contains('#');
            if is_bare { Self::of_uri(&uri) } else { Err(ConfigErrorKind::UnexpectedPart) }
        };
        parse().map_err(|kind| ConfigError::new(Setting::Origin, Place::Argument, kind))
    }

    /// Returns the origin of an absolute URI.
    pub(crate) fn of_uri(uri: &Uri) -> Result<Self, ConfigErrorKind> {
        let scheme = uri.scheme_str().ok_or(ConfigErrorKind::InvalidUrl)?;
        let scheme = Scheme::parse(scheme).ok_or(ConfigErrorKind::NotHttps)?;
        let authority = uri.authority().ok_or(ConfigErrorKind::InvalidUrl)?;
        Self::from_parts(scheme, authority.as_str())
    }

    pub(super) fn from_parts(scheme: Scheme, authority: &str) -> Result<Self, ConfigErrorKind> {
        if authority.contains('@') {
            return Err(ConfigErrorKind::UserInfo);
        }
        let (host, port) = match authority.rfind([':', ']']) {
            Some(at) if authority.as_bytes()[at] == b':' => (&authority[..at], &authority[at + 1..]),
            _ => (authority, ""),
        };
        let host = Host::parse(host).ok_or(ConfigErrorKind::InvalidHost)?;
        let port = match port {
            "" => scheme.default_port(),
            // `u16::from_str` would also accept a sign.
            digits if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                digits.parse().map_err(|_| ConfigErrorKind::InvalidPort)?
            }
            _ => return Err(ConfigErrorKind::InvalidPort),
        };
        let authority = match port == scheme.default_port() {
            true => host.to_string(),
            false => format!("{host}:{port}"),
        };
        Ok(Self { scheme, host, port, authority })
    }

    /// Checks that the origin is https, or plain http to loopback if that is allowed.
    pub(crate) fn check(&self, allow_insecure_loopback: bool) -> Result<(), ConfigErrorKind> {
        match self.scheme {
            Scheme::Https => Ok(()),
            Scheme::Http if !allow_insecure_loopback => Err(ConfigErrorKind::NotHttps),
            Scheme::Http if self.is_loopback() => Ok(()),
            Scheme::Http => Err(ConfigErrorKind::NotLoopback),
        }
    }

    /// Whether `uri` spells this origin in its canonical form. If not, it may still be the same origin.
    pub(super) fn matches_exactly(&self, uri: &Uri) -> bool {
        uri.scheme_str() == Some(self.scheme.as_str())
            && uri.authority().is_some_and(|authority| authority.as_str() == self.authority)
    }

    /// Whether a `Host` header names this origin. The header has no scheme, so the origin's own is assumed.
    pub(super) fn matches_host(&self, host: &str) -> bool {
        self.authority == host || Self::from_parts(self.scheme, host).is_ok_and(|origin| origin == *self)
    }

    fn is_loopback(&self) -> bool {
        match &self.host {
            Host::Name(name) => name == "localhost",
            Host::V4(address) => address.is_loopback(),
            Host::V6(address) => address.is_loopback(),
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme.as_str(), self.authority)
    }
}

impl Scheme {
    pub(super) fn parse(scheme: &str) -> Option<Self> {
        let is = |name: &str| scheme.eq_ignore_ascii_case(name);
        match () {
            () if is("https") || is("wss") => Some(Self::Https),
            () if is("http") || is("ws") => Some(Self::Http),
            () => None,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Https => "https",
            Self::Http => "http",
        }
    }

    fn default_port(self) -> u16 {
        match self {
            Self::Https => 443,
            Self::Http => 80,
        }
    }
}

impl Host {
    fn parse(host: &str) -> Option<Self> {
        if let Some(inner) = host.strip_prefix('[') {
            return inner.strip_suffix(']')?.parse().ok().map(Self::V6);
        }
        if let Ok(address) = host.parse() {
            return Some(Self::V4(address));
        }
        let name = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
        let is_valid = |label: &str| {
            !label.is_empty()
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
        };
        // Some resolvers read `127.1` and `0x7f.1` as addresses, so they are not accepted as names.
        let last = name.rsplit('.').next()?;
        let is_numeric = last.bytes().all(|byte| byte.is_ascii_digit()) || last.starts_with("0x");
        (name.split('.').all(is_valid) && !is_numeric).then_some(Self::Name(name))
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::V4(address) => address.fmt(f),
            Self::V6(address) => write!(f, "[{address}]"),
        }
    }
}

/// Parses an absolute URL from configuration, trimming surrounding white space.
pub(crate) fn parse_url(url: &str) -> Result<Uri, ConfigErrorKind> {
    let url = url.trim();
    if url.is_empty() {
        return Err(ConfigErrorKind::Empty);
    }
    if let Some(at) = url.bytes().position(|byte| !byte.is_ascii()) {
        return Err(ConfigErrorKind::NonAscii { at });
    }
    let uri: Uri = url.parse().map_err(|_| ConfigErrorKind::InvalidUrl)?;
    match uri.scheme().is_some() && uri.authority().is_some() {
        true => Ok(uri),
        false => Err(ConfigErrorKind::InvalidUrl),
    }
}
