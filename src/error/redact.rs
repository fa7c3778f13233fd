//! Redacts credentials in server responses: APIs echo the key they reject.

use std::borrow::Cow;

use percent_encoding::utf8_percent_encode;
use zeroize::Zeroizing;

use crate::util::query::QUERY_VALUE;

const MASK: &[u8] = b"[redacted]";

/// Shorter secrets are not redacted: they would match ordinary words.
pub(crate) const MIN_SECRET: usize = 4;

/// Minimum length after `sk-`. Anything shorter is taken for a word.
const MIN_KEY: usize = 8;

/// Redacts known secrets, percent-encoded as well, and any text shaped like a key or a JWT.
#[derive(Default)]
pub(crate) struct Redactor {
    /// Each secret, verbatim and percent-encoded.
    patterns: Vec<Zeroizing<Vec<u8>>>,
}

impl Redactor {
    /// Redacts `secrets` in addition to text shaped like a key or a JWT.
    pub(crate) fn masking<'a>(secrets: impl IntoIterator<Item = &'a str>) -> Self {
        let mut patterns = Vec::new();
        for secret in secrets {
            if secret.len() >= MIN_SECRET {
                // Allocated at full size, because a growing buffer leaves unwiped copies behind.
                let mut encoded = Zeroizing::new(Vec::with_capacity(3 * secret.len()));
                let parts = utf8_percent_encode(secret, QUERY_VALUE);
                parts.for_each(|part| encoded.extend_from_slice(part.as_bytes()));
                patterns.extend([Zeroizing::new(secret.as_bytes().to_vec()), encoded]);
            }
        }
        Self { patterns }
    }

    /// Returns `text` with every secret replaced by `[redacted]`.
    pub(crate) fn text(&self, text: String) -> String {
        match self.bytes(text.as_bytes()) {
            Cow::Borrowed(_) => text,
            Cow::Owned(redacted) => String::from_utf8_lossy(&redacted).into_owned(),
        }
    }

    /// Like [`text`](Self::text), for bytes; borrowed if there is nothing to redact.
    pub(crate) fn bytes<'a>(&self, bytes: &'a [u8]) -> Cow<'a, [u8]> {
        let mut out = Vec::new();
        let mut copied = 0;
        let mut at = 0;
        while at < bytes.len() {
            match self.secret_at(bytes, at) {
                0 => at += 1,
                length => {
                    out.extend_from_slice(&bytes[copied..at]);
                    out.extend_from_slice(MASK);
                    at += length;
                    copied = at;
                }
            }
        }
        if copied == 0 {
            return Cow::Borrowed(bytes);
        }
        out.extend_from_slice(&bytes[copied..]);
        Cow::Owned(out)
    }

    /// Overwrites secrets without changing the length, for formats with length prefixes such as protobuf.
    #[cfg(feature = "tonic")]
    pub(crate) fn in_place(&self, bytes: &mut [u8]) {
        let mut at = 0;
        while at < bytes.len() {
            let length = self.secret_at(bytes, at);
            bytes[at..at + length].fill(b'*');
            at += length.max(1);
        }
    }

    /// Length of the secret that starts at `at`; zero if none does.
    fn secret_at(&self, bytes: &[u8], at: usize) -> usize {
        let rest = &bytes[at..];
        let known = self.patterns.iter().map(|pattern| known_at(rest, pattern)).max().unwrap_or(0);
        let before = at.checked_sub(1).map(|at| bytes[at]);
        let key = if before.is_some_and(is_word) { 0 } else { key_at(rest) };
        let jwt = if before.is_some_and(is_base64url) { 0 } else { jwt_at(rest) };
        known.max(key).max(jwt)
    }
}

/// Matches all of `secret`, or its beginning if the text is cut off within it.
fn known_at(rest: &[u8], secret: &[u8]) -> usize {
    let shared = rest.len().min(secret.len());
    if shared >= MIN_SECRET && rest[..shared] == secret[..shared] { shared } else { 0 }
}

/// Matches `sk-selam-…`, or another vendor's `sk-…`.
fn key_at(rest: &[u8]) -> usize {
    if !rest.starts_with(b"sk-") {
        return 0;
    }
    let length = base64url_run(rest);
    if length >= b"sk-".len() + MIN_KEY { length } else { 0 }
}

/// Matches two or three base64url parts, the first of which encodes a JSON object: `{"` encodes to `eyJ`.
fn jwt_at(rest: &[u8]) -> usize {
    if !rest.starts_with(b"eyJ") {
        return 0;
    }
    let mut length = base64url_run(rest);
    let mut parts = 1;
    while parts < 3 && rest.get(length) == Some(&b'.') {
        length += 1 + base64url_run(&rest[length + 1..]);
        parts += 1;
    }
    if parts > 1 { length } else { 0 }
}

/// Number of leading base64url bytes.
fn base64url_run(bytes: &[u8]) -> usize {
    bytes.iter().take_while(|byte| is_base64url(**byte)).count()
}

fn is_base64url(byte: u8) -> bool {
    is_word(byte) || byte == b'-'
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn redact(text: &str, secret: &str) -> String {
        Redactor::masking([secret]).text(text.to_owned())
    }

    /// S2: a known secret is redacted, encoded and cut off too.
    #[test]
    fn known_secrets_are_redacted() {
        assert_eq!(redact("bad key opaque+1, opaque+1!", "opaque+1"), "bad key [redacted], [redacted]!");
        assert_eq!(redact("?api_key=opaque%2B1&x", "opaque+1"), "?api_key=[redacted]&x");
        assert_eq!(redact("cut off in opaq", "opaque+1"), "cut off in [redacted]");
        assert_eq!(redact("opposite", "opaque+1"), "opposite");
        assert_eq!(redact("a cat", "cat"), "a cat");
    }

    /// S2: a key or JWT that was never sent is redacted by its shape.
    #[test]
    fn keys_and_jwts_are_redacted_by_shape() {
        let redact = |text| redact(text, "unrelated");
        assert_eq!(redact("Incorrect API key: sk-selam-a1_b2."), "Incorrect API key: [redacted].");
        assert_eq!(redact("key sk-abcd****wxyz"), "key sk-abcd****wxyz");
        assert_eq!(redact("Bearer eyJh-b.eyJz_c.c2ln refused"), "Bearer [redacted] refused");
        assert_eq!(redact("cut eyJh.ey"), "cut [redacted]");
        for harmless in ["ask-anything-you-want", "sk-short", "eyJust words", "risk-free-forever"] {
            assert_eq!(redact(harmless), harmless);
        }
    }

    proptest! {
        /// S2: no surrounding text protects a secret.
        #[test]
        fn no_text_keeps_the_secret(
            before in "[a-z .]{0,10}", secret in "[!#-&(-~]{8,30}", after in "[a-z .]{0,10}"
        ) {
            prop_assume!(!MASK.windows(4).any(|part| secret.as_bytes().windows(4).any(|other| part == other)));
            let redacted = redact(&format!("{before}{secret}{after}{secret}"), &secret);
            prop_assert!(!redacted.contains(&secret), "{redacted}");
        }
    }
}
