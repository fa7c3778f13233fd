//! Serving: HTTP/1.1 and HTTP/2 on one port, and how it ends.

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

/// For the head of a request, and between two of them.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);

/// For what runs when the proxy is told to end.
const GRACE: Duration = Duration::from_secs(30);

/// HTTP/2 callers that do not answer a ping are gone.
const PING_EVERY: Duration = Duration::from_secs(30);

/// What an upload may be ahead of the API by, and all uploads of an HTTP/2 connection together.
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;

/// How many requests an HTTP/2 connection may have under way.
const STREAMS: u32 = 1000;

/// The first bytes of HTTP/2 ([RFC 9113 section 3.4](https://www.rfc-editor.org/rfc/rfc9113#section-3.4)).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Whether it is time to end; and, by who still listens, what is not done yet.
#[derive(Clone, Debug, Default)]
pub struct Ending(Arc<watch::Sender<bool>>);

/// Something that the end waits for.
#[derive(Debug)]
pub struct Busy(watch::Receiver<bool>);

impl Ending {
    /// The end waits until this is dropped.
    pub fn wait_for(&self) -> Busy {
        Busy(self.0.subscribe())
    }
}

impl Busy {
    async fn told_to_end(&mut self) {
        // An error would say that nobody can tell any more.
        let _ = self.0.wait_for(|ending| *ending).await;
    }
}

/// Serves until `stop`, then lets what runs finish, until that is `impatient` or the grace is over.
pub async fn serve(
    listener: TcpListener,
    app: Router,
    ending: Ending,
    stop: impl Future<Output = ()>,
    impatient: impl Future<Output = ()>,
) {
    let mut stop = pin!(stop);
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    tokio::spawn(connection(stream, app.clone(), ending.wait_for()));
                }
                Err(error) => refused(&error).await,
            },
            () = &mut stop => break,
        }
    }
    drop((listener, app));
    let Ending(sender) = ending;
    sender.send_replace(true);
    tracing::info!(connections = sender.receiver_count(), "ending");
    tokio::select! {
        () = sender.closed() => {}
        () = impatient => {}
        () = time::sleep(GRACE) => {
            tracing::warn!(connections = sender.receiver_count(), "the grace is over");
        }
    }
}

/// A connection that could not be accepted. One that was given up meanwhile is nothing; that there are no more file
/// descriptors passes, but not at once.
async fn refused(error: &io::Error) {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    if !matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset) {
        tracing::error!(%error, "no connection can be accepted");
        time::sleep(Duration::from_millis(100)).await;
    }
}

async fn connection(stream: TcpStream, app: Router, mut busy: Busy) {
    // Without it, a small event waits for the acknowledgement of the one before.
    let _ = stream.set_nodelay(true);
    let begun = tokio::select! {
        begun = time::timeout(HEAD_TIMEOUT, begin(&stream)) => matches!(begun, Ok(Ok(()))),
        () = busy.told_to_end() => false,
    };
    if !begun {
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
    let ended = tokio::select! {
        ended = &mut serving => ended,
        () = busy.told_to_end() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a caller's connection broke off");
    }
}

/// Waits until it is plain which version of HTTP the caller speaks: hyper-util does so without a timeout.
async fn begin(stream: &TcpStream) -> io::Result<()> {
    let mut seen = [0; PREFACE.len()];
    let mut pause = Duration::from_millis(10);
    loop {
        let length = stream.peek(&mut seen).await?;
        if length == 0 || length == PREFACE.len() || !PREFACE.starts_with(&seen[..length]) {
            return Ok(());
        }
        // The rest of the preface is still on its way; who sends it piece by piece is asked ever less often.
        time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(1));
    }
}
