//! The bytes behind an API key or a token: one wiped buffer and the header values that share it.

use std::{
    mem,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::HeaderValue;
use zeroize::Zeroizing;

use super::{Fingerprint, KeyId, claims};
use crate::{
    error::{ConfigError, ConfigErrorKind, Place, Setting},
    util::per_thread::{CacheAligned, Unshare},
};

const SCHEME: &str = "Bearer ";

const KEY_PREFIX: &str = "sk-selam-";

/// An API key or a token, validated. Clones share one buffer, `Bearer <secret>`, and so do the header values that are
/// made from it; the buffer is wiped when the last of them is dropped.
#[derive(Clone)]
pub(crate) struct Secret(Arc<Inner>);

struct Inner {
    bearer: HeaderValue,
    /// An API key without the scheme. Boxed, because there may be many tokens.
    bare: Option<Box<HeaderValue>>,
    fingerprint: Fingerprint,
    expires_at: Option<SystemTime>,
}

impl Secret {
    pub(crate) fn new(value: &str, setting: Setting, place: Place) -> Result<Self, ConfigError> {
        Self::parse(value, setting).map_err(|kind| ConfigError::new(setting, place, kind))
    }

    pub(crate) fn from_env_var(name: &str, setting: Setting) -> Result<Self, ConfigError> {
        let secret = super::env::var(name).and_then(|value| Self::parse(&Zeroizing::new(value), setting));
        secret.map_err(|kind| ConfigError::new(setting, Place::EnvVar(name.to_owned()), kind))
    }

    fn parse(value: &str, setting: Setting) -> Result<Self, ConfigErrorKind> {
        let secret = match setting {
            Setting::ClientSecret => text(value)?,
            _ => checked(value)?,
        };
        // Each in the other's place would be noticed by the API only, with a 401.
        match setting {
            Setting::ApiKey if is_jwt(secret) => return Err(ConfigErrorKind::IsJwt),
            Setting::Token if secret.starts_with(KEY_PREFIX) => return Err(ConfigErrorKind::IsApiKey),
            _ => {}
        }

        // Sized up front: a buffer that grows leaves unwiped copies behind.
        let mut buffer = Zeroizing::new(Vec::with_capacity(SCHEME.len() + secret.len()));
        buffer.extend_from_slice(SCHEME.as_bytes());
        buffer.extend_from_slice(secret.as_bytes());
        // The capacity equals the length, so this does not reallocate.
        let buffer = Bytes::from_owner(Zeroizing::new(mem::take(&mut *buffer).into_boxed_slice()));

        let expires_at = if setting == Setting::Token { claims::expires_at(secret) } else { None };
        Self::from_buffer(buffer, setting == Setting::ApiKey, Fingerprint::of(secret.as_bytes()), expires_at)
    }

    fn from_buffer(
        buffer: Bytes,
        has_bare: bool,
        fingerprint: Fingerprint,
        expires_at: Option<SystemTime>,
    ) -> Result<Self, ConfigErrorKind> {
        let bare = if has_bare { Some(Box::new(sensitive(buffer.slice(SCHEME.len()..))?)) } else { None };
        Ok(Self(Arc::new(Inner { bearer: sensitive(buffer)?, bare, fingerprint, expires_at })))
    }

    /// `Bearer <secret>`, marked sensitive.
    #[inline]
    pub(crate) fn bearer(&self) -> &HeaderValue {
        &self.0.bearer
    }

    /// An API key without the scheme, marked sensitive.
    #[inline]
    pub(crate) fn bare(&self) -> &HeaderValue {
        self.0.bare.as_deref().unwrap_or(&self.0.bearer)
    }

    /// When a token expires by its `exp` claim.
    pub(crate) fn expires_at(&self) -> Option<SystemTime> {
        self.0.expires_at
    }

    /// The time from `iat` to `exp`, if it is a JWT with both claims.
    pub(crate) fn lifetime(&self) -> Option<Duration> {
        self.0.expires_at.and_then(|_| claims::lifetime(self.expose()))
    }

    /// The secret alone. It is ASCII: `parse` checked it.
    pub(crate) fn expose(&self) -> &str {
        let secret = self.0.bearer.as_bytes().get(SCHEME.len()..).unwrap_or_default();
        std::str::from_utf8(secret).unwrap_or_default()
    }

    pub(crate) fn id(&self) -> KeyId {
        self.0.fingerprint.id()
    }

    pub(crate) fn fingerprint(&self) -> Fingerprint {
        self.0.fingerprint
    }
}

impl Unshare for Secret {
    fn unshare(&self) -> Self {
        let Inner { bearer, bare, fingerprint, expires_at } = &*self.0;
        let buffer = Bytes::from_owner(CacheAligned(Zeroizing::new(bearer.as_bytes().to_vec())));
        Self::from_buffer(buffer, bare.is_some(), *fingerprint, *expires_at).unwrap_or_else(|_| self.clone())
    }
}

/// Removes what an editor or `echo` leaves around a secret: surrounding blanks and one line end.
fn trim(value: &str) -> &str {
    let blank = [' ', '\t'];
    let value = value.trim_matches(blank);
    let value = value.strip_suffix("\r\n").or_else(|| value.strip_suffix(['\n', '\r'])).unwrap_or(value);
    value.trim_end_matches(blank)
}

/// Checks for the printable ASCII that RFC 6749 appendix A allows in client ids, client secrets and refresh tokens;
/// returns it without surrounding blanks and one line end.
pub(crate) fn text(value: &str) -> Result<&str, ConfigErrorKind> {
    let text = trim(value);
    check_bytes(text, true)?;
    if text.is_empty() { Err(ConfigErrorKind::Empty) } else { Ok(text) }
}

/// Checks for what an `Authorization: Bearer` header can carry; returns it without surrounding blanks and one line end.
fn checked(value: &str) -> Result<&str, ConfigErrorKind> {
    let secret = trim(value);
    let scheme = SCHEME.trim_end();
    if let Some((head, rest)) = secret.split_at_checked(scheme.len())
        && head.eq_ignore_ascii_case(scheme)
        && rest.bytes().next().is_none_or(|byte| byte.is_ascii_whitespace())
    {
        return Err(ConfigErrorKind::BearerPrefix);
    }
    if secret.is_empty() {
        return Err(ConfigErrorKind::Empty);
    }
    check_bytes(secret, false)?;
    if secret.starts_with(['"', '\'']) || secret.ends_with(['"', '\'']) {
        return Err(ConfigErrorKind::Quoted);
    }
    Ok(secret)
}

/// Whether it has the shape of a signed JWT: three parts, of which the first is a JSON object in Base64
/// ([RFC 7515 section 7.1](https://www.rfc-editor.org/rfc/rfc7515#section-7.1)).
fn is_jwt(secret: &str) -> bool {
    secret.starts_with("eyJ") && secret.split('.').count() == 3
}

fn check_bytes(text: &str, may_have_spaces: bool) -> Result<(), ConfigErrorKind> {
    for (at, byte) in text.bytes().enumerate() {
        return Err(match byte {
            b' ' | b'\t' if !may_have_spaces => ConfigErrorKind::WhiteSpace { at },
            0..0x20 | 0x7f => ConfigErrorKind::ControlCharacter { at },
            0x80.. => ConfigErrorKind::NonAscii { at },
            _ => continue,
        });
    }
    Ok(())
}

fn sensitive(bytes: Bytes) -> Result<HeaderValue, ConfigErrorKind> {
    // Cannot fail: `check` let only visible ASCII pass.
    let mut value =
        HeaderValue::from_maybe_shared(bytes).map_err(|_| ConfigErrorKind::ControlCharacter { at: 0 })?;
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(value: &str) -> Result<Secret, ConfigErrorKind> {
        Secret::parse(value, Setting::ApiKey)
    }

    /// S1
    #[test]
    fn surrounding_blanks_and_one_newline_are_trimmed() {
        for value in ["sk-selam-a", " sk-selam-a\t", "sk-selam-a\n", "sk-selam-a\r\n", "\t sk-selam-a \n "] {
            assert_eq!(parse(value).unwrap().expose(), "sk-selam-a", "{value:?}");
        }
    }

    /// S1
    #[test]
    fn malformed_secrets_are_refused() {
        use ConfigErrorKind as Kind;
        for (value, kind) in [
            ("", Kind::Empty),
            (" \t\n", Kind::Empty),
            ("sk-selam-a\n\n", Kind::ControlCharacter { at: 10 }),
            ("\nsk-selam-a", Kind::ControlCharacter { at: 0 }),
            ("sk-\u{0}selam", Kind::ControlCharacter { at: 3 }),
            ("sk-\u{7f}selam", Kind::ControlCharacter { at: 3 }),
            ("sk-selam-a\r\nHost: evil.com", Kind::ControlCharacter { at: 10 }),
            ("\u{feff}sk-selam-a", Kind::NonAscii { at: 0 }),
            ("sk-selam\u{200b}-a", Kind::NonAscii { at: 8 }),
            ("\u{201c}sk-selam-a\u{201d}", Kind::NonAscii { at: 0 }),
            ("\u{a0}sk-selam-a", Kind::NonAscii { at: 0 }),
            ("sk selam", Kind::WhiteSpace { at: 2 }),
            ("sk\tselam", Kind::WhiteSpace { at: 2 }),
            ("Bearer sk-selam-a", Kind::BearerPrefix),
            ("bearer\tsk-selam-a", Kind::BearerPrefix),
            ("BEARER ", Kind::BearerPrefix),
            ("\"sk-selam-a\"", Kind::Quoted),
            ("'sk-selam-a'", Kind::Quoted),
            ("\"sk-selam-a", Kind::Quoted),
            ("sk-selam-a'", Kind::Quoted),
        ] {
            assert_eq!(parse(value).map(|_| ()), Err(kind), "{value:?}");
        }
        assert!(parse("bearers-of-news").is_ok());
    }

    /// S1: opaque tokens, and the keys of gateways and tests, may have any other shape.
    #[test]
    fn key_and_jwt_in_each_others_place_are_refused() {
        let token = |value| Secret::parse(value, Setting::Token).map(|_| ());
        let jwt = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.c2ln";
        assert_eq!(parse(jwt).map(|_| ()), Err(ConfigErrorKind::IsJwt));
        assert_eq!(parse(&format!(" {jwt}\n")).map(|_| ()), Err(ConfigErrorKind::IsJwt));
        assert_eq!(token("sk-selam-a"), Err(ConfigErrorKind::IsApiKey));
        for key in ["sk-openai-123", "gateway.key.1", "eyJ-key", "eyJ.two"] {
            assert!(parse(key).is_ok(), "{key}");
        }
        for opaque in [jwt, "opaque", "a.b.c", "sk-other-1", "xsk-selam-a"] {
            assert_eq!(token(opaque), Ok(()), "{opaque}");
        }
    }

    proptest! {
        /// S1, H1, H2: an accepted secret is visible ASCII and is sent byte for byte, also from a per-thread copy.
        #[test]
        fn accepted_secrets_are_sent_unchanged(value in "\\PC*|[ -~\\r\\n\\t]{0,40}") {
            if let Ok(secret) = parse(&value) {
                for secret in [secret.unshare(), secret] {
                    let exposed = secret.expose();
                    prop_assert!(!exposed.is_empty() && exposed.bytes().all(|byte| byte.is_ascii_graphic()));
                    prop_assert_eq!(exposed, value.trim());
                    let bare = secret.bare();
                    prop_assert_eq!(bare.as_bytes(), exposed.as_bytes());
                    prop_assert_eq!(secret.bearer().as_bytes().strip_prefix(b"Bearer "), Some(exposed.as_bytes()));
                    prop_assert!(bare.is_sensitive() && secret.bearer().is_sensitive());
                }
            }
        }
    }
}
