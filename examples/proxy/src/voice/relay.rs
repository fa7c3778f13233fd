//! A WebSocket between a caller and the API, message by message: [`Relay`].

use std::{borrow::Cow, time::Duration};

use futures_util::{
    Sink, SinkExt, Stream, StreamExt,
    stream::{SplitSink, SplitStream},
};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{self, AsyncWriteExt},
    sync::mpsc,
    time,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Error, Message, Utf8Bytes,
        error::ProtocolError,
        protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
    },
};
use tower_selam::{BoxError, inbound::EchoMask};

use super::{
    Call, MAX_FROM_API, MAX_FROM_CALLER, Voice, masked,
    packet::{Fault, Packet, Side, refuse_connect},
    refuse,
    sessions::{InUse, Session},
};

/// How much is read from a connection at once.
const READ_BUFFER: usize = 4 * 1024;

/// How long both sides may take to close.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// How many answers of the proxy's own may wait for a caller that does not read them.
const OWN_ANSWERS: usize = 4;

/// A WebSocket that the API has accepted.
#[derive(Debug)]
pub struct Relay {
    voice: Voice,
    call: Call,
    mask: EchoMask,
}

/// Why the exchange ended: how to close the connection to each side.
struct End {
    to_caller: Option<CloseFrame>,
    to_api: Option<CloseFrame>,
}

impl End {
    /// One side has closed its connection.
    fn closed(by: Side, frame: Option<CloseFrame>) -> Self {
        match by {
            Side::Caller => Self { to_caller: None, to_api: frame },
            Side::Api => Self { to_caller: frame, to_api: None },
        }
    }

    /// One side sent what may not pass.
    fn fault(by: Side, fault: Fault) -> Self {
        refuse(by, fault);
        let (code, reason) = match fault {
            Fault::Namespace => (CloseCode::Policy, "namespace not allowed"),
            Fault::TooLarge => (CloseCode::Size, "message too large"),
            Fault::Malformed | Fault::Attachment => (CloseCode::Policy, "invalid packet"),
        };
        let blame = Some(CloseFrame { code, reason: reason.into() });
        let other = Some(CloseFrame { code: CloseCode::Away, reason: Utf8Bytes::default() });
        match by {
            Side::Caller => Self { to_caller: blame, to_api: other },
            Side::Api => Self { to_caller: other, to_api: blame },
        }
    }

    fn failed(by: Side, error: &Error) -> Self {
        match error {
            Error::Capacity(_) => Self::fault(by, Fault::TooLarge),
            Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => Self::closed(by, None),
            Error::Protocol(_) | Error::Utf8(_) => Self::fault(by, Fault::Malformed),
            _ => Self::closed(by, None),
        }
    }
}

impl Relay {
    pub(super) fn new(voice: Voice, call: Call, mask: EchoMask) -> Self {
        Self { voice, call, mask }
    }

    /// Relays messages until either side closes. Returns how many bytes of them the caller received.
    pub async fn run(self, caller: OnUpgrade, api: OnUpgrade) -> Result<u64, BoxError> {
        let (caller, api) = tokio::try_join!(caller, api)?;
        let (mut to_caller, mut from_caller) = socket(caller, Role::Server, MAX_FROM_CALLER).await.split();
        let (mut to_api, mut from_api) = socket(api, Role::Client, MAX_FROM_API).await.split();
        let mut bytes = 0;
        let end = match self.begin(&mut from_api, &mut to_caller).await {
            Err(end) => end,
            Ok((session, mut is_here)) => {
                let (own, mut own_answers) = mpsc::channel(OWN_ANSWERS);
                let end = tokio::select! {
                    end = self.up(&session, &mut from_caller, &mut to_api, own, &mut is_here) => end,
                    end = self.down(&session, &mut from_api, &mut to_caller, &mut own_answers, &mut bytes) => end,
                };
                if is_here {
                    self.voice.sessions.remove(&session);
                }
                end
            }
        };
        let closing = async {
            tokio::join!(close(to_caller, from_caller, end.to_caller), close(to_api, from_api, end.to_api))
        };
        let _ = time::timeout(CLOSE_TIMEOUT, closing).await;
        Ok(bytes)
    }

    /// Returns the session, and whether it lives on this WebSocket. Without a handshake before, the API's first message opens it.
    async fn begin(
        &self,
        from_api: &mut (impl Stream<Item = Result<Message, Error>> + Unpin),
        to_caller: &mut (impl Sink<Message, Error = Error> + Unpin),
    ) -> Result<(InUse, bool), End> {
        if let Some(session) = &self.call.session {
            return Ok((session.clone(), false));
        }
        loop {
            let text = match from_api.next().await {
                Some(Ok(Message::Text(text))) => text,
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => continue,
                Some(Ok(Message::Close(frame))) => return Err(End::closed(Side::Api, frame)),
                Some(Ok(_)) => return Err(End::fault(Side::Api, Fault::Malformed)),
                Some(Err(error)) => return Err(End::failed(Side::Api, &error)),
                None => return Err(End::closed(Side::Api, None)),
            };
            let opened = self.voice.open(&self.call.caller, &text, self.mask.clone());
            let session = opened.map_err(|fault| End::fault(Side::Api, fault))?;
            // It has not been anywhere before.
            let _ = session.move_to_websocket();
            let sent = to_caller.send(self.masked(&session, text)).await;
            sent.map_err(|error| End::failed(Side::Caller, &error))?;
            return Ok((session, true));
        }
    }

    /// Passes messages of the caller on. `is_here` becomes true when the session moves to this WebSocket.
    async fn up(
        &self,
        session: &Session,
        from_caller: &mut (impl Stream<Item = Result<Message, Error>> + Unpin),
        to_api: &mut (impl Sink<Message, Error = Error> + Unpin),
        own: mpsc::Sender<String>,
        is_here: &mut bool,
    ) -> End {
        while let Some(message) = from_caller.next().await {
            let passed = match message {
                Err(error) => return End::failed(Side::Caller, &error),
                Ok(Message::Close(frame)) => return End::closed(Side::Caller, frame),
                Ok(Message::Text(text)) => match self.check(session, &text, is_here) {
                    Ok(Some(changed)) => Message::text(changed),
                    Ok(None) => Message::Text(text),
                    Err(fault) => match refuse_connect(&text).filter(|_| fault == Fault::Namespace) {
                        Some(answer) => {
                            refuse(Side::Caller, fault);
                            // If it is closed, the other direction has ended too.
                            let _ = own.send(answer).await;
                            continue;
                        }
                        None => return End::fault(Side::Caller, fault),
                    },
                },
                Ok(Message::Binary(_)) if !*is_here => return End::fault(Side::Caller, Fault::Malformed),
                Ok(Message::Binary(data)) => match session.check_binary(Side::Caller) {
                    Ok(()) => Message::Binary(data),
                    Err(fault) => return End::fault(Side::Caller, fault),
                },
                // They are answered on each connection.
                Ok(_) => continue,
            };
            if let Err(error) = to_api.send(passed).await {
                return End::failed(Side::Api, &error);
            }
        }
        End::closed(Side::Caller, None)
    }

    /// Checks a text of the caller; returns what is sent in its place, if it is changed.
    fn check(&self, session: &Session, text: &str, is_here: &mut bool) -> Result<Option<String>, Fault> {
        // Until it has moved here, the session's messages come in bodies.
        if !*is_here && text.starts_with('4') {
            return Err(Fault::Malformed);
        }
        match session.check(Side::Caller, text)? {
            Packet::Connect(auth) => {
                if let Cow::Owned(changed) = self.voice.without_credentials(text, auth)? {
                    return Ok(Some(changed));
                }
            }
            Packet::Upgrade => {
                session.move_to_websocket()?;
                *is_here = true;
            }
            _ => {}
        }
        Ok(None)
    }

    /// Passes messages of the API on, and the proxy's own answers.
    async fn down(
        &self,
        session: &Session,
        from_api: &mut (impl Stream<Item = Result<Message, Error>> + Unpin),
        to_caller: &mut (impl Sink<Message, Error = Error> + Unpin),
        own_answers: &mut mpsc::Receiver<String>,
        bytes: &mut u64,
    ) -> End {
        loop {
            let message = tokio::select! {
                message = from_api.next() => message,
                Some(answer) = own_answers.recv() => {
                    if let Err(error) = to_caller.send(Message::text(answer)).await {
                        return End::failed(Side::Caller, &error);
                    }
                    continue;
                }
            };
            let passed = match message {
                None => return End::closed(Side::Api, None),
                Some(Err(error)) => return End::failed(Side::Api, &error),
                Some(Ok(Message::Close(frame))) => {
                    let masked_reason = |frame: CloseFrame| CloseFrame {
                        reason: masked(&[session.mask(), &self.mask], &frame.reason).into_owned().into(),
                        ..frame
                    };
                    return End::closed(Side::Api, frame.map(masked_reason));
                }
                Some(Ok(Message::Text(text))) => match session.check(Side::Api, &text) {
                    // A second one would be another session.
                    Ok(Packet::Open(_)) => return End::fault(Side::Api, Fault::Malformed),
                    Ok(_) => self.masked(session, text),
                    Err(fault) => return End::fault(Side::Api, fault),
                },
                Some(Ok(Message::Binary(data))) => match session.check_binary(Side::Api) {
                    Ok(()) => Message::Binary(data),
                    Err(fault) => return End::fault(Side::Api, fault),
                },
                Some(Ok(_)) => continue,
            };
            *bytes += passed.len() as u64;
            if let Err(error) = to_caller.send(passed).await {
                return End::failed(Side::Caller, &error);
            }
        }
    }

    fn masked(&self, session: &Session, text: Utf8Bytes) -> Message {
        let changed = match masked(&[session.mask(), &self.mask], &text) {
            Cow::Owned(masked) => Some(masked),
            Cow::Borrowed(_) => None,
        };
        changed.map_or(Message::Text(text), Message::text)
    }
}

type Socket = WebSocketStream<TokioIo<Upgraded>>;

async fn socket(upgraded: Upgraded, role: Role, limit: usize) -> Socket {
    let config = WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER)
        .write_buffer_size(0)
        .max_frame_size(Some(limit))
        .max_message_size(Some(limit));
    WebSocketStream::from_raw_socket(TokioIo::new(upgraded), role, Some(config)).await
}

/// Closes the connection to one side. What it still sends is discarded: a connection with unread bytes would be reset, and the
/// other side would not learn the reason.
async fn close(
    mut to: SplitSink<Socket, Message>,
    mut from: SplitStream<Socket>,
    frame: Option<CloseFrame>,
) -> io::Result<()> {
    // Fails if the other side began to close.
    let _ = to.send(Message::Close(frame)).await;
    let _ = to.close().await;
    while let Some(Ok(_)) = from.next().await {}
    let mut stream = to.reunite(from).map_err(io::Error::other)?.into_inner();
    stream.shutdown().await?;
    io::copy(&mut stream, &mut io::sink()).await?;
    Ok(())
}
