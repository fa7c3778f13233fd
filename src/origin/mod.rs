//! Which origins may receive credentials ([`Origins`]) and where the API is ([`BaseUrl`]).

mod base_url;
mod canonical;

use std::borrow::Cow;

use http::{HeaderMap, HeaderValue, Uri, header::HOST};

pub use self::base_url::BaseUrl;
pub(crate) use self::canonical::{Origin, parse_url};
use crate::error::{AuthError, AuthErrorKind, ConfigError, ConfigErrorKind};

/// The origins that credentials may be sent to: exact scheme, host and port.
///
/// Every layer has an allow-list, which by default holds `https://api.selamgpt.com` alone. A request to any other
/// origin is refused before anything is sent, or forwarded without credentials if
/// [`strip_for_other_origins`](Self::strip_for_other_origins) is set. The same applies to a request whose `Host`
/// header names another origin.
///
/// Hosts are compared according to RFC 3986: case, a default port and a trailing dot make no difference, and IP
/// addresses are compared by value. `wss` counts as `https`, and `ws` as `http`. Internationalized names must be given
/// in their ASCII form (`xn--…`), which is also the form they have in a [`Uri`].
///
/// ```
/// use tower_selam::Origins;
///
/// let origins = Origins::selam().with_origin("https://gateway.example:8443")?;
/// assert!(origins.allows(&"https://API.selamgpt.com.:443/v1/chat/completions".parse().unwrap()));
/// assert!(!origins.allows(&"http://api.selamgpt.com/v1/chat/completions".parse().unwrap()));
/// assert!(!origins.allows(&"https://api.selamgpt.com@evil.com/".parse().unwrap()));
///
/// assert!(Origins::new("http://api.selamgpt.com").is_err());
/// assert!(origins.clone().allow_insecure_loopback("http://127.0.0.1:8080").is_ok());
/// assert!(origins.allow_insecure_loopback("http://localhost.evil.com:8080").is_err());
/// # Ok::<(), tower_selam::ConfigError>(())
/// ```
#[doc(alias("allowlist", "whitelist"))]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origins {
    allowed: Vec<Origin>,
    strip_for_other_origins: bool,
    allow_relative_uris: bool,
}

/// What a request may carry, given its origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    /// Credentials may be written.
    Write,
    /// The request may be sent, but without credentials.
    Strip,
}

impl Origins {
    /// Allows only `https://api.selamgpt.com`, the default.
    #[must_use]
    pub fn selam() -> Self {
        Self::of(Origin::selam())
    }

    /// Allows only this `https` origin.
    ///
    /// # Errors
    ///
    /// If `origin` is not of the form `https://host` or `https://host:port`.
    pub fn new(origin: &str) -> Result<Self, ConfigError> {
        Origin::parse(origin, |origin| origin.check(false)).map(Self::of)
    }

    pub(crate) fn of(origin: Origin) -> Self {
        Self { allowed: vec![origin], strip_for_other_origins: false, allow_relative_uris: false }
    }

    /// Also allows this `https` origin.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new).
    pub fn with_origin(mut self, origin: &str) -> Result<Self, ConfigError> {
        self.allowed.push(Origin::parse(origin, |origin| origin.check(false))?);
        Ok(self)
    }

    /// Also allows this plain `http` origin on the loopback interface, for tests and local gateways.
    ///
    /// # Errors
    ///
    /// If the host is neither a literal loopback address (`127.0.0.0/8`, `[::1]`) nor exactly `localhost`.
    pub fn allow_insecure_loopback(mut self, origin: &str) -> Result<Self, ConfigError> {
        self.allowed.push(Origin::parse(origin, Origin::check_loopback)?);
        Ok(self)
    }

    /// Forwards requests to other origins without credentials, instead of refusing them.
    ///
    /// For use under a layer that follows redirects. Such a request loses the headers that the layer owns, regardless of who
    /// set them, and any of the layer's credentials in its query or `Referer`.
    #[must_use]
    pub fn strip_for_other_origins(mut self) -> Self {
        self.strip_for_other_origins = true;
        self
    }

    /// Accepts URIs without scheme and host, and states the origin that the inner service sends them to.
    ///
    /// A URI that is only a path does not say where the request goes, so it is refused by default. Clients that are
    /// bound to one server (tonic's `Channel`, hyper's `SendRequest`) take such URIs.
    ///
    /// # Errors
    ///
    /// If `origin` is not an allowed origin.
    pub fn with_relative_uri_origin(mut self, origin: &str) -> Result<Self, ConfigError> {
        Origin::parse(origin, |origin| match self.contains(origin) {
            true => Ok(()),
            false => Err(ConfigErrorKind::NotAllowed),
        })?;
        self.allow_relative_uris = true;
        Ok(self)
    }

    /// Returns whether credentials may be sent to `uri`.
    #[must_use]
    pub fn allows(&self, uri: &Uri) -> bool {
        matches!(self.admit_uri(uri), Ok(Admission::Write))
    }

    /// Whether `origin` is on the allow-list.
    pub(crate) fn contains(&self, origin: &Origin) -> bool {
        self.allowed.contains(origin)
    }

    /// Whether `uri` spells an allowed origin in its canonical form, which is the fast path. If not, it may still be
    /// allowed: [`admit`](Self::admit) decides.
    #[inline]
    pub(crate) fn matches_exactly(&self, uri: &Uri) -> bool {
        self.allowed.iter().any(|origin| origin.matches_exactly(uri))
    }

    /// Decides what a request to `uri` with these headers may carry.
    #[inline]
    pub(crate) fn admit(&self, uri: &Uri, headers: &HeaderMap) -> Result<Admission, AuthError> {
        let admission = self.admit_uri(uri)?;
        // A request has few headers: comparing their names takes less time than a look-up.
        if headers.keys().any(|name| *name == HOST) && admission == Admission::Write {
            return self.admit_host(headers);
        }
        Ok(admission)
    }

    /// Checks the `Host` header too, because a shared front end routes by it.
    #[cold]
    fn admit_host(&self, headers: &HeaderMap) -> Result<Admission, AuthError> {
        let is_allowed = |host: &HeaderValue| {
            let host = host.to_str().unwrap_or_default();
            self.allowed.iter().any(|origin| origin.matches_host(host))
        };
        match headers.get_all(HOST).iter().all(is_allowed) {
            true => Ok(Admission::Write),
            false if self.strip_for_other_origins => Ok(Admission::Strip),
            false => Err(not_allowed("the `Host` header does not name an allowed origin")),
        }
    }

    #[inline]
    fn admit_uri(&self, uri: &Uri) -> Result<Admission, AuthError> {
        if self.matches_exactly(uri) {
            return Ok(Admission::Write);
        }
        match (uri.scheme_str(), uri.authority()) {
            (Some(scheme), Some(authority)) => self.admit_other(scheme, authority.as_str()),
            _ => self.admit_relative(uri),
        }
    }

    fn admit_relative(&self, uri: &Uri) -> Result<Admission, AuthError> {
        // `host:port` without a scheme, CONNECT's form, names a destination other than the stated origin.
        if self.allow_relative_uris && uri.authority().is_none() {
            return Ok(Admission::Write);
        }
        Err(not_allowed(
            "the URI has no scheme and host; use an absolute URI, or state the origin with \
             `Origins::with_relative_uri_origin`",
        ))
    }

    #[cold]
    fn admit_other(&self, scheme: &str, authority: &str) -> Result<Admission, AuthError> {
        match Origin::from_parts(scheme, authority) {
            Ok(origin) if self.contains(&origin) => Ok(Admission::Write),
            _ if self.strip_for_other_origins => Ok(Admission::Strip),
            Ok(origin) if !origin.is_https => {
                Err(not_allowed(format!("credentials are not sent over plain http: {origin}")))
            }
            Ok(origin) => Err(not_allowed(format!("credentials are not sent to {origin}"))),
            Err(_) => Err(not_allowed(
                "the URI has an unsupported scheme, user information, or an invalid host or port",
            )),
        }
    }
}

impl Default for Origins {
    fn default() -> Self {
        Self::selam()
    }
}

#[cold]
fn not_allowed(detail: impl Into<Cow<'static, str>>) -> AuthError {
    AuthError::local(AuthErrorKind::OriginNotAllowed, detail)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn uri(text: &str) -> Uri {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    fn kind(origin: &str) -> ConfigErrorKind {
        Origins::new(origin).unwrap_err().kind().clone()
    }

    /// O2: equivalent spellings are the same origin.
    #[test]
    fn equivalent_spellings_are_allowed() {
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

    /// O2: similar origins are not the same origin.
    #[test]
    fn other_origins_are_not_allowed() {
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

    /// O1: user information never passes.
    #[test]
    fn user_information_is_never_allowed() {
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

    /// O1: plain http needs the opt-in, and only reaches loopback.
    #[test]
    fn plain_http_is_for_loopback_only() {
        assert_eq!(kind("http://127.0.0.1:8080"), ConfigErrorKind::NotHttps);
        for loopback in ["http://127.0.0.1:1", "http://127.8.9.1", "http://[::1]:1", "http://LOCALHOST:1"] {
            let origins = Origins::selam().allow_insecure_loopback(loopback).unwrap();
            assert!(origins.allows(&uri(loopback)), "{loopback}");
            assert!(!origins.allows(&uri("http://127.0.0.1:2")), "another port");
            assert!(!origins.allows(&uri("http://api.selamgpt.com")));
            assert!(Origins::new(loopback).is_err(), "not without the opt-in");
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
            assert_eq!(error.kind(), &ConfigErrorKind::NotLoopback, "{not_loopback}");
        }
        for numeric in ["http://127.1", "http://0x7f.0.0.1", "http://2130706433", "http://127.0.0.0x1"] {
            assert_eq!(
                Origins::selam().allow_insecure_loopback(numeric).unwrap_err().kind(),
                &ConfigErrorKind::InvalidHost,
                "{numeric}"
            );
        }
    }

    /// O3: a relative URI is refused unless its origin is stated.
    #[test]
    fn relative_uris_need_a_stated_origin() {
        let origins = Origins::selam();
        assert!(!origins.allows(&uri("/v1/models")));
        assert!(!origins.clone().strip_for_other_origins().allows(&uri("/v1/models")));
        assert!(origins.clone().strip_for_other_origins().admit_uri(&uri("/v1/models")).is_err());

        let stated = origins.clone().with_relative_uri_origin("https://api.selamgpt.com:443/").unwrap();
        assert!(stated.allows(&uri("/v1/models")));
        assert!(stated.allows(&uri("*")));
        assert!(!stated.allows(&uri("evil.com:443")), "CONNECT's form");
        assert!(!stated.allows(&uri("https://evil.com/")));

        let error = origins.with_relative_uri_origin("https://evil.com").unwrap_err();
        assert_eq!(error.kind(), &ConfigErrorKind::NotAllowed);
    }

    #[test]
    fn invalid_origins_are_rejected_without_their_value() {
        use ConfigErrorKind as Kind;
        for (origin, expected) in [
            ("", Kind::Empty),
            ("api.selamgpt.com", Kind::InvalidUrl),
            ("/v1", Kind::InvalidUrl),
            ("https://", Kind::InvalidUrl),
            ("https:// spaced", Kind::InvalidUrl),
            ("https://b\u{fc}cher.example", Kind::NonAscii { at: 9 }),
            ("ftp://secret.example", Kind::NotHttps),
            ("https://secret.example/v1", Kind::UnexpectedPart),
            ("https://secret.example?secret", Kind::UnexpectedPart),
            ("https://secret.example#secret", Kind::UnexpectedPart),
            ("https://secret.example:99999", Kind::InvalidPort),
            ("https://[::1", Kind::InvalidUrl),
            ("https://*.secret.example", Kind::InvalidHost),
        ] {
            let error = Origins::new(origin).unwrap_err();
            assert_eq!(error.kind(), &expected, "{origin}");
            assert!(!format!("{error} {error:?}").contains("secret"));
        }
    }

    proptest! {
        /// O2: of all variations, only the origin itself is allowed.
        #[test]
        fn only_the_same_origin_is_allowed(
            scheme in "https?|wss?|ftp",
            userinfo in "(api\\.selamgpt\\.com@)?",
            host in "(evil\\.)?[aA]pi\\.selamgpt\\.com(\\.evil\\.com)?\\.?",
            port in "(:(443|80|8443|65979|))?",
        ) {
            let text = format!("{scheme}://{userinfo}{host}{port}/v1");
            if let Ok(uri) = text.parse::<Uri>() {
                let is_same = (scheme == "https" || scheme == "wss")
                    && userinfo.is_empty()
                    && host.to_ascii_lowercase().trim_end_matches('.') == "api.selamgpt.com"
                    && matches!(&*port, "" | ":" | ":443");
                prop_assert_eq!(Origins::selam().allows(&uri), is_same, "{}", text);
            }
        }

        /// O2: hosts of every length are compared to the last byte.
        #[test]
        fn hosts_are_compared_to_the_last_byte(
            host in "[a-z]{1,40}", at in 0..40_usize, other in "[a-z]", extra in "[a-z]",
        ) {
            let origins = Origins::new(&format!("https://{host}")).unwrap();
            let is_allowed = |host: &str| origins.allows(&uri(&format!("https://{host}/")));
            let at = at % host.len();
            let changed = format!("{}{other}{}", &host[..at], &host[at + 1..]);
            prop_assert!(is_allowed(&host));
            prop_assert_eq!(is_allowed(&changed), changed == host);
            let longer = format!("{host}{extra}");
            prop_assert!(!is_allowed(&longer));
        }

        #[test]
        fn parsing_never_panics(text in "(https?://)?[\\[\\]:@.0-9a-z%#?/-]{0,30}|\\PC{0,20}") {
            let _ = Origins::new(&text);
            if let Ok(uri) = text.parse() {
                let _ = Origins::selam().allows(&uri);
            }
        }
    }
}
