//! Packets of [Engine.IO 4](https://socket.io/docs/v4/engine-io-protocol/) and
//! [Socket.IO 5](https://socket.io/docs/v4/socket-io-protocol/): which of them may pass.
//!
//! Servers read packets more leniently than the protocol says, and each in its own way. [`parse`] accepts only what the
//! protocol's own clients and servers send, so that no server finds another namespace in it.

/// The only namespace whose packets pass.
pub const NAMESPACE: &str = "/v1/audio/agent";

/// Separates the packets in a body.
pub const SEPARATOR: char = '\x1e';

/// The most attachments of a packet.
const MAX_ATTACHMENTS: usize = 999;

/// The longest name of another namespace that is repeated in a connect error.
const MAX_NAMESPACE: usize = 128;

/// Who sent a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Caller,
    Api,
}

impl Side {
    pub fn name(self) -> &'static str {
        match self {
            Self::Caller => "caller",
            Self::Api => "api",
        }
    }
}

/// A packet that may pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packet<'a> {
    /// Opens the session: the JSON that describes it.
    Open(&'a str),
    /// Ends the session.
    Close,
    /// Moves the session to this WebSocket.
    Upgrade,
    /// A ping or pong, or nothing.
    Control,
    /// A binary packet in a body, in Base64.
    Binary,
    /// Enters the namespace, with the client's `auth` as JSON, or with the session's id from the API.
    Connect(&'a str),
    /// A message of the namespace, with how many binary packets follow.
    Message { attachments: usize },
}

/// Why a packet does not pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// No client or server sends it.
    Malformed,
    /// It belongs to another namespace.
    Namespace,
    /// A binary packet without an event that announced it, or an event in place of one.
    Attachment,
    /// It is too long.
    TooLarge,
}

impl Fault {
    pub const ALL: [Self; 4] = [Self::Malformed, Self::Namespace, Self::Attachment, Self::TooLarge];

    /// The name in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Namespace => "namespace",
            Self::Attachment => "attachment",
            Self::TooLarge => "too_large",
        }
    }
}

/// Parses a text packet that `side` sent.
///
/// # Errors
///
/// The reason not to forward it.
pub fn parse(side: Side, text: &str) -> Result<Packet<'_>, Fault> {
    let (kind, rest) = text.split_at_checked(1).ok_or(Fault::Malformed)?;
    match (side, kind, rest) {
        (_, "4", message) => parse_message(side, message),
        (Side::Api, "0", open) => Ok(Packet::Open(open)),
        (_, "1", "") => Ok(Packet::Close),
        (Side::Caller, "5", "") => Ok(Packet::Upgrade),
        (Side::Api, "2" | "6", "") | (Side::Caller, "3", "") => Ok(Packet::Control),
        (Side::Caller, "2", "probe") | (Side::Api, "3", "probe") => Ok(Packet::Control),
        _ => Err(Fault::Malformed),
    }
}

/// As [`parse`], for a packet in a body, where binary ones are texts too.
pub fn parse_in_body(side: Side, text: &str) -> Result<Packet<'_>, Fault> {
    let is_base64 = |byte: u8| byte.is_ascii_alphanumeric() || b"+/=".contains(&byte);
    match text.strip_prefix('b') {
        Some(data) if data.bytes().all(is_base64) => Ok(Packet::Binary),
        Some(_) => Err(Fault::Malformed),
        None => parse(side, text),
    }
}

/// Parses a packet of Socket.IO.
fn parse_message(side: Side, message: &str) -> Result<Packet<'_>, Fault> {
    let (kind, mut rest) = message.split_at_checked(1).ok_or(Fault::Malformed)?;
    let mut attachments = 0;
    match (side, kind) {
        (_, "0" | "1" | "2" | "3") | (Side::Api, "4") => {}
        (_, "5" | "6") => {
            let (count, after) = rest.split_once('-').ok_or(Fault::Malformed)?;
            // `parse` would take a sign.
            let is_count = count.bytes().all(|byte| byte.is_ascii_digit());
            let count = count.parse().ok().filter(|_| is_count).ok_or(Fault::Malformed)?;
            if !(1..=MAX_ATTACHMENTS).contains(&count) {
                return Err(Fault::Malformed);
            }
            (attachments, rest) = (count, after);
        }
        _ => return Err(Fault::Malformed),
    }
    let data = match rest.strip_prefix(NAMESPACE).ok_or(Fault::Namespace)? {
        "" => "",
        // Anything else continues the name.
        more => more.strip_prefix(',').ok_or(Fault::Namespace)?,
    };
    match kind {
        "0" => Ok(Packet::Connect(data)),
        _ => Ok(Packet::Message { attachments }),
    }
}

/// Returns the connect error that answers a caller who wants to enter another namespace; `None` if `text` is not that.
pub fn refuse_connect(text: &str) -> Option<String> {
    let rest = text.strip_prefix("40")?;
    let namespace = match rest.strip_prefix('/') {
        Some(_) => rest.split(',').next().filter(|name| name.len() <= MAX_NAMESPACE)?,
        None => "",
    };
    let separator = if namespace.is_empty() { "" } else { "," };
    Some(format!(r#"44{namespace}{separator}{{"message":"Invalid namespace"}}"#))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn packets_of_real_clients_and_servers_pass() {
        for (side, text, packet) in [
            (Side::Api, r#"0{"sid":"a"}"#, Packet::Open(r#"{"sid":"a"}"#)),
            (Side::Api, "1", Packet::Close),
            (Side::Api, "2", Packet::Control),
            (Side::Api, "3probe", Packet::Control),
            (Side::Api, "6", Packet::Control),
            (Side::Api, "40/v1/audio/agent,{\"sid\":\"b\"}", Packet::Connect("{\"sid\":\"b\"}")),
            (Side::Api, "44/v1/audio/agent,{\"message\":\"no\"}", Packet::Message { attachments: 0 }),
            (Side::Api, "41/v1/audio/agent,", Packet::Message { attachments: 0 }),
            (Side::Caller, "1", Packet::Close),
            (Side::Caller, "2probe", Packet::Control),
            (Side::Caller, "3", Packet::Control),
            (Side::Caller, "5", Packet::Upgrade),
            (Side::Caller, "40/v1/audio/agent,", Packet::Connect("")),
            (Side::Caller, "40/v1/audio/agent", Packet::Connect("")),
            (Side::Caller, "40/v1/audio/agent,{\"a\":1}", Packet::Connect("{\"a\":1}")),
            (Side::Caller, "41/v1/audio/agent,", Packet::Message { attachments: 0 }),
            (Side::Caller, "42/v1/audio/agent,[\"a,b\"]", Packet::Message { attachments: 0 }),
            (Side::Caller, "42/v1/audio/agent,12[\"/x,\"]", Packet::Message { attachments: 0 }),
            (Side::Caller, "43/v1/audio/agent,12[]", Packet::Message { attachments: 0 }),
            (Side::Caller, "451-/v1/audio/agent,[\"a\",{}]", Packet::Message { attachments: 1 }),
            (Side::Caller, "4612-/v1/audio/agent,3[{}]", Packet::Message { attachments: 12 }),
        ] {
            assert_eq!(parse(side, text), Ok(packet), "{text}");
            assert_eq!(parse_in_body(side, text), Ok(packet), "{text}");
        }
        assert_eq!(parse_in_body(Side::Caller, "bAQ+/=="), Ok(Packet::Binary));
    }

    #[test]
    fn other_packets_do_not_pass() {
        for (side, text, fault) in [
            (Side::Caller, "", Fault::Malformed),
            (Side::Caller, "0{}", Fault::Malformed),
            (Side::Caller, "2", Fault::Malformed),
            (Side::Caller, "6", Fault::Malformed),
            (Side::Caller, "1x", Fault::Malformed),
            (Side::Caller, "4", Fault::Malformed),
            (Side::Caller, "７", Fault::Malformed),
            (Side::Caller, "４2/v1/audio/agent,[]", Fault::Malformed),
            (Side::Caller, "4２/v1/audio/agent,[]", Fault::Malformed),
            (Side::Caller, "44/v1/audio/agent,{}", Fault::Malformed),
            (Side::Caller, "47/v1/audio/agent,{}", Fault::Malformed),
            (Side::Caller, "bAAAA", Fault::Malformed),
            (Side::Api, "5", Fault::Malformed),
            (Side::Api, "3", Fault::Malformed),
            (Side::Caller, "40", Fault::Namespace),
            (Side::Caller, "40{}", Fault::Namespace),
            (Side::Caller, "42[\"x\"]", Fault::Namespace),
            (Side::Caller, "40/", Fault::Namespace),
            (Side::Caller, "40/other,", Fault::Namespace),
            (Side::Caller, "42/v1/audio/agents,[]", Fault::Namespace),
            (Side::Caller, "42/v1/audio/agent?x=1,[]", Fault::Namespace),
            (Side::Caller, "42/v1/audio/agent[]", Fault::Namespace),
            (Side::Caller, "42/v1/audio,[]", Fault::Namespace),
            (Side::Caller, "42/V1/audio/agent,[]", Fault::Namespace),
            (Side::Caller, "42 /v1/audio/agent,[]", Fault::Namespace),
            (Side::Caller, "42//v1/audio/agent,[]", Fault::Namespace),
            // A Python server would read `/other` here.
            (Side::Caller, "421-/other,[]", Fault::Namespace),
            (Side::Caller, "421-/v1/audio/agent,[]", Fault::Namespace),
            (Side::Caller, "45/v1/audio/agent,[]", Fault::Malformed),
            (Side::Caller, "45-/v1/audio/agent,[]", Fault::Malformed),
            (Side::Caller, "450-/v1/audio/agent,[]", Fault::Malformed),
            (Side::Caller, "45+1-/v1/audio/agent,[]", Fault::Malformed),
            (Side::Caller, "45１-/v1/audio/agent,[]", Fault::Malformed),
            (Side::Caller, "451000-/v1/audio/agent,[]", Fault::Malformed),
            (Side::Caller, "451-2-/v1/audio/agent,[]", Fault::Namespace),
            (Side::Caller, "451-/other,[]", Fault::Namespace),
            (Side::Api, "42[\"x\"]", Fault::Namespace),
            (Side::Api, "40{\"sid\":\"x\"}", Fault::Namespace),
        ] {
            assert_eq!(parse(side, text), Err(fault), "{text}");
        }
        for text in ["bA\nA", "b{}", "bAA\u{1f}", "b４"] {
            assert_eq!(parse_in_body(Side::Caller, text), Err(Fault::Malformed), "{text}");
        }
    }

    #[test]
    fn connects_to_other_namespaces_are_answered() {
        for (text, answer) in [
            ("40", Some(r#"44{"message":"Invalid namespace"}"#)),
            (r#"40{"a":1}"#, Some(r#"44{"message":"Invalid namespace"}"#)),
            ("40/other,{}", Some(r#"44/other,{"message":"Invalid namespace"}"#)),
            ("40/other", Some(r#"44/other,{"message":"Invalid namespace"}"#)),
            ("42/other,[]", None),
            ("", None),
        ] {
            assert_eq!(refuse_connect(text).as_deref(), answer, "{text}");
        }
        assert_eq!(refuse_connect(&format!("40/{}", "x".repeat(200))), None);
    }

    /// How the servers for Node.js and Python read the namespace of a message. Every reading counts.
    fn namespaces(text: &str) -> Vec<String> {
        let Some(message) = text.strip_prefix('4') else { return Vec::new() };
        let mut found = Vec::new();
        let after_kind: String = message.chars().skip(1).collect();
        let cuts = after_kind.char_indices().filter(|(_, letter)| *letter == '-').map(|(at, _)| at + 1);
        let is_count = |at: &usize| {
            let digits = &after_kind[..at.saturating_sub(1)];
            digits.chars().all(char::is_numeric)
        };
        for at in [0].into_iter().chain(cuts.filter(is_count)) {
            let rest = &after_kind[at..];
            if rest.starts_with('/') {
                let name = rest.split(',').next().unwrap_or_default();
                found.push(name.to_owned());
                found.push(name.split('?').next().unwrap_or_default().to_owned());
            } else if at > 0 {
                found.push("/".to_owned());
            }
        }
        if found.is_empty() {
            found.push("/".to_owned());
        }
        found
    }

    proptest! {
        /// No server finds another namespace in a packet that passes.
        #[test]
        fn no_other_namespace_passes(
            text in "4[0-9２]?([0-9+٣]{0,3}-?){0,2}(/v1/audio/agent|/[a-z/?]{0,6}|)[,s?]?[0-9]{0,2}(\\[\"?[a-z,/]{0,4}|)",
        ) {
            if parse(Side::Caller, &text).is_ok() {
                prop_assert!(namespaces(&text).iter().all(|name| name == NAMESPACE), "{:?}", namespaces(&text));
            }
        }

        /// Nothing panics, and what passes begins as the protocol says.
        #[test]
        fn any_text_is_parsed(text in "\\PC{0,30}", cut in "[0-6b]{0,2}") {
            for text in [&text, &format!("{cut}{text}")] {
                for side in [Side::Caller, Side::Api] {
                    if let Ok(Packet::Message { .. } | Packet::Connect(_)) = parse_in_body(side, text) {
                        prop_assert!(text.contains(NAMESPACE));
                    }
                }
                let _ = refuse_connect(text);
            }
        }

        /// A packet of the namespace passes whatever its data is.
        #[test]
        fn data_is_not_looked_at(kind in "[23]", data in "\\PC{0,30}") {
            let text = format!("4{kind}{NAMESPACE},{data}");
            prop_assert_eq!(parse(Side::Caller, &text), Ok(Packet::Message { attachments: 0 }));
        }
    }
}
