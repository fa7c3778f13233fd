//! [`VerifyingKeys`]: public keys, parsed from a JWK set or PEM, and the signatures that they verify.

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use ring::signature::{
    self, RsaParameters, RsaPublicKeyComponents, UnparsedPublicKey, VerificationAlgorithm,
};
use serde::Deserialize;
use serde_json::Value;
use spki::{
    Document, ObjectIdentifier, SubjectPublicKeyInfoRef,
    der::{Decode, NestedReader, Reader, SliceReader, asn1::UintRef},
};

use crate::error::ConfigErrorKind;

/// The smallest RSA key, in bits ([RFC 7518 section 3.3](https://www.rfc-editor.org/rfc/rfc7518#section-3.3)).
const MIN_RSA_BITS: usize = 2048;

const RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const EC: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const P256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");
const P384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.34");
const ED25519: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.101.112");

/// How a JWT is signed ([RFC 7518 section 3.1](https://www.rfc-editor.org/rfc/rfc7518#section-3.1)): the algorithms that are
/// accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Algorithm {
    Rs256,
    Rs384,
    Rs512,
    Ps256,
    Ps384,
    Ps512,
    Es256,
    Es384,
    Ed25519,
}

impl Algorithm {
    pub(super) fn of(name: &str) -> Option<Self> {
        Some(match name {
            "RS256" => Self::Rs256,
            "RS384" => Self::Rs384,
            "RS512" => Self::Rs512,
            "PS256" => Self::Ps256,
            "PS384" => Self::Ps384,
            "PS512" => Self::Ps512,
            "ES256" => Self::Es256,
            "ES384" => Self::Es384,
            // The second name is the newer one: RFC 9864 section 2.2.
            "EdDSA" | "Ed25519" => Self::Ed25519,
            _ => return None,
        })
    }
}

/// The keys of an issuer at one moment. There is at least one.
pub(super) struct VerifyingKeys(Vec<Key>);

struct Key {
    id: Option<String>,
    material: Material,
    /// The only algorithm that the key is for, if its publisher says so.
    only: Option<Algorithm>,
}

enum Material {
    Rsa {
        n: Vec<u8>,
        e: Vec<u8>,
    },
    /// An uncompressed point.
    P256(Vec<u8>),
    P384(Vec<u8>),
    Ed25519(Vec<u8>),
}

/// What the keys say about a signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Valid,
    /// The key that the JWT names does not verify it.
    Invalid,
    /// The key that the JWT names is not for this algorithm.
    WrongAlgorithm,
    /// The JWT names no key, or a key that is not among these, and none of those that it may mean verifies it.
    Unknown,
}

impl VerifyingKeys {
    /// Parses a JWK set or PEM.
    pub(super) fn parse(text: &[u8]) -> Result<Self, ConfigErrorKind> {
        let text = std::str::from_utf8(text).map_err(|_| ConfigErrorKind::NotUnicode)?;
        let text = text.trim_start_matches('\u{feff}').trim();
        let keys: Vec<Key> = match text {
            "" => return Err(ConfigErrorKind::Empty),
            text if text.starts_with('{') => from_jwks(text)?,
            text => from_pem(text)?,
        };
        if keys.is_empty() { Err(ConfigErrorKind::InvalidPublicKey) } else { Ok(Self(keys)) }
    }

    /// Checks a signature of `message`. `id` is the JWT's `kid`, which only ever chooses among these keys.
    pub(super) fn check(
        &self,
        id: Option<&str>,
        algorithm: Algorithm,
        message: &[u8],
        signature: &[u8],
    ) -> Verdict {
        let is_named = |key: &Key| id.is_some() && key.id.as_deref() == id;
        let mut verdict = Verdict::Unknown;
        // Several keys may have the same id: RFC 7517 section 4.5 recommends different ones, and does not demand them.
        for key in self.0.iter().filter(|key| is_named(key) || id.is_none() || key.id.is_none()) {
            let is_for_it = key.only.is_none_or(|only| only == algorithm);
            match is_for_it.then(|| key.material.verifies(algorithm, message, signature)).flatten() {
                Some(true) => return Verdict::Valid,
                Some(false) if is_named(key) => verdict = Verdict::Invalid,
                None if is_named(key) && verdict == Verdict::Unknown => verdict = Verdict::WrongAlgorithm,
                _ => {}
            }
        }
        verdict
    }
}

impl Material {
    /// `None` if the key is too short.
    fn rsa(n: Vec<u8>, e: Vec<u8>) -> Option<Self> {
        (n.len() * 8 >= MIN_RSA_BITS).then_some(Self::Rsa { n, e })
    }

    /// Parses `RSAPublicKey` ([RFC 8017 appendix A.1.1](https://www.rfc-editor.org/rfc/rfc8017#appendix-A.1.1)).
    fn rsa_from_der(key: &[u8]) -> Option<Self> {
        let numbers = |reader: &mut NestedReader<'_, SliceReader<'_>>| {
            Ok([UintRef::decode(reader)?, UintRef::decode(reader)?].map(|number| number.as_bytes().to_vec()))
        };
        let [n, e] = SliceReader::new(key).and_then(|mut reader| reader.sequence(numbers)).ok()?;
        Self::rsa(n, e)
    }

    /// Whether the signature matches; `None` if the algorithm is not one of this kind of key.
    fn verifies(&self, algorithm: Algorithm, message: &[u8], signature: &[u8]) -> Option<bool> {
        let verified = |algorithm: &'static dyn VerificationAlgorithm, key: &[u8]| {
            UnparsedPublicKey::new(algorithm, key).verify(message, signature).is_ok()
        };
        Some(match (self, algorithm) {
            (Self::Rsa { n, e }, _) => {
                RsaPublicKeyComponents { n, e }.verify(rsa(algorithm)?, message, signature).is_ok()
            }
            (Self::P256(key), Algorithm::Es256) => verified(&signature::ECDSA_P256_SHA256_FIXED, key),
            (Self::P384(key), Algorithm::Es384) => verified(&signature::ECDSA_P384_SHA384_FIXED, key),
            (Self::Ed25519(key), Algorithm::Ed25519) => verified(&signature::ED25519, key),
            _ => return None,
        })
    }
}

fn rsa(algorithm: Algorithm) -> Option<&'static RsaParameters> {
    Some(match algorithm {
        Algorithm::Rs256 => &signature::RSA_PKCS1_2048_8192_SHA256,
        Algorithm::Rs384 => &signature::RSA_PKCS1_2048_8192_SHA384,
        Algorithm::Rs512 => &signature::RSA_PKCS1_2048_8192_SHA512,
        Algorithm::Ps256 => &signature::RSA_PSS_2048_8192_SHA256,
        Algorithm::Ps384 => &signature::RSA_PSS_2048_8192_SHA384,
        Algorithm::Ps512 => &signature::RSA_PSS_2048_8192_SHA512,
        _ => return None,
    })
}

/// The parameters of a JWK that matter here ([RFC 7517 section 4](https://www.rfc-editor.org/rfc/rfc7517#section-4),
/// [RFC 7518 section 6](https://www.rfc-editor.org/rfc/rfc7518#section-6)).
#[derive(Deserialize)]
struct Jwk {
    kty: String,
    #[serde(rename = "use")]
    usage: Option<String>,
    key_ops: Option<Vec<String>>,
    alg: Option<String>,
    kid: Option<String>,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
}

/// The keys of a JWK set that can be used ([RFC 7517 section 5](https://www.rfc-editor.org/rfc/rfc7517#section-5): the
/// others are ignored).
fn from_jwks(text: &str) -> Result<Vec<Key>, ConfigErrorKind> {
    #[derive(Deserialize)]
    struct Set {
        keys: Vec<Value>,
    }
    let set: Set = serde_json::from_str(text).map_err(|_| ConfigErrorKind::InvalidPublicKey)?;
    // One by one, so that a malformed key does no harm to the others.
    let keys = set.keys.into_iter().filter_map(|key| serde_json::from_value(key).ok());
    Ok(keys.filter_map(from_jwk).collect())
}

fn from_jwk(key: Jwk) -> Option<Key> {
    // Whether the publisher says nothing to the contrary.
    let verifies = key.usage.is_none_or(|usage| usage == "sig")
        && key.key_ops.is_none_or(|operations| operations.iter().any(|operation| operation == "verify"));
    if !verifies {
        return None;
    }
    let decode = |text: &Option<String>| BASE64_URL_SAFE_NO_PAD.decode(text.as_ref()?).ok();
    let point = |size| point(&decode(&key.x)?, &decode(&key.y)?, size);
    let material = match (&*key.kty, key.crv.as_deref()) {
        // Some publishers put a zero in front of the modulus, against RFC 7518 section 6.3.1.1.
        ("RSA", _) => Material::rsa(
            decode(&key.n)?.into_iter().skip_while(|byte| *byte == 0).collect(),
            decode(&key.e)?,
        )?,
        ("EC", Some("P-256")) => Material::P256(point(32)?),
        ("EC", Some("P-384")) => Material::P384(point(48)?),
        ("OKP", Some("Ed25519")) => Material::Ed25519(decode(&key.x).filter(|x| x.len() == 32)?),
        _ => return None,
    };
    let only = match key.alg {
        None => None,
        Some(name) => Some(Algorithm::of(&name)?),
    };
    Some(Key { id: key.kid, material, only })
}

/// An uncompressed point: [SEC 1 section 2.3.3](https://www.secg.org/sec1-v2.pdf).
fn point(x: &[u8], y: &[u8], size: usize) -> Option<Vec<u8>> {
    let is_sized = x.len() == size && y.len() == size;
    is_sized.then(|| [&[4][..], x, y].concat())
}

/// All public keys in PEM: `PUBLIC KEY` ([RFC 7468 section 13](https://www.rfc-editor.org/rfc/rfc7468#section-13)) or
/// `RSA PUBLIC KEY`.
fn from_pem(text: &str) -> Result<Vec<Key>, ConfigErrorKind> {
    let starts = text.match_indices("-----BEGIN ").map(|(at, _)| at);
    let ends = starts.clone().skip(1).chain([text.len()]);
    let blocks = starts.zip(ends).map(|(start, end)| text[start..end].trim_end());
    blocks.map(|block| Ok(Key { id: None, material: from_block(block)?, only: None })).collect()
}

fn from_block(block: &str) -> Result<Material, ConfigErrorKind> {
    let invalid = ConfigErrorKind::InvalidPublicKey;
    let (label, document) = Document::from_pem(block).map_err(|_| invalid.clone())?;
    let material = match label {
        "RSA PUBLIC KEY" => Material::rsa_from_der(document.as_bytes()),
        "PUBLIC KEY" => {
            let key = SubjectPublicKeyInfoRef::try_from(document.as_bytes()).map_err(|_| invalid.clone())?;
            let bytes = key.subject_public_key.as_bytes().unwrap_or_default();
            let curve = || key.algorithm.parameters_oid().ok();
            let is_point = |size: usize| bytes.len() == 2 * size + 1 && bytes.first() == Some(&4);
            match key.algorithm.oid {
                RSA => Material::rsa_from_der(bytes),
                EC if curve() == Some(P256) && is_point(32) => Some(Material::P256(bytes.to_vec())),
                EC if curve() == Some(P384) && is_point(48) => Some(Material::P384(bytes.to_vec())),
                ED25519 if bytes.len() == 32 => Some(Material::Ed25519(bytes.to_vec())),
                _ => None,
            }
        }
        _ => None,
    };
    material.ok_or(invalid)
}
