//! Serves HTTP/1.1 and HTTP/2 on one port, and shuts down gracefully.

use std::{io, pin::pin, sync::Arc, time::Duration};

use axum::Router;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    time,
};

/// How long a caller may take to send the head of a request, and may be idle between two requests over HTTP/1.1.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);

/// How long requests in flight may take to finish on shutdown.
const GRACE: Duration = Duration::from_secs(30);

/// How often HTTP/2 callers are pinged. A caller that does not answer is disconnected.
const PING_EVERY: Duration = Duration::from_secs(30);

/// How far an HTTP/2 upload, and all uploads of a connection together, may be ahead of the API.
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;

/// How many concurrent requests an HTTP/2 connection may carry.
const STREAMS: u32 = 1000;

/// The first bytes of HTTP/2 ([RFC 9113 section 3.4](https://www.rfc-editor.org/rfc/rfc9113#section-3.4)).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Announces the shutdown, and waits for everything that holds a [`ShutdownGuard`].
#[derive(Clone, Debug, Default)]
pub struct Shutdown(Arc<watch::Sender<bool>>);

/// Delays the end of the process until dropped.
#[derive(Debug)]
pub struct ShutdownGuard(watch::Receiver<bool>);

impl Shutdown {
    pub fn guard(&self) -> ShutdownGuard {
        ShutdownGuard(self.0.subscribe())
    }
}

impl ShutdownGuard {
    /// Waits until the shutdown begins.
    async fn begun(&mut self) {
        // An error means that the sender is gone, which counts as a shutdown too.
        let _ = self.0.wait_for(|begun| *begun).await;
    }
}

/// Serves until `stop` completes, then waits for requests in flight until they are done, `abort` completes, or the grace period
/// is over.
pub async fn serve(
    listener: TcpListener,
    app: Router,
    shutdown: Shutdown,
    stop: impl Future<Output = ()>,
    abort: impl Future<Output = ()>,
) {
    let mut stop = pin!(stop);
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    tokio::spawn(connection(stream, app.clone(), shutdown.guard()));
                }
                Err(error) => accept_failed(&error).await,
            },
            () = &mut stop => break,
        }
    }
    // Refuses new connections, and lets the app's background tasks end.
    drop((listener, app));
    let Shutdown(sender) = shutdown;
    sender.send_replace(true);
    tracing::info!(connections = sender.receiver_count(), "shutting down");
    tokio::select! {
        () = sender.closed() => {}
        () = abort => {}
        () = time::sleep(GRACE) => {
            tracing::warn!(connections = sender.receiver_count(), "grace period over, closing connections");
        }
    }
}

/// Handles a failed `accept`. A connection that the caller gave up is ignored. Other errors, such as too many open files, do
/// not pass at once, so accepting pauses.
async fn accept_failed(error: &io::Error) {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    if !matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset) {
        tracing::error!(%error, "cannot accept connections");
        time::sleep(Duration::from_millis(100)).await;
    }
}

async fn connection(stream: TcpStream, app: Router, mut guard: ShutdownGuard) {
    // Otherwise a small event waits for the acknowledgement of the previous one (Nagle's algorithm).
    let _ = stream.set_nodelay(true);
    let recognized = tokio::select! {
        recognized = time::timeout(HEAD_TIMEOUT, version_known(&stream)) => matches!(recognized, Ok(Ok(()))),
        () = guard.begun() => false,
    };
    if !recognized {
        return;
    }

    let mut server = auto::Builder::new(TokioExecutor::new());
    server.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
    server
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(PING_EVERY)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(STREAMS);
    let serving = server.serve_connection_with_upgrades(TokioIo::new(stream), TowerToHyperService::new(app));
    let mut serving = pin!(serving);
    let served = tokio::select! {
        served = &mut serving => served,
        () = guard.begun() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = served {
        tracing::debug!(%error, "connection to a caller failed");
    }
}

/// Waits until the caller's version of HTTP is known. hyper-util does the same, but without a timeout.
async fn version_known(stream: &TcpStream) -> io::Result<()> {
    let mut seen = [0; PREFACE.len()];
    let mut pause = Duration::from_millis(10);
    loop {
        let length = stream.peek(&mut seen).await?;
        if length == 0 || length == PREFACE.len() || !PREFACE.starts_with(&seen[..length]) {
            return Ok(());
        }
        // Part of the preface has arrived, and `peek` returns it at once: back off instead of spinning.
        time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(1));
    }
}
