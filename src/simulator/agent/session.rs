//! A session: its packets, its pings, and [Socket.IO 5](https://socket.io/docs/v4/socket-io-protocol/) inside.

use std::{
    collections::VecDeque,
    mem,
    sync::{Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::{
    sync::Notify,
    time::{self, Instant},
};

use super::{NAMESPACE, Pings, QueryCredentials};
use crate::simulator::{State, random_hex};

/// A packet of Engine.IO. A binary one is an attachment of a Socket.IO packet.
#[derive(Clone, Debug)]
pub(super) enum Packet {
    Text(String),
    Binary(Bytes),
}

/// One client's session. It survives the change from polling to WebSocket.
pub(in crate::simulator) struct Session {
    pings: Pings,
    credentials: QueryCredentials,
    inner: Mutex<Inner>,
    /// Wakes the one who sends packets to the client.
    changed: Notify,
}

struct Inner {
    transport: Transport,
    outgoing: VecDeque<Packet>,
    /// The client is in the namespace.
    is_connected: bool,
    /// An event whose attachments are still arriving.
    incomplete: Option<(Message, Vec<Bytes>)>,
    next_ping: Instant,
    /// When a packet last arrived.
    heard: Instant,
    is_closed: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Transport {
    Polling {
        /// A request waits for packets.
        is_waiting: bool,
    },
    WebSocket,
}

impl Session {
    pub(super) fn new(pings: Pings, credentials: QueryCredentials, is_polling: bool) -> Self {
        let now = Instant::now();
        let inner = Inner {
            transport: if is_polling {
                Transport::Polling { is_waiting: false }
            } else {
                Transport::WebSocket
            },
            outgoing: VecDeque::new(),
            is_connected: false,
            incomplete: None,
            next_ping: now + pings.interval,
            heard: now,
            is_closed: false,
        };
        Self { pings, credentials, inner: Mutex::new(inner), changed: Notify::new() }
    }

    pub(super) fn is_polling(&self) -> bool {
        self.inner().transport != Transport::WebSocket
    }

    /// Whether the client has closed the session, or has not answered a ping in time.
    pub(super) fn is_over(&self) -> bool {
        let inner = self.inner();
        inner.is_closed || Instant::now() >= inner.heard + self.pings.interval + self.pings.timeout
    }

    pub(super) fn send(&self, packet: Packet) {
        self.inner().outgoing.push_back(packet);
        self.changed.notify_one();
    }

    #[cfg(feature = "test-server")]
    pub(super) fn close(&self) {
        self.inner().is_closed = true;
        self.changed.notify_one();
    }

    /// Marks that a request waits for packets; false if another one does, or the transport is WebSocket.
    pub(super) fn begin_poll(&self) -> bool {
        let transport = &mut self.inner().transport;
        let may_begin = *transport == Transport::Polling { is_waiting: false };
        if may_begin {
            *transport = Transport::Polling { is_waiting: true };
        }
        may_begin
    }

    /// Waits for the packets that answer the request which has [begun](Self::begin_poll) to poll.
    pub(super) async fn poll(&self) -> Vec<Packet> {
        /// Takes the mark back, also if the client does not wait for the answer.
        struct Waiting<'a>(&'a Session);

        impl Drop for Waiting<'_> {
            fn drop(&mut self) {
                if let Transport::Polling { is_waiting } = &mut self.0.inner().transport {
                    *is_waiting = false;
                }
            }
        }

        let _waiting = Waiting(self);
        let packets = self.next().await;
        if packets.is_empty() { vec![Packet::Text("1".to_owned())] } else { packets }
    }

    /// Answers a waiting request, so that the client can change to WebSocket.
    #[cfg(feature = "test-server")]
    pub(super) fn release_poll(&self) {
        if self.inner().transport == (Transport::Polling { is_waiting: true }) {
            self.send(Packet::Text("6".to_owned()));
        }
    }

    #[cfg(feature = "test-server")]
    pub(super) fn upgrade(&self) {
        self.inner().transport = Transport::WebSocket;
    }

    /// Waits for packets to the client. Returns none when the session is over.
    pub(super) async fn next(&self) -> Vec<Packet> {
        loop {
            let wake_at = {
                let mut inner = self.inner();
                if Instant::now() >= inner.next_ping {
                    inner.next_ping = Instant::now() + self.pings.interval;
                    inner.outgoing.push_back(Packet::Text("2".to_owned()));
                }
                if !inner.outgoing.is_empty() {
                    return mem::take(&mut inner.outgoing).into();
                }
                inner.next_ping.min(inner.heard + self.pings.interval + self.pings.timeout)
            };
            if self.is_over() {
                return Vec::new();
            }
            let _ = time::timeout_at(wake_at, self.changed.notified()).await;
        }
    }

    /// Handles a packet of the client. One that is not valid ends the session.
    pub(super) fn receive(&self, state: &State, packet: Packet) {
        let mut inner = self.inner();
        inner.heard = Instant::now();
        if self.handle(state, &mut inner, packet).is_none() {
            inner.is_closed = true;
        }
        drop(inner);
        self.changed.notify_one();
    }

    fn handle(&self, state: &State, inner: &mut Inner, packet: Packet) -> Option<()> {
        let text = match packet {
            Packet::Binary(data) => return inner.attach(data),
            Packet::Text(text) => text,
        };
        match text.split_at_checked(1)? {
            ("3", _) => Some(()),
            ("4", message) if inner.incomplete.is_none() => {
                let message = Message::parse(message)?;
                match message.kind {
                    '0' => self.connect(state, inner, &message),
                    _ if message.namespace != NAMESPACE || !inner.is_connected => return None,
                    '1' => inner.is_connected = false,
                    '2' | '3' | '5' | '6' => inner.take(message, Vec::new())?,
                    _ => return None,
                }
                Some(())
            }
            _ => None,
        }
    }

    /// Lets the client into the namespace, or refuses it with a connect error.
    fn connect(&self, state: &State, inner: &mut Inner, message: &Message) {
        let checked = match &*message.namespace {
            NAMESPACE => self.credentials.check(state).map_err(|refusal| refusal.connect_error()),
            _ => Err(json!({ "message": "Invalid namespace" })),
        };
        inner.is_connected |= checked.is_ok();
        let (kind, data) = match checked {
            Ok(()) => ('0', json!({ "sid": random_hex() })),
            Err(error) => ('4', error),
        };
        let answer =
            Message { kind, namespace: message.namespace.clone(), data: Some(data), ..Message::default() };
        inner.push(&answer, &[]);
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Adds an attachment to the event that waits for it.
    fn attach(&mut self, data: Bytes) -> Option<()> {
        let (message, mut attachments) = self.incomplete.take()?;
        attachments.push(data);
        self.take(message, attachments)
    }

    /// Echoes an event once it is complete, and acknowledges it with its arguments if the client asked for that.
    fn take(&mut self, message: Message, attachments: Vec<Bytes>) -> Option<()> {
        if attachments.len() < message.attachments {
            self.incomplete = Some((message, attachments));
            return Some(());
        }
        // Nothing is sent that a client could acknowledge.
        let ack = match message.kind {
            '2' => '3',
            '5' => '6',
            _ => return Some(()),
        };
        let Message { id, data: Some(Value::Array(mut arguments)), .. } = message else { return None };
        let echo = Message { id: None, data: Some(Value::Array(arguments.clone())), ..message };
        self.push(&echo, &attachments);
        if id.is_some() && !arguments.is_empty() {
            arguments.remove(0);
            let data = Some(Value::Array(arguments));
            self.push(&Message { kind: ack, id, data, ..echo }, &attachments);
        }
        Some(())
    }

    fn push(&mut self, message: &Message, attachments: &[Bytes]) {
        self.outgoing.push_back(Packet::Text(format!("4{}", message.encode())));
        self.outgoing.extend(attachments.iter().cloned().map(Packet::Binary));
    }
}

/// A packet of Socket.IO.
#[derive(Debug, Default)]
struct Message {
    kind: char,
    /// How many binary packets follow.
    attachments: usize,
    namespace: String,
    /// The acknowledgement's.
    id: Option<u64>,
    data: Option<Value>,
}

impl Message {
    fn parse(text: &str) -> Option<Self> {
        let kind = text.chars().next().filter(char::is_ascii_digit)?;
        let mut rest = &text[1..];
        let mut attachments = 0;
        if matches!(kind, '5' | '6') {
            let (count, after) = rest.split_once('-')?;
            (attachments, rest) = (count.parse().ok()?, after);
        }
        let mut namespace = "/";
        if rest.starts_with('/') {
            (namespace, rest) = rest.split_once(',').unwrap_or((rest, ""));
        }
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (id, data) = rest.split_at(digits);
        let id = if id.is_empty() { None } else { Some(id.parse().ok()?) };
        let data = if data.is_empty() { None } else { Some(serde_json::from_str(data).ok()?) };
        Some(Self { kind, attachments, namespace: namespace.to_owned(), id, data })
    }

    fn encode(&self) -> String {
        let mut text = self.kind.to_string();
        if matches!(self.kind, '5' | '6') {
            text.push_str(&format!("{}-", self.attachments));
        }
        if self.namespace != "/" {
            text.push_str(&format!("{},", self.namespace));
        }
        text.extend(self.id.map(|id| id.to_string()));
        text.extend(self.data.as_ref().map(Value::to_string));
        text
    }
}
