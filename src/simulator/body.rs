use std::{
    collections::VecDeque,
    fmt,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use super::Fault;
use crate::BoxError;

/// The body of a [`Simulator`](super::Simulator)'s response.
pub struct SimulatorBody {
    chunks: VecDeque<Bytes>,
    /// What the response says its length is; `None` for a stream.
    length: Option<u64>,
    end: End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Complete,
    /// First a pause, in which a server sends what it has, then the error.
    Flush,
    CutOff,
    Stall,
}

impl SimulatorBody {
    pub(super) fn whole(body: impl Into<Bytes>) -> Self {
        let body = body.into();
        let length = Some(body.len() as u64);
        Self { chunks: VecDeque::from([body]), length, end: End::Complete }
    }

    pub(super) fn stream(chunks: impl IntoIterator<Item = Bytes>) -> Self {
        Self { chunks: chunks.into_iter().collect(), length: None, end: End::Complete }
    }

    /// Breaks off half way; the announced length stays.
    pub(super) fn cut_in_half(self) -> Self {
        let length: usize = self.chunks.iter().map(Bytes::len).sum();
        self.with_fault(&Fault::CutOff { after: length / 2 })
    }

    /// As `fault` has it; the announced length stays.
    pub(super) fn with_fault(mut self, fault: &Fault) -> Self {
        let (mut left, end) = match *fault {
            Fault::StallBody { after } => (after, End::Stall),
            Fault::CutOff { after } => (after, End::Flush),
            _ => return self,
        };
        for chunk in &mut self.chunks {
            chunk.truncate(left);
            left -= chunk.len();
        }
        self.chunks.retain(|chunk| !chunk.is_empty());
        self.end = end;
        self
    }
}

impl Body for SimulatorBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Some(chunk) = self.chunks.pop_front() {
            self.length = self.length.map(|length| length - chunk.len() as u64);
            return Poll::Ready(Some(Ok(Frame::data(chunk))));
        }
        match self.end {
            End::Complete => Poll::Ready(None),
            // Nobody is to be woken: this body never goes on.
            End::Stall => Poll::Pending,
            End::Flush => {
                self.end = End::CutOff;
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            End::CutOff => {
                self.end = End::Complete;
                Poll::Ready(Some(Err("the body was cut off".into())))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.chunks.is_empty() && self.end == End::Complete
    }

    fn size_hint(&self) -> SizeHint {
        self.length.map_or_else(SizeHint::new, SizeHint::with_exact)
    }
}

impl fmt::Debug for SimulatorBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimulatorBody").field("length", &self.length).finish_non_exhaustive()
    }
}
