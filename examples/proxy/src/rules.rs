//! Decides which paths exist and which may be called.
//!
//! Paths are compared as they are written. A path that a server could read in another way is refused before it is compared:
//! see [`check`].

use std::fmt;

use axum::http::Method;

/// The part of the API that the proxy serves.
pub const ROOT: &str = "/v1";

/// Why a path is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadPath {
    /// It is not `/v1` or below.
    OutsideApi,
    /// A server could read it as another path.
    Ambiguous,
}

/// Returns the part of `path` below `/v1`: empty, or with a leading slash.
///
/// # Errors
///
/// The path is not below `/v1`, or is ambiguous: dot segments, empty segments in the middle, backslashes, characters that
/// [RFC 3986](https://www.rfc-editor.org/rfc/rfc3986#section-3.3) does not allow in a path, and percent-encoded letters,
/// digits, `-._~`, slashes, backslashes, percent signs and control characters.
pub fn check(path: &str) -> Result<&str, BadPath> {
    match path.strip_prefix(ROOT) {
        Some(below) if below.is_empty() || below.starts_with('/') => {
            if is_unambiguous(path) {
                Ok(below)
            } else {
                Err(BadPath::Ambiguous)
            }
        }
        _ => Err(BadPath::OutsideApi),
    }
}

fn is_unambiguous(path: &str) -> bool {
    let Some(path) = path.strip_prefix('/') else { return false };
    let mut segments = path.split('/').peekable();
    while let Some(segment) = segments.next() {
        let is_last = segments.peek().is_none();
        // Some servers remove path parameters (after a semicolon) before they resolve dot segments.
        let name = segment.split(';').next().unwrap_or(segment);
        if (name.is_empty() && !(segment.is_empty() && is_last))
            || matches!(name, "." | "..")
            || !is_plain(segment)
        {
            return false;
        }
    }
    true
}

/// Whether this is a segment of RFC 3986 (`pchar`) in which nothing is percent-encoded needlessly, or to hide the structure of
/// the path.
fn is_plain(segment: &str) -> bool {
    let mut bytes = segment.bytes();
    while let Some(byte) = bytes.next() {
        let plain = match byte {
            b'%' => {
                let mut digit = || char::from(bytes.next()?).to_digit(16);
                let decoded = digit().and_then(|high| u8::try_from(high * 16 + digit()?).ok());
                decoded.is_some_and(|byte| {
                    !is_unreserved(byte) && !byte.is_ascii_control() && !matches!(byte, b'/' | b'\\' | b'%')
                })
            }
            byte => is_unreserved(byte) || b"!$&'()*+,;=:@".contains(&byte),
        };
        if !plain {
            return false;
        }
    }
    true
}

fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~".contains(&byte)
}

/// The value of one `--allow`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// `None` allows every method.
    method: Option<Method>,
    path: String,
    /// Whether the rule covers everything below the path, instead of the path itself.
    below: bool,
}

impl Rule {
    /// Parses `METHOD:PATH`, where the method may be `*` and the path may end with `/*`.
    ///
    /// # Errors
    ///
    /// A message that explains the problem.
    pub fn parse(rule: &str) -> Result<Self, String> {
        let invalid = |reason: &dyn fmt::Display| format!("{rule:?} {reason}");
        let Some((method, path)) = rule.split_once(':') else {
            return Err(invalid(&"must be METHOD:PATH, for example POST:/v1/chat/completions"));
        };
        let method = match method {
            "*" => None,
            // Methods are case-sensitive: `get` would never match.
            _ if method.bytes().any(|byte| byte.is_ascii_lowercase()) => {
                return Err(invalid(&"must have its method in capitals"));
            }
            _ => Some(Method::from_bytes(method.as_bytes()).map_err(|_| invalid(&"has no valid method"))?),
        };
        let (path, below) = match path.strip_suffix("/*") {
            Some(path) => (path, true),
            None => (path, false),
        };
        if path.contains('*') {
            return Err(invalid(&"may contain * only as the method or in a final /*"));
        }
        match check(path) {
            Ok(_) => Ok(Self { method, path: path.to_owned(), below }),
            Err(BadPath::OutsideApi) => Err(invalid(&"must have a path that starts with /v1/")),
            Err(BadPath::Ambiguous) => {
                Err(invalid(&"has an invalid or ambiguous path, so it would match no request"))
            }
        }
    }

    /// Whether the rule covers this method and path.
    pub fn allows(&self, method: &Method, path: &str) -> bool {
        let is_path = match path.strip_prefix(&*self.path) {
            Some(rest) if self.below => rest.starts_with('/'),
            Some(rest) => rest.is_empty(),
            None => false,
        };
        is_path && self.method.as_ref().is_none_or(|allowed| allowed == method)
    }
}

/// Whether one of the rules covers this method and path. Without rules, everything is allowed.
pub fn is_allowed(rules: &[Rule], method: &Method, path: &str) -> bool {
    rules.is_empty() || rules.iter().any(|rule| rule.allows(method, path))
}

/// Checks that a request's path can begin with this prefix.
///
/// # Errors
///
/// A message that explains the problem.
pub fn check_prefix(prefix: &str) -> Result<(), String> {
    match check(prefix) {
        // `/*` is the syntax of `--allow`; here it would match no path.
        Ok(_) if prefix.contains('*') => {
            Err(format!("{prefix:?} must not contain *; a prefix covers everything below it"))
        }
        Ok(_) => Ok(()),
        Err(BadPath::OutsideApi) => Err(format!("{prefix:?} must start with /v1/")),
        Err(BadPath::Ambiguous) => {
            Err(format!("{prefix:?} is an invalid or ambiguous path, so it would match no request"))
        }
    }
}

/// Whether `path` is `prefix` or below it.
pub fn is_below(path: &str, prefix: &str) -> bool {
    let rest = path.strip_prefix(prefix.trim_end_matches('/'));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_below_v1_are_unchanged() {
        for (path, below) in [
            ("/v1", ""),
            ("/v1/", "/"),
            ("/v1/chat/completions", "/chat/completions"),
            ("/v1/models/ft:selam-turbo@2", "/models/ft:selam-turbo@2"),
            ("/v1/files/a%20b%C3%A9", "/files/a%20b%C3%A9"),
            ("/v1/...", "/..."),
            ("/v1/.well-known/a..b/", "/.well-known/a..b/"),
        ] {
            assert_eq!(check(path), Ok(below), "{path}");
        }
        for path in
            ["/", "", "*", "/v2/models", "/v1x", "/V1/models", "/%761/models", "v1/models", "//v1/models"]
        {
            assert_eq!(check(path), Err(BadPath::OutsideApi), "{path}");
        }
    }

    #[test]
    fn ambiguous_paths_are_refused() {
        for below in [
            "..",
            ".",
            "a/../b",
            "a/./b",
            "a/..",
            "../../admin",
            "a//b",
            "/",
            "//",
            "%2e%2e",
            "%2E.",
            "a/%2e",
            "a%2fb",
            "a%2Fb",
            "a%5cb",
            "a\\b",
            "%61udio",
            "%2561",
            "a%00",
            "a%0a",
            "a%7f",
            "..;/x",
            ".;a",
            ";x",
            "%",
            "%2",
            "%zz",
            "a\"b",
            "a<b",
            "a|b",
            "a^b",
            "a`b",
            "a{b}",
            "[a]",
            "é",
        ] {
            assert_eq!(check(&format!("/v1/{below}")), Err(BadPath::Ambiguous), "{below}");
        }
    }

    #[test]
    fn a_rule_covers_one_path_or_a_subtree() {
        let allows =
            |rule: &str, method: &Method, path: &str| Rule::parse(rule).unwrap().allows(method, path);
        assert!(allows("POST:/v1/chat/completions", &Method::POST, "/v1/chat/completions"));
        for (rule, method, path) in [
            ("POST:/v1/chat/completions", Method::GET, "/v1/chat/completions"),
            ("POST:/v1/chat/completions", Method::POST, "/v1/chat/completions/batch"),
            ("POST:/v1/chat/completions", Method::POST, "/v1/chat/completions/"),
            ("POST:/v1/chat/completions", Method::POST, "/v1/chat"),
            ("POST:/v1/chat/completions", Method::POST, "/v1/Chat/completions"),
            ("POST:/v1/audio/*", Method::POST, "/v1/audio"),
            ("POST:/v1/audio/*", Method::POST, "/v1/audiobooks"),
            ("GET:/v1/*", Method::HEAD, "/v1/models"),
        ] {
            assert!(!allows(rule, &method, path), "{rule} {method} {path}");
        }
        assert!(allows("POST:/v1/audio/*", &Method::POST, "/v1/audio/speech"));
        assert!(allows("*:/v1/*", &Method::DELETE, "/v1/files/a/b"));
        assert!(allows("PROPFIND:/v1/a:b", &Method::from_bytes(b"PROPFIND").unwrap(), "/v1/a:b"));
    }

    #[test]
    fn rules_are_exhaustive_unless_there_are_none() {
        assert!(is_allowed(&[], &Method::DELETE, "/v1/models"));
        let rules = ["GET:/v1/models", "POST:/v1/chat/completions"].map(|rule| Rule::parse(rule).unwrap());
        assert!(is_allowed(&rules, &Method::GET, "/v1/models"));
        assert!(is_allowed(&rules, &Method::POST, "/v1/chat/completions"));
        assert!(!is_allowed(&rules, &Method::POST, "/v1/models"));
    }

    #[test]
    fn rules_that_never_match_are_refused() {
        for (rule, expected) in [
            ("/v1/models", "must be METHOD:PATH"),
            ("post:/v1/models", "method in capitals"),
            (":/v1/models", "has no valid method"),
            ("A B:/v1/models", "has no valid method"),
            ("GET:models", "path that starts with /v1/"),
            ("GET:/models", "path that starts with /v1/"),
            ("GET:", "path that starts with /v1/"),
            ("GET:/*", "path that starts with /v1/"),
            ("GET:/v1/a/../b", "would match no request"),
            ("GET:/v1/models?limit=2", "would match no request"),
            ("GET:/v1/*/b", "may contain * only"),
            ("GET:/v1/a*", "may contain * only"),
        ] {
            let error = Rule::parse(rule).unwrap_err();
            assert!(error.contains(expected) && error.contains(&format!("{rule:?}")), "{error}");
        }
    }
}
