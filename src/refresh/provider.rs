//! What the layers take: fixed and refreshing credentials, shared or per subject.

use std::cell::OnceCell;

use tokio::runtime::Handle;

use super::{PerSubject, Refreshing, in_flight::WaitForRefresh};
use crate::{AuthError, Token, credential::Credential};

/// A credential for a layer: fixed, or one that refreshes itself.
#[doc(alias("TokenProvider"))]
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Provider<C: Credential> {
    /// It never changes.
    Fixed(C),
    /// It refreshes itself.
    Refreshing(Refreshing<C>),
}

impl<C: Credential> Provider<C> {
    /// Returns the credential, after a refresh if one is due.
    ///
    /// # Errors and cancel safety
    ///
    /// As [`Refreshing::token`].
    pub async fn get(&self) -> Result<C, AuthError> {
        match self {
            Self::Fixed(credential) => Ok(credential.clone()),
            Self::Refreshing(refreshing) => refreshing.obtain().await,
        }
    }

    /// Returns the current credential without starting a refresh.
    #[must_use]
    pub fn current(&self) -> Option<C> {
        match self {
            Self::Fixed(credential) => Some(credential.clone()),
            Self::Refreshing(refreshing) => refreshing.current(),
        }
    }

    /// Reports `rejected` to the engine and waits for the refresh. Returns whether there is another credential then.
    pub(crate) async fn replace(&self, rejected: &C) -> bool {
        let Self::Refreshing(refreshing) = self else { return false };
        let rejected = rejected.secret().fingerprint();
        if let (_, Some(in_flight)) = refreshing.0.reject(rejected) {
            // Whether it succeeded shows in the current credential.
            let _ = WaitForRefresh::new(in_flight).await;
        }
        refreshing.current().is_some_and(|current| current.secret().fingerprint() != rejected)
    }

    /// Reports to the engine that the credential which replaced `rejected` was accepted.
    pub(crate) fn accepted_after(&self, rejected: &C) {
        if let Self::Refreshing(refreshing) = self {
            let rejected = rejected.secret().fingerprint();
            refreshing.0.accept(|accepted| accepted != rejected);
        }
    }

    /// A number that changes with the credential; `None` while there is none. Starts a refresh if one is due, because the
    /// caller may be the only one who asks.
    pub(crate) fn version(&self) -> Option<u64> {
        if let Self::Refreshing(refreshing) = self
            && Handle::try_current().is_ok()
        {
            let _ = refreshing.demand(&OnceCell::new());
        }
        self.current().map(|credential| credential.secret().fingerprint().number())
    }
}

/// The JWTs of a layer.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum JwtProvider {
    /// One for all requests.
    Shared(Provider<Token>),
    /// One for each subject.
    PerSubject(PerSubject),
}

impl_from! {
    Provider<C>: [C: Credential] C, credential => Self::Fixed(credential);
    Provider<C>: [C: Credential] Refreshing<C>, refreshing => Self::Refreshing(refreshing);
    Provider<C>: [C: Credential] &Refreshing<C>, refreshing => Self::Refreshing(refreshing.clone());

    JwtProvider: [] Token, jwt => Self::Shared(jwt.into());
    JwtProvider: [] Refreshing<Token>, jwt => Self::Shared(jwt.into());
    JwtProvider: [] &Refreshing<Token>, jwt => Self::Shared(jwt.into());
    JwtProvider: [] Provider<Token>, jwt => Self::Shared(jwt);
    JwtProvider: [] PerSubject, jwts => Self::PerSubject(jwts);
    JwtProvider: [] &PerSubject, jwts => Self::PerSubject(jwts.clone());
}
