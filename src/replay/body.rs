//! How a request's body is kept while it is sent, and restored for the replay.

use std::{
    any::Any,
    convert::Infallible,
    fmt, mem,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker, ready},
};

use bytes::{Buf, Bytes};
use http_body::{Body, Frame, SizeHint};

use super::pieces::Pieces;

/// The most of a frame that is copied at once.
const MAX_COPY: usize = 64 * 1024;

/// Keeps a request's body while it is sent, and restores it for the replay.
///
/// Implemented by [`CloneBody`], [`BufferBody`] and [`NoReplay`]. Implement it for a client with its own body type.
///
/// # What may be kept
///
/// The first attempt and the replay share nothing that one of them can use up. A restored body depends on no channel, upgrade
/// or signal that the first attempt has taken; if it has, [`restore`](Self::restore) returns `None`. The request's head is
/// cloned with its extensions, so the same holds for those: whatever belongs to one attempt is added by the client, below
/// [`RefreshLayer`](super::RefreshLayer). An example is the wait for `100 Continue` after `Expect: 100-continue`: a client that
/// holds a body back wraps the body that it is given, and drops it unread if the API answers without it. The body can then be
/// replayed, whatever its length.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot replay a request with the body `{B}`: use `.buffered(limit)` or `.without_replay()`",
    label = "the body is not `Clone`, or not a body",
    note = "for reqwest's body: `.with_replay(TryCloneBody)` from `tower_selam::adapter::reqwest`",
    note = "`SelamLayer` and `RefreshLayer` have `.buffered(limit)`, which keeps up to `limit` bytes while they are sent, \
            and `.without_replay()`, which replays nothing"
)]
pub trait Replay<B> {
    /// The body that the inner service gets.
    type Body;

    /// What is kept meanwhile.
    type Captured;

    /// Splits a body into the one to send and what is needed to restore it; `None` if it cannot be restored.
    fn capture(&self, body: B) -> (Self::Body, Option<Self::Captured>);

    /// Converts the body of a request that is never replayed.
    fn pass_through(&self, body: B) -> Self::Body;

    /// Waits until the body can be restored, or never can: a client may still be sending it when the response arrives.
    ///
    /// The layer gives up after five seconds. By default there is nothing to wait for.
    fn poll_captured(&self, captured: &mut Self::Captured, cx: &mut Context<'_>) -> Poll<()> {
        let _ = (captured, cx);
        Poll::Ready(())
    }

    /// Returns the same body again, byte for byte; `None` if that is impossible. Never another, nor an empty one.
    fn restore(&self, captured: Self::Captured) -> Option<Self::Body>;
}

/// Clones the body.
#[derive(Clone, Copy, Debug, Default)]
pub struct CloneBody;

#[diagnostic::do_not_recommend]
impl<B: Clone> Replay<B> for CloneBody {
    type Body = B;
    type Captured = B;

    #[inline]
    fn capture(&self, body: B) -> (B, Option<B>) {
        let kept = body.clone();
        (body, Some(kept))
    }

    #[inline]
    fn pass_through(&self, body: B) -> B {
        body
    }

    fn restore(&self, captured: B) -> Option<B> {
        Some(captured)
    }
}

/// Replays nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoReplay;

impl<B> Replay<B> for NoReplay {
    type Body = B;
    type Captured = Infallible;

    #[inline]
    fn capture(&self, body: B) -> (B, Option<Infallible>) {
        (body, None)
    }

    #[inline]
    fn pass_through(&self, body: B) -> B {
        body
    }

    fn restore(&self, captured: Infallible) -> Option<B> {
        match captured {}
    }
}

/// Keeps what is sent of the body, up to a limit.
#[derive(Clone, Copy, Debug)]
pub struct BufferBody {
    limit: usize,
}

impl BufferBody {
    /// Keeps a copy of up to `limit` bytes of data, and up to 64 KiB of trailers. A longer body is replayed if nothing of it was
    /// sent.
    ///
    /// `limit` also bounds the memory that the copy takes, however the body is cut into frames. Trailers count with their
    /// names, their values and 128 bytes each.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { limit }
    }
}

#[diagnostic::do_not_recommend]
impl<B: Body<Data: 'static>> Replay<B> for BufferBody {
    type Body = ReplayBody<B>;
    type Captured = CapturedBody<B>;

    fn capture(&self, body: B) -> (ReplayBody<B>, Option<CapturedBody<B>>) {
        let length = body.size_hint();
        // A body that is known to exceed the limit can be replayed only if nothing of it has been sent.
        let fits = usize::try_from(length.lower()).is_ok_and(|lower| lower <= self.limit);
        let pieces = Pieces::new(if fits { self.limit } else { 0 });
        let kept = Arc::new(Mutex::new(Kept::Sending { pieces, waiting: None }));
        let captured = CapturedBody { kept: Arc::clone(&kept), length };
        let mut body = ReplayBody::unsent(body, length);
        body.kept = Some(kept);
        (body, Some(captured))
    }

    fn pass_through(&self, body: B) -> ReplayBody<B> {
        let length = body.size_hint();
        ReplayBody::unsent(body, length)
    }

    fn poll_captured(&self, captured: &mut CapturedBody<B>, cx: &mut Context<'_>) -> Poll<()> {
        match &mut *lock(&captured.kept) {
            Kept::Sending { waiting, .. } => {
                *waiting = Some(cx.waker().clone());
                Poll::Pending
            }
            Kept::Done { .. } | Kept::Lost => Poll::Ready(()),
        }
    }

    fn restore(&self, CapturedBody { kept, length }: CapturedBody<B>) -> Option<ReplayBody<B>> {
        match mem::replace(&mut *lock(&kept), Kept::Lost) {
            Kept::Done { pieces, rest } => {
                Some(ReplayBody { before: Some(pieces), rest, kept: None, length })
            }
            // The client is still sending it, or it was too long.
            Kept::Sending { .. } | Kept::Lost => None,
        }
    }
}

/// The part of a body that [`BufferBody`] has kept.
pub struct CapturedBody<B: Body> {
    kept: Arc<Mutex<Kept<B>>>,
    /// The hint of the whole body.
    length: SizeHint,
}

enum Kept<B: Body> {
    Sending {
        pieces: Pieces,
        /// Waits to restore the body.
        waiting: Option<Waker>,
    },
    /// The client has dropped the body; `rest` is what it did not send.
    Done {
        pieces: Pieces,
        rest: Option<Rest<B>>,
    },
    Lost,
}

/// A request body that is kept while it is sent, made by [`BufferBody`]. It yields the same frames, with data as `Bytes`.
///
/// A frame of more than 64 KiB that is not `Bytes` already is yielded in parts. A replay yields the same data and trailers in
/// other frames, with the same size hint.
pub struct ReplayBody<B: Body> {
    /// What the first attempt has sent.
    before: Option<Pieces>,
    rest: Option<Rest<B>>,
    kept: Option<Arc<Mutex<Kept<B>>>>,
    /// The hint of the unsent rest.
    length: SizeHint,
}

impl<B: Body> ReplayBody<B> {
    fn unsent(body: B, length: SizeHint) -> Self {
        let rest = Some(Rest { data: None, body: Box::pin(body) });
        Self { before: None, rest, kept: None, length }
    }

    fn keep(&mut self, frame: &Frame<Bytes>) {
        let Some(kept) = &self.kept else { return };
        if Arc::strong_count(kept) == 1 {
            // Nobody can restore it any more: the response has begun, and the request body is still streaming.
            self.kept = None;
            return;
        }
        let is_kept = match &mut *lock(kept) {
            Kept::Sending { pieces, .. } => pieces.push(frame).is_some(),
            Kept::Done { .. } | Kept::Lost => false,
        };
        if !is_kept {
            self.lose();
        }
    }

    /// The body broke off or is too long, so it cannot be restored.
    fn lose(&mut self) {
        if let Some(kept) = self.kept.take() {
            settle(&kept, |_| Kept::Lost);
        }
    }
}

impl<B: Body<Data: 'static>> Body for ReplayBody<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let frame = match self.before.as_mut().and_then(Pieces::pop) {
            Some(frame) => frame,
            None => {
                let Some(rest) = &mut self.rest else { return Poll::Ready(None) };
                match ready!(rest.poll_frame(cx)) {
                    Some(Ok(frame)) => {
                        self.keep(&frame);
                        frame
                    }
                    Some(Err(error)) => {
                        self.lose();
                        return Poll::Ready(Some(Err(error)));
                    }
                    None => {
                        self.rest = None;
                        // Complete, even if the client does not drop it.
                        if let Some(kept) = self.kept.take() {
                            settle(&kept, |pieces| Kept::Done { pieces, rest: None });
                        }
                        return Poll::Ready(None);
                    }
                }
            }
        };
        if let Some(data) = frame.data_ref() {
            self.length = after(&self.length, data.len() as u64);
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.before.as_ref().is_none_or(Pieces::is_empty)
            && self.rest.as_ref().is_none_or(Rest::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.length
    }
}

/// Nothing in it is pinned in place.
impl<B: Body> Unpin for ReplayBody<B> {}

/// The client has dropped the body, so the unsent rest can be replayed.
impl<B: Body> Drop for ReplayBody<B> {
    fn drop(&mut self) {
        let Some(kept) = self.kept.take() else { return };
        let rest = self.rest.take();
        settle(&kept, |pieces| Kept::Done { pieces, rest });
    }
}

/// What is left of a body.
struct Rest<B: Body> {
    /// The rest of a frame.
    data: Option<B::Data>,
    body: Pin<Box<B>>,
}

impl<B: Body<Data: 'static>> Rest<B> {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        if self.data.is_none() {
            match ready!(self.body.as_mut().poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.data = Some(data),
                    Err(frame) => return Poll::Ready(Some(Ok(frame.map_data(|_| Bytes::new())))),
                },
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => return Poll::Ready(None),
            }
        }
        let part = self.data.as_mut().map(next_part).unwrap_or_default();
        self.data.take_if(|data| !data.has_remaining());
        Poll::Ready(Some(Ok(Frame::data(part))))
    }

    fn is_end_stream(&self) -> bool {
        self.data.is_none() && self.body.is_end_stream()
    }
}

/// Takes the next part of a frame: the whole frame, unless it is long and has to be copied.
fn next_part<D: Buf + 'static>(data: &mut D) -> Bytes {
    let is_shared = (data as &dyn Any).is::<Bytes>();
    let length = if is_shared { data.remaining() } else { data.remaining().min(MAX_COPY) };
    data.copy_to_bytes(length)
}

/// The hint of a body of which `sent` bytes have been sent.
fn after(length: &SizeHint, sent: u64) -> SizeHint {
    let mut left = SizeHint::new();
    left.set_lower(length.lower().saturating_sub(sent));
    if let Some(upper) = length.upper() {
        left.set_upper(upper.saturating_sub(sent));
    }
    left
}

/// Ends the capture of a body, and wakes the waiter.
fn settle<B: Body>(kept: &Mutex<Kept<B>>, end: impl FnOnce(Pieces) -> Kept<B>) {
    let mut state = lock(kept);
    let waiting = match mem::replace(&mut *state, Kept::Lost) {
        Kept::Sending { pieces, waiting } => {
            *state = end(pieces);
            waiting
        }
        settled => {
            *state = settled;
            None
        }
    };
    drop(state);
    if let Some(waker) = waiting {
        waker.wake();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<B: Body> fmt::Debug for CapturedBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CapturedBody").finish_non_exhaustive()
    }
}

impl<B: Body> fmt::Debug for ReplayBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplayBody").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::{BodyExt, Full};

    use super::*;

    /// J7, M1
    #[tokio::test]
    async fn nothing_is_kept_after_the_response() {
        for is_answered in [true, false] {
            let (mut body, captured) = BufferBody::new(64).capture(Full::new(Bytes::from_static(&[0; 8])));
            let kept = Arc::downgrade(&captured.as_ref().unwrap().kept);
            let captured = captured.filter(|_| !is_answered);
            drop(body.frame().await);
            assert_eq!(kept.strong_count() == 0, is_answered);
            drop(captured);
        }
    }
}
