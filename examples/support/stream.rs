//! Reads the server-sent events of a streamed chat completion.

use serde_json::Value;
use tower_selam::BoxError;

/// Turns the pieces of a streamed body into the text that its events carry.
#[derive(Default)]
pub(crate) struct ChatStream {
    unread: Vec<u8>,
    events: usize,
    done: bool,
}

impl ChatStream {
    /// Adds a piece of the body, which may end in the middle of an event; returns the text of the completed events.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> String {
        self.unread.extend_from_slice(bytes);
        let mut text = String::new();
        while let Some(end) = self.unread.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.unread.drain(..=end).collect();
            let Some(data) = line.strip_prefix(b"data:").map(<[u8]>::trim_ascii) else { continue };
            self.done |= data == b"[DONE]";
            if let Ok(event) = serde_json::from_slice::<Value>(data) {
                self.events += 1;
                text += event["choices"][0]["delta"]["content"].as_str().unwrap_or_default();
            }
        }
        text
    }

    /// Returns the number of events, or an error if the stream broke off.
    pub(crate) fn finish(self) -> Result<usize, BoxError> {
        if self.done { Ok(self.events) } else { Err("the stream ended before its last event".into()) }
    }
}
