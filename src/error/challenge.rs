//! Parser for the `Bearer` challenge in `WWW-Authenticate`.

use http::{HeaderMap, HeaderValue, header::WWW_AUTHENTICATE};
use http_auth::ChallengeParser;

const SCHEME: &str = "bearer";

/// The error fields of a `Bearer` challenge
/// ([RFC 6750 section 3](https://www.rfc-editor.org/rfc/rfc6750#section-3)).
#[derive(Debug, Default)]
pub(super) struct BearerChallenge {
    pub(super) error: Option<String>,
    pub(super) description: Option<String>,
}

impl BearerChallenge {
    /// Returns the first `Bearer` challenge with an error, or else the first that parses. The text around it need not parse.
    pub(super) fn from_headers(headers: &HeaderMap) -> Self {
        let challenges = || headers.get_all(WWW_AUTHENTICATE).iter().filter_map(Self::from_value);
        challenges()
            .find(|challenge| challenge.error.is_some())
            .or_else(|| challenges().next())
            .unwrap_or_default()
    }

    fn from_value(value: &HeaderValue) -> Option<Self> {
        let to_ascii = |byte: &u8| if byte.is_ascii() { char::from(*byte) } else { '?' };
        let value: String = value.as_bytes().trim_ascii().iter().map(to_ascii).collect();
        let starts = value.char_indices().filter_map(|(at, _)| {
            let scheme = value.get(at..at + SCHEME.len())?;
            let is_start = value[..at].chars().next_back().is_none_or(|before| matches!(before, ' ' | ','));
            (is_start && scheme.eq_ignore_ascii_case(SCHEME)).then_some(at)
        });
        let challenge = starts.filter_map(|at| ChallengeParser::new(&value[at..]).next()?.ok()).next()?;
        let param = |name: &str| {
            let (_, value) = challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name))?;
            Some(value.to_unescaped()).filter(|value| !value.is_empty())
        };
        Some(Self { error: param("error"), description: param("error_description") })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(values: &[&str]) -> (Option<String>, Option<String>) {
        let mut headers = HeaderMap::new();
        for value in values {
            if let Ok(value) = value.parse() {
                headers.append(WWW_AUTHENTICATE, value);
            }
        }
        let challenge = BearerChallenge::from_headers(&headers);
        (challenge.error, challenge.description)
    }

    #[test]
    fn the_bearer_challenge_is_found_among_others() {
        let expected = (Some("invalid_token".to_owned()), Some("it \"expired\"".to_owned()));
        let challenge = r#"bearer realm="x", error="invalid_token", error_description="it \"expired\"""#;
        assert_eq!(read(&[challenge]), expected);
        assert_eq!(read(&["Basic realm=\"x\"", challenge]), expected);
        assert_eq!(read(&[&format!("Digest nonce=\"n\", {challenge}")]), expected);
        assert_eq!(read(&["Bearer realm=\"x\"", challenge]), expected);
        assert_eq!(read(&["Bearer error=invalid_token"]).0.as_deref(), Some("invalid_token"));
        assert_eq!(read(&[&format!("Negotiate YII=, {challenge} ")]), expected);
        assert_eq!(read(&["Bearer error=\"invalid_token\", error_description=\"\u{e9}\""]).0, expected.0);
        assert_eq!(read(&["Basic realm=\"notbearer error=x\""]), (None, None));
        assert_eq!(read(&["Bearer"]), (None, None));
        assert_eq!(read(&[]), (None, None));
    }

    proptest! {
        /// E2: no header value panics.
        #[test]
        fn challenge_never_panics(value in "(Bearer )?[a-z=\", \\\\]{0,40}") {
            let _ = read(&[&value]);
        }
    }
}
