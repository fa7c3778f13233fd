//! The response body, which can stall or break off.

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

/// Response body of [`Simulator`](super::Simulator).
pub struct SimulatorBody {
    chunks: VecDeque<Bytes>,
    /// The announced length still to come; `None` for a stream.
    length: Option<u64>,
    end: End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Complete,
    /// Pends once, so that a server flushes the earlier chunks, then becomes `CutOff`.
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

    /// Breaks off in the middle. The announced length is unchanged.
    pub(super) fn cut_in_half(self) -> Self {
        let length: usize = self.chunks.iter().map(Bytes::len).sum();
        self.with_fault(&Fault::CutOff { after: length / 2 })
    }

    /// Applies the part of `fault` that concerns the body. The announced length is unchanged.
    pub(super) fn with_fault(mut self, fault: &Fault) -> Self {
        let (mut remaining, end) = match *fault {
            Fault::StallBody { after } => (after, End::Stall),
            Fault::CutOff { after } => (after, End::Flush),
            _ => return self,
        };
        for chunk in &mut self.chunks {
            chunk.truncate(remaining);
            remaining -= chunk.len();
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
            // No waker is registered, because this body never continues.
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
