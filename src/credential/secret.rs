//! Credentials as values: validated when made, wiped when dropped, never printed.
//!
//! An [`ApiKey`](super::ApiKey) or a [`Token`](super::Token) owns one buffer, `Bearer <secret>`, from which header values are cut
//! without a copy. Cloning a header value counts a reference; when the last one drops, the buffer is wiped.
//! Threads that count at once wait for one another, so what many requests share is [copied](Secret::apart) for each of a few
//! threads.

use std::{fmt, mem, sync::Arc, time::SystemTime};

use bytes::Bytes;
use http::HeaderValue;
use zeroize::Zeroizing;

use super::{Fingerprint, KeyId, token};
use crate::{
    error::{ConfigError, ConfigErrorKind, Place, Subject},
    util::per_thread::Apart,
};

const SCHEME: &str = "Bearer ";

/// Below this length a secret is a word, and it says nothing to find it in a text.
pub(crate) const MIN_SECRET: usize = 4;

/// What [`ApiKey`](super::ApiKey) and [`Token`](super::Token) are made of: one pointer, as there may be many.
#[derive(Clone)]
pub(crate) struct Secret(Arc<Parts>);

struct Parts {
    bearer: HeaderValue,
    fingerprint: Fingerprint,
    more: More,
}

/// What only one of the two has.
enum More {
    /// A key is sent without the scheme, too. Boxed, as tokens may be many.
    Bare(Box<HeaderValue>),
    /// A token expires.
    ExpiresAt(Option<SystemTime>),
}

impl Secret {
    pub(crate) fn new(value: String, subject: Subject, place: Place) -> Result<Self, ConfigError> {
        let value = Zeroizing::new(value);
        Self::parse(&value, subject).map_err(|kind| ConfigError::new(subject, place, kind))
    }

    pub(crate) fn from_env_var(name: &str, subject: Subject) -> Result<Self, ConfigError> {
        let place = Place::EnvVar(name.to_owned());
        match super::env::var(name) {
            Ok(value) => Self::new(value, subject, place),
            Err(kind) => Err(ConfigError::new(subject, place, kind)),
        }
    }

    fn parse(value: &str, subject: Subject) -> Result<Self, ConfigErrorKind> {
        let secret = trim(value);
        check(secret)?;

        // Of the right size from the start: a buffer that grows leaves unwiped copies behind.
        let mut buffer = Zeroizing::new(Vec::with_capacity(SCHEME.len() + secret.len()));
        buffer.extend_from_slice(SCHEME.as_bytes());
        buffer.extend_from_slice(secret.as_bytes());
        // It has that size, so this does not move it.
        let buffer = Bytes::from_owner(Zeroizing::new(mem::take(&mut *buffer).into_boxed_slice()));

        let more = match subject {
            Subject::Token => More::ExpiresAt(token::expires_at(secret)),
            _ => More::bare(&buffer)?,
        };
        let fingerprint = Fingerprint::of(secret.as_bytes());
        Ok(Self(Arc::new(Parts { bearer: sensitive(buffer)?, fingerprint, more })))
    }

    /// A copy that shares nothing which is counted when it is sent, wiped like the first.
    pub(crate) fn apart(&self) -> Self {
        let Parts { bearer, fingerprint, more } = &*self.0;
        let copy = || {
            let buffer = Bytes::from_owner(Apart(Zeroizing::new(bearer.as_bytes().to_vec())));
            let more = match more {
                More::Bare(_) => More::bare(&buffer)?,
                More::ExpiresAt(time) => More::ExpiresAt(*time),
            };
            let bearer = sensitive(buffer)?;
            Ok::<_, ConfigErrorKind>(Self(Arc::new(Parts { bearer, fingerprint: *fingerprint, more })))
        };
        copy().unwrap_or_else(|_| self.clone())
    }

    /// `Bearer <secret>`, sensitive.
    #[inline]
    pub(crate) fn bearer(&self) -> &HeaderValue {
        &self.0.bearer
    }

    /// A key alone, sensitive. No token is sent so: it has its scheme.
    #[inline]
    pub(crate) fn bare(&self) -> &HeaderValue {
        match &self.0.more {
            More::Bare(value) => value,
            More::ExpiresAt(_) => &self.0.bearer,
        }
    }

    /// When a token expires, as far as it says itself.
    pub(super) fn expires_at(&self) -> Option<SystemTime> {
        match self.0.more {
            More::ExpiresAt(time) => time,
            More::Bare(_) => None,
        }
    }

    /// The secret alone; ASCII, because `parse` checked it.
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

    pub(super) fn debug(&self, name: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{name}([redacted] id={})", self.id())
    }
}

impl AsRef<[u8]> for Apart<Zeroizing<Vec<u8>>> {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl More {
    /// Cut from `Bearer <key>`.
    fn bare(buffer: &Bytes) -> Result<Self, ConfigErrorKind> {
        Ok(Self::Bare(Box::new(sensitive(buffer.slice(SCHEME.len()..))?)))
    }
}

/// Without surrounding blanks and one line end, as an editor or `echo` leaves them.
fn trim(value: &str) -> &str {
    let blank = [' ', '\t'];
    let value = value.trim_matches(blank);
    let value = value.strip_suffix("\r\n").or_else(|| value.strip_suffix(['\n', '\r'])).unwrap_or(value);
    value.trim_end_matches(blank)
}

/// Text of printable ASCII, as RFC 6749 appendix A has ids, client secrets and refresh tokens; without surrounding
/// blanks and one line end.
pub(crate) fn text(value: &str) -> Result<&str, ConfigErrorKind> {
    let text = trim(value);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            0..0x20 | 0x7f => return Err(ConfigErrorKind::ControlCharacter { at }),
            0x80.. => return Err(ConfigErrorKind::NonAscii { at }),
            _ => {}
        }
    }
    if text.is_empty() { Err(ConfigErrorKind::Empty) } else { Ok(text) }
}

fn check(secret: &str) -> Result<(), ConfigErrorKind> {
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
    for (at, byte) in secret.bytes().enumerate() {
        match byte {
            b' ' | b'\t' => return Err(ConfigErrorKind::WhiteSpace { at }),
            0..0x20 | 0x7f => return Err(ConfigErrorKind::ControlCharacter { at }),
            0x80.. => return Err(ConfigErrorKind::NonAscii { at }),
            _ => {}
        }
    }
    if secret.starts_with(['"', '\'']) || secret.ends_with(['"', '\'']) {
        return Err(ConfigErrorKind::Quoted);
    }
    Ok(())
}

fn sensitive(bytes: Bytes) -> Result<HeaderValue, ConfigErrorKind> {
    // `check` let only visible ASCII pass, so this does not fail.
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
        Secret::parse(value, Subject::ApiKey)
    }

    #[test]
    fn s1_surrounding_blanks_and_one_line_end_are_trimmed() {
        for value in ["sk-selam-a", " sk-selam-a\t", "sk-selam-a\n", "sk-selam-a\r\n", "\t sk-selam-a \n "] {
            assert_eq!(parse(value).unwrap().expose(), "sk-selam-a", "{value:?}");
        }
    }

    #[test]
    fn s1_everything_else_is_refused_by_kind() {
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

    proptest! {
        #[test]
        fn s1_what_is_accepted_is_visible_ascii_and_sent_byte_for_byte(value in "\\PC*|[ -~\\r\\n\\t]{0,40}") {
            if let Ok(secret) = parse(&value) {
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
