//! A copy of a request's head that costs no allocation: what has been used is used again.

use std::cell::RefCell;

use http::{Extensions, HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version, request::Parts};

/// So many are kept for each thread, and no larger ones than this.
const KEPT: usize = 32;
const KEPT_HEADERS: usize = 64;

thread_local! {
    #[expect(clippy::vec_box, reason = "the boxes are what is used again")]
    static SPARE: RefCell<Vec<Box<Head>>> = const { RefCell::new(Vec::new()) };
}

/// The head of a request.
#[derive(Debug, Default)]
struct Head {
    method: Method,
    uri: Uri,
    version: Version,
    headers: Vec<(HeaderName, HeaderValue)>,
    extensions: Extensions,
}

/// A copied head. Goes back to where it came from when it is dropped.
#[derive(Debug)]
pub(super) struct HeadCopy(Option<Box<Head>>);

impl HeadCopy {
    pub(super) fn of<B>(request: &Request<B>) -> Self {
        let spare = SPARE.try_with(|spare| spare.try_borrow_mut().ok()?.pop()).ok().flatten();
        let mut head = spare.unwrap_or_default();
        head.method.clone_from(request.method());
        head.uri.clone_from(request.uri());
        head.version = request.version();
        let headers = request.headers().iter().map(|(name, value)| (name.clone(), value.clone()));
        head.headers.extend(headers);
        head.extensions.clone_from(request.extensions());
        Self(Some(head))
    }

    /// The request as it was; `None` if it cannot be.
    pub(super) fn into_request<B>(mut self, body: B) -> Option<Request<B>> {
        let head = self.0.as_deref_mut()?;
        let mut headers = HeaderMap::try_with_capacity(head.headers.len()).ok()?;
        for (name, value) in head.headers.drain(..) {
            headers.try_append(name, value).ok()?;
        }
        let (mut parts, ()) = Request::new(()).into_parts();
        let Parts { method, uri, version, extensions, .. } = &mut parts;
        *method = std::mem::take(&mut head.method);
        *uri = std::mem::take(&mut head.uri);
        *version = head.version;
        *extensions = std::mem::take(&mut head.extensions);
        parts.headers = headers;
        Some(Request::from_parts(parts, body))
    }
}

impl Drop for HeadCopy {
    fn drop(&mut self) {
        let Some(mut head) = self.0.take() else { return };
        head.headers.clear();
        head.uri = Uri::default();
        head.extensions.clear();
        if head.headers.capacity() <= KEPT_HEADERS {
            // A thread that is ending has no spares any more.
            let _ = SPARE.try_with(|spare| {
                if let Ok(mut spare) = spare.try_borrow_mut()
                    && spare.len() < KEPT
                {
                    spare.push(head);
                }
            });
        }
    }
}
