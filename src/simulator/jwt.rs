use std::{
    collections::HashSet,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use jsonwebtoken::{
    Algorithm, DecodingKey, EncodingKey, Header, TokenData, Validation, decode, decode_header, encode,
};
use p256::{SecretKey, elliptic_curve::rand_core::OsRng, pkcs8::EncodePrivateKey};
use serde::{Deserialize, Serialize};

use super::{random_bytes, random_hex};

/// Whom a JWT is for when nothing says otherwise.
pub(super) const SUBJECT: &str = "simulated-user";

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
    iat: f64,
    exp: f64,
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

    pub(super) fn mint(
        &mut self,
        algorithm: JwtAlgorithm,
        subject: &str,
        now: SystemTime,
        lifetime: Duration,
    ) -> String {
        let issued = since_epoch(now);
        let claims = Claims {
            sub: subject.to_owned(),
            iat: numeric_date(issued),
            exp: numeric_date(issued.saturating_add(lifetime)),
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

    /// One of its own, unchanged, that has not expired by `now`.
    pub(super) fn accepts(&self, jwt: &str, now: SystemTime) -> bool {
        let verify = || {
            let algorithm = decode_header(jwt).ok()?.alg;
            let keys = match algorithm {
                Algorithm::HS256 => &self.hs256,
                Algorithm::ES256 => &self.es256,
                _ => return None,
            };
            // `jsonwebtoken` reads the machine's clock, and whole seconds only.
            let mut validation = Validation::new(algorithm);
            validation.validate_exp = false;
            validation.required_spec_claims.clear();
            decode::<Claims>(jwt, &keys.verify, &validation).ok()
        };
        let now = since_epoch(now).as_millis() as f64;
        verify().is_some_and(|TokenData { claims, .. }| {
            // Rounded, as a fraction may come out of JSON a trifle off.
            (claims.exp * 1000.0).round() > now && !self.expired.contains(&claims.jti)
        })
    }
}

/// With a fraction, as [RFC 7519 section 2](https://www.rfc-editor.org/rfc/rfc7519#section-2) allows: a token
/// of two seconds lives for two, whenever in a second it was made.
fn numeric_date(since_epoch: Duration) -> f64 {
    since_epoch.as_millis() as f64 / 1000.0
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
    fn its_own_jwts_are_accepted_until_they_expire() {
        let now = at(0);
        for algorithm in [JwtAlgorithm::Hs256, JwtAlgorithm::Es256] {
            let mut issuer = Issuer::new();
            let jwt = issuer.mint(algorithm, SUBJECT, now, MINUTE);
            assert!(issuer.accepts(&jwt, now), "{algorithm:?}");
            assert!(!Issuer::new().accepts(&jwt, now), "another issuer's");
            issuer.expire_all();
            assert!(!issuer.accepts(&jwt, now), "expired");
            let next = issuer.mint(algorithm, SUBJECT, now, MINUTE);
            assert!(issuer.accepts(&next, now), "a new one");
        }
    }

    #[test]
    fn two_seconds_are_two_seconds_whenever_they_begin() {
        let mut issuer = Issuer::new();
        for begin in [0, 1, 500, 999] {
            let jwt = issuer.mint(JwtAlgorithm::Hs256, SUBJECT, at(begin), Duration::from_secs(2));
            assert!(issuer.accepts(&jwt, at(begin + 1_999)), "{begin}");
            assert!(!issuer.accepts(&jwt, at(begin + 2_000)), "{begin}");
        }
        let brief = issuer.mint(JwtAlgorithm::Hs256, SUBJECT, at(0), Duration::from_millis(5));
        assert!(issuer.accepts(&brief, at(4)) && !issuer.accepts(&brief, at(5)));
        let endless = issuer.mint(JwtAlgorithm::Hs256, SUBJECT, at(0), Duration::MAX);
        assert!(issuer.accepts(&endless, at(0)));
    }

    #[test]
    fn forged_jwts_are_not() {
        let mut issuer = Issuer::new();
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
