//! [`SigningKey`]: HMAC secrets, and private keys read from PEM.

use std::{fmt, path::Path, sync::Arc};

use base64::{Engine as _, prelude::BASE64_STANDARD};
// Named explicitly: `jsonwebtoken::encode` uses the process-wide default, which panics in a program that
// enables two backends and selects neither.
use jsonwebtoken::{Algorithm, EncodingKey, crypto::rust_crypto::DEFAULT_PROVIDER as BACKEND};
use p256::elliptic_curve::rand_core::OsRng;
use rsa::{Pkcs1v15Sign, RsaPrivateKey, pkcs1::DecodeRsaPrivateKey, traits::PublicKeyParts};
use sec1::{
    DecodeEcPrivateKey,
    der::SecretDocument,
    pkcs8::{self, DecodePrivateKey, ObjectIdentifier, PrivateKeyInfo},
};
use secrecy::{ExposeSecret, SecretSlice, SecretString};
use zeroize::Zeroizing;

use super::{SigningAlgorithm, algorithm::Kind};
use crate::{
    error::{BoxError, ConfigError, ConfigErrorKind, Place, Setting},
    source::{SettledFile, file},
};

/// The key of a [`JwtSigner`](super::JwtSigner).
///
/// `Debug` shows only its kind. Clones share one key, which is wiped when the last clone drops.
///
/// ```
/// use tower_selam::{ConfigErrorKind, source::SigningKey};
///
/// assert_eq!(format!("{:?}", SigningKey::hmac("a secret")), "SigningKey([redacted] an HMAC secret)");
///
/// let error = SigningKey::from_pem("-----BEGIN PUBLIC KEY-----").unwrap_err();
/// assert_eq!(error.kind(), &ConfigErrorKind::InvalidKey);
/// ```
#[derive(Clone)]
pub struct SigningKey {
    key: Arc<Key>,
    place: Place,
}

impl SigningKey {
    /// Takes a secret shared with the API, byte for byte. Use random bytes, as many as the hash has.
    #[must_use]
    pub fn hmac(secret: impl Into<HmacSecret>) -> Self {
        let secret = secret.into();
        let secret = secret.0.expose_secret();
        let key =
            Key { kind: Kind::Hmac, bits: secret.len() * 8, encoding: EncodingKey::from_secret(secret) };
        Self { key: Arc::new(key), place: Place::Argument }
    }

    /// Parses an unencrypted private key in PEM: RSA of up to 4096 bits, EC on P-256 or P-384, or Ed25519, in
    /// PKCS#8 (`PRIVATE KEY`), PKCS#1 (`RSA PRIVATE KEY`) or SEC1 (`EC PRIVATE KEY`).
    ///
    /// # Errors
    ///
    /// Fails if `pem` holds no such key. The error never contains the key.
    pub fn from_pem(pem: impl Into<SecretString>) -> Result<Self, ConfigError> {
        Self::new(Key::from_pem(pem.into().expose_secret()), Place::Argument)
    }

    /// Reads a private key from a PEM file, once. See [`from_pem`](Self::from_pem).
    ///
    /// # Errors
    ///
    /// Fails if the file cannot be read or holds no such key. The error names the file.
    pub fn from_pem_file(path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        let path = path.as_ref();
        let pem = SettledFile::new(path).read_blocking();
        let key = pem.and_then(|pem| Key::from_pem(file::text(&pem)?));
        Self::new(key, Place::File(path.to_owned()))
    }

    fn new(key: Result<Key, ConfigErrorKind>, place: Place) -> Result<Self, ConfigError> {
        match key {
            Ok(key) => Ok(Self { key: Arc::new(key), place }),
            Err(kind) => Err(ConfigError::new(Setting::SigningKey, place, kind)),
        }
    }

    /// Checks that the key is of the kind and length that `algorithm` needs.
    pub(super) fn check(&self, algorithm: SigningAlgorithm) -> Result<(), ConfigError> {
        let (kind, (_, needed, least)) = (self.key.kind, algorithm.parts());
        let error = if kind != needed {
            ConfigErrorKind::WrongAlgorithm { key: kind.name(), needed: needed.name() }
        } else if self.key.bits < least {
            ConfigErrorKind::TooShort { min_bits: least }
        } else {
            return Ok(());
        };
        Err(ConfigError::new(Setting::SigningKey, self.place.clone(), error))
    }

    /// Signs `message`. The signature is wiped on drop because it completes a usable token.
    pub(super) fn sign(&self, algorithm: Algorithm, message: &[u8]) -> Result<Zeroizing<Vec<u8>>, BoxError> {
        let signer = (BACKEND.signer_factory)(&algorithm, &self.key.encoding)?;
        Ok(Zeroizing::new(signer.try_sign(message)?))
    }

    /// Returns whether a signature takes milliseconds rather than microseconds.
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

/// The secret of an HMAC key, made from text, bytes or a `secrecy` type. See [`SigningKey::hmac`].
#[derive(Clone, Debug)]
pub struct HmacSecret(SecretSlice<u8>);

impl_from! {
    HmacSecret: [] SecretSlice<u8>, secret => Self(secret);
    HmacSecret: [] SecretString, secret => Self(secret.expose_secret().as_bytes().to_vec().into());
    HmacSecret: [] Vec<u8>, secret => Self(secret.into());
    HmacSecret: [] String, secret => Self(secret.into_bytes().into());
    HmacSecret: [] &[u8], secret => Self(secret.to_vec().into());
    HmacSecret: [] &str, secret => Self(secret.as_bytes().to_vec().into());
    HmacSecret: [const N: usize] [u8; N], secret => Self(Zeroizing::new(secret).to_vec().into());
    HmacSecret: [const N: usize] &[u8; N], secret => Self(secret.to_vec().into());
}

/// Finds the first private key among the blocks of `pem` and returns its label and DER. Other blocks may precede
/// it: OpenSSL writes `EC PARAMETERS`.
///
/// Hand-written because PEM crates either insist on lines of 64 characters with nothing around them, or leave
/// unwiped copies of the key behind.
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
        // PKCS#8 marks encryption in the label, OpenSSL's older form in a header (RFC 1421 section 4.6.1.1).
        if label.starts_with("ENCRYPTED") || body.contains(",ENCRYPTED") {
            return Err(ConfigErrorKind::Encrypted);
        }
        // Any white space is accepted, because keys get pasted, indented and joined into one line.
        let mut base64 = Zeroizing::new(String::with_capacity(body.len()));
        base64.extend(body.split_ascii_whitespace());
        let der = BASE64_STANDARD.decode(base64.as_bytes()).map_err(|_| ConfigErrorKind::InvalidKey)?;
        return Ok((label, Zeroizing::new(der)));
    }
    Err(ConfigErrorKind::InvalidKey)
}

/// Splits `pem` into the label of its first block
/// ([RFC 7468 section 2](https://www.rfc-editor.org/rfc/rfc7468#section-2)), the body, and the rest.
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
    /// RSA as PKCS#1, EC and Ed25519 as PKCS#8: the forms that `jsonwebtoken` expects. Wiped on drop.
    encoding: EncodingKey,
}

impl Key {
    fn from_pem(pem: &str) -> Result<Self, ConfigErrorKind> {
        let (label, der) = private_key(pem)?;
        let key = match label {
            "PRIVATE KEY" => Self::from_pkcs8_der(&der).ok(),
            "RSA PRIVATE KEY" => Self::rsa(&der),
            // `sec1` converts it to PKCS#8.
            "EC PRIVATE KEY" => Self::from_sec1_der(&der).ok(),
            _ => None,
        };
        key.ok_or(ConfigErrorKind::InvalidKey)
    }

    fn rsa(der: &[u8]) -> Option<Self> {
        let key = RsaPrivateKey::from_pkcs1_der(der).ok()?;
        // A trial signature catches a modulus whose factors are not prime, on which `jsonwebtoken` would panic.
        key.sign_with_rng(&mut OsRng, Pkcs1v15Sign::new_unprefixed(), &[]).ok()?;
        Some(Self { kind: Kind::Rsa, bits: key.n().bits(), encoding: EncodingKey::from_rsa_der(der) })
    }

    fn elliptic(kind: Kind, bits: usize, algorithm: Algorithm, encoding: EncodingKey) -> Option<Self> {
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
            (EC, Ok(P256)) => Self::elliptic(Kind::P256, 256, Algorithm::ES256, ec(pkcs8.as_bytes())),
            (EC, Ok(P384)) => Self::elliptic(Kind::P384, 384, Algorithm::ES384, ec(pkcs8.as_bytes())),
            (ED25519, _) => Self::elliptic(Kind::Ed25519, 256, Algorithm::EdDSA, ed(pkcs8.as_bytes())),
            _ => None,
        };
        key.ok_or(pkcs8::Error::KeyMalformed)
    }
}
