//! Takes credentials out of what a server said: APIs echo the key they refuse.

use std::borrow::Cow;

use percent_encoding::utf8_percent_encode;
use zeroize::Zeroizing;

use crate::{credential::Credentials, credential::MIN_SECRET, util::query::QUERY_VALUE};

const MASK: &[u8] = b"[redacted]";

/// Below this length what follows `sk-` is a word.
const MIN_KEY: usize = 8;

/// Removes the credentials that were sent, wherever they stand, and whatever has the shape of a key or a JWT.
#[derive(Default)]
pub(crate) struct Redactor {
    secrets: Vec<Zeroizing<Vec<u8>>>,
}

impl Redactor {
    pub(crate) fn new(sent: Option<&Credentials>) -> Self {
        let secrets = sent.into_iter().flat_map(Credentials::secrets);
        Self::masking(secrets.map(|secret| secret.expose()))
    }

    /// For these.
    pub(crate) fn masking<'a>(sent: impl IntoIterator<Item = &'a str>) -> Self {
        let mut secrets = Vec::new();
        for secret in sent {
            if secret.len() >= MIN_SECRET {
                // All it can grow to: growing leaves unwiped copies behind.
                let mut encoded = Zeroizing::new(Vec::with_capacity(3 * secret.len()));
                let parts = utf8_percent_encode(secret, QUERY_VALUE);
                parts.for_each(|part| encoded.extend_from_slice(part.as_bytes()));
                secrets.extend([Zeroizing::new(secret.as_bytes().to_vec()), encoded]);
            }
        }
        Self { secrets }
    }

    pub(crate) fn text(&self, text: String) -> String {
        match self.bytes(text.as_bytes()) {
            Cow::Borrowed(_) => text,
            Cow::Owned(redacted) => String::from_utf8_lossy(&redacted).into_owned(),
        }
    }

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

    /// Removes them from what counts its bytes, a protobuf message say: as long as before.
    #[cfg(feature = "tonic")]
    pub(crate) fn in_place(&self, bytes: &mut [u8]) {
        let mut at = 0;
        while at < bytes.len() {
            let length = self.secret_at(bytes, at);
            bytes[at..at + length].fill(b'*');
            at += length.max(1);
        }
    }

    /// How many bytes from `at` on are a secret.
    fn secret_at(&self, bytes: &[u8], at: usize) -> usize {
        let rest = &bytes[at..];
        let sent = self.secrets.iter().map(|secret| sent_at(rest, secret)).max().unwrap_or(0);
        let before = at.checked_sub(1).map(|at| bytes[at]);
        let key = if before.is_some_and(is_word) { 0 } else { key_at(rest) };
        let jwt = if before.is_some_and(is_base64url) { 0 } else { jwt_at(rest) };
        sent.max(key).max(jwt)
    }
}

/// `secret` whole, or its beginning where `rest` breaks off in it.
fn sent_at(rest: &[u8], secret: &[u8]) -> usize {
    let shared = rest.len().min(secret.len());
    if shared >= MIN_SECRET && rest[..shared] == secret[..shared] { shared } else { 0 }
}

/// `sk-selam-…`, or another maker's `sk-…`.
fn key_at(rest: &[u8]) -> usize {
    if !rest.starts_with(b"sk-") {
        return 0;
    }
    let length = run(rest);
    if length >= b"sk-".len() + MIN_KEY { length } else { 0 }
}

/// Three base64url parts of which the first opens a JSON object, as `{"` encodes to `eyJ`.
fn jwt_at(rest: &[u8]) -> usize {
    if !rest.starts_with(b"eyJ") {
        return 0;
    }
    let mut length = run(rest);
    let mut parts = 1;
    while parts < 3 && rest.get(length) == Some(&b'.') {
        length += 1 + run(&rest[length + 1..]);
        parts += 1;
    }
    if parts > 1 { length } else { 0 }
}

fn run(bytes: &[u8]) -> usize {
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
    use crate::ApiKey;

    fn redact(text: &str, secret: &str) -> String {
        let credentials = Credentials::bearer(ApiKey::new(secret).unwrap());
        Redactor::new(Some(&credentials)).text(text.to_owned())
    }

    #[test]
    fn s2_what_was_sent_is_masked_wherever_it_stands() {
        assert_eq!(redact("bad key opaque+1, opaque+1!", "opaque+1"), "bad key [redacted], [redacted]!");
        assert_eq!(redact("?api_key=opaque%2B1&x", "opaque+1"), "?api_key=[redacted]&x");
        assert_eq!(redact("broken off in opaq", "opaque+1"), "broken off in [redacted]");
        assert_eq!(redact("opposite", "opaque+1"), "opposite");
        assert_eq!(redact("a cat", "cat"), "a cat");
    }

    #[test]
    fn s2_what_looks_like_a_key_or_a_jwt_is_masked_too() {
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
        #[test]
        fn s2_no_text_keeps_the_secret(
            before in "[a-z .]{0,10}", secret in "[!#-&(-~]{8,30}", after in "[a-z .]{0,10}"
        ) {
            prop_assume!(!MASK.windows(4).any(|part| secret.as_bytes().windows(4).any(|other| part == other)));
            let redacted = redact(&format!("{before}{secret}{after}{secret}"), &secret);
            prop_assert!(!redacted.contains(&secret), "{redacted}");
        }
    }
}
