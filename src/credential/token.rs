//! A bearer token, usually a JWT.

use std::time::SystemTime;

use secrecy::{ExposeSecret, SecretString};

use super::{Secret, env};
use crate::error::{ConfigError, Place, Setting};

/// A bearer token: the JWT that some features of SelamAPI need in addition to the key.
///
/// Validated, cheap to clone, redacted and wiped like [`ApiKey`](crate::ApiKey). It need not be a JWT: an opaque
/// token works and has no [`expires_at`](Self::expires_at).
///
/// ```
/// use std::time::{Duration, UNIX_EPOCH};
/// use tower_selam::Token;
///
/// // {"alg":"HS256","typ":"JWT"} . {"sub":"selam","exp":1900000000} . (signature)
/// let token = Token::new("eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiJzZWxhbSIsImV4cCI6MTkwMDAwMDAwMH0.c2ln")?;
/// assert_eq!(token.expires_at(), Some(UNIX_EPOCH + Duration::from_secs(1_900_000_000)));
/// # Ok::<(), tower_selam::ConfigError>(())
/// ```
#[doc(alias("JWT", "access_token", "bearer"))]
#[derive(Clone)]
pub struct Token(pub(crate) Secret);

impl Token {
    /// Validates a token: a `&str`, a `String` or a [`SecretString`].
    ///
    /// # Errors
    ///
    /// As [`ApiKey::new`](crate::ApiKey::new), except that the value may be a JWT and must not begin with `sk-selam-`, as
    /// API keys do.
    pub fn new(value: impl Into<SecretString>) -> Result<Self, ConfigError> {
        Secret::new(value.into().expose_secret(), Setting::Token, Place::Argument).map(Self)
    }

    /// As [`new`](Self::new), for text whose buffer the caller wipes.
    pub(crate) fn parse(value: &str) -> Result<Self, ConfigError> {
        Secret::new(value, Setting::Token, Place::Argument).map(Self)
    }

    /// Reads the token from the environment variable [`SELAM_JWT`](env::SELAM_JWT).
    ///
    /// # Errors
    ///
    /// When the variable is not set, or as for [`new`](Self::new); the error names the variable.
    pub fn from_env() -> Result<Self, ConfigError> {
        Self::from_env_var(env::SELAM_JWT)
    }

    /// Returns when the token expires by its `exp` claim
    /// ([RFC 7519 section 4.1.4](https://www.rfc-editor.org/rfc/rfc7519#section-4.1.4)).
    ///
    /// `None` when the token is not a JWT, has no `exp`, or one that is not a time: negative, not a number, or beyond
    /// what [`SystemTime`] holds. The signature is not checked: that is the API's job.
    #[must_use]
    pub fn expires_at(&self) -> Option<SystemTime> {
        self.0.expires_at()
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
    use proptest::prelude::*;

    use super::*;

    fn jwt(claims: &str) -> String {
        let part = |text| BASE64_URL_SAFE_NO_PAD.encode(text);
        format!("{}.{}.c2ln", part(r#"{"alg":"HS256"}"#), part(claims))
    }

    /// R4
    #[test]
    fn only_a_valid_exp_claim_gives_an_expiry() {
        let at = |seconds| Some(UNIX_EPOCH + Duration::from_millis(seconds));
        for (claims, expected) in [
            (r#"{"exp":1900000000}"#, at(1_900_000_000_000)),
            (r#"{"exp":1900000000.5}"#, at(1_900_000_000_500)),
            (r#"{"exp":0}"#, at(0)),
            (r"{}", None),
            (r#"{"exp":null}"#, None),
            (r#"{"exp":"1900000000"}"#, None),
            (r#"{"exp":-1}"#, None),
            (r#"{"exp":9223372036854775808}"#, None),
            (r#"{"exp":1e400}"#, None),
            (r#"{"exp":[1900000000]}"#, None),
            ("not json", None),
        ] {
            assert_eq!(Token::new(jwt(claims)).unwrap().expires_at(), expected, "{claims}");
        }
        assert_eq!(Token::new("opaque").unwrap().expires_at(), None);
        assert_eq!(Token::new("a.b.c").unwrap().expires_at(), None);
    }

    proptest! {
        /// R4
        #[test]
        fn no_claims_cause_a_panic(claims in "\\PC*", exp in any::<f64>(), raw in "[!-~]{1,60}") {
            let _ = Token::new(jwt(&claims));
            let _ = Token::new(jwt(&format!(r#"{{"exp":{exp}}}"#)));
            let _ = Token::new(raw);
        }
    }
}
