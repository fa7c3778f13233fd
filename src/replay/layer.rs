use tower_layer::Layer;

use super::{BufferBody, CloneBody, NoReplay, Refresh};

/// Renews what the API refused and sends the request once more. See the [module docs](super).
#[derive(Clone, Copy, Debug, Default)]
pub struct RefreshLayer<R = CloneBody> {
    replay: R,
}

impl RefreshLayer {
    /// Clones the body of each request, to send it again if need be.
    #[must_use]
    pub fn new() -> Self {
        Self { replay: CloneBody }
    }
}

impl RefreshLayer<BufferBody> {
    /// Keeps up to `limit` bytes of each request's body while it is sent; one that is longer is not sent again.
    ///
    /// The service within gets a [`ReplayBody`](super::ReplayBody).
    #[must_use]
    pub fn buffered(limit: usize) -> Self {
        Self { replay: BufferBody::new(limit) }
    }
}

impl RefreshLayer<NoReplay> {
    /// Sends no request again: a 401 renews the credential for the next.
    #[must_use]
    pub fn without_replay() -> Self {
        Self { replay: NoReplay }
    }
}

impl<R> RefreshLayer<R> {
    /// Sends requests again as `replay` says: for a body type of its own.
    #[must_use]
    pub fn with_replay(replay: R) -> Self {
        Self { replay }
    }
}

impl<S, R: Clone> Layer<S> for RefreshLayer<R> {
    type Service = Refresh<S, R>;

    fn layer(&self, inner: S) -> Self::Service {
        Refresh::new(inner, self.replay.clone())
    }
}
