//! A session over WebSocket: feature `test-server`.

use std::{sync::Arc, time::Duration};

use futures_util::{SinkExt, StreamExt};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::time;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Message,
        protocol::{Role, WebSocketConfig},
    },
};

use super::{
    MAX_PAYLOAD,
    session::{Packet, Session},
};
use crate::{BoxError, simulator::Simulator};

type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// How often a request that polls is released while its session changes to WebSocket.
const RELEASE_EVERY: Duration = Duration::from_millis(100);

/// How long a client may take to close.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves a session over the connection that `upgrade` becomes, until either side closes it.
pub(in crate::simulator) async fn serve(
    simulator: Simulator,
    session: Arc<Session>,
    upgrade: OnUpgrade,
) -> Result<(), BoxError> {
    let config = WebSocketConfig::default().max_message_size(Some(MAX_PAYLOAD));
    let stream = TokioIo::new(upgrade.await?);
    let mut socket = WebSocketStream::from_raw_socket(stream, Role::Server, Some(config)).await;
    if session.is_polling() && !probe(&session, &mut socket).await? {
        return Ok(());
    }
    let exchanged = exchange(&simulator, &session, &mut socket).await;
    session.close();
    socket.close(None).await?;
    // What the client has sent must be read, or the connection is reset.
    while let Ok(Some(Ok(_))) = time::timeout(CLOSE_TIMEOUT, socket.next()).await {}
    exchanged
}

/// Answers the client's probe; returns whether the client then changes to this connection.
async fn probe(session: &Session, socket: &mut Socket) -> Result<bool, BoxError> {
    let mut ticks = time::interval(RELEASE_EVERY);
    let mut is_probed = false;
    loop {
        tokio::select! {
            message = socket.next() => match message.transpose()? {
                Some(Message::Text(text)) if text == "2probe" => {
                    socket.send(Message::text("3probe")).await?;
                    is_probed = true;
                }
                Some(Message::Text(text)) if text == "5" && is_probed => {
                    session.upgrade();
                    return Ok(true);
                }
                Some(Message::Ping(_) | Message::Pong(_)) => {}
                _ => return Ok(false),
            },
            _ = ticks.tick(), if is_probed => session.release_poll(),
        }
    }
}

/// Passes packets on in both directions.
async fn exchange(simulator: &Simulator, session: &Session, socket: &mut Socket) -> Result<(), BoxError> {
    loop {
        tokio::select! {
            message = socket.next() => match message.transpose()? {
                Some(Message::Text(text)) => session.receive(&simulator.state(), Packet::Text(text.as_str().to_owned())),
                Some(Message::Binary(data)) => session.receive(&simulator.state(), Packet::Binary(data)),
                Some(Message::Close(_)) | None => return Ok(()),
                Some(_) => {}
            },
            packets = session.next() => {
                if packets.is_empty() {
                    return Ok(());
                }
                for packet in packets {
                    socket.feed(match packet {
                        Packet::Text(text) => Message::text(text),
                        Packet::Binary(data) => Message::Binary(data),
                    }).await?;
                }
                socket.flush().await?;
            }
        }
    }
}
