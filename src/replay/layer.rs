//! The layer: [`RefreshLayer`].

use tower::Layer;

use super::{BufferBody, CloneBody, NoReplay, Refresh};

/// Replays a request once after a 401, with a refreshed credential. See the [module docs](super).
#[doc(alias("retry"))]
#[derive(Clone, Copy, Debug, Default)]
pub struct RefreshLayer<R = CloneBody> {
    replay: R,
    is_disabled: bool,
}

impl RefreshLayer {
    /// Clones the body of each request, to replay it if needed.
    #[must_use]
    pub fn new() -> Self {
        Self::with_replay(CloneBody)
    }
}

impl RefreshLayer<BufferBody> {
    /// Keeps up to `limit` bytes of each request's body while it is sent. A request with a longer body is replayed only if nothing
    /// of the body was sent.
    ///
    /// What is kept is a copy. The memory for it stays within `limit`, however the body is cut into frames; trailers may take
    /// another 64 KiB. A replay sends the same data and trailers in other frames. The inner service gets a
    /// [`ReplayBody`](super::ReplayBody).
    #[must_use]
    pub fn buffered(limit: usize) -> Self {
        Self::with_replay(BufferBody::new(limit))
    }
}

impl RefreshLayer<NoReplay> {
    /// Replays nothing: a 401 refreshes the credential for the next request.
    #[must_use]
    pub fn without_replay() -> Self {
        Self::with_replay(NoReplay)
    }
}

impl<R> RefreshLayer<R> {
    /// Keeps and restores bodies with `replay`, for a client with a body type of its own.
    #[must_use]
    pub fn with_replay(replay: R) -> Self {
        Self { replay, is_disabled: false }
    }

    /// Keeps nothing if no inner layer has a credential that can be refreshed.
    pub(crate) fn disabled_if(mut self, is_disabled: bool) -> Self {
        self.is_disabled = is_disabled;
        self
    }
}

impl<S, R: Clone> Layer<S> for RefreshLayer<R> {
    type Service = Refresh<S, R>;

    fn layer(&self, inner: S) -> Self::Service {
        Refresh::new(inner, self.replay.clone(), self.is_disabled)
    }
}
