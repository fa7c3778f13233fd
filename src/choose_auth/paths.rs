use std::{borrow::Cow, sync::Arc};

use http::request::Parts;
use percent_encoding::percent_decode;

use super::Choice;
use crate::{
    RequestAuth,
    error::{ConfigError, ConfigErrorKind, Place, Subject},
};

/// So often is a path decoded to see what a server might make of it.
const ENCODED: usize = 3;

/// JWT and key for some paths and what is below them, the key alone for all others.
///
/// `/v1/audio` stands for `/v1/audio`, `/v1/audio/` and `/v1/audio/speech`, and not for `/v1/audiobooks`: whole segments are
/// compared, in the same case.
///
/// A path that servers read differently has the JWT only if it is below in every reading, so that nobody gets it for
/// another path by spelling that oddly:
///
/// | Path | JWT for `/v1/audio` | |
/// |---|---|---|
/// | `/v1/%61udio/x` | yes | the same path ([RFC 3986 section 6.2.2.2](https://www.rfc-editor.org/rfc/rfc3986#section-6.2.2.2)) |
/// | `/v1/audio/a%20b`, `/v1/audio/a%2Fb`, `/v1/audio/x;v=1` | yes | below, decoded or not |
/// | `/v1/audio%2Fx`, `/v1/audio;v=1/x`, `/v1/Audio` | no | below for some servers |
/// | `/v1/audio/../models`, `/v1/audio/%2e%2e/models`, `/v1/audio/..%2Fmodels`, `/v1/audio/..;/models`, `/v1/audio/..\models` | no | elsewhere for some servers |
/// | `/v1//audio`, `/v1/audio//x`, `/v1/./audio` | no | segments that are empty, or nothing but dots and blanks |
/// | `/v1/audio/%zz`, `/v1/audio/%ff` | no | not percent-encoded UTF-8 |
///
/// Made by [`ChooseAuthLayer::jwt_for_paths`](super::ChooseAuthLayer::jwt_for_paths).
#[derive(Clone, Debug)]
pub struct JwtPaths {
    prefixes: Arc<[Vec<String>]>,
}

impl JwtPaths {
    pub(super) fn new<P: AsRef<str>>(prefixes: impl IntoIterator<Item = P>) -> Result<Self, ConfigError> {
        let segments = prefixes.into_iter().enumerate().map(|(at, prefix)| {
            parse(prefix.as_ref())
                .map_err(|kind| ConfigError::new(Subject::PathPrefix, Place::Number(at + 1), kind))
        });
        Ok(Self { prefixes: segments.collect::<Result<_, _>>()? })
    }

    fn contain(&self, path: &str) -> bool {
        let Some(mut path) = unreserved_decoded(path) else { return false };
        for _ in 0..=ENCODED {
            if !self.contain_as_read(&path) {
                return false;
            }
            let decoded = match Cow::from(percent_decode(path.as_bytes())) {
                Cow::Borrowed(_) if !path.contains('\\') => return true,
                decoded => String::from_utf8(decoded.into_owned()),
            };
            let Ok(decoded) = decoded else { return false };
            path = Cow::Owned(decoded.replace('\\', "/"));
        }
        // Encoded more often than anybody does in good faith.
        false
    }

    fn contain_as_read(&self, path: &str) -> bool {
        let Some(path) = path.strip_prefix('/') else { return false };
        let mut segments = path.split('/').peekable();
        while let Some(segment) = segments.next() {
            let last = segments.peek().is_none();
            if is_odd(segment) && !(last && segment.is_empty()) {
                return false;
            }
        }
        let begins = |prefix: &Vec<String>| {
            let mut segments = path.split('/');
            prefix.iter().all(|expected| segments.next() == Some(expected))
        };
        self.prefixes.iter().any(begins)
    }
}

impl Choice for JwtPaths {
    fn choose(&self, request: &Parts) -> Option<RequestAuth> {
        Some(match self.contain(request.uri.path()) {
            true => RequestAuth::ApiKeyAndJwt,
            false => RequestAuth::ApiKey,
        })
    }
}

/// Whether some servers make something else of it: nothing, or a step up. Parameters after a `;` do not count.
fn is_odd(segment: &str) -> bool {
    let name = segment.split(';').next().unwrap_or_default();
    name.chars().all(|char| char == '.' || char.is_whitespace() || char.is_control())
}

/// `path` with each character plain that need not be encoded; `None` where what looks encoded is not.
fn unreserved_decoded(path: &str) -> Option<Cow<'_, str>> {
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

/// The segments of a plain path.
fn parse(prefix: &str) -> Result<Vec<String>, ConfigErrorKind> {
    let segments = match prefix.strip_prefix('/') {
        _ if prefix.is_empty() => return Err(ConfigErrorKind::Empty),
        None => return Err(ConfigErrorKind::InvalidPath),
        Some("") => return Ok(Vec::new()),
        Some(path) => path.strip_suffix('/').unwrap_or(path).split('/'),
    };
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,=:@".contains(&byte);
    let segments = segments.map(|segment| {
        let valid = !is_odd(segment) && segment.bytes().all(plain);
        valid.then(|| segment.to_owned()).ok_or(ConfigErrorKind::InvalidPath)
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
        for path in [
            "/v1/audio",
            "/v1/audio/",
            "/v1/audio/speech",
            "/v1/audio/speech/",
            "/v1/audio/.hidden/a..b/...c",
            "/v1/images/edits",
            "/v1/images/edits/7",
            "/v1/%61udio/x",
            "/%76%31/%61%75%64%69%6F",
            "/v1/audio/a%20b",
            "/v1/audio/a%2Fb",
            "/v1/audio/100%25",
            "/v1/audio/a%252Fb",
            "/v1/audio/x;v=1",
            "/v1/audio/%E1%88%B0%E1%88%8B%E1%88%9D",
            "/v1/audio/a+b:c@d,e!$&'()*=",
        ] {
            assert!(audio.contain(path), "{path}");
        }
        for path in [
            "/",
            "",
            "*",
            "v1/audio",
            "/v1",
            "/v1/",
            "/v1/audi",
            "/v1/audiobooks",
            "/v1/audio-x",
            "/v1/audio.x",
            "/v1/Audio",
            "/V1/audio",
            "/v2/audio",
            "/x/v1/audio",
            "/v1/images",
            "/v1/images/edit",
        ] {
            assert!(!audio.contain(path), "{path}");
        }
        assert!(!paths(&[]).contain("/v1/audio"));
    }

    #[test]
    fn what_servers_read_differently_has_no_jwt() {
        let audio = paths(&["/v1/audio"]);
        for path in [
            "/v1/audio/../models",
            "/v1/audio/..",
            "/v1/audio/.",
            "/v1/audio/./x",
            "/v1/./audio",
            "/v1/models/../audio",
            "/v1/audio/%2e%2e/models",
            "/v1/audio/.%2E/models",
            "/v1/audio/%252e%252e/models",
            "/v1/audio/%25252e%25252e/models",
            "/v1/audio/%2525252e%2525252e/models",
            "/v1/audio/%25252525252e%25252525252e/models",
            "/v1/audio/..%2Fmodels",
            "/v1/audio%2F..%2Fmodels",
            "/v1/audio/..%252Fmodels",
            "/v1/audio/x%2F..%2F..%2Fmodels",
            "/v1/audio/..\\models",
            "/v1/audio/..%5Cmodels",
            "/v1/audio\\..\\models",
            "/v1/audio/x%255C..%255C..%255Cmodels",
            "/v1/audio/..;/models",
            "/v1/audio/..;x=1/models",
            "/v1/audio/..%3B/models",
            "/v1/audio/;x/models",
            "/v1/audio/..%00/models",
            "/v1/audio/..%20/models",
            "/v1/audio/.%20./models",
            "/v1/audio/.../models",
            "/v1/audio/%20/models",
            "/v1/audio//models",
            "/v1/audio//",
            "/v1/audio/%2F",
            "//v1/audio",
            "/v1//audio",
            "/%2Fv1/audio",
            "/v1/audio%2Fx",
            "/v1%2Faudio/x",
            "/v1/audio;v=1",
            "/v1/audio;v=1/x",
            "/v1/audio%3Fx",
            "/v1/audio%23x",
            "/v1/audio%20",
            "/v1/audio%00",
            "/v1/%2561udio",
            "/v1/audio/%",
            "/v1/audio/%2",
            "/v1/audio/%zz",
            "/v1/audio/%u002e%u002e/models",
            "/v1/audio/%c0%ae%c0%ae/models",
            "/v1/audio/%ff",
            "/v1/audio/%2\u{e9}",
        ] {
            assert!(!audio.contain(path), "{path}");
        }
    }

    #[test]
    fn every_path_is_below_the_root_unless_it_is_odd() {
        let all = paths(&["/"]);
        for path in ["/", "/v1", "/v1/models/", "/v1/a%2Fb"] {
            assert!(all.contain(path), "{path}");
        }
        for path in ["", "*", "//", "/..", "/v1/../x", "/v1//x"] {
            assert!(!all.contain(path), "{path}");
        }
    }

    #[test]
    fn what_is_no_plain_path_is_refused_by_its_number() {
        for prefix in [
            "v1/audio",
            "https://api.selamgpt.com/v1",
            "//",
            "//v1",
            "/v1//audio",
            "/v1/audio//",
            "/v1/../x",
            "/.",
            "/v1/audio?x",
            "/v1/audio#x",
            "/v1/a%20b",
            "/v1/a b",
            "/v1/a\\b",
            "/v1/a;b",
            "/v1/\u{e9}",
            "/v1/a\n",
            " /v1",
            "*",
        ] {
            let error = JwtPaths::new(["/v1/audio", prefix]).unwrap_err();
            assert_eq!(error.kind(), ConfigErrorKind::InvalidPath, "{prefix}");
            assert!(error.to_string().starts_with("path prefix number 2 is not a plain path"), "{error}");
        }
        let error = JwtPaths::new([""]).unwrap_err();
        assert_eq!(error.to_string(), "path prefix number 1 is empty");
    }

    /// What a server makes of a path that resolves all there is to resolve, as often as it can.
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
        fn whoever_gets_the_jwt_is_below_for_every_server(
            parts in proptest::collection::vec(
                "/|/|audio|v1|models|\\.|\\.\\.|%2e|%2F|%252e|%252F|%5c|\\\\|;|;x=1|%3b|%61|%25|%00|%20|a", 0..12
            ),
            below in any::<bool>(),
        ) {
            let path = format!("{}{}", if below { "/v1/audio/" } else { "/" }, parts.concat());
            if paths(&["/v1/audio"]).contain(&path) {
                for times in 0..5 {
                    let resolved = resolved(&path, times.max(1));
                    prop_assert_eq!(&resolved[..2], ["v1", "audio"], "{} decoded {} times", path, times);
                }
            }
        }

        #[test]
        fn no_path_makes_it_panic(path in "\\PC{0,40}") {
            let _ = paths(&["/v1/audio", "/"]).contain(&path);
        }
    }
}
