//! A set of credentials and the headers that it is sent in.

use std::fmt;

use http::HeaderValue;

use super::{ApiKey, Token};

/// An API key, perhaps with a token, and the headers that they are sent in. Cheap to clone; `Debug` prints ids only.
///
/// The layers write their own. [`RequestAuth::Custom`](crate::RequestAuth::Custom) sends others with one request:
///
/// ```
/// use http::Request;
/// use tower_selam::{ApiKey, Credentials, RequestAuth, SelamLayer, Token};
///
/// # tokio_test::block_on(async {
/// let layer = SelamLayer::builder().with_api_key(ApiKey::new("sk-selam-example")?).build()?;
/// let tenant = Credentials::key_and_jwt(ApiKey::new("sk-selam-tenant")?, Token::new("a.b.c")?);
/// let request = Request::post(layer.base_url().endpoint("chat/completions")?).extension(RequestAuth::Custom(tenant));
///
/// let (mut head, ()) = request.body(())?.into_parts();
/// layer.authorize(&mut head).await?;
/// assert_eq!(head.headers["authorization"], "Bearer a.b.c");
/// assert_eq!(head.headers["x-api-key"], "sk-selam-tenant");
/// # Ok::<(), tower_selam::BoxError>(())
/// # }).unwrap();
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
