//! The body of a caller's request, which can be given up before its end: [`Upload`].

use std::{
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    task::{Context, Poll, Waker},
    time::Duration,
};

use axum::body::{Body, Bytes};
use http_body::{Body as _, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::{runtime::Handle, time};

use super::{
    connection::{Connection, InFlight},
    merge::Merged,
    socket::{LINGER_BYTES, LINGER_PAUSE, LINGER_TIME},
};

/// Over HTTP/1.1, a body that is given up is read to its end if it is at most this long, so that the connection can be reused.
const SHORT: u64 = 64 * 1024;

/// Controls the body of a request. Its clones belong to the body, and to the response.
#[derive(Clone, Debug)]
pub(super) struct Upload(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    /// Not set once complete, or given up.
    body: Option<(Incoming, InFlight)>,
    connection: Arc<Connection>,
    complete: bool,
    /// It was given up, and its rest is read in the background.
    drained: bool,
    /// The caller waits for `100 Continue`, and may never send the body.
    expects_continue: bool,
    answered: bool,
    /// How many frames were read.
    frames: u64,
    reader: Option<Waker>,
}

impl Upload {
    pub(super) fn new(body: Incoming, expects_continue: bool, connection: &Arc<Connection>) -> Self {
        Self(Arc::new(Mutex::new(State {
            body: Some((body, InFlight::new(connection))),
            connection: Arc::clone(connection),
            complete: false,
            drained: false,
            expects_continue,
            answered: false,
            frames: 0,
            reader: None,
        })))
    }

    /// Returns the body to forward.
    pub(super) fn body(&self) -> Body {
        Body::new(Merged::new(UploadBody(self.clone())))
    }

    /// Whether the caller may still be sending, so much that the connection must be closed.
    pub(super) fn is_left(&self) -> bool {
        let state = self.state();
        let short = state.body.as_ref().is_some_and(|(body, _)| is_short(body)) && !state.expects_continue;
        !(state.complete || state.drained || short)
    }

    /// Stops forwarding: the response makes the rest pointless.
    ///
    /// Some callers read the response only after they have sent everything, and some lose it if their stream is reset before
    /// that. Therefore the rest is read, within limits: of a longer body over HTTP/1.1 by the [`Socket`](super::socket::Socket),
    /// which does not look for chunks.
    pub(super) fn give_up(&self) {
        let mut state = self.state();
        let Some((body, in_flight)) = state.body.take() else { return };
        if state.connection.is_http2() || (is_short(&body) && !state.expects_continue) {
            state.drained = true;
            drop(state);
            discard(body, in_flight);
        } else {
            // Before the body is dropped, after which the server reads no more.
            state.connection.discard();
            drop(state);
        }
    }

    /// Fails a body that was given up: nothing more will come. Gives up another one once the API reads nothing of it for
    /// `pause`.
    pub(super) fn answered(&self, pause: Duration) {
        let mut state = self.state();
        state.answered = true;
        let (reader, is_sent) = (state.reader.take(), state.body.is_some());
        drop(state);
        if let Some(reader) = reader {
            reader.wake();
        }
        // Without a runtime, the process is ending.
        if is_sent && let Ok(runtime) = Handle::try_current() {
            runtime.spawn(give_up_unread(Arc::downgrade(&self.0), pause));
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Gives up a body of which nothing is read for this long.
async fn give_up_unread(state: Weak<Mutex<State>>, pause: Duration) {
    let mut frames = None;
    loop {
        let Some(upload) = state.upgrade().map(Upload) else { return };
        let read = upload.state().frames;
        if frames == Some(read) {
            return upload.give_up();
        }
        frames = Some(read);
        drop(upload);
        time::sleep(pause).await;
    }
}

fn is_short(body: &Incoming) -> bool {
    body.size_hint().upper().is_some_and(|length| length <= SHORT)
}

/// Reads the rest of a body, within limits. After that, dropping it closes the connection, or resets the stream with
/// `NO_ERROR` ([RFC 9113 section 8.1](https://www.rfc-editor.org/rfc/rfc9113#section-8.1)).
fn discard(body: Incoming, in_flight: InFlight) {
    // No runtime: the process is ending.
    let Ok(runtime) = Handle::try_current() else { return };
    runtime.spawn(async move {
        let mut body = pin!(body);
        let mut left = LINGER_BYTES;
        let reading = async {
            while left > 0 {
                let next = std::future::poll_fn(|cx| body.as_mut().poll_frame(cx));
                let Ok(Some(Ok(frame))) = time::timeout(LINGER_PAUSE, next).await else { break };
                left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
            }
        };
        let _ = time::timeout(LINGER_TIME, reading).await;
        drop(in_flight);
    });
}

/// The body that is forwarded. Given up when dropped.
#[derive(Debug)]
struct UploadBody(Upload);

impl http_body::Body for UploadBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let mut state = self.0.state();
        let Some((body, _)) = &mut state.body else {
            if state.complete {
                return Poll::Ready(None);
            }
            if state.answered {
                return Poll::Ready(Some(Err(axum::Error::new(
                    "the API answered before the end of the body",
                ))));
            }
            // An error would also break off the answer. Nothing is sent until the answer is complete.
            state.reader = Some(cx.waker().clone());
            return Poll::Pending;
        };
        let polled = Pin::new(&mut *body).poll_frame(cx).map_err(axum::Error::new);
        let ended = match &polled {
            Poll::Ready(Some(Ok(_))) => {
                let ended = body.is_end_stream();
                state.frames += 1;
                ended
            }
            Poll::Ready(None) => true,
            // The connection fails.
            Poll::Ready(Some(Err(_))) => {
                let failed = state.body.take();
                drop(state);
                drop(failed);
                return polled;
            }
            Poll::Pending => false,
        };
        if ended {
            state.complete = true;
            let ended = state.body.take();
            drop(state);
            drop(ended);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.0.state().complete
    }

    fn size_hint(&self) -> SizeHint {
        let state = self.0.state();
        match &state.body {
            Some((body, _)) => body.size_hint(),
            None if state.complete => SizeHint::with_exact(0),
            None => SizeHint::default(),
        }
    }
}

impl Drop for UploadBody {
    fn drop(&mut self) {
        self.0.give_up();
    }
}
