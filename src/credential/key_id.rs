//! Short names for secrets, derived from their SHA-256.

use std::fmt;

use sha2::{Digest, Sha256};

/// The SHA-256 of a secret: tells two secrets apart without keeping either.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fingerprint([u8; 32]);

impl Fingerprint {
    pub(crate) fn of(secret: &[u8]) -> Self {
        Self(Sha256::digest(secret).into())
    }

    /// The first 64 bits, as a number.
    pub(crate) fn number(&self) -> u64 {
        self.0.iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    /// The first 128 bits.
    #[cfg(feature = "fleet")]
    pub(crate) fn first_half(&self) -> [u8; 16] {
        std::array::from_fn(|index| self.0[index])
    }

    pub(crate) fn id(&self) -> KeyId {
        let [a, b, c, ..] = self.0;
        KeyId([a, b, c])
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.id(), f)
    }
}

/// A short name for a credential, to tell credentials apart in logs and metrics without printing them.
///
/// The first 24 bits of the secret's SHA-256 in hex: the same on every machine and in every version, and too short to
/// learn the secret from. To compute the id of a key:
///
/// ```console
/// $ printf %s "$SELAM_API_KEY" | sha256sum | cut -c1-6
/// ```
///
/// ```
/// use tower_selam::ApiKey;
///
/// let key = ApiKey::new("sk-selam-example")?;
/// assert_eq!(key.id().to_string(), "9da0f3");
/// # Ok::<(), tower_selam::ConfigError>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId([u8; 3]);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c] = self.0;
        write!(f, "{a:02x}{b:02x}{c:02x}")
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyId({self})")
    }
}
