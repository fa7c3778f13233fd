//! [`ClientAuth`]: how the client authenticates to a token endpoint.

use std::{convert::Infallible, fmt, sync::Arc};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use form_urlencoded::byte_serialize;
use http::HeaderValue;
use secrecy::SecretString;
use zeroize::Zeroizing;

#[cfg(feature = "sign")]
use crate::source::{JwtSigner, Reason, Source};
use crate::{
    credential::{ApiKey, ClientSecret, Credential, Token, text},
    error::{AuthError, AuthErrorKind, ConfigError, Place, Setting},
    refresh::Provider,
    source::{Fetching, SourceError},
};

/// How the client authenticates to a [`TokenEndpoint`](super::TokenEndpoint)
/// ([RFC 6749 section 2.3](https://www.rfc-editor.org/rfc/rfc6749#section-2.3)).
///
/// ```
/// use tower_selam::{ApiKey, Refreshing, oauth::{ClientAuth, ClientSecret}, source::FileSource};
///
/// let auth = ClientAuth::client_secret_basic("my-service", "s3cr3t")?;
/// assert_eq!(format!("{auth:?}"), r#"ClientSecretBasic { client_id: "my-service" }"#);
///
/// // A secret that is rotated:
/// let secrets: Refreshing<ClientSecret> = Refreshing::new(FileSource::new("/run/secrets/client-secret"));
/// let auth = ClientAuth::client_secret_post("my-service", secrets)?;
///
/// let auth = ClientAuth::api_key(ApiKey::new("sk-selam-example")?);
/// # Ok::<(), tower_selam::ConfigError>(())
/// ```
#[derive(Clone)]
pub struct ClientAuth(Method);

#[derive(Clone)]
enum Method {
    /// Left to the HTTP client that sends the request.
    None,
    ApiKey(Provider<ApiKey>),
    Client {
        id: String,
        proof: Proof,
    },
}

/// How a client proves its id.
#[derive(Clone)]
enum Proof {
    /// A public client.
    None,
    Secret {
        secret: Provider<ClientSecret>,
        /// Whether id and secret go into `Authorization: Basic`, rather than into the form.
        in_header: bool,
    },
    Assertion(Arc<SignFn>),
}

type SignFn = dyn Fn(Assertion) -> Fetching<'static, Token> + Send + Sync;

/// What a client assertion has to say, for [`ClientAuth::client_assertion`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Assertion {
    /// The client's id: the claims `iss` and `sub`.
    pub client_id: String,
    /// The URL of the token endpoint, without its query: the claim `aud`, unless the issuer documents another.
    pub audience: String,
}

impl ClientAuth {
    /// Sends id and secret in `Authorization: Basic`, which every endpoint must support for clients with a
    /// secret.
    ///
    /// The secret is text, a `SecretString`, a [`ClientSecret`] or a [`Refreshing`](crate::Refreshing) one, which is fetched
    /// again when the endpoint rejects it.
    ///
    /// # Errors
    ///
    /// Fails if id or secret is empty, or contains a control or non-ASCII character.
    pub fn client_secret_basic(
        id: impl Into<String>,
        secret: impl TryInto<Provider<ClientSecret>, Error: Into<ConfigError>>,
    ) -> Result<Self, ConfigError> {
        let secret = secret.try_into().map_err(Into::into)?;
        Self::client(&id.into(), Place::Argument, Proof::Secret { secret, in_header: true })
    }

    /// Sends id and secret as form parameters, for endpoints that require it.
    ///
    /// # Errors
    ///
    /// As [`client_secret_basic`](Self::client_secret_basic).
    pub fn client_secret_post(
        id: impl Into<String>,
        secret: impl TryInto<Provider<ClientSecret>, Error: Into<ConfigError>>,
    ) -> Result<Self, ConfigError> {
        let secret = secret.try_into().map_err(Into::into)?;
        Self::client(&id.into(), Place::Argument, Proof::Secret { secret, in_header: false })
    }

    /// Sends only the id: a public client, which cannot keep a secret.
    ///
    /// # Errors
    ///
    /// Fails if the id is empty, or contains a control or non-ASCII character.
    pub fn public(id: impl Into<String>) -> Result<Self, ConfigError> {
        Self::client(&id.into(), Place::Argument, Proof::None)
    }

    /// Sends a JWT that `sign` makes for each request
    /// ([RFC 7523 section 2.2](https://www.rfc-editor.org/rfc/rfc7523#section-2.2)): the methods `private_key_jwt` and
    /// `client_secret_jwt` of [OpenID Connect](https://openid.net/specs/openid-connect-core-1_0.html#ClientAuthentication).
    ///
    /// Each JWT needs a `jti` of its own, because issuers accept each once. With the feature `sign`, `private_key_jwt` does
    /// all that.
    ///
    /// # Errors
    ///
    /// Fails if the id is empty, or contains a control or non-ASCII character.
    ///
    /// ```
    /// use tower_selam::{BoxError, Token, oauth::{Assertion, ClientAuth}};
    ///
    /// # async fn sign_remotely(_: Assertion) -> Result<String, BoxError> { Ok("a.b.c".into()) }
    /// let auth = ClientAuth::client_assertion("my-service", |assertion: Assertion| async {
    ///     let jwt = sign_remotely(assertion).await?; // a key management service, say
    ///     Ok::<_, BoxError>(Token::new(jwt)?)
    /// })?;
    /// # Ok::<(), tower_selam::ConfigError>(())
    /// ```
    pub fn client_assertion<F, R, E>(id: impl Into<String>, sign: F) -> Result<Self, ConfigError>
    where
        F: Fn(Assertion) -> R + Send + Sync + 'static,
        R: Future<Output = Result<Token, E>> + Send + 'static,
        E: Into<SourceError>,
    {
        let sign = move |assertion| -> Fetching<'static, Token> {
            let signing = sign(assertion);
            Box::pin(async { signing.await.map(Into::into).map_err(Into::into) })
        };
        Self::client(&id.into(), Place::Argument, Proof::Assertion(Arc::new(sign)))
    }

    /// Sends a JWT that `signer` signs for each request (feature `sign`); see
    /// [`client_assertion`](Self::client_assertion).
    ///
    /// The JWT has a random `jti`, and the claims `iss`, `sub` and `aud` that the [`Assertion`] asks for, unless the signer's
    /// own claims say otherwise. With an HMAC secret, the method is called `client_secret_jwt`.
    ///
    /// # Errors
    ///
    /// Fails if the id is empty, or contains a control or non-ASCII character.
    ///
    /// ```
    /// use tower_selam::{oauth::ClientAuth, source::{JwtSigner, SigningAlgorithm, SigningKey}};
    ///
    /// # let key = SigningKey::from_pem(include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/keys/p256.pem")))?;
    /// // let key = SigningKey::from_pem_file("/run/secrets/client-key.pem")?;
    /// let signer = JwtSigner::new(SigningAlgorithm::Es256, key)?.with_key_id("2026-01");
    /// let auth = ClientAuth::private_key_jwt("my-service", signer)?;
    /// # Ok::<(), tower_selam::ConfigError>(())
    /// ```
    #[cfg(feature = "sign")]
    pub fn private_key_jwt(id: impl Into<String>, signer: JwtSigner) -> Result<Self, ConfigError> {
        Self::client_assertion(id, move |Assertion { client_id, audience }| {
            let signer = signer.for_client(&client_id, &audience);
            async move { signer.fetch(Reason::First).await.map(|fetched| fetched.credential) }
        })
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

    /// A client from the environment: public without a secret. Errors of the id name `place`.
    pub(crate) fn found(
        id: &str,
        place: Place,
        secret: Option<Provider<ClientSecret>>,
        in_header: bool,
    ) -> Result<Self, ConfigError> {
        let proof = secret.map_or(Proof::None, |secret| Proof::Secret { secret, in_header });
        Self::client(id, place, proof)
    }

    fn client(id: &str, place: Place, proof: Proof) -> Result<Self, ConfigError> {
        let id = text(id).map_err(|kind| ConfigError::new(Setting::ClientId, place, kind))?.to_owned();
        Ok(Self(Method::Client { id, proof }))
    }

    /// Names the client among others of the endpoint. Which API key it presents is left out, because keys are rotated.
    pub(super) fn identity(&self) -> Option<(&'static str, &str)> {
        match &self.0 {
            Method::None => None,
            Method::ApiKey(_) => Some(("client", "api_key")),
            Method::Client { id, .. } => Some(("client_id", id)),
        }
    }

    /// Obtains what the next request to the endpoint at `audience` authenticates with.
    pub(super) async fn prove(&self, audience: impl FnOnce() -> String) -> Result<Proven, SourceError> {
        Ok(match &self.0 {
            Method::None | Method::Client { proof: Proof::None, .. } => Proven::Nothing,
            Method::ApiKey(key) => Proven::ApiKey(obtain(key).await?),
            Method::Client { proof: Proof::Secret { secret, .. }, .. } => {
                Proven::Secret(obtain(secret).await?)
            }
            Method::Client { id, proof: Proof::Assertion(sign) } => {
                let assertion = Assertion { client_id: id.clone(), audience: audience() };
                Proven::Assertion(sign(assertion).await?.credential)
            }
        })
    }

    /// Refreshes what the endpoint rejected. Returns whether that brought another.
    pub(super) async fn replace(&self, rejected: &Proven) -> bool {
        match (&self.0, rejected) {
            (Method::ApiKey(key), Proven::ApiKey(rejected)) => key.replace(rejected).await,
            (Method::Client { proof: Proof::Secret { secret, .. }, .. }, Proven::Secret(rejected)) => {
                secret.replace(rejected).await
            }
            _ => false,
        }
    }

    /// Reports that what replaced `rejected` was accepted.
    pub(super) fn accepted_after(&self, rejected: &Proven) {
        match (&self.0, rejected) {
            (Method::ApiKey(key), Proven::ApiKey(rejected)) => key.accepted_after(rejected),
            (Method::Client { proof: Proof::Secret { secret, .. }, .. }, Proven::Secret(rejected)) => {
                secret.accepted_after(rejected);
            }
            _ => {}
        }
    }

    /// Returns a number that changes with the client's credential.
    pub(super) fn version(&self) -> Option<u64> {
        match &self.0 {
            Method::ApiKey(key) => key.version(),
            Method::Client { proof: Proof::Secret { secret, .. }, .. } => secret.version(),
            Method::None | Method::Client { .. } => None,
        }
    }

    pub(super) fn authorization(&self, proven: &Proven) -> Option<HeaderValue> {
        match (&self.0, proven) {
            (_, Proven::ApiKey(key)) => Some(key.0.bearer().clone()),
            (Method::Client { id, proof: Proof::Secret { in_header: true, .. } }, Proven::Secret(secret)) => {
                basic(id, secret.expose_secret())
            }
            _ => None,
        }
    }

    /// Returns the form parameters that identify the client.
    pub(super) fn parameters<'a>(&'a self, proven: &'a Proven) -> Vec<(&'a str, &'a str)> {
        const ASSERTION_TYPE: &str = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";

        let Method::Client { id, proof } = &self.0 else { return Vec::new() };
        let mut parameters = vec![("client_id", &**id)];
        match (proof, proven) {
            (Proof::Secret { in_header: true, .. }, _) => parameters.clear(),
            (_, Proven::Secret(secret)) => parameters.push(("client_secret", secret.expose_secret())),
            (_, Proven::Assertion(jwt)) => {
                parameters.push(("client_assertion_type", ASSERTION_TYPE));
                parameters.push(("client_assertion", jwt.expose_secret()));
            }
            (_, Proven::Nothing | Proven::ApiKey(_)) => {}
        }
        parameters
    }
}

/// What one request authenticates with.
pub(super) enum Proven {
    Nothing,
    ApiKey(ApiKey),
    Secret(ClientSecret),
    Assertion(Token),
}

impl Proven {
    pub(super) fn secret(&self) -> Option<&str> {
        match self {
            Self::Nothing => None,
            Self::ApiKey(key) => Some(key.expose_secret()),
            Self::Secret(secret) => Some(secret.expose_secret()),
            Self::Assertion(jwt) => Some(jwt.expose_secret()),
        }
    }
}

/// Returns `Authorization: Basic` of id and secret, each form-encoded first
/// ([RFC 6749 section 2.3.1](https://www.rfc-editor.org/rfc/rfc6749#section-2.3.1)).
fn basic(id: &str, secret: &str) -> Option<HeaderValue> {
    const SCHEME: &str = "Basic ";
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

/// Obtains a credential for a request, after a refresh if one is due.
pub(super) async fn obtain<C: Credential>(provider: &Provider<C>) -> Result<C, SourceError> {
    let failed = |error: AuthError| {
        let permanent = error.kind() == AuthErrorKind::RefreshRejected;
        SourceError::of(permanent, error.retry_after(), error)
    };
    provider.get().await.map_err(failed)
}

// These let `ClientAuth` take text as well as a provider, which cannot fail.
impl TryFrom<&str> for Provider<ClientSecret> {
    type Error = ConfigError;

    fn try_from(secret: &str) -> Result<Self, ConfigError> {
        ClientSecret::new(secret).map(Self::Fixed)
    }
}

impl TryFrom<String> for Provider<ClientSecret> {
    type Error = ConfigError;

    fn try_from(secret: String) -> Result<Self, ConfigError> {
        ClientSecret::new(secret).map(Self::Fixed)
    }
}

impl TryFrom<SecretString> for Provider<ClientSecret> {
    type Error = ConfigError;

    fn try_from(secret: SecretString) -> Result<Self, ConfigError> {
        ClientSecret::new(secret).map(Self::Fixed)
    }
}

impl From<Infallible> for ConfigError {
    fn from(never: Infallible) -> Self {
        match never {}
    }
}

impl fmt::Debug for ClientAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (id, proof) = match &self.0 {
            Method::None => return f.write_str("None"),
            Method::ApiKey(key) => return f.debug_tuple("ApiKey").field(key).finish(),
            Method::Client { id, proof } => (id, proof),
        };
        let name = match proof {
            Proof::None => "Public",
            Proof::Secret { in_header: true, .. } => "ClientSecretBasic",
            Proof::Secret { .. } => "ClientSecretPost",
            Proof::Assertion(_) => "ClientAssertion",
        };
        f.debug_struct(name).field("client_id", id).finish()
    }
}
