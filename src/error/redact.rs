//! Redacts credentials in server responses: APIs echo the key they reject.

use std::{borrow::Cow, ops::Range};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Map, Value};
use zeroize::{Zeroize, Zeroizing};

use super::view::{Escapes, View};

const MASK: &[u8] = b"[redacted]";

/// Shorter secrets are not redacted: they would match ordinary words.
pub(crate) const MIN_SECRET: usize = 4;

/// This many consecutive bytes of a secret are redacted, or all of a shorter one. Two less than the twelve that never
/// show, because what stands around a part of a secret may form an escape with up to two of its bytes.
const WINDOW: usize = 10;

/// How many encodings in Base64 or hexadecimal, one inside another, are decoded.
const MAX_DECODINGS: usize = 3;

/// How many bytes are looked at for each byte of a text. A text made to need more is masked as a whole.
const MAX_WORK: usize = 128;

/// How much of a text is searched at a time, and how much of that again with what follows. The overlap holds a window of a
/// secret in any three encodings.
const SEGMENT: usize = 4096;
const OVERLAP: usize = 2048;

/// Minimum length after `sk-`. Anything shorter is taken for a word.
const MIN_KEY: usize = 8;

/// Redacts known secrets, in part and in other encodings too, and any text shaped like a key or a JWT.
///
/// The text is decoded in every way that a server may have encoded an echo in (see [`View`]). In each view, every window of
/// the text is looked up among all windows of the secrets, without regard to case, and what is found is masked in the
/// original. The work is proportional to the length of the text.
#[derive(Default)]
pub(crate) struct Redactor {
    /// One for each length of window.
    windows: Vec<Windows>,
    ignores_shapes: bool,
}

impl Redactor {
    /// Redacts `secrets` alone.
    pub(crate) fn masking_only<'a>(secrets: impl IntoIterator<Item = &'a str>) -> Self {
        Self { ignores_shapes: true, ..Self::masking(secrets) }
    }

    /// Redacts `secrets` in addition to text shaped like a key or a JWT.
    pub(crate) fn masking<'a>(secrets: impl IntoIterator<Item = &'a str>) -> Self {
        let mut texts = Vec::new();
        for secret in secrets.into_iter().filter(|secret| secret.len() >= MIN_SECRET) {
            let public = public_prefix(secret);
            let view = View::of(secret.as_bytes());
            texts.extend(view.readings().iter().map(|escapes| (view.unescape(*escapes), public)));
        }
        let windows = (MIN_SECRET..=WINDOW).filter_map(|length| {
            let of_length = |text: &&(View, usize)| text.0.bytes().len().min(WINDOW) == length;
            let texts: Vec<_> = texts.iter().filter(of_length).collect();
            (!texts.is_empty()).then(|| Windows::new(length, &texts))
        });
        Self { windows: windows.collect(), ignores_shapes: false }
    }

    /// Returns `text` with every secret replaced by `[redacted]`. Wipes the original if it holds one.
    pub(crate) fn text(&self, mut text: String) -> String {
        match self.bytes(text.as_bytes()) {
            Cow::Borrowed(_) => text,
            Cow::Owned(redacted) => {
                text.zeroize();
                String::from_utf8_lossy(&redacted).into_owned()
            }
        }
    }

    /// Like [`text`](Self::text), for bytes; borrowed if there is nothing to redact.
    pub(crate) fn bytes<'a>(&self, bytes: &'a [u8]) -> Cow<'a, [u8]> {
        let ranges = self.find(bytes);
        if ranges.is_empty() {
            return Cow::Borrowed(bytes);
        }
        let mut out = Vec::new();
        let mut copied = 0;
        for range in ranges {
            out.extend_from_slice(&bytes[copied..range.start]);
            out.extend_from_slice(MASK);
            copied = range.end;
        }
        out.extend_from_slice(&bytes[copied..]);
        Cow::Owned(out)
    }

    /// Overwrites secrets without changing the length; returns whether there were any.
    pub(crate) fn in_place(&self, bytes: &mut [u8]) -> bool {
        let ranges = self.find(bytes);
        ranges.iter().for_each(|range| bytes[range.clone()].fill(b'*'));
        !ranges.is_empty()
    }

    /// Where secrets are in `text`: ranges in order, which do not touch.
    pub(crate) fn find(&self, text: &[u8]) -> Vec<Range<usize>> {
        let mut found = Vec::new();
        // Segments bound the memory that views take.
        for start in (0..text.len()).step_by(SEGMENT - OVERLAP) {
            let segment = &text[start..text.len().min(start + SEGMENT)];
            let mut search = Search { found: Vec::new(), budget: segment.len() * MAX_WORK };
            if self.search(View::of(segment), MAX_DECODINGS, &mut search).is_none() {
                search.found.push(0..segment.len());
            }
            found.extend(search.found.into_iter().map(|range| {
                let cut_off = text[start + range.end..].iter().take_while(|_| range.end == segment.len());
                let rest = cut_off.take_while(|byte| is_base64url(**byte) || **byte == b'.').count();
                start + range.start..start + range.end + rest
            }));
            if start + SEGMENT >= text.len() {
                break;
            }
        }
        found.sort_unstable_by_key(|range| range.start);
        found.dedup_by(|next, range| {
            let touches = next.start <= range.end;
            if touches {
                range.end = range.end.max(next.end);
            }
            touches
        });
        found
    }

    /// Searches a view and what it decodes to; `None` once the budget is spent.
    fn search(&self, view: View, decodings: usize, search: &mut Search) -> Option<()> {
        search.budget = search.budget.checked_sub(view.bytes().len())?;
        if view.bytes().len() < MIN_SECRET {
            return Some(());
        }
        if !self.ignores_shapes {
            find_shapes(&view.unescape(Escapes::Spaced), &mut search.found);
        }
        let Some(shortest) = self.windows.first() else { return Some(()) };
        let mut readings: Vec<_> = view.readings().iter().map(|escapes| view.unescape(*escapes)).collect();
        drop(view);
        for at in (1..readings.len()).rev() {
            if readings[..at].iter().any(|reading| reading.bytes() == readings[at].bytes()) {
                readings.swap_remove(at);
            }
        }
        for reading in &readings {
            self.windows.iter().for_each(|windows| windows.find(reading, &mut search.found));
        }
        let Some(decodings) = decodings.checked_sub(1) else { return Some(()) };
        // An escape inside an encoding is found where it is resolved.
        for reading in readings.get(1..).filter(|resolved| !resolved.is_empty()).unwrap_or(&readings) {
            for phase in 0..4 {
                let decoded = reading.decode_base64(phase, shortest.length * 4 / 3);
                self.search(decoded, decodings, search)?;
            }
            for phase in 0..2 {
                let decoded = reading.decode_hex(phase, shortest.length * 2);
                self.search(decoded, decodings, search)?;
            }
        }
        Some(())
    }
}

/// What a search has found, and how many more bytes it may look at.
struct Search {
    found: Vec<Range<usize>>,
    budget: usize,
}

/// All windows of one length of the secrets. A window is packed into an integer, in lower case.
struct Windows {
    length: usize,
    /// Sorted. The lowest bit tells public windows from secret ones.
    packed: Zeroizing<Vec<u128>>,
    /// A bit for the hash of each window, which rules out most of a text at once.
    filter: Zeroizing<Vec<u64>>,
}

impl Windows {
    /// The windows of `texts`, each with the length of its public beginning.
    fn new(length: usize, texts: &[&(View, usize)]) -> Self {
        let count = texts.iter().map(|(text, _)| text.bytes().len() - length + 1).sum();
        // Allocated at full size, because a growing buffer leaves unwiped copies behind.
        let mut packed = Zeroizing::new(Vec::with_capacity(count));
        let mut filter = Zeroizing::new(vec![0; 1024]);
        for (text, public) in texts {
            for (start, window) in packed_windows(text.bytes(), length) {
                packed.push(window << 1 | u128::from(start + length <= *public));
                let (word, bit) = hash(window);
                filter[word] |= bit;
            }
        }
        packed.sort_unstable();
        // A window that is secret in one place is secret in all.
        packed.dedup_by_key(|window| *window >> 1);
        Self { length, packed, filter }
    }

    /// Whether this is a window of a secret, and if so whether it is part of its public beginning.
    fn lookup(&self, window: u128) -> Option<bool> {
        let (word, bit) = hash(window);
        if self.filter[word] & bit == 0 {
            return None;
        }
        let at = self.packed.binary_search_by_key(&window, |packed| *packed >> 1).ok()?;
        Some(self.packed[at] & 1 == 1)
    }

    /// Finds every unbroken sequence of windows, at least one of which is secret.
    fn find(&self, view: &View, found: &mut Vec<Range<usize>>) {
        let mut sequence: Option<(Range<usize>, bool)> = None;
        let windows =
            packed_windows(view.bytes(), self.length).map(|(start, window)| (start, self.lookup(window)));
        for (start, is_public) in windows.chain([(0, None)]) {
            match (is_public, &mut sequence) {
                (Some(is_public), None) => sequence = Some((start..start + self.length, !is_public)),
                (Some(is_public), Some((range, is_secret))) => {
                    range.end += 1;
                    *is_secret |= !is_public;
                }
                (None, _) => {
                    if let Some((range, true)) = sequence.take() {
                        found.push(view.source(range));
                    }
                }
            }
        }
    }
}

/// Every window of `length` bytes with its place, packed into an integer and in lower case.
fn packed_windows(text: &[u8], length: usize) -> impl Iterator<Item = (usize, u128)> {
    let mask = (1 << (8 * length)) - 1;
    let mut packed = 0_u128;
    text.iter().enumerate().filter_map(move |(at, byte)| {
        packed = (packed << 8 | u128::from(byte.to_ascii_lowercase())) & mask;
        Some(((at + 1).checked_sub(length)?, packed))
    })
}

/// The place of a window in the filter: a word, and a bit in it.
fn hash(window: u128) -> (usize, u64) {
    let folded = (window as u64 ^ (window >> 64) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48;
    ((folded >> 6) as usize, 1 << (folded & 63))
}

/// The length of the beginning of a JWT that all JWTs of its algorithm share: a header without any other parameter.
fn public_prefix(secret: &str) -> usize {
    let is_public = |header: &str| {
        let header = Zeroizing::new(URL_SAFE_NO_PAD.decode(header).ok()?);
        let header: Map<String, Value> = serde_json::from_slice(&header).ok()?;
        header.keys().all(|name| matches!(&**name, "alg" | "typ")).then_some(())
    };
    match secret.split_once('.') {
        Some((header, _)) if is_public(header).is_some() => header.len() + 1,
        _ => 0,
    }
}

/// Finds text shaped like a key or a JWT.
fn find_shapes(view: &View, found: &mut Vec<Range<usize>>) {
    let bytes = view.bytes();
    let mut at = 0;
    while at < bytes.len() {
        let before = at.checked_sub(1).map(|at| bytes[at]);
        let key = if before.is_some_and(is_word) { 0 } else { key_at(&bytes[at..]) };
        let jwt = if before.is_some_and(is_base64url) { 0 } else { jwt_at(&bytes[at..]) };
        let length = key.max(jwt);
        if length > 0 {
            found.push(view.source(at..at + length));
        }
        at += length.max(1);
    }
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
        assert_eq!(redact("cut off in opaque/toke", "opaque/token/1"), "cut off in [redacted]");
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
