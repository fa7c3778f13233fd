//! [`WebSocketProtocols`]: tells tokens from subprotocols in a WebSocket handshake.

use std::borrow::Cow;

use base64::{
    Engine, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use http::{HeaderMap, HeaderValue, header::SEC_WEBSOCKET_PROTOCOL};
use percent_encoding::percent_decode;
use zeroize::Zeroizing;

/// What a subprotocol that carries a token begins with, up to the dot in front of the token; or a subprotocol whose
/// successor is the token.
const CARRIERS: [&str; 15] = [
    "openai-insecure-api-key",
    "bearer",
    "base64url",
    "base64",
    "authorization",
    "auth",
    "auth-token",
    "access-token",
    "id-token",
    "token",
    "jwt",
    "api-key",
    "apikey",
    "x-api-key",
    "x-auth-token",
];

/// A part of carriers that contains dots.
const KUBERNETES: &[u8] = b"authorization.k8s.io.";

/// An entry with more pieces than this is removed rather than searched for a token.
const MAX_PIECES: usize = 16;

const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::URL_SAFE,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

/// The subprotocols that a WebSocket handshake offers in `Sec-WebSocket-Protocol`, and the tokens among them.
///
/// Browsers cannot set headers on a WebSocket, so web pages put their token into the list of subprotocols. A proxy takes it
/// out, authenticates the caller with it, and forwards the other subprotocols:
///
/// | Entry | Token |
/// |---|---|
/// | `openai-insecure-api-key.TOKEN`, `bearer.TOKEN`, `access_token.TOKEN`, `jwt.TOKEN` and others | what follows the dot |
/// | `base64url.bearer.TOKEN`, `base64url.bearer.authorization.k8s.io.TOKEN` | the same, decoded |
/// | `bearer, TOKEN`, `access_token, TOKEN`, `Authorization, TOKEN` and others | the next entry |
/// | a JWT, or a key that starts with `sk-` | the entry |
///
/// [`StripCredentialsLayer`](super::StripCredentialsLayer) removes these by itself. A server that knows its callers' tokens
/// also removes, with [`remove_if`](Self::remove_if), entries that contain one in any other way.
///
/// ```
/// use http::{HeaderMap, HeaderValue};
/// use tower_selam::inbound::WebSocketProtocols;
///
/// let mut headers = HeaderMap::new();
/// let offered = HeaderValue::from_static("realtime, openai-insecure-api-key.s3cr3t");
/// headers.insert("sec-websocket-protocol", offered);
///
/// let protocols = WebSocketProtocols::from_headers(&headers);
/// assert!(protocols.tokens().any(|token| token == b"s3cr3t"));
/// protocols.write(&mut headers);
/// assert_eq!(headers["sec-websocket-protocol"], "realtime");
///
/// // The answer must name a subprotocol that was offered, or none: RFC 6455 section 4.1.
/// let mut answer = HeaderMap::new();
/// assert!(protocols.accepts(&answer));
/// answer.insert("sec-websocket-protocol", HeaderValue::from_static("chat"));
/// assert!(!protocols.accepts(&answer));
///
/// // The upstream chose none, but a browser would close the WebSocket.
/// let mut answer = HeaderMap::new();
/// protocols.choose(&mut answer);
/// assert_eq!(answer["sec-websocket-protocol"], "realtime");
/// ```
#[derive(Clone, Default)]
pub struct WebSocketProtocols {
    offered: Vec<Zeroizing<Vec<u8>>>,
    /// Each token in all its decodings.
    tokens: Vec<Zeroizing<Vec<u8>>>,
    /// The entry in front of a token: `bearer` in `bearer, TOKEN`.
    carrier: Option<Zeroizing<Vec<u8>>>,
    has_removed: bool,
}

opaque_debug!(WebSocketProtocols);

impl WebSocketProtocols {
    /// Reads the headers of a handshake. Without `Sec-WebSocket-Protocol`, nothing is offered.
    #[must_use]
    pub fn from_headers(headers: &HeaderMap) -> Self {
        let mut protocols = Self::default();
        let mut is_next = false;
        for entry in entries(headers) {
            if let Some(tokens) = tokens_in(entry) {
                is_next = tokens.is_empty();
                if is_next {
                    protocols.carrier.get_or_insert_with(|| Zeroizing::new(entry.to_vec()));
                }
                protocols.has_removed = true;
                protocols.tokens.extend(tokens.into_iter().flat_map(decodings));
            } else if std::mem::take(&mut is_next) || is_bare_token(entry) {
                protocols.has_removed = true;
                protocols.tokens.extend(decodings(entry));
            } else {
                protocols.offered.push(Zeroizing::new(entry.to_vec()));
            }
        }
        protocols
    }

    /// The tokens, each as it was sent and in every decoding that makes sense. At most one of them is valid.
    pub fn tokens(&self) -> impl Iterator<Item = &[u8]> {
        self.tokens.iter().map(|token| token.as_slice()).filter(|token| !token.is_empty())
    }

    /// The subprotocols without those that carry a token, in the order in which they were offered.
    pub fn offered(&self) -> impl Iterator<Item = &[u8]> {
        self.offered.iter().map(|protocol| protocol.as_slice())
    }

    /// Removes the subprotocols that contain a token: any part between punctuation, as it is or decoded, for which `is_token`
    /// returns true. Subprotocols with more than sixteen such parts are removed as well.
    pub fn remove_if(&mut self, mut is_token: impl FnMut(&[u8]) -> bool) {
        let offered = self.offered.len();
        self.offered.retain(|protocol| !contains(protocol, &mut is_token));
        self.has_removed |= self.offered.len() < offered;
        self.carrier.take_if(|carrier| contains(carrier, &mut is_token));
    }

    /// Replaces the subprotocols in `headers` by those that are left.
    pub fn write(&self, headers: &mut HeaderMap) {
        let offered: Vec<&[u8]> = self.offered().collect();
        match HeaderValue::from_bytes(&offered.join(&b", "[..])) {
            Ok(value) if !offered.is_empty() => drop(headers.insert(SEC_WEBSOCKET_PROTOCOL, value)),
            _ => drop(headers.remove(SEC_WEBSOCKET_PROTOCOL)),
        }
    }

    /// Whether the answer to the handshake chose a subprotocol that was offered, or none.
    #[must_use]
    pub fn accepts(&self, answer: &HeaderMap) -> bool {
        let mut chosen = answer.get_all(SEC_WEBSOCKET_PROTOCOL).iter();
        match (chosen.next(), chosen.next()) {
            (None, _) => true,
            (Some(chosen), None) => self.offered().any(|offered| offered == chosen.as_bytes()),
            (Some(_), Some(_)) => false,
        }
    }

    /// Chooses a subprotocol in an answer that chose none, if a token was among those offered: the first that carries no token,
    /// or else the name in front of the token, as in `bearer, TOKEN`.
    ///
    /// A page that sends its token in this way has to offer a subprotocol, and a browser closes the WebSocket if none of them is
    /// chosen ([WebSockets section 2](https://websockets.spec.whatwg.org/#concept-websocket-establish)). The upstream, which does
    /// not see the token, may have had nothing to choose from. If the only entry is one such as `bearer.TOKEN`, nothing is
    /// chosen, since the answer would repeat the token. Where no token was offered, the upstream's answer stands.
    pub fn choose(&self, answer: &mut HeaderMap) {
        if self.has_removed
            && !answer.contains_key(SEC_WEBSOCKET_PROTOCOL)
            && let Some(chosen) =
                self.offered().next().or(self.carrier.as_ref().map(|carrier| carrier.as_slice()))
            && let Ok(chosen) = HeaderValue::from_bytes(chosen)
        {
            answer.insert(SEC_WEBSOCKET_PROTOCOL, chosen);
        }
    }
}

/// Removes the entries that carry a token.
pub(super) fn strip(headers: &mut HeaderMap) {
    if headers.contains_key(SEC_WEBSOCKET_PROTOCOL) {
        let protocols = WebSocketProtocols::from_headers(headers);
        if protocols.has_removed {
            protocols.write(headers);
        }
    }
}

fn entries(headers: &HeaderMap) -> impl Iterator<Item = &[u8]> {
    let values = headers.get_all(SEC_WEBSOCKET_PROTOCOL).into_iter();
    let entries = values.flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
    entries.map(<[u8]>::trim_ascii).filter(|entry| !entry.is_empty())
}

/// What follows the names of carriers, after each of them: the token, unless it begins like a carrier itself. `None` if the
/// entry does not begin with a carrier.
fn tokens_in(entry: &[u8]) -> Option<Vec<&[u8]>> {
    let mut tokens = None;
    let mut rest = entry;
    loop {
        let at = rest.iter().position(|byte| matches!(byte, b'.' | b':' | b'=' | b'|' | b' '));
        let (name, after) = at.map_or((rest, &b""[..]), |at| (&rest[..at], &rest[at + 1..]));
        if !is_carrier(name) {
            return tokens;
        }
        let tokens = tokens.get_or_insert_with(Vec::new);
        if after.is_empty() {
            return Some(std::mem::take(tokens));
        }
        rest = after.strip_prefix(KUBERNETES).unwrap_or(after);
        tokens.push(rest);
    }
}

fn is_carrier(name: &[u8]) -> bool {
    let fold = |byte: &u8| if *byte == b'_' { b'-' } else { byte.to_ascii_lowercase() };
    CARRIERS.iter().any(|carrier| name.iter().map(fold).eq(carrier.bytes()))
        || name.len() > 8 && name[name.len() - 8..].iter().map(fold).eq(*b"-api-key")
}

fn is_bare_token(entry: &[u8]) -> bool {
    let is_jwt = entry.starts_with(b"eyJ") && entry.iter().filter(|byte| **byte == b'.').count() >= 2;
    is_jwt || entry.starts_with(b"sk-")
}

/// The value itself, and without percent-encoding or base64.
fn decodings(value: &[u8]) -> impl Iterator<Item = Zeroizing<Vec<u8>>> {
    let percent = match Cow::from(percent_decode(value)) {
        Cow::Owned(decoded) => Some(decoded),
        Cow::Borrowed(_) => None,
    };
    let url_safe: Zeroizing<Vec<u8>> = Zeroizing::new(
        value
            .iter()
            .map(|byte| match byte {
                b'+' => b'-',
                b'/' => b'_',
                byte => *byte,
            })
            .collect(),
    );
    let base64 = BASE64.decode(url_safe.trim_ascii_end()).ok();
    [Some(value.to_vec()), percent, base64].into_iter().flatten().map(Zeroizing::new)
}

fn contains(protocol: &[u8], is_token: &mut impl FnMut(&[u8]) -> bool) -> bool {
    let is_separator = |byte: &u8| !byte.is_ascii_alphanumeric() && *byte != b'%';
    let mut starts = vec![0];
    let mut ends = Vec::new();
    for (at, _) in protocol.iter().enumerate().filter(|(_, byte)| is_separator(byte)) {
        ends.push(at);
        starts.push(at + 1);
    }
    ends.push(protocol.len());
    if starts.len() > MAX_PIECES {
        return true;
    }
    // Tokens may contain separators, so all runs of pieces count.
    let runs = starts.iter().flat_map(|start| ends.iter().map(move |end| (*start, *end)));
    runs.filter(|(start, end)| start < end)
        .flat_map(|(start, end)| decodings(&protocol[start..end]))
        .any(|candidate| is_token(&candidate))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn protocols(values: &[&str]) -> WebSocketProtocols {
        let headers = values
            .iter()
            .map(|value| (SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_bytes(value.as_bytes()).unwrap()));
        WebSocketProtocols::from_headers(&headers.collect())
    }

    #[test]
    fn tokens_are_told_from_protocols() {
        for (entry, left) in [
            ("openai-insecure-api-key.s3cr3t", ""),
            ("OpenAI-Insecure-API-Key.s3cr3t", ""),
            (
                "realtime, openai-insecure-api-key.s3cr3t, openai-beta.realtime-v1",
                "realtime, openai-beta.realtime-v1",
            ),
            ("bearer.s3cr3t", ""),
            ("Bearer.s3cr3t,chat", "chat"),
            ("bearer s3cr3t", ""),
            ("bearer.s3%63r3t", ""),
            ("authorization.bearer.s3cr3t", ""),
            ("base64url.bearer.czNjcjN0", ""),
            ("base64url.bearer.authorization.k8s.io.czNjcjN0, v4.channel.k8s.io", "v4.channel.k8s.io"),
            ("base64.czNjcjN0", ""),
            ("access_token.s3cr3t", ""),
            ("access_token, s3cr3t, chat", "chat"),
            ("chat, Authorization, s3cr3t", "chat"),
            ("bearer, s3cr3t", ""),
            ("token=s3cr3t", ""),
            ("jwt:s3cr3t", ""),
            ("my-api-key.s3cr3t", ""),
            ("bearer.wrong, bearer.s3cr3t", ""),
        ] {
            let protocols = protocols(&[entry]);
            assert!(protocols.tokens().any(|token| token == b"s3cr3t"), "{entry}");
            let mut headers = HeaderMap::new();
            protocols.write(&mut headers);
            let written = headers.get(SEC_WEBSOCKET_PROTOCOL).map_or("", |value| value.to_str().unwrap());
            assert_eq!(written, left, "{entry}");
        }
        for entry in ["chat", "bearer-like", "tokens.x", "v4.base64.channel.k8s.io", "graphql-transport-ws"] {
            let protocols = protocols(&[entry]);
            assert_eq!(protocols.tokens().count(), 0, "{entry}");
            assert_eq!(protocols.offered().collect::<Vec<_>>(), [entry.as_bytes()]);
        }
        for entry in ["eyJhbGciOiJub25lIn0.e30.sig", "sk-selam-1"] {
            assert_eq!(protocols(&[entry]).offered().count(), 0, "{entry}");
        }
        assert!(!format!("{:?}", protocols(&["bearer.s3cr3t, x"])).contains("s3cr3t"));
    }

    #[test]
    fn the_answer_must_have_been_offered() {
        let protocols = protocols(&["a, bearer.s3cr3t", "b"]);
        for (answer, accepted) in [
            (&[][..], true),
            (&["a"], true),
            (&["b"], true),
            (&["A"], false),
            (&["c"], false),
            (&["a, b"], false),
            (&["a", "b"], false),
            (&["bearer.s3cr3t"], false),
            (&[""], false),
        ] {
            let answer = answer.iter().map(|value| (SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(value)));
            let answer = answer.collect();
            assert_eq!(protocols.accepts(&answer), accepted, "{answer:?}");
        }
    }

    #[test]
    fn an_answer_without_a_choice_gets_one() {
        for (entries, expected) in [
            (&["realtime, openai-insecure-api-key.s3cr3t, openai-beta.realtime-v1"][..], "realtime"),
            (&["openai-insecure-api-key.s3cr3t, realtime"], "realtime"),
            (&["bearer.s3cr3t", "chat"], "chat"),
            (&["Bearer, s3cr3t"], "Bearer"),
            (&["bearer, s3cr3t, chat"], "chat"),
            (&["x-s3cr3t-y, chat"], "chat"),
            (&["s3cr3t, chat"], "chat"),
            (&["bearer.s3cr3t"], ""),
            (&["s3cr3t"], ""),
            (&["eyJ.e30.s3cr3t"], ""),
            // The API's to answer: no token was offered.
            (&["chat"], ""),
            (&[], ""),
        ] {
            let mut protocols = protocols(entries);
            protocols.remove_if(|candidate| candidate == b"s3cr3t");
            let mut answer = HeaderMap::new();
            protocols.choose(&mut answer);
            let chosen = answer.get(SEC_WEBSOCKET_PROTOCOL).map_or("", |value| value.to_str().unwrap());
            assert_eq!(chosen, expected, "{entries:?}");
        }
        // What the upstream chose stands, and a token that is called like a carrier is not repeated.
        let mut answer = HeaderMap::new();
        answer.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static("chat"));
        protocols(&["bearer.s3cr3t, a, chat"]).choose(&mut answer);
        assert_eq!(answer[SEC_WEBSOCKET_PROTOCOL], "chat");
        let mut protocols = protocols(&["bearer, token"]);
        protocols.remove_if(|candidate| candidate == b"bearer");
        let mut answer = HeaderMap::new();
        protocols.choose(&mut answer);
        assert!(answer.is_empty());
    }

    proptest! {
        #[test]
        fn no_entry_with_a_token_is_left(
            before in "([a-z0-9]{0,6}[.~_|-]){0,3}",
            token in "[A-Za-z0-9]{4,12}([-._][A-Za-z0-9]{1,8}){0,2}",
            after in "([.~_|-][a-z0-9]{0,6}){0,3}",
            encoding in 0..3,
        ) {
            let encoded = match encoding {
                0 => token.clone(),
                1 => token.bytes().map(|byte| format!("%{byte:02x}")).collect(),
                _ => BASE64.encode(&token).trim_end_matches('=').to_owned(),
            };
            // What base64 decodes to is unique only from the start of a piece.
            let mut protocols = protocols(&[&format!("chat, {before}{encoded}{after}, b")]);
            protocols.remove_if(|candidate| candidate == token.as_bytes());
            let mut answer = HeaderMap::new();
            protocols.choose(&mut answer);
            for offered in protocols.offered().chain(answer.values().map(HeaderValue::as_bytes)) {
                prop_assert!(!String::from_utf8_lossy(offered).contains(&encoded), "{:?}", offered);
            }
        }
    }
}
