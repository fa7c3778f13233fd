//! [`BaseUrl`]: where the API is.

use std::fmt;

use http::Uri;
use percent_encoding::percent_decode_str;

use super::{
    Origins,
    canonical::{Origin, parse_url},
};
use crate::{
    env,
    error::{ConfigError, ConfigErrorKind, Place, Setting},
};

/// The API's address: an `https` URL with the path that all endpoints share.
///
/// ```
/// use tower_selam::BaseUrl;
///
/// let base = BaseUrl::default();
/// assert_eq!(base.to_string(), "https://api.selamgpt.com/v1");
/// assert_eq!(base.endpoint("chat/completions")?, "https://api.selamgpt.com/v1/chat/completions");
/// # Ok::<(), tower_selam::ConfigError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseUrl {
    origin: Origin,
    /// Without a trailing slash.
    path: String,
}

impl BaseUrl {
    /// The real API: `https://api.selamgpt.com/v1`.
    pub const DEFAULT: &str = "https://api.selamgpt.com/v1";

    /// Parses an `https` URL.
    ///
    /// # Errors
    ///
    /// If `url` is not an absolute `https` URL, or has user information, a query or a fragment. The error never
    /// contains the value.
    pub fn new(url: &str) -> Result<Self, ConfigError> {
        Self::parse(url, Place::Argument, false)
    }

    /// Parses an `https` URL, or a plain `http` URL to a loopback address or `localhost`, for tests.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new), except that `http` to loopback is allowed.
    pub fn allow_insecure_loopback(url: &str) -> Result<Self, ConfigError> {
        Self::parse(url, Place::Argument, true)
    }

    /// Reads [`SELAM_BASE_URL`](env::SELAM_BASE_URL), or returns [`DEFAULT`](Self::DEFAULT) if it is not set.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new); the error names the variable.
    pub fn from_env() -> Result<Self, ConfigError> {
        Self::read_env(false)
    }

    pub(crate) fn read_env(allow_insecure_loopback: bool) -> Result<Self, ConfigError> {
        let place = Place::EnvVar(env::SELAM_BASE_URL.to_owned());
        match env::var(env::SELAM_BASE_URL) {
            Ok(url) => Self::parse(&url, place, allow_insecure_loopback),
            Err(ConfigErrorKind::Missing) => Ok(Self::default()),
            Err(kind) => Err(ConfigError::new(Setting::BaseUrl, place, kind)),
        }
    }

    fn parse(url: &str, place: Place, allow_insecure_loopback: bool) -> Result<Self, ConfigError> {
        let parse = || {
            let (uri, origin) = parse_url(url)?;
            origin.check(allow_insecure_loopback)?;
            match uri.query() {
                None => Ok(Self { origin, path: uri.path().trim_end_matches('/').to_owned() }),
                Some(_) => Err(ConfigErrorKind::UnexpectedPart),
            }
        };
        parse().map_err(|kind| ConfigError::new(Setting::BaseUrl, place, kind))
    }

    /// Returns the URI of an endpoint: the base URL followed by `path`, which may have a query. A leading slash makes no
    /// difference.
    ///
    /// The URI stays below the base URL, also if a part of `path` comes from a caller. Percent-encode such a part all the same:
    /// a `?` in it would begin a query.
    ///
    /// ```
    /// use tower_selam::{BaseUrl, ConfigErrorKind};
    ///
    /// let base = BaseUrl::default();
    /// assert_eq!(base.endpoint("models?limit=2")?, "https://api.selamgpt.com/v1/models?limit=2");
    ///
    /// for path in ["../admin", "audio/%2e%2e/x", "https://api.selamgpt.com/v1/audio", "audio#a"] {
    ///     assert_eq!(*base.endpoint(path).unwrap_err().kind(), ConfigErrorKind::InvalidEndpoint);
    /// }
    /// # Ok::<(), tower_selam::ConfigError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// If `path` is an absolute URL or starts with `//`; if it has a fragment, a backslash, a segment `.` or `..`, also
    /// percent-encoded ([RFC 3986 section 5.2.4](https://www.rfc-editor.org/rfc/rfc3986#section-5.2.4)); or characters that a
    /// URI cannot have. The error never contains the path.
    pub fn endpoint(&self, path: &str) -> Result<Uri, ConfigError> {
        let below = path.strip_prefix('/').unwrap_or(path);
        let is_refused = leads_elsewhere(below) || !below.is_ascii();
        let uri = if is_refused { None } else { format!("{self}/{below}").parse().ok() };
        uri.ok_or_else(|| {
            ConfigError::new(Setting::Endpoint, Place::Argument, ConfigErrorKind::InvalidEndpoint)
        })
    }

    pub(crate) fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Returns an allow-list with only this URL's origin.
    #[must_use]
    pub fn origins(&self) -> Origins {
        Origins::of(self.origin.clone())
    }
}

/// Whether some reader of URLs takes `path` for more than a path below the base URL and a query.
fn leads_elsewhere(path_and_query: &str) -> bool {
    let (path, _query) = path_and_query.split_once('?').unwrap_or((path_and_query, ""));
    let decoded = percent_decode_str(path).decode_utf8_lossy();
    path.starts_with('/')
        || path.contains("://")
        || path.contains('\\')
        || path_and_query.contains('#')
        || decoded.split(['/', '\\']).any(|segment| matches!(segment, "." | ".."))
}

impl Default for BaseUrl {
    fn default() -> Self {
        Self { origin: Origin::selam(), path: "/v1".to_owned() }
    }
}

impl fmt::Display for BaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.origin, self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_matches_its_constant() {
        assert_eq!(BaseUrl::default(), BaseUrl::new(BaseUrl::DEFAULT).unwrap());
        assert_eq!(BaseUrl::default().origins(), Origins::selam());
    }

    #[test]
    fn endpoints_stay_below_the_base() {
        let base = BaseUrl::new(" https://GATEWAY.example:443/selam/v1/ \n").unwrap();
        assert_eq!(base.to_string(), "https://gateway.example/selam/v1");
        for (path, expected) in [
            ("chat/completions", "https://gateway.example/selam/v1/chat/completions"),
            ("/files?limit=2", "https://gateway.example/selam/v1/files?limit=2"),
            ("files?next=../a/./b", "https://gateway.example/selam/v1/files?next=../a/./b"),
            ("files?at=https://evil.com", "https://gateway.example/selam/v1/files?at=https://evil.com"),
            ("models/org%2Fmodel", "https://gateway.example/selam/v1/models/org%2Fmodel"),
            ("a..b/...", "https://gateway.example/selam/v1/a..b/..."),
            ("@evil.com", "https://gateway.example/selam/v1/@evil.com"),
            ("evil.com:80", "https://gateway.example/selam/v1/evil.com:80"),
            ("", "https://gateway.example/selam/v1/"),
        ] {
            assert_eq!(base.endpoint(path).unwrap(), expected);
        }
        let bare = BaseUrl::new("https://gateway.example").unwrap();
        assert_eq!(bare.endpoint("@evil.com").unwrap().host(), Some("gateway.example"));
    }

    #[test]
    fn endpoints_elsewhere_are_refused() {
        let base = BaseUrl::default();
        for path in [
            "/../secret",
            "..",
            "a/..",
            "a/./secret",
            "a/%2e%2E/secret",
            "a/.%2e?b",
            "a/..%2fsecret",
            "a%2f..%2fsecret",
            "a/..%5csecret",
            "..\\secret",
            "a\\secret",
            "//secret.example/",
            "///secret",
            "https://secret.example/v1",
            "a#secret",
            "a?b#secret",
            "a secret",
            "secr\u{e9}t",
            "a\nsecret",
        ] {
            let error = base.endpoint(path).unwrap_err();
            assert_eq!(error.kind(), &ConfigErrorKind::InvalidEndpoint, "{path}");
            assert!(!format!("{error} {error:?}").contains("secret"));
        }
    }

    #[test]
    fn invalid_urls_are_rejected_without_their_value() {
        use ConfigErrorKind as Kind;
        for (url, expected) in [
            ("http://secret.example/v1", Kind::NotHttps),
            ("http://127.0.0.1/v1", Kind::NotHttps),
            ("https://secret@api.selamgpt.com/v1", Kind::UserInfo),
            ("https://api.selamgpt.com/v1?key=secret", Kind::UnexpectedPart),
            ("https://api.selamgpt.com/v1#secret", Kind::UnexpectedPart),
            ("api.selamgpt.com/v1", Kind::InvalidUrl),
            ("secret", Kind::InvalidUrl),
            (" ", Kind::Empty),
        ] {
            let error = BaseUrl::new(url).unwrap_err();
            assert_eq!(error.kind(), &expected, "{url}");
            assert!(!format!("{error} {error:?}").contains("secret"));
        }
        assert!(BaseUrl::allow_insecure_loopback("http://[::1]:80/v1").is_ok());
        assert_eq!(
            BaseUrl::allow_insecure_loopback("http://localhost.evil.com").unwrap_err().kind(),
            &Kind::NotLoopback
        );
    }
}
