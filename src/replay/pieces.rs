//! [`Pieces`]: what was sent of a body, copied into blocks, so that its memory does not depend on how the body was cut.

use std::collections::VecDeque;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};
use http_body::Frame;

/// Blocks grow from the one size to the other.
const MIN_BLOCK: usize = 1024;
const MAX_BLOCK: usize = 64 * 1024;

/// The most that trailers may cost. They do not count towards the limit on data.
const MAX_TRAILERS: usize = 64 * 1024;

/// What a trailer costs besides its text: its place in the hash table.
const TRAILER_OVERHEAD: usize = 128;

/// Copied data, and trailers after it.
///
/// A `Bytes` of one byte costs fifty, and may keep a buffer of any size from being freed. So data is copied, and empty frames
/// are not kept at all.
pub(super) struct Pieces {
    blocks: VecDeque<Vec<u8>>,
    trailers: Option<HeaderMap>,
    /// The bytes that were kept, and how many there may be. The blocks' capacity does not exceed it.
    length: usize,
    limit: usize,
    trailers_cost: usize,
}

impl Pieces {
    pub(super) fn new(limit: usize) -> Self {
        Self { blocks: VecDeque::new(), trailers: None, length: 0, limit, trailers_cost: 0 }
    }

    /// Keeps a copy of a frame; `None` if it does not fit.
    pub(super) fn push(&mut self, frame: &Frame<Bytes>) -> Option<()> {
        match (frame.data_ref(), frame.trailers_ref()) {
            (Some(data), _) => self.push_data(data),
            (_, Some(trailers)) => self.push_trailers(trailers),
            // A kind of frame that http-body does not know yet.
            _ => None,
        }
    }

    fn push_data(&mut self, data: &[u8]) -> Option<()> {
        let room = self.limit - self.length;
        if data.len() > room {
            return None;
        }
        let spare = self.blocks.back().map_or(0, |block| block.capacity() - block.len());
        let (first, second) = data.split_at(spare.min(data.len()));
        if let Some(block) = self.blocks.back_mut() {
            block.extend_from_slice(first);
        }
        if !second.is_empty() {
            let size = self.length.clamp(MIN_BLOCK, MAX_BLOCK).max(second.len());
            let mut block = Vec::with_capacity(size.min(room - first.len()));
            block.extend_from_slice(second);
            self.blocks.push_back(block);
        }
        self.length += data.len();
        Some(())
    }

    fn push_trailers(&mut self, trailers: &HeaderMap) -> Option<()> {
        let cost = |(name, value): (&HeaderName, &HeaderValue)| {
            name.as_str().len().saturating_add(value.len()).saturating_add(TRAILER_OVERHEAD)
        };
        // Even an empty frame of trailers costs something.
        self.trailers_cost = trailers.iter().map(cost).fold(self.trailers_cost, usize::saturating_add);
        if self.trailers_cost > MAX_TRAILERS {
            return None;
        }
        let kept = self.trailers.get_or_insert_default();
        for (name, value) in trailers {
            let mut copy = HeaderValue::from_bytes(value.as_bytes()).ok()?;
            copy.set_sensitive(value.is_sensitive());
            kept.append(HeaderName::from_bytes(name.as_str().as_bytes()).ok()?, copy);
        }
        Some(())
    }

    /// Removes the first block or, after the last, the trailers.
    pub(super) fn pop(&mut self) -> Option<Frame<Bytes>> {
        match self.blocks.pop_front() {
            Some(block) => Some(Frame::data(block.into())),
            None => self.trailers.take().map(Frame::trailers),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.blocks.is_empty() && self.trailers.is_none()
    }
}
