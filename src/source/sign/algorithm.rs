//! [`SigningAlgorithm`]: the supported JWS algorithms.

use jsonwebtoken::Algorithm;

/// The algorithm of a [`JwtSigner`](super::JwtSigner)
/// ([RFC 7518 section 3.1](https://www.rfc-editor.org/rfc/rfc7518#section-3.1),
/// [RFC 8037 section 3.1](https://www.rfc-editor.org/rfc/rfc8037#section-3.1)).
///
/// If you can choose, take [`EdDsa`](Self::EdDsa), which is also the fastest of the public-key algorithms, or
/// [`Es256`](Self::Es256): RSA in pure Rust is not constant-time
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

/// The kind of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Hmac,
    Rsa,
    P256,
    P384,
    Ed25519,
}

impl SigningAlgorithm {
    /// Returns the algorithm of `jsonwebtoken`, the kind of key that it needs, and the key's minimum length in bits.
    pub(super) fn parts(self) -> (Algorithm, Kind, usize) {
        match self {
            Self::Hs256 => (Algorithm::HS256, Kind::Hmac, 256),
            Self::Hs384 => (Algorithm::HS384, Kind::Hmac, 384),
            Self::Hs512 => (Algorithm::HS512, Kind::Hmac, 512),
            Self::Rs256 => (Algorithm::RS256, Kind::Rsa, 2048),
            Self::Rs384 => (Algorithm::RS384, Kind::Rsa, 2048),
            Self::Rs512 => (Algorithm::RS512, Kind::Rsa, 2048),
            Self::Ps256 => (Algorithm::PS256, Kind::Rsa, 2048),
            Self::Ps384 => (Algorithm::PS384, Kind::Rsa, 2048),
            Self::Ps512 => (Algorithm::PS512, Kind::Rsa, 2048),
            Self::Es256 => (Algorithm::ES256, Kind::P256, 256),
            Self::Es384 => (Algorithm::ES384, Kind::P384, 384),
            Self::EdDsa => (Algorithm::EdDSA, Kind::Ed25519, 256),
        }
    }
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Hmac => "an HMAC secret",
            Self::Rsa => "an RSA key",
            Self::P256 => "an EC key on P-256",
            Self::P384 => "an EC key on P-384",
            Self::Ed25519 => "an Ed25519 key",
        }
    }
}
