//! Queries of URIs that hold secrets.

use bytes::Bytes;
use http::{Uri, uri::PathAndQuery};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC};
use zeroize::Zeroizing;

/// Everything but the unreserved characters of
/// [RFC 3986 section 2.3](https://www.rfc-editor.org/rfc/rfc3986#section-2.3).
pub(crate) const QUERY_VALUE: &AsciiSet =
    &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// The parameters of `uri`, each as it is written.
pub(crate) fn params(uri: &Uri) -> impl Iterator<Item = &str> {
    uri.query().unwrap_or_default().split('&').filter(|param| !param.is_empty())
}

/// A path and query in the making, wiped like every other buffer that holds a secret.
pub(crate) struct Query {
    text: Zeroizing<Vec<u8>>,
    separator: &'static str,
}

impl Query {
    /// For `uri` with secrets of so many bytes: all it can grow to, as growing leaves copies behind.
    pub(crate) fn with_capacity(uri: &Uri, secrets: usize) -> Self {
        let own = uri.path_and_query().map_or(0, |path| path.as_str().len());
        let mut text = Zeroizing::new(Vec::with_capacity(own + "?token=&api_key=".len() + 3 * secrets));
        text.extend_from_slice(uri.path().as_bytes());
        Self { text, separator: "?" }
    }

    pub(crate) fn push<'a>(&mut self, parts: impl IntoIterator<Item = &'a str>) {
        self.text.extend_from_slice(self.separator.as_bytes());
        self.separator = "&";
        parts.into_iter().for_each(|part| self.text.extend_from_slice(part.as_bytes()));
    }

    pub(crate) fn into_uri(self, uri: &Uri) -> Option<Uri> {
        let mut parts = uri.clone().into_parts();
        parts.path_and_query = Some(PathAndQuery::from_maybe_shared(Bytes::from_owner(self.text)).ok()?);
        Uri::from_parts(parts).ok()
    }
}
