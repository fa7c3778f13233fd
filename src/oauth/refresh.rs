//! Refresh tokens: each spent once, none lost.

use std::{collections::VecDeque, error::Error, time::Duration};

use tokio::{
    runtime::Handle,
    sync::{Mutex, oneshot},
    time::timeout,
};

use super::{
    OAuthSource, RefreshToken, RefreshTokenStore, answer::Granted, source::Trouble, store::DynStore,
};
use crate::{
    BoxError, Token,
    credential::Fingerprint,
    refresh::on_behalf,
    source::{Fetched, SourceError},
    telemetry::event,
    util::clock::{Clock, Time},
};

/// An exchange that nobody waits for any more ends after this time, and so does the saving of a token.
const LIMIT: Duration = Duration::from_secs(2 * 60);

/// So many spent tokens are remembered.
const REMEMBERED: usize = 16;

const LOGGED_OUT: &str = "there is no refresh token: log in";
const REPLACED: &str = "somebody logs in time and again";
const NO_RUNTIME: &str = "an exchange of refresh tokens needs a tokio runtime, and there is none here";
const ENDED: &str = "the exchange of the refresh token panicked, or its runtime was shut down";
const TOO_LONG: &str = "the token endpoint, or the store of refresh tokens, did not answer";

/// The refresh token of one login, and who exchanges it.
pub(super) struct Rotation {
    store: Box<dyn DynStore>,
    /// Held by the exchange that is running.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    held: Option<Held>,
    /// The endpoint has given it, and the store does not have it yet.
    unsaved: Option<RefreshToken>,
    /// Fetched for somebody who has left.
    unclaimed: Option<Unclaimed>,
    /// Those that were exchanged last: whoever finds one of them in the store does not spend it again.
    spent: VecDeque<Fingerprint>,
}

struct Unclaimed {
    fetched: Fetched<Token>,
    since: Time,
    /// Of the login that it was fetched for.
    version: u64,
}

/// The newest token.
#[derive(Clone)]
struct Held {
    token: RefreshToken,
    /// The store's, when it was loaded from there.
    version: u64,
}

impl Rotation {
    pub(super) fn new(store: impl RefreshTokenStore) -> Self {
        Self { store: Box::new(store), state: Mutex::default() }
    }

    pub(super) fn version(&self) -> u64 {
        self.store.version()
    }

    /// Exchanges the refresh token of `source`, on a task of its own: whoever leaves, the new one is kept.
    pub(super) async fn fetch(source: OAuthSource) -> Result<Fetched<Token>, SourceError> {
        let Ok(runtime) = Handle::try_current() else { return Err(SourceError::transient(NO_RUNTIME)) };
        let (tell, told) = oneshot::channel();
        runtime.spawn(on_behalf(async move {
            if let Some(rotation) = source.rotation() {
                rotation.run(&source, tell).await;
            }
        }));
        told.await.unwrap_or_else(|_| Err(SourceError::transient(ENDED)))
    }

    async fn run(&self, source: &OAuthSource, tell: oneshot::Sender<Result<Fetched<Token>, SourceError>>) {
        let mut state = self.state.lock().await;
        if tell.is_closed() {
            // It has left before its turn came: nothing is spent for it.
            return;
        }
        let fetched = match state.claim(self.store.version()) {
            Some(fetched) => Ok(fetched),
            None => timeout(LIMIT, self.exchange(&mut state, source))
                .await
                .unwrap_or_else(|_| Err(Trouble::Failed(SourceError::transient(TOO_LONG)))),
        };
        let version = state.held.as_ref().map_or(0, |held| held.version);
        if let Err(Ok(fetched)) = tell.send(fetched.map_err(Into::into)) {
            state.unclaimed = Some(Unclaimed { fetched, since: Clock::default().now(), version });
        }
        // Whoever was told does not wait for this; the next exchange does, by the lock.
        if let Some(token) = state.unsaved.take()
            && self.store.version() == version
        {
            self.save(&token).await;
        }
    }

    /// Spends the newest token. Of a login that another replaces meanwhile, nothing is handed out: once more, with that.
    async fn exchange(&self, state: &mut State, source: &OAuthSource) -> Result<Fetched<Token>, Trouble> {
        for _ in 0..2 {
            let fetched = self.exchange_once(state, source).await;
            if state.held.as_ref().is_none_or(|held| held.version == self.store.version()) {
                return fetched;
            }
        }
        Err(Trouble::Failed(SourceError::transient(REPLACED)))
    }

    async fn exchange_once(
        &self,
        state: &mut State,
        source: &OAuthSource,
    ) -> Result<Fetched<Token>, Trouble> {
        let version = self.store.version();
        let held = match &state.held {
            Some(held) if held.version == version => held.clone(),
            _ => match self.load().await {
                Ok(Some(loaded)) => loaded,
                Ok(None) => return Err(Trouble::Failed(SourceError::permanent(LOGGED_OUT))),
                Err(error) => return Err(Trouble::Failed(SourceError::transient(error))),
            },
        };
        let fetched = self.spend(state, source, &held).await;
        if let Err(Trouble::Refused(error)) = &fetched
            && error.code() == Some("invalid_grant")
            // Another program may have spent it, and stored the next.
            && let Ok(Some(loaded)) = self.load().await
            && loaded.token.expose_secret() != held.token.expose_secret()
            && !state.spent.contains(&loaded.token.fingerprint())
        {
            return self.spend(state, source, &loaded).await;
        }
        fetched
    }

    async fn load(&self) -> Result<Option<Held>, BoxError> {
        let version = self.store.version();
        Ok(self.store.load().await?.map(|token| Held { token, version }))
    }

    async fn spend(
        &self,
        state: &mut State,
        source: &OAuthSource,
        held: &Held,
    ) -> Result<Fetched<Token>, Trouble> {
        state.held = Some(held.clone());
        state.unsaved = None;
        let Granted { fetched, refresh_token } = source.exchange(Some(&held.token)).await?;
        if let Some(token) = refresh_token {
            if state.spent.len() == REMEMBERED {
                state.spent.pop_front();
            }
            state.spent.push_back(held.token.fingerprint());
            state.held = Some(Held { token: token.clone(), version: held.version });
            state.unsaved = Some(token);
        }
        fetched.map_err(Trouble::Refused)
    }

    async fn save(&self, token: &RefreshToken) {
        let mut unsaved = Unsaved(Some(token));
        match timeout(LIMIT, self.store.save(token)).await {
            Ok(Ok(())) => unsaved.0 = None,
            Ok(Err(error)) => unsaved.because(&*error),
            Err(late) => unsaved.because(&late),
        }
    }
}

/// A token on its way to the store: it raises an event if it does not arrive, by a panic of the store's, too.
struct Unsaved<'a>(Option<&'a RefreshToken>);

impl Unsaved<'_> {
    fn because(&mut self, error: &dyn Error) {
        if let Some(token) = self.0.take() {
            event::refresh_token_not_saved(token, error);
        }
    }
}

impl Drop for Unsaved<'_> {
    fn drop(&mut self) {
        self.because(&*BoxError::from("the store panicked, or its runtime was shut down"));
    }
}

impl State {
    /// What was fetched for somebody who has left, if it is of use still.
    fn claim(&mut self, version: u64) -> Option<Fetched<Token>> {
        let Unclaimed { mut fetched, since, .. } =
            self.unclaimed.take().filter(|held| held.version == version)?;
        let now = Clock::default().now();
        let waited = now.since(since).saturating_add(now.unseen_since(since));
        if let Some(lifetime) = &mut fetched.lifetime {
            *lifetime = lifetime.saturating_sub(waited);
        }
        // Of one that does not say how long it lives, nobody knows what is left.
        let known = fetched.lifetime.is_some() || fetched.credential.expires_at().is_some();
        let over = fetched.lifetime.is_some_and(|lifetime| lifetime.is_zero());
        (known && !over).then_some(fetched)
    }
}
