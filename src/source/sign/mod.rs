mod key;

use std::{
    fmt,
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, Header};
use p256::elliptic_curve::rand_core::{OsRng, RngCore};
use serde::Serialize;
use serde_json::{Map, Value};

pub use self::key::SigningKey;
use super::{Fetched, Reason, Source, SourceError};
use crate::{
    ConfigError, ConfigErrorKind, Token,
    error::{Place, Subject},
    util::clock::{Clock, LONG},
};

const DEFAULT_LIFETIME: Duration = Duration::from_secs(5 * 60);

/// A [`Source`] that signs JWTs itself: feature `sign`.
///
/// Each has the claims given, and `iat` and `exp`
/// ([RFC 7519 section 4.1](https://www.rfc-editor.org/rfc/rfc7519#section-4.1)) of the moment it was signed.
///
/// ```
/// use serde_json::json;
/// use tower_selam::{Refreshing, source::{JwtSigner, SigningAlgorithm, SigningKey}};
///
/// # tokio_test::block_on(async {
/// # let secret = [7; 32];
/// let key = SigningKey::hmac(secret); // or SigningKey::from_pem_file("/run/secrets/signing.pem")?
/// let signer = JwtSigner::new(SigningAlgorithm::Hs256, key)?
///     .with_key_id("2026-01")
///     .with_claims(json!({ "iss": "my-service", "aud": "selam" }))?;
///
/// let jwts = Refreshing::new(signer.with_subject("user-1"));
/// assert!(jwts.token().await?.expires_at().is_some());
/// # Ok::<(), tower_selam::BoxError>(())
/// # }).unwrap();
/// ```
///
/// Clones share key and claims, so that a signer for each of many users, by its
/// [subject](Self::with_subject), costs little more than the subject.
///
/// An RSA or ECDSA signature takes a millisecond or several, and is made on one of tokio's threads for what
/// blocks.
///
/// It signs with the `rust_crypto` backend of `jsonwebtoken`. A program that uses `jsonwebtoken` with another
/// backend has both then, and has to choose one for its own calls, as `jsonwebtoken` asks:
/// `CryptoProvider::install_default`. What it chooses changes nothing here.
#[derive(Clone)]
pub struct JwtSigner {
    shared: Arc<Shared>,
    subject: Option<Arc<str>>,
}

#[derive(Clone)]
struct Shared {
    algorithm: SigningAlgorithm,
    key: SigningKey,
    key_id: Option<String>,
    claims: Map<String, Value>,
    lifetime: Duration,
    unique_ids: bool,
    clock: Clock,
}

impl JwtSigner {
    /// Signs with `key`, JWTs of five minutes without claims of their own.
    ///
    /// # Errors
    ///
    /// When the key is not of the kind that the algorithm takes, or too short for it: an HMAC secret shorter
    /// than the hash ([RFC 7518 section 3.2](https://www.rfc-editor.org/rfc/rfc7518#section-3.2)), an RSA key
    /// of less than 2048 bits ([section 3.3](https://www.rfc-editor.org/rfc/rfc7518#section-3.3)).
    ///
    /// ```
    /// use tower_selam::{ConfigErrorKind, source::{JwtSigner, SigningAlgorithm, SigningKey}};
    ///
    /// let error = JwtSigner::new(SigningAlgorithm::Hs256, SigningKey::hmac("secret")).unwrap_err();
    /// assert_eq!(error.kind(), ConfigErrorKind::TooShort { least: 256 });
    /// assert_eq!(error.to_string(), "signing key is shorter than the 256 bits its algorithm asks for");
    /// ```
    pub fn new(algorithm: SigningAlgorithm, key: SigningKey) -> Result<Self, ConfigError> {
        key.check(algorithm)?;
        let shared = Shared {
            algorithm,
            key,
            key_id: None,
            claims: Map::new(),
            lifetime: DEFAULT_LIFETIME,
            unique_ids: false,
            clock: Clock::default(),
        };
        Ok(Self { shared: Arc::new(shared), subject: None })
    }

    /// Names the key in the header, as `kid`
    /// ([RFC 7515 section 4.1.4](https://www.rfc-editor.org/rfc/rfc7515#section-4.1.4)).
    #[must_use]
    pub fn with_key_id(self, id: impl Into<String>) -> Self {
        self.with(|shared| shared.key_id = Some(id.into()))
    }

    /// From `iat` to `exp`; 5 minutes by default. In whole seconds, rounded down: at least one, at most a year.
    #[must_use]
    pub fn with_lifetime(self, lifetime: Duration) -> Self {
        let lifetime = Duration::from_secs(lifetime.clamp(Duration::from_secs(1), LONG).as_secs());
        self.with(|shared| shared.lifetime = lifetime)
    }

    /// The claims of each JWT, in place of those given before: `iss`, `aud` and whatever the API asks for.
    ///
    /// # Errors
    ///
    /// When they do not serialize to a JSON object, or to one nested too deeply for a parser to read, or have
    /// an `iat` or `exp`, which are the signer's.
    pub fn with_claims(self, claims: impl Serialize) -> Result<Self, ConfigError> {
        let refuse = |kind| ConfigError::new(Subject::Claims, Place::Argument, kind);
        let claims = serde_json::to_value(claims).ok().filter(is_readable);
        let Some(Value::Object(claims)) = claims else {
            return Err(refuse(ConfigErrorKind::NotAnObject));
        };
        if claims.contains_key("iat") || claims.contains_key("exp") {
            return Err(refuse(ConfigErrorKind::ReservedClaim));
        }
        Ok(self.with(|shared| shared.claims = claims))
    }

    /// Whom each JWT is for, as `sub`
    /// ([RFC 7519 section 4.1.2](https://www.rfc-editor.org/rfc/rfc7519#section-4.1.2)), in place of one among
    /// the claims.
    #[must_use]
    pub fn with_subject(mut self, subject: impl Into<String>) -> Self {
        self.subject = Some(subject.into().into());
        self
    }

    /// Gives each JWT a random `jti`
    /// ([RFC 7519 section 4.1.7](https://www.rfc-editor.org/rfc/rfc7519#section-4.1.7)), in place of one among
    /// the claims.
    ///
    /// Without it, two that are signed within one second are mostly the same: after the API refused the
    /// first, the second is no help.
    #[must_use]
    pub fn with_unique_ids(self) -> Self {
        self.with(|shared| shared.unique_ids = true)
    }

    /// Takes the time from `clock`, for tests.
    #[cfg(feature = "test-util")]
    #[must_use]
    pub fn with_clock(self, clock: crate::TestClock) -> Self {
        self.with(|shared| shared.clock = clock.into())
    }

    fn with(mut self, change: impl FnOnce(&mut Shared)) -> Self {
        change(Arc::make_mut(&mut self.shared));
        self
    }

    /// Signs a JWT now, on this thread: for a program that needs but one.
    ///
    /// # Errors
    ///
    /// When the key signs nothing after all, or there is no randomness for a [`jti`](Self::with_unique_ids).
    pub fn sign(&self) -> Result<Token, SourceError> {
        self.issue().map(|issued| issued.credential)
    }

    fn issue(&self) -> Result<Fetched<Token>, SourceError> {
        let lifetime = self.shared.lifetime;
        let now = self.shared.clock.now().wall.duration_since(UNIX_EPOCH).unwrap_or_default();
        let issued_at = now.as_secs();

        let mut claims = self.shared.claims.clone();
        claims.insert("iat".to_owned(), issued_at.into());
        claims.insert("exp".to_owned(), issued_at.saturating_add(lifetime.as_secs()).into());
        if let Some(subject) = &self.subject {
            claims.insert("sub".to_owned(), (**subject).into());
        }
        if self.shared.unique_ids {
            claims.insert("jti".to_owned(), unique_id()?.into());
        }

        let token = Token::new(self.compact(&claims)?).map_err(SourceError::permanent)?;
        // Of its first second a part had gone by when it was signed.
        let left = lifetime.saturating_sub(Duration::from_nanos(now.subsec_nanos().into()));
        Ok(Fetched::new(token).with_lifetime(left))
    }

    /// The compact form ([RFC 7515 section 7.1](https://www.rfc-editor.org/rfc/rfc7515#section-7.1)), signed.
    fn compact(&self, claims: &Map<String, Value>) -> Result<String, SourceError> {
        let part = |json: serde_json::Result<Vec<u8>>| {
            json.map(|json| BASE64_URL_SAFE_NO_PAD.encode(json)).map_err(SourceError::permanent)
        };
        let mut header = Header::new(self.shared.algorithm.algorithm());
        header.kid.clone_from(&self.shared.key_id);

        let mut jwt = part(serde_json::to_vec(&header))?;
        jwt.push('.');
        jwt.push_str(&part(serde_json::to_vec(claims))?);
        let signature = self.shared.key.sign(header.alg, jwt.as_bytes()).map_err(SourceError::permanent)?;
        // Before the signature is in it: a buffer that grows leaves copies behind.
        jwt.reserve(1 + 2 * signature.len());
        jwt.push('.');
        BASE64_URL_SAFE_NO_PAD.encode_string(&*signature, &mut jwt);
        Ok(jwt)
    }
}

impl Source<Token> for JwtSigner {
    async fn fetch(&self, _: Reason<Token>) -> Result<Fetched<Token>, SourceError> {
        if !self.shared.key.is_slow() {
            return self.issue();
        }
        // The requests of this thread would wait for it, and with a signer for each of many users for many.
        let signer = self.clone();
        let issued = tokio::task::spawn_blocking(move || signer.issue()).await;
        // By the end of the runtime, or a panic; what that said may be a secret.
        issued.unwrap_or_else(|_| Err(SourceError::transient("signing was broken off")))
    }
}

impl fmt::Debug for JwtSigner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JwtSigner")
            .field("algorithm", &self.shared.algorithm)
            .field("key", &self.shared.key)
            .field("key_id", &self.shared.key_id)
            .field("lifetime", &self.shared.lifetime)
            .finish_non_exhaustive()
    }
}

/// How a [`JwtSigner`] signs ([RFC 7518 section 3.1](https://www.rfc-editor.org/rfc/rfc7518#section-3.1),
/// [RFC 8037 section 3.1](https://www.rfc-editor.org/rfc/rfc8037#section-3.1)).
///
/// Where there is a choice, take [`EdDsa`](Self::EdDsa), which is also the fastest of those with a public half,
/// or [`Es256`](Self::Es256): RSA in pure Rust does not take the same time for every key
/// ([RUSTSEC-2023-0071](https://rustsec.org/advisories/RUSTSEC-2023-0071)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SigningAlgorithm {
    /// HMAC with SHA-256.
    Hs256,
    /// HMAC with SHA-384.
    Hs384,
    /// HMAC with SHA-512.
    Hs512,
    /// RSASSA-PKCS1-v1_5 with SHA-256.
    Rs256,
    /// RSASSA-PKCS1-v1_5 with SHA-384.
    Rs384,
    /// RSASSA-PKCS1-v1_5 with SHA-512.
    Rs512,
    /// RSASSA-PSS with SHA-256.
    Ps256,
    /// RSASSA-PSS with SHA-384.
    Ps384,
    /// RSASSA-PSS with SHA-512.
    Ps512,
    /// ECDSA on P-256 with SHA-256.
    Es256,
    /// ECDSA on P-384 with SHA-384.
    Es384,
    /// EdDSA with Ed25519.
    EdDsa,
}

impl SigningAlgorithm {
    fn algorithm(self) -> Algorithm {
        match self {
            Self::Hs256 => Algorithm::HS256,
            Self::Hs384 => Algorithm::HS384,
            Self::Hs512 => Algorithm::HS512,
            Self::Rs256 => Algorithm::RS256,
            Self::Rs384 => Algorithm::RS384,
            Self::Rs512 => Algorithm::RS512,
            Self::Ps256 => Algorithm::PS256,
            Self::Ps384 => Algorithm::PS384,
            Self::Ps512 => Algorithm::PS512,
            Self::Es256 => Algorithm::ES256,
            Self::Es384 => Algorithm::ES384,
            Self::EdDsa => Algorithm::EdDSA,
        }
    }
}

/// Whether it is read back: parsers, the API's among them, refuse what is nested so deeply that it fills a stack.
fn is_readable(claims: &Value) -> bool {
    serde_json::from_str::<Value>(&claims.to_string()).is_ok()
}

/// 128 random bits, in Base64.
fn unique_id() -> Result<String, SourceError> {
    let mut bytes = [0; 16];
    OsRng.try_fill_bytes(&mut bytes).map_err(SourceError::transient)?;
    Ok(BASE64_URL_SAFE_NO_PAD.encode(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TestClock;

    #[tokio::test(start_paused = true)]
    async fn k4_a_jwt_lives_for_what_is_left_of_its_lifetime_by_its_own_clock() {
        let signer = JwtSigner::new(SigningAlgorithm::Hs256, SigningKey::hmac([7; 32])).unwrap();
        for (lifetime, left) in [
            (Duration::from_secs(60), Duration::from_millis(59_250)),
            (Duration::from_millis(60_999), Duration::from_millis(59_250)),
            (Duration::ZERO, Duration::from_millis(250)),
            (Duration::MAX, LONG - Duration::from_millis(750)),
        ] {
            let clock = TestClock::new(UNIX_EPOCH + Duration::from_millis(1_900_000_000_750));
            let issued = signer.clone().with_lifetime(lifetime).with_clock(clock).issue().unwrap();
            assert_eq!(issued.lifetime, Some(left), "{lifetime:?}");
        }
    }
}
