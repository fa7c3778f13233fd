//! [`SealingKey`]: encrypts records, so that a store and its backups hold no secrets.

use std::{fmt, path::Path};

use base64::{Engine as _, prelude::BASE64_STANDARD_NO_PAD};
use chacha20poly1305::{
    KeyInit, XChaCha20Poly1305,
    aead::{Aead, Payload},
};
use sha2::{Digest, Sha256};
use zeroize::{Zeroize, Zeroizing};

use crate::{
    credential::env,
    error::{ConfigError, ConfigErrorKind, Place, Setting},
};

const FORMAT: u8 = 1;
const KEY_ID: usize = 4;
const NONCE: usize = 24;
const HEAD: usize = 1 + KEY_ID + NONCE;

/// Longer than any sensible file of keys.
const MAX_FILE_KIB: usize = 64;

/// The key that a fleet's members seal their records with, by XChaCha20-Poly1305
/// ([draft-irtf-cfrg-xchacha](https://datatracker.ietf.org/doc/draft-irtf-cfrg-xchacha/)). Redacted in `Debug` and wiped on
/// drop.
///
/// All members need the same key. A record is bound to its fleet and its name, so it cannot be moved to another.
///
/// ```console
/// $ openssl rand -base64 32 > fleet-key
/// ```
///
/// ```
/// use tower_selam::fleet::SealingKey;
///
/// let key = SealingKey::from_base64("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=")?;
/// assert_eq!(format!("{key:?}"), "SealingKey([redacted] id=630dcd29)");
/// # Ok::<(), tower_selam::ConfigError>(())
/// ```
///
/// # Rotation
///
/// Give every member the new key with [`FleetBuilder::with_former_key`](super::FleetBuilder::with_former_key) first; then make it the key of
/// every member, and the old one the former key; then drop the old one. A member without the key of a record neither uses nor
/// replaces it.
#[derive(Clone)]
pub struct SealingKey {
    id: [u8; KEY_ID],
    key: Zeroizing<[u8; 32]>,
}

impl SealingKey {
    /// Makes a key of 32 random bytes.
    #[must_use]
    pub fn new(key: [u8; 32]) -> Self {
        let digest = Sha256::digest(key);
        let id = std::array::from_fn(|index| digest[index]);
        Self { id, key: Zeroizing::new(key) }
    }

    /// Reads a key of 32 bytes in base64, with or without padding. Trims surrounding white space.
    ///
    /// # Errors
    ///
    /// Fails if the text is empty, or not 32 bytes in base64. The error does not contain it.
    pub fn from_base64(text: &str) -> Result<Self, ConfigError> {
        Self::parse(text).map_err(|kind| ConfigError::new(Setting::SealingKey, Place::Argument, kind))
    }

    /// Reads the key from a file that holds it in base64.
    ///
    /// # Errors
    ///
    /// Fails if the file cannot be read, or as [`from_base64`](Self::from_base64); the error names the file.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        let path = path.as_ref();
        let read = || {
            let unreadable = |error: std::io::Error| ConfigErrorKind::Unreadable { error: error.kind() };
            let size = std::fs::metadata(path).map_err(unreadable)?.len();
            if size > MAX_FILE_KIB as u64 * 1024 {
                return Err(ConfigErrorKind::TooLong { max_kib: MAX_FILE_KIB });
            }
            let bytes = Zeroizing::new(std::fs::read(path).map_err(unreadable)?);
            Self::parse(std::str::from_utf8(&bytes).map_err(|_| ConfigErrorKind::NotUnicode)?)
        };
        read().map_err(|kind| ConfigError::new(Setting::SealingKey, Place::File(path.to_owned()), kind))
    }

    /// Reads the key, in base64, from an environment variable.
    ///
    /// # Errors
    ///
    /// Fails if the variable is not set, or as [`from_base64`](Self::from_base64); the error names the variable.
    pub fn from_env_var(name: &str) -> Result<Self, ConfigError> {
        let key = env::var(name).and_then(|value| Self::parse(&Zeroizing::new(value)));
        key.map_err(|kind| ConfigError::new(Setting::SealingKey, Place::EnvVar(name.to_owned()), kind))
    }

    fn parse(text: &str) -> Result<Self, ConfigErrorKind> {
        let text = text.trim().trim_end_matches('=');
        if text.is_empty() {
            return Err(ConfigErrorKind::Empty);
        }
        let bytes = Zeroizing::new(
            BASE64_STANDARD_NO_PAD.decode(text).map_err(|_| ConfigErrorKind::InvalidSealingKey)?,
        );
        let mut key: [u8; 32] =
            bytes.as_slice().try_into().map_err(|_| ConfigErrorKind::InvalidSealingKey)?;
        let parsed = Self::new(key);
        key.zeroize();
        Ok(parsed)
    }

    fn cipher(&self) -> XChaCha20Poly1305 {
        XChaCha20Poly1305::new((&*self.key).into())
    }
}

impl fmt::Debug for SealingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SealingKey([redacted] id={:08x})", u32::from_be_bytes(self.id))
    }
}

/// The keys of a fleet: the first seals, any opens.
#[derive(Clone, Debug)]
pub(super) struct SealingKeys(pub(super) Vec<SealingKey>);

/// Why a record cannot be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SealError {
    /// None of the keys sealed it.
    UnknownKey,
    /// A newer version of this crate wrote it.
    NewerFormat,
    /// It was changed, or belongs to another name.
    Corrupt,
}

impl SealError {
    /// The stable name in events.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::UnknownKey => "unknown_key",
            Self::NewerFormat => "newer_format",
            Self::Corrupt => "corrupt",
        }
    }
}

impl SealingKeys {
    /// Seals a record: format, key id, nonce, ciphertext and tag. `name` is authenticated with it.
    pub(super) fn seal(&self, name: &[u8], record: &[u8]) -> Result<Vec<u8>, getrandom::Error> {
        let key = &self.0[0];
        let mut nonce = [0; NONCE];
        // Not from a generator that can be predicted, or forks with its process.
        getrandom::fill(&mut nonce)?;
        let mut sealed = Vec::with_capacity(HEAD + record.len() + 16);
        sealed.push(FORMAT);
        sealed.extend(key.id);
        sealed.extend(nonce);
        let aad = [&sealed[..1 + KEY_ID], name].concat();
        let payload = Payload { msg: record, aad: &aad };
        let text = key.cipher().encrypt((&nonce).into(), payload);
        // It fails for messages of 256 GiB alone.
        sealed.extend(text.unwrap_or_default());
        Ok(sealed)
    }

    /// Whether another key than the first sealed this.
    pub(super) fn is_former(&self, sealed: &[u8]) -> bool {
        sealed.get(1..=KEY_ID).is_some_and(|id| *id != self.0[0].id)
    }

    /// Opens what [`seal`](Self::seal) made.
    pub(super) fn open(&self, name: &[u8], sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let (head, text) = sealed.split_at_checked(HEAD).ok_or(SealError::Corrupt)?;
        if head[0] > FORMAT {
            return Err(SealError::NewerFormat);
        }
        let (context, nonce) = head.split_at(1 + KEY_ID);
        let nonce: &[u8; NONCE] = nonce.try_into().map_err(|_| SealError::Corrupt)?;
        let key = self.0.iter().find(|key| key.id == context[1..]).ok_or(SealError::UnknownKey)?;
        let aad = [context, name].concat();
        let payload = Payload { msg: text, aad: &aad };
        key.cipher().decrypt(nonce.into(), payload).map(Zeroizing::new).map_err(|_| SealError::Corrupt)
    }
}

/// Returns 128 random bits.
pub(super) fn random() -> Result<[u8; 16], getrandom::Error> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn keys(bytes: &[u8]) -> SealingKeys {
        SealingKeys(bytes.iter().map(|byte| SealingKey::new([*byte; 32])).collect())
    }

    /// The vector of draft-irtf-cfrg-xchacha-03, appendix A.3.1.
    #[test]
    fn the_cipher_is_xchacha20_poly1305() {
        let key: [u8; 32] = std::array::from_fn(|index| 0x80 + u8::try_from(index).unwrap());
        let nonce: [u8; 24] = std::array::from_fn(|index| 0x40 + u8::try_from(index).unwrap());
        let aad = [0x50, 0x51, 0x52, 0x53, 0xc0, 0xc1, 0xc2, 0xc3, 0xc4, 0xc5, 0xc6, 0xc7];
        let msg = b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, sunscreen would be it.";
        let payload = Payload { msg: msg.as_slice(), aad: &aad };
        let text = SealingKey::new(key).cipher().encrypt((&nonce).into(), payload).unwrap();
        assert_eq!(text[..4], [0xbd, 0x6d, 0x17, 0x9d]);
        let tag = 0xc087_5924_c1c7_9879_47de_afd8_780a_cf49_u128;
        assert_eq!(text[msg.len()..], tag.to_be_bytes());
    }

    /// N3
    #[test]
    fn former_keys_open_and_other_keys_do_not() {
        let sealed = keys(&[1]).seal(b"name", b"record").unwrap();
        assert_eq!(**keys(&[2, 1]).open(b"name", &sealed).unwrap(), *b"record");
        assert_eq!(keys(&[2]).open(b"name", &sealed), Err(SealError::UnknownKey));
        assert_eq!(keys(&[1]).open(b"other", &sealed), Err(SealError::Corrupt));
        let newer = [&[FORMAT + 1], &sealed[1..]].concat();
        assert_eq!(keys(&[1]).open(b"name", &newer), Err(SealError::NewerFormat));
    }

    /// S1: the error names neither text nor length.
    #[test]
    fn invalid_keys_are_refused() {
        let valid = BASE64_STANDARD_NO_PAD.encode([9; 32]);
        assert!(SealingKey::from_base64(&format!(" {valid}=\n")).is_ok());
        for text in ["", "  \n", "secret", &valid[..20], &format!("{valid}{valid}"), "§§§§"] {
            let error = SealingKey::from_base64(text).unwrap_err().to_string();
            assert!(text.trim().is_empty() || !error.contains(text.trim()), "{error}");
        }
    }

    proptest! {
        /// N3
        #[test]
        fn changed_records_do_not_open(record in any::<Vec<u8>>(), at in any::<prop::sample::Index>(), bit in 0..8_u8) {
            let keys = keys(&[1]);
            let mut sealed = keys.seal(b"name", &record).unwrap();
            prop_assert_eq!(&**keys.open(b"name", &sealed).unwrap(), &record);
            let at = at.index(sealed.len());
            sealed[at] ^= 1_u8 << bit;
            prop_assert!(keys.open(b"name", &sealed).is_err());
            prop_assert!(keys.open(b"name", &sealed[..at]).is_err());
        }

        /// N3
        #[test]
        fn no_bytes_cause_a_panic(sealed in any::<Vec<u8>>()) {
            prop_assert!(keys(&[1]).open(b"name", &sealed).is_err());
        }
    }
}
