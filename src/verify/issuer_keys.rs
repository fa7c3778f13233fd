//! [`IssuerKeys`]: an issuer's keys, fetched when they are needed and kept.
//!
//! Not a [`Refreshing`](crate::Refreshing), whose rules are those of credentials: a key set is no secret, does not expire while
//! its issuer is down, and a JWT with an unknown `kid` is a reason to look again and none to distrust the other keys.

use std::{collections::VecDeque, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use secrecy::ExposeSecret;
use tokio::{runtime::Handle, sync::watch};
use tower::Service;

use super::{VerifyError, fetch::Publisher, keys::VerifyingKeys};
#[cfg(feature = "test-util")]
use crate::util::clock::TestClock;
use crate::{
    BoxError, ConfigError, ConfigErrorKind,
    credential::Fingerprint,
    error::{Place, Setting},
    oauth::TokenClient,
    source::SettledFile,
    telemetry::event,
    util::clock::{Clock, Deadline, LONG, Time},
};

/// The pause after the first failure, doubled with each further one.
const MIN_BACKOFF: Duration = Duration::from_secs(1);

/// How many ids are remembered that the issuer does not have.
const ABSENT: usize = 64;

/// The public keys of an issuer, for a [`JwtVerifier`](super::JwtVerifier). Cheap to clone; clones share the keys.
///
/// Keys that are [fetched](Self::discover) are fetched when the first JWT is verified, and again
///
/// - when they are no longer fresh: after `max-age` of their `Cache-Control`, at least 30 seconds and at most an hour, and after
///   10 minutes without one. JWTs are verified with the previous keys meanwhile, unless nobody has asked for as long again;
/// - when a JWT names a key that is not among them, at most every 30 seconds. The JWT waits for the new keys.
///
/// Fetches are single flight: one runs at a time, on a separate task, and all waiters share its result. If one fails, the
/// previous keys stay in use for 24 hours after they were fetched, and further attempts are made with growing pauses of up to a
/// minute. A fetch may take 10 seconds and a response 64 KiB, and redirects are refused.
#[derive(Clone)]
pub struct IssuerKeys {
    publisher: Arc<Publisher>,
    state: watch::Sender<State>,
    clock: Clock,
}

/// What is known of the keys. Changes only by the functions below, which decide by state and time alone.
#[derive(Default)]
struct State {
    held: Option<Held>,
    is_running: bool,
    /// How many fetches have begun.
    begun: u64,
    /// When the last one began for the sake of an unknown key.
    looked: Option<Time>,
    /// How many fetches have failed since the last success, and when to try again.
    failures: u32,
    retry: Option<Deadline>,
    /// The ids of JWTs that were seen before a fetch that did not bring such a key.
    absent: VecDeque<Fingerprint>,
}

struct Held {
    keys: Arc<VerifyingKeys>,
    fetched: Time,
    fresh_for: Duration,
    kept_for: Duration,
}

/// What a verifier does about the age of the keys.
enum Look {
    Use(Arc<VerifyingKeys>),
    /// Use them, and fetch.
    Refresh(Arc<VerifyingKeys>),
    /// Fetch, and wait.
    Wait,
    /// It is too soon for another attempt.
    Fail(Duration),
}

opaque_debug!(IssuerKeys);

impl IssuerKeys {
    /// Finds the keys by the issuer's discovery document, at `/.well-known/openid-configuration` below the issuer's URL
    /// ([OpenID Connect Discovery section 4](https://openid.net/specs/openid-connect-discovery-1_0.html#ProviderConfig)). The
    /// document has to name exactly this issuer. Nothing is sent before a JWT is verified.
    ///
    /// `B` is the body type that `client` takes, as for [`TokenEndpoint::new`](crate::oauth::TokenEndpoint::new).
    ///
    /// # Errors
    ///
    /// Fails if `issuer` is not an absolute `https` URL, or has user information, a query or a fragment.
    pub fn discover<S, B, R>(issuer: &str, client: S) -> Result<Self, ConfigError>
    where
        S: Service<Request<B>, Response = Response<R>, Error: Into<BoxError>, Future: Send>,
        S: Clone + Send + 'static,
        B: From<Bytes> + Send + 'static,
        R: Body<Error: Into<BoxError>> + Send + 'static,
    {
        Self::published(Setting::Issuer, Publisher::of_issuer(issuer, TokenClient::new(client), false))
    }

    /// Like [`discover`](Self::discover), but also accepts plain `http` to a loopback address or `localhost`, for tests.
    ///
    /// # Errors
    ///
    /// As [`discover`](Self::discover), and if an `http` URL points to any other host.
    pub fn discover_allow_insecure_loopback<S, B, R>(issuer: &str, client: S) -> Result<Self, ConfigError>
    where
        S: Service<Request<B>, Response = Response<R>, Error: Into<BoxError>, Future: Send>,
        S: Clone + Send + 'static,
        B: From<Bytes> + Send + 'static,
        R: Body<Error: Into<BoxError>> + Send + 'static,
    {
        Self::published(Setting::Issuer, Publisher::of_issuer(issuer, TokenClient::new(client), true))
    }

    /// Fetches a JWK set ([RFC 7517 section 5](https://www.rfc-editor.org/rfc/rfc7517#section-5)) from this URL.
    ///
    /// # Errors
    ///
    /// Fails if `url` is not an absolute `https` URL, or has user information or a fragment.
    pub fn at_url<S, B, R>(url: &str, client: S) -> Result<Self, ConfigError>
    where
        S: Service<Request<B>, Response = Response<R>, Error: Into<BoxError>, Future: Send>,
        S: Clone + Send + 'static,
        B: From<Bytes> + Send + 'static,
        R: Body<Error: Into<BoxError>> + Send + 'static,
    {
        Self::published(Setting::KeySetUrl, Publisher::of_url(url, TokenClient::new(client), false))
    }

    /// Like [`at_url`](Self::at_url), but also accepts plain `http` to a loopback address or `localhost`, for tests.
    ///
    /// # Errors
    ///
    /// As [`at_url`](Self::at_url), and if an `http` URL points to any other host.
    pub fn at_url_allow_insecure_loopback<S, B, R>(url: &str, client: S) -> Result<Self, ConfigError>
    where
        S: Service<Request<B>, Response = Response<R>, Error: Into<BoxError>, Future: Send>,
        S: Clone + Send + 'static,
        B: From<Bytes> + Send + 'static,
        R: Body<Error: Into<BoxError>> + Send + 'static,
    {
        Self::published(Setting::KeySetUrl, Publisher::of_url(url, TokenClient::new(client), true))
    }

    /// Reads a JWK set or public keys in PEM from a file, now, and again within two seconds of a change while JWTs are verified.
    /// A file that is just being written is never read in half: see [`SettledFile`]. If it is invalid later on, the previous
    /// keys stay in use.
    ///
    /// # Errors
    ///
    /// Fails if the file cannot be read, or has no key that can be used. The error names the file.
    pub fn in_file(path: impl Into<PathBuf>) -> Result<Self, ConfigError> {
        let file = SettledFile::new(path);
        let keys = file.read_blocking().and_then(|content| VerifyingKeys::parse(content.expose_secret()));
        let place = Place::File(file.path().to_owned());
        let keys = keys.map_err(|kind| ConfigError::new(Setting::VerifyingKeys, place, kind))?;
        // Looked at again when the first JWT is verified.
        Ok(Self::holding(Publisher::File(file), keys, Duration::ZERO))
    }

    /// Takes a JWK set or public keys in PEM, which never change.
    ///
    /// ```
    /// use tower_selam::verify::IssuerKeys;
    ///
    /// let jwks = r#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#;
    /// assert!(IssuerKeys::fixed(jwks).is_ok());
    /// // A secret would not be a key that others may know.
    /// assert!(IssuerKeys::fixed(r#"{"keys":[{"kty":"oct","k":"c2VjcmV0"}]}"#).is_err());
    /// ```
    ///
    /// # Errors
    ///
    /// Fails if the text has no key that can be used.
    pub fn fixed(text: &str) -> Result<Self, ConfigError> {
        let keys = VerifyingKeys::parse(text.as_bytes());
        let keys = keys.map_err(|kind| ConfigError::new(Setting::VerifyingKeys, Place::Argument, kind))?;
        Ok(Self::holding(Publisher::Fixed, keys, LONG))
    }

    /// Takes the time from `clock`, for tests. Call it before JWTs are verified: it forgets fetched keys.
    #[cfg(feature = "test-util")]
    #[must_use]
    pub fn with_clock(self, clock: TestClock) -> Self {
        let clock = Clock::from(clock);
        let held = self.state.borrow().held.as_ref().map(|held| Held {
            keys: Arc::clone(&held.keys),
            fetched: clock.now(),
            ..*held
        });
        Self { state: watch::Sender::new(State { held, ..State::default() }), clock, ..self }
    }

    fn published(
        setting: Setting,
        publisher: Result<Publisher, ConfigErrorKind>,
    ) -> Result<Self, ConfigError> {
        let publisher = publisher.map_err(|kind| ConfigError::new(setting, Place::Argument, kind))?;
        let (publisher, state) = (Arc::new(publisher), watch::Sender::default());
        Ok(Self { publisher, state, clock: Clock::default() })
    }

    fn holding(publisher: Publisher, keys: VerifyingKeys, fresh_for: Duration) -> Self {
        let clock = Clock::default();
        let held = Held { keys: Arc::new(keys), fetched: clock.now(), fresh_for, kept_for: LONG };
        let state = State { held: Some(held), ..State::default() };
        Self { publisher: Arc::new(publisher), state: watch::Sender::new(state), clock }
    }

    pub(super) fn now(&self) -> Time {
        self.clock.now()
    }

    /// Returns the keys; fetches them first if there are none.
    pub(super) async fn current(&self) -> Result<Arc<VerifyingKeys>, VerifyError> {
        let look = self.state.borrow().look(self.now());
        match look {
            Look::Use(keys) => Ok(keys),
            Look::Refresh(keys) => {
                self.start(|state, now| state.may_retry(now));
                Ok(keys)
            }
            Look::Wait => {
                self.fetch(|state, now| state.may_retry(now)).await;
                let now = self.now();
                let state = self.state.borrow();
                state.usable(now).ok_or_else(|| unavailable(state.retry_after(now)))
            }
            Look::Fail(retry_after) => Err(unavailable(retry_after)),
        }
    }

    /// Returns how many fetches have begun.
    pub(super) fn begun(&self) -> u64 {
        self.state.borrow().begun
    }

    /// Returns the keys after another fetch, if it is not too soon for one: a JWT names a key that the previous ones lack. `begun`
    /// fetches had begun when it arrived.
    pub(super) async fn newer(&self, begun: u64) -> Result<Arc<VerifyingKeys>, VerifyError> {
        let interval = self.publisher.unknown_key_interval();
        self.fetch(|state, now| state.starts_looking(now, begun, interval)).await;
        let now = self.now();
        let state = self.state.borrow();
        state.usable(now).ok_or_else(|| unavailable(state.retry_after(now)))
    }

    /// Returns what to say of a JWT whose key is still unknown. Only a fetch that began after it had arrived, for its sake or
    /// another's, tells that there is no such key; until there is one, the issuer may have published it meanwhile.
    pub(super) fn unknown(&self, id: &[u8], begun: u64) -> VerifyError {
        let (now, id) = (self.now(), Fingerprint::of(id));
        let interval = self.publisher.unknown_key_interval();
        let mut error = VerifyError::UnknownKey;
        self.state.send_if_modified(|state| {
            if interval.is_some() && !state.is_absent(id, begun) {
                error = unavailable(state.due_in(now, interval));
            }
            false
        });
        error
    }

    /// Starts a fetch if none runs and `may_start` allows it; waits until none runs.
    async fn fetch(&self, may_start: impl FnOnce(&mut State, Time) -> bool) {
        let mut state = self.state.subscribe();
        self.start(may_start);
        // The sender cannot be gone: `self` has it.
        let _ = state.wait_for(|state| !state.is_running).await;
    }

    fn start(&self, may_start: impl FnOnce(&mut State, Time) -> bool) {
        let Ok(runtime) = Handle::try_current() else { return };
        let now = self.now();
        let starts = self.state.send_if_modified(|state| {
            let starts = !state.is_running && may_start(state, now);
            if starts {
                state.is_running = true;
                state.begun += 1;
            }
            starts
        });
        if starts {
            let fetch = Fetch { keys: self.clone(), result: Err("the fetch was aborted".into()) };
            // A separate task: the request that started it may be dropped.
            runtime.spawn(fetch.run());
        }
    }
}

/// A fetch that runs. Ends when dropped, even if its task is aborted.
struct Fetch {
    keys: IssuerKeys,
    result: Result<(VerifyingKeys, Duration), BoxError>,
}

impl Fetch {
    async fn run(mut self) {
        self.result = self.keys.publisher.fetch().await;
    }
}

impl Drop for Fetch {
    fn drop(&mut self) {
        let result = std::mem::replace(&mut self.result, Err("".into()));
        let now = self.keys.now();
        if let Err(error) = &result {
            event::issuer_keys_failed(&**error);
        }
        self.keys.state.send_modify(|state| state.end(now, result.ok(), &self.keys.publisher));
    }
}

impl State {
    fn look(&self, now: Time) -> Look {
        let (held, may_retry) = (self.usable(now), self.may_retry(now));
        match (held, &self.held) {
            (Some(keys), Some(held)) => {
                let age = passed(held.fetched, now);
                match age < held.fresh_for || !(may_retry || self.is_running) {
                    true => Look::Use(keys),
                    // After an idle period, the issuer may have withdrawn a key long ago.
                    false if age >= 2 * held.fresh_for.max(MIN_BACKOFF) && self.failures == 0 => Look::Wait,
                    false => Look::Refresh(keys),
                }
            }
            _ if may_retry || self.is_running => Look::Wait,
            _ => Look::Fail(self.retry_after(now)),
        }
    }

    /// The keys, unless they are too old.
    fn usable(&self, now: Time) -> Option<Arc<VerifyingKeys>> {
        let held = self.held.as_ref()?;
        (passed(held.fetched, now) < held.kept_for).then(|| Arc::clone(&held.keys))
    }

    /// Whether the pause after a failure is over.
    fn may_retry(&self, now: Time) -> bool {
        self.retry.is_none_or(|retry| retry.has_come(now))
    }

    fn retry_after(&self, now: Time) -> Duration {
        self.retry.map_or(MIN_BACKOFF, |retry| retry.remaining(now))
    }

    /// Whether to fetch for the sake of an unknown key.
    fn starts_looking(&mut self, now: Time, begun: u64, interval: Option<Duration>) -> bool {
        let starts = interval.is_some()
            && self.begun == begun
            && self.may_retry(now)
            && self.due_in(now, interval).is_zero();
        if starts {
            self.looked = Some(now);
        }
        starts
    }

    fn due_in(&self, now: Time, interval: Option<Duration>) -> Duration {
        let passed = self.looked.map_or(Duration::MAX, |looked| passed(looked, now));
        interval.unwrap_or_default().saturating_sub(passed)
    }

    /// Whether the key is known to be absent: a fetch that began after its JWT had arrived did not bring it, now or earlier.
    fn is_absent(&mut self, id: Fingerprint, begun: u64) -> bool {
        if self.absent.contains(&id) {
            return true;
        }
        let is_absent = self.begun > begun && self.failures == 0 && !self.is_running;
        if is_absent {
            self.absent.truncate(ABSENT - 1);
            self.absent.push_front(id);
        }
        is_absent
    }

    fn end(&mut self, now: Time, fetched: Option<(VerifyingKeys, Duration)>, publisher: &Publisher) {
        self.is_running = false;
        match fetched {
            Some((keys, fresh_for)) => {
                let kept_for = publisher.kept_for();
                self.held = Some(Held { keys: Arc::new(keys), fetched: now, fresh_for, kept_for });
                (self.failures, self.retry) = (0, None);
            }
            None => {
                let pause = MIN_BACKOFF
                    .saturating_mul(2_u32.saturating_pow(self.failures))
                    .min(publisher.max_backoff());
                self.failures = self.failures.saturating_add(1);
                self.retry = Some(now.after(pause));
            }
        }
    }
}

/// The time between two moments, by the clock that has gone further: keys age on a suspended machine as well.
fn passed(from: Time, to: Time) -> Duration {
    to.since(from) + to.unseen_since(from)
}

fn unavailable(retry_after: Duration) -> VerifyError {
    VerifyError::Unavailable { retry_after }
}
