//! [`JwtPaths`]: path prefixes, compared so that every server would agree.

use std::borrow::Cow;

use percent_encoding::percent_decode;

use crate::error::{ConfigError, ConfigErrorKind, Place, Setting};

/// How many times a path is decoded to see how a server might read it.
const MAX_DECODINGS: usize = 3;

/// Path prefixes; see [`ChooseAuthLayer::jwt_for_paths`](super::ChooseAuthLayer::jwt_for_paths).
#[derive(Debug)]
pub(super) struct JwtPaths {
    prefixes: Vec<Vec<String>>,
}

impl JwtPaths {
    pub(super) fn new<P: AsRef<str>>(prefixes: impl IntoIterator<Item = P>) -> Result<Self, ConfigError> {
        let segments = prefixes.into_iter().enumerate().map(|(at, prefix)| {
            parse(prefix.as_ref())
                .map_err(|kind| ConfigError::new(Setting::PathPrefix, Place::Item(at + 1), kind))
        });
        Ok(Self { prefixes: segments.collect::<Result<_, _>>()? })
    }

    pub(super) fn contains(&self, path: &str) -> bool {
        let Some(mut path) = decode_unreserved(path) else { return false };
        for _ in 0..=MAX_DECODINGS {
            if !self.contains_reading(&path) {
                return false;
            }
            let decoded = match Cow::from(percent_decode(path.as_bytes())) {
                Cow::Borrowed(_) if !path.contains('\\') => return true,
                decoded => String::from_utf8(decoded.into_owned()),
            };
            let Ok(decoded) = decoded else { return false };
            path = Cow::Owned(decoded.replace('\\', "/"));
        }
        // Nobody encodes a path this many times in good faith.
        false
    }

    fn contains_reading(&self, path: &str) -> bool {
        let Some(path) = path.strip_prefix('/') else { return false };
        let mut segments = path.split('/').peekable();
        while let Some(segment) = segments.next() {
            let is_last = segments.peek().is_none();
            if is_ambiguous(segment) && !(is_last && segment.is_empty()) {
                return false;
            }
        }
        let starts_with = |prefix: &Vec<String>| {
            let mut segments = path.split('/');
            prefix.iter().all(|expected| segments.next() == Some(expected))
        };
        self.prefixes.iter().any(starts_with)
    }
}

/// Whether some servers drop this segment or read it as `..`. Parameters after a `;` are ignored.
fn is_ambiguous(segment: &str) -> bool {
    let name = segment.split(';').next().unwrap_or_default();
    name.chars().all(|char| char == '.' || char.is_whitespace() || char.is_control())
}

/// Decodes the unreserved characters of `path`, which never need encoding; `None` if the encoding is invalid.
fn decode_unreserved(path: &str) -> Option<Cow<'_, str>> {
    if !path.contains('%') {
        return Some(Cow::Borrowed(path));
    }
    let mut decoded = String::with_capacity(path.len());
    let mut parts = path.split('%');
    decoded.push_str(parts.next().unwrap_or_default());
    for part in parts {
        let digits = part.get(..2).filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()))?;
        match u8::from_str_radix(digits, 16).ok()? {
            byte if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) => decoded.push(char::from(byte)),
            _ => decoded.extend(["%", digits]),
        }
        decoded.push_str(&part[2..]);
    }
    Some(Cow::Owned(decoded))
}

/// Splits a plain path into its segments.
fn parse(prefix: &str) -> Result<Vec<String>, ConfigErrorKind> {
    let segments = match prefix.strip_prefix('/') {
        _ if prefix.is_empty() => return Err(ConfigErrorKind::Empty),
        None => return Err(ConfigErrorKind::InvalidPath),
        Some("") => return Ok(Vec::new()),
        Some(path) => path.strip_suffix('/').unwrap_or(path).split('/'),
    };
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,=:@".contains(&byte);
    let segments = segments.map(|segment| {
        let is_valid = !is_ambiguous(segment) && segment.bytes().all(is_plain);
        is_valid.then(|| segment.to_owned()).ok_or(ConfigErrorKind::InvalidPath)
    });
    segments.collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn paths(prefixes: &[&str]) -> JwtPaths {
        JwtPaths::new(prefixes).unwrap()
    }

    #[test]
    fn whole_segments_are_compared() {
        let audio = paths(&["/v1/audio", "/v1/images/edits/"]);
        let below = "
            /v1/audio /v1/audio/ /v1/audio/speech /v1/audio/speech/ /v1/audio/.hidden/a..b/...c
            /v1/images/edits /v1/images/edits/7 /v1/%61udio/x /%76%31/%61%75%64%69%6F
            /v1/audio/a%20b /v1/audio/a%2Fb /v1/audio/100%25 /v1/audio/a%252Fb /v1/audio/x;v=1
            /v1/audio/%E1%88%B0%E1%88%8B%E1%88%9D /v1/audio/a+b:c@d,e!$&'()*=
        ";
        for path in below.split_whitespace() {
            assert!(audio.contains(path), "{path}");
        }
        let elsewhere = "
            / * v1/audio /v1 /v1/ /v1/audi /v1/audiobooks /v1/audio-x /v1/audio.x /v1/Audio
            /V1/audio /v2/audio /x/v1/audio /v1/images /v1/images/edit
        ";
        for path in elsewhere.split_whitespace().chain([""]) {
            assert!(!audio.contains(path), "{path}");
        }
        assert!(!paths(&[]).contains("/v1/audio"));
    }

    #[test]
    fn ambiguous_paths_get_no_jwt() {
        let audio = paths(&["/v1/audio"]);
        let ambiguous = "
            /v1/audio/../models /v1/audio/.. /v1/audio/. /v1/audio/./x /v1/./audio
            /v1/models/../audio /v1/audio/%2e%2e/models /v1/audio/.%2E/models
            /v1/audio/%252e%252e/models /v1/audio/%25252e%25252e/models
            /v1/audio/%2525252e%2525252e/models /v1/audio/%25252525252e%25252525252e/models
            /v1/audio/..%2Fmodels /v1/audio%2F..%2Fmodels /v1/audio/..%252Fmodels
            /v1/audio/x%2F..%2F..%2Fmodels /v1/audio/..\\models /v1/audio/..%5Cmodels
            /v1/audio\\..\\models /v1/audio/x%255C..%255C..%255Cmodels /v1/audio/..;/models
            /v1/audio/..;x=1/models /v1/audio/..%3B/models /v1/audio/;x/models
            /v1/audio/..%00/models /v1/audio/..%20/models /v1/audio/.%20./models
            /v1/audio/.../models /v1/audio/%20/models /v1/audio//models /v1/audio// /v1/audio/%2F
            //v1/audio /v1//audio /%2Fv1/audio /v1/audio%2Fx /v1%2Faudio/x /v1/audio;v=1
            /v1/audio;v=1/x /v1/audio%3Fx /v1/audio%23x /v1/audio%20 /v1/audio%00 /v1/%2561udio
            /v1/audio/% /v1/audio/%2 /v1/audio/%zz /v1/audio/%u002e%u002e/models
            /v1/audio/%c0%ae%c0%ae/models /v1/audio/%ff /v1/audio/%2\u{e9}
        ";
        for path in ambiguous.split_whitespace() {
            assert!(!audio.contains(path), "{path}");
        }
    }

    #[test]
    fn the_root_contains_every_unambiguous_path() {
        let all = paths(&["/"]);
        for path in ["/", "/v1", "/v1/models/", "/v1/a%2Fb"] {
            assert!(all.contains(path), "{path}");
        }
        for path in ["", "*", "//", "/..", "/v1/../x", "/v1//x"] {
            assert!(!all.contains(path), "{path}");
        }
    }

    #[test]
    fn invalid_prefixes_are_rejected_by_number() {
        let not_plain = "
            v1/audio https://api.selamgpt.com/v1 // //v1 /v1//audio /v1/audio// /v1/../x /.
            /v1/audio?x /v1/audio#x /v1/a%20b /v1/a\\b /v1/a;b /v1/\u{e9} *
        ";
        for prefix in not_plain.split_whitespace().chain(["/v1/a b", "/v1/a\n", " /v1"]) {
            let error = JwtPaths::new(["/v1/audio", prefix]).unwrap_err();
            assert_eq!(error.kind(), &ConfigErrorKind::InvalidPath, "{prefix}");
            assert!(error.to_string().starts_with("path prefix number 2 is not a plain path"), "{error}");
        }
        let error = JwtPaths::new([""]).unwrap_err();
        assert_eq!(error.to_string(), "path prefix number 1 is empty");
    }

    /// Resolves a path like a server that decodes it `times` times, drops parameters and follows `..`.
    fn resolved(path: &str, times: usize) -> Vec<String> {
        let mut path = path.to_owned();
        for _ in 0..times {
            path = percent_decode(path.as_bytes()).decode_utf8_lossy().into_owned();
        }
        let mut segments = Vec::new();
        for segment in path.split(['/', '\\']) {
            match segment.split(';').next().unwrap_or_default() {
                "" | "." => {}
                ".." => drop(segments.pop()),
                name => segments.push(name.to_owned()),
            }
        }
        segments
    }

    proptest! {
        #[test]
        fn jwt_paths_are_below_the_prefix_for_every_server(
            parts in proptest::collection::vec(
                "/|/|audio|v1|models|\\.|\\.\\.|%2e|%2F|%252e|%252F|%5c|\\\\|;|;x=1|%3b|%61|%25|%00|%20|a", 0..12
            ),
            below in any::<bool>(),
        ) {
            let path = format!("{}{}", if below { "/v1/audio/" } else { "/" }, parts.concat());
            if paths(&["/v1/audio"]).contains(&path) {
                for times in 0..5 {
                    let resolved = resolved(&path, times.max(1));
                    prop_assert_eq!(&resolved[..2], ["v1", "audio"], "{} decoded {} times", path, times);
                }
            }
        }

        #[test]
        fn matching_never_panics(path in "\\PC{0,40}") {
            let _ = paths(&["/v1/audio", "/"]).contains(&path);
        }
    }
}
