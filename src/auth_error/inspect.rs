//! Reads the body of a 401 or 403 within limits, and returns it as if it had not been read.

use std::{
    fmt, mem,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, BufMut, Bytes};
use http::{
    HeaderMap, HeaderValue, Response,
    header::{CONTENT_ENCODING, CONTENT_LENGTH},
    response::Parts,
};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use zeroize::Zeroizing;

use crate::{
    AuthError, BoxError,
    authorize::Sent,
    error::{Redactor, decoded},
    util::timer::Timer,
};

/// How much of an error body is read, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BodyLimits {
    pub(crate) size: usize,
    pub(crate) time: Duration,
}

impl Default for BodyLimits {
    fn default() -> Self {
        Self { size: 64 * 1024, time: Duration::from_secs(5) }
    }
}

/// How many frames are read before other tasks get a turn: a body may always be ready, and with empty frames.
const FRAMES_PER_POLL: usize = 128;

/// The size of most error bodies, and more.
const SHORT_BODY: usize = 1024;

/// How much of the rest of a frame is copied at once, if it has to be.
const MAX_COPY: usize = 64 * 1024;

/// Digests of the body, which are wrong once it is masked.
const DIGESTS: [&str; 4] = ["content-digest", "content-md5", "digest", "repr-digest"];

/// Marks a response whose body an inner layer has read already, for as long as it may take.
#[derive(Clone, Copy)]
struct WasRead;

/// A 401 or 403 whose body is being read.
pub(crate) struct Inspection<B: Body> {
    parts: Parts,
    body: Pin<Box<B>>,
    limits: BodyLimits,
    timer: Timer,
    /// A copy of the data: frames may be tiny, or small parts of large buffers.
    read: Vec<u8>,
    /// The same without its content encodings, if it has any that are known.
    decoded: Option<Zeroizing<Vec<u8>>>,
    end: Option<End<B>>,
}

/// Why reading ended.
enum End<B: Body> {
    Complete {
        trailers: Option<HeaderMap>,
    },
    /// The body broke off.
    Failed(B::Error),
    /// `unread` is the rest of a frame that was too long.
    LimitReached {
        unread: Option<B::Data>,
    },
}

impl<B: Body> Inspection<B> {
    #[cold]
    pub(crate) fn new(response: Response<B>, mut limits: BodyLimits) -> Box<Self> {
        let (mut parts, body) = response.into_parts();
        if parts.extensions.remove::<WasRead>().is_some() {
            limits.time = Duration::ZERO;
        }
        let timer = Timer::new(limits.time);
        Box::new(Self {
            parts,
            body: Box::pin(body),
            limits,
            timer,
            read: Vec::new(),
            decoded: None,
            end: None,
        })
    }

    /// Reads until the body ends or a limit is reached.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.end.is_none() {
            self.end = Some(ready!(self.poll_end(cx)));
            self.decoded = decoded(&self.parts.headers, &self.read, self.limits.size);
        }
        Poll::Ready(())
    }

    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<End<B>> {
        // Frames that are ready count even when the time is over.
        for _ in 0..FRAMES_PER_POLL {
            let Poll::Ready(frame) = self.body.as_mut().poll_frame(cx) else {
                return self.poll_timer(cx);
            };
            match frame {
                None => return Poll::Ready(End::Complete { trailers: None }),
                Some(Err(error)) => return Poll::Ready(End::Failed(error)),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => {
                        if let Some(unread) = self.read(data) {
                            return Poll::Ready(End::LimitReached { unread: Some(unread) });
                        }
                    }
                    Err(frame) => return Poll::Ready(End::Complete { trailers: frame.into_trailers().ok() }),
                },
            }
        }
        cx.waker().wake_by_ref();
        self.poll_timer(cx)
    }

    /// Copies a frame's data up to the limit, and returns the rest if there is one.
    fn read(&mut self, mut data: B::Data) -> Option<B::Data> {
        let length = data.remaining().min(self.limits.size - self.read.len());
        if length > self.read.capacity() - self.read.len() {
            // A buffer that grows by and by would be copied while the old one exists.
            let is_short = self.read.len() + length <= SHORT_BODY;
            let capacity = if is_short { SHORT_BODY.min(self.limits.size) } else { self.limits.size };
            self.read.reserve_exact(capacity - self.read.len());
        }
        self.read.put((&mut data).take(length));
        data.has_remaining().then_some(data)
    }

    fn poll_timer(&mut self, cx: &mut Context<'_>) -> Poll<End<B>> {
        // Without a runtime that has timers, only what is ready at once is read.
        self.timer.poll(cx).unwrap_or(Poll::Ready(())).map(|()| End::LimitReached { unread: None })
    }

    /// What the request was sent with.
    pub(crate) fn sent(&self) -> Option<&Sent> {
        self.parts.extensions.get()
    }

    #[cfg(feature = "tonic")]
    pub(crate) fn headers(&self) -> &HeaderMap {
        &self.parts.headers
    }

    /// The error that the response stands for, with `source` as its cause.
    fn error_with(&self, source: Option<BoxError>) -> AuthError {
        let Parts { status, headers, .. } = &self.parts;
        let secrets = self.sent().map(Sent::exposed).unwrap_or_default();
        AuthError::read(*status, headers, self.decoded.as_deref().unwrap_or(&self.read), secrets, source)
    }

    pub(crate) fn error(&self) -> AuthError {
        self.error_with(None)
    }

    /// The error, with what broke the body off as its cause.
    pub(crate) fn into_error(mut self) -> AuthError
    where
        B::Error: Into<BoxError>,
    {
        let source = match self.end.take() {
            Some(End::Failed(error)) => Some(error.into()),
            _ => None,
        };
        self.error_with(source)
    }

    /// Whether an inner layer has added the error to the response.
    pub(crate) fn is_annotated(&self) -> bool {
        self.parts.extensions.get::<AuthError>().is_some()
    }

    /// The response as it came. Outer layers need not wait for its body again.
    pub(crate) fn into_response(self) -> Response<InspectedBody<B>> {
        let Self { mut parts, body, read, end, .. } = self;
        parts.extensions.insert(WasRead);
        let rest = match end {
            Some(End::Complete { trailers: Some(trailers) }) => Rest::Trailers(trailers),
            Some(End::Complete { trailers: None }) => Rest::Nothing,
            Some(End::Failed(error)) => Rest::Error(error),
            Some(End::LimitReached { unread }) => Rest::Body { unread, body },
            None => Rest::Body { unread: None, body },
        };
        let content = Content::Read { read: Box::new(ReadBody { read: read.into(), rest }) };
        Response::from_parts(parts, InspectedBody { content })
    }

    /// The response with the error in its extensions, and without those that concern this crate alone. Credentials that it
    /// echoes are masked, as far as it was read.
    pub(crate) fn into_annotated(mut self, error: AuthError) -> Response<InspectedBody<B>> {
        if let Some(sent) = self.parts.extensions.remove::<Sent>() {
            self.mask(&Redactor::masking_only(sent.exposed()));
        }
        let mut response = self.into_response();
        let extensions = response.extensions_mut();
        extensions.remove::<WasRead>();
        extensions.insert(error);
        response
    }

    /// Overwrites secrets in the headers, the body and the trailers. Lengths stay, unless the body was compressed: then it is
    /// replaced by what was decoded of it.
    fn mask(&mut self, redactor: &Redactor) {
        let Self { parts: Parts { headers, .. }, read, decoded, end, .. } = self;
        mask_headers(headers, redactor);
        if let Some(End::Complete { trailers: Some(trailers) }) = end {
            mask_headers(trailers, redactor);
        }
        if !redactor.in_place(decoded.as_deref_mut().unwrap_or(read)) {
            return;
        }
        if let Some(decoded) = decoded {
            *read = mem::take(&mut **decoded);
            if !matches!(end, Some(End::Complete { .. } | End::Failed(_))) {
                // The rest cannot be decoded without the beginning.
                *end = Some(End::Complete { trailers: None });
            }
            headers.remove(CONTENT_ENCODING);
            // Absent if the body was sent in chunks; then it still is.
            if let Some(length) = headers.get_mut(CONTENT_LENGTH) {
                *length = read.len().into();
            }
        }
        for name in DIGESTS {
            headers.remove(name);
        }
    }
}

/// Overwrites secrets in the values.
fn mask_headers(headers: &mut HeaderMap, redactor: &Redactor) {
    for value in headers.values_mut() {
        let mut masked = Zeroizing::new(value.as_bytes().to_vec());
        if redactor.in_place(&mut masked) {
            *value = HeaderValue::from_bytes(&masked).unwrap_or(HeaderValue::from_static(""));
        }
    }
}

pin_project! {
    /// The body of a response that may have been read in part: it yields the same data and trailers. What was read is
    /// one frame; the frames of any other response stay as they are.
    pub struct InspectedBody<B>
    where
        B: Body,
    {
        #[pin]
        content: Content<B>,
    }
}

pin_project! {
    #[project = ContentProj]
    enum Content<B>
    where
        B: Body,
    {
        Unread { #[pin] body: B },
        Read { read: Box<ReadBody<B>> },
    }
}

struct ReadBody<B: Body> {
    read: Bytes,
    rest: Rest<B>,
}

/// What follows the data that was read.
enum Rest<B: Body> {
    Trailers(HeaderMap),
    Error(B::Error),
    /// `unread` is the rest of a frame.
    Body {
        unread: Option<B::Data>,
        body: Pin<Box<B>>,
    },
    Nothing,
}

impl<B: Body> InspectedBody<B> {
    #[inline]
    pub(crate) fn unread(body: B) -> Self {
        Self { content: Content::Unread { body } }
    }
}

/// Generated gRPC clients require it of a response body.
impl<B: Body + Default> Default for InspectedBody<B> {
    fn default() -> Self {
        Self::unread(B::default())
    }
}

impl<B: Body> Body for InspectedBody<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        match self.project().content.project() {
            ContentProj::Unread { body } => body.poll_frame(cx).map_ok(to_bytes),
            ContentProj::Read { read } => read.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Unread { body } => body.is_end_stream(),
            Content::Read { read } => read.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Unread { body } => body.size_hint(),
            Content::Read { read } => read.size_hint(),
        }
    }
}

impl<B: Body> ReadBody<B> {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        if !self.read.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(mem::take(&mut self.read)))));
        }
        if let Rest::Body { unread, body } = &mut self.rest {
            return match unread.as_mut().filter(|unread| unread.has_remaining()) {
                Some(unread) => {
                    let part = unread.copy_to_bytes(unread.remaining().min(MAX_COPY));
                    Poll::Ready(Some(Ok(Frame::data(part))))
                }
                None => {
                    *unread = None;
                    body.as_mut().poll_frame(cx).map_ok(to_bytes)
                }
            };
        }
        Poll::Ready(match mem::replace(&mut self.rest, Rest::Nothing) {
            Rest::Trailers(trailers) => Some(Ok(Frame::trailers(trailers))),
            Rest::Error(error) => Some(Err(error)),
            Rest::Body { .. } | Rest::Nothing => None,
        })
    }

    fn is_end_stream(&self) -> bool {
        self.read.is_empty()
            && match &self.rest {
                Rest::Nothing => true,
                Rest::Body { unread, body } => {
                    unread.as_ref().is_none_or(|unread| !unread.has_remaining()) && body.is_end_stream()
                }
                Rest::Trailers(_) | Rest::Error(_) => false,
            }
    }

    fn size_hint(&self) -> SizeHint {
        let mut read = self.read.len() as u64;
        let rest = match &self.rest {
            Rest::Nothing | Rest::Trailers(_) => SizeHint::with_exact(0),
            Rest::Body { unread, body } => {
                read += unread.as_ref().map_or(0, Buf::remaining) as u64;
                body.size_hint()
            }
            // The body broke off: its length is unknown.
            Rest::Error(_) => SizeHint::new(),
        };
        let mut hint = SizeHint::new();
        hint.set_lower(read.saturating_add(rest.lower()));
        if let Some(upper) = rest.upper() {
            hint.set_upper(read.saturating_add(upper));
        }
        hint
    }
}

fn to_bytes<D: Buf>(frame: Frame<D>) -> Frame<Bytes> {
    frame.map_data(|mut data| data.copy_to_bytes(data.remaining()))
}

impl<B: Body> fmt::Debug for InspectedBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InspectedBody").finish_non_exhaustive()
    }
}
