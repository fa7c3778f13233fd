//! An API that speaks HTTP/2 frame by frame: [`Frames`].

use std::collections::HashMap;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{Tls, TlsListener, with_timeout};

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;

const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// Error codes of [RFC 9113 section 7](https://www.rfc-editor.org/rfc/rfc9113#section-7).
pub(crate) const NO_ERROR: u32 = 0;
pub(crate) const INTERNAL_ERROR: u32 = 2;
pub(crate) const REFUSED_STREAM: u32 = 7;
pub(crate) const CANCEL: u32 = 8;
pub(crate) const ENHANCE_YOUR_CALM: u32 = 11;

/// One connection.
pub(crate) struct Frames {
    stream: Tls,
    bodies: HashMap<u32, Vec<u8>>,
}

impl Frames {
    pub(crate) async fn accept(api: &TlsListener) -> Self {
        let mut stream = api.accept().await;
        let mut preface = [0; 24];
        with_timeout(stream.read_exact(&mut preface)).await.unwrap();
        let mut frames = Self { stream, bodies: HashMap::new() };
        frames.send(SETTINGS, 0, 0, &[]).await;
        frames
    }

    /// Reads up to the end of the next request; returns its stream and body.
    pub(crate) async fn request(&mut self) -> (u32, Vec<u8>) {
        loop {
            let (kind, flags, stream, payload) = self.next().await.expect("the connection is open");
            if kind == DATA {
                self.bodies.entry(stream).or_default().extend_from_slice(&payload);
            }
            if matches!(kind, HEADERS | DATA) && flags & END_STREAM != 0 {
                return (stream, self.bodies.remove(&stream).unwrap_or_default());
            }
        }
    }

    /// Reads up to the head of the next request; returns its stream.
    pub(crate) async fn head(&mut self) -> u32 {
        loop {
            let (kind, _, stream, _) = self.next().await.expect("the connection is open");
            if kind == HEADERS {
                return stream;
            }
        }
    }

    /// Reads at least this much of a request's body.
    pub(crate) async fn data(&mut self, stream: u32, length: usize) {
        for stream in [0, stream] {
            self.send(WINDOW_UPDATE, 0, stream, &u32::try_from(length).unwrap().to_be_bytes()).await;
        }
        let mut read = 0;
        while read < length {
            let (kind, _, _, payload) = self.next().await.expect("the connection is open");
            if kind == DATA {
                read += payload.len();
            }
        }
    }

    /// Reads to the end of the connection; returns whether another request arrives.
    pub(crate) async fn gets_more(&mut self) -> bool {
        while let Some((kind, ..)) = self.next().await {
            if kind == HEADERS {
                return true;
            }
        }
        false
    }

    /// Answers with 200 and no body.
    pub(crate) async fn ok(&mut self, stream: u32) {
        // Entry 8 of HPACK's static table is `:status: 200`.
        self.send(HEADERS, END_HEADERS | END_STREAM, stream, &[0x88]).await;
    }

    pub(crate) async fn reset(&mut self, stream: u32, code: u32) {
        self.send(RST_STREAM, 0, stream, &code.to_be_bytes()).await;
    }

    pub(crate) async fn go_away(&mut self, last_stream: u32, code: u32) {
        self.send(GOAWAY, 0, 0, &[last_stream.to_be_bytes(), code.to_be_bytes()].concat()).await;
    }

    /// Returns the next frame's kind, flags, stream and payload, and acknowledges settings and pings on the way.
    async fn next(&mut self) -> Option<(u8, u8, u32, Vec<u8>)> {
        loop {
            let mut head = [0; 9];
            with_timeout(self.stream.read_exact(&mut head)).await.ok()?;
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let mut payload = vec![0; length as usize];
            with_timeout(self.stream.read_exact(&mut payload)).await.ok()?;
            let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
            match (head[3], head[4] & ACK) {
                (SETTINGS, 0) => self.send(SETTINGS, ACK, 0, &[]).await,
                (PING, 0) => self.send(PING, ACK, 0, &payload).await,
                (kind, _) => return Some((kind, head[4], stream, payload)),
            }
        }
    }

    async fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let head = [&length[1..], &[kind, flags], &stream.to_be_bytes()].concat();
        // The proxy may have closed the connection.
        let _ = with_timeout(self.stream.write_all(&[&head, payload].concat())).await;
    }
}
