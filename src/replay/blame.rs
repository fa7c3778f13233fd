//! Which credential a 401 blames, and what is done about it.

use std::sync::Arc;

use http::StatusCode;

use crate::{
    AuthErrorKind,
    authorize::Sent,
    credential::Fingerprint,
    refresh::{Engine, InFlight, Rejection},
};

/// A credential that the API rejected, and the engine that can replace it.
pub(crate) struct Blame {
    engine: Arc<dyn Engine>,
    rejected: Fingerprint,
}

impl Blame {
    /// Decides which of the credentials that were `sent` a 401 of this kind blames; `None` if that one cannot be replaced.
    ///
    /// See [`AuthErrorKind`] for the table. A 401 that is not about the credential itself blames none: neither does a missing
    /// permission come with the next one, nor was the credential rejected.
    pub(crate) fn assign(sent: &Sent, kind: AuthErrorKind) -> Option<Self> {
        let Sent { api_key, jwt, .. } = sent;
        let key = || Some((api_key.as_ref()?.engine()?, api_key.as_ref()?.fingerprint()));
        let (engine, rejected) = match (kind, jwt) {
            (AuthErrorKind::TokenRejected | AuthErrorKind::Unauthorized, Some(jwt)) => {
                Some((jwt.engine()?, jwt.fingerprint()))
            }
            (
                AuthErrorKind::InvalidApiKey | AuthErrorKind::TokenRejected | AuthErrorKind::Unauthorized,
                _,
            ) => key(),
            _ => None,
        }?;
        Some(Self { engine, rejected })
    }

    /// Whether any 401 could lead to another credential.
    pub(crate) fn is_possible(sent: &Sent) -> bool {
        sent.api_key.as_ref().is_some_and(|key| key.engine().is_some())
            || sent.jwt.as_ref().is_some_and(|jwt| jwt.engine().is_some())
    }

    /// Reports the rejection to the engine. Returns the refresh to wait for, if there is one.
    pub(crate) fn reject(&self) -> (Rejection, Option<InFlight>) {
        Arc::clone(&self.engine).report_rejected(self.rejected)
    }

    /// Whether the engine has another credential by now.
    pub(crate) fn has_replacement(&self) -> bool {
        self.engine.has_replaced(self.rejected)
    }

    /// Reports to the engine that the replacement was accepted.
    pub(crate) fn accept(&self) {
        self.engine.report_accepted(self.rejected);
    }
}

/// Whether the API accepted the credentials. A server that fails, limits or redirects may not have looked at them.
pub(crate) fn is_accepted(status: StatusCode) -> bool {
    status.is_success() || status == StatusCode::SWITCHING_PROTOCOLS
}
