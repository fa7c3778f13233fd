//! Who may receive a credential.

mod base_url;

pub use self::base_url::BaseUrl;
use std::{
    borrow::Cow,
    fmt, iter,
    net::{Ipv4Addr, Ipv6Addr},
};

use http::{HeaderMap, HeaderValue, Uri, header::HOST};

use crate::error::{AuthError, AuthErrorKind, ConfigError, ConfigErrorKind, Place, Subject};

const SELAM: &str = "https://api.selamgpt.com";

/// The origins that credentials may go to: exact scheme, host and port.
///
/// Every layer has one, `https://api.selamgpt.com` by default. A request to any other origin is refused
/// before anything is sent, or, with [`strip_for_other_origins`](Self::strip_for_other_origins), goes on without credentials. So is one
/// whose `Host` header names another origin.
///
/// Hosts are compared as RFC 3986 has it: in any case, with or without the default port or a trailing dot,
/// addresses by value. `wss` counts as `https` and `ws` as `http`. Names in other scripts are given in
/// their ASCII form (`xn--…`), which is also how they arrive in a [`Uri`].
///
/// ```
/// use tower_selam::Origins;
///
/// let origins = Origins::selam().with_origin("https://gateway.example:8443")?;
/// assert!(origins.allows(&"https://API.selamgpt.com.:443/v1/models".parse().unwrap()));
/// assert!(!origins.allows(&"http://api.selamgpt.com/v1/models".parse().unwrap()));
/// assert!(!origins.allows(&"https://api.selamgpt.com@evil.com/".parse().unwrap()));
///
/// assert!(Origins::new("http://api.selamgpt.com").is_err());
/// assert!(origins.clone().allow_insecure_loopback("http://127.0.0.1:8080").is_ok());
/// assert!(origins.allow_insecure_loopback("http://localhost.evil.com:8080").is_err());
/// # Ok::<(), tower_selam::ConfigError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origins {
    /// Usually the only one.
    first: Origin,
    others: Vec<Origin>,
    strip_for_other_origins: bool,
    relative: bool,
}

/// What may be done with a request to some origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    /// Credentials may be written.
    Write,
    /// The request may go on, but with no credential.
    Scrub,
}

impl Origins {
    /// Only `https://api.selamgpt.com`, the default.
    #[must_use]
    pub fn selam() -> Self {
        Self::of(Origin::selam())
    }

    /// Only this `https` origin.
    ///
    /// # Errors
    ///
    /// When it is not `https://host` or `https://host:port`.
    pub fn new(origin: &str) -> Result<Self, ConfigError> {
        Origin::secure(origin).map(Self::of)
    }

    /// Also this `https` origin.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn with_origin(mut self, origin: &str) -> Result<Self, ConfigError> {
        self.others.push(Origin::secure(origin)?);
        Ok(self)
    }

    /// Also this plain `http` origin on the loopback interface, for tests and local gateways.
    ///
    /// # Errors
    ///
    /// When the host is neither a literal loopback address (`127.0.0.0/8`, `[::1]`) nor exactly `localhost`.
    pub fn allow_insecure_loopback(mut self, origin: &str) -> Result<Self, ConfigError> {
        self.others.push(Origin::loopback(origin)?);
        Ok(self)
    }

    /// Lets requests to other origins go on without credentials, where the default is to refuse them.
    ///
    /// For use under a layer that follows redirects. `Authorization` and `X-API-Key` are taken off such a
    /// request whoever wrote them, and so are our credentials in its query or `Referer`.
    #[must_use]
    pub fn strip_for_other_origins(mut self) -> Self {
        self.strip_for_other_origins = true;
        self
    }

    /// States the origin that the service within sends requests without one to.
    ///
    /// A URI that is a path only says nothing of where it goes, so it is refused by default. Clients that
    /// are bound to one server (tonic's `Channel`, hyper's `SendRequest`) take such URIs.
    ///
    /// # Errors
    ///
    /// When `origin` is not one of the allowed ones, or no origin at all.
    pub fn with_relative_uri_origin(mut self, origin: &str) -> Result<Self, ConfigError> {
        let stated = Origin::parse(origin)?;
        if !self.contains(&stated) {
            return Err(ConfigError::new(Subject::Origin, Place::Argument, ConfigErrorKind::NotAllowed));
        }
        self.relative = true;
        Ok(self)
    }

    /// Whether credentials may go to `uri`.
    #[must_use]
    pub fn allows(&self, uri: &Uri) -> bool {
        matches!(self.admit(uri, &HeaderMap::new()), Ok(Admission::Write))
    }

    pub(crate) fn contains(&self, origin: &Origin) -> bool {
        self.allowed().any(|allowed| allowed == origin)
    }

    fn allowed(&self) -> impl Iterator<Item = &Origin> {
        iter::once(&self.first).chain(&self.others)
    }

    pub(crate) fn of(origin: Origin) -> Self {
        Self { first: origin, others: Vec::new(), strip_for_other_origins: false, relative: false }
    }

    /// What a request to `uri` with these headers may have.
    pub(crate) fn admit(&self, uri: &Uri, headers: &HeaderMap) -> Result<Admission, AuthError> {
        let admission = self.admit_uri(uri)?;
        if headers.contains_key(HOST) && admission == Admission::Write {
            return self.admit_host(headers);
        }
        Ok(admission)
    }

    /// A shared front end sends the request where `Host` says, so it has to name an allowed origin too.
    fn admit_host(&self, headers: &HeaderMap) -> Result<Admission, AuthError> {
        let named = |host: &HeaderValue| {
            let host = host.to_str().unwrap_or_default();
            self.allowed().any(|origin| {
                origin.authority == host
                    || Origin::from_parts(origin.scheme, host).is_ok_and(|named| named == *origin)
            })
        };
        match headers.get_all(HOST).iter().all(named) {
            true => Ok(Admission::Write),
            false if self.strip_for_other_origins => Ok(Admission::Scrub),
            false => Err(refused("the `Host` header does not name an allowed origin")),
        }
    }

    /// Whether `uri` is spelled just as an allowed origin usually is. One that is not may be allowed too.
    #[inline]
    pub(crate) fn spell(&self, uri: &Uri) -> bool {
        self.first.is_spelled(uri) || self.is_other_spelled(uri)
    }

    #[inline(never)]
    fn is_other_spelled(&self, uri: &Uri) -> bool {
        self.others.iter().any(|origin| origin.is_spelled(uri))
    }

    fn admit_uri(&self, uri: &Uri) -> Result<Admission, AuthError> {
        let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
            return self.admit_relative(uri);
        };
        if self.spell(uri) {
            return Ok(Admission::Write);
        }
        self.admit_other(scheme, authority.as_str())
    }

    fn admit_relative(&self, uri: &Uri) -> Result<Admission, AuthError> {
        // `host:port` alone, as CONNECT has it, names another place than the stated one.
        if self.relative && uri.authority().is_none() {
            return Ok(Admission::Write);
        }
        Err(refused(
            "the URI has no scheme and host; give it whole, or state the origin with \
             `Origins::with_relative_uri_origin`",
        ))
    }

    #[cold]
    fn admit_other(&self, scheme: &str, authority: &str) -> Result<Admission, AuthError> {
        let origin = Scheme::parse(scheme).and_then(|scheme| Origin::from_parts(scheme, authority).ok());
        match origin {
            Some(origin) if self.contains(&origin) => Ok(Admission::Write),
            _ if self.strip_for_other_origins => Ok(Admission::Scrub),
            Some(origin) if origin.scheme == Scheme::Http => {
                Err(refused(format!("credentials are not sent over plain http, as to {origin}")))
            }
            Some(origin) => Err(refused(format!("credentials are not sent to {origin}"))),
            None => Err(refused("the URI's scheme, host or port is not one that credentials are sent to")),
        }
    }
}

impl Default for Origins {
    fn default() -> Self {
        Self::selam()
    }
}

#[cold]
fn refused(detail: impl Into<Cow<'static, str>>) -> AuthError {
    AuthError::local(AuthErrorKind::OriginNotAllowed, detail)
}

/// One origin in canonical form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Origin {
    scheme: Scheme,
    host: Host,
    port: u16,
    /// How a URI usually spells host and port.
    authority: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scheme {
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
    pub(crate) fn selam() -> Self {
        let authority = SELAM.trim_start_matches("https://").to_owned();
        Self { scheme: Scheme::Https, host: Host::Name(authority.clone()), port: 443, authority }
    }

    fn secure(origin: &str) -> Result<Self, ConfigError> {
        let origin = Self::parse(origin)?;
        origin.check(false).map_err(|kind| ConfigError::new(Subject::Origin, Place::Argument, kind))?;
        Ok(origin)
    }

    fn loopback(origin: &str) -> Result<Self, ConfigError> {
        let origin = Self::parse(origin)?;
        match origin.is_loopback() {
            true => Ok(origin),
            false => Err(ConfigError::new(Subject::Origin, Place::Argument, ConfigErrorKind::NotLoopback)),
        }
    }

    fn parse(origin: &str) -> Result<Self, ConfigError> {
        let parse = || {
            let uri = parse_url(origin)?;
            let bare = uri.query().is_none() && uri.path() == "/" && !origin.contains('#');
            if bare { Self::of_uri(&uri) } else { Err(ConfigErrorKind::Excess) }
        };
        parse().map_err(|kind| ConfigError::new(Subject::Origin, Place::Argument, kind))
    }

    /// The origin of an absolute URI.
    pub(crate) fn of_uri(uri: &Uri) -> Result<Self, ConfigErrorKind> {
        let scheme = uri.scheme_str().ok_or(ConfigErrorKind::InvalidUrl)?;
        let scheme = Scheme::parse(scheme).ok_or(ConfigErrorKind::NotHttps)?;
        let authority = uri.authority().ok_or(ConfigErrorKind::InvalidUrl)?;
        Self::from_parts(scheme, authority.as_str())
    }

    /// Whether credentials may go there at all: https, or plain http to loopback where that is allowed.
    pub(crate) fn check(&self, allow_insecure_loopback: bool) -> Result<(), ConfigErrorKind> {
        match self.scheme {
            Scheme::Https => Ok(()),
            Scheme::Http if !allow_insecure_loopback => Err(ConfigErrorKind::NotHttps),
            Scheme::Http if self.is_loopback() => Ok(()),
            Scheme::Http => Err(ConfigErrorKind::NotLoopback),
        }
    }

    /// Whether this is how `uri` spells it.
    #[inline]
    fn is_spelled(&self, uri: &Uri) -> bool {
        let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else { return false };
        self.scheme.is(scheme) && is_same(self.authority.as_bytes(), authority.as_str().as_bytes())
    }

    fn is_loopback(&self) -> bool {
        match &self.host {
            Host::Name(name) => name == "localhost",
            Host::V4(address) => address.is_loopback(),
            Host::V6(address) => address.is_loopback(),
        }
    }

    fn from_parts(scheme: Scheme, authority: &str) -> Result<Self, ConfigErrorKind> {
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
            // `u16` would also take a sign.
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
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme.as_str(), self.authority)
    }
}

impl Scheme {
    fn parse(scheme: &str) -> Option<Self> {
        let is = |name: &str| scheme.eq_ignore_ascii_case(name);
        match () {
            () if is("https") || is("wss") => Some(Self::Https),
            () if is("http") || is("ws") => Some(Self::Http),
            () => None,
        }
    }

    #[inline]
    fn as_str(self) -> &'static str {
        match self {
            Self::Https => "https",
            Self::Http => "http",
        }
    }

    /// Whether it is spelled just so. What is compared is of a length that the compiler knows: no call is made.
    #[inline]
    fn is(self, scheme: &str) -> bool {
        match self {
            Self::Https => scheme == "https",
            Self::Http => scheme == "http",
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
        let valid = |label: &str| {
            !label.is_empty()
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
        };
        // `127.1` and `0x7f.1` are addresses to some resolvers and names to none.
        let last = name.rsplit('.').next()?;
        let numeric = last.bytes().all(|byte| byte.is_ascii_digit()) || last.starts_with("0x");
        (name.split('.').all(valid) && !numeric).then_some(Self::Name(name))
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

/// Whether they are equal. It makes no call for those of 16 to 32 bytes, as most hosts are.
#[inline]
fn is_same(one: &[u8], other: &[u8]) -> bool {
    if one.len() != other.len() {
        return false;
    }
    let ends = |text: &[u8]| Some((*text.first_chunk::<16>()?, *text.last_chunk::<16>()?));
    match (ends(one), ends(other)) {
        (Some(one_ends), Some(other_ends)) if one.len() <= 32 => one_ends == other_ends,
        _ => is_same_text(one, other),
    }
}

// A call out of line, which leaves the registers to the rest.
#[inline(never)]
fn is_same_text(one: &[u8], other: &[u8]) -> bool {
    one == other
}

/// A URL as people give it, surrounding white space aside.
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

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn uri(text: &str) -> Uri {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    fn kind(origin: &str) -> ConfigErrorKind {
        Origins::new(origin).unwrap_err().kind()
    }

    proptest! {
        #[test]
        fn o2_hosts_of_every_length_are_compared_to_the_last_byte(
            host in vec(any::<u8>(), 0..40), other in vec(any::<u8>(), 0..40), at in 0..40_usize, bits in 1..=u8::MAX,
        ) {
            prop_assert!(is_same(&host, &host.clone()));
            prop_assert_eq!(is_same(&host, &other), host == other);
            let mut changed = host.clone();
            if let Some(byte) = changed.get_mut(at) {
                *byte ^= bits;
                prop_assert!(!is_same(&host, &changed) && !is_same(&changed, &host));
            }
            prop_assert!(!is_same(&host, &[&host[..], &[0]].concat()));
        }
    }

    #[test]
    fn o2_equal_origins_are_allowed_in_every_spelling() {
        let origins = Origins::selam()
            .with_origin("https://[::1]:8443")
            .and_then(|origins| origins.with_origin("https://10.0.0.1"))
            .and_then(|origins| origins.with_origin("https://XN--bcher-KVA.example"))
            .unwrap();
        for same in [
            "https://api.selamgpt.com",
            "https://api.selamgpt.com/v1/models?x=http://evil.com",
            "https://API.SelamGPT.com/",
            "HTTPS://api.selamgpt.com/",
            "https://api.selamgpt.com:443/",
            "https://api.selamgpt.com:0443/",
            "https://api.selamgpt.com:/",
            "https://api.selamgpt.com./",
            "wss://api.selamgpt.com/socket.io/",
            "https://[::1]:8443/",
            "https://[0:0:0:0:0:0:0:1]:8443/",
            "https://10.0.0.1/",
            "https://xn--bcher-kva.example/",
        ] {
            assert!(origins.allows(&uri(same)), "{same}");
        }
    }

    #[test]
    fn o2_other_origins_are_not() {
        let origins = Origins::selam();
        for other in [
            "http://api.selamgpt.com/",
            "ws://api.selamgpt.com/",
            "ftp://api.selamgpt.com/",
            "https://api.selamgpt.com:8443/",
            "https://api.selamgpt.com:80/",
            "https://api.selamgpt.com:65979/",
            "https://selamgpt.com/",
            "https://evil.api.selamgpt.com/",
            "https://api.selamgpt.com.evil.com/",
            "https://api.selamgpt.comevil.com/",
            "https://xapi.selamgpt.com/",
            "https://api.selamgpt.com../",
            "https://.api.selamgpt.com/",
            "https://api-selamgpt.com/",
            "https://evil.com/api.selamgpt.com",
            "https://evil.com/?https://api.selamgpt.com/",
        ] {
            assert!(!origins.allows(&uri(other)), "{other}");
        }
    }

    #[test]
    fn o1_user_info_is_never_allowed() {
        let origins = Origins::selam();
        for trick in [
            "https://api.selamgpt.com@evil.com/",
            "https://api.selamgpt.com:443@evil.com/",
            "https://user:password@api.selamgpt.com/",
            "https://@api.selamgpt.com/",
        ] {
            assert!(!trick.parse().is_ok_and(|uri| origins.allows(&uri)), "{trick}");
        }
        assert_eq!(kind("https://user@api.selamgpt.com"), ConfigErrorKind::UserInfo);
    }

    #[test]
    fn o1_plain_http_is_for_loopback_and_only_where_asked_for() {
        assert_eq!(kind("http://127.0.0.1:8080"), ConfigErrorKind::NotHttps);
        for loopback in ["http://127.0.0.1:1", "http://127.8.9.1", "http://[::1]:1", "http://LOCALHOST:1"] {
            let origins = Origins::selam().allow_insecure_loopback(loopback).unwrap();
            assert!(origins.allows(&uri(loopback)), "{loopback}");
            assert!(!origins.allows(&uri("http://127.0.0.1:2")), "another port");
            assert!(!origins.allows(&uri("http://api.selamgpt.com")));
            assert!(Origins::new(loopback).is_err(), "not by itself");
        }
        for not_loopback in [
            "http://localhost.evil.com",
            "http://127.0.0.1.evil.com",
            "http://notlocalhost",
            "http://0.0.0.0",
            "http://[::]",
            "http://[::ffff:127.0.0.1]",
            "http://10.0.0.1",
            "http://api.selamgpt.com",
        ] {
            let error = Origins::selam().allow_insecure_loopback(not_loopback).unwrap_err();
            assert_eq!(error.kind(), ConfigErrorKind::NotLoopback, "{not_loopback}");
        }
        for odd in ["http://127.1", "http://0x7f.0.0.1", "http://2130706433", "http://127.0.0.0x1"] {
            assert_eq!(
                Origins::selam().allow_insecure_loopback(odd).unwrap_err().kind(),
                ConfigErrorKind::InvalidHost,
                "{odd}"
            );
        }
    }

    #[test]
    fn o3_a_uri_without_an_origin_is_refused_until_one_is_stated() {
        let origins = Origins::selam();
        assert!(!origins.allows(&uri("/v1/models")));
        assert!(!origins.clone().strip_for_other_origins().allows(&uri("/v1/models")));
        assert!(origins.clone().strip_for_other_origins().admit_uri(&uri("/v1/models")).is_err());

        let stated = origins.clone().with_relative_uri_origin("https://api.selamgpt.com:443/").unwrap();
        assert!(stated.allows(&uri("/v1/models")));
        assert!(stated.allows(&uri("*")));
        assert!(!stated.allows(&uri("evil.com:443")), "the form that CONNECT takes");
        assert!(!stated.allows(&uri("https://evil.com/")));

        let error = origins.with_relative_uri_origin("https://evil.com").unwrap_err();
        assert_eq!(error.kind(), ConfigErrorKind::NotAllowed);
    }

    #[test]
    fn a_bad_origin_is_refused_by_kind_and_without_the_value() {
        use ConfigErrorKind as Kind;
        for (origin, expected) in [
            ("", Kind::Empty),
            ("api.selamgpt.com", Kind::InvalidUrl),
            ("/v1", Kind::InvalidUrl),
            ("https://", Kind::InvalidUrl),
            ("https:// spaced", Kind::InvalidUrl),
            ("https://b\u{fc}cher.example", Kind::NonAscii { at: 9 }),
            ("ftp://secret.example", Kind::NotHttps),
            ("https://secret.example/v1", Kind::Excess),
            ("https://secret.example?secret", Kind::Excess),
            ("https://secret.example#secret", Kind::Excess),
            ("https://secret.example:99999", Kind::InvalidPort),
            ("https://[::1", Kind::InvalidUrl),
            ("https://*.secret.example", Kind::InvalidHost),
        ] {
            let error = Origins::new(origin).unwrap_err();
            assert_eq!(error.kind(), expected, "{origin}");
            assert!(!format!("{error} {error:?}").contains("secret"));
        }
    }

    proptest! {
        #[test]
        fn o2_only_the_origin_itself_is_allowed(
            scheme in "https?|wss?|ftp",
            userinfo in "(api\\.selamgpt\\.com@)?",
            host in "(evil\\.)?[aA]pi\\.selamgpt\\.com(\\.evil\\.com)?\\.?",
            port in "(:(443|80|8443|65979|))?",
        ) {
            let text = format!("{scheme}://{userinfo}{host}{port}/v1");
            if let Ok(uri) = text.parse::<Uri>() {
                let same = (scheme == "https" || scheme == "wss")
                    && userinfo.is_empty()
                    && host.to_ascii_lowercase().trim_end_matches('.') == "api.selamgpt.com"
                    && matches!(&*port, "" | ":" | ":443");
                prop_assert_eq!(Origins::selam().allows(&uri), same, "{}", text);
            }
        }

        #[test]
        fn no_text_makes_it_panic(text in "(https?://)?[\\[\\]:@.0-9a-z%#?/-]{0,30}|\\PC{0,20}") {
            let _ = Origins::new(&text);
            if let Ok(uri) = text.parse() {
                let _ = Origins::selam().allows(&uri);
            }
        }
    }
}
