//! Property tests of redaction: whatever encodings an API echoes a secret in, no part of it shows.

use base64::{Engine as _, alphabet, engine::general_purpose};
use proptest::{collection::vec, prelude::*, sample::Index};

use super::Redactor;

/// No run of this many bytes of a secret shows.
const RUN: usize = 12;

/// How an API may encode an echo. The numbers choose which characters, and how.
#[derive(Clone, Debug)]
enum Encoding {
    Percent(u64),
    Json(u64),
    JsonString,
    Html(u64),
    Backslashes(u64),
    Base64 { url_safe: bool, before: String, after: String },
    Hex { upper: bool },
    Spaces(u64),
    Upper,
    Lower,
}

fn encoding() -> impl Strategy<Value = Encoding> {
    // A few patterns are sparse; most are dense.
    let pattern = || any::<u64>();
    prop_oneof![
        pattern().prop_map(Encoding::Percent),
        pattern().prop_map(Encoding::Json),
        Just(Encoding::JsonString),
        pattern().prop_map(Encoding::Html),
        pattern().prop_map(Encoding::Backslashes),
        (any::<bool>(), "(Bearer |[a-z:]{0,3})", "[a-z]{0,3}")
            .prop_map(|(url_safe, before, after)| Encoding::Base64 { url_safe, before, after }),
        any::<bool>().prop_map(|upper| Encoding::Hex { upper }),
        pattern().prop_map(Encoding::Spaces),
        Just(Encoding::Upper),
        Just(Encoding::Lower),
    ]
}

impl Encoding {
    fn encode(&self, text: &str) -> String {
        let each = |pattern: u64, encode: &dyn Fn(char, bool) -> String| -> String {
            // The lowest bit decides whether every character is encoded or just some.
            let chosen = |at: usize| pattern & 1 == 1 || pattern >> (at % 63 + 1) & 1 == 1;
            let encoded = |(at, char): (usize, char)| match chosen(at) {
                true => encode(char, pattern.rotate_left(at as u32 % 64) & 2 == 2),
                false => char.to_string(),
            };
            text.chars().enumerate().map(encoded).collect()
        };
        match self {
            Self::Percent(pattern) => each(*pattern, &|char, upper| {
                if upper { format!("%{:02X}", char as u32) } else { format!("%{:02x}", char as u32) }
            }),
            Self::Json(pattern) => each(*pattern, &|char, upper| match char {
                '/' if upper => "\\/".to_owned(),
                _ if upper => format!("\\u{:04X}", char as u32),
                _ => format!("\\u{:04x}", char as u32),
            }),
            Self::JsonString => {
                let quoted = serde_json::to_string(text).unwrap();
                quoted[1..quoted.len() - 1].to_owned()
            }
            Self::Html(pattern) => each(*pattern, &|char, upper| match char {
                '&' => "&amp;".to_owned(),
                '"' => "&quot;".to_owned(),
                '<' => "&lt;".to_owned(),
                '_' if upper => "&lowbar;".to_owned(),
                _ if upper => format!("&#{};", char as u32),
                _ => format!("&#x{:x};", char as u32),
            }),
            Self::Backslashes(pattern) => each(*pattern, &|char, _| match char {
                char if char.is_ascii_punctuation() => format!("\\{char}"),
                char => char.to_string(),
            }),
            Self::Base64 { url_safe, before, after } => {
                let engine =
                    if *url_safe { general_purpose::URL_SAFE_NO_PAD } else { general_purpose::STANDARD };
                engine.encode(format!("{before}{text}{after}"))
            }
            Self::Hex { upper } => {
                let hex = |byte: u8| if *upper { format!("{byte:02X}") } else { format!("{byte:02x}") };
                text.bytes().map(hex).collect()
            }
            Self::Spaces(pattern) => each(*pattern, &|char, upper| match upper {
                true => format!("{char}\r\n"),
                false => format!("{char} "),
            }),
            Self::Upper => text.to_ascii_uppercase(),
            Self::Lower => text.to_ascii_lowercase(),
        }
    }

    /// Decodes what it can of `text`, in each way that fits. Independent of `View`.
    fn decode(&self, text: &str) -> Vec<String> {
        match self {
            Self::Percent(_) => {
                vec![unescape(text, &["%"], 2, ""), unescape(text, &["%"], 2, "").replace('+', " ")]
            }
            Self::Json(_) | Self::JsonString | Self::Backslashes(_) => {
                let text = unescape(text, &["\\u", "\\U"], 4, "");
                let spaces = ["\\n", "\\r", "\\t", "\\N", "\\R", "\\T"];
                let spaced = spaces.iter().fold(text.clone(), |text, space| text.replace(space, " "));
                vec![text.replace('\\', ""), spaced.replace('\\', "")]
            }
            Self::Html(_) => {
                let text = unescape(text, &["&#x", "&#X"], 2, ";");
                let mut text = text;
                for code in 32..127_u8 {
                    text = text.replace(&format!("&#{code};"), &char::from(code).to_string());
                }
                for (name, char) in [("&lowbar;", "_"), ("&quot;", "\""), ("&lt;", "<"), ("&amp;", "&")] {
                    text = text.replace(name, char).replace(&name.to_ascii_uppercase(), char);
                }
                vec![text]
            }
            Self::Base64 { .. } => {
                let text: String = text
                    .chars()
                    .map(|char| {
                        if char == '-' {
                            '+'
                        } else if char == '_' {
                            '/'
                        } else {
                            char
                        }
                    })
                    .collect();
                let config = general_purpose::GeneralPurposeConfig::new()
                    .with_decode_allow_trailing_bits(true)
                    .with_decode_padding_mode(base64::engine::DecodePaddingMode::Indifferent);
                let engine = general_purpose::GeneralPurpose::new(&alphabet::STANDARD, config);
                let is_outside = |char: char| !(char.is_ascii_alphanumeric() || "+/".contains(char));
                (0..4)
                    .map(|skip| {
                        let runs = text.split(is_outside).map(|run| {
                            let run = run.get(skip..).unwrap_or_default();
                            let run = if run.len() % 4 == 1 { &run[..run.len() - 1] } else { run };
                            engine.decode(run).unwrap_or_default()
                        });
                        let runs: Vec<_> = runs.collect();
                        printable(&runs.join(&b'\n'))
                    })
                    .collect()
            }
            Self::Hex { .. } => (0..2)
                .map(|skip| {
                    let runs = text.split(|char: char| !char.is_ascii_hexdigit()).map(|run| {
                        let digits = run.get(skip..).unwrap_or_default().as_bytes().chunks_exact(2);
                        digits.map(|pair| hex_byte(pair).unwrap_or(0)).collect::<Vec<u8>>()
                    });
                    let runs: Vec<_> = runs.collect();
                    printable(&runs.join(&b'\n'))
                })
                .collect(),
            Self::Spaces(_) => vec![text.split_ascii_whitespace().collect()],
            Self::Upper | Self::Lower => vec![text.to_owned()],
        }
    }
}

fn printable(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| if byte.is_ascii() { char::from(*byte) } else { '\u{fffd}' }).collect()
}

fn hex_byte(digits: &[u8]) -> Option<u8> {
    u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

/// Replaces each prefix that is followed by `digits` hexadecimal digits and `end`.
fn unescape(text: &str, prefixes: &[&str], digits: usize, end: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    'next: while let Some(char) = rest.chars().next() {
        for prefix in prefixes {
            if let Some(after) = rest.strip_prefix(prefix)
                && let Some((number, after)) = after.split_at_checked(digits)
                && let Ok(code @ ..0x80) = u32::from_str_radix(number, 16)
                && let Some(after) = after.strip_prefix(end)
            {
                out.extend(char::from_u32(code));
                rest = after;
                continue 'next;
            }
        }
        out.push(char);
        rest = &rest[char.len_utf8()..];
    }
    out
}

/// The first run of the secret in `text`, letter case aside, from `public` on.
fn shown<'a>(text: &str, secret: &'a str, public: usize) -> Option<&'a str> {
    let text = text.to_ascii_lowercase();
    let runs = (0..(secret.len() + 1).saturating_sub(RUN)).filter(|start| start + RUN > public);
    runs.map(|start| &secret[start..start + RUN]).find(|run| text.contains(&run.to_ascii_lowercase()))
}

/// A secret, and how much of its beginning is public.
fn secret() -> impl Strategy<Value = (String, usize)> {
    const HEADER: &str = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.";
    prop_oneof![
        "sk-selam-[A-Za-z0-9_-]{12,40}".prop_map(|key| (key, 0)),
        "[A-Za-z0-9_-]{20,60}\\.[A-Za-z0-9_-]{20,43}"
            .prop_map(|jwt| (format!("{HEADER}{jwt}"), HEADER.len())),
        // Without the characters that begin an escape, which some escapes would swallow.
        "[!-$'-\\[\\]-~]{12,50}".prop_map(|opaque| (opaque, 0)),
    ]
}

/// Cuts up to a third off each end.
fn cut(text: &str, [front, back]: [Index; 2]) -> &str {
    let third = text.len() / 3 + 1;
    text.get(front.index(third)..text.len() - back.index(third)).unwrap_or(text)
}

proptest! {
    /// S2: no run of twelve bytes of a secret shows, nor in what the output decodes to.
    #[test]
    fn no_encoding_shows_a_secret(
        (secret, public) in secret(),
        encodings in vec(encoding(), 0..=3),
        cuts in any::<[[Index; 2]; 2]>(),
        (is_cut, before, after) in (any::<[bool; 2]>(), "\\PC{0,12}|[ -~]{0,12}|[A-Za-z0-9+/]{0,9}", "\\PC{0,12}|[ -~]{0,12}"),
    ) {
        let part = if is_cut[0] { cut(&secret, cuts[0]) } else { &secret };
        let mut echo = encodings.iter().fold(part.to_owned(), |text, encoding| encoding.encode(&text));
        if is_cut[1] {
            echo = cut(&echo, cuts[1]).to_owned();
        }
        let body = format!("{before}{echo}{after}");
        let redacted = Redactor::masking([&*secret]).text(body.clone());
        let mut texts = vec![redacted];
        prop_assert_eq!(shown(&texts[0], &secret, public), None, "{} of {}", texts[0], body);
        for encoding in encodings.iter().rev() {
            texts = texts.iter().flat_map(|text| encoding.decode(text)).collect();
            for text in &texts {
                prop_assert_eq!(shown(text, &secret, public), None, "{} of {}", text, body);
            }
        }
    }

    /// S2: a secret with characters that begin an escape is found as it stands.
    #[test]
    fn odd_secrets_are_redacted(
        secret in "[!-~]{12,50}|[a-f0-9%\\\\&#x;]{12,40}", before in "[ -~]{0,9}", after in "[ -~]{0,9}"
    ) {
        let redactor = Redactor::masking([&*secret]);
        for echo in [secret.clone(), secret.to_ascii_uppercase(), general_purpose::STANDARD.encode(&secret)] {
            let redacted = redactor.text(format!("{before}{echo}{after}"));
            prop_assert_eq!(shown(&redacted, &secret, 0), None, "{} of {}", redacted, echo);
        }
    }

    /// S2: a text without a secret stays as it is.
    #[test]
    fn other_text_stays(secret in "sk-selam-[A-Za-z0-9]{20,40}", text in "([a-zA-Z%&;\\\\\"{}:,._-]{1,9} ?){0,30}") {
        prop_assume!(!text.contains("sk-") && !text.contains("eyJ"));
        prop_assert_eq!(&Redactor::masking([&*secret]).text(text.clone()), &text);
    }
}
