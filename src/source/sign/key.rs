use std::{fmt, path::Path, sync::Arc};

use base64::{Engine as _, prelude::BASE64_STANDARD};
// By name: the default, by which `jsonwebtoken::encode` signs, panics where a program has two backends and
// chose none.
use jsonwebtoken::{Algorithm, EncodingKey, crypto::rust_crypto::DEFAULT_PROVIDER as BACKEND};
use p256::elliptic_curve::rand_core::OsRng;
use rsa::{Pkcs1v15Sign, RsaPrivateKey, pkcs1::DecodeRsaPrivateKey, traits::PublicKeyParts};
use sec1::{
    DecodeEcPrivateKey,
    der::SecretDocument,
    pkcs8::{self, DecodePrivateKey, ObjectIdentifier, PrivateKeyInfo},
};
use zeroize::Zeroizing;

use super::{super::file, SigningAlgorithm};
use crate::{
    BoxError, ConfigError, ConfigErrorKind,
    error::{Place, Subject},
};

/// What a [`JwtSigner`](super::JwtSigner) signs with.
///
/// `Debug` shows its kind alone. Clones share one key, which is wiped when the last of them drops.
///
/// ```
/// use tower_selam::{ConfigErrorKind, source::SigningKey};
///
/// assert_eq!(format!("{:?}", SigningKey::hmac("a secret")), "SigningKey([redacted] an HMAC secret)");
///
/// let error = SigningKey::from_pem("-----BEGIN PUBLIC KEY-----").unwrap_err();
/// assert_eq!(error.kind(), ConfigErrorKind::InvalidKey);
/// ```
#[derive(Clone)]
pub struct SigningKey {
    key: Arc<Key>,
    place: Place,
}

impl SigningKey {
    /// A secret shared with the API, byte for byte: of random bytes, as many as the hash has.
    #[must_use]
    pub fn hmac(secret: impl AsRef<[u8]>) -> Self {
        let secret = secret.as_ref();
        let key =
            Key { kind: Kind::Hmac, bits: secret.len() * 8, encoding: EncodingKey::from_secret(secret) };
        Self { key: Arc::new(key), place: Place::Argument }
    }

    /// A private key in PEM: RSA of up to 4096 bits, EC on P-256 or P-384, or Ed25519, in PKCS#8
    /// (`PRIVATE KEY`), PKCS#1 (`RSA PRIVATE KEY`) or SEC1 (`EC PRIVATE KEY`), not encrypted.
    ///
    /// # Errors
    ///
    /// When it is none. The error never holds the key.
    pub fn from_pem(pem: &str) -> Result<Self, ConfigError> {
        Self::parse(pem, Place::Argument)
    }

    /// The same in a file, read now and not again.
    ///
    /// # Errors
    ///
    /// When the file cannot be read, or as for [`from_pem`](Self::from_pem); the error names the file.
    pub fn from_pem_file(path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        let path = path.as_ref();
        let place = Place::File(path.to_owned());
        match file::read(path) {
            Ok(pem) => Self::parse(&Zeroizing::new(pem), place),
            Err(kind) => Err(ConfigError::new(Subject::SigningKey, place, kind)),
        }
    }

    fn parse(pem: &str, place: Place) -> Result<Self, ConfigError> {
        let parsed = private_key(pem)
            .and_then(|(label, der)| Key::parse(label, &der).ok_or(ConfigErrorKind::InvalidKey));
        match parsed {
            Ok(key) => Ok(Self { key: Arc::new(key), place }),
            Err(kind) => Err(ConfigError::new(Subject::SigningKey, place, kind)),
        }
    }

    /// Whether the algorithm signs with such a key.
    pub(super) fn check(&self, algorithm: SigningAlgorithm) -> Result<(), ConfigError> {
        let (kind, (needed, least)) = (self.key.kind, Kind::of(algorithm));
        let error = if kind != needed {
            ConfigErrorKind::WrongAlgorithm { key: kind.name(), needed: needed.name() }
        } else if self.key.bits < least {
            ConfigErrorKind::TooShort { least }
        } else {
            return Ok(());
        };
        Err(ConfigError::new(Subject::SigningKey, self.place.clone(), error))
    }

    /// The signature of `message`. Who has it has a token.
    pub(super) fn sign(&self, algorithm: Algorithm, message: &[u8]) -> Result<Zeroizing<Vec<u8>>, BoxError> {
        let signer = (BACKEND.signer_factory)(&algorithm, &self.key.encoding)?;
        Ok(Zeroizing::new(signer.try_sign(message)?))
    }

    /// Whether a signature takes about a millisecond, or several, rather than microseconds.
    pub(super) fn is_slow(&self) -> bool {
        match self.key.kind {
            Kind::Hmac | Kind::Ed25519 => false,
            Kind::Rsa | Kind::P256 | Kind::P384 => true,
        }
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey([redacted] {})", self.key.kind.name())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Hmac,
    Rsa,
    P256,
    P384,
    Ed25519,
}

impl Kind {
    /// What an algorithm signs with, and how many bits of it at least.
    fn of(algorithm: SigningAlgorithm) -> (Self, usize) {
        use SigningAlgorithm::*;
        match algorithm {
            Hs256 => (Self::Hmac, 256),
            Hs384 => (Self::Hmac, 384),
            Hs512 => (Self::Hmac, 512),
            Rs256 | Rs384 | Rs512 | Ps256 | Ps384 | Ps512 => (Self::Rsa, 2048),
            Es256 => (Self::P256, 256),
            Es384 => (Self::P384, 384),
            EdDsa => (Self::Ed25519, 256),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Hmac => "an HMAC secret",
            Self::Rsa => "an RSA key",
            Self::P256 => "an EC key on P-256",
            Self::P384 => "an EC key on P-384",
            Self::Ed25519 => "an Ed25519 key",
        }
    }
}

/// The label and content of the first private key among the blocks of `pem`; OpenSSL writes `EC PARAMETERS`
/// before it.
///
/// Crates that read PEM either insist on lines of 64 characters and nothing around them, or leave copies of the
/// key behind.
fn private_key(pem: &str) -> Result<(&str, Zeroizing<Vec<u8>>), ConfigErrorKind> {
    if pem.trim().is_empty() {
        return Err(ConfigErrorKind::Empty);
    }
    let mut rest = pem;
    while let Some((label, body, after)) = block(rest) {
        rest = after;
        if !label.ends_with("PRIVATE KEY") {
            continue;
        }
        // PKCS#8 says it in the label, OpenSSL's older form in a header (RFC 1421 section 4.6.1.1).
        if label.starts_with("ENCRYPTED") || body.contains(",ENCRYPTED") {
            return Err(ConfigErrorKind::Encrypted);
        }
        // Any white space: keys are pasted, indented and put on one line.
        let mut base64 = Zeroizing::new(String::with_capacity(body.len()));
        base64.extend(body.split_ascii_whitespace());
        let der = BASE64_STANDARD.decode(base64.as_bytes()).map_err(|_| ConfigErrorKind::InvalidKey)?;
        return Ok((label, Zeroizing::new(der)));
    }
    Err(ConfigErrorKind::InvalidKey)
}

/// The first block of `pem` ([RFC 7468 section 2](https://www.rfc-editor.org/rfc/rfc7468#section-2)): its
/// label, its body, and what follows.
fn block(pem: &str) -> Option<(&str, &str, &str)> {
    let (_, pem) = pem.split_once("-----BEGIN ")?;
    let (label, pem) = pem.split_once("-----")?;
    let (body, after) = pem.split_once("-----END ")?;
    Some((label, body, after))
}

const RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const EC: ObjectIdentifier = sec1::ALGORITHM_OID;
const P256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");
const P384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.34");
const ED25519: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.101.112");

struct Key {
    kind: Kind,
    bits: usize,
    /// RSA in PKCS#1, EC and Ed25519 in PKCS#8: so `jsonwebtoken` takes them. Wipes itself.
    encoding: EncodingKey,
}

impl Key {
    fn parse(label: &str, der: &[u8]) -> Option<Self> {
        match label {
            "PRIVATE KEY" => Self::from_pkcs8_der(der).ok(),
            "RSA PRIVATE KEY" => Self::rsa(der),
            // `sec1` wraps it in PKCS#8.
            "EC PRIVATE KEY" => Self::from_sec1_der(der).ok(),
            _ => None,
        }
    }

    fn rsa(der: &[u8]) -> Option<Self> {
        let key = RsaPrivateKey::from_pkcs1_der(der).ok()?;
        // Of primes that are none it shows in a signature, on which `jsonwebtoken` would panic.
        key.sign_with_rng(&mut OsRng, Pkcs1v15Sign::new_unprefixed(), &[]).ok()?;
        Some(Self { kind: Kind::Rsa, bits: key.n().bits(), encoding: EncodingKey::from_rsa_der(der) })
    }

    fn other(kind: Kind, bits: usize, algorithm: Algorithm, encoding: EncodingKey) -> Option<Self> {
        (BACKEND.signer_factory)(&algorithm, &encoding).ok()?;
        Some(Self { kind, bits, encoding })
    }
}

impl TryFrom<PrivateKeyInfo<'_>> for Key {
    type Error = pkcs8::Error;

    fn try_from(info: PrivateKeyInfo<'_>) -> pkcs8::Result<Self> {
        let pkcs8 = SecretDocument::try_from(&info)?;
        let (ec, ed) = (EncodingKey::from_ec_der, EncodingKey::from_ed_der);
        let key = match (info.algorithm.oid, info.algorithm.parameters_oid()) {
            (RSA, _) => Self::rsa(info.private_key),
            (EC, Ok(P256)) => Self::other(Kind::P256, 256, Algorithm::ES256, ec(pkcs8.as_bytes())),
            (EC, Ok(P384)) => Self::other(Kind::P384, 384, Algorithm::ES384, ec(pkcs8.as_bytes())),
            (ED25519, _) => Self::other(Kind::Ed25519, 256, Algorithm::EdDSA, ed(pkcs8.as_bytes())),
            _ => None,
        };
        key.ok_or(pkcs8::Error::KeyMalformed)
    }
}
