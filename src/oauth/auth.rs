use std::fmt;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use form_urlencoded::byte_serialize;
use http::HeaderValue;
use zeroize::Zeroizing;

use crate::{
    ApiKey, ConfigError, Provider,
    credential::text,
    error::{Place, Subject},
};

/// How a [`TokenEndpoint`](super::TokenEndpoint) knows who asks
/// ([RFC 6749 section 2.3](https://www.rfc-editor.org/rfc/rfc6749#section-2.3)).
///
/// ```
/// use tower_selam::{ApiKey, oauth::ClientAuth};
///
/// let auth = ClientAuth::client_secret_basic("my-service", "s3cr3t")?;
/// assert_eq!(format!("{auth:?}"), r#"ClientSecretBasic { client_id: "my-service" }"#);
/// let auth = ClientAuth::api_key(ApiKey::new("sk-selam-example")?);
/// # Ok::<(), tower_selam::ConfigError>(())
/// ```
#[derive(Clone)]
pub struct ClientAuth(pub(super) Method);

#[derive(Clone)]
pub(super) enum Method {
    /// The client that sends the request sees to it.
    Nothing,
    Basic {
        id: String,
        secret: Zeroizing<String>,
    },
    Post {
        id: String,
        secret: Zeroizing<String>,
    },
    Public {
        id: String,
    },
    ApiKey(Provider<ApiKey>),
}

impl ClientAuth {
    /// Id and secret in `Authorization: Basic`, which every endpoint for such clients supports.
    ///
    /// # Errors
    ///
    /// When one of the two is empty, or has a control character or one that is not ASCII.
    pub fn client_secret_basic(
        id: impl Into<String>,
        secret: impl Into<String>,
    ) -> Result<Self, ConfigError> {
        let (id, secret) = pair(id.into(), secret.into(), &[Place::Argument, Place::Argument])?;
        Ok(Self(Method::Basic { id, secret }))
    }

    /// Id and secret as parameters of the form: for endpoints that ask for it.
    ///
    /// # Errors
    ///
    /// As [`client_secret_basic`](Self::client_secret_basic).
    pub fn client_secret_post(id: impl Into<String>, secret: impl Into<String>) -> Result<Self, ConfigError> {
        let (id, secret) = pair(id.into(), secret.into(), &[Place::Argument, Place::Argument])?;
        Ok(Self(Method::Post { id, secret }))
    }

    /// The id alone: a public client, which has no secret to keep.
    ///
    /// # Errors
    ///
    /// As [`client_secret_basic`](Self::client_secret_basic).
    pub fn public(id: impl Into<String>) -> Result<Self, ConfigError> {
        Ok(Self(Method::Public { id: client_id(id.into(), Place::Argument)? }))
    }

    /// The API key as `Authorization: Bearer <key>`. One that renews itself is read again when it is refused.
    #[must_use]
    pub fn api_key(key: impl Into<Provider<ApiKey>>) -> Self {
        Self(Method::ApiKey(key.into()))
    }

    /// Nothing, the default: the HTTP client sees to it, by a certificate or a layer of yours.
    #[must_use]
    pub fn none() -> Self {
        Self(Method::Nothing)
    }

    /// [`client_secret_basic`](Self::client_secret_basic) of what was found in these places.
    pub(crate) fn found(id: String, secret: String, places: &[Place; 2]) -> Result<Self, ConfigError> {
        let (id, secret) = pair(id, secret, places)?;
        Ok(Self(Method::Basic { id, secret }))
    }
}

fn pair(
    id: String,
    secret: String,
    [id_from, secret_from]: &[Place; 2],
) -> Result<(String, Zeroizing<String>), ConfigError> {
    let secret = Zeroizing::new(secret);
    let id = client_id(id, id_from.clone())?;
    match text(&secret) {
        Ok(secret) => Ok((id, Zeroizing::new(secret.to_owned()))),
        Err(kind) => Err(ConfigError::new(Subject::ClientSecret, secret_from.clone(), kind)),
    }
}

fn client_id(id: String, from: Place) -> Result<String, ConfigError> {
    match text(&id) {
        Ok(id) => Ok(id.to_owned()),
        Err(kind) => Err(ConfigError::new(Subject::ClientId, from, kind)),
    }
}

impl Method {
    /// What stands in `Authorization` for an id and a secret: each form-encoded
    /// ([RFC 6749 section 2.3.1](https://www.rfc-editor.org/rfc/rfc6749#section-2.3.1)).
    pub(super) fn basic(id: &str, secret: &str) -> Option<HeaderValue> {
        const SCHEME: &str = "Basic ";
        // Of the right size from the start: a buffer that grows leaves copies behind.
        let mut pair = Zeroizing::new(String::with_capacity(3 * (id.len() + secret.len()) + 1));
        pair.extend(byte_serialize(id.as_bytes()));
        pair.push(':');
        pair.extend(byte_serialize(secret.as_bytes()));
        let mut value = Zeroizing::new(String::with_capacity(SCHEME.len() + pair.len().div_ceil(3) * 4));
        value.push_str(SCHEME);
        BASE64_STANDARD.encode_string(pair.as_bytes(), &mut value);
        let mut value = HeaderValue::from_maybe_shared(Bytes::from_owner(value)).ok()?;
        value.set_sensitive(true);
        Some(value)
    }

    /// Changes when what it proves itself with has changed.
    pub(super) fn version(&self) -> Option<u64> {
        match self {
            Self::ApiKey(key) => key.version(),
            _ => None,
        }
    }
}

impl fmt::Debug for ClientAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, id) = match &self.0 {
            Method::Nothing => return f.write_str("None"),
            Method::ApiKey(key) => return f.debug_tuple("ApiKey").field(key).finish(),
            Method::Basic { id, .. } => ("ClientSecretBasic", id),
            Method::Post { id, .. } => ("ClientSecretPost", id),
            Method::Public { id } => ("Public", id),
        };
        f.debug_struct(name).field("client_id", id).finish()
    }
}
