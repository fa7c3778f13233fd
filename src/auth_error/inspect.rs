//! Reads an error body within bounds.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use http::{HeaderMap, Response, response::Parts};
use http_body::Body;
use pin_project_lite::pin_project;

use super::InspectedBody;
use crate::{
    AuthError, BoxError, Credentials, authorize::Sent, error::is_auth_status, telemetry::event,
    util::cold::Cold, util::timer::Timer,
};

/// How much of an error body is read, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bounds {
    pub(super) size: usize,
    pub(super) time: Duration,
}

impl Bounds {
    pub(crate) const fn new(size: usize, time: Duration) -> Self {
        Self { size, time }
    }
}

impl Default for Bounds {
    fn default() -> Self {
        Self::new(64 * 1024, Duration::from_secs(5))
    }
}

/// So many frames are taken before others get a turn: a body can be ready without end and without bytes.
const FRAMES_A_TURN: usize = 128;

pin_project! {
    /// Future of a response that is read if it is a 401 or 403, and only then.
    pub(crate) struct Inspect<F, B> {
        #[pin]
        state: State<F, B>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<F, B> {
        Response { #[pin] response: F, bounds: Bounds },
        Body { collect: Cold<Box<Collect<B>>> },
    }
}

/// A 401 or 403 whose body was read.
pub(crate) struct Read<B: Body> {
    pub(crate) collect: Collect<B>,
    pub(crate) end: End<B::Error>,
}

impl<F, B> Inspect<F, B> {
    #[inline]
    pub(crate) fn new(response: F, bounds: Bounds) -> Self {
        Self { state: State::Response { response, bounds } }
    }

    /// What the response is of, unless it is read.
    #[cfg(feature = "tonic")]
    pub(crate) fn response(self: Pin<&mut Self>) -> Option<Pin<&mut F>> {
        match self.project().state.project() {
            StateProj::Response { response, .. } => Some(response),
            StateProj::Body { .. } => None,
        }
    }
}

impl<F, B, E> Inspect<F, B>
where
    F: Future<Output = Result<Response<B>, E>>,
    B: Body,
{
    /// Polls for the response: one that is no 401 or 403 is passed, and what one is made of is for `refuse` to say.
    #[inline]
    pub(crate) fn poll_or<T>(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pass: impl FnOnce(Response<B>) -> T,
        refuse: impl FnOnce(Box<Read<B>>) -> Result<T, E>,
    ) -> Poll<Result<T, E>> {
        if let StateProj::Response { response, .. } = self.as_mut().project().state.project() {
            match response.poll(cx) {
                Poll::Ready(Ok(response)) if is_auth_status(response.status()) => {
                    self.as_mut().begin(response);
                }
                polled => return polled.map_ok(pass),
            }
        }
        self.poll_read(cx).map(refuse)
    }
}

impl<F, B: Body> Inspect<F, B> {
    #[cold]
    fn begin(self: Pin<&mut Self>, response: Response<B>) {
        let mut state = self.project().state;
        if let StateProj::Response { bounds, .. } = state.as_mut().project() {
            let collect = Cold::new(Collect::new(response, *bounds));
            state.set(State::Body { collect });
        }
    }

    #[cold]
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Box<Read<B>>> {
        let StateProj::Body { collect } = self.project().state.project() else { return Poll::Pending };
        let Some(reading) = collect.as_mut() else { return Poll::Pending };
        let end = ready!(reading.poll(cx));
        match collect.take() {
            Some(collect) => Poll::Ready(Box::new(Read { collect: *collect, end })),
            None => Poll::Pending,
        }
    }
}

impl<B: Body> Read<B> {
    /// The error that the response makes.
    pub(crate) fn into_error(mut self) -> AuthError
    where
        B::Error: Into<BoxError>,
    {
        let source = match self.end {
            End::Failed(error) => Some(error.into()),
            End::Complete { .. } | End::OutOfBounds => None,
        };
        self.collect.refusal(source)
    }

    /// The response as it came.
    pub(crate) fn into_response(self) -> Response<InspectedBody<B>> {
        self.collect.into_response(self.end)
    }

    /// The response as it came, with the error that it makes in its extensions.
    pub(crate) fn into_annotated(mut self) -> Response<InspectedBody<B>> {
        let error = self.collect.refusal(None);
        self.collect.parts.extensions.insert(error);
        self.into_response()
    }
}

/// A 401 or 403 whose body is being read.
pub(crate) struct Collect<B> {
    pub(crate) parts: Parts,
    chunks: Vec<Bytes>,
    body: Pin<Box<B>>,
    bounds: Bounds,
    read: usize,
    timer: Timer,
}

/// Why reading ended.
pub(crate) enum End<E> {
    Complete {
        trailers: Option<HeaderMap>,
    },
    /// The body broke off.
    Failed(E),
    /// More would be too much or too late.
    OutOfBounds,
}

impl<B: Body> Collect<B> {
    #[cold]
    pub(crate) fn new(response: Response<B>, bounds: Bounds) -> Box<Self> {
        let (parts, body) = response.into_parts();
        let timer = Timer::new(bounds.time);
        Box::new(Self { parts, chunks: Vec::new(), body: Box::pin(body), bounds, read: 0, timer })
    }

    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End<B::Error>> {
        // What is there counts, even when the time is up.
        for _ in 0..FRAMES_A_TURN {
            if self.read > self.bounds.size {
                return Poll::Ready(End::OutOfBounds);
            }
            let Poll::Ready(frame) = self.body.as_mut().poll_frame(cx) else {
                return self.poll_timer(cx);
            };
            match frame {
                None => return Poll::Ready(End::Complete { trailers: None }),
                Some(Err(error)) => return Poll::Ready(End::Failed(error)),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(mut data) => {
                        let chunk = data.copy_to_bytes(data.remaining());
                        self.read = self.read.saturating_add(chunk.len());
                        self.chunks.extend(Some(chunk).filter(|chunk| !chunk.is_empty()));
                    }
                    Err(frame) => {
                        let trailers = frame.into_trailers().ok();
                        return Poll::Ready(End::Complete { trailers });
                    }
                },
            }
        }
        cx.waker().wake_by_ref();
        self.poll_timer(cx)
    }

    fn poll_timer(&mut self, cx: &mut Context<'_>) -> Poll<End<B::Error>> {
        // Where no runtime has the time, what is not there at once is not waited for.
        self.timer.poll(cx).unwrap_or(Poll::Ready(())).map(|()| End::OutOfBounds)
    }

    /// The response as it came.
    pub(crate) fn into_response(self, end: End<B::Error>) -> Response<InspectedBody<B>> {
        let Self { parts, chunks, body, .. } = self;
        Response::from_parts(parts, InspectedBody::read(chunks, end, body))
    }

    /// What was read, as far as it is within bounds.
    pub(crate) fn body(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(self.read.min(self.bounds.size));
        for chunk in &self.chunks {
            let room = self.bounds.size - body.len();
            body.extend_from_slice(&chunk[..room.min(chunk.len())]);
        }
        body
    }

    /// The error that the response makes; `source` is what broke its body off.
    pub(crate) fn error(&mut self, source: Option<BoxError>) -> AuthError {
        let sent = self.take_sent();
        self.read(sent.as_ref(), source)
    }

    /// The same for a response that goes up: whoever watches is told, once.
    pub(crate) fn refusal(&mut self, source: Option<BoxError>) -> AuthError {
        let sent = self.take_sent();
        let error = self.read(sent.as_ref(), source);
        // A layer further in has told it.
        if self.parts.extensions.get::<AuthError>().is_none() {
            event::refused_by_api(&error, sent.as_ref());
        }
        error
    }

    fn take_sent(&mut self) -> Option<Credentials> {
        self.parts.extensions.remove::<Sent>().map(Sent::joined)
    }

    fn read(&self, sent: Option<&Credentials>, source: Option<BoxError>) -> AuthError {
        let Parts { status, headers, .. } = &self.parts;
        AuthError::read(*status, headers, &self.body(), sent, source)
    }
}
