//! Merges the small pieces of a caller's body: [`Merged`].

use std::{
    mem,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::body::{Bytes, HttpBody};
use http_body::{Frame, SizeHint};
use tokio::time::{Sleep, sleep};

/// Data of up to this length waits for more. Anything longer is forwarded as it is.
const SMALL: usize = 1024;

/// How much is merged.
const BLOCK: usize = 16 * 1024;

/// How long small data waits for more.
const PAUSE: Duration = Duration::from_millis(1);

/// Merges the data of small frames. Each frame costs a frame of HTTP/2 or a chunk of HTTP/1.1 on the way to the API, and servers
/// close an HTTP/2 connection that carries many tiny frames, with all other requests on it.
#[derive(Debug)]
pub(super) struct Merged<B: HttpBody> {
    body: B,
    data: Vec<u8>,
    /// Since the first of the data.
    pause: Option<Pin<Box<Sleep>>>,
    /// What was read after the data.
    next: Option<Result<Frame<Bytes>, B::Error>>,
}

impl<B: HttpBody> Merged<B> {
    pub(super) fn new(body: B) -> Self {
        Self { body, data: Vec::new(), pause: None, next: None }
    }

    fn take_data(&mut self) -> Frame<Bytes> {
        self.pause = None;
        Frame::data(mem::take(&mut self.data).into())
    }
}

impl<B: HttpBody<Data = Bytes, Error: Unpin> + Unpin> HttpBody for Merged<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        while self.next.is_none() && self.data.len() < BLOCK {
            match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => match frame.data_ref() {
                    Some(data) if data.len() <= SMALL => self.data.extend_from_slice(data),
                    _ => self.next = Some(Ok(frame)),
                },
                Poll::Ready(Some(Err(error))) => self.next = Some(Err(error)),
                Poll::Ready(None) if self.data.is_empty() => return Poll::Ready(None),
                Poll::Ready(None) => break,
                Poll::Pending if self.data.is_empty() => return Poll::Pending,
                Poll::Pending => {
                    let pause = self.pause.get_or_insert_with(|| Box::pin(sleep(PAUSE)));
                    if pause.as_mut().poll(cx).is_pending() {
                        return Poll::Pending;
                    }
                    break;
                }
            }
        }
        if self.data.is_empty() {
            return Poll::Ready(self.next.take());
        }
        Poll::Ready(Some(Ok(self.take_data())))
    }

    fn is_end_stream(&self) -> bool {
        self.data.is_empty() && self.next.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let next = self.next.as_ref().and_then(|next| next.as_ref().ok()?.data_ref());
        let read = (self.data.len() + next.map_or(0, Bytes::len)) as u64;
        let mut hint = self.body.size_hint();
        if let Some(upper) = hint.upper() {
            hint.set_upper(upper.saturating_add(read));
        }
        hint.set_lower(hint.lower().saturating_add(read));
        hint
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderMap;
    use http_body_util::BodyExt;
    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

    use super::*;

    /// A body that a test feeds.
    struct Fed(UnboundedReceiver<Result<Frame<Bytes>, &'static str>>);

    impl HttpBody for Fed {
        type Data = Bytes;
        type Error = &'static str;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
            self.0.poll_recv(cx)
        }
    }

    fn data(length: usize) -> Result<Frame<Bytes>, &'static str> {
        Ok(Frame::data(vec![b'u'; length].into()))
    }

    /// M1: the lengths of the frames that these become, and how the body ends.
    #[tokio::test(start_paused = true)]
    async fn small_frames_are_merged() {
        let trailers = || Ok(Frame::trailers(HeaderMap::new()));
        for (frames, lengths, end) in [
            (vec![], vec![], "end"),
            (vec![data(0)], vec![], "end"),
            (vec![data(1)], vec![1], "end"),
            (vec![data(1), data(0), data(2), data(1024)], vec![1027], "end"),
            (vec![data(1), data(1025), data(1)], vec![1, 1025, 1], "end"),
            ((0..17).map(|_| data(1024)).collect(), vec![BLOCK, 1024], "end"),
            (vec![data(3), trailers()], vec![3], "trailers"),
            (vec![data(3), data(4), Err("broken off")], vec![7], "broken off"),
        ] {
            let (feed, fed) = unbounded_channel();
            for frame in frames {
                feed.send(frame).unwrap();
            }
            drop(feed);
            let mut merged = Merged::new(Fed(fed));
            let (mut seen, mut ended) = (Vec::new(), "end");
            while let Some(frame) = merged.frame().await {
                match frame.map(Frame::into_data) {
                    Ok(Ok(data)) => seen.push(data.len()),
                    Ok(Err(_)) => ended = "trailers",
                    Err(error) => {
                        ended = error;
                        break;
                    }
                }
            }
            assert_eq!((seen, ended), (lengths, end));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn small_frames_do_not_wait_long() {
        let (feed, fed) = unbounded_channel();
        let mut merged = Merged::new(Fed(fed));
        for _ in 0..3 {
            let sent = tokio::time::Instant::now();
            feed.send(data(1)).unwrap();
            feed.send(data(2)).unwrap();
            let frame = merged.frame().await.unwrap().unwrap();
            assert_eq!(frame.data_ref().unwrap().len(), 3);
            assert!(sent.elapsed() <= 2 * PAUSE);
            assert!(!merged.is_end_stream());
        }
    }
}
