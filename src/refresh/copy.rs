//! A copy of a request's head that costs no allocation: what has been used is used again.
//!
//! Names and values are copied as text. To clone them would count references, and allocates where that was never done
//! before. What is marked sensitive is cloned all the same: its bytes are its owner's to wipe.

use std::cell::Cell;

use bytes::Bytes;
use http::{
    Extensions, HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version,
    uri::{self, Scheme},
};

/// So many are kept for each thread, and none with more headers or text than this.
const KEPT: usize = 32;
const KEPT_HEADERS: usize = 64;
const KEPT_TEXT: usize = 8 * 1024;

/// What a usual head has room in.
const USUAL_HEADERS: usize = 8;
const USUAL_TEXT: usize = 256;

thread_local! {
    #[expect(clippy::vec_box, reason = "the boxes are what is used again")]
    static SPARE: Cell<Vec<Box<Head>>> = const { Cell::new(Vec::new()) };
}

/// The head of a request.
#[derive(Default)]
struct Head {
    method: Method,
    scheme: Option<Scheme>,
    version: Version,
    extensions: Extensions,
    /// Authority and path of the URI, then names and values, one after the other.
    text: Vec<u8>,
    authority: Option<usize>,
    path: Option<usize>,
    fields: Vec<Field>,
    sensitive: Vec<HeaderValue>,
}

/// A header, by how long it is in the text.
struct Field {
    name: usize,
    /// `None` when it is sensitive.
    value: Option<usize>,
}

/// A copied head, or none. Goes back to where it came from when it is dropped.
#[derive(Default)]
pub(super) struct HeadCopy(Option<Box<Head>>);

impl HeadCopy {
    pub(super) fn of<B>(request: &Request<B>) -> Self {
        let mut head = take().unwrap_or_else(Head::empty);
        head.copy(request);
        Self(Some(head))
    }

    /// The request as it was; `None` if it cannot be.
    pub(super) fn into_request<B>(mut self, body: B) -> Option<Request<B>> {
        let head = self.0.as_deref_mut()?;
        let mut request = Request::new(body);
        *request.method_mut() = std::mem::take(&mut head.method);
        *request.version_mut() = head.version;
        *request.extensions_mut() = std::mem::take(&mut head.extensions);
        *request.headers_mut() = HeaderMap::try_with_capacity(head.fields.len()).ok()?;

        let mut text = Bytes::copy_from_slice(&head.text);
        let mut next = |length: usize| (length <= text.len()).then(|| text.split_to(length));
        let mut parts = uri::Parts::default();
        parts.scheme = head.scheme.take();
        if let Some(authority) = head.authority {
            parts.authority = Some(uri::Authority::from_maybe_shared(next(authority)?).ok()?);
        }
        if let Some(path) = head.path {
            parts.path_and_query = Some(uri::PathAndQuery::from_maybe_shared(next(path)?).ok()?);
        }
        *request.uri_mut() = Uri::from_parts(parts).ok()?;

        let mut sensitive = head.sensitive.drain(..);
        for Field { name, value } in &head.fields {
            let name = HeaderName::from_bytes(&next(*name)?).ok()?;
            let value = match value {
                Some(length) => HeaderValue::from_maybe_shared(next(*length)?).ok()?,
                None => sensitive.next()?,
            };
            request.headers_mut().try_append(name, value).ok()?;
        }
        Some(request)
    }
}

impl Head {
    #[cold]
    fn empty() -> Box<Self> {
        let (text, fields) = (Vec::with_capacity(USUAL_TEXT), Vec::with_capacity(USUAL_HEADERS));
        Box::new(Self { text, fields, ..Self::default() })
    }

    #[inline]
    fn copy<B>(&mut self, request: &Request<B>) {
        self.method.clone_from(request.method());
        self.version = request.version();
        if !request.extensions().is_empty() {
            self.extensions.clone_from(request.extensions());
        }
        let uri = request.uri();
        self.scheme = uri.scheme().cloned();
        self.authority = uri.authority().map(|authority| self.push(authority.as_str().as_bytes()));
        self.path = uri.path_and_query().map(|path| self.push(path.as_str().as_bytes()));
        for (name, value) in request.headers() {
            let name = self.push(name.as_str().as_bytes());
            let value = if value.is_sensitive() {
                self.sensitive.push(value.clone());
                None
            } else {
                Some(self.push(value.as_bytes()))
            };
            self.fields.push(Field { name, value });
        }
    }

    #[inline]
    fn push(&mut self, text: &[u8]) -> usize {
        self.text.extend_from_slice(text);
        text.len()
    }

    fn clear(&mut self) {
        // A caller's own secrets may be among it, and it lies there until it is used again.
        self.text.fill(0);
        self.text.clear();
        self.fields.clear();
        if !self.sensitive.is_empty() {
            self.sensitive.clear();
        }
        if !self.extensions.is_empty() {
            self.extensions.clear();
        }
    }
}

impl Drop for HeadCopy {
    #[inline]
    fn drop(&mut self) {
        let Some(mut head) = self.0.take() else { return };
        head.clear();
        if head.text.capacity() <= KEPT_TEXT && head.fields.capacity() <= KEPT_HEADERS {
            put(head);
        }
    }
}

/// A spare one of this thread's.
#[inline]
fn take() -> Option<Box<Head>> {
    SPARE
        .try_with(|cell| {
            let mut spare = cell.take();
            let head = spare.pop();
            cell.set(spare);
            head
        })
        .ok()
        .flatten()
}

/// A thread that is ending has no spares any more.
#[inline]
fn put(head: Box<Head>) {
    let _ = SPARE.try_with(|cell| {
        let mut spare = cell.take();
        if spare.len() < KEPT {
            spare.push(head);
        }
        cell.set(spare);
    });
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn again(request: &Request<()>) -> Request<()> {
        HeadCopy::of(request).into_request(()).unwrap()
    }

    fn assert_same(again: &Request<()>, request: &Request<()>) {
        assert_eq!(again.method(), request.method());
        assert_eq!(again.uri(), request.uri());
        assert_eq!(again.uri().to_string(), request.uri().to_string());
        assert_eq!(again.version(), request.version());
        let fields = |request: &Request<()>| -> Vec<(HeaderName, Vec<u8>, bool)> {
            let fields = request.headers().iter();
            fields
                .map(|(name, value)| (name.clone(), value.as_bytes().to_vec(), value.is_sensitive()))
                .collect()
        };
        assert_eq!(fields(again), fields(request));
    }

    #[test]
    fn j7_uris_of_every_form_are_had_again() {
        for uri in [
            "https://api.selamgpt.com/v1/models?limit=3&x=%20",
            "https://api.selamgpt.com",
            "http://127.0.0.1:8080/",
            "wss://api.selamgpt.com/v1/audio/agent",
            "/v1/models",
            "/v1/models?a=b",
            "api.selamgpt.com:443",
            "*",
            "/",
        ] {
            let request = Request::builder().uri(uri).body(()).unwrap();
            assert_same(&again(&request), &request);
        }
    }

    #[test]
    fn j7_a_large_head_is_had_again_and_none_leaves_anything_behind() {
        let large = "x".repeat(2 * KEPT_TEXT);
        let mut request = Request::get("https://api.selamgpt.com/").header("large", &large).body(()).unwrap();
        assert_same(&again(&request), &request);

        let mut secret = HeaderValue::from_static("sk-selam-example");
        secret.set_sensitive(true);
        request.headers_mut().insert("x-secret", secret);
        request.extensions_mut().insert(7_u8);
        request.headers_mut().remove("large");
        let copied = again(&request);
        assert_eq!(copied.extensions().get::<u8>(), Some(&7));
        assert_same(&copied, &request);
        drop(HeadCopy::of(&request));

        let plain = Request::new(());
        let copied = again(&plain);
        assert!(copied.extensions().is_empty() && copied.headers().is_empty());
        assert_same(&copied, &plain);
    }

    proptest! {
        #[test]
        fn j7_every_head_is_had_again(
            path in "/[a-z%0-9]{0,20}(\\?[a-z=&]{0,10})?",
            fields in vec(("[a-z-]{1,12}", "[ -~\u{e9}]{0,40}", any::<bool>()), 0..12),
        ) {
            let mut request = Request::put(format!("https://api.selamgpt.com{path}")).body(()).unwrap();
            for (name, value, sensitive) in fields {
                let mut value = HeaderValue::from_bytes(value.as_bytes()).unwrap();
                value.set_sensitive(sensitive);
                request.headers_mut().append(HeaderName::from_bytes(name.as_bytes()).unwrap(), value);
            }
            assert_same(&again(&request), &request);
        }
    }
}
