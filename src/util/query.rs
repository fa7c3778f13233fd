//! Queries of URIs that contain secrets.

use bytes::Bytes;
use http::{Uri, uri::PathAndQuery};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC};
use zeroize::Zeroizing;

/// All characters except the unreserved ones of
/// [RFC 3986 section 2.3](https://www.rfc-editor.org/rfc/rfc3986#section-2.3).
pub(crate) const QUERY_VALUE: &AsciiSet =
    &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// The query parameters of `uri`, still percent-encoded.
pub(crate) fn params(uri: &Uri) -> impl Iterator<Item = &str> {
    uri.query().unwrap_or_default().split('&').filter(|param| !param.is_empty())
}

/// Builds a path and query in a buffer that is wiped when the last reference drops.
pub(crate) struct Query {
    text: Zeroizing<Vec<u8>>,
    separator: &'static str,
}

impl Query {
    /// Starts with the path of `uri`. Reserves room for the query of `uri` and for `secrets` more bytes, percent-encoded:
    /// a buffer that grows leaves unwiped copies behind.
    pub(crate) fn with_capacity(uri: &Uri, secrets: usize) -> Self {
        let existing = uri.path_and_query().map_or(0, |path| path.as_str().len());
        let capacity = existing + "?token=&api_key=".len() + 3 * secrets;
        let mut text = Zeroizing::new(Vec::with_capacity(capacity));
        text.extend_from_slice(uri.path().as_bytes());
        Self { text, separator: "?" }
    }

    /// Appends one parameter, given in parts.
    pub(crate) fn push<'a>(&mut self, parts: impl IntoIterator<Item = &'a str>) {
        self.text.extend_from_slice(self.separator.as_bytes());
        self.separator = "&";
        parts.into_iter().for_each(|part| self.text.extend_from_slice(part.as_bytes()));
    }

    /// Replaces the path and query of `uri`; `None` if the result is too long for a URI.
    pub(crate) fn into_uri(self, uri: &Uri) -> Option<Uri> {
        let mut parts = uri.clone().into_parts();
        parts.path_and_query = Some(PathAndQuery::from_maybe_shared(Bytes::from_owner(self.text)).ok()?);
        Uri::from_parts(parts).ok()
    }
}
