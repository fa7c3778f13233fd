//! What is known of a connection to the API: whether it has answered, and how long it may be idle.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::http::{Extensions, HeaderMap, HeaderName};
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::client::legacy::connect::{CaptureConnection, Connected, Connection};
use tokio::{runtime::Handle, task::AbortHandle, time};

/// How long an idle HTTP/1.1 connection is reused by default, if the API announces nothing: less than the five seconds of
/// uvicorn, Node and Apache.
const HTTP1_IDLE: Duration = Duration::from_secs(4);

/// How long other idle connections are reused by default. After that, a firewall on the way may have dropped them.
pub(super) const MAX_IDLE: Duration = Duration::from_secs(60);

/// How much sooner than announced a connection is given up, so that a request does not meet the API's closing.
const MARGIN: Duration = Duration::from_secs(1);

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");

/// How long an HTTP/1.1 connection may be idle after a response with these headers.
pub(super) fn idle_time(headers: &HeaderMap, configured: Option<Duration>) -> Duration {
    match announced(headers) {
        Some(time) => (time - MARGIN.min(time / 2)).min(configured.unwrap_or(MAX_IDLE)),
        None => configured.unwrap_or(HTTP1_IDLE),
    }
}

/// The `timeout` of the `Keep-Alive` header
/// ([RFC 2068 section 19.7.1.1](https://www.rfc-editor.org/rfc/rfc2068#section-19.7.1.1)).
fn announced(headers: &HeaderMap) -> Option<Duration> {
    let values = headers.get_all(KEEP_ALIVE).into_iter().filter_map(|value| value.to_str().ok());
    let parameters = values.flat_map(|value| value.split(','));
    let timeouts = parameters.filter_map(|parameter| {
        let (name, seconds) = parameter.split_once('=')?;
        let is_timeout = name.trim().eq_ignore_ascii_case("timeout");
        is_timeout.then(|| seconds.trim().trim_matches('"').parse().ok().map(Duration::from_secs))?
    });
    timeouts.min()
}

/// The connection that a request was sent on.
#[derive(Debug)]
pub(super) struct Used {
    connection: CaptureConnection,
    record: Record,
}

impl Used {
    /// Returns `None` if the request was not given to a connection.
    pub(super) fn new(connection: CaptureConnection) -> Option<Self> {
        let mut extras = Extensions::new();
        connection.connection_metadata().as_ref()?.get_extras(&mut extras);
        let record = extras.remove()?;
        Some(Self { connection, record })
    }

    /// Reports an answer.
    pub(super) fn answered(&self) {
        self.record.0.answered.store(true, Relaxed);
    }

    /// Whether a request has been answered on this connection.
    pub(super) fn has_answered(&self) -> bool {
        self.record.0.answered.load(Relaxed)
    }

    /// Keeps further requests off this connection. Those that it carries are not affected.
    pub(super) fn retire(&self) {
        if let Some(connected) = &*self.connection.connection_metadata() {
            connected.poison();
        }
    }
}

/// Limits the idle time of an HTTP/1.1 connection, from the drop of this value on: at the end of a response.
#[derive(Debug)]
pub(super) struct IdleLimit {
    used: Option<Used>,
    time: Duration,
}

impl IdleLimit {
    pub(super) fn new(used: Used, time: Duration) -> Self {
        if time.is_zero() {
            used.retire();
        }
        Self { used: Some(used), time }
    }
}

impl Drop for IdleLimit {
    fn drop(&mut self) {
        // Without a runtime, no request can follow.
        let (Some(used), Ok(runtime)) = (self.used.take(), Handle::try_current()) else { return };
        let record = used.record.clone();
        let (written, time) = (record.0.writes.load(Relaxed), self.time);
        let timer = runtime.spawn(async move {
            time::sleep(time).await;
            // Otherwise another request is under way, whose response sets the next limit.
            if used.record.0.writes.load(Relaxed) == written {
                used.retire();
            }
        });
        let mut current = record.0.timer.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(previous) = current.replace(timer.abort_handle()) {
            previous.abort();
        }
    }
}

/// The record of a connection, which hyper-util hands out with it.
#[derive(Clone, Debug, Default)]
struct Record(Arc<State>);

#[derive(Debug, Default)]
struct State {
    answered: AtomicBool,
    writes: AtomicUsize,
    /// Ends the idle time.
    timer: Mutex<Option<AbortHandle>>,
}

/// A connection that keeps a record, and does not lose the last response.
///
/// An API that refuses an upload early may close the connection while the body is still being written. The write fails, but the
/// response has arrived. hyper would report the failed write instead, so writes seem to succeed from then on: the response, or
/// the read that fails, ends the request.
#[derive(Debug)]
pub struct Recorded<T> {
    stream: T,
    record: Record,
    write_failed: bool,
}

impl<T> Recorded<T> {
    pub(super) fn new(stream: T) -> Self {
        Self { stream, record: Record::default(), write_failed: false }
    }
}

impl<T: Write + Unpin> Recorded<T> {
    /// Writes, or discards the bytes after a failed write.
    fn write(
        &mut self,
        length: usize,
        write: impl FnOnce(Pin<&mut T>) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        self.record.0.writes.fetch_add(1, Relaxed);
        if !self.write_failed {
            match write(Pin::new(&mut self.stream)) {
                Poll::Ready(Err(_)) => self.write_failed = true,
                written => return written,
            }
        }
        Poll::Ready(Ok(length))
    }
}

impl<T: Connection> Connection for Recorded<T> {
    fn connected(&self) -> Connected {
        self.stream.connected().extra(self.record.clone())
    }
}

impl<T: Read + Unpin> Read for Recorded<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<T: Write + Unpin> Write for Recorded<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.write(data.len(), |stream| stream.poll_write(cx, data))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let length = data.iter().map(|part| part.len()).sum();
        self.write(length, |stream| stream.poll_write_vectored(cx, data))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        if matches!(flushed, Poll::Ready(Err(_))) {
            self.write_failed = true;
            return Poll::Ready(Ok(()));
        }
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_time_is_shorter_than_announced() {
        let time = |header: &[&str], configured: Option<u64>| {
            let values = header.iter().map(|value| (KEEP_ALIVE, value.parse().unwrap()));
            idle_time(&values.collect(), configured.map(Duration::from_secs)).as_millis()
        };
        for (header, by_default, at_most_30, at_most_2) in [
            (&[][..], 4_000, 30_000, 2_000),
            (&["timeout=5"], 4_000, 4_000, 2_000),
            (&["timeout=5, max=100"], 4_000, 4_000, 2_000),
            (&["max=100,TIMEOUT = \"5\""], 4_000, 4_000, 2_000),
            (&["max=100", "timeout=5"], 4_000, 4_000, 2_000),
            (&["timeout=5", "timeout=3"], 2_000, 2_000, 2_000),
            (&["timeout=2"], 1_000, 1_000, 1_000),
            (&["timeout=1"], 500, 500, 500),
            (&["timeout=0"], 0, 0, 0),
            (&["timeout=20"], 19_000, 19_000, 2_000),
            (&["timeout=75"], 60_000, 30_000, 2_000),
            (&["timeout=18446744073709551615"], 60_000, 30_000, 2_000),
            // Not a number of seconds.
            (&["timeout=18446744073709551616"], 4_000, 30_000, 2_000),
            (&["timeout=-5"], 4_000, 30_000, 2_000),
            (&["timeout=1.5"], 4_000, 30_000, 2_000),
            (&["timeout"], 4_000, 30_000, 2_000),
            (&["xtimeout=1"], 4_000, 30_000, 2_000),
            (&["\u{e9}"], 4_000, 30_000, 2_000),
        ] {
            let times = [None, Some(30), Some(2)].map(|configured| time(header, configured));
            assert_eq!(times, [by_default, at_most_30, at_most_2], "{header:?}");
        }
    }
}
