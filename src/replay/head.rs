//! A copy of a request's head, cheaper than `Parts::clone`.
//!
//! Each request under way keeps one, so copies are reused per thread, and the hash table of the headers is rebuilt only for a
//! replay. See "Mechanisms kept for speed" in `benches/README.md` for the gain.

use std::{cell::RefCell, mem};

use http::{Extensions, HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version};

/// How many unused copies a thread keeps, and the largest that it keeps.
const MAX_SPARES: usize = 32;
const MAX_SPARE_HEADERS: usize = 64;

thread_local! {
    #[expect(clippy::vec_box, reason = "the boxes are moved to and from requests")]
    static SPARES: RefCell<Vec<Box<Copied>>> = const { RefCell::new(Vec::new()) };
}

/// A copied head. It is boxed to keep the response future small, and given back when it is dropped.
#[derive(Debug)]
pub(super) struct Head(Option<Box<Copied>>);

#[derive(Debug, Default)]
struct Copied {
    method: Method,
    uri: Uri,
    version: Version,
    extensions: Extensions,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl Head {
    #[inline]
    pub(super) fn copy<B>(request: &Request<B>) -> Self {
        let spare = SPARES.try_with(|spares| spares.try_borrow_mut().ok()?.pop());
        let mut copied = spare.ok().flatten().unwrap_or_default();
        copied.method.clone_from(request.method());
        copied.uri.clone_from(request.uri());
        copied.version = request.version();
        if !request.extensions().is_empty() {
            copied.extensions.clone_from(request.extensions());
        }
        copied.headers.extend(request.headers().iter().map(|(name, value)| (name.clone(), value.clone())));
        Self(Some(copied))
    }

    /// The request as it was, with `body`.
    pub(super) fn into_request<B>(mut self, body: B) -> Request<B> {
        let mut request = Request::new(body);
        if let Some(copied) = &mut self.0 {
            *request.method_mut() = mem::take(&mut copied.method);
            *request.uri_mut() = mem::take(&mut copied.uri);
            *request.version_mut() = copied.version;
            *request.extensions_mut() = mem::take(&mut copied.extensions);
            let headers = request.headers_mut();
            *headers = HeaderMap::with_capacity(copied.headers.len());
            copied.headers.drain(..).for_each(|(name, value)| _ = headers.append(name, value));
        }
        request
    }
}

impl Drop for Head {
    #[inline]
    fn drop(&mut self) {
        let Some(mut copied) = self.0.take() else { return };
        // It may hold a caller's secrets, which must not outlive the request. The rest does not.
        copied.uri = Uri::default();
        copied.extensions.clear();
        copied.headers.clear();
        if copied.headers.capacity() <= MAX_SPARE_HEADERS {
            let _ = SPARES.try_with(|spares| {
                if let Ok(mut spares) = spares.try_borrow_mut()
                    && spares.len() < MAX_SPARES
                {
                    spares.push(copied);
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*, sample::select};

    use super::*;

    proptest! {
        /// J7: method, URI, version, extensions and headers, duplicates and their order included.
        #[test]
        fn a_copied_head_is_restored(
            method in select(vec!["GET", "POST", "PROPFIND"]),
            uri in select(vec!["https://api.selamgpt.com/v1/models?a=b", "/v1", "*", "https://h:1/"]),
            version in select(vec![Version::HTTP_10, Version::HTTP_11, Version::HTTP_2]),
            headers in vec((select(vec!["accept", "x-one", "x-two", "cookie"]), "[!-~]{0,9}", any::<bool>()), 0..80),
        ) {
            let mut request = Request::builder().method(method).uri(uri).version(version).extension(7_u8).body(()).unwrap();
            for (name, value, is_sensitive) in headers {
                let mut value = HeaderValue::from_str(&value).unwrap();
                value.set_sensitive(is_sensitive);
                request.headers_mut().append(name, value);
            }
            for _ in 0..2 {
                let restored = Head::copy(&request).into_request(());
                prop_assert_eq!(restored.method(), request.method());
                prop_assert_eq!(restored.uri(), request.uri());
                prop_assert_eq!(restored.version(), request.version());
                prop_assert_eq!(restored.extensions().get::<u8>(), Some(&7));
                prop_assert_eq!(restored.headers(), request.headers());
                let sensitive = |request: &Request<()>| -> Vec<_> { request.headers().values().map(HeaderValue::is_sensitive).collect() };
                prop_assert_eq!(sensitive(&restored), sensitive(&request));
            }
        }
    }
}
