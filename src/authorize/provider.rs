//! Where a layer's credentials come from: a key, a token or both, at hand or to be waited for.

#[cfg(all(test, model))]
#[path = "loom_tests.rs"]
mod loom_tests;

use std::{
    cell::OnceCell,
    future::poll_fn,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use super::{sent::Sent, strip::Secrets};
use crate::{
    ApiKey, AuthError, AuthErrorKind, JwtProvider, PerSubject, Provider, Refreshing, Subject, Token,
    credential::Credential,
    refresh::{Demand, Lease, SubjectEngine, WaitForRefresh},
    telemetry::event,
    util::{clock::Time, per_thread::Unshared},
};

const NO_SUBJECT: &str = "the request has no `Subject` extension, and this layer sends one JWT per subject";
const ONE_FOR_ALL: &str =
    "the request has a `Subject` extension, and this layer sends the same credentials for all";

/// The credentials of one layer.
#[derive(Debug, Default)]
pub(crate) struct CredentialProvider {
    api_key: Option<Slot<ApiKey>>,
    jwt: Option<JwtSlot>,
}

#[derive(Debug)]
enum Slot<C: Credential> {
    Fixed(Unshared<Arc<Lease<C>>>),
    Refreshing(Refreshing<C>),
}

#[derive(Debug)]
enum JwtSlot {
    Shared(Slot<Token>),
    PerSubject(PerSubject),
}

/// Which of a layer's credentials a request needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    All,
    KeyOnly,
}

/// Credentials, or what to wait for.
pub(super) enum Lookup {
    Ready(Sent),
    Wait(Box<PendingCredentials>),
}

/// The refreshes that a request waits for before it looks up credentials again; none if it can do so at once.
pub(super) struct PendingCredentials {
    refreshes: [Option<WaitForRefresh>; 2],
    /// Keeps the subject from being evicted meanwhile.
    _subject: Option<SubjectEngine>,
}

impl CredentialProvider {
    pub(crate) fn new(api_key: Option<Provider<ApiKey>>, jwt: Option<JwtProvider>) -> Self {
        if let Some(Provider::Fixed(key)) = &api_key {
            event::fixed_key_in_use(key);
        }
        let jwt = jwt.map(|jwt| match jwt {
            JwtProvider::Shared(jwt) => JwtSlot::Shared(jwt.into()),
            JwtProvider::PerSubject(jwts) => JwtSlot::PerSubject(jwts),
        });
        Self { api_key: api_key.map(Into::into), jwt }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.api_key.is_none() && self.jwt.is_none()
    }

    pub(super) fn has_jwt(&self) -> bool {
        self.jwt.is_some()
    }

    /// Whether a credential may ever be replaced.
    pub(crate) fn refreshes(&self) -> bool {
        matches!(&self.api_key, Some(Slot::Refreshing(_)))
            || matches!(&self.jwt, Some(JwtSlot::PerSubject(_) | JwtSlot::Shared(Slot::Refreshing(_))))
    }

    /// Waits until a request could be sent with what all requests share.
    pub(crate) async fn prefetch(&self) -> Result<(), AuthError> {
        let scope = match &self.jwt {
            Some(JwtSlot::PerSubject(_)) => Scope::KeyOnly,
            _ => Scope::All,
        };
        loop {
            match self.lookup(scope, None)? {
                Lookup::Ready(_) => return Ok(()),
                Lookup::Wait(mut pending) => poll_fn(|cx| pending.poll(cx)).await?,
            }
        }
    }

    /// The credentials for a request: one consistent snapshot of key and token, or the refreshes to wait for. Starts
    /// refreshes that are due.
    #[inline]
    pub(super) fn lookup(&self, scope: Scope, subject: Option<&Subject>) -> Result<Lookup, AuthError> {
        let now = OnceCell::new();
        // The token first: then the key is no older than the one that the token was issued with.
        let (jwt, subject) = match (&self.jwt, scope) {
            (None, _) | (_, Scope::KeyOnly) => (Demand::Ready(None), None),
            (Some(JwtSlot::Shared(slot)), Scope::All) => (slot.demand(&now)?, None),
            (Some(JwtSlot::PerSubject(jwts)), Scope::All) => {
                let engine = jwts.engine(subject.ok_or_else(|| unavailable(NO_SUBJECT))?, &now)?;
                (leased(engine.demand(&now)?), Some(engine))
            }
        };
        let api_key = match &self.api_key {
            None => Demand::Ready(None),
            Some(slot) => slot.demand(&now)?,
        };
        match (api_key, jwt) {
            (Demand::Ready(api_key), Demand::Ready(jwt))
                if self.is_snapshot(jwt.as_deref(), subject.as_deref()) =>
            {
                Ok(Lookup::Ready(Sent { api_key, jwt, subject }))
            }
            (api_key, jwt) => {
                let refreshes = [wait_for(api_key), wait_for(jwt)];
                Ok(Lookup::Wait(Box::new(PendingCredentials { refreshes, _subject: subject })))
            }
        }
    }

    /// Whether key and token were current at the same time: the token has to be current still, after the key was read.
    /// Otherwise the token may have been replaced before the key, and the API may never have known the two together.
    #[inline]
    fn is_snapshot(&self, jwt: Option<&Lease<Token>>, subject: Option<&Refreshing<Token>>) -> bool {
        let engine = match &self.jwt {
            Some(JwtSlot::Shared(Slot::Refreshing(engine))) => Some(engine),
            _ => subject,
        };
        match (&self.api_key, engine, jwt) {
            (Some(Slot::Refreshing(_)), Some(engine), Some(jwt)) => engine.holds(jwt.fingerprint()),
            _ => true,
        }
    }

    /// Refuses a request that names a subject, where the credentials are the same for all.
    pub(super) fn refuse_subject(&self, subject: Option<&Subject>) -> Result<(), AuthError> {
        match (subject, &self.jwt) {
            (Some(_), None | Some(JwtSlot::Shared(_))) => Err(unavailable(ONE_FOR_ALL)),
            _ => Ok(()),
        }
    }

    /// All secrets that may not leave with a stripped request: the current ones and those replaced lately.
    #[cold]
    pub(super) fn secrets(&self, subject: Option<&Subject>) -> Secrets {
        let mut secrets = Secrets::default();
        if let Some(slot) = &self.api_key {
            slot.add_to(&mut secrets);
        }
        match &self.jwt {
            Some(JwtSlot::Shared(slot)) => slot.add_to(&mut secrets),
            Some(JwtSlot::PerSubject(jwts)) => {
                secrets.extend_current(subject.and_then(|subject| jwts.current(subject)).map(|jwt| jwt.0));
            }
            None => {}
        }
        secrets
    }
}

impl<C: Credential> Slot<C> {
    #[inline]
    fn demand(&self, now: &OnceCell<Time>) -> Result<Demand<Option<Arc<Lease<C>>>>, AuthError> {
        match self {
            Self::Fixed(lease) => Ok(Demand::Ready(Some(Arc::clone(lease.local())))),
            Self::Refreshing(refreshing) => refreshing.demand(now).map(leased),
        }
    }

    fn add_to(&self, secrets: &mut Secrets) {
        match self {
            Self::Fixed(lease) => secrets.extend_current([lease.original().credential.secret().clone()]),
            Self::Refreshing(refreshing) => {
                secrets.extend_current(refreshing.current().map(|credential| credential.secret().clone()));
                secrets.extend_replaced(refreshing.recently_replaced());
            }
        }
    }
}

impl<C: Credential> From<Provider<C>> for Slot<C> {
    fn from(provider: Provider<C>) -> Self {
        match provider {
            Provider::Fixed(credential) => Self::Fixed(Unshared::per_thread(Lease::fixed(credential))),
            Provider::Refreshing(refreshing) => Self::Refreshing(refreshing),
        }
    }
}

impl PendingCredentials {
    /// Waits until the credentials can be looked up again. Fails if a refresh failed.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), AuthError>> {
        for refresh in &mut self.refreshes {
            if let Some(wait) = refresh {
                ready!(Pin::new(wait).poll(cx))?;
                *refresh = None;
            }
        }
        Poll::Ready(Ok(()))
    }
}

#[inline]
fn leased<C: Credential>(demand: Demand<Arc<Lease<C>>>) -> Demand<Option<Arc<Lease<C>>>> {
    match demand {
        Demand::Ready(lease) => Demand::Ready(Some(lease)),
        Demand::Wait(in_flight) => Demand::Wait(in_flight),
    }
}

fn wait_for<T>(demand: Demand<T>) -> Option<WaitForRefresh> {
    match demand {
        Demand::Ready(_) => None,
        Demand::Wait(in_flight) => Some(WaitForRefresh::new(in_flight)),
    }
}

#[cold]
pub(super) fn unavailable(detail: &'static str) -> AuthError {
    AuthError::local(AuthErrorKind::CredentialUnavailable, detail)
}
