//! [`Rotation`]: exchanges refresh tokens. Each is spent once, and no new one is lost.

use std::{collections::VecDeque, error::Error, sync::Arc, time::Duration};

use tokio::{
    sync::{Mutex, oneshot},
    time::timeout,
};

use super::{OAuthError, RefreshToken, RefreshTokenStore, exchange::Exchange, response::Granted};
use crate::{
    credential::{Fingerprint, Token},
    error::BoxError,
    refresh::on_behalf,
    source::{Fetched, Fetching, SourceError},
    telemetry::event,
    util::clock::{Clock, Time},
};

/// Bounds an exchange, which outlives the request that started it, and the saving of a token.
const TIME_LIMIT: Duration = Duration::from_secs(2 * 60);

/// How many spent tokens are remembered.
const MAX_SPENT: usize = 16;

const NOT_LOGGED_IN: &str = "there is no refresh token: log in";
const LOGIN_REPLACED: &str = "the login was replaced repeatedly during the exchange";
const ABORTED: &str = "the refresh token exchange panicked, or its runtime was shut down";
const TIMED_OUT: &str = "the token endpoint or the refresh token store did not respond in time";
const SAVE_ABORTED: &str = "the store panicked, or its runtime was shut down";

/// The refresh token of one login.
pub(super) struct Rotation<S> {
    store: S,
    /// Locked for the whole of an exchange, so exchanges run one at a time.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    current: Option<Current>,
    /// Issued by the endpoint and not yet passed to the store.
    unsaved: Option<RefreshToken>,
    /// An access token whose requester was gone when it arrived.
    unclaimed: Option<Unclaimed>,
    /// The tokens spent last. They are not spent again if the store still returns one.
    spent: VecDeque<Fingerprint>,
}

struct Unclaimed {
    fetched: Fetched<Token>,
    since: Time,
    /// The store version of the login that the token belongs to.
    version: u64,
}

/// The newest refresh token.
#[derive(Clone)]
struct Current {
    token: RefreshToken,
    /// The store version when the login was loaded.
    version: u64,
}

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
            tokio::spawn(on_behalf(async move { self.run(&exchange, sender).await }));
            receiver.await.unwrap_or_else(|_| Err(SourceError::transient(ABORTED)))
        })
    }
}

impl<S: RefreshTokenStore> Rotation<S> {
    pub(super) fn new(store: S) -> Self {
        Self { store, state: Mutex::default() }
    }

    async fn run(&self, exchange: &Exchange, caller: oneshot::Sender<Result<Fetched<Token>, SourceError>>) {
        let mut state = self.state.lock().await;
        if caller.is_closed() {
            // The caller left while it waited for the lock. Do not spend a token for it.
            return;
        }
        let fetched = match state.claim(self.store.version()) {
            Some(fetched) => Ok(fetched),
            None => timeout(TIME_LIMIT, self.exchange(&mut state, exchange))
                .await
                .unwrap_or_else(|_| Err(SourceError::transient(TIMED_OUT))),
        };
        let version = state.current.as_ref().map_or(0, |current| current.version);
        if let Err(Ok(fetched)) = caller.send(fetched) {
            state.unclaimed = Some(Unclaimed { fetched, since: Clock::default().now(), version });
        }
        // The caller does not wait for the store, but the next exchange does: the lock is still held.
        if let Some(token) = state.unsaved.take()
            && self.store.version() == version
        {
            self.save(&token).await;
        }
    }

    /// Spends the newest token. If another login replaces it meanwhile, discards the result and tries once more with
    /// the new login.
    async fn exchange(&self, state: &mut State, exchange: &Exchange) -> Result<Fetched<Token>, SourceError> {
        for _ in 0..2 {
            let fetched = self.exchange_once(state, exchange).await;
            if state.current.as_ref().is_none_or(|current| current.version == self.store.version()) {
                return fetched;
            }
        }
        Err(SourceError::transient(LOGIN_REPLACED))
    }

    async fn exchange_once(
        &self,
        state: &mut State,
        exchange: &Exchange,
    ) -> Result<Fetched<Token>, SourceError> {
        let version = self.store.version();
        let current = match &state.current {
            Some(current) if current.version == version => current.clone(),
            _ => match self.load().await {
                Ok(Some(loaded)) => loaded,
                Ok(None) => return Err(SourceError::permanent(NOT_LOGGED_IN)),
                Err(error) => return Err(SourceError::transient(error)),
            },
        };
        let fetched = self.spend(state, exchange, &current).await;
        if let Err(error) = &fetched
            && OAuthError::of(error).is_some_and(|error| error.code() == Some("invalid_grant"))
            // Another program may have spent the token and stored its successor.
            && let Ok(Some(loaded)) = self.load().await
            && loaded.token.expose_secret() != current.token.expose_secret()
            && !state.spent.contains(&loaded.token.fingerprint())
        {
            return self.spend(state, exchange, &loaded).await;
        }
        fetched
    }

    async fn load(&self) -> Result<Option<Current>, BoxError> {
        let version = self.store.version();
        Ok(self.store.load().await?.map(|token| Current { token, version }))
    }

    async fn spend(
        &self,
        state: &mut State,
        exchange: &Exchange,
        current: &Current,
    ) -> Result<Fetched<Token>, SourceError> {
        state.current = Some(current.clone());
        state.unsaved = None;
        let Granted { fetched, refresh_token } = exchange.run(Some(&current.token)).await?;
        if let Some(token) = refresh_token {
            if state.spent.len() == MAX_SPENT {
                state.spent.pop_front();
            }
            state.spent.push_back(current.token.fingerprint());
            state.current = Some(Current { token: token.clone(), version: current.version });
            state.unsaved = Some(token);
        }
        Ok(fetched?)
    }

    async fn save(&self, token: &RefreshToken) {
        let mut guard = SaveGuard(Some(token));
        match timeout(TIME_LIMIT, self.store.save(token)).await {
            Ok(Ok(())) => guard.0 = None,
            Ok(Err(error)) => guard.report(&*error),
            Err(elapsed) => guard.report(&elapsed),
        }
    }
}

/// Raises an event unless the token reaches the store, also if the store panics.
struct SaveGuard<'a>(Option<&'a RefreshToken>);

impl SaveGuard<'_> {
    fn report(&mut self, error: &dyn Error) {
        if let Some(token) = self.0.take() {
            event::refresh_token_not_saved(token.id(), token.expose_secret(), error);
        }
    }
}

impl Drop for SaveGuard<'_> {
    fn drop(&mut self) {
        self.report(&*BoxError::from(SAVE_ABORTED));
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
