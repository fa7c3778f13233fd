//! Serves HTTP/1.1 and HTTP/2 on one port, within limits, and shuts down gracefully.

mod connection;
mod merge;
mod socket;
mod upload;

use std::{
    convert::Infallible,
    io,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes},
    http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header::CONNECTION},
};
use http_body::{Body as _, Frame, SizeHint};
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
    service::Service,
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::{self, Instant},
};
use tower::ServiceExt;

pub use self::{connection::Connection, socket::GIVE_UP_AFTER};
use self::{
    connection::{Due, InFlight, Strangers},
    socket::{LINGER_PAUSE, LINGER_TIME, Socket},
    upload::Upload,
};
use crate::{config::Limits, upstream};

/// How long requests in flight may take to finish on shutdown.
const GRACE: Duration = Duration::from_secs(30);

/// How often HTTP/2 callers are pinged. A caller that does not answer is disconnected.
const PING_EVERY: Duration = Duration::from_secs(30);

/// How far an HTTP/2 upload, and all uploads of a connection together, may be ahead of the API.
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;

/// How many concurrent requests an HTTP/2 connection may carry.
const STREAMS: u32 = 1000;

/// How long the header fields of a request or response may be: names and values together. And how many there may be.
const MAX_HEADERS: usize = 64 * 1024;
pub const MAX_FIELDS: usize = 1024;

/// How long the whole head may be, with the longest URI and what each version adds to a field. Beyond that, hyper answers with
/// 431 itself, or gives up the connection.
pub const MAX_HEAD_HTTP1: usize = 64 * 1024 + MAX_HEADERS + 8 * MAX_FIELDS;
pub const MAX_HEAD_HTTP2: u32 = (64 * 1024 + MAX_HEADERS + 32 * MAX_FIELDS) as u32;

/// One of how many connections may belong to strangers; and how old they are allowed to become beyond that, so that a burst of
/// new connections has time for its first requests.
const STRANGERS: usize = 8;
const STRANGERS_AGE: Duration = Duration::from_secs(1);

/// The file descriptors that the process needs apart from connections; and those per connection: the caller's and the API's.
const OTHER_DESCRIPTORS: u64 = 64;
const DESCRIPTORS_EACH: u64 = 2;

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
    limits: Limits,
    shutdown: Shutdown,
    stop: impl Future<Output = ()>,
    abort: impl Future<Output = ()>,
) {
    let server = Arc::new(Server::new(app, limits));
    let mut stop = pin!(stop);
    loop {
        let accept = async {
            let (stream, _) = listener.accept().await?;
            Ok((stream, server.slot().await))
        };
        tokio::select! {
            accepted = accept => match accepted {
                Ok((stream, slot)) => {
                    tokio::spawn(Arc::clone(&server).connection(stream, slot, shutdown.guard()));
                }
                Err(error) => accept_failed(&error).await,
            },
            () = &mut stop => break,
        }
    }
    // Refuses new connections, and lets the app's background tasks end.
    drop((listener, server));
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

/// What all connections share.
struct Server {
    app: Router,
    http1: http1::Builder,
    http2: http2::Builder<TokioExecutor>,
    limits: Limits,
    slots: Arc<Semaphore>,
    strangers: Arc<Strangers>,
}

impl Server {
    fn new(app: Router, mut limits: Limits) -> Self {
        limits.max_connections = within_descriptors(limits.max_connections);
        let mut http1 = http1::Builder::new();
        // `Connection` has the timeouts, because hyper's also covers the idle time between two requests.
        http1
            .timer(TokioTimer::new())
            .header_read_timeout(None)
            .max_headers(MAX_FIELDS)
            .max_buf_size(MAX_HEAD_HTTP1);
        let mut http2 = http2::Builder::new(TokioExecutor::new());
        http2
            .timer(TokioTimer::new())
            .keep_alive_interval(PING_EVERY)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_concurrent_streams(STREAMS)
            .max_header_list_size(MAX_HEAD_HTTP2);
        let slots = Arc::new(Semaphore::new(limits.max_connections));
        Self { app, http1, http2, limits, slots, strangers: Arc::default() }
    }

    /// Waits until there may be one more connection, and makes room for it.
    async fn slot(&self) -> OwnedSemaphorePermit {
        if let Ok(slot) = Arc::clone(&self.slots).try_acquire_owned() {
            let limit = self.limits.max_connections / STRANGERS;
            while self.strangers.count() >= limit && self.strangers.evict(STRANGERS_AGE) {}
            return slot;
        }
        if !self.strangers.evict(Duration::ZERO) {
            tracing::warn!(
                limit = self.limits.max_connections,
                "too many connections, waiting for one to end; raise --max-connections"
            );
        }
        // The semaphore is never closed.
        Arc::clone(&self.slots).acquire_owned().await.expect("an open semaphore")
    }

    async fn connection(
        self: Arc<Self>,
        stream: TcpStream,
        slot: OwnedSemaphorePermit,
        mut guard: ShutdownGuard,
    ) {
        let connection = Connection::new(&self.strangers);
        let socket = Socket::new(stream, Arc::clone(&connection), slot);
        let version = tokio::select! {
            version = time::timeout(self.limits.head_timeout, is_http2(&socket)) => version,
            () = connection.evicted() => return,
            () = guard.begun() => return,
        };
        let Ok(Ok(is_http2)) = version else { return };
        let requests = Requests {
            app: self.app.clone(),
            connection: Arc::clone(&connection),
            keep_alive: self.limits.keep_alive,
        };
        let io = TokioIo::new(socket);
        // Boxed, so that a connection takes no more memory than its version needs.
        let served = if is_http2 {
            connection.set_http2();
            let serving = Box::pin(self.http2.serve_connection(io, requests));
            self.watch(serving, http2::Connection::graceful_shutdown, &connection, guard).await
        } else {
            let serving = Box::pin(self.http1.serve_connection(io, requests).with_upgrades());
            self.watch(serving, http1::UpgradeableConnection::graceful_shutdown, &connection, guard).await
        };
        if let Err(error) = served {
            tracing::debug!(%error, "connection to a caller failed");
        }
    }

    /// Serves a connection until its end, a limit, or the shutdown.
    async fn watch<C: Future<Output = hyper::Result<()>>>(
        &self,
        mut serving: Pin<Box<C>>,
        shut_down: fn(Pin<&mut C>),
        connection: &Connection,
        mut guard: ShutdownGuard,
    ) -> hyper::Result<()> {
        let (mut closing, mut closing_since) = (false, Instant::now());
        let mut timer = pin!(time::sleep_until(Instant::now()));
        loop {
            let close = tokio::select! {
                served = &mut serving => return served,
                () = guard.begun(), if !closing => true,
                () = connection.evicted() => return Ok(()),
                () = &mut timer => match connection.due(&self.limits) {
                    Due::Later(due) if !closing => {
                        timer.as_mut().reset(due);
                        false
                    }
                    Due::Cut => return Ok(()),
                    // The last request of an HTTP/2 connection may still arrive: the caller has not read GOAWAY yet. Pings
                    // are no reason to wait any longer.
                    _ if closing => {
                        let last = connection.idle_since().max(closing_since) + LINGER_TIME;
                        let due = last.min(connection.moved_at() + LINGER_PAUSE);
                        if connection.is_idle() && Instant::now() >= due {
                            return Ok(());
                        }
                        timer.as_mut().reset(due.max(Instant::now() + LINGER_PAUSE));
                        false
                    }
                    _ => true,
                },
            };
            if close {
                (closing, closing_since) = (true, Instant::now());
                timer.as_mut().reset(Instant::now() + LINGER_PAUSE);
                if connection.is_idle() {
                    connection.close_at_once();
                }
                shut_down(serving.as_mut());
            }
        }
    }
}

/// Lowers the number of connections to what the limit on file descriptors allows, which is raised as far as possible.
fn within_descriptors(connections: usize) -> usize {
    let wanted = connections as u64 * DESCRIPTORS_EACH + OTHER_DESCRIPTORS;
    // Where the limit is unknown, there is none.
    let allowed = rlimit::increase_nofile_limit(wanted).unwrap_or(u64::MAX);
    if allowed >= wanted {
        return connections;
    }
    let lowered = (allowed.saturating_sub(OTHER_DESCRIPTORS) / DESCRIPTORS_EACH).max(1) as usize;
    tracing::warn!(
        connections = lowered,
        descriptors = allowed,
        "the limit on file descriptors allows fewer connections; raise `ulimit -n`"
    );
    lowered
}

/// Whether the header fields exceed the limits, which are the same over each version of HTTP.
pub fn has_large_headers(headers: &HeaderMap) -> bool {
    let length: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    length > MAX_HEADERS || headers.len() > MAX_FIELDS
}

/// Waits until the caller's version of HTTP is known. hyper-util does the same, but without a timeout.
async fn is_http2(socket: &Socket) -> io::Result<bool> {
    let mut seen = [0; PREFACE.len()];
    let mut pause = Duration::from_millis(10);
    loop {
        let length = socket.peek(&mut seen).await?;
        if length == 0 || !PREFACE.starts_with(&seen[..length]) {
            return Ok(false);
        }
        if length == PREFACE.len() {
            return Ok(true);
        }
        // Part of the preface has arrived, and `peek` returns it at once: back off instead of spinning.
        time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(1));
    }
}

/// Passes the requests of a connection to the app, and tracks them.
struct Requests {
    app: Router,
    connection: Arc<Connection>,
    keep_alive: Duration,
}

impl Service<Request<Incoming>> for Requests {
    type Response = Response<AnswerBody>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let connection = Arc::clone(&self.connection);
        let in_flight = InFlight::new(&connection);
        let (app, keep_alive) = (self.app.clone(), self.keep_alive);
        Box::pin(async move {
            let (mut parts, body) = request.into_parts();
            let (body, upload) = if body.is_end_stream() {
                (Body::empty(), None)
            } else {
                let upload = Upload::new(body, upstream::expects_continue(&parts.headers), &connection);
                (upload.body(), Some(upload))
            };
            parts.extensions.insert(Arc::clone(&connection));
            let Ok(mut response) = app.oneshot(Request::from_parts(parts, body)).await;
            if response.status() == StatusCode::SWITCHING_PROTOCOLS {
                connection.close_at_once();
            }
            if let Some(upload) = &upload
                && upload.is_left()
            {
                if !connection.is_http2() {
                    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
                }
                if response.status().is_client_error() || response.status().is_server_error() {
                    upload.give_up();
                }
            }
            Ok(response.map(|body| AnswerBody { body, upload, keep_alive, _in_flight: in_flight }))
        })
    }
}

/// The body of an answer.
struct AnswerBody {
    body: Body,
    upload: Option<Upload>,
    /// How long an upload may pause after the answer, which is as long as the connection may be idle.
    keep_alive: Duration,
    _in_flight: InFlight,
}

impl http_body::Body for AnswerBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for AnswerBody {
    fn drop(&mut self) {
        if let Some(upload) = &self.upload {
            upload.answered(self.keep_alive);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn requests_in_flight_have_the_grace_period_to_finish() {
        for finishes in [None, Some(GRACE / 2)] {
            let shutdown = Shutdown::default();
            let in_flight = shutdown.guard();
            let request = async move {
                time::sleep(finishes.unwrap_or(2 * GRACE)).await;
                drop(in_flight);
            };
            tokio::spawn(request);
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let (stop, abort) = (std::future::ready(()), std::future::pending());
            let start = Instant::now();
            serve(listener, Router::new(), Limits::default(), shutdown, stop, abort).await;
            assert_eq!(start.elapsed().as_secs(), finishes.unwrap_or(GRACE).as_secs());
        }
    }

    /// A caller that sends pings and ignores `GOAWAY`.
    #[tokio::test(start_paused = true)]
    async fn pings_keep_no_connection_open() {
        let limits = Limits::default();
        let server = Server::new(Router::new(), limits);
        let connection = Connection::new(&server.strangers);
        connection.set_http2();
        let serving = Box::pin(std::future::pending());
        let pings = async {
            for _ in 0..600 {
                time::sleep(Duration::from_secs(1)).await;
                connection.read(1);
            }
        };
        let start = Instant::now();
        let guard = Shutdown::default().guard();
        tokio::select! {
            served = server.watch(serving, |_| {}, &connection, guard) => served.unwrap(),
            () = pings => {}
        }
        assert!(
            start.elapsed() <= limits.head_timeout + LINGER_TIME + 2 * LINGER_PAUSE,
            "{:?}",
            start.elapsed()
        );
    }
}
