//! How a request's body is kept while it is sent, and restored for the replay.

use std::{
    collections::VecDeque,
    convert::Infallible,
    fmt,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker, ready},
};

use bytes::{Buf, Bytes};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};

/// Keeps a request's body while it is sent, and restores it for the replay.
///
/// Implemented by [`CloneBody`], [`BufferBody`] and [`NoReplay`]. Implement it for a client with its own body type.
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
    /// Keeps up to `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { limit }
    }
}

#[diagnostic::do_not_recommend]
impl<B: Body> Replay<B> for BufferBody {
    type Body = ReplayBody<B>;
    type Captured = CapturedBody<B>;

    fn capture(&self, body: B) -> (ReplayBody<B>, Option<CapturedBody<B>>) {
        // A body that is known to exceed the limit need not be kept.
        if usize::try_from(body.size_hint().lower()).map_or(true, |lower| lower > self.limit) {
            return (self.pass_through(body), None);
        }
        let kept =
            Arc::new(Mutex::new(Kept::Sending { frames: VecDeque::new(), room: self.limit, waiting: None }));
        let body = ReplayBody::new(VecDeque::new(), Some(Box::pin(body)), Some(Arc::clone(&kept)));
        (body, Some(CapturedBody(kept)))
    }

    fn pass_through(&self, body: B) -> ReplayBody<B> {
        ReplayBody::new(VecDeque::new(), Some(Box::pin(body)), None)
    }

    fn poll_captured(&self, kept: &mut CapturedBody<B>, cx: &mut Context<'_>) -> Poll<()> {
        match &mut *lock(&kept.0) {
            Kept::Sending { waiting, .. } => {
                *waiting = Some(cx.waker().clone());
                Poll::Pending
            }
            Kept::Done { .. } | Kept::Lost => Poll::Ready(()),
        }
    }

    fn restore(&self, kept: CapturedBody<B>) -> Option<ReplayBody<B>> {
        match std::mem::replace(&mut *lock(&kept.0), Kept::Lost) {
            Kept::Done { frames, rest } => Some(ReplayBody::new(frames, rest, None)),
            // The client is still sending it, or it was too long.
            Kept::Sending { .. } | Kept::Lost => None,
        }
    }
}

/// The part of a body that [`BufferBody`] has kept.
pub struct CapturedBody<B>(Arc<Mutex<Kept<B>>>);

enum Kept<B> {
    Sending {
        frames: VecDeque<Piece>,
        room: usize,
        /// Waits to restore the body.
        waiting: Option<Waker>,
    },
    /// The client has dropped the body; `rest` is what it did not send.
    Done {
        frames: VecDeque<Piece>,
        rest: Option<Pin<Box<B>>>,
    },
    Lost,
}

#[derive(Clone)]
enum Piece {
    Data(Bytes),
    Trailers(HeaderMap),
}

/// A request body that is kept while it is sent, made by [`BufferBody`]. It yields the same frames, with data as `Bytes`.
pub struct ReplayBody<B> {
    before: VecDeque<Piece>,
    rest: Option<Pin<Box<B>>>,
    kept: Option<Arc<Mutex<Kept<B>>>>,
}

impl<B> ReplayBody<B> {
    fn new(before: VecDeque<Piece>, rest: Option<Pin<Box<B>>>, kept: Option<Arc<Mutex<Kept<B>>>>) -> Self {
        Self { before, rest, kept }
    }

    fn keep(&mut self, piece: &Piece) {
        let Some(kept) = &self.kept else { return };
        if Arc::strong_count(kept) == 1 {
            // Nobody can restore it any more: the response has begun, and the request body is still streaming.
            self.kept = None;
            return;
        }
        let mut state = lock(kept);
        let length = if let Piece::Data(data) = piece { data.len() } else { 0 };
        match &mut *state {
            Kept::Sending { frames, room, .. } if length <= *room => {
                *room -= length;
                frames.push_back(piece.clone());
            }
            _ => {
                drop(state);
                self.lose();
            }
        }
    }

    /// The body broke off or is too long, so it cannot be restored.
    fn lose(&mut self) {
        if let Some(kept) = self.kept.take() {
            settle(&kept, |_| Kept::Lost);
        }
    }
}

impl<B: Body> Body for ReplayBody<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        if let Some(piece) = self.before.pop_front() {
            return Poll::Ready(Some(Ok(piece.into_frame())));
        }
        let Some(rest) = &mut self.rest else { return Poll::Ready(None) };
        let frame = match ready!(rest.as_mut().poll_frame(cx)) {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => {
                self.lose();
                return Poll::Ready(Some(Err(error)));
            }
            None => {
                self.rest = None;
                // Complete, even if the client does not drop it.
                if let Some(kept) = self.kept.take() {
                    settle(&kept, |frames| Kept::Done { frames, rest: None });
                }
                return Poll::Ready(None);
            }
        };
        let piece = match frame.into_data() {
            Ok(mut data) => Piece::Data(data.copy_to_bytes(data.remaining())),
            Err(frame) => match frame.into_trailers() {
                Ok(trailers) => Piece::Trailers(trailers),
                Err(_) => {
                    // A kind of frame that http-body does not know yet.
                    self.lose();
                    return Poll::Ready(Some(Ok(Frame::data(Bytes::new()))));
                }
            },
        };
        self.keep(&piece);
        Poll::Ready(Some(Ok(piece.into_frame())))
    }

    fn is_end_stream(&self) -> bool {
        self.before.is_empty() && self.rest.as_ref().is_none_or(|rest| rest.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        let before: u64 = self.before.iter().map(Piece::len).sum();
        let rest = self.rest.as_ref().map_or(SizeHint::with_exact(0), |rest| rest.size_hint());
        let mut hint = SizeHint::new();
        hint.set_lower(before.saturating_add(rest.lower()));
        if let Some(upper) = rest.upper() {
            hint.set_upper(before.saturating_add(upper));
        }
        hint
    }
}

/// The client has dropped the body, so the unsent rest can be replayed.
impl<B> Drop for ReplayBody<B> {
    fn drop(&mut self) {
        let Some(kept) = self.kept.take() else { return };
        let rest = self.rest.take();
        settle(&kept, |frames| Kept::Done { frames, rest });
    }
}

impl Piece {
    fn into_frame(self) -> Frame<Bytes> {
        match self {
            Self::Data(data) => Frame::data(data),
            Self::Trailers(trailers) => Frame::trailers(trailers),
        }
    }

    fn len(&self) -> u64 {
        match self {
            Self::Data(data) => data.len() as u64,
            Self::Trailers(_) => 0,
        }
    }
}

/// Ends the capture of a body, and wakes the waiter.
fn settle<B>(kept: &Mutex<Kept<B>>, end: impl FnOnce(VecDeque<Piece>) -> Kept<B>) {
    let mut state = lock(kept);
    let waiting = match std::mem::replace(&mut *state, Kept::Lost) {
        Kept::Sending { frames, waiting, .. } => {
            *state = end(frames);
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

impl<B> fmt::Debug for CapturedBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CapturedBody").finish_non_exhaustive()
    }
}

impl<B> fmt::Debug for ReplayBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplayBody").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::{BodyExt, Full};

    use super::*;

    /// J7
    #[tokio::test]
    async fn nothing_is_kept_after_the_response() {
        let owner = Arc::new([0; 8]);
        let held = |owner: &Arc<[u8; 8]>| Bytes::from_owner(Owner(Arc::clone(owner)));
        for (left, counted) in [(true, 2), (false, 1)] {
            let (mut body, kept) = BufferBody::new(64).capture(Full::new(held(&owner)));
            let kept = kept.filter(|_| left);
            drop(body.frame().await);
            assert_eq!(Arc::strong_count(&owner), counted, "kept: {left}");
            drop((body, kept));
        }
    }

    struct Owner(Arc<[u8; 8]>);

    impl AsRef<[u8]> for Owner {
        fn as_ref(&self) -> &[u8] {
            &*self.0
        }
    }
}
