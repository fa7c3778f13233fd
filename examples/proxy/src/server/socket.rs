//! The socket of a caller, which is closed without losing the last answer: [`Socket`].

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use metrics::gauge;
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::OwnedSemaphorePermit,
    time::{self, Instant, Sleep},
};

use super::connection::Connection;
use crate::metrics::CONNECTIONS;

/// How much is read from a caller, and for how long, after the last answer.
pub(super) const LINGER_BYTES: usize = 1024 * 1024 * 1024;
pub(super) const LINGER_TIME: Duration = Duration::from_secs(30);

/// How long the caller may pause during that time.
pub(super) const LINGER_PAUSE: Duration = Duration::from_secs(5);

/// When a silent caller is probed, and how often; and when a caller is given up that acknowledges or reads nothing.
const PROBE_AFTER: Duration = Duration::from_secs(30);
const PROBE_EVERY: Duration = Duration::from_secs(10);
pub const GIVE_UP_AFTER: Duration = Duration::from_secs(120);

/// A caller's socket.
///
/// Closing a socket while unread bytes arrive resets the connection, and the reset destroys what the caller has not read yet:
/// the answer to an upload that was refused. Therefore the socket's shutdown sends a FIN, then reads and discards until the
/// caller closes its side as well, within limits
/// ([RFC 9112 section 9.6](https://www.rfc-editor.org/rfc/rfc9112#section-9.6)).
#[derive(Debug)]
pub(super) struct Socket {
    stream: TcpStream,
    connection: Arc<Connection>,
    fin_sent: bool,
    discarding: Option<Discarding>,
    _slot: OwnedSemaphorePermit,
}

#[derive(Debug)]
struct Discarding {
    until: Instant,
    left: usize,
    timer: Pin<Box<Sleep>>,
}

impl Socket {
    /// Takes over an accepted connection, which occupies its slot until dropped.
    pub(super) fn new(stream: TcpStream, connection: Arc<Connection>, slot: OwnedSemaphorePermit) -> Self {
        // Otherwise a small event waits for the acknowledgement of the previous one (Nagle's algorithm).
        let _ = stream.set_nodelay(true);
        probe(&stream);
        gauge!(CONNECTIONS).increment(1.0);
        Self { stream, connection, fin_sent: false, discarding: None, _slot: slot }
    }

    /// Reads bytes without removing them.
    pub(super) async fn peek(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.peek(buffer).await
    }

    /// Reads and discards what the caller sends. Ready at the end of it, or at a limit.
    fn poll_discard(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let discarding = self.discarding.get_or_insert_with(|| {
            let until = Instant::now() + LINGER_TIME;
            Discarding { until, left: LINGER_BYTES, timer: Box::pin(time::sleep(Duration::ZERO)) }
        });
        let mut scratch = [0; 16 * 1024];
        loop {
            let mut buffer = ReadBuf::new(&mut scratch);
            match Pin::new(&mut self.stream).poll_read(cx, &mut buffer) {
                Poll::Ready(Ok(())) if !buffer.filled().is_empty() => {
                    self.connection.wrote();
                    discarding.left = discarding.left.saturating_sub(buffer.filled().len());
                    if discarding.left == 0 {
                        return Poll::Ready(());
                    }
                }
                Poll::Ready(_) => return Poll::Ready(()),
                Poll::Pending => break,
            }
        }
        loop {
            ready!(discarding.timer.as_mut().poll(cx));
            let due = discarding.until.min(self.connection.moved_at() + LINGER_PAUSE);
            if Instant::now() >= due {
                return Poll::Ready(());
            }
            discarding.timer.as_mut().reset(due);
        }
    }

    fn wrote(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match &written {
            Poll::Ready(_) => self.connection.wrote(),
            // The caller may read the answer only once it has sent everything.
            Poll::Pending if self.connection.discards() => {
                let _ = self.poll_discard(cx);
            }
            Poll::Pending => {}
        }
        written
    }
}

/// Has the system notice a caller that vanished without closing the connection.
fn probe(stream: &TcpStream) {
    let socket = SockRef::from(stream);
    let probes = TcpKeepalive::new().with_time(PROBE_AFTER).with_interval(PROBE_EVERY).with_retries(3);
    // Where an option is not supported, the system's defaults hold.
    let _ = socket.set_tcp_keepalive(&probes);
    #[cfg(target_os = "linux")]
    let _ = socket.set_tcp_user_timeout(Some(GIVE_UP_AFTER));
}

impl Drop for Socket {
    fn drop(&mut self) {
        gauge!(CONNECTIONS).decrement(1.0);
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        let length = buffer.filled().len() - before;
        if length > 0 {
            self.connection.read(length);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, data);
        self.wrote(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, data);
        self.wrote(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.fin_sent {
            ready!(Pin::new(&mut self.stream).poll_shutdown(cx))?;
            self.fin_sent = true;
        }
        if !self.connection.closes_at_once() {
            ready!(self.poll_discard(cx));
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn vanished_callers_are_noticed() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let _caller = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        probe(&stream);
        let socket = SockRef::from(&stream);
        assert!(socket.keepalive().unwrap());
        #[cfg(target_os = "linux")]
        {
            assert_eq!(socket.tcp_keepalive_time().unwrap(), PROBE_AFTER);
            assert_eq!(socket.tcp_keepalive_interval().unwrap(), PROBE_EVERY);
            assert_eq!(socket.tcp_user_timeout().unwrap(), Some(GIVE_UP_AFTER));
        }
    }
}
