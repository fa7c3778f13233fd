use std::{
    collections::VecDeque,
    fmt,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Buf, Bytes};
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tower_service::Service;

use super::inspect::{Bounds, End, Inspect};
use crate::util::cold::Cold;

/// Puts an [`AuthError`](crate::AuthError) into the extensions of a 401 or 403. Made by
/// [`AnnotateAuthErrorLayer`](super::AnnotateAuthErrorLayer).
#[derive(Clone, Copy, Debug)]
pub struct AnnotateAuthError<S> {
    inner: S,
    bounds: Bounds,
}

impl<S> AnnotateAuthError<S> {
    pub(super) fn new(inner: S, bounds: Bounds) -> Self {
        Self { inner, bounds }
    }

    inner_accessors!();
}

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for AnnotateAuthError<S>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>>,
    ResBody: Body,
{
    type Response = Response<InspectedBody<ResBody>>;
    type Error = S::Error;
    type Future = AnnotateFuture<S::Future, ResBody>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    #[inline]
    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        AnnotateFuture { inspect: Inspect::new(self.inner.call(request), self.bounds) }
    }
}

pin_project! {
    /// Response future of [`AnnotateAuthError`]. Dropping it drops the request, or the response whose body
    /// it reads.
    pub struct AnnotateFuture<F, B> {
        #[pin]
        inspect: Inspect<F, B>,
    }
}

impl<F, B, E> Future for AnnotateFuture<F, B>
where
    F: Future<Output = Result<Response<B>, E>>,
    B: Body,
{
    type Output = Result<Response<InspectedBody<B>>, E>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let pass = |response: Response<B>| response.map(InspectedBody::unread);
        self.project().inspect.poll_or(cx, pass, |read| Ok(read.into_annotated()))
    }
}

pin_project! {
    /// The body of a response that may have been read in part to know what it says: the same frames, whether
    /// they were read before or not.
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
        // Seldom, and in a box for that: a body that was not read is as small and as quickly dropped as can be.
        Read { read: Cold<Box<ReadBody<B>>> },
    }
}

/// What was read of a body, and what follows it.
struct ReadBody<B: Body> {
    chunks: VecDeque<Bytes>,
    rest: Rest<B>,
}

/// What follows the chunks that were read.
enum Rest<B: Body> {
    Trailers(http::HeaderMap),
    Error(B::Error),
    Body(Pin<Box<B>>),
    Nothing,
}

impl<B: Body> InspectedBody<B> {
    #[inline]
    pub(crate) fn unread(body: B) -> Self {
        Self { content: Content::Unread { body } }
    }

    pub(super) fn read(chunks: Vec<Bytes>, end: End<B::Error>, body: Pin<Box<B>>) -> Self {
        let rest = match end {
            End::Complete { trailers } => trailers.map_or(Rest::Nothing, Rest::Trailers),
            End::Failed(error) => Rest::Error(error),
            End::OutOfBounds => Rest::Body(body),
        };
        let read = Cold::new(Box::new(ReadBody { chunks: chunks.into(), rest }));
        Self { content: Content::Read { read } }
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
            ContentProj::Read { read } => read.as_mut().map_or(Poll::Ready(None), |read| read.poll_frame(cx)),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Unread { body } => body.is_end_stream(),
            Content::Read { read } => read.as_ref().is_none_or(|read| read.is_end_stream()),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Unread { body } => body.size_hint(),
            Content::Read { read } => read.as_ref().map_or(SizeHint::with_exact(0), |read| read.size_hint()),
        }
    }
}

impl<B: Body> ReadBody<B> {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        if let Some(chunk) = self.chunks.pop_front() {
            return Poll::Ready(Some(Ok(Frame::data(chunk))));
        }
        if let Rest::Body(body) = &mut self.rest {
            return body.as_mut().poll_frame(cx).map_ok(to_bytes);
        }
        Poll::Ready(match std::mem::replace(&mut self.rest, Rest::Nothing) {
            Rest::Trailers(trailers) => Some(Ok(Frame::trailers(trailers))),
            Rest::Error(error) => Some(Err(error)),
            Rest::Body(_) | Rest::Nothing => None,
        })
    }

    fn is_end_stream(&self) -> bool {
        self.chunks.is_empty()
            && match &self.rest {
                Rest::Nothing => true,
                Rest::Body(body) => body.is_end_stream(),
                Rest::Trailers(_) | Rest::Error(_) => false,
            }
    }

    fn size_hint(&self) -> SizeHint {
        let read: u64 = self.chunks.iter().map(|chunk| chunk.len() as u64).sum();
        let rest = match &self.rest {
            Rest::Nothing | Rest::Trailers(_) => SizeHint::with_exact(0),
            Rest::Body(body) => body.size_hint(),
            // More was announced, or nobody knows: the body broke off.
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

impl<F, B> fmt::Debug for AnnotateFuture<F, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AnnotateFuture").finish_non_exhaustive()
    }
}

impl<B: Body> fmt::Debug for InspectedBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InspectedBody").finish_non_exhaustive()
    }
}
