//! Which paths there are, and which of them may be called.
//!
//! A path is compared as it is written, so one that a server might read in another way is refused before it is compared:
//! see [`check`].

use std::fmt;

use axum::http::Method;

/// What the proxy serves of the API.
pub const ROOT: &str = "/v1";

/// Why a path is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadPath {
    /// It does not begin with `/v1`.
    Elsewhere,
    /// Another path means the same.
    NotNormal,
}

/// What of `path` is below `/v1`: nothing, or something that begins with a slash.
///
/// # Errors
///
/// When it is not below `/v1`, or does not mean itself alone: dot segments, empty segments in the middle, backslashes,
/// characters that [RFC 3986](https://www.rfc-editor.org/rfc/rfc3986#section-3.3) does not let stand in a path, and
/// percent-encoded letters, digits, `-._~`, slashes, backslashes, percent signs and control characters.
pub fn check(path: &str) -> Result<&str, BadPath> {
    match path.strip_prefix(ROOT) {
        Some(below) if below.is_empty() || below.starts_with('/') => {
            if is_normal(path) {
                Ok(below)
            } else {
                Err(BadPath::NotNormal)
            }
        }
        _ => Err(BadPath::Elsewhere),
    }
}

fn is_normal(path: &str) -> bool {
    let Some(path) = path.strip_prefix('/') else { return false };
    let mut segments = path.split('/').peekable();
    while let Some(segment) = segments.next() {
        let last = segments.peek().is_none();
        // Some servers take off what follows a semicolon before they look for dots.
        let name = segment.split(';').next().unwrap_or(segment);
        if (name.is_empty() && !(segment.is_empty() && last))
            || matches!(name, "." | "..")
            || !is_plain(segment)
        {
            return false;
        }
    }
    true
}

/// `pchar` of RFC 3986, with nothing encoded that need not be, or that hides the path's structure.
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

/// One `--allow`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Any, when there is none.
    method: Option<Method>,
    path: String,
    /// What is below the path instead of the path itself.
    below: bool,
}

impl Rule {
    /// `METHOD:PATH`, where the method may be `*` and the path may end with `/*`.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn parse(rule: &str) -> Result<Self, String> {
        let wrong = |said: &dyn fmt::Display| format!("{rule:?} {said}");
        let Some((method, path)) = rule.split_once(':') else {
            return Err(wrong(&"is not METHOD:PATH, as POST:/v1/chat/completions is"));
        };
        let method = match method {
            "*" => None,
            // Methods are case-sensitive, and the usual ones are in capitals.
            _ if method.bytes().any(|byte| byte.is_ascii_lowercase()) => {
                return Err(wrong(&"has a method that is not in capitals"));
            }
            _ => {
                Some(Method::from_bytes(method.as_bytes()).map_err(|_| wrong(&"has no method that is one"))?)
            }
        };
        let (path, below) = match path.strip_suffix("/*") {
            Some(path) => (path, true),
            None => (path, false),
        };
        if path.contains('*') {
            return Err(wrong(&"has a * elsewhere than at its end, after a slash"));
        }
        match check(path) {
            Ok(_) => Ok(Self { method, path: path.to_owned(), below }),
            Err(BadPath::Elsewhere) => Err(wrong(&"is not below /v1, where all is that can be called")),
            Err(BadPath::NotNormal) => Err(wrong(&"has a path that no request can have")),
        }
    }

    /// Whether it allows this.
    pub fn allows(&self, method: &Method, path: &str) -> bool {
        let is_path = match path.strip_prefix(&*self.path) {
            Some(rest) if self.below => rest.starts_with('/'),
            Some(rest) => rest.is_empty(),
            None => false,
        };
        is_path && self.method.as_ref().is_none_or(|allowed| allowed == method)
    }
}

/// Whether one of the rules allows this; without rules, everything is.
pub fn allow(rules: &[Rule], method: &Method, path: &str) -> bool {
    rules.is_empty() || rules.iter().any(|rule| rule.allows(method, path))
}

/// Whether requests can have paths that begin so.
///
/// # Errors
///
/// What is wrong with it.
pub fn check_prefix(prefix: &str) -> Result<(), String> {
    match check(prefix) {
        // As `--allow` has it; no path would begin so.
        Ok(_) if prefix.contains('*') => {
            Err(format!("{prefix:?} has a *, and what is below a path is meant without"))
        }
        Ok(_) => Ok(()),
        Err(BadPath::Elsewhere) => {
            Err(format!("{prefix:?} is not below /v1, where all is that can be called"))
        }
        Err(BadPath::NotNormal) => Err(format!("{prefix:?} is a path that no request can have")),
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
    fn what_is_below_v1_is_kept_as_it_is() {
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
            assert_eq!(check(path), Err(BadPath::Elsewhere), "{path}");
        }
    }

    #[test]
    fn what_a_server_could_read_in_another_way_is_refused() {
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
            assert_eq!(check(&format!("/v1/{below}")), Err(BadPath::NotNormal), "{below}");
        }
    }

    #[test]
    fn a_rule_allows_one_path_or_what_is_below_it() {
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
    fn without_rules_everything_is_allowed_and_with_one_nothing_else() {
        assert!(allow(&[], &Method::DELETE, "/v1/models"));
        let rules = ["GET:/v1/models", "POST:/v1/chat/completions"].map(|rule| Rule::parse(rule).unwrap());
        assert!(allow(&rules, &Method::GET, "/v1/models"));
        assert!(allow(&rules, &Method::POST, "/v1/chat/completions"));
        assert!(!allow(&rules, &Method::POST, "/v1/models"));
    }

    #[test]
    fn a_rule_that_could_never_hold_is_refused() {
        for (rule, expected) in [
            ("/v1/models", "is not METHOD:PATH"),
            ("post:/v1/models", "not in capitals"),
            (":/v1/models", "has no method"),
            ("A B:/v1/models", "has no method"),
            ("GET:models", "is not below /v1"),
            ("GET:/models", "is not below /v1"),
            ("GET:", "is not below /v1"),
            ("GET:/*", "is not below /v1"),
            ("GET:/v1/a/../b", "no request can have"),
            ("GET:/v1/models?limit=2", "no request can have"),
            ("GET:/v1/*/b", "has a * elsewhere"),
            ("GET:/v1/a*", "has a * elsewhere"),
        ] {
            let error = Rule::parse(rule).unwrap_err();
            assert!(error.contains(expected) && error.contains(&format!("{rule:?}")), "{error}");
        }
    }
}
