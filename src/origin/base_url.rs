//! [`BaseUrl`]: where the API is.

use std::fmt;

use http::uri::{InvalidUri, Uri};

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
/// # Ok::<(), http::uri::InvalidUri>(())
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

    /// Returns the URI of an endpoint: the base URL followed by `path`, which may have a query.
    ///
    /// # Errors
    ///
    /// If `path` has characters that a URI cannot have.
    pub fn endpoint(&self, path: &str) -> Result<Uri, InvalidUri> {
        format!("{self}/{}", path.trim_start_matches('/')).parse()
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
            ("models", "https://gateway.example/selam/v1/models"),
            ("/models?limit=2", "https://gateway.example/selam/v1/models?limit=2"),
            ("//evil.com/", "https://gateway.example/selam/v1/evil.com/"),
            ("@evil.com", "https://gateway.example/selam/v1/@evil.com"),
            ("", "https://gateway.example/selam/v1/"),
        ] {
            assert_eq!(base.endpoint(path).unwrap(), expected);
        }
        assert!(base.endpoint("a b").is_err());
        let bare = BaseUrl::new("https://gateway.example").unwrap();
        assert_eq!(bare.endpoint("@evil.com").unwrap().host(), Some("gateway.example"));
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
