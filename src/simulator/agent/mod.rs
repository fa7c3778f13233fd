//! The voice agent: [Engine.IO 4](https://socket.io/docs/v4/engine-io-protocol/) requests, and their sessions.

mod session;
#[cfg(feature = "test-server")]
mod socket;

use std::{collections::HashMap, sync::Arc, time::Duration};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use http::{Method, StatusCode, header::SEC_WEBSOCKET_KEY};
use serde_json::json;

use self::session::Packet;
pub(super) use self::session::Session;
#[cfg(feature = "test-server")]
pub(super) use self::socket::serve;
use super::{
    Access, Received, SimulatorBody, State,
    api::{Answer, check},
    random_hex, refusal,
    refusal::Refusal,
    replies,
};

pub(super) const PATH: &str = "/socket.io/";

/// The one namespace.
const NAMESPACE: &str = "/v1/audio/agent";

/// The longest message, announced when a session opens. That of Socket.IO's server.
const MAX_PAYLOAD: usize = 1_000_000;

/// Separates the packets of a request or response body.
const SEPARATOR: char = '\x1e';

/// The sessions of the voice agent.
#[derive(Default)]
pub(super) struct Agent {
    sessions: HashMap<String, Arc<Session>>,
    pub(super) pings: Pings,
    /// Bad credentials are refused in the namespace only.
    pub(super) refuses_in_namespace: bool,
}

/// How often clients are pinged, and how long they may take to answer.
#[derive(Clone, Copy)]
pub(super) struct Pings {
    pub(super) interval: Duration,
    pub(super) timeout: Duration,
}

/// The defaults of Socket.IO's server.
impl Default for Pings {
    fn default() -> Self {
        Self { interval: Duration::from_secs(25), timeout: Duration::from_secs(20) }
    }
}

/// The credentials in the query of a handshake.
#[derive(Default)]
struct QueryCredentials {
    jwt: Option<String>,
    key: Option<String>,
}

impl QueryCredentials {
    fn of(request: &Received) -> Self {
        Self { jwt: param(request, "token"), key: param(request, "api_key") }
    }

    fn check(&self, state: &State) -> Result<(), Refusal> {
        let (Some(jwt), Some(key)) = (&self.jwt, &self.key) else {
            return Err(refusal::MISSING_API_KEY);
        };
        match check(state, Some(jwt), key)?.access {
            Access::Full => Ok(()),
            Access::Limited => Err(refusal::INSUFFICIENT_PERMISSIONS),
        }
    }
}

/// How a request is answered.
pub(super) enum Routed {
    Now(Answer),
    /// With the next packets of this session.
    Poll(Arc<Session>),
}

/// Answers a request to [`PATH`].
pub(super) fn route(state: &mut State, request: &Received, body: &[u8]) -> Result<Routed, Refusal> {
    let transport = param(request, "transport").unwrap_or_default();
    let is_polling = match &*transport {
        "polling" => true,
        "websocket" => false,
        _ => return Err(refusal::UNKNOWN_TRANSPORT),
    };
    if param(request, "EIO").as_deref() != Some("4") {
        return Err(refusal::UNSUPPORTED_PROTOCOL);
    }
    let Some(sid) = param(request, "sid") else { return open(state, request, is_polling) };
    state.agent.sessions.retain(|_, session| !session.is_over());
    let session = state.agent.sessions.get(&sid).cloned().ok_or(refusal::UNKNOWN_SESSION)?;
    match (&request.method, is_polling) {
        (&Method::GET, true) if session.begin_poll() => Ok(Routed::Poll(session)),
        (&Method::POST, true) if session.is_polling() && request.body_length <= MAX_PAYLOAD as u64 => {
            let packets = std::str::from_utf8(body).unwrap_or_default().split(SEPARATOR);
            for packet in packets {
                session.receive(state, decode(packet).ok_or(refusal::BAD_REQUEST)?);
            }
            Ok(Routed::Now(text("ok")))
        }
        (&Method::GET, false) if session.is_polling() => switch(request, session),
        _ => Err(refusal::BAD_REQUEST),
    }
}

fn open(state: &mut State, request: &Received, is_polling: bool) -> Result<Routed, Refusal> {
    if request.method != Method::GET {
        return Err(refusal::BAD_HANDSHAKE_METHOD);
    }
    let credentials = QueryCredentials::of(request);
    if !state.agent.refuses_in_namespace {
        credentials.check(state)?;
    }
    let Agent { sessions, pings, .. } = &mut state.agent;
    let sid = random_hex();
    let upgrades: &[&str] = if is_polling { &["websocket"] } else { &[] };
    let open = json!({
        "sid": sid,
        "upgrades": upgrades,
        "pingInterval": pings.interval.as_millis() as u64,
        "pingTimeout": pings.timeout.as_millis() as u64,
        "maxPayload": MAX_PAYLOAD,
    });
    let session = Arc::new(Session::new(*pings, credentials, is_polling));
    let routed = if is_polling {
        Routed::Now(text(format!("0{open}")))
    } else {
        session.send(Packet::Text(format!("0{open}")));
        switch(request, Arc::clone(&session))?
    };
    sessions.insert(sid, session);
    Ok(routed)
}

/// Accepts a WebSocket handshake. The session in the extensions of the answer tells the server what to do with the connection.
fn switch(request: &Received, session: Arc<Session>) -> Result<Routed, Refusal> {
    let nonce = request.headers.get(SEC_WEBSOCKET_KEY).ok_or(refusal::NO_WEBSOCKET)?;
    let mut answer = replies::switch_to_websocket(nonce);
    answer.extensions_mut().insert(session);
    Ok(Routed::Now(answer))
}

/// Waits for packets of `session`, and answers with them.
pub(super) async fn poll(session: &Session) -> Answer {
    let packets = session.poll().await;
    let packets: Vec<String> = packets.into_iter().map(encode).collect();
    text(packets.join(&SEPARATOR.to_string()))
}

fn text(body: impl Into<String>) -> Answer {
    replies::answered(StatusCode::OK, "text/plain; charset=UTF-8", SimulatorBody::whole(body.into()))
}

fn encode(packet: Packet) -> String {
    match packet {
        Packet::Text(text) => text,
        Packet::Binary(data) => format!("b{}", BASE64_STANDARD.encode(data)),
    }
}

fn decode(packet: &str) -> Option<Packet> {
    match packet.strip_prefix('b') {
        Some(data) => BASE64_STANDARD.decode(data).ok().map(|data| Packet::Binary(data.into())),
        None => Some(Packet::Text(packet.to_owned())),
    }
}

/// Returns the value of a query parameter that occurs exactly once.
fn param(request: &Received, name: &str) -> Option<String> {
    let params = form_urlencoded::parse(request.uri.query()?.as_bytes());
    let mut values = params.filter(|(found, _)| found == name).map(|(_, value)| value);
    let value = values.next()?.into_owned();
    values.next().is_none().then_some(value)
}
