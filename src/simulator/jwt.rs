use std::{
    collections::HashSet,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, decode, decode_header, encode};
use p256::{SecretKey, elliptic_curve::rand_core::OsRng, pkcs8::EncodePrivateKey};
use serde::{Deserialize, Serialize};

use super::{random_bytes, random_hex};
use crate::clock;

/// How a JWT is signed ([RFC 7518 section 3.1](https://www.rfc-editor.org/rfc/rfc7518#section-3.1)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum JwtAlgorithm {
    /// HMAC with SHA-256.
    Hs256,
    /// ECDSA on P-256 with SHA-256.
    Es256,
}

/// Mints JWTs and knows its own again.
pub(super) struct Issuer {
    hs256: Keys,
    es256: Keys,
    expired: HashSet<String>,
    minted: Vec<String>,
}

struct Keys {
    sign: EncodingKey,
    verify: DecodingKey,
}

#[derive(Serialize, Deserialize)]
struct Claims {
    sub: String,
    iat: u64,
    exp: u64,
    jti: String,
}

impl Issuer {
    pub(super) fn new() -> Self {
        let secret = random_bytes();
        let hs256 =
            Keys { sign: EncodingKey::from_secret(&secret), verify: DecodingKey::from_secret(&secret) };

        let key = SecretKey::random(&mut OsRng);
        // Encoding a key just made does not fail; an empty one would sign nothing.
        let private = key.to_pkcs8_der().map(|der| der.as_bytes().to_vec()).unwrap_or_default();
        let es256 = Keys {
            sign: EncodingKey::from_ec_der(&private),
            verify: DecodingKey::from_ec_der(&key.public_key().to_sec1_bytes()),
        };
        Self { hs256, es256, expired: HashSet::new(), minted: Vec::new() }
    }

    pub(super) fn mint(&mut self, algorithm: JwtAlgorithm, lifetime: Duration) -> String {
        let now = epoch_seconds(clock::now());
        let claims = Claims {
            sub: "simulated-user".to_owned(),
            iat: now,
            exp: now.saturating_add(lifetime.as_secs()),
            jti: random_hex(),
        };
        let (algorithm, keys) = match algorithm {
            JwtAlgorithm::Hs256 => (Algorithm::HS256, &self.hs256),
            JwtAlgorithm::Es256 => (Algorithm::ES256, &self.es256),
        };
        self.minted.push(claims.jti.clone());
        // Signing with keys of our own does not fail; an empty token would be refused.
        encode(&Header::new(algorithm), &claims, &keys.sign).unwrap_or_default()
    }

    pub(super) fn expire_all(&mut self) {
        self.expired.extend(self.minted.drain(..));
    }

    pub(super) fn accepts(&self, jwt: &str) -> bool {
        let verify = || {
            let algorithm = decode_header(jwt).ok()?.alg;
            let keys = match algorithm {
                Algorithm::HS256 => &self.hs256,
                Algorithm::ES256 => &self.es256,
                _ => return None,
            };
            let mut validation = Validation::new(algorithm);
            validation.leeway = 0;
            decode::<Claims>(jwt, &keys.verify, &validation).ok()
        };
        verify().is_some_and(|jwt| !self.expired.contains(&jwt.claims.jti))
    }
}

pub(super) fn epoch_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_own_jwts_are_accepted_until_they_expire() {
        for algorithm in [JwtAlgorithm::Hs256, JwtAlgorithm::Es256] {
            let mut issuer = Issuer::new();
            let jwt = issuer.mint(algorithm, Duration::from_secs(60));
            assert!(issuer.accepts(&jwt), "{algorithm:?}");
            assert!(!Issuer::new().accepts(&jwt), "another issuer's");
            issuer.expire_all();
            assert!(!issuer.accepts(&jwt), "expired");
            let next = issuer.mint(algorithm, Duration::from_secs(60));
            assert!(issuer.accepts(&next), "a new one");
        }
    }

    #[test]
    fn forged_jwts_are_not() {
        let mut issuer = Issuer::new();
        let jwt = issuer.mint(JwtAlgorithm::Es256, Duration::from_secs(60));
        let [head, claims, _] = jwt.split('.').collect::<Vec<_>>()[..] else { panic!("{jwt}") };
        // {"alg":"none"}
        for forged in [format!("eyJhbGciOiJub25lIn0.{claims}."), format!("{head}.{claims}."), String::new()] {
            assert!(!issuer.accepts(&forged), "{forged}");
        }
        let now = epoch_seconds(clock::now());
        let past = Claims { sub: "a".into(), iat: now - 120, exp: now - 60, jti: "past".into() };
        let past = encode(&Header::new(Algorithm::HS256), &past, &issuer.hs256.sign).unwrap();
        assert!(!issuer.accepts(&past));
    }
}
