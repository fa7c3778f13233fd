//! Lets the replicas of a service share their tokens: one of them refreshes, the others adopt.
//!
//! [The guide](crate::guide::fleet) has the picture, what happens when something fails, and how to set up the store.
//!
//! ```
//! use tower_selam::{BoxError, Refreshing, Token, fleet::{Fleet, MemoryStore, SealingKey}};
//! use tower_selam::source::{Reason, source_fn};
//!
//! # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
//! # let key = SealingKey::new([7; 32]);
//! # let fetch = |_: Reason<Token>| async { Ok::<_, BoxError>(Token::new("a.b.c")?) };
//! // let key = SealingKey::from_file("/run/secrets/fleet-key")?;
//! // let store = RedisStore::new(connection);
//! let store = MemoryStore::default();
//! let fleet = Fleet::new("billing", store, key)?;
//!
//! let jwts = Refreshing::new(fleet.share("selam", source_fn(fetch)));
//! assert_eq!(jwts.token().await?.expose_secret(), "a.b.c");
//! fleet.leave().await; // when the program ends
//! # Ok::<(), BoxError>(())
//! # }).unwrap();
//! ```
//!
//! # How it works
//!
//! ```text
//!  request ─▶ layers ─▶ Refreshing ─▶ FleetSource ─▶ your source, asked by one member of the fleet
//!                       0 round trips     │  ▲
//!                       while the token   ▼  │ the protocol: plain functions of a record
//!                       is fresh       FleetStore: get, put (compare and set)
//! ```
//!
//! The store holds one sealed record for each credential: token, refresh token, lease, rejected tokens, last failure. There is
//! no lock. A member that needs a token claims the lease in the record, by compare-and-set; a member that loses gets the record
//! of the winner, in the same round trip.
//!
//! - **A fresh token costs nothing**: requests read it from memory, as without a fleet.
//! - **One fetch serves all**, and so does one failure: after it, nobody asks again before its back-off is over.
//! - **A refresh token is spent once.** The store says so before it is sent, and holds the next one before the access token is
//!   used. If it may be spent, it is sent again only when no valid access token is left.
//! - **A rejected token is withdrawn everywhere within about a second**, and so is a login that [ends](Fleet::forget).
//! - **The store may fail.** A source that can be asked twice is then asked by each member alone. A refresh token is not spent.
//!   Members put back what the store loses.
//!
//! # Security
//!
//! Records are sealed with a [`SealingKey`] that the store does not have, and bound to the names of fleet and credential. Names are
//! hashed, so that the store lists no users; a dictionary of names can be tried against the hashes. An attacker who can write to the
//! store can delete records, and put back older ones.

mod client;
#[cfg(any(unix, windows))]
mod file;
mod login;
mod member;
mod memory;
mod news;
mod protocol;
mod record;
#[cfg(feature = "fleet-redis")]
mod redis;
mod seal;
mod shared;
mod source;
mod status;
mod store;

use std::{fmt, sync::Arc, time::Duration};

#[cfg(any(unix, windows))]
pub use self::file::FileStore;
#[cfg(feature = "fleet-redis")]
pub use self::redis::RedisStore;
use self::{
    client::Client,
    member::Member,
    news::Item,
    protocol::{end, log_in},
    record::Print,
    seal::SealingKeys,
    shared::{Options, Shared},
    store::DynFleetStore,
};
pub use self::{
    login::FleetLogin,
    memory::MemoryStore,
    seal::SealingKey,
    source::FleetSource,
    status::Status,
    store::{Entry, FleetStore, Put, Revision, Write},
};
use crate::{
    credential::Token,
    error::{BoxError, ConfigError, ConfigErrorKind, Place, Setting},
    oauth::RefreshToken,
    source::Source,
};

/// The shortest lease and interval, and the longest.
const MIN_TIME: Duration = Duration::from_millis(50);
const MAX_TIME: Duration = Duration::from_secs(60 * 60);

/// The longest name of a fleet.
const MAX_NAME: usize = 64;

/// A fleet, as one of its members sees it. See the [module docs](self). Clones are handles of one member.
#[derive(Clone)]
pub struct Fleet(Arc<Shared>);

/// Builds a [`Fleet`] with other times, or with former keys.
pub struct FleetBuilder {
    name: String,
    store: Box<dyn DynFleetStore>,
    keys: Vec<SealingKey>,
    patience: Duration,
    options: Options,
}

impl Fleet {
    /// Joins the fleet `name` with the default times.
    ///
    /// Members have the same name, store and key. Another fleet over the same store has another name: letters, digits, `-`,
    /// `_` and `.`.
    ///
    /// # Errors
    ///
    /// Fails if the name is empty, longer than 64 bytes, or has another character.
    pub fn new(
        name: impl Into<String>,
        store: impl FleetStore,
        key: SealingKey,
    ) -> Result<Self, ConfigError> {
        Self::builder(name, store, key).build()
    }

    /// Joins the fleet `name` with other settings.
    #[must_use]
    pub fn builder(name: impl Into<String>, store: impl FleetStore, key: SealingKey) -> FleetBuilder {
        FleetBuilder {
            name: name.into(),
            store: Box::new(store),
            keys: vec![key],
            patience: Duration::from_millis(250),
            options: Options {
                lease: Duration::from_secs(6),
                login_lease: Duration::from_secs(30),
                news_interval: Duration::from_secs(1),
            },
        }
    }

    /// Shares the tokens of a source that may be asked twice: client credentials, token exchange, a signer.
    ///
    /// `credential` names the token within the fleet, for example the user it belongs to. Members adopt each other's tokens only
    /// if their sources have the same [identity](Source::identity): members that ask for other scopes under one name do not get
    /// each other's tokens, but replace them.
    ///
    /// ```
    /// use tower_selam::{BoxError, PerSubject, Subject, Token, fleet::{Fleet, MemoryStore, SealingKey}};
    /// use tower_selam::source::{Reason, source_fn};
    ///
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
    /// # let fleet = Fleet::new("billing", MemoryStore::default(), SealingKey::new([7; 32]))?;
    /// # let exchange_for = |user: &Subject| {
    /// #     let token = format!("token-of-{}", user.as_str());
    /// #     source_fn(move |_: Reason<Token>| { let token = token.clone(); async move { Ok::<_, BoxError>(Token::new(token)?) } })
    /// # };
    /// let jwts = PerSubject::new(move |user: &Subject| fleet.share(user.as_str(), exchange_for(user)));
    /// assert_eq!(jwts.of_subject(&Subject::new("ada")).token().await?.expose_secret(), "token-of-ada");
    /// # Ok::<(), BoxError>(())
    /// # }).unwrap();
    /// ```
    pub fn share<S: Source<Token>>(&self, credential: &str, source: S) -> FleetSource<S> {
        self.source(Member::new(&self.0, credential, false), source)
    }

    /// Shares a login whose refresh token may rotate. `source` makes the source that spends it, and is called at once. Access
    /// tokens are adopted as with [`share`](Self::share).
    ///
    /// The login begins with [`log_in`](Self::log_in), or with [an initial token](FleetLogin::with_initial).
    ///
    /// ```
    /// use bytes::Bytes;
    /// use http_body_util::Full;
    /// use tower_selam::{Refreshing, fleet::{Fleet, FleetLogin, MemoryStore, SealingKey}, simulator::Simulator};
    /// use tower_selam::oauth::{ClientAuth, OAuthSource, RefreshToken, TokenEndpoint};
    ///
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
    /// let client = Simulator::new();
    /// let first = RefreshToken::new(client.issue_refresh_token())?;
    /// let endpoint = TokenEndpoint::new::<_, Full<Bytes>, _>("https://api.selamgpt.com/oauth/token", client.clone())?
    ///     .with_client_auth(ClientAuth::public("my-app")?);
    ///
    /// let fleet = Fleet::new("billing", MemoryStore::default(), SealingKey::new([7; 32]))?;
    /// let source = |login: FleetLogin| OAuthSource::refresh_token(endpoint, login.with_initial(first));
    /// let jwts = Refreshing::new(fleet.share_login("selam", source));
    /// jwts.token().await?;
    /// # Ok::<(), tower_selam::BoxError>(())
    /// # }).unwrap();
    /// ```
    pub fn share_login<S: Source<Token>>(
        &self,
        credential: &str,
        source: impl FnOnce(FleetLogin) -> S,
    ) -> FleetSource<S> {
        let member = Member::new(&self.0, credential, true);
        let source = source(FleetLogin { member: Arc::clone(&member) });
        self.source(member, source)
    }

    fn source<S: Source<Token>>(&self, member: Arc<Member>, source: S) -> FleetSource<S> {
        if let Some(identity) = source.identity() {
            let _ = member.identity.set(Print::of(identity.as_bytes()));
        }
        self.0.add(&member);
        FleetSource { member, source }
    }

    /// Begins a login, or replaces it, from any program of the fleet. Members use it within about a second.
    ///
    /// # Errors
    ///
    /// Fails if the store does, or if what stands there cannot be opened. It may have been stored nevertheless if the store
    /// did not answer.
    pub async fn log_in(&self, credential: &str, token: &RefreshToken) -> Result<(), BoxError> {
        self.replace(credential, |record, now| log_in(record, token, now)).await
    }

    /// Ends a login, or a token: all members stop using it within about a second.
    ///
    /// A source that is not asked with a login fetches the next token when it is needed. This does not revoke anything at the issuer
    /// ([RFC 7009](https://www.rfc-editor.org/rfc/rfc7009)); do that first.
    ///
    /// # Errors
    ///
    /// As [`log_in`](Self::log_in).
    pub async fn forget(&self, credential: &str) -> Result<(), BoxError> {
        self.replace(credential, end).await
    }

    async fn replace(
        &self,
        credential: &str,
        edit: impl Fn(&record::Record, u64) -> record::Record,
    ) -> Result<(), BoxError> {
        // Without a login, so that a corrupt record is replaced.
        let member = Member::new(&self.0, credential, false);
        let epoch = member.replace(edit).await?;
        let told = self.0.announce(Item { name: member.name, refused: None, epoch }).await;
        told.map_err(|error| {
            format!("it is stored, but the members could not be told: {error}; repeat it").into()
        })
    }

    /// Reads what the fleet knows of a credential, without secrets. `None` if it knows nothing.
    ///
    /// # Errors
    ///
    /// Fails if the store does, or if what stands there cannot be opened.
    pub async fn status(&self, credential: &str) -> Result<Option<Status>, BoxError> {
        let member = Member::new(&self.0, credential, true);
        Ok(member.read().await?.as_ref().map(Status::of))
    }

    /// Leaves the fleet before the program ends: other members need not wait for leases to lapse.
    ///
    /// Gives leases back, and waits until no refresh token is being spent, for at most two minutes. Requests are still served, with the
    /// tokens that are there.
    ///
    /// # Cancel safety
    ///
    /// Leases that were not given back lapse.
    pub async fn leave(&self) {
        self.0.leave().await;
    }
}

impl FleetBuilder {
    /// Also opens records that were sealed with this key. See [how keys are rotated](SealingKey#rotation).
    #[must_use]
    pub fn with_former_key(mut self, key: SealingKey) -> Self {
        self.keys.push(key);
        self
    }

    /// Sets how long a call of the store may take before it is repeated, once; 250 ms by default.
    #[must_use]
    pub fn with_store_timeout(mut self, timeout: Duration) -> Self {
        self.patience = timeout;
        self
    }

    /// Sets after how long others take over from a member that has died; 6 seconds by default. Should be several times the
    /// [timeout of the store](Self::with_store_timeout).
    #[must_use]
    pub fn with_lease(mut self, lease: Duration) -> Self {
        self.options.lease = lease;
        self
    }

    /// As [`with_lease`](Self::with_lease), for members that spend a refresh token; 30 seconds by default.
    #[must_use]
    pub fn with_login_lease(mut self, lease: Duration) -> Self {
        self.options.login_lease = lease;
        self
    }

    /// Sets how often a member asks which tokens have ended; one second by default. It costs one call of the store, and
    /// another one if logins are shared.
    #[must_use]
    pub fn with_news_interval(mut self, interval: Duration) -> Self {
        self.options.news_interval = interval;
        self
    }

    /// Joins the fleet.
    ///
    /// # Errors
    ///
    /// As [`Fleet::new`].
    pub fn build(self) -> Result<Fleet, ConfigError> {
        let Self { name, store, keys, patience, options: Options { lease, login_lease, news_interval } } =
            self;
        // So that neither a lease is extended nor news are read without a pause, and no arithmetic overflows.
        let bounded = |time: Duration| time.clamp(MIN_TIME, MAX_TIME);
        let options = Options {
            lease: bounded(lease),
            login_lease: bounded(login_lease),
            news_interval: bounded(news_interval),
        };
        let patience = patience.min(MAX_TIME);
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        let kind = match name.len() {
            0 => Some(ConfigErrorKind::Empty),
            1..=MAX_NAME if name.bytes().all(is_plain) => None,
            _ => Some(ConfigErrorKind::InvalidName),
        };
        if let Some(kind) = kind {
            return Err(ConfigError::new(Setting::FleetName, Place::Argument, kind));
        }
        let client = Client::new(store, SealingKeys(keys), patience);
        Ok(Fleet(Arc::new(Shared::new(name, client, options))))
    }
}

impl fmt::Debug for Fleet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fleet").field("name", &self.0.name).finish_non_exhaustive()
    }
}

impl fmt::Debug for FleetBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FleetBuilder").field("name", &self.name).finish_non_exhaustive()
    }
}
