//! The record of a request.

use std::fmt;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, Method, Uri, Version};

/// A request as it arrived, credentials included.
///
/// `Debug` omits header values, query and body, which may hold secrets.
#[derive(Clone)]
#[non_exhaustive]
pub struct Received {
    /// The method.
    pub method: Method,
    /// The URI: complete in process and over HTTP/2, only path and query over HTTP/1.1.
    pub uri: Uri,
    /// The HTTP version.
    pub version: Version,
    /// The headers.
    pub headers: HeaderMap,
    /// The first 64 KiB of the body.
    pub body: Bytes,
    /// The length of the whole body, in bytes.
    pub body_length: u64,
}

impl fmt::Debug for Received {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Received")
            .field("method", &self.method)
            .field("path", &self.uri.path())
            .field("version", &self.version)
            .field("headers", &self.headers.keys().map(HeaderName::as_str).collect::<Vec<_>>())
            .field("body_length", &self.body_length)
            .finish()
    }
}
