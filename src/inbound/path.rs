//! [`PathRule`]: covers a request's path only if every server would agree.

use std::borrow::Cow;

use percent_encoding::percent_decode;

use crate::error::{ConfigError, ConfigErrorKind, Place, Setting};

/// A rule for the paths of requests: one path, or all paths below one.
///
/// Servers read the same path differently: some decode it twice, drop what follows a `;`, or take `\` for `/`. A rule covers
/// a path only if it covers every such reading, so no spelling of another path can get around it:
///
/// | Path | Below `/v1/models`? | Reason |
/// |---|---|---|
/// | `/v1/models/a%20b`, `/v1/models/%E2%82%AC`, `/v1/models/x;v=1` | yes | below it in every reading |
/// | `/v1/models/org%2Fmodel` | yes | the same, although servers disagree on the number of segments |
/// | `/v1/models%2Fx`, `/v1/models;v=1/x`, `/v1/Models/x` | no | below it for some servers only |
/// | `/v1/models/../x`, `/v1/models/%2e%2e/x`, `/v1/models/..%2Fx`, `/v1/models/..;/x`, `/v1/models/..%20/x`, `/v1/models/.%EF%BC%8E/x` | no | ambiguous: segments of dots, which are followed, in any encoding |
/// | `/v1//models/x`, `/v1/models/;x/y`, `/v1/models/%2Fx`, `/v1/models/x.`, `/v1/models/x%20` | no | ambiguous: empty segments, and final dots and blanks, are dropped by some |
/// | `/v1/models/a\b`, `/v1/models/a%5Cb`, `/v1/models/a%00`, `/v1/models/a%09` | no | ambiguous: backslashes and control characters |
/// | `/v1/models/%6D`, `/v1/models/%252F`, `/v1/models/%u002e` | no | ambiguous: encoded without need, or twice ([RFC 3986 section 2.4](https://www.rfc-editor.org/rfc/rfc3986#section-2.4)) |
/// | `/v1/models/%`, `/v1/models/%zz`, `/v1/models/%c0%ae`, `/v1/models/%ff` | no | ambiguous: not percent-encoded UTF-8 |
///
/// ```
/// use tower_selam::inbound::PathRule;
///
/// let models = PathRule::below("/v1/models")?;
/// assert!(models.covers("/v1/models/org%2Fmodel"));
/// assert!(!models.covers("/v1/models/..%2Ffiles"));
/// # Ok::<(), tower_selam::ConfigError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathRule {
    /// Without a final slash, unless it stands for itself alone.
    path: String,
    scope: Scope,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    Exact,
    Below,
    Subtree,
}

impl PathRule {
    /// Covers this path alone. A final slash makes a difference.
    ///
    /// # Errors
    ///
    /// If `path` is not a plain path such as `/v1/audio`: without escapes, parameters and anything ambiguous.
    pub fn exact(path: &str) -> Result<Self, ConfigError> {
        Self::parse(path, Scope::Exact).map_err(invalid)
    }

    /// Covers what is below this path, and not the path itself.
    ///
    /// # Errors
    ///
    /// As [`exact`](Self::exact).
    pub fn below(path: &str) -> Result<Self, ConfigError> {
        Self::parse(path, Scope::Below).map_err(invalid)
    }

    /// Covers this path and what is below it.
    ///
    /// # Errors
    ///
    /// As [`exact`](Self::exact).
    pub fn subtree(path: &str) -> Result<Self, ConfigError> {
        Self::parse(path, Scope::Subtree).map_err(invalid)
    }

    /// As [`subtree`](Self::subtree), for one of several.
    pub(crate) fn subtree_item(number: usize, path: &str) -> Result<Self, ConfigError> {
        Self::parse(path, Scope::Subtree)
            .map_err(|kind| ConfigError::new(Setting::PathPrefix, Place::Item(number), kind))
    }

    fn parse(path: &str, scope: Scope) -> Result<Self, ConfigErrorKind> {
        let is_plain = |byte: u8| byte == b'/' || is_unreserved(byte) || b"!$&'()*+,=:@".contains(&byte);
        if path.is_empty() {
            return Err(ConfigErrorKind::Empty);
        }
        if !path.bytes().all(is_plain) || Self::is_ambiguous(path) {
            return Err(ConfigErrorKind::InvalidPath);
        }
        let path = match scope {
            Scope::Exact => path,
            Scope::Below | Scope::Subtree => path.strip_suffix('/').unwrap_or(path),
        };
        Ok(Self { path: path.to_owned(), scope })
    }

    /// Whether the rule covers this path of a request in every reading.
    #[must_use]
    pub fn covers(&self, path: &str) -> bool {
        // The rule is plain, so no server reads its part of the path in another way; what follows cannot lead out of it.
        let is_covered = match (path.strip_prefix(&*self.path), self.scope) {
            (None, _) => false,
            (Some(rest), Scope::Exact) => rest.is_empty(),
            (Some(rest), Scope::Below) => rest.len() > 1 && rest.starts_with('/'),
            (Some(rest), Scope::Subtree) => rest.is_empty() || rest.starts_with('/'),
        };
        is_covered && !Self::is_ambiguous(path)
    }

    /// Whether servers could read this path so differently that no rule covers it.
    ///
    /// An encoded slash alone is not ambiguous in this sense: whether it separates segments or not, it leads nowhere else.
    #[must_use]
    pub fn is_ambiguous(path: &str) -> bool {
        let Some(path) = path.strip_prefix('/') else { return true };
        let mut segments = path.split('/').peekable();
        while let Some(segment) = segments.next() {
            // The empty segment after a final slash.
            if segment.is_empty() && segments.peek().is_none() {
                return false;
            }
            match decode(segment) {
                Some(decoded) if decoded.split('/').all(is_name) => {}
                _ => return true,
            }
        }
        false
    }
}

fn invalid(kind: ConfigErrorKind) -> ConfigError {
    ConfigError::new(Setting::PathPrefix, Place::Argument, kind)
}

/// Decodes a segment of RFC 3986 (`pchar`); `None` if that is not the end of it: the segment is encoded without need, twice or
/// invalidly, or has characters that some servers take for others.
fn decode(segment: &str) -> Option<Cow<'_, str>> {
    let bytes = segment.as_bytes();
    for (at, byte) in bytes.iter().copied().enumerate() {
        match byte {
            b'%' if is_unreserved(escaped(&bytes[at..])?) => return None,
            b'%' => {}
            byte if is_unreserved(byte) || b"!$&'()*+,;=:@".contains(&byte) => {}
            _ => return None,
        }
    }
    let decoded = percent_decode(bytes).decode_utf8().ok()?;
    let bytes = decoded.as_bytes();
    let is_encoded_again =
        |at| escaped(&bytes[at..]).is_some() || matches!(bytes.get(at + 1), Some(b'u' | b'U'));
    let mut escapes = bytes.iter().enumerate().filter(|(_, byte)| **byte == b'%').map(|(at, _)| at);
    let is_final = !escapes.any(is_encoded_again) && !decoded.contains(is_misread);
    is_final.then_some(decoded)
}

/// The byte that `%XX` stands for.
fn escaped(bytes: &[u8]) -> Option<u8> {
    let digit = |at: usize| char::from(*bytes.get(at)?).to_digit(16);
    u8::try_from(digit(1)? * 16 + digit(2)?).ok()
}

fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~".contains(&byte)
}

/// Whether some servers drop this character, or convert it to a slash, a backslash or a percent sign.
fn is_misread(letter: char) -> bool {
    letter.is_control()
        || matches!(
            letter,
            '\\' | '\u{2044}'
                | '\u{2100}'
                | '\u{2101}'
                | '\u{2105}'
                | '\u{2106}'
                | '\u{2215}'
                | '\u{2216}'
                | '\u{29F5}'
                | '\u{29F8}'
                | '\u{29F9}'
                | '\u{FE68}'
                | '\u{FE6A}'
                | '\u{FF05}'
                | '\u{FF0F}'
                | '\u{FF3C}'
        )
}

/// Whether every server takes this for the name of something. Some ignore what follows a `;`, and some a `?` or `#` that was
/// encoded; some drop dots and blanks at the end.
fn is_name(segment: &str) -> bool {
    let name = segment.split([';', '?', '#', '\u{FF1B}', '\u{FE54}', '\u{37E}']).next().unwrap_or_default();
    !name.chars().all(is_dot_or_blank) && !name.ends_with(['.', ' ']) && !segment.ends_with(['.', ' '])
}

fn is_dot_or_blank(letter: char) -> bool {
    letter.is_whitespace()
        || letter.is_control()
        || matches!(
            letter,
            // Dots, also those that compatibility forms and host names convert to `.`.
            '.' | '\u{2024}'..='\u{2026}' | '\u{3002}' | '\u{FE52}' | '\u{FF0E}' | '\u{FF61}' | '\u{FE19}'
            // Characters without a width, which comparisons ignore.
            | '\u{AD}' | '\u{34F}' | '\u{61C}' | '\u{180B}'..='\u{180F}' | '\u{200B}'..='\u{200F}' | '\u{202A}'..='\u{202E}'
            | '\u{2060}'..='\u{206F}' | '\u{FE00}'..='\u{FE0F}' | '\u{FEFF}' | '\u{E0000}'..='\u{E01EF}'
        )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn whole_segments_are_compared() {
        let audio = PathRule::subtree("/v1/audio").unwrap();
        let below = "
            /v1/audio /v1/audio/ /v1/audio/speech /v1/audio/speech/ /v1/audio/.hidden/a..b/...c
            /v1/audio/a%20b /v1/audio/a%2Fb /v1/audio/org%2Fmodel%2fx /v1/audio/100%25 /v1/audio/x;v=1
            /v1/audio/%E1%88%B0%E1%88%8B%E1%88%9D /v1/audio/a+b:c@d,e!$&'()*= /v1/audio/a%3Fb /v1/audio/a%3Bb
            /v1/audio/ft:selam-turbo@2 /v1/audio/%F0%9F%8E%89/%22%3C%3E%7B%7D
        ";
        for path in below.split_whitespace() {
            assert!(audio.covers(path), "{path}");
        }
        let elsewhere = "
            / * v1/audio /v1 /v1/ /v1/audi /v1/audiobooks /v1/audio-x /v1/audio.x /v1/Audio
            /V1/audio /v2/audio /x/v1/audio /v1/images /v1/audio%2Fx /v1%2Faudio/x /v1/audio;v=1 /v1/audio;v=1/x
            /v1/audio%3Fx /v1/audio%23x
        ";
        for path in elsewhere.split_whitespace().chain([""]) {
            assert!(!audio.covers(path), "{path}");
        }
        let root = PathRule::subtree("/").unwrap();
        assert!(["/", "/v1", "/v1/models/", "/v1/a%2Fb"].iter().all(|path| root.covers(path)));
    }

    #[test]
    fn scopes_differ_at_the_path_itself() {
        let [exact, below, subtree] =
            [PathRule::exact, PathRule::below, PathRule::subtree].map(|rule| rule("/v1/a").unwrap());
        for (path, expected) in [
            ("/v1/a", [true, false, true]),
            // Some servers read it as the path itself.
            ("/v1/a/", [false, false, true]),
            ("/v1/a/b", [false, true, true]),
            ("/v1/a/b%2Fc", [false, true, true]),
            ("/v1/a%2Fb", [false, false, false]),
            ("/v1/ab", [false, false, false]),
        ] {
            assert_eq!([exact.covers(path), below.covers(path), subtree.covers(path)], expected, "{path}");
        }
        assert!(PathRule::exact("/v1/a/").unwrap().covers("/v1/a/"));
        assert!(!PathRule::exact("/v1/a/").unwrap().covers("/v1/a"));
    }

    /// Spellings that some server reads as `..`, as nothing, or as a separator.
    const AMBIGUOUS: &str = "
        .. . ... .... %2e %2e%2e .%2E %2E. ..; ..;x=1 .;a ;x ..%3B ..%3bx=1 %3B ..%3F ..%23x
        ..%20 ..%20. .%20. %20.. %20 %20%20 ..+%20 ..%09 ..%00 ..%0a %00 a%00 a%00.png a%09b a%0d%0ab a%7f
        ..%2F ..%2fx ..%2F.. a%2F..%2Fb %2F a%2F %2Fa a%2F%2Fb a%2F.%2Fb .%2F ..%5C ..%5cx a%5Cb a\\b ..\\ \\..\\x
        %252e%252e %252e. ..%252F a%252Fb %2525 %25252e a%252fb %255c %25%32%65 %25%32%46 %u002e%u002e %u2215
        %25u002e ..%25u2215x %c0%ae%c0%ae %c0%2e %e0%80%ae %f0%80%80%ae %f8%80%80%80%ae %fc%80%80%80%80%ae %c0%af
        %c1%9c ..%c0%af ..%e0%80%af %c1%1c %ff %80 %ed%a0%80 caf%E9
        %EF%BC%8E%EF%BC%8E .%EF%BC%8E %E2%80%A4%E2%80%A4 %E2%80%A5 %EF%B9%92. %E3%80%82%E3%80%82
        ..%EF%BC%8Fx a%EF%BC%8Fb a%E2%88%95b a%E2%81%84b ..%EF%BC%BCx a%EF%BC%85b ..%E2%80%8B %EF%BB%BF..
        .%C2%AD. ..%C2%A0 ..%E2%80%80 ..%EF%BC%9Bx ..%C2%85 .%E2%81%A0. ..%E3%80%80
        x. x%20 x.%20 x%20. x.;y x..
        % %2 %zz %2g a% %%2e %%32e %2%65 %61 %41 %30 %2d %2D %5f %7e %7E a\"b a<b a|b a^b a`b a{b} [a] é %\u{e9}
    ";

    #[test]
    fn ambiguous_segments_are_covered_by_nothing() {
        for segment in AMBIGUOUS.split_whitespace() {
            for path in [format!("/v1/{segment}"), format!("/v1/x/{segment}/y"), format!("/{segment}/v1/x/")]
            {
                assert!(PathRule::is_ambiguous(&path), "{path}");
                for rule in [PathRule::subtree("/v1").unwrap(), PathRule::subtree("/").unwrap()] {
                    assert!(!rule.covers(&path), "{path}");
                }
            }
        }
        for path in ["", "*", "//", "/v1//x", "//v1", "/v1/x//", "v1/x", "http://h/v1"] {
            assert!(PathRule::is_ambiguous(path), "{path}");
        }
    }

    #[test]
    fn rules_must_be_plain() {
        let not_plain = "
            v1/audio https://api.selamgpt.com/v1 // //v1 /v1//audio /v1/audio// /v1/../x /. /v1/x. /v1/...
            /v1/audio?x /v1/audio#x /v1/a%20b /v1/a%2Fb /v1/a\\b /v1/a;b /v1/\u{e9} *
        ";
        for path in not_plain.split_whitespace().chain(["/v1/a b", "/v1/a\n", " /v1"]) {
            for rule in [PathRule::exact, PathRule::below, PathRule::subtree] {
                assert_eq!(rule(path).unwrap_err().kind(), &ConfigErrorKind::InvalidPath, "{path}");
            }
        }
        assert_eq!(PathRule::exact("").unwrap_err().kind(), &ConfigErrorKind::Empty);
    }

    /// What servers do to a path before they look it up.
    const DECODERS: [fn(&str) -> String; 9] = [
        |path| percent_decode(path.as_bytes()).decode_utf8_lossy().into_owned(),
        // As Latin-1, which keeps every byte apart.
        |path| percent_decode(path.as_bytes()).map(char::from).collect(),
        overlong,
        |path| {
            path.split('/').map(|segment| segment.split(';').next().unwrap()).collect::<Vec<_>>().join("/")
        },
        |path| path.replace('\\', "/"),
        |path| {
            path.split('/').map(|segment| segment.trim_end_matches(['.', ' '])).collect::<Vec<_>>().join("/")
        },
        |path| path.chars().filter(|letter| !letter.is_control() && !letter.is_whitespace()).collect(),
        |path| path.split(['?', '#', '\0']).next().unwrap().to_owned(),
        |path| {
            let folded = path.replace(['\u{FF0E}', '\u{2024}', '\u{FE52}'], ".").replace('\u{2025}', "..");
            folded.replace(['\u{FF0F}', '\u{2215}'], "/").replace(['\u{200B}', '\u{AD}'], "").to_lowercase()
        },
    ];

    /// Decodes percent-encoded UTF-8 without the checks of RFC 3629.
    fn overlong(path: &str) -> String {
        let bytes: Vec<u8> = percent_decode(path.as_bytes()).collect();
        let mut decoded = String::new();
        let mut at = 0;
        while let Some(&byte) = bytes.get(at) {
            let length = match byte {
                0xC0..=0xDF => 1,
                0xE0..=0xEF => 2,
                0xF0..=0xF7 => 3,
                _ => 0,
            };
            let mut code = u32::from(byte) & if length == 0 { 0xFF } else { 0x3F >> length };
            for next in bytes.iter().skip(at + 1).take(length) {
                code = code << 6 | u32::from(next & 0x3F);
            }
            decoded.push(char::from_u32(code).unwrap_or('?'));
            at += 1 + length;
        }
        decoded
    }

    /// Follows dot segments and drops empty ones, like servers that look a path up in a file system.
    fn resolved(path: &str) -> Vec<String> {
        let mut segments = Vec::new();
        for segment in path.split(['/', '\\']) {
            match segment.trim_end_matches(' ') {
                "" | "." => {}
                ".." => drop(segments.pop()),
                name => segments.push(name.to_lowercase()),
            }
        }
        segments
    }

    /// All readings of a path by up to `depth` decoders.
    fn readings(path: &str, depth: usize) -> Vec<Vec<String>> {
        let mut seen = std::collections::BTreeSet::from([path.to_owned()]);
        let mut last: Vec<String> = vec![path.to_owned()];
        for _ in 0..depth {
            let decoded = last.iter().flat_map(|path| DECODERS.map(|decoder| decoder(path)));
            last = decoded.filter(|path| seen.insert(path.clone())).collect::<Vec<_>>();
        }
        seen.iter().map(|path| resolved(path)).collect()
    }

    /// Pieces of paths, from which most ambiguous ones can be built.
    fn path() -> impl Strategy<Value = String> {
        let piece = prop_oneof![
            4 => "/|v1|audio|a|models|x",
            3 => "\\.|\\.\\.|%2e|%2F|%2f|;|%3b|%25|%20|%5c|\\\\|:|~|\\+",
            1 => "%c0%ae|%e0%80%ae|%c0%af|%EF%BC%8E|%EF%BC%8F|%E2%80%A4|%E2%80%A5|%E2%88%95|%E2%80%8B|%C2%AD|%00|%09|%3F|%23|2e|2f|5c|u002e|%C3%A9",
            1 => "%[0-9a-fA-F]{2}",
            1 => "\\PC",
        ];
        (prop_oneof!["/v1/audio/", "/v1/audio", "/v1/", "/"], proptest::collection::vec(piece, 0..10))
            .prop_map(|(start, pieces)| start + &pieces.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn every_reading_stays_under_the_rule(path in path()) {
            if PathRule::subtree("/v1/audio").unwrap().covers(&path) {
                for reading in readings(&path, 3) {
                    prop_assert!(reading.starts_with(&["v1".to_owned(), "audio".to_owned()]), "{path} as {reading:?}");
                }
            }
            if PathRule::below("/v1/audio").unwrap().covers(&path) {
                for reading in readings(&path, 3) {
                    prop_assert!(reading.starts_with(&["v1".to_owned(), "audio".to_owned()]), "{path} as {reading:?}");
                    prop_assert!(reading.len() > 2, "{path} as {reading:?}");
                }
            }
            if PathRule::exact("/v1/audio").unwrap().covers(&path) {
                for reading in readings(&path, 3) {
                    prop_assert_eq!(&reading, &["v1", "audio"], "{}", path);
                }
            }
        }

        #[test]
        fn covering_never_panics(path in "\\PC{0,40}|(%|[0-9a-fA-F/.;\\\\]){0,20}") {
            let _ = PathRule::subtree("/").unwrap().covers(&path);
        }

        #[test]
        fn what_sdks_encode_is_covered(name in "[A-Za-z0-9é€ዓ/ :@%?#\\[\\]]{1,12}[a-z]") {
            // `encodeURIComponent` of one segment.
            let is_split = !name.split('/').all(|piece| is_name(piece) && !piece.starts_with(' '));
            let is_encoded_twice = decode(&percent_encoding::utf8_percent_encode(&name, COMPONENT).to_string()).is_none();
            let path = format!("/v1/models/{}", percent_encoding::utf8_percent_encode(&name, COMPONENT));
            prop_assert!(is_split || is_encoded_twice || PathRule::below("/v1/models").unwrap().covers(&path), "{}", path);
        }
    }

    const COMPONENT: &percent_encoding::AsciiSet = &percent_encoding::NON_ALPHANUMERIC
        .remove(b'-')
        .remove(b'_')
        .remove(b'.')
        .remove(b'!')
        .remove(b'~')
        .remove(b'*')
        .remove(b'\'')
        .remove(b'(')
        .remove(b')');
}
