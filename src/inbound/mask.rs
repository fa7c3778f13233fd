//! [`EchoMask`]: overwrites credentials in what an API sends back.

use std::{borrow::Cow, sync::Arc};

use crate::error::Redactor;

/// How much of a text is searched.
const SEARCHED: usize = 64 * 1024;

/// Overwrites credentials in texts that a proxy passes on to its callers.
///
/// [`annotated`](crate::SelamLayer::annotated) does this for the 401 and 403. Use it for what else may echo a request, such as
/// the messages of a WebSocket whose handshake had credentials in its query. It finds at least ten bytes of a credential in a
/// row, or all of a shorter one from four bytes on, in any of the encodings that servers use: percent-encoding, Base64,
/// hexadecimal, and the escapes of JSON, HTML and JavaScript.
///
/// ```
/// use tower_selam::inbound::EchoMask;
///
/// let mask = EchoMask::new(["sk-selam-example"]);
/// assert_eq!(mask.apply("no such key: sk-selam-example!"), "no such key: ****************!");
/// assert_eq!(mask.apply("Selam!"), "Selam!");
/// ```
#[derive(Clone)]
pub struct EchoMask(Arc<Redactor>);

opaque_debug!(EchoMask);

impl EchoMask {
    /// Masks these credentials. Those of fewer than four bytes would match ordinary words, and are not masked.
    #[must_use]
    pub fn new<'a>(credentials: impl IntoIterator<Item = &'a str>) -> Self {
        Self(Arc::new(Redactor::masking_only(credentials)))
    }

    /// Returns `text` with `*` for every byte of a credential. The length stays. The first 64 KiB are searched.
    #[must_use]
    pub fn apply<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let found = self.0.find(&text.as_bytes()[..text.len().min(SEARCHED)]);
        if found.is_empty() {
            return Cow::Borrowed(text);
        }
        let mut bytes = text.as_bytes().to_vec();
        found.into_iter().for_each(|range| bytes[range].fill(b'*'));
        // A range may begin or end within a character.
        Cow::Owned(String::from_utf8_lossy(&bytes).into_owned())
    }
}

/// Masks nothing.
impl Default for EchoMask {
    fn default() -> Self {
        Self::new([])
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// S2
    #[test]
    fn encoded_echoes_are_masked() {
        let mask = EchoMask::new(["sk-selam-0123456789", "a.b+/.c-0123456789"]);
        for text in [
            r#"44/v1/audio/agent,{"message":"bad token a.b+/.c-0123456789"}"#,
            r#"{"query":"token=a.b%2B%2F.c-0123456789"}"#,
            r#"{"key":"\u0073k-selam-0123456789"}"#,
            "c2stc2VsYW0tMDEyMzQ1Njc4OQ==",
        ] {
            let masked = mask.apply(text);
            assert!(masked.contains("********") && masked.len() == text.len(), "{masked}");
            assert!(!masked.contains("456789"), "{masked}");
        }
        assert_eq!(EchoMask::default().apply("sk-selam-0123456789"), "sk-selam-0123456789");
        assert!(!format!("{mask:?}").contains("selam"));
    }

    proptest! {
        /// S2: whatever stands around it, and in any text.
        #[test]
        fn no_text_keeps_the_credential(before in "\\PC{0,20}", after in "\\PC{0,20}") {
            let secret = "sk-selam-0123456789";
            let masked = EchoMask::new([secret]).apply(&format!("{before}{secret}{after}")).into_owned();
            prop_assert!(!masked.contains("456789"), "{masked}");
        }
    }
}
