//! [`JwtSigner`]: a [`Source`] that builds and signs JWTs.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use jsonwebtoken::Header;
use p256::elliptic_curve::rand_core::{OsRng, RngCore};
use serde::Serialize;
use serde_json::{Map, Value};
use zeroize::Zeroizing;

use super::{SigningAlgorithm, SigningKey};
use crate::{
    credential::Token,
    error::{ConfigError, ConfigErrorKind, Place, Setting},
    source::{Fetched, Reason, Source, SourceError, unblock},
    util::clock::{Clock, LONG},
};

const DEFAULT_LIFETIME: Duration = Duration::from_secs(5 * 60);

/// How far clocks that follow NTP, and are checked now and then, may be apart.
const DEFAULT_LEEWAY: Duration = Duration::from_secs(5);

/// A [`Source`] that signs JWTs itself (feature `sign`).
///
/// Each JWT carries the configured claims, a random `jti`, and `iat`, `nbf` and `exp`
/// ([RFC 7519 section 4.1](https://www.rfc-editor.org/rfc/rfc7519#section-4.1)). `iat` and `nbf` are a few seconds before
/// the moment it is signed: see [`with_leeway`](Self::with_leeway).
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
/// Clones share the key and the claims, so a signer for each of many [subjects](Self::with_subject) costs
/// little more than the subject.
///
/// An RSA or ECDSA signature takes a millisecond or more and is computed on tokio's blocking pool.
///
/// The signer uses the `rust_crypto` backend of `jsonwebtoken`. A program that enables another backend as well
/// must select one for its own calls with `CryptoProvider::install_default`, as `jsonwebtoken` requires; that
/// choice does not affect this signer.
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
    leeway: Duration,
    unique_ids: bool,
    clock: Clock,
}

impl JwtSigner {
    /// Makes a signer for JWTs that live five minutes and carry no further claims.
    ///
    /// # Errors
    ///
    /// Fails if the key is not of the kind that the algorithm uses, or is too short: an HMAC secret shorter
    /// than the hash ([RFC 7518 section 3.2](https://www.rfc-editor.org/rfc/rfc7518#section-3.2)), or an RSA
    /// key of less than 2048 bits ([section 3.3](https://www.rfc-editor.org/rfc/rfc7518#section-3.3)).
    ///
    /// ```
    /// use tower_selam::{ConfigErrorKind, source::{JwtSigner, SigningAlgorithm, SigningKey}};
    ///
    /// let error = JwtSigner::new(SigningAlgorithm::Hs256, SigningKey::hmac("secret")).unwrap_err();
    /// assert!(matches!(error.kind(), ConfigErrorKind::TooShort { min_bits: 256, .. }));
    /// assert_eq!(error.to_string(), "signing key is shorter than the 256 bits that its algorithm requires");
    /// ```
    pub fn new(algorithm: SigningAlgorithm, key: SigningKey) -> Result<Self, ConfigError> {
        key.check(algorithm)?;
        let shared = Shared {
            algorithm,
            key,
            key_id: None,
            claims: Map::new(),
            lifetime: DEFAULT_LIFETIME,
            leeway: DEFAULT_LEEWAY,
            unique_ids: true,
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

    /// Sets the time from `iat` to `exp`; 5 minutes by default.
    ///
    /// Rounded down to whole seconds, at least one second and at most a year.
    #[must_use]
    pub fn with_lifetime(self, lifetime: Duration) -> Self {
        let lifetime = Duration::from_secs(lifetime.clamp(Duration::from_secs(1), LONG).as_secs());
        self.with(|shared| shared.lifetime = lifetime)
    }

    /// Sets how far `iat` and `nbf` lie before the moment of signing; 5 seconds by default, and at most half the lifetime.
    ///
    /// A verifier whose clock is behind this one by no more than that accepts the JWT, even if it makes no allowance of its
    /// own. The time from `iat` to `exp` is the [lifetime](Self::with_lifetime) all the same, so the JWT expires sooner by
    /// the leeway. Rounded down to whole seconds.
    #[must_use]
    pub fn with_leeway(self, leeway: Duration) -> Self {
        self.with(|shared| shared.leeway = leeway)
    }

    /// Sets the claims of every JWT, such as `iss` and `aud`, replacing claims set before. An `nbf` or a `jti` among them is
    /// sent as it is.
    ///
    /// # Errors
    ///
    /// Fails if the claims do not serialize to a JSON object, are nested too deeply for a parser to read, or
    /// contain `iat` or `exp`, which the signer sets.
    pub fn with_claims(self, claims: impl Serialize) -> Result<Self, ConfigError> {
        let refuse = |kind| ConfigError::new(Setting::Claims, Place::Argument, kind);
        let claims = serde_json::to_value(claims).ok().filter(is_parseable);
        let Some(Value::Object(claims)) = claims else {
            return Err(refuse(ConfigErrorKind::NotAnObject));
        };
        if claims.contains_key("iat") || claims.contains_key("exp") {
            return Err(refuse(ConfigErrorKind::ReservedClaim));
        }
        Ok(self.with(|shared| shared.claims = claims))
    }

    /// Sets the subject, as `sub`
    /// ([RFC 7519 section 4.1.2](https://www.rfc-editor.org/rfc/rfc7519#section-4.1.2)). Takes precedence over
    /// a `sub` among the claims.
    #[must_use]
    pub fn with_subject(mut self, subject: impl Into<String>) -> Self {
        self.subject = Some(subject.into().into());
        self
    }

    /// Leaves out the random `jti`
    /// ([RFC 7519 section 4.1.7](https://www.rfc-editor.org/rfc/rfc7519#section-4.1.7)), for APIs that refuse one.
    ///
    /// Without it, two JWTs signed within the same second are usually identical, so a refresh right after a
    /// rejection brings the rejected JWT again.
    #[must_use]
    pub fn without_unique_ids(self) -> Self {
        self.with(|shared| shared.unique_ids = false)
    }

    /// Returns a signer of assertions about this client, for an issuer called `audience`.
    pub(crate) fn for_client(&self, client: &str, audience: &str) -> Self {
        self.clone().with(|shared| {
            for (name, value) in [("iss", client), ("sub", client), ("aud", audience)] {
                shared.claims.entry(name).or_insert_with(|| value.into());
            }
            shared.claims.remove("jti");
            shared.unique_ids = true;
        })
    }

    /// Reads the time from `clock`, for tests.
    #[cfg(feature = "test-util")]
    #[must_use]
    pub fn with_clock(self, clock: crate::util::clock::TestClock) -> Self {
        self.with(|shared| shared.clock = clock.into())
    }

    fn with(mut self, change: impl FnOnce(&mut Shared)) -> Self {
        change(Arc::make_mut(&mut self.shared));
        self
    }

    /// Signs one JWT now, on this thread.
    ///
    /// # Errors
    ///
    /// Fails if the key cannot sign, or if the system provides no randomness for the `jti`.
    pub fn sign(&self) -> Result<Token, SourceError> {
        self.issue().map(|issued| issued.credential)
    }

    fn issue(&self) -> Result<Fetched<Token>, SourceError> {
        let lifetime = self.shared.lifetime;
        let now = self.shared.clock.now().wall.duration_since(UNIX_EPOCH).unwrap_or_default();
        let leeway = self.shared.leeway.min(lifetime / 2);
        let issued_at = now.as_secs().saturating_sub(leeway.as_secs());

        let mut claims = self.shared.claims.clone();
        claims.insert("iat".to_owned(), issued_at.into());
        claims.entry("nbf").or_insert_with(|| issued_at.into());
        claims.insert("exp".to_owned(), issued_at.saturating_add(lifetime.as_secs()).into());
        if let Some(subject) = &self.subject {
            claims.insert("sub".to_owned(), (**subject).into());
        }
        if self.shared.unique_ids && !claims.contains_key("jti") {
            claims.insert("jti".to_owned(), unique_id()?.into());
        }

        let token = Token::parse(&self.compact(&claims)?).map_err(SourceError::permanent)?;
        // `iat` lies in the past, so part of the lifetime has already passed.
        let remaining = lifetime.saturating_sub(now.saturating_sub(Duration::from_secs(issued_at)));
        Ok(Fetched::new(token).with_lifetime(remaining))
    }

    /// Signs `claims` into the compact serialization
    /// ([RFC 7515 section 7.1](https://www.rfc-editor.org/rfc/rfc7515#section-7.1)).
    fn compact(&self, claims: &Map<String, Value>) -> Result<Zeroizing<String>, SourceError> {
        let encode = |json: serde_json::Result<Vec<u8>>| {
            json.map(|json| BASE64_URL_SAFE_NO_PAD.encode(json)).map_err(SourceError::permanent)
        };
        let (algorithm, ..) = self.shared.algorithm.parts();
        let mut header = Header::new(algorithm);
        header.kid.clone_from(&self.shared.key_id);

        let mut jwt = Zeroizing::new(encode(serde_json::to_vec(&header))?);
        jwt.push('.');
        jwt.push_str(&encode(serde_json::to_vec(claims))?);
        let signature = self.shared.key.sign(header.alg, jwt.as_bytes()).map_err(SourceError::permanent)?;
        // Reserve before the signature is appended: a buffer that grows leaves unwiped copies behind.
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
        // Signing here would stall every request on this thread, many times over with a signer per subject.
        let signer = self.clone();
        unblock(move || signer.issue()).await?
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

/// Returns whether a parser with a recursion limit, such as the API's, accepts the nesting depth.
fn is_parseable(claims: &Value) -> bool {
    serde_json::from_str::<Value>(&claims.to_string()).is_ok()
}

/// Returns 128 random bits in Base64url.
fn unique_id() -> Result<String, SourceError> {
    let mut bytes = [0; 16];
    OsRng.try_fill_bytes(&mut bytes).map_err(SourceError::transient)?;
    Ok(BASE64_URL_SAFE_NO_PAD.encode(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::util::clock::TestClock;

    /// K4, K8: `iat` is rounded down and back-dated, so the remaining lifetime is shorter by that.
    #[tokio::test(start_paused = true)]
    async fn lifetime_counts_from_the_signing_instant() {
        let signer = JwtSigner::new(SigningAlgorithm::Hs256, SigningKey::hmac([7; 32])).unwrap();
        for (lifetime, remaining) in [
            (Duration::from_secs(60), Duration::from_millis(59_250)),
            (Duration::from_millis(60_999), Duration::from_millis(59_250)),
            (Duration::ZERO, Duration::from_millis(250)),
            (Duration::MAX, LONG - Duration::from_millis(750)),
        ] {
            let clock = TestClock::new(UNIX_EPOCH + Duration::from_millis(1_900_000_000_750));
            let issued =
                signer.clone().with_leeway(Duration::ZERO).with_lifetime(lifetime).with_clock(clock.clone());
            assert_eq!(issued.issue().unwrap().lifetime, Some(remaining), "{lifetime:?}");
            // Back-dated by at most half the lifetime.
            let seconds = (remaining.as_secs() + 1).max(1);
            let leeway = Duration::from_secs((seconds / 2).min(30));
            let issued =
                signer.clone().with_leeway(Duration::from_secs(30)).with_lifetime(lifetime).with_clock(clock);
            assert_eq!(issued.issue().unwrap().lifetime, Some(remaining - leeway), "{lifetime:?}");
        }
    }
}
