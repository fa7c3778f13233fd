//! The form parameters of a token request.

use std::{borrow::Cow, collections::HashMap};

use http::{HeaderMap, header::CONTENT_TYPE};
use percent_encoding::percent_decode_str;

use super::refusal::invalid_request;
use crate::simulator::refusal::Refusal;

/// [RFC 8693 section 2.1](https://www.rfc-editor.org/rfc/rfc8693#section-2.1) allows these more than once.
const REPEATABLE: [&str; 2] = ["audience", "resource"];

/// Parameters read by the rules of [RFC 6749 section
/// 3.2](https://www.rfc-editor.org/rfc/rfc6749#section-3.2): each at most once, empty ones ignored.
pub(super) struct Form(HashMap<String, String>);

impl Form {
    pub(super) fn read(headers: &HeaderMap, body: &[u8]) -> Result<Self, Refusal> {
        let content_type =
            headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let media_type = content_type.split(';').next().unwrap_or_default().trim();
        if !media_type.eq_ignore_ascii_case("application/x-www-form-urlencoded") {
            return Err(invalid_request("The body is not a form."));
        }
        let not_utf8 = invalid_request("The body is not UTF-8.");
        let body = std::str::from_utf8(body).map_err(|_| not_utf8)?;
        let mut params = HashMap::new();
        for param in body.split('&') {
            let (name, value) = param.split_once('=').unwrap_or((param, ""));
            let (name, value) = decode(name).zip(decode(value)).ok_or(not_utf8)?;
            let may_repeat = name.is_empty() || REPEATABLE.contains(&name.as_str());
            if params.insert(name, value).is_some() && !may_repeat {
                return Err(invalid_request("A parameter came more than once."));
            }
        }
        params.retain(|_, value| !value.is_empty());
        Ok(Self(params))
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    pub(super) fn require(&self, name: &str) -> Result<&str, Refusal> {
        self.get(name).ok_or(invalid_request("A required parameter is missing."))
    }
}

/// `None` if the decoded text is not UTF-8.
pub(super) fn decode(text: &str) -> Option<String> {
    let text = text.replace('+', " ");
    percent_decode_str(&text).decode_utf8().ok().map(Cow::into_owned)
}
