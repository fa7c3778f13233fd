//! [`ClientAuth`]: how the client authenticates to a token endpoint.

use std::fmt;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use form_urlencoded::byte_serialize;
use http::HeaderValue;
use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

use crate::{
    credential::{ApiKey, text},
    error::{ConfigError, Place, Setting},
    refresh::Provider,
};

/// How the client authenticates to a [`TokenEndpoint`](super::TokenEndpoint)
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
pub struct ClientAuth(Method);

#[derive(Clone)]
enum Method {
    /// Left to the HTTP client that sends the request.
    None,
    Client {
        id: String,
        /// `None` for a public client.
        secret: Option<SecretString>,
        /// Whether id and secret go into `Authorization: Basic`, rather than into the form.
        in_header: bool,
    },
    ApiKey(Provider<ApiKey>),
}

impl ClientAuth {
    /// Sends id and secret in `Authorization: Basic`, which every endpoint must support for clients with a
    /// secret.
    ///
    /// # Errors
    ///
    /// Fails if id or secret is empty, or contains a control or non-ASCII character.
    pub fn client_secret_basic(
        id: impl Into<String>,
        secret: impl Into<SecretString>,
    ) -> Result<Self, ConfigError> {
        Self::found(id, secret, &[Place::Argument, Place::Argument])
    }

    /// Sends id and secret as form parameters, for endpoints that require it.
    ///
    /// # Errors
    ///
    /// As [`client_secret_basic`](Self::client_secret_basic).
    pub fn client_secret_post(
        id: impl Into<String>,
        secret: impl Into<SecretString>,
    ) -> Result<Self, ConfigError> {
        Self::client(&id.into(), Some(&secret.into()), false, &[Place::Argument, Place::Argument])
    }

    /// Sends only the id: a public client, which cannot keep a secret.
    ///
    /// # Errors
    ///
    /// Fails if the id is empty, or contains a control or non-ASCII character.
    pub fn public(id: impl Into<String>) -> Result<Self, ConfigError> {
        Self::client(&id.into(), None, false, &[Place::Argument, Place::Argument])
    }

    /// Sends the API key as `Authorization: Bearer <key>`. A refreshing key is fetched again when the endpoint
    /// rejects it.
    #[must_use]
    pub fn api_key(key: impl Into<Provider<ApiKey>>) -> Self {
        Self(Method::ApiKey(key.into()))
    }

    /// Sends nothing, the default: the HTTP client authenticates by itself, with a TLS certificate or a layer.
    #[must_use]
    pub fn none() -> Self {
        Self(Method::None)
    }

    /// [`client_secret_basic`](Self::client_secret_basic), with errors that name the `[id, secret]` places.
    pub(crate) fn found(
        id: impl Into<String>,
        secret: impl Into<SecretString>,
        places: &[Place; 2],
    ) -> Result<Self, ConfigError> {
        Self::client(&id.into(), Some(&secret.into()), true, places)
    }

    fn client(
        id: &str,
        secret: Option<&SecretString>,
        in_header: bool,
        [id_place, secret_place]: &[Place; 2],
    ) -> Result<Self, ConfigError> {
        let refuse = |setting, place: &Place| {
            let place = place.clone();
            move |kind| ConfigError::new(setting, place, kind)
        };
        let id = text(id).map_err(refuse(Setting::ClientId, id_place))?.to_owned();
        let secret = secret.map(|secret| text(secret.expose_secret())).transpose();
        let secret = secret.map_err(refuse(Setting::ClientSecret, secret_place))?.map(SecretString::from);
        Ok(Self(Method::Client { id, secret, in_header }))
    }

    /// Returns `Authorization: Basic` of id and secret, each form-encoded first
    /// ([RFC 6749 section 2.3.1](https://www.rfc-editor.org/rfc/rfc6749#section-2.3.1)).
    pub(super) fn basic(&self) -> Option<HeaderValue> {
        const SCHEME: &str = "Basic ";
        let Method::Client { id, secret: Some(secret), in_header: true } = &self.0 else { return None };
        let secret = secret.expose_secret();
        // Both buffers are sized up front: a buffer that grows leaves unwiped copies behind.
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

    /// Returns the form parameters that identify the client.
    pub(super) fn parameters(&self) -> impl Iterator<Item = (&str, &str)> {
        let (id, secret) = match &self.0 {
            Method::Client { id, secret, in_header: false } => (Some(id), secret.as_ref()),
            _ => (None, None),
        };
        let id = id.map(|id| ("client_id", &**id));
        id.into_iter().chain(secret.map(|secret| ("client_secret", secret.expose_secret())))
    }

    pub(super) fn secret(&self) -> Option<&str> {
        match &self.0 {
            Method::Client { secret, .. } => secret.as_ref().map(ExposeSecret::expose_secret),
            Method::None | Method::ApiKey(_) => None,
        }
    }

    pub(super) fn key(&self) -> Option<&Provider<ApiKey>> {
        match &self.0 {
            Method::ApiKey(key) => Some(key),
            _ => None,
        }
    }
}

impl fmt::Debug for ClientAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, id) = match &self.0 {
            Method::None => return f.write_str("None"),
            Method::ApiKey(key) => return f.debug_tuple("ApiKey").field(key).finish(),
            Method::Client { id, secret: None, .. } => ("Public", id),
            Method::Client { id, in_header: true, .. } => ("ClientSecretBasic", id),
            Method::Client { id, .. } => ("ClientSecretPost", id),
        };
        f.debug_struct(name).field("client_id", id).finish()
    }
}
