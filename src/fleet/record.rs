//! [`Record`]: what the members of a fleet share about one credential.

use std::{fmt, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zeroize::Zeroizing;

use crate::{
    credential::{Fingerprint, Token},
    oauth::RefreshToken,
    source::Fetched,
};

/// How many rejected credentials are remembered.
const MAX_REFUSED: usize = 16;

/// The longest description of a failure.
const MAX_MESSAGE: usize = 200;

/// How long a record without anything that ends is kept.
const KEEP_IDLE: Duration = Duration::from_secs(60 * 60);

/// How long a record is kept after its token has expired, and after its login has ended.
const KEEP_EXTRA: Duration = Duration::from_secs(60);
const KEEP_ENDED: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// What the members of a fleet share about one credential. Sealed as a whole.
///
/// Times are spans that count down (or up) from when the record was written: members do not compare clocks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Record {
    /// Grows with each new token and login. A member never goes back. When a login begins or ends, it becomes the time in
    /// milliseconds, so that it is newer than what members remember and the store has lost.
    pub(super) generation: u64,
    /// The generation at which the login, or the credential, began or ended last. No token from before it is used.
    pub(super) epoch: u64,
    pub(super) token: Option<SharedToken>,
    pub(super) login: Option<SharedLogin>,
    pub(super) lease: Option<Lease>,
    /// The tokens that the API rejected last.
    pub(super) refused: Vec<Print>,
    pub(super) rejections: Option<Rejections>,
    pub(super) failure: Option<Failure>,
}

/// An access token.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct SharedToken {
    text: Zeroizing<String>,
    /// The rest of its lifetime, if its source stated one. Otherwise its claims tell.
    #[serde(with = "millis")]
    pub(super) lifetime: Option<Duration>,
    /// What the source that fetched it was asked for.
    pub(super) identity: Option<Print>,
}

/// A refresh token.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct SharedLogin {
    text: Zeroizing<String>,
    /// Whether a member may have spent it without an answer. Set before it is sent.
    pub(super) maybe_spent: bool,
}

/// The right of one member to fetch the next token.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Lease {
    pub(super) owner: Print,
    #[serde(with = "span")]
    pub(super) rest: Duration,
}

/// Rejections in close succession.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Rejections {
    pub(super) count: u32,
    #[serde(with = "span")]
    pub(super) since_last: Duration,
}

/// Why the last fetch failed, and for how long nobody tries again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Failure {
    pub(super) message: String,
    /// What the source that failed was asked for.
    pub(super) identity: Option<Print>,
    pub(super) permanent: bool,
    pub(super) attempts: u32,
    #[serde(with = "span")]
    pub(super) rest: Duration,
}

/// The first 128 bits of a fingerprint, or as many random bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Print(#[serde(with = "hex")] pub(super) [u8; 16]);

impl Record {
    pub(super) fn new(generation: u64) -> Self {
        Self { generation, ..Self::default() }
    }

    pub(super) fn to_bytes(&self) -> Zeroizing<Vec<u8>> {
        // Sized up front: a buffer that grows leaves unwiped copies behind.
        let size = self.token.as_ref().map_or(0, |token| token.text.len())
            + self.login.as_ref().map_or(0, |login| login.text.len())
            + self.failure.as_ref().map_or(0, |failure| 2 * failure.message.len());
        let mut bytes = Zeroizing::new(Vec::with_capacity(2 * size + 2048));
        // Writing to memory does not fail, and the maps of a record have string keys.
        let _ = serde_json::to_writer(&mut *bytes, self);
        bytes
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok()
    }

    /// The record after `time` has passed.
    pub(super) fn aged(&self, time: Duration) -> Self {
        let mut record = self.clone();
        if let Some(lifetime) = record.token.as_mut().and_then(|token| token.lifetime.as_mut()) {
            *lifetime = lifetime.saturating_sub(time);
        }
        if let Some(lease) = &mut record.lease {
            lease.rest = lease.rest.saturating_sub(time);
        }
        if let Some(rejections) = &mut record.rejections {
            rejections.since_last = rejections.since_last.saturating_add(time);
        }
        if let Some(failure) = &mut record.failure {
            failure.rest = failure.rest.saturating_sub(time);
        }
        record
    }

    /// How long the store has to keep it; `None` if for good.
    pub(super) fn keep(&self, token_rest: Option<Duration>) -> Option<Duration> {
        if self.login.is_some() {
            return None;
        }
        if self.token.is_none() && self.lease.is_none() && self.failure.is_none() {
            return Some(KEEP_ENDED);
        }
        let token = self.token.as_ref().map(|_| token_rest.unwrap_or(KEEP_IDLE));
        let lease = self.lease.map(|lease| lease.rest);
        let failure = self.failure.as_ref().map(|failure| failure.rest);
        let rest = [token, lease, failure].into_iter().flatten().max().unwrap_or_default();
        Some(rest.saturating_add(KEEP_EXTRA))
    }

    pub(super) fn refuse(&mut self, token: Print) {
        self.refused.retain(|refused| *refused != token);
        self.refused.truncate(MAX_REFUSED - 1);
        self.refused.insert(0, token);
    }

    pub(super) fn is_led_by(&self, member: Print) -> bool {
        self.lease.is_some_and(|lease| lease.owner == member)
    }

    /// Whether the login is this refresh token.
    pub(super) fn is_login(&self, token: &RefreshToken) -> bool {
        self.login.as_ref().is_some_and(|login| *login.text == *token.expose_secret())
    }
}

impl SharedToken {
    pub(super) fn new(fetched: &Fetched<Token>, identity: Option<Print>) -> Self {
        let text = Zeroizing::new(fetched.credential.expose_secret().to_owned());
        Self { text, lifetime: fetched.lifetime, identity }
    }

    pub(super) fn print(&self) -> Print {
        Print::of(self.text.as_bytes())
    }

    /// The token as its source would return it; `None` if it is not valid.
    pub(super) fn fetched(&self) -> Option<Fetched<Token>> {
        let fetched = Fetched::new(Token::parse(&self.text).ok()?);
        Some(match self.lifetime {
            Some(lifetime) => fetched.with_lifetime(lifetime),
            None => fetched,
        })
    }
}

impl SharedLogin {
    pub(super) fn new(token: &RefreshToken) -> Self {
        Self { text: Zeroizing::new(token.expose_secret().to_owned()), maybe_spent: false }
    }

    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.text == other.text
    }

    pub(super) fn token(&self) -> Option<RefreshToken> {
        RefreshToken::received(self.text.clone())
    }
}

impl Failure {
    /// Shortens a message to what a record can hold.
    pub(super) fn short(message: &str) -> String {
        message.chars().filter(|char| !char.is_control()).take(MAX_MESSAGE).collect()
    }
}

impl Print {
    pub(super) fn of(text: &[u8]) -> Self {
        Fingerprint::of(text).into()
    }
}

impl From<Fingerprint> for Print {
    fn from(fingerprint: Fingerprint) -> Self {
        Self(fingerprint.first_half())
    }
}

impl fmt::Debug for Print {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, ..] = self.0;
        write!(f, "{a:02x}{b:02x}{c:02x}")
    }
}

impl fmt::Debug for SharedToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedToken([redacted] id={:?} lifetime={:?})", self.print(), self.lifetime)
    }
}

impl fmt::Debug for SharedLogin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedLogin([redacted] maybe_spent={})", self.maybe_spent)
    }
}

/// A time span in whole milliseconds.
mod span {
    use super::{Deserialize, Deserializer, Duration, Serializer};

    pub(super) fn serialize<S: Serializer>(span: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(u64::try_from(span.as_millis()).unwrap_or(u64::MAX))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        u64::deserialize(deserializer).map(Duration::from_millis)
    }
}

/// An optional time span in whole milliseconds.
mod millis {
    use super::{Deserialize, Deserializer, Duration, Serialize, Serializer, span};

    #[derive(Serialize, Deserialize)]
    struct Span(#[serde(with = "span")] Duration);

    pub(super) fn serialize<S: Serializer>(
        span: &Option<Duration>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        span.map(Span).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Duration>, D::Error> {
        Ok(Option::<Span>::deserialize(deserializer)?.map(|span| span.0))
    }
}

/// 128 bits in hex.
mod hex {
    use serde::de::Error;

    use super::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8; 16], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format!("{:032x}", u128::from_be_bytes(*bytes)))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 16], D::Error> {
        let text = <&str>::deserialize(deserializer)?;
        u128::from_str_radix(text, 16).map(u128::to_be_bytes).map_err(D::Error::custom)
    }
}
