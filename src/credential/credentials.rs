//! A set of credentials and the headers that it is sent in.

use std::fmt;

use http::HeaderValue;

use super::{ApiKey, Token};

/// An API key, perhaps with a token, and the headers that they are sent in. Cheap to clone; `Debug` prints ids only.
///
/// The layers write credentials on their own. [`apply`](Self::apply) does the same where there is no Tower stack: in a
/// proxy's request filter, or for a WebSocket handshake.
///
/// ```
/// use http::Request;
/// use tower_selam::{ApiKey, Credentials, Origins, Token};
///
/// let credentials = Credentials::key_and_jwt(ApiKey::new("sk-selam-example")?, Token::new("a.b.c")?);
/// let (mut parts, body) =
///     Request::get("https://api.selamgpt.com/v1/models").body(()).unwrap().into_parts();
/// credentials.apply(&Origins::selam(), &mut parts).unwrap();
///
/// assert_eq!(parts.headers["authorization"], "Bearer a.b.c");
/// assert_eq!(parts.headers["x-api-key"], "sk-selam-example");
/// # Ok::<(), tower_selam::ConfigError>(())
/// ```
#[derive(Clone)]
pub struct Credentials {
    api_key: ApiKey,
    placement: Placement,
}

#[derive(Clone)]
enum Placement {
    KeyAsBearer,
    KeyAsXApiKey,
    JwtAsBearer(Token),
}

impl Credentials {
    /// Sends the key as `Authorization: Bearer <key>`, which is what most operations need.
    #[must_use]
    pub fn bearer(key: ApiKey) -> Self {
        Self { api_key: key, placement: Placement::KeyAsBearer }
    }

    /// Sends the key as `X-API-Key: <key>`.
    #[must_use]
    pub fn x_api_key(key: ApiKey) -> Self {
        Self { api_key: key, placement: Placement::KeyAsXApiKey }
    }

    /// Sends the JWT as `Authorization: Bearer <jwt>` and the key as `X-API-Key: <key>`.
    #[must_use]
    pub fn key_and_jwt(key: ApiKey, jwt: Token) -> Self {
        Self { api_key: key, placement: Placement::JwtAsBearer(jwt) }
    }

    /// Returns the key.
    #[must_use]
    pub fn api_key(&self) -> &ApiKey {
        &self.api_key
    }

    /// Returns the JWT, if there is one.
    #[must_use]
    pub fn jwt(&self) -> Option<&Token> {
        match &self.placement {
            Placement::JwtAsBearer(jwt) => Some(jwt),
            Placement::KeyAsBearer | Placement::KeyAsXApiKey => None,
        }
    }

    /// The key alone, in the header that it is sent in without a JWT.
    pub(crate) fn without_jwt(&self) -> Self {
        match &self.placement {
            Placement::KeyAsXApiKey => self.clone(),
            Placement::KeyAsBearer | Placement::JwtAsBearer(_) => Self::bearer(self.api_key.clone()),
        }
    }

    /// The value of `Authorization`.
    pub(crate) fn authorization(&self) -> Option<&HeaderValue> {
        match &self.placement {
            Placement::KeyAsBearer => Some(self.api_key.0.bearer()),
            Placement::JwtAsBearer(jwt) => Some(jwt.0.bearer()),
            Placement::KeyAsXApiKey => None,
        }
    }

    /// The value of `X-API-Key`.
    pub(crate) fn x_api_key_value(&self) -> Option<&HeaderValue> {
        match &self.placement {
            Placement::KeyAsBearer => None,
            Placement::KeyAsXApiKey | Placement::JwtAsBearer(_) => Some(self.api_key.0.bare()),
        }
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_tuple("Credentials");
        debug.field(&self.api_key);
        if let Some(jwt) = self.jwt() {
            debug.field(jwt);
        }
        debug.finish()
    }
}
