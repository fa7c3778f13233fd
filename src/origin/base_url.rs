use std::fmt;

use http::uri::{InvalidUri, Uri};

use crate::{
    env,
    error::{ConfigError, ConfigErrorKind, Place, Subject},
    origin::{Origin, Origins, parse_url},
};

/// Where the API lives: an `https` URL with a path that all of its endpoints share.
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
    /// Without a slash at its end.
    path: String,
}

impl BaseUrl {
    /// The real API: `https://api.selamgpt.com/v1`.
    pub const DEFAULT: &str = "https://api.selamgpt.com/v1";

    /// An `https` URL.
    ///
    /// # Errors
    ///
    /// When it is no absolute `https` URL, or has user information, a query or a fragment. The error never
    /// holds the value.
    pub fn new(url: &str) -> Result<Self, ConfigError> {
        Self::parse(url, Place::Argument, false)
    }

    /// An `https` URL, or a plain `http` one to a loopback address or `localhost`, for tests.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new), and when an `http` URL leads anywhere else.
    pub fn allow_insecure_loopback(url: &str) -> Result<Self, ConfigError> {
        Self::parse(url, Place::Argument, true)
    }

    /// What [`SELAM_BASE_URL`](env::SELAM_BASE_URL) says, else [`DEFAULT`](Self::DEFAULT).
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new); the error names the variable.
    pub fn from_env() -> Result<Self, ConfigError> {
        Self::read_env(false)
    }

    pub(crate) fn read_env(allow_insecure_loopback: bool) -> Result<Self, ConfigError> {
        let place = Place::EnvVar(env::SELAM_BASE_URL.to_owned());
        match env::var(env::SELAM_BASE_URL) {
            Ok(url) => Self::parse(&url, place, allow_insecure_loopback),
            Err(ConfigErrorKind::Missing) => Ok(Self::default()),
            Err(kind) => Err(ConfigError::new(Subject::BaseUrl, place, kind)),
        }
    }

    fn parse(url: &str, place: Place, allow_insecure_loopback: bool) -> Result<Self, ConfigError> {
        let parse = || {
            let uri = parse_url(url)?;
            let origin = Origin::of_uri(&uri)?;
            origin.check(allow_insecure_loopback)?;
            if uri.query().is_some() || url.contains('#') {
                return Err(ConfigErrorKind::Excess);
            }
            Ok(Self { origin, path: uri.path().trim_end_matches('/').to_owned() })
        };
        parse().map_err(|kind| ConfigError::new(Subject::BaseUrl, place, kind))
    }

    /// The URI of an endpoint: `path` below the base, its query kept.
    ///
    /// # Errors
    ///
    /// When `path` has characters that a URI cannot have.
    pub fn endpoint(&self, path: &str) -> Result<Uri, InvalidUri> {
        format!("{self}/{}", path.trim_start_matches('/')).parse()
    }

    pub(crate) fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Only this URL's origin, for the layers.
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
    fn the_default_is_the_url_it_says() {
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
    fn a_bad_url_is_refused_by_kind_and_without_the_value() {
        use ConfigErrorKind as Kind;
        for (url, expected) in [
            ("http://secret.example/v1", Kind::NotHttps),
            ("http://127.0.0.1/v1", Kind::NotHttps),
            ("https://secret@api.selamgpt.com/v1", Kind::UserInfo),
            ("https://api.selamgpt.com/v1?key=secret", Kind::Excess),
            ("https://api.selamgpt.com/v1#secret", Kind::Excess),
            ("api.selamgpt.com/v1", Kind::InvalidUrl),
            ("secret", Kind::InvalidUrl),
            (" ", Kind::Empty),
        ] {
            let error = BaseUrl::new(url).unwrap_err();
            assert_eq!(error.kind(), expected, "{url}");
            assert!(!format!("{error} {error:?}").contains("secret"));
        }
        assert!(BaseUrl::allow_insecure_loopback("http://[::1]:80/v1").is_ok());
        assert_eq!(
            BaseUrl::allow_insecure_loopback("http://localhost.evil.com").unwrap_err().kind(),
            Kind::NotLoopback
        );
    }
}
