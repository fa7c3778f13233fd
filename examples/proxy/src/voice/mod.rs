//! The voice agent: Socket.IO from callers to the API, for the flag `--voice-agent`.
//!
//! Its clients send requests to `/socket.io/` on the API's origin: they poll, or switch to WebSocket, and name the namespace in
//! the packets. So the proxy reads the packets: those of other namespaces do not pass, in either direction, and a session is
//! its caller's alone.

mod packet;
mod relay;
mod sessions;

use std::{borrow::Cow, sync::Arc};

use axum::{
    body::{Body, Bytes},
    extract::Request,
    http::{
        HeaderMap, HeaderValue, Method, StatusCode, Uri,
        header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, EXPECT, SEC_WEBSOCKET_EXTENSIONS},
    },
    response::{IntoResponse, Response},
};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde_json::{Map, Value};
use tower_selam::inbound::EchoMask;
use url::form_urlencoded;

pub use self::relay::Relay;
use self::{
    packet::{Fault, Packet, SEPARATOR, Side},
    sessions::{InUse, Owner, Sessions},
};
use crate::{
    callers::{Callers, Identity},
    metrics,
    reply::Refusal,
};

/// The path of all requests.
pub const PATH: &str = "/socket.io/";

/// The query parameters in which clients send their credentials.
const CREDENTIALS: [&str; 2] = ["token", "api_key"];

/// The longest body or WebSocket message from a caller, and from the API. Socket.IO's servers accept a megabyte.
const MAX_FROM_CALLER: usize = 1024 * 1024;
const MAX_FROM_API: usize = 4 * 1024 * 1024;

/// Forwards the requests of the voice agent's clients. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Voice {
    sessions: Arc<Sessions>,
    callers: Callers,
}

/// A request of a client: how it wants to talk, and in which session.
#[derive(Debug)]
pub struct Call {
    pub is_websocket: bool,
    is_post: bool,
    caller: Owner,
    /// `None` for a handshake.
    session: Option<InUse>,
}

/// Whether a request with this path belongs to the voice agent.
pub fn is_path(path: &str) -> bool {
    path == PATH
}

/// Moves credentials from the query to `X-API-Key`, where [`Callers`] finds them and where they are removed.
pub fn move_credentials(request: &mut Request) {
    let is_credential = |parameter: &&str| {
        let mut parsed = form_urlencoded::parse(parameter.as_bytes());
        parsed.next().is_some_and(|(name, _)| CREDENTIALS.contains(&&*name))
    };
    let query = request.uri().query().unwrap_or_default().to_owned();
    let (found, kept): (Vec<&str>, Vec<&str>) = query.split('&').partition(is_credential);
    for (_, value) in found.iter().flat_map(|parameter| form_urlencoded::parse(parameter.as_bytes())) {
        if let Ok(value) = HeaderValue::from_bytes(value.as_bytes()) {
            // Left out if the caller already sent the maximum number of headers.
            let _ = request.headers_mut().try_append("x-api-key", value);
        }
    }
    let mut parts = request.uri().clone().into_parts();
    parts.path_and_query = format!("{}?{}", request.uri().path(), kept.join("&")).parse().ok();
    if !found.is_empty() {
        // What was a valid query without these parameters is one still.
        *request.uri_mut() = Uri::from_parts(parts).unwrap_or_default();
    }
}

impl Voice {
    pub fn new(callers: Callers) -> Self {
        Self { sessions: Sessions::new(), callers }
    }

    /// Reads what an admitted caller wants.
    ///
    /// # Errors
    ///
    /// It is not a request of Engine.IO 4, or its session is not open, another caller's, or on a WebSocket.
    pub fn call(&self, request: &Request, caller: &Identity, upgrades: bool) -> Result<Call, Refusal> {
        let caller = Owner::from(caller);
        let query = request.uri().query().unwrap_or_default();
        let mut parameters = [("EIO", None), ("transport", None), ("sid", None)];
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            let known = parameters.iter_mut().find(|(known, _)| *known == name);
            if known.is_some_and(|(_, slot)| slot.replace(value).is_some()) {
                return Err(Refusal::BadVoiceRequest);
            }
            // JSONP answers with a script.
            if name == "j" {
                return Err(Refusal::BadVoiceRequest);
            }
        }
        let [version, transport, id] = parameters.map(|(_, value)| value);
        let (is_websocket, is_post) = match (&*transport.unwrap_or_default(), request.method()) {
            ("polling", &Method::GET) if !upgrades => (false, false),
            ("polling", &Method::POST) if !upgrades && id.is_some() => (false, true),
            ("websocket", &Method::GET) if upgrades => (true, false),
            _ => return Err(Refusal::BadVoiceRequest),
        };
        // Some servers split at `;` as well.
        if version.as_deref() != Some("4") || query.contains(';') {
            return Err(Refusal::BadVoiceRequest);
        }
        let session = match id {
            None => None,
            Some(id) => Some(self.sessions.find(&id, &caller).ok_or(Refusal::UnknownSession)?),
        };
        if session.as_ref().is_some_and(|session| session.is_on_websocket()) {
            return Err(Refusal::BadVoiceRequest);
        }
        if session.is_none() {
            metrics::count_voice_handshake(if is_websocket { "websocket" } else { "polling" });
        }
        Ok(Call { is_websocket, is_post, caller, session })
    }

    /// Checks and buffers the body of a request, and prepares its headers.
    ///
    /// # Errors
    ///
    /// A packet may not pass, or the body is too long or incomplete.
    pub async fn prepare(&self, call: &Call, request: Request) -> Result<Request, Refusal> {
        let (mut parts, body) = request.into_parts();
        let is_encoded = parts.headers.contains_key(CONTENT_ENCODING);
        // Compressed packets could not be read. A body without `Content-Length` gets it when it is sent.
        for name in [ACCEPT_ENCODING, SEC_WEBSOCKET_EXTENSIONS, CONTENT_LENGTH, EXPECT] {
            parts.headers.remove(name);
        }
        let session = match &call.session {
            Some(session) if call.is_post => session,
            _ => return Ok(Request::from_parts(parts, Body::empty())),
        };
        if is_encoded {
            return Err(refuse(Side::Caller, Fault::Malformed));
        }
        let body = match collect(body, MAX_FROM_CALLER).await {
            Ok(body) => body,
            Err(Some(fault)) => return Err(refuse(Side::Caller, fault)),
            Err(None) => return Err(Refusal::BadRequest),
        };
        let checked = session.check_body(Side::Caller, &body, |packet, text| {
            match packet {
                Packet::Connect(auth) => return self.without_credentials(text, auth),
                Packet::Close => self.sessions.remove(session),
                _ => {}
            }
            Ok(Cow::Borrowed(text))
        });
        let checked = checked.map_err(|fault| refuse(Side::Caller, fault))?;
        Ok(Request::from_parts(parts, Body::from(checked)))
    }

    /// Checks, masks and buffers a response that is not a switch to WebSocket. Remembers a session that it opens.
    pub async fn finish(&self, call: Call, response: Response) -> Response {
        let (mut parts, body) = response.into_parts();
        let mask = parts.extensions.remove::<EchoMask>().unwrap_or_default();
        let body = match collect(body, MAX_FROM_API).await {
            // It could not be read.
            Ok(_) if parts.headers.contains_key(CONTENT_ENCODING) => Err(Fault::Malformed),
            Ok(body) if parts.status != StatusCode::OK || call.is_post => {
                Ok(mask.apply(&String::from_utf8_lossy(&body)).into_owned())
            }
            Ok(body) => self.finish_poll(call, &body, &mask),
            Err(Some(fault)) => Err(fault),
            Err(None) => return Refusal::NoUpstream.into_response(),
        };
        match body {
            Ok(body) => {
                parts.headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
                mask_headers(&mut parts.headers, &mask);
                Response::from_parts(parts, Body::from(body))
            }
            Err(fault) => {
                refuse(Side::Api, fault);
                Refusal::NoUpstream.into_response()
            }
        }
    }

    /// Checks and masks the packets with which the API answered a request that polls.
    fn finish_poll(&self, call: Call, body: &Bytes, mask: &EchoMask) -> Result<String, Fault> {
        let mut may_open = call.session.is_none();
        let session = match call.session {
            Some(session) => session,
            None => {
                let text = std::str::from_utf8(body).map_err(|_| Fault::Malformed)?;
                let first = text.split(SEPARATOR).next().unwrap_or_default();
                self.open(&call.caller, first, mask.clone())?
            }
        };
        session.check_body(Side::Api, body, |packet, text| {
            match packet {
                Packet::Open(_) if !std::mem::take(&mut may_open) => return Err(Fault::Malformed),
                Packet::Close => self.sessions.remove(&session),
                _ => {}
            }
            Ok(match packet {
                // Audio in Base64 is not text.
                Packet::Binary => Cow::Borrowed(text),
                _ => masked(&[session.mask(), mask], text),
            })
        })
    }

    /// Remembers the session that this packet of the API opens.
    fn open(&self, caller: &Owner, packet: &str, mask: EchoMask) -> Result<InUse, Fault> {
        match packet::parse(Side::Api, packet)? {
            Packet::Open(json) => self.sessions.open(caller, json, mask).ok_or(Fault::Malformed),
            _ => Err(Fault::Malformed),
        }
    }

    /// Prepares the relay of a WebSocket whose handshake the API accepted.
    ///
    /// # Errors
    ///
    /// The API chose an extension, so the messages could not be read.
    pub fn relay(&self, call: Call, answer: &mut Response) -> Result<Relay, Refusal> {
        if answer.headers().contains_key(SEC_WEBSOCKET_EXTENSIONS) {
            tracing::warn!("the API chose a WebSocket extension that was not offered");
            return Err(Refusal::NoUpstream);
        }
        let mask = answer.extensions_mut().remove::<EchoMask>().unwrap_or_default();
        mask_headers(answer.headers_mut(), &mask);
        Ok(Relay::new(self.clone(), call, mask))
    }

    /// Removes what authenticates the caller from the `auth` of a packet that enters the namespace.
    fn without_credentials<'a>(&self, text: &'a str, auth: &str) -> Result<Cow<'a, str>, Fault> {
        if auth.is_empty() {
            return Ok(Cow::Borrowed(text));
        }
        let mut auth: Map<String, Value> = serde_json::from_str(auth).map_err(|_| Fault::Malformed)?;
        let before = auth.len();
        auth.retain(|name, value| {
            let name = name.to_ascii_lowercase().replace(['-', '_'], "");
            let is_token = value.as_str().is_some_and(|value| self.callers.may_know(value.as_bytes()));
            !is_token && !matches!(&*name, "token" | "apikey" | "authorization")
        });
        Ok(match auth.len() == before {
            true => Cow::Borrowed(text),
            false => Cow::Owned(format!("40{},{}", packet::NAMESPACE, Value::Object(auth))),
        })
    }
}

/// Reads a body of at most `limit` bytes. Without a fault, it broke off.
async fn collect(body: Body, limit: usize) -> Result<Bytes, Option<Fault>> {
    match Limited::new(body, limit).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) => Err(error.is::<LengthLimitError>().then_some(Fault::TooLarge)),
    }
}

/// Counts and logs a packet that does not pass.
fn refuse(side: Side, fault: Fault) -> Refusal {
    metrics::count_voice_packet(side.name(), fault.name());
    tracing::warn!(from = side.name(), fault = fault.name(), "packet of the voice agent refused");
    match fault {
        Fault::Namespace => Refusal::OtherNamespace,
        Fault::TooLarge => Refusal::LargePacket,
        Fault::Malformed | Fault::Attachment => Refusal::BadPacket,
    }
}

/// Masks what any of these finds.
fn masked<'a>(masks: &[&EchoMask], text: &'a str) -> Cow<'a, str> {
    masks.iter().fold(Cow::Borrowed(text), |text, mask| {
        let masked = match mask.apply(&text) {
            Cow::Owned(masked) => Some(masked),
            Cow::Borrowed(_) => None,
        };
        masked.map_or(text, Cow::Owned)
    })
}

fn mask_headers(headers: &mut HeaderMap, mask: &EchoMask) {
    for value in headers.values_mut() {
        if let Ok(text) = value.to_str()
            && let Cow::Owned(masked) = mask.apply(text)
        {
            *value = HeaderValue::try_from(masked).unwrap_or(HeaderValue::from_static(""));
        }
    }
}

/// The names and reasons by which packets are counted, for metrics that begin with zero.
pub fn packet_faults() -> impl Iterator<Item = (&'static str, &'static str)> {
    let sides = [Side::Caller, Side::Api].into_iter();
    sides.flat_map(|side| Fault::ALL.map(|fault| (side.name(), fault.name())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::browsers::Origins;

    fn request(method: Method, uri: &str) -> Request {
        Request::builder().method(method).uri(uri).body(Body::empty()).unwrap()
    }

    #[test]
    fn credentials_move_from_the_query() {
        for (query, kept, moved) in [
            ("EIO=4&voice=a%20b", "EIO=4&voice=a%20b", &[][..]),
            ("EIO=4&token=a&api_key=b%2Bc&x", "EIO=4&x", &["a", "b+c"]),
            ("%74oken=a&token=&tokens=1", "tokens=1", &["a", ""]),
            ("token=%0A&x=1", "x=1", &[]),
        ] {
            let mut request = request(Method::GET, &format!("/socket.io/?{query}"));
            move_credentials(&mut request);
            assert_eq!(request.uri().query(), Some(kept));
            assert_eq!(request.headers().get_all("x-api-key").iter().collect::<Vec<_>>(), moved);
        }
    }

    #[tokio::test]
    async fn only_requests_of_engine_io_are_calls() {
        let voice = Voice::new(Callers::new(None, None, Origins::default()).unwrap());
        let web = Identity { name: "web".into(), user: None };
        for (method, query, upgrades) in [
            (Method::GET, "EIO=4&transport=polling&voice=x&t=abc", false),
            (Method::GET, "EIO=4&transport=websocket", true),
        ] {
            let request = request(method, &format!("/socket.io/?{query}"));
            assert!(voice.call(&request, &web, upgrades).is_ok(), "{query}");
        }
        for (method, query, upgrades) in [
            (Method::GET, "", false),
            (Method::GET, "EIO=3&transport=polling", false),
            (Method::GET, "EIO=4&EIO=4&transport=polling", false),
            (Method::GET, "EIO=4&transport=polling&%74ransport=websocket", false),
            (Method::GET, "EIO=4&transport=polling&j=0", false),
            (Method::GET, "EIO=4&transport=polling&x=1;sid=2", false),
            (Method::GET, "EIO=4&transport=polling", true),
            (Method::GET, "EIO=4&transport=websocket", false),
            (Method::GET, "EIO=4&transport=webtransport", false),
            (Method::POST, "EIO=4&transport=polling", false),
            (Method::PUT, "EIO=4&transport=polling&sid=a", false),
            (Method::HEAD, "EIO=4&transport=polling", false),
        ] {
            let request = request(method, &format!("/socket.io/?{query}"));
            assert_eq!(
                voice.call(&request, &web, upgrades).unwrap_err(),
                Refusal::BadVoiceRequest,
                "{query}"
            );
        }
        for method in [Method::GET, Method::POST] {
            let request = request(method, "/socket.io/?EIO=4&transport=polling&sid=a");
            assert_eq!(voice.call(&request, &web, false).unwrap_err(), Refusal::UnknownSession);
        }
    }

    #[tokio::test]
    async fn callers_credentials_leave_the_auth() {
        let voice = Voice::new(Callers::new(None, None, Origins::default()).unwrap());
        for (auth, expected) in [
            ("", "40/v1/audio/agent,"),
            (r#"{"voice":"x"}"#, r#"40/v1/audio/agent,{"voice":"x"}"#),
            (r#"{"token":"a","voice":"x","api_key":"b","apiKey":"c"}"#, r#"40/v1/audio/agent,{"voice":"x"}"#),
            (r#"{"token":{"a":1}}"#, "40/v1/audio/agent,{}"),
        ] {
            let text = format!("40/v1/audio/agent,{auth}");
            assert_eq!(voice.without_credentials(&text, auth).unwrap(), expected);
        }
        for auth in ["x", "1", "[]", "\"token\"", "{"] {
            assert_eq!(voice.without_credentials("", auth).unwrap_err(), Fault::Malformed, "{auth}");
        }
    }
}
