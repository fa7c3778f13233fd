use std::{borrow::Cow, collections::HashMap};

use http::{HeaderMap, header::CONTENT_TYPE};
use percent_encoding::percent_decode_str;

use super::denial::Denial;

/// [RFC 8693 section 2.1](https://www.rfc-editor.org/rfc/rfc8693#section-2.1) lets these come more than once.
const REPEATABLE: [&str; 2] = ["audience", "resource"];

/// The parameters of a request, as [RFC 6749 section 3.2](https://www.rfc-editor.org/rfc/rfc6749#section-3.2)
/// reads them: each at most once, those without a value left out.
pub(super) struct Form(HashMap<String, String>);

impl Form {
    pub(super) fn read(headers: &HeaderMap, body: &[u8]) -> Result<Self, Denial> {
        let content_type =
            headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let media_type = content_type.split(';').next().unwrap_or_default().trim();
        if !media_type.eq_ignore_ascii_case("application/x-www-form-urlencoded") {
            return Err(Denial::invalid_request("The body is no form."));
        }
        let no_text = || Denial::invalid_request("The body is not UTF-8.");
        let body = std::str::from_utf8(body).map_err(|_| no_text())?;
        let mut params = HashMap::new();
        for param in body.split('&') {
            let (name, value) = param.split_once('=').unwrap_or((param, ""));
            let (name, value) = decode(name).zip(decode(value)).ok_or_else(no_text)?;
            let may_repeat = name.is_empty() || REPEATABLE.contains(&name.as_str());
            if params.insert(name, value).is_some() && !may_repeat {
                return Err(Denial::invalid_request("A parameter came more than once."));
            }
        }
        params.retain(|_, value| !value.is_empty());
        Ok(Self(params))
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    pub(super) fn require(&self, name: &str) -> Result<&str, Denial> {
        self.get(name).ok_or(Denial::invalid_request("A required parameter is missing."))
    }
}

/// `None` when it is not UTF-8.
pub(super) fn decode(text: &str) -> Option<String> {
    let text = text.replace('+', " ");
    percent_decode_str(&text).decode_utf8().ok().map(Cow::into_owned)
}
