//! Reader for JSON error bodies of any known shape.

use serde_json::{Map, Value};

use super::redact::Redactor;

/// The fields of an error body, read from any known shape.
///
/// SelamAPI documents `{"error":{"message":…,"type":…,"code":…}}`. Gateways, proxies and token endpoints use other
/// shapes: the fields at the top level, under `detail`, as a string, in an array of one, or as OAuth 2.0's `error`
/// and `error_description` ([RFC 6749 section 5.2](https://www.rfc-editor.org/rfc/rfc6749#section-5.2)). A missing
/// field is `None`, and parsing never fails.
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

    pub(super) fn redacted(self, redactor: &Redactor) -> Self {
        let redacted = |text: Option<String>| text.map(|text| redactor.text(text));
        Self {
            code: redacted(self.code),
            error_type: redacted(self.error_type),
            message: redacted(self.message),
            request_id: redacted(self.request_id),
        }
    }

    pub(super) fn from_json(value: &Value) -> Self {
        let value = match value {
            Value::Array(items) => items.first().unwrap_or(&Value::Null),
            value => value,
        };
        let Some(root) = value.as_object() else { return Self::default() };

        let error = text(root, "error");
        let mut body = match nested(root, "error").or_else(|| nested(root, "detail")) {
            // A nested object may call its code `status`; at the top level, `status` is the HTTP status.
            Some(inner) => {
                let mut body = Self::from_fields(inner);
                body.code = body.code.or_else(|| text(inner, "status"));
                body
            }
            None => Self::from_fields(root),
        };
        body.message = body.message.or_else(|| text(root, "message"));

        if let Some(error) = error {
            let is_code = body.code.is_none() && (root.contains_key("error_description") || is_code(&error));
            match is_code {
                true => body.code = Some(error),
                false => body.message = body.message.or(Some(error)),
            }
        }
        body.request_id = body.request_id.or_else(|| text(root, "request_id"));
        body
    }

    fn from_fields(fields: &Map<String, Value>) -> Self {
        let message = text(fields, "message")
            .or_else(|| text(fields, "error_description"))
            .or_else(|| text(fields, "detail"))
            // FastAPI's list of validation errors.
            .or_else(|| text(fields.get("detail")?.get(0)?.as_object()?, "msg"));
        Self {
            code: text(fields, "code").or_else(|| match fields.get("code")? {
                Value::Number(number) => Some(number.to_string()),
                _ => None,
            }),
            error_type: text(fields, "type"),
            message,
            request_id: text(fields, "request_id"),
        }
    }
}

/// Parses JSON leniently: with a leading byte order mark, or with bytes that are not UTF-8.
pub(super) fn parse_json(body: &[u8]) -> Option<Value> {
    let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body);
    serde_json::from_str(&String::from_utf8_lossy(body)).ok()
}

fn nested<'a>(fields: &'a Map<String, Value>, name: &str) -> Option<&'a Map<String, Value>> {
    fields.get(name)?.as_object()
}

fn text(fields: &Map<String, Value>, name: &str) -> Option<String> {
    let text = fields.get(name)?.as_str()?.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

/// Tells a code such as `invalid_grant` from a sentence such as `Incorrect API key`.
fn is_code(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
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
        assert_eq!(
            parse(r#"{"request_id":"r1","error":{"message":"m","code":null,"type":""}}"#),
            (None, None, some("m"), some("r1"))
        );
        for without_fields in
            ["", "null", "[]", "[[]]", "7", "\"text\"", "{}", r#"{"error":null}"#, r#"{"code":true}"#]
        {
            assert_eq!(ErrorBody::parse(without_fields.as_bytes()), ErrorBody::default(), "{without_fields}");
        }
        assert_eq!(ErrorBody::parse("[".repeat(100_000).as_bytes()), ErrorBody::default());
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
