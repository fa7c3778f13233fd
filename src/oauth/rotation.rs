//! [`Rotation`]: exchanges refresh tokens. None is spent twice, and no new one is lost.

use std::{
    error::Error,
    future::poll_fn,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::pin,
    sync::{Arc, Weak},
    task::Poll,
    time::Duration,
};

use tokio::sync::{Mutex, MutexGuard, oneshot};

use super::{
    RefreshToken, RefreshTokenStore, StoreLock, UnansweredExchange,
    exchange::Exchange,
    login::Login,
    response::Granted,
    unanswered::{is_rejected, may_have_spent},
};
use crate::{
    credential::{Fingerprint, Token},
    error::BoxError,
    refresh::on_behalf,
    source::{Fetched, Fetching, SourceError},
    telemetry::{event, span::Span},
    util::{
        clock::{Clock, Time, monotonic},
        timer::{sleep, timeout},
    },
};

/// Bounds an exchange, which outlives the request that started it, and each call of the store.
const TIME_LIMIT: Duration = Duration::from_secs(2 * 60);

/// How long an access token is held back until the refresh token that came with it is saved.
const SAVE_PATIENCE: Duration = Duration::from_secs(5);

/// Before saving is tried again. Doubles each time, up to the second.
const SAVE_BACKOFF: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(60)];

/// After a rejection, a program that does not lock the store may still be saving the token that it got for the rejected one.
const LOOK_AGAIN_AFTER: [Duration; 3] = [Duration::ZERO, Duration::from_secs(1), Duration::from_secs(3)];

const NOT_LOGGED_IN: &str = "there is no refresh token: log in";
const SPENT: &str = "the stored refresh token was spent, and its successor is lost: log in again";
const LOGIN_REPLACED: &str = "the login was replaced repeatedly during the exchange";
const NOBODY_WAITS: &str = "nobody waits for the token any more";
const ABORTED: &str = "the refresh token exchange panicked, or its runtime was shut down";
const PANICKED: &str = "the client of the token endpoint or the refresh token store panicked";
const TIMED_OUT: &str = "the token endpoint or the refresh token store did not respond in time";
const SAVE_ABORTED: &str = "the runtime was shut down";

/// The refresh token of one login.
pub(super) struct Rotation<S> {
    store: S,
    /// Locked for the whole of an exchange, so exchanges run one at a time.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    login: Login,
    /// Held on to while the newest token is unsaved: nobody else must spend the one that the store holds.
    lock: Option<StoreLock>,
    /// The token whose failed save was reported.
    reported: Option<Fingerprint>,
    /// The task that tries to save the newest token.
    saver: Weak<()>,
    /// An access token whose requester was gone when it arrived.
    unclaimed: Option<Unclaimed>,
}

struct Unclaimed {
    fetched: Fetched<Token>,
    since: Time,
    /// The store version of the login that the token belongs to.
    version: u64,
}

type Caller = oneshot::Sender<Result<Fetched<Token>, SourceError>>;

/// [`Rotation`] as a trait object.
pub(super) trait Rotate: Send + Sync {
    fn version(&self) -> u64;

    /// Exchanges the refresh token on a new task of the current runtime, so that the rotated token is kept even if the caller is dropped.
    fn fetch(self: Arc<Self>, exchange: Arc<Exchange>) -> Fetching<'static, Token>;
}

impl<S: RefreshTokenStore> Rotate for Rotation<S> {
    fn version(&self) -> u64 {
        self.store.version()
    }

    fn fetch(self: Arc<Self>, exchange: Arc<Exchange>) -> Fetching<'static, Token> {
        Box::pin(async move {
            let (sender, receiver) = oneshot::channel();
            let span = Span::current();
            tokio::spawn(on_behalf(async move { self.run(&exchange, sender, span).await }));
            receiver.await.unwrap_or_else(|_| Err(SourceError::transient(ABORTED)))
        })
    }
}

impl<S: RefreshTokenStore> Rotation<S> {
    pub(super) fn new(store: S) -> Self {
        Self { store, state: Mutex::default() }
    }

    /// `span` is the refresh's. It must not stay open while the token is being saved in the background.
    async fn run(&self, exchange: &Exchange, caller: Caller, span: Span) {
        let mut state = self.state.lock().await;
        if caller.is_closed() {
            // The caller left while it waited. Do not spend a token for it.
            return;
        }
        // Not kept in the state, which would keep it locked if the runtime drops this task.
        let mut lock = state.lock.take();
        let fetch_and_save = async {
            let fetched = match state.claim(self.store.version()) {
                Some(fetched) => Ok(fetched),
                None => self.exchange(&mut state, &mut lock, exchange, &caller).await,
            };
            self.save_and_answer(&mut state, fetched, caller).await;
        };
        span.instrument(fetch_and_save).await;
        state.lock = lock.filter(|_| state.login.unsaved().is_some());
        self.keep_saving(state).await;
    }

    /// Spends the newest token. If another login replaces it meanwhile, or another program has spent it and stored the
    /// next, discards the result and continues with what the store holds then.
    async fn exchange(
        &self,
        state: &mut State,
        lock: &mut Option<StoreLock>,
        exchange: &Exchange,
        caller: &Caller,
    ) -> Result<Fetched<Token>, SourceError> {
        if lock.is_none() {
            *lock = Some(guarded(async { self.store.lock().await }).await?);
        }
        let excludes_others = lock.as_ref().is_some_and(StoreLock::excludes_others);
        let mut version = self.store.version();
        let mut token = self.load(state).await?;
        for _ in 0..3 {
            if caller.is_closed() {
                return Err(SourceError::transient(NOBODY_WAITS));
            }
            let fetched = self.spend(state, exchange, &token).await;
            let looks = match &fetched {
                Err(error) if is_rejected(error) && !excludes_others => &LOOK_AGAIN_AFTER[..],
                Err(error) if is_rejected(error) => &LOOK_AGAIN_AFTER[..1],
                _ if self.store.version() != version => &LOOK_AGAIN_AFTER[..1],
                _ => return fetched,
            };
            let Some((found, newer)) = self.look_for_another(state, looks).await else { return fetched };
            (version, token) = (found, newer);
        }
        Err(SourceError::transient(LOGIN_REPLACED))
    }

    /// Reads the store, and returns the token to spend.
    async fn load(&self, state: &mut State) -> Result<RefreshToken, SourceError> {
        match guarded(async { self.store.load().await }).await {
            Ok(Some(held)) => state.login.found(held).ok_or_else(|| SourceError::permanent(SPENT)),
            Ok(None) => {
                state.login.ended();
                Err(SourceError::permanent(NOT_LOGGED_IN))
            }
            // Another program may have spent the newest token, unless it was never in the store.
            Err(error) => state.login.unsaved().map(|(newest, _)| newest).ok_or(error),
        }
    }

    /// Reads the store, repeatedly, until it holds another login's token or one that another program put there.
    async fn look_for_another(&self, state: &mut State, after: &[Duration]) -> Option<(u64, RefreshToken)> {
        for pause in after {
            if !pause.is_zero() {
                sleep(*pause).await;
            }
            let version = self.store.version();
            let before = state.login.newest().cloned();
            let token = self.load(state).await.ok()?;
            if before.is_none_or(|before| before.fingerprint() != token.fingerprint()) {
                return Some((version, token));
            }
        }
        None
    }

    async fn spend(
        &self,
        state: &mut State,
        exchange: &Exchange,
        token: &RefreshToken,
    ) -> Result<Fetched<Token>, SourceError> {
        let is_unanswered = state.login.sending(token);
        let granted = match guarded(exchange.run(Some(token))).await {
            // Nothing says whether the endpoint has spent the token.
            Ok(Granted { fetched: Err(error), refresh_token: None }) => Err(error.into()),
            granted => granted,
        };
        match granted {
            Ok(Granted { fetched, refresh_token }) => {
                state.login.accepted(token, refresh_token);
                Ok(fetched?)
            }
            Err(error) if may_have_spent(&error) => {
                event::refresh_token_maybe_spent(token.id(), token.expose_secret(), &error);
                Err(UnansweredExchange::wrap(error, false))
            }
            Err(error) if is_unanswered && is_rejected(&error) => Err(UnansweredExchange::wrap(error, true)),
            Err(error) => {
                if !is_unanswered {
                    state.login.unspent();
                }
                Err(error)
            }
        }
    }

    /// Saves the newest token and then answers the caller, or answers after a while and completes the attempt.
    async fn save_and_answer(
        &self,
        state: &mut State,
        fetched: Result<Fetched<Token>, SourceError>,
        caller: Caller,
    ) {
        let version = self.store.version();
        let mut answer = Some((caller, fetched));
        let mut send = || {
            let (caller, fetched) = answer.take()?;
            let fetched = caller.send(fetched).err()?.ok()?;
            Some(Unclaimed { fetched, since: Clock::default().now(), version })
        };
        let mut unclaimed = None;
        let deadline = monotonic() + SAVE_PATIENCE;
        let [mut pause, _] = SAVE_BACKOFF;
        let mut is_saved = state.login.unsaved().is_none();
        while !is_saved && monotonic() < deadline {
            let mut saving = pin!(self.save(state));
            is_saved = match timeout(deadline.saturating_duration_since(monotonic()), &mut saving).await {
                Ok(is_saved) => is_saved,
                Err(_) => {
                    unclaimed = send();
                    saving.await
                }
            };
            if !is_saved {
                sleep(pause.min(deadline.saturating_duration_since(monotonic()))).await;
                pause *= 2;
            }
        }
        state.unclaimed = send().or(unclaimed);
    }

    /// Saves the newest token, however long it takes, unless another task does.
    async fn keep_saving(&self, mut state: MutexGuard<'_, State>) {
        if state.login.unsaved().is_none() || state.saver.strong_count() > 0 {
            return;
        }
        let saver = Arc::new(());
        state.saver = Arc::downgrade(&saver);
        let [mut pause, max] = SAVE_BACKOFF;
        while state.login.unsaved().is_some() {
            drop(state);
            sleep(pause).await;
            pause = max.min(pause * 2);
            state = self.state.lock().await;
            let lock = match state.lock.take() {
                Some(lock) => Ok(lock),
                None => guarded(async { self.store.lock().await }).await,
            };
            let Ok(lock) = lock else { continue };
            // The store may hold another login by now.
            let _ = self.load(&mut state).await;
            self.save(&mut state).await;
            state.lock = Some(lock).filter(|_| state.login.unsaved().is_some());
        }
    }

    /// Saves the newest token. Returns whether the store holds it.
    async fn save(&self, state: &mut State) -> bool {
        let Some((token, outdated)) = state.login.unsaved() else { return true };
        let id = Some(token.fingerprint());
        let mut report = Report((state.reported != id).then_some(&token));
        state.reported = id;
        match guarded(async { self.store.save(&token, &outdated).await }).await {
            Ok(()) => {
                report.0 = None;
                state.login.saved();
                true
            }
            Err(error) => {
                report.not_saved(&error);
                false
            }
        }
    }
}

/// Bounds a call in time, and turns a panic into an error.
async fn guarded<T, E: Into<SourceError>>(
    call: impl Future<Output = Result<T, E>>,
) -> Result<T, SourceError> {
    let mut call = pin!(call);
    let caught = poll_fn(|cx| match catch_unwind(AssertUnwindSafe(|| call.as_mut().poll(cx))) {
        Ok(polled) => polled.map_err(Into::into),
        // The panic's payload may contain a secret.
        Err(_) => Poll::Ready(Err(SourceError::transient(PANICKED))),
    });
    timeout(TIME_LIMIT, caught).await.unwrap_or_else(|_| Err(SourceError::transient(TIMED_OUT)))
}

/// Raises an event unless the token reaches the store, also if the runtime drops the task.
struct Report<'a>(Option<&'a RefreshToken>);

impl Report<'_> {
    fn not_saved(&mut self, error: &dyn Error) {
        if let Some(token) = self.0.take() {
            event::refresh_token_not_saved(token.id(), token.expose_secret(), error);
        }
    }
}

impl Drop for Report<'_> {
    fn drop(&mut self) {
        self.not_saved(&*BoxError::from(SAVE_ABORTED));
    }
}

impl State {
    /// Takes the unclaimed access token if it belongs to the current login and has not expired.
    fn claim(&mut self, version: u64) -> Option<Fetched<Token>> {
        let Unclaimed { mut fetched, since, .. } =
            self.unclaimed.take().filter(|unclaimed| unclaimed.version == version)?;
        let now = Clock::default().now();
        let age = now.since(since).saturating_add(now.unseen_since(since));
        if let Some(lifetime) = &mut fetched.lifetime {
            *lifetime = lifetime.saturating_sub(age);
        }
        // Without a stated expiry it is unknown how much of the lifetime remains.
        let known = fetched.lifetime.is_some() || fetched.credential.expires_at().is_some();
        let expired = fetched.lifetime.is_some_and(|lifetime| lifetime.is_zero());
        (known && !expired).then_some(fetched)
    }
}
