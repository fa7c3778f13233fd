//! Reader for JSON error bodies of any known shape.

use std::borrow::Cow;

use serde::de::IgnoredAny;
use serde_json::{Map, Value};

use super::redact::Redactor;

/// How many objects, lists and strings an error may be inside of.
const MAX_NESTING: u32 = 6;

const CODES: [&str; 4] = ["code", "error_code", "errorCode", "errcode"];

const MESSAGES: [&str; 11] = [
    "message",
    "error_description",
    "msg",
    "detail",
    "error_message",
    "errorMessage",
    "errorSummary",
    "errmsg",
    "description",
    "title",
    "reason",
];

/// The fields of an error body, read from any known shape.
///
/// SelamAPI documents `{"error":{"message":…,"type":…,"code":…}}`. Gateways, proxies and token endpoints use other
/// shapes: the fields at the top level, under `errors` or `detail`, first in an array, inside a string, under names such
/// as `error_code` and `msg`, or as OAuth 2.0's `error` and `error_description`
/// ([RFC 6749 section 5.2](https://www.rfc-editor.org/rfc/rfc6749#section-5.2)). A missing field is `None`, and parsing
/// never fails.
///
/// ```
/// use tower_selam::ErrorBody;
///
/// let body = ErrorBody::parse(br#"{"error":{"message":"Slow down.","code":"rate_limit_exceeded"}}"#);
/// assert_eq!(body.code(), Some("rate_limit_exceeded"));
/// assert_eq!(body.message(), Some("Slow down."));
/// assert_eq!(ErrorBody::parse(b"<html>502</html>"), ErrorBody::default());
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ErrorBody {
    pub(super) code: Option<String>,
    pub(super) error_type: Option<String>,
    pub(super) message: Option<String>,
    pub(super) request_id: Option<String>,
}

impl ErrorBody {
    /// Reads `body`, of any content type and length. Text shaped like a key or a JWT is redacted.
    #[must_use]
    pub fn parse(body: &[u8]) -> Self {
        Self::read(body, &Redactor::default())
    }

    pub(crate) fn read(body: &[u8], redactor: &Redactor) -> Self {
        let fields = parse_json(body).map(|value| Self::from_json(&value)).unwrap_or_default();
        fields.redacted(redactor)
    }

    /// Returns the error code; a numeric code is returned as its digits.
    #[must_use]
    pub fn code(&self) -> Option<&str> {
        self.code.as_deref()
    }

    /// Returns the error type (`type` in the body).
    #[must_use]
    pub fn error_type(&self) -> Option<&str> {
        self.error_type.as_deref()
    }

    /// Returns the human-readable message.
    #[must_use]
    pub fn message(&self) -> Option<&str> {
        self.message.as_deref()
    }

    /// Returns the request id, if the body has one.
    #[must_use]
    pub fn request_id(&self) -> Option<&str> {
        self.request_id.as_deref()
    }

    pub(crate) fn redacted(self, redactor: &Redactor) -> Self {
        let redacted = |text: Option<String>| text.map(|text| redactor.text(text));
        Self {
            code: redacted(self.code),
            error_type: redacted(self.error_type),
            message: redacted(self.message),
            request_id: redacted(self.request_id),
        }
    }

    pub(crate) fn from_json(value: &Value) -> Self {
        let root = object(value, MAX_NESTING);
        root.map(|root| Self::from_object(&root, MAX_NESTING)).unwrap_or_default()
    }

    fn from_object(fields: &Map<String, Value>, nesting: u32) -> Self {
        let mut body = Self::from_fields(fields, nesting < MAX_NESTING);
        let Some(nesting) = nesting.checked_sub(1) else { return body };
        let nested = |name: &&str| object(fields.get(*name)?, nesting);
        if let Some(inner) = ["error", "errors", "detail", "message", "status"].iter().find_map(nested) {
            let inner = Self::from_object(&inner, nesting);
            body.code = inner.code.or(body.code);
            body.error_type = inner.error_type.or(body.error_type);
            body.message = inner.message.or(body.message);
            body.request_id = inner.request_id.or(body.request_id);
        }
        body
    }

    fn from_fields(fields: &Map<String, Value>, is_nested: bool) -> Self {
        let mut error = text(fields, "error");
        let is_oauth = fields.contains_key("error_description") || fields.contains_key("error_uri");
        let status = || {
            // At the top level, `status` is the HTTP status or a word such as `error`.
            text(fields, "status").filter(|status| is_nested || status.contains('_'))
        };
        let exception = || {
            // AWS: `com.amazonaws.service#TooManyRequestsException`.
            text(fields, "__type").and_then(|name| name.rsplit('#').next().map(str::to_owned))
        };
        let number = |name: &&str| Some(fields.get(*name)?.as_number()?.to_string());
        let code = (error.take_if(|_| is_oauth))
            .or_else(|| first(fields, &CODES))
            .or_else(|| error.take_if(|error| is_code(error)))
            .or_else(exception)
            .or_else(|| CODES.iter().find_map(number))
            .or_else(status);
        let error_type = text(fields, "type").or_else(|| error.take_if(|error| is_code(error)));
        let message = first(fields, &MESSAGES).or(error);
        Self { code, error_type, message, request_id: text(fields, "request_id") }
    }
}

/// The object that `value` is, begins with, or contains as text.
fn object(value: &Value, nesting: u32) -> Option<Cow<'_, Map<String, Value>>> {
    let nesting = nesting.checked_sub(1)?;
    match value {
        Value::Object(fields) => Some(Cow::Borrowed(fields)),
        Value::Array(items) => match items.first()? {
            // A list of messages.
            Value::String(text) if !is_json(text) => {
                Some(Cow::Owned(Map::from_iter([("error".to_owned(), text.as_str().into())])))
            }
            item => object(item, nesting),
        },
        // Gateways quote the error that they got, alone or after a text of their own.
        Value::String(text) => {
            let start = if is_json(text) { 0 } else { text.find("{\"")? };
            let value = parse_value(&text[start..])?;
            object(&value, nesting).map(|fields| Cow::Owned(fields.into_owned()))
        }
        _ => None,
    }
}

/// Parses JSON leniently: with a leading byte order mark, with bytes that are not UTF-8, cut off, followed by other text, or
/// as a server-sent event.
pub(super) fn parse_json(body: &[u8]) -> Option<Value> {
    let text = String::from_utf8_lossy(body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body));
    parse_value(&text).or_else(|| parse_events(&text))
}

/// Parses the value that `text` begins with.
fn parse_value(text: &str) -> Option<Value> {
    match serde_json::Deserializer::from_str(text).into_iter().next()? {
        Ok(value) => Some(value),
        Err(error) if error.is_eof() => serde_json::from_str(&complete(text)?).ok(),
        Err(_) => None,
    }
}

/// Completes JSON that was cut off, without the member or item that it was cut off in.
fn complete(text: &str) -> Option<String> {
    let (mut open, mut in_string, mut is_escaped, mut end) = (Vec::new(), false, false, None);
    for (at, char) in text.char_indices() {
        if in_string {
            in_string = is_escaped || char != '"';
            is_escaped = !is_escaped && char == '\\';
            continue;
        }
        match char {
            '"' => in_string = true,
            '{' => open.push('}'),
            '[' => open.push(']'),
            '}' | ']' => drop(open.pop()),
            ',' => {}
            _ => continue,
        }
        if char != '"' {
            let is_comma = char == ',';
            end = Some((at + usize::from(!is_comma), open.len()));
        }
    }
    let (end, depth) = end?;
    let closing = open.get(..depth)?.iter().rev();
    Some(text[..end].chars().chain(closing.copied()).collect())
}

/// Parses the first of the server-sent events that is an object.
fn parse_events(text: &str) -> Option<Value> {
    let mut data = String::new();
    for line in text.lines().chain([""]) {
        if let Some(part) = line.strip_prefix("data:") {
            data.push_str(part);
            data.push('\n');
        } else if line.trim().is_empty() {
            if let Some(value @ Value::Object(_)) = parse_value(&data) {
                return Some(value);
            }
            data.clear();
        }
    }
    None
}

fn first(fields: &Map<String, Value>, names: &[&str]) -> Option<String> {
    names.iter().find_map(|name| text(fields, name))
}

fn text(fields: &Map<String, Value>, name: &str) -> Option<String> {
    let text = fields.get(name)?.as_str()?.trim();
    (!text.is_empty() && !is_json(text)).then(|| text.to_owned())
}

/// Tells JSON inside a string from a message.
fn is_json(text: &str) -> bool {
    text.trim_start().starts_with(['{', '[', '"']) && serde_json::from_str::<IgnoredAny>(text).is_ok()
}

/// Tells a code such as `invalid_grant` or `INVALID_SESSION_ID` from text such as `Unauthorized` or `Incorrect API key`.
pub(crate) fn is_code(text: &str) -> bool {
    let is_upper = text.bytes().any(|byte| byte.is_ascii_uppercase());
    let is_plain = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    is_plain && (!is_upper || text.contains('_'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(body: &str) -> (Option<String>, Option<String>, Option<String>, Option<String>) {
        let ErrorBody { code, error_type, message, request_id } = ErrorBody::parse(body.as_bytes());
        (code, error_type, message, request_id)
    }

    fn some(text: &str) -> Option<String> {
        Some(text.to_owned())
    }

    #[test]
    fn other_shapes_are_read() {
        assert_eq!(parse(r#"{"error":"invalid_client"}"#), (some("invalid_client"), None, None, None));
        assert_eq!(parse(r#"{"error":"Unauthorized"}"#), (None, None, some("Unauthorized"), None));
        assert_eq!(
            parse(r#"{"detail":[{"loc":["body"],"msg":"field required"}]}"#),
            (None, None, some("field required"), None)
        );
        for (body, code, message) in [
            (r#"{"code":400,"error_code":"no_session","msg":"gone"}"#, "no_session", "gone"),
            (r#"{"errors":[{"code":"a","message":"b"},{"code":"c"}]}"#, "a", "b"),
            (r#"{"errors":["No b"],"code":"a"}"#, "a", "No b"),
            (r#"{"detail":{"error":{"code":"a","message":"b"}}}"#, "a", "b"),
            (r#""{\"error\":{\"code\":\"a\",\"message\":\"b\"}}""#, "a", "b"),
            (r#"{"error":"{\"code\":\"a\",\"message\":\"[b]\"}"}"#, "a", "[b]"),
            (r#"{"error":{"error":{"error":"a","error_description":"b"}}}"#, "a", "b"),
            (r#"{"errorCode":"E1","errorSummary":"b"}"#, "E1", "b"),
            (
                r#"{"message":"Upstream says {\"error\":{\"code\":\"a\",\"message\":\"b\"}} today","code":"401"}"#,
                "a",
                "b",
            ),
            (r#"{"detail":"{\"error\":{\"code\":\"a\",\"message\":\"b\"}}"}"#, "a", "b"),
            (r#"[{"error":{"code":"a","message":"b"}}]"#, "a", "b"),
            ("\u{feff}{\"code\":\"a\",\"message\":\"b\"}", "a", "b"),
            (
                "event: error\r\ndata: {\"error\":\r\ndata:  {\"code\":\"a\",\"message\":\"b\"}}\r\n\r\n",
                "a",
                "b",
            ),
            (": ping\n\ndata: {\"code\":\"a\",\"message\":\"b\"}\n\ndata: [DONE]\n\n", "a", "b"),
            ("{\"code\":\"a\",\"message\":\"b\"}\n{\"code\":\"c\"}\n", "a", "b"),
            (r#"{"error":{"code":"a","message":"b","details":[{"x":"cut o"#, "a", "b"),
            (r#"{"error":{"code":"a","message":"b"},"request"#, "a", "b"),
            (r#"{"__type":"com.x#SlowException","message":"b"}"#, "SlowException", "b"),
        ] {
            assert_eq!(parse(body), (some(code), None, some(message), None), "{body}");
        }
        assert_eq!(
            parse(r#"{"request_id":"r1","error":{"message":"m","code":null,"type":""}}"#),
            (None, None, some("m"), some("r1"))
        );
        for without_fields in
            ["", "null", "[]", "[[]]", "7", "\"text\"", "{}", r#"{"error":null}"#, r#"{"code":true}"#]
        {
            assert_eq!(ErrorBody::parse(without_fields.as_bytes()), ErrorBody::default(), "{without_fields}");
        }
        for repeated in
            ["[", "{\"a\":", "[\"", "data: {\n", "{\"a\":\"{", "\\\"", "{\"message\":\"{\\\"message\\\":"]
        {
            assert_eq!(ErrorBody::parse(repeated.repeat(30_000).as_bytes()), ErrorBody::default());
        }
    }

    proptest! {
        /// E2: no bytes panic.
        #[test]
        fn parse_never_panics_on_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = ErrorBody::parse(&bytes);
        }

        /// E2: no JSON panics.
        #[test]
        fn parse_never_panics_on_json(
            outer in "error|detail|code|message|type|status",
            inner in "\\{\"(code|message|type|status|detail|msg)\":(1|-1\\.5e9|null|true|\"x\"|\\[\\{\\}\\])\\}|\\[\\]|\"\"|0"
        ) {
            let _ = ErrorBody::parse(format!("{{\"{outer}\":{inner}}}").as_bytes());
        }
    }
}
