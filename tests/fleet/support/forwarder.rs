//! [`Forwarder`]: a line to a server that can be cut, stall, be slow, lose a reply, and lead to another server.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::AbortHandle,
    time::sleep,
};

/// The state of a line.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Line {
    Open,
    /// Connections end at once.
    Cut,
    /// Nothing arrives any more.
    Silent,
    /// Replies take as long.
    Slow(Duration),
    /// The connection is cut in the middle of the reply to the nth write of a record. Then the line is open.
    LosesReply(u32),
}

#[derive(Clone, Copy)]
struct State {
    line: Line,
    target: SocketAddr,
    /// Grows when connections have to end.
    era: u32,
}

/// A line to a server, until dropped.
pub(crate) struct Forwarder {
    address: SocketAddr,
    state: Arc<watch::Sender<State>>,
    task: AbortHandle,
}

impl Forwarder {
    pub(crate) async fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(watch::Sender::new(State { line: Line::Open, target, era: 0 }));
        let task = tokio::spawn(accept(listener, Arc::clone(&state))).abort_handle();
        Self { address, state, task }
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://{}", self.address)
    }

    pub(crate) fn set(&self, line: Line) {
        self.state.send_modify(|state| {
            state.line = line;
            state.era += u32::from(line == Line::Cut);
        });
    }

    pub(crate) fn line(&self) -> Line {
        self.state.borrow().line
    }

    /// Leads to another server from now on, as after a failover.
    pub(crate) fn lead_to(&self, target: SocketAddr) {
        self.state.send_modify(|state| {
            state.target = target;
            state.era += 1;
        });
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.task.abort();
        self.set(Line::Cut);
    }
}

async fn accept(listener: TcpListener, state: Arc<watch::Sender<State>>) {
    while let Ok((client, _)) = listener.accept().await {
        let state = Arc::clone(&state);
        tokio::spawn(async move {
            let State { line, target, era } = *state.borrow();
            if line == Line::Cut {
                return;
            }
            let Ok(server) = TcpStream::connect(target).await else { return };
            let mut changes = state.subscribe();
            tokio::select! {
                _ = changes.wait_for(|state| state.era != era) => {}
                () = relay(client, server, &state) => {}
            }
        });
    }
}

async fn relay(client: TcpStream, server: TcpStream, state: &watch::Sender<State>) {
    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
    let loses = watch::Sender::new(false);
    tokio::select! {
        () = requests(from_client, to_server, state, &loses) => {}
        () = replies(from_server, to_client, state, &loses) => {}
    }
}

async fn requests(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    state: &watch::Sender<State>,
    loses: &watch::Sender<bool>,
) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        passable(state).await;
        let line = state.borrow().line;
        if let Line::LosesReply(nth) = line
            && is_write(&buffer[..length])
        {
            loses.send_replace(nth == 1);
            let next = if nth == 1 { Line::Open } else { Line::LosesReply(nth - 1) };
            state.send_modify(|state| state.line = next);
        }
        if to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}

/// Whether a request is the script that writes, for the key of a record.
fn is_write(request: &[u8]) -> bool {
    let request = String::from_utf8_lossy(request);
    request.contains("HSET") && request.contains("$36\r\nselam:billing:")
}

async fn replies(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    state: &watch::Sender<State>,
    loses: &watch::Sender<bool>,
) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        passable(state).await;
        let line = state.borrow().line;
        if let Line::Slow(time) = line {
            sleep(time).await;
        }
        let loses = *loses.borrow();
        let length = if loses { length / 2 } else { length };
        if to.write_all(&buffer[..length]).await.is_err() || loses {
            return;
        }
    }
}

/// Waits until the line is not silent.
async fn passable(state: &watch::Sender<State>) {
    let _ = state.subscribe().wait_for(|state| state.line != Line::Silent).await;
}
