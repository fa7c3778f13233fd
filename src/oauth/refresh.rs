//! Refresh tokens: each spent once, none lost.

use std::time::Duration;

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
    clock::{Clock, Time},
    engine::on_behalf,
    event,
    source::{Fetched, SourceError},
};

/// An exchange that nobody waits for any more ends after this time, and so does the saving of a token.
const LIMIT: Duration = Duration::from_secs(2 * 60);

const LOGGED_OUT: &str = "there is no refresh token: log in";
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
    unclaimed: Option<(Fetched<Token>, Time)>,
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
        let fetched = match state.claim() {
            Some(fetched) => Ok(fetched),
            None => timeout(LIMIT, self.exchange(&mut state, source))
                .await
                .unwrap_or_else(|_| Err(Trouble::Failed(SourceError::transient(TOO_LONG)))),
        };
        if let Err(Ok(unclaimed)) = tell.send(fetched.map_err(Into::into)) {
            state.unclaimed = Some((unclaimed, Clock::default().now()));
        }
        // Whoever was told does not wait for this; the next exchange does, by the lock.
        if let Some(token) = state.unsaved.take() {
            self.save(&token).await;
        }
    }

    async fn exchange(&self, state: &mut State, source: &OAuthSource) -> Result<Fetched<Token>, Trouble> {
        let version = self.store.version();
        let held = match &state.held {
            Some(held) if held.version == version => held.clone(),
            _ => match self.load().await {
                Ok(Some(loaded)) => loaded,
                Ok(None) => return Err(Trouble::Failed(SourceError::permanent(LOGGED_OUT))),
                Err(error) => return Err(Trouble::Failed(SourceError::transient(error))),
            },
        };
        match self.spend(state, source, &held).await {
            Err(Trouble::Refused(error)) if error.code() == Some("invalid_grant") => {
                // Another program may have spent it, and stored the next.
                match self.load().await {
                    Ok(Some(loaded)) if loaded.token.expose_secret() != held.token.expose_secret() => {
                        self.spend(state, source, &loaded).await
                    }
                    _ => Err(Trouble::Refused(error)),
                }
            }
            result => result,
        }
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
        let Granted { fetched, refresh_token } = source.exchange(Some(&held.token)).await?;
        // Of a login that another has replaced meanwhile, nothing is kept.
        if let Some(token) = refresh_token.filter(|_| self.store.version() == held.version) {
            state.held = Some(Held { token: token.clone(), version: held.version });
            state.unsaved = Some(token);
        }
        fetched.map_err(Trouble::Refused)
    }

    async fn save(&self, token: &RefreshToken) {
        match timeout(LIMIT, self.store.save(token)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => event::refresh_token_not_saved(token, &*error),
            Err(late) => event::refresh_token_not_saved(token, &late),
        }
    }
}

impl State {
    /// What was fetched for somebody who has left, if it is of use still.
    fn claim(&mut self) -> Option<Fetched<Token>> {
        let (mut fetched, since) = self.unclaimed.take()?;
        let waited = Clock::default().now().since(since);
        if let Some(lifetime) = &mut fetched.lifetime {
            *lifetime = lifetime.saturating_sub(waited);
        }
        let over = fetched.lifetime.is_some_and(|lifetime| lifetime.is_zero());
        (!over).then_some(fetched)
    }
}
