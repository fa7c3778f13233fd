//! A copy of a request's head that costs no allocation: what has been used is used again.
//!
//! Values, and names that are not standard ones, are copied as text. To clone them would count references, and allocates
//! where that was never done before. What is marked sensitive is cloned all the same: its bytes are its owner's to wipe.

use std::{
    cell::Cell,
    hash::{Hash, Hasher},
    mem,
};

use bytes::Bytes;
use http::{
    Extensions, HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version, header,
    uri::{self, Scheme},
};

/// So many are kept for each thread, and none with room for more headers or text than this.
const KEPT: usize = 32;
const KEPT_HEADERS: usize = 64;
const KEPT_TEXT: usize = 8 * 1024;

/// What a usual head has room in.
const USUAL_HEADERS: usize = 8;
const USUAL_TEXT: usize = 256;

thread_local! {
    /// The first of this thread's spares.
    static SPARE: Cell<Option<Box<Head>>> = const { Cell::new(None) };
}

/// The head of a request.
#[derive(Default)]
struct Head {
    method: Method,
    scheme: Option<Scheme>,
    version: Version,
    extensions: Extensions,
    /// Authority and path of the URI, then names and values, one after the other, and zeros where there is room.
    text: Box<[u8]>,
    used_text: usize,
    /// How long they are in the text. Zero when there is none.
    authority: usize,
    path: usize,
    fields: Box<[Field]>,
    used_fields: usize,
    sensitive: Vec<HeaderValue>,
    /// The next spare, and how many there are from this one on.
    next: Option<Box<Self>>,
    spares: usize,
}

/// A header, by how long it is in the text.
#[derive(Clone)]
struct Field {
    /// Zero when it is `standard`.
    name: usize,
    standard: HeaderName,
    /// Or [`SENSITIVE`].
    value: usize,
}

const SENSITIVE: usize = usize::MAX;

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
        *request.method_mut() = mem::take(&mut head.method);
        *request.version_mut() = head.version;
        *request.extensions_mut() = mem::take(&mut head.extensions);
        let fields = head.fields.get(..head.used_fields)?;
        *request.headers_mut() = HeaderMap::try_with_capacity(fields.len()).ok()?;

        let mut text = Bytes::copy_from_slice(head.text.get(..head.used_text)?);
        let mut next = |length: usize| (length <= text.len()).then(|| text.split_to(length));
        let mut parts = uri::Parts::default();
        parts.scheme = head.scheme.take();
        if head.authority > 0 {
            parts.authority = Some(uri::Authority::from_maybe_shared(next(head.authority)?).ok()?);
        }
        if head.path > 0 {
            parts.path_and_query = Some(uri::PathAndQuery::from_maybe_shared(next(head.path)?).ok()?);
        }
        *request.uri_mut() = Uri::from_parts(parts).ok()?;

        let mut sensitive = head.sensitive.drain(..);
        for Field { name, standard, value } in fields {
            let name = match *name {
                0 => standard.clone(),
                length => HeaderName::from_bytes(&next(length)?).ok()?,
            };
            let value = match *value {
                SENSITIVE => sensitive.next()?,
                length => HeaderValue::from_maybe_shared(next(length)?).ok()?,
            };
            request.headers_mut().try_append(name, value).ok()?;
        }
        Some(request)
    }
}

impl Default for Field {
    fn default() -> Self {
        Self { name: 0, standard: header::HOST, value: 0 }
    }
}

impl Head {
    #[cold]
    fn empty() -> Box<Self> {
        let (fields, text) = (vec![Field::default(); USUAL_HEADERS], vec![0; USUAL_TEXT]);
        Box::new(Self { fields: fields.into(), text: text.into(), ..Self::default() })
    }

    #[inline]
    fn copy<B>(&mut self, request: &Request<B>) {
        if self.method != *request.method() {
            self.method.clone_from(request.method());
        }
        self.version = request.version();
        if !request.extensions().is_empty() {
            self.extensions.clone_from(request.extensions());
        }
        self.scheme = request.uri().scheme().cloned();
        if self.copy_text(request.uri(), request.headers()).is_none() {
            self.copy_large(request.uri(), request.headers());
        }
    }

    /// `None` when there is too little room.
    #[inline]
    fn copy_text(&mut self, uri: &Uri, headers: &HeaderMap) -> Option<()> {
        let mut room = Room(&mut self.text);
        let [authority, path] = texts(uri);
        self.authority = room.push(authority.as_bytes())?;
        self.path = room.push(path.as_bytes())?;
        let mut fields = self.fields.iter_mut();
        for (name, value) in headers {
            let field = fields.next()?;
            if is_standard(name) {
                if field.standard != *name {
                    field.standard.clone_from(name);
                }
                field.name = 0;
            } else {
                field.name = room.push(name.as_str().as_bytes())?;
            }
            if value.is_sensitive() {
                field.value = SENSITIVE;
                keep_sensitive(&mut self.sensitive, value);
            } else {
                field.value = room.push(value.as_bytes())?;
            }
        }
        let left = room.0.len();
        self.used_text = self.text.len() - left;
        self.used_fields = headers.len();
        Some(())
    }

    /// Makes room for all of it first.
    #[cold]
    fn copy_large(&mut self, uri: &Uri, headers: &HeaderMap) {
        // What did fit.
        self.text.fill(0);
        self.sensitive.clear();
        let [authority, path] = texts(uri);
        let fields = headers.iter().map(|(name, value)| name.as_str().len() + value.len());
        let text = authority.len() + path.len() + fields.sum::<usize>();
        self.text = vec![0; text.max(self.text.len()).next_power_of_two()].into();
        let fields = headers.len().max(self.fields.len()).next_power_of_two();
        self.fields = vec![Field::default(); fields].into();
        let copied = self.copy_text(uri, headers);
        debug_assert!(copied.is_some());
    }

    #[inline]
    fn clear(&mut self) {
        // A caller's own secrets may be among it, and it lies there until it is used again.
        if let Some(text) = self.text.get_mut(..self.used_text) {
            text.fill(0);
        }
        if !self.sensitive.is_empty() {
            self.sensitive.clear();
        }
        if !self.extensions.is_empty() {
            self.extensions.clear();
        }
    }
}

/// Authority and path, empty where there is none.
#[inline]
fn texts(uri: &Uri) -> [&str; 2] {
    let authority = uri.authority().map_or("", uri::Authority::as_str);
    [authority, uri.path_and_query().map_or("", uri::PathAndQuery::as_str)]
}

/// Whether a clone of it costs nothing. Such a name is hashed as a number, any other by its bytes.
#[inline]
fn is_standard(name: &HeaderName) -> bool {
    struct Seen {
        bytes: bool,
    }

    impl Hasher for Seen {
        #[inline]
        fn write(&mut self, _: &[u8]) {
            self.bytes = true;
        }

        #[inline]
        fn write_isize(&mut self, _: isize) {}

        fn finish(&self) -> u64 {
            0
        }
    }

    let mut seen = Seen { bytes: false };
    name.hash(&mut seen);
    !seen.bytes
}

#[cold]
fn keep_sensitive(sensitive: &mut Vec<HeaderValue>, value: &HeaderValue) {
    sensitive.push(value.clone());
}

/// What of a text is free.
struct Room<'a>(&'a mut [u8]);

impl Room<'_> {
    /// How long it is; `None` when it does not fit.
    #[inline]
    fn push(&mut self, text: &[u8]) -> Option<usize> {
        let (into, left) = mem::take(&mut self.0).split_at_mut_checked(text.len())?;
        copy_short(into, text).unwrap_or_else(|| copy_long(into, text));
        self.0 = left;
        Some(text.len())
    }
}

/// Copies texts of 8 to 32 bytes, as most are: both ends, which may overlap, in a few instructions. `None`: it is another.
#[inline]
fn copy_short(into: &mut [u8], text: &[u8]) -> Option<()> {
    if text.len() > 32 {
        return None;
    }
    if let (Some(first), Some(last)) = (text.first_chunk::<16>(), text.last_chunk::<16>()) {
        *into.first_chunk_mut()? = *first;
        *into.last_chunk_mut()? = *last;
    } else {
        let (first, last) = (text.first_chunk::<8>()?, text.last_chunk::<8>()?);
        *into.first_chunk_mut()? = *first;
        *into.last_chunk_mut()? = *last;
    }
    Some(())
}

// A call out of line, which leaves the registers to the rest.
#[inline(never)]
fn copy_long(into: &mut [u8], text: &[u8]) {
    into.copy_from_slice(text);
}

impl Drop for HeadCopy {
    #[inline]
    fn drop(&mut self) {
        let Some(mut head) = self.0.take() else { return };
        head.clear();
        if head.text.len() <= KEPT_TEXT && head.fields.len() <= KEPT_HEADERS {
            put(head);
        }
    }
}

/// A spare one of this thread's.
#[inline]
fn take() -> Option<Box<Head>> {
    let taken = SPARE.try_with(|spare| {
        let mut head = spare.take()?;
        spare.set(head.next.take());
        Some(head)
    });
    taken.ok().flatten()
}

/// A thread that is ending has no spares any more.
#[inline]
fn put(mut head: Box<Head>) {
    let _ = SPARE.try_with(|spare| {
        let next = spare.take();
        head.spares = 1 + next.as_ref().map_or(0, |next| next.spares);
        if head.spares > KEPT {
            spare.set(next);
        } else {
            head.next = next;
            spare.set(Some(head));
        }
    });
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn again(request: &Request<()>) -> Request<()> {
        drop(HeadCopy::of(request));
        assert!(is_wiped());
        let again = HeadCopy::of(request).into_request(()).unwrap();
        assert!(is_wiped());
        again
    }

    /// Whether nothing is left of a head in what is used again.
    fn is_wiped() -> bool {
        take().is_none_or(|head| {
            let text = head.text.iter().all(|byte| *byte == 0);
            let wiped = text && head.sensitive.is_empty() && head.extensions.is_empty();
            put(head);
            wiped
        })
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

    #[test]
    fn j7_a_head_with_many_headers_is_had_again() {
        for count in [USUAL_HEADERS, USUAL_HEADERS + 1, KEPT_HEADERS + 1, 1_000] {
            let mut request = Request::new(());
            for index in 0..count {
                let mut value = HeaderValue::from(index);
                value.set_sensitive(index % 3 == 0);
                request.headers_mut().append(if index % 2 == 0 { "accept" } else { "x-own" }, value);
            }
            assert_same(&again(&request), &request);
        }
    }

    #[test]
    fn as_much_as_a_usual_head_has_room_in_takes_no_more() {
        let room = |copy: &HeadCopy| copy.0.as_ref().unwrap().text.len();
        SPARE.set(None);
        let value = "x".repeat(USUAL_TEXT - "/".len());
        let mut request = Request::get("/").header("accept", &value).body(()).unwrap();
        let copy = HeadCopy::of(&request);
        assert_eq!(room(&copy), USUAL_TEXT);
        assert_same(&copy.into_request(()).unwrap(), &request);

        request.headers_mut().append("accept", HeaderValue::from_static("y"));
        let copy = HeadCopy::of(&request);
        assert_eq!(room(&copy), 2 * USUAL_TEXT);
        assert_same(&copy.into_request(()).unwrap(), &request);
    }

    #[test]
    fn no_more_than_so_many_are_kept_and_none_that_is_large() {
        let kept = || {
            let first = SPARE.take();
            let count = std::iter::successors(first.as_deref(), |head| head.next.as_deref()).count();
            SPARE.set(first);
            count
        };
        SPARE.set(None);
        let request = Request::new(());
        let copies: Vec<_> = (0..2 * KEPT).map(|_| HeadCopy::of(&request)).collect();
        assert_eq!(kept(), 0);
        drop(copies);
        assert_eq!(kept(), KEPT);
        let copies: Vec<_> = (0..3).map(|_| HeadCopy::of(&request)).collect();
        assert_eq!(kept(), KEPT - 3);
        drop(copies);
        assert_eq!(kept(), KEPT);

        let large = Request::get("/").header("large", "x".repeat(KEPT_TEXT)).body(()).unwrap();
        drop(HeadCopy::of(&large));
        assert_eq!(kept(), KEPT - 1);
        let mut many = Request::new(());
        for index in 0..=KEPT_HEADERS {
            many.headers_mut().append("many", index.into());
        }
        drop(HeadCopy::of(&many));
        assert_eq!(kept(), KEPT - 2);
    }

    #[test]
    fn a_standard_name_is_told_from_another() {
        for name in [header::ACCEPT, header::AUTHORIZATION, header::X_XSS_PROTECTION] {
            assert!(is_standard(&name), "{name}");
        }
        for name in
            [HeaderName::from_static("x-api-key"), "x-request-id".parse().unwrap(), "a".parse().unwrap()]
        {
            assert!(!is_standard(&name), "{name}");
        }
    }

    proptest! {
        /// What is used again is what the heads before left, of every other size.
        #[test]
        fn j7_every_head_is_had_again(
            path in "/[a-z%0-9]{0,20}(\\?[a-z=&]{0,10})?",
            method in "GET|POST|PURGE|A-METHOD-OF-ITS-OWN",
            fields in vec(
                ("[a-z-]{1,12}|accept|content-type|user-agent|date", "[ -~\u{e9}]{0,40}", any::<bool>()),
                0..24,
            ),
        ) {
            let uri = format!("https://api.selamgpt.com{path}");
            let mut request = Request::builder().method(&*method).uri(uri).body(()).unwrap();
            for (name, value, sensitive) in fields {
                let mut value = HeaderValue::from_bytes(value.as_bytes()).unwrap();
                value.set_sensitive(sensitive);
                request.headers_mut().append(HeaderName::from_bytes(name.as_bytes()).unwrap(), value);
            }
            assert_same(&again(&request), &request);
        }
    }
}
