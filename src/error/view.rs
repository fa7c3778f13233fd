//! [`View`]: text after decoding, with the place of each byte in the original.

use std::ops::Range;

use zeroize::Zeroizing;

/// A text as decodings show it. Each byte knows which bytes of the original it stands for, so that whatever is found in
/// a view can be masked in the original.
pub(super) struct View {
    /// Allocated at full size, because a growing buffer leaves unwiped copies behind.
    bytes: Zeroizing<Vec<u8>>,
    spans: Vec<Span>,
}

/// A range of the original.
#[derive(Clone, Copy)]
struct Span {
    start: u16,
    end: u16,
}

/// How [`View::unescape`] reads escapes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Escapes {
    /// As they stand: they may be part of a secret.
    Verbatim,
    /// Resolved. `\n` is a line break, and dropped like any other space.
    Resolved,
    /// Resolved, but two backslashes are never one: each begins an escape.
    Single,
    /// Resolved, but `\n` is an `n`.
    Letters,
    /// Resolved, but a backslash before any other character than `u` or `x` is superfluous: `\n` is an `n`, and `\%2d` is `%2d`.
    Plain,
    /// Resolved, except that every backslash is superfluous: it may have been added to each character of another escape.
    WithoutBackslashes,
    /// Resolved, and spaces are kept: they separate words.
    Spaced,
}

/// The named character references of HTML for printable ASCII and for what stands in for it.
const ENTITIES: [(&str, u8); 46] = [
    ("amp", b'&'),
    ("apos", b'\''),
    ("ast", b'*'),
    ("bsol", b'\\'),
    ("circ", b'^'),
    ("colon", b':'),
    ("comma", b','),
    ("commat", b'@'),
    ("dash", b'-'),
    ("dollar", b'$'),
    ("equals", b'='),
    ("excl", b'!'),
    ("grave", b'`'),
    ("gt", b'>'),
    ("hat", b'^'),
    ("hyphen", b'-'),
    ("lbrace", b'{'),
    ("lbrack", b'['),
    ("lcub", b'{'),
    ("lowbar", b'_'),
    ("lpar", b'('),
    ("lsqb", b'['),
    ("lt", b'<'),
    ("midast", b'*'),
    ("minus", b'-'),
    ("nbsp", b' '),
    ("newline", b'\n'),
    ("num", b'#'),
    ("percnt", b'%'),
    ("period", b'.'),
    ("plus", b'+'),
    ("quest", b'?'),
    ("quot", b'"'),
    ("rbrace", b'}'),
    ("rbrack", b']'),
    ("rcub", b'}'),
    ("rpar", b')'),
    ("rsqb", b']'),
    ("semi", b';'),
    ("shy", b' '),
    ("sol", b'/'),
    ("tab", b'\t'),
    ("tilde", b'~'),
    ("underbar", b'_'),
    ("verbar", b'|'),
    ("vert", b'|'),
];

/// The longest character reference, with some leading zeros: `&#x0000002d;`.
const MAX_ENTITY: usize = 14;

/// The longest escape with a backslash: `\u{00002d}`.
const MAX_ESCAPE: usize = 10;

/// Ends a run of decoded bytes. No encoding has it in its alphabet.
const BREAK: u8 = b'"';

impl View {
    /// The text itself, or its first 64 KiB.
    pub(super) fn of(text: &[u8]) -> Self {
        let mut view = Self::with_capacity(text.len());
        for (at, byte) in (0..u16::MAX).zip(text) {
            view.push(*byte, Span { start: at, end: at + 1 });
        }
        view
    }

    fn with_capacity(capacity: usize) -> Self {
        Self { bytes: Zeroizing::new(Vec::with_capacity(capacity)), spans: Vec::with_capacity(capacity) }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The part of the original that these bytes stand for. The range must not be empty.
    pub(super) fn source(&self, range: Range<usize>) -> Range<usize> {
        self.spans[range.start].start.into()..self.spans[range.end - 1].end.into()
    }

    fn iter(&self) -> impl Iterator<Item = (u8, Span)> {
        self.bytes.iter().copied().zip(self.spans.iter().copied())
    }

    fn push(&mut self, byte: u8, span: Span) {
        self.bytes.push(byte);
        self.spans.push(span);
    }

    /// Replaces the last `length` bytes by one.
    fn replace_tail(&mut self, length: usize, byte: u8) {
        let at = self.bytes.len() - length;
        let span = Span { start: self.spans[at].start, end: self.spans[self.spans.len() - 1].end };
        self.bytes.truncate(at);
        self.spans.truncate(at);
        self.push(byte, span);
    }

    /// Removes the byte this far from the end.
    fn remove(&mut self, length: usize) {
        let at = self.bytes.len() - length;
        self.bytes.remove(at);
        self.spans.remove(at);
    }

    /// Resolves percent-encoding, escapes with a backslash and HTML's character references, in whatever order and however
    /// often they were applied.
    ///
    /// One pass over a stack: when the top of the stack is a complete escape, the character that it stands for replaces it,
    /// and may complete another one. Unless they are kept, spaces, control characters and everything that is not ASCII are
    /// dropped: secrets contain none of them.
    pub(super) fn unescape(&self, escapes: Escapes) -> Self {
        let mut view = Self::with_capacity(self.bytes.len());
        for (byte, span) in self.iter() {
            view.push(byte, span);
            while view.reduce(escapes) {}
        }
        view
    }

    /// The readings in which a secret is looked for. There is only one if the text holds no escape.
    pub(super) fn readings(&self) -> &'static [Escapes] {
        match self.bytes.iter().any(|byte| b"\\%&".contains(byte)) {
            true => &[
                Escapes::Verbatim,
                Escapes::Resolved,
                Escapes::Single,
                Escapes::Letters,
                Escapes::Plain,
                Escapes::WithoutBackslashes,
            ],
            false => &[Escapes::Verbatim],
        }
    }

    /// Resolves what the top of the stack completes; returns whether there is a new top.
    fn reduce(&mut self, escapes: Escapes) -> bool {
        let Some(last) = self.bytes.last().copied() else { return false };
        let is_noise = !last.is_ascii_graphic() || (escapes == Escapes::WithoutBackslashes && last == b'\\');
        if is_noise && escapes != Escapes::Spaced {
            self.bytes.pop();
            self.spans.pop();
            return false;
        }
        if escapes == Escapes::Verbatim {
            return false;
        }
        let tail = &self.bytes[self.bytes.len().saturating_sub(MAX_ENTITY)..];
        let mut escape = percent_escape(tail).or_else(|| character_reference(tail));
        if escape.is_none() {
            let is_plain = escapes == Escapes::Plain;
            match backslash_escape(tail) {
                Backslash::Open if is_plain && matches!(tail, [.., b'\\', b'%' | b'&']) => self.remove(2),
                Backslash::Double if escapes != Escapes::Single => escape = Some((2, b'\\')),
                Backslash::Double | Backslash::Open => {}
                Backslash::Space(length) if !is_plain && escapes != Escapes::Letters => {
                    escape = Some((length, b' '))
                }
                Backslash::Space(length) => escape = Some((length, last)),
                Backslash::Escape(length, byte) => escape = Some((length, byte)),
                Backslash::Superfluous(length) => self.remove(length),
            }
        }
        let Some((length, byte)) = escape else { return false };
        self.replace_tail(length, byte);
        true
    }

    /// Decodes every run of at least `min_run` characters of Base64, in either alphabet. The first character of a run is taken
    /// for the character at `phase` of a group of four, because an encoding may begin anywhere.
    pub(super) fn decode_base64(&self, phase: usize, min_run: usize) -> Self {
        self.decode_runs(min_run, base64_digit, |view, values, spans| {
            for at in 0..values.len() - 1 {
                let (high, low) = (values[at], values[at + 1]);
                let byte = match (at + phase) % 4 {
                    0 => high << 2 | low >> 4,
                    1 => high << 4 | low >> 2,
                    2 => high << 6 | low,
                    _ => continue,
                };
                view.push(byte, Span { start: spans[at].start, end: spans[at + 1].end });
            }
        })
    }

    /// Decodes every run of at least `min_run` hexadecimal digits, from the digit at `phase` on.
    pub(super) fn decode_hex(&self, phase: usize, min_run: usize) -> Self {
        self.decode_runs(min_run, hex_digit, |view, values, spans| {
            for at in (phase..values.len() - 1).step_by(2) {
                let span = Span { start: spans[at].start, end: spans[at + 1].end };
                view.push(values[at] << 4 | values[at + 1], span);
            }
        })
    }

    fn decode_runs(
        &self,
        min_run: usize,
        digit: fn(u8) -> Digit,
        decode: impl Fn(&mut Self, &[u8], &[Span]),
    ) -> Self {
        let mut view = Self::with_capacity(self.bytes.len() + 1);
        let mut run = Self::with_capacity(self.bytes.len());
        let end = self.spans.last().map_or(0, |span| span.end);
        for (byte, span) in self.iter().chain([(BREAK, Span { start: end, end })]) {
            match digit(byte) {
                Digit::Value(value) => run.push(value, span),
                Digit::Separator => {}
                Digit::None => {
                    if run.bytes.len() >= min_run.max(2) {
                        decode(&mut view, &run.bytes, &run.spans);
                        view.push(BREAK, span);
                    }
                    run.bytes.clear();
                    run.spans.clear();
                }
            }
        }
        view
    }
}

enum Digit {
    Value(u8),
    /// Stands between digits.
    Separator,
    None,
}

fn base64_digit(byte: u8) -> Digit {
    Digit::Value(match byte {
        b'A'..=b'Z' => byte - b'A',
        b'a'..=b'z' => byte - b'a' + 26,
        b'0'..=b'9' => byte - b'0' + 52,
        b'+' | b'-' => 62,
        b'/' | b'_' => 63,
        _ => return Digit::None,
    })
}

fn hex_digit(byte: u8) -> Digit {
    match char::from(byte).to_digit(16) {
        Some(value) => Digit::Value(value as u8),
        None if matches!(byte, b':' | b'-' | b',') => Digit::Separator,
        None => Digit::None,
    }
}

/// The value of hexadecimal digits; `None` if there is anything else. What is not ASCII becomes 0xff.
fn hex(digits: &[u8]) -> Option<u8> {
    let number = |value: u32, digit: &u8| Some(value.saturating_mul(16) | char::from(*digit).to_digit(16)?);
    Some(ascii(digits.iter().try_fold(0, number)?))
}

fn ascii(value: u32) -> u8 {
    u8::try_from(value).ok().filter(u8::is_ascii).unwrap_or(u8::MAX)
}

/// The length and meaning of the escape that `tail` ends with: `%2d` or JavaScript's `%u002d`.
fn percent_escape(tail: &[u8]) -> Option<(usize, u8)> {
    match tail {
        [.., b'%', high, low] => Some((3, hex(&[*high, *low])?)),
        [.., b'%', b'u' | b'U', a, b, c, d] => Some((6, hex(&[*a, *b, *c, *d])?)),
        _ => None,
    }
}

/// Like [`percent_escape`], for `&#45;`, `&#x2d;` or `&amp;`.
fn character_reference(tail: &[u8]) -> Option<(usize, u8)> {
    let text = tail.strip_suffix(b";")?;
    let start = text.iter().rposition(|byte| *byte == b'&')?;
    let byte = match &text[start + 1..] {
        [b'#', b'x' | b'X', digits @ ..] if !digits.is_empty() => hex(digits)?,
        [b'#', digits @ ..] => ascii(std::str::from_utf8(digits).ok()?.parse().ok()?),
        name => ENTITIES.iter().find(|(known, _)| name.eq_ignore_ascii_case(known.as_bytes()))?.1,
    };
    Some((tail.len() - start, byte))
}

enum Backslash {
    /// The length and meaning of the escape that the text ends with.
    Escape(usize, u8),
    /// The length of a `\n` or its like, and of the backslash before it.
    Space(usize),
    /// Two backslashes, which may be one.
    Double,
    /// The backslash this far from the end begins no escape.
    Superfluous(usize),
    /// There is none, or what follows may complete it.
    Open,
}

/// Whether `text` ends with the beginning of an escape.
fn is_open(text: &[u8]) -> bool {
    let Some(start) = text.iter().rposition(|byte| b"\\%&".contains(byte)) else { return false };
    match &text[start..] {
        [b'\\'] => true,
        [b'%', b'u' | b'U', digits @ ..] | [b'%', digits @ ..] | [b'&', b'#', b'x' | b'X', digits @ ..] => {
            hex(digits).is_some()
        }
        [b'&', b'#', name @ ..] | [b'&', name @ ..] => name.iter().all(u8::is_ascii_alphanumeric),
        _ => false,
    }
}

fn backslash_escape(tail: &[u8]) -> Backslash {
    let tail = &tail[tail.len().saturating_sub(MAX_ESCAPE)..];
    let Some((last, before)) = tail.split_last() else { return Backslash::Open };
    let Some(start) = before.iter().rposition(|byte| *byte == b'\\') else { return Backslash::Open };
    let length = tail.len() - start;
    let escape = |byte: Option<u8>| {
        byte.map_or(Backslash::Superfluous(length), |byte| Backslash::Escape(length, byte))
    };
    match &tail[start + 1..] {
        [b'\\'] => Backslash::Double,
        // Another escape, whose meaning may turn out to be part of this one.
        rest if is_open(rest) => Backslash::Open,
        [b'u' | b'U' | b'x' | b'X'] => Backslash::Open,
        [byte] if b"bfnrtv".contains(&byte.to_ascii_lowercase()) => {
            Backslash::Space(length + usize::from(tail[..start].ends_with(b"\\")))
        }
        [_] => escape(Some(*last)),
        [b'x' | b'X', digits @ ..] if digits.len() == 2 => escape(hex(digits)),
        [b'u' | b'U', b'{', digits @ .., b'}'] if !digits.is_empty() => escape(hex(digits)),
        [b'u' | b'U', digits @ ..] if digits.len() == 4 && digits[0] != b'{' => escape(hex(digits)),
        [b'u' | b'U', b'{', digits @ ..] | [_, digits @ ..] if hex(digits).is_some() => Backslash::Open,
        _ => Backslash::Superfluous(length),
    }
}
