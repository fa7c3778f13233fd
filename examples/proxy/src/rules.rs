//! Decides which methods and paths may be called.
//!
//! The library's [`PathRule`] compares paths, and refuses those that a server could read in another way.

use std::fmt;

use axum::http::Method;
use tower_selam::inbound::PathRule;

use crate::voice;

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

/// The methods that `*` stands for. They are also the methods that are forwarded without rules: SelamAPI uses no others, and
/// what a server does with an unknown method is unknown as well.
pub const METHODS: [Method; 7] =
    [Method::GET, Method::HEAD, Method::POST, Method::PUT, Method::PATCH, Method::DELETE, Method::OPTIONS];

/// Methods that no rule allows: servers echo the request, credentials included, or open a connection to somewhere else. In any
/// case, since some servers ignore it.
const NEVER: [&str; 4] = ["TRACE", "TRACK", "CONNECT", "DEBUG"];

/// Returns the part of `path` below `/v1`: empty, or with a leading slash.
///
/// # Errors
///
/// The path is not below `/v1`, or is [ambiguous](PathRule::is_ambiguous).
pub fn check(path: &str) -> Result<&str, BadPath> {
    match path.strip_prefix(ROOT) {
        Some(below) if below.is_empty() || below.starts_with('/') => match PathRule::is_ambiguous(path) {
            false => Ok(below),
            true => Err(BadPath::Ambiguous),
        },
        _ => Err(BadPath::OutsideApi),
    }
}

/// Whether requests with this method may be forwarded at all.
pub fn is_forwardable(method: &Method) -> bool {
    !NEVER.iter().any(|never| method.as_str().eq_ignore_ascii_case(never))
}

/// The value of one `--allow`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// `None` allows [`METHODS`].
    method: Option<Method>,
    path: PathRule,
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
        if method.as_ref().is_some_and(|method| !is_forwardable(method)) {
            return Err(invalid(&"has a method that is never forwarded"));
        }
        let (path, below) = match path.strip_suffix("/*") {
            Some(path) => (path, true),
            None => (path, false),
        };
        if path.contains('*') {
            return Err(invalid(&"may contain * only as the method or in a final /*"));
        }
        if check(path) == Err(BadPath::OutsideApi) && (below || !voice::is_path(path)) {
            return Err(invalid(&"must have a path that starts with /v1/"));
        }
        let path = if below { PathRule::below(path) } else { PathRule::exact(path) };
        let path = path.map_err(|_| invalid(&NOT_PLAIN))?;
        Ok(Self { method, path })
    }

    /// Whether the rule is for the voice agent.
    pub fn is_for_voice(&self) -> bool {
        self.path.covers(voice::PATH)
    }

    /// Whether the rule covers this method and path.
    pub fn allows(&self, method: &Method, path: &str) -> bool {
        let is_method =
            self.method.as_ref().map_or_else(|| METHODS.contains(method), |allowed| allowed == method);
        is_method && self.path.covers(path)
    }
}

/// Whether one of the rules covers this method and path. Without rules, [`METHODS`] are allowed on every path.
pub fn is_allowed(rules: &[Rule], method: &Method, path: &str) -> bool {
    match rules {
        [] => METHODS.contains(method),
        rules => rules.iter().any(|rule| rule.allows(method, path)),
    }
}

/// Parses the value of one `--jwt-path`: a path, which stands for itself and everything below it.
///
/// # Errors
///
/// A message that explains the problem.
pub fn parse_prefix(prefix: &str) -> Result<PathRule, String> {
    if check(prefix) == Err(BadPath::OutsideApi) {
        return Err(format!("{prefix:?} must start with /v1/"));
    }
    // `/*` is the syntax of `--allow`; here it would match no path.
    if prefix.contains('*') {
        return Err(format!("{prefix:?} must not contain *; a prefix covers everything below it"));
    }
    PathRule::subtree(prefix).map_err(|_| format!("{prefix:?} {NOT_PLAIN}"))
}

const NOT_PLAIN: &str =
    "has an invalid or ambiguous path, so it would match no request; write it without escapes and parameters";

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
        for below in
            ["..", "a/../b", "a//b", "%2e%2e", "a%5cb", "..%2Fx", "..;/x", "..%20/x", "%c0%ae%c0%ae/x", "%zz"]
        {
            assert_eq!(check(&format!("/v1/{below}")), Err(BadPath::Ambiguous), "{below}");
        }
        assert_eq!(check("/v1/models/org%2Fmodel"), Ok("/models/org%2Fmodel"));
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
            ("POST:/v1/audio/*", Method::POST, "/v1/audio/"),
            ("GET:/v1/models/org/*", Method::GET, "/v1/models/org%2Fmodel"),
            ("GET:/v1/models/org/model", Method::GET, "/v1/models/org%2Fmodel"),
            ("GET:/v1/models/*", Method::GET, "/v1/models/..%2Ffiles"),
            ("GET:/v1/*", Method::HEAD, "/v1/models"),
        ] {
            assert!(!allows(rule, &method, path), "{rule} {method} {path}");
        }
        assert!(allows("POST:/v1/audio/*", &Method::POST, "/v1/audio/speech"));
        assert!(allows("GET:/v1/models/*", &Method::GET, "/v1/models/org%2Fmodel"));
        assert!(allows("*:/v1/*", &Method::DELETE, "/v1/files/a/b"));
        assert!(allows("PROPFIND:/v1/a:b", &Method::from_bytes(b"PROPFIND").unwrap(), "/v1/a:b"));
    }

    /// H6: `*` allows none that echoes or tunnels, in any spelling.
    #[test]
    fn any_method_means_a_list() {
        let any = [Rule::parse("*:/v1/models").unwrap()];
        for method in METHODS {
            assert!(is_allowed(&any, &method, "/v1/models") && is_allowed(&[], &method, "/v1/x"), "{method}");
            assert!(is_forwardable(&method));
        }
        for method in
            ["TRACE", "CONNECT", "TRACK", "trace", "Connect", "get", "PROPFIND", "PURGE", "DEBUG", "QUERY"]
        {
            let parsed = Method::from_bytes(method.as_bytes()).unwrap();
            assert!(
                !is_allowed(&any, &parsed, "/v1/models") && !is_allowed(&[], &parsed, "/v1/x"),
                "{method}"
            );
        }
        for method in ["TRACE", "trace", "Trace", "CONNECT", "TRACK", "DEBUG"] {
            assert!(!is_forwardable(&Method::from_bytes(method.as_bytes()).unwrap()), "{method}");
            let error = Rule::parse(&format!("{}:/v1/models", method.to_uppercase())).unwrap_err();
            assert!(error.ends_with("has a method that is never forwarded"), "{error}");
        }
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
