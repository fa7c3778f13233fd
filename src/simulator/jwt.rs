//! Mints JWTs, and accepts those it minted.

use std::{
    collections::HashMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use hmac::{Hmac, Mac};
use p256::{
    ecdsa::{Signature, SigningKey, signature::Signer},
    elliptic_curve::rand_core::OsRng,
};
use serde_json::json;
use sha2::Sha256;

use super::{random_bytes, random_hex};

/// The default `sub` of a JWT.
pub(super) const SUBJECT: &str = "simulated-user";

/// The signature algorithm of a JWT ([RFC 7518 section 3.1](https://www.rfc-editor.org/rfc/rfc7518#section-3.1)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum JwtAlgorithm {
    /// HMAC with SHA-256.
    Hs256,
    /// ECDSA on P-256 with SHA-256.
    Es256,
}

/// Mints JWTs and accepts those it minted.
pub(super) struct Issuer {
    hs256: [u8; 16],
    es256: SigningKey,
    /// Every JWT that was minted and not revoked by `expire_all`, with its expiry in milliseconds since the epoch.
    live: HashMap<String, u128>,
}

impl Default for Issuer {
    fn default() -> Self {
        Self { hs256: random_bytes(), es256: SigningKey::random(&mut OsRng), live: HashMap::new() }
    }
}

impl Issuer {
    pub(super) fn mint(
        &mut self,
        algorithm: JwtAlgorithm,
        subject: &str,
        now: SystemTime,
        lifetime: Duration,
    ) -> String {
        let issued = since_epoch(now);
        let expires = issued.saturating_add(lifetime);
        // Dates keep their fraction, as RFC 7519 section 2 allows, so that a two-second token lives two seconds even if it
        // was minted late in a second.
        let claims = json!({
            "sub": subject,
            "iat": issued.as_millis() as f64 / 1000.0,
            "exp": expires.as_millis() as f64 / 1000.0,
            "jti": random_hex(),
        });
        let name = match algorithm {
            JwtAlgorithm::Hs256 => "HS256",
            JwtAlgorithm::Es256 => "ES256",
        };
        let part = |json: serde_json::Value| BASE64_URL_SAFE_NO_PAD.encode(json.to_string());
        let message = format!("{}.{}", part(json!({ "typ": "JWT", "alg": name })), part(claims));
        let signature = match algorithm {
            JwtAlgorithm::Hs256 => hs256(&self.hs256, message.as_bytes()).finalize().into_bytes().to_vec(),
            JwtAlgorithm::Es256 => {
                let signature: Signature = self.es256.sign(message.as_bytes());
                signature.to_bytes().to_vec()
            }
        };
        let jwt = format!("{message}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature));
        self.live.insert(jwt.clone(), expires.as_millis());
        jwt
    }

    pub(super) fn expire_all(&mut self) {
        self.live.clear();
    }

    /// Whether this issuer minted `jwt`, and it has neither expired by `now` nor been revoked.
    pub(super) fn accepts(&self, jwt: &str, now: SystemTime) -> bool {
        self.live.get(jwt).is_some_and(|expires| *expires > since_epoch(now).as_millis())
    }
}

/// HMAC with SHA-256 over `message`, to be finished or verified.
#[expect(clippy::expect_used, reason = "it never fails")]
pub(super) fn hs256(key: &[u8], message: &[u8]) -> Hmac<Sha256> {
    Hmac::new_from_slice(key)
        .map(|hmac: Hmac<Sha256>| hmac.chain_update(message))
        .expect("HMAC takes keys of any length")
}

pub(super) fn epoch_seconds(time: SystemTime) -> u64 {
    since_epoch(time).as_secs()
}

fn since_epoch(time: SystemTime) -> Duration {
    time.duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn at(millis: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(1_900_000_000_000 + millis)
    }

    #[test]
    fn its_own_jwts_are_accepted_until_expired() {
        let now = at(0);
        for algorithm in [JwtAlgorithm::Hs256, JwtAlgorithm::Es256] {
            let mut issuer = Issuer::default();
            let jwt = issuer.mint(algorithm, SUBJECT, now, MINUTE);
            assert!(issuer.accepts(&jwt, now), "{algorithm:?}");
            assert!(!Issuer::default().accepts(&jwt, now), "minted by another issuer");
            issuer.expire_all();
            assert!(!issuer.accepts(&jwt, now), "expired by `expire_all`");
            let next = issuer.mint(algorithm, SUBJECT, now, MINUTE);
            assert!(issuer.accepts(&next, now), "minted after `expire_all`");
        }
    }

    /// Verified with independent code.
    #[test]
    fn signatures_are_valid() {
        use ring::{hmac, signature};

        let mut issuer = Issuer::default();
        for (algorithm, name) in [(JwtAlgorithm::Hs256, "HS256"), (JwtAlgorithm::Es256, "ES256")] {
            let jwt = issuer.mint(algorithm, SUBJECT, at(0), MINUTE);
            let (message, signed) = jwt.rsplit_once('.').unwrap();
            let signed = BASE64_URL_SAFE_NO_PAD.decode(signed).unwrap();
            let head = BASE64_URL_SAFE_NO_PAD.decode(message.split('.').next().unwrap()).unwrap();
            let head: serde_json::Value = serde_json::from_slice(&head).unwrap();
            assert_eq!(head, json!({ "alg": name, "typ": "JWT" }));
            match algorithm {
                JwtAlgorithm::Hs256 => {
                    let key = hmac::Key::new(hmac::HMAC_SHA256, &issuer.hs256);
                    hmac::verify(&key, message.as_bytes(), &signed).unwrap();
                }
                JwtAlgorithm::Es256 => {
                    let key = issuer.es256.verifying_key().to_encoded_point(false);
                    signature::UnparsedPublicKey::new(&signature::ECDSA_P256_SHA256_FIXED, key.as_bytes())
                        .verify(message.as_bytes(), &signed)
                        .unwrap();
                }
            }
        }
    }

    #[test]
    fn lifetimes_are_exact_to_the_millisecond() {
        let mut issuer = Issuer::default();
        for minted_at in [0, 1, 500, 999] {
            let jwt = issuer.mint(JwtAlgorithm::Hs256, SUBJECT, at(minted_at), Duration::from_secs(2));
            assert!(issuer.accepts(&jwt, at(minted_at + 1_999)), "{minted_at}");
            assert!(!issuer.accepts(&jwt, at(minted_at + 2_000)), "{minted_at}");
        }
        let brief = issuer.mint(JwtAlgorithm::Hs256, SUBJECT, at(0), Duration::from_millis(5));
        assert!(issuer.accepts(&brief, at(4)) && !issuer.accepts(&brief, at(5)));
        let endless = issuer.mint(JwtAlgorithm::Hs256, SUBJECT, at(0), Duration::MAX);
        assert!(issuer.accepts(&endless, at(0)));
    }

    #[test]
    fn forged_and_expired_jwts_are_refused() {
        let mut issuer = Issuer::default();
        let jwt = issuer.mint(JwtAlgorithm::Es256, SUBJECT, at(0), MINUTE);
        let [head, claims, _] = jwt.split('.').collect::<Vec<_>>()[..] else { panic!("{jwt}") };
        // {"alg":"none"}
        for forged in [format!("eyJhbGciOiJub25lIn0.{claims}."), format!("{head}.{claims}."), String::new()] {
            assert!(!issuer.accepts(&forged, at(0)), "{forged}");
        }
        let past = issuer.mint(JwtAlgorithm::Hs256, SUBJECT, at(0) - 2 * MINUTE, MINUTE);
        assert!(!issuer.accepts(&past, at(0)));
    }
}
