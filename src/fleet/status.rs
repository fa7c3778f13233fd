//! [`Status`]: what a fleet knows of a credential, without secrets.

use std::{fmt, time::Duration};

use super::record::Record;
use crate::{KeyId, util::clock::now};

/// What a fleet knows of a credential, without secrets. `Display` shows it on one line.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Status {
    /// Grows with each new token and login.
    pub generation: u64,
    /// The current token's id.
    pub token: Option<KeyId>,
    /// The rest of its lifetime, if that is known.
    pub expires_in: Option<Duration>,
    /// The id of the refresh token.
    pub refresh_token: Option<KeyId>,
    /// Whether a member may have spent the refresh token without an answer.
    pub is_maybe_spent: bool,
    /// Whether a member is fetching the next token.
    pub is_refreshing: bool,
    /// Why the last fetch failed, if it did.
    pub failure: Option<String>,
    /// For how long nobody fetches because of that.
    pub retry_in: Option<Duration>,
}

impl Status {
    pub(super) fn of(record: &Record) -> Self {
        let token =
            record.token.as_ref().and_then(|token| Some((token.lifetime, token.fetched()?.credential)));
        let claimed =
            |expires_at: std::time::SystemTime| expires_at.duration_since(now()).unwrap_or_default();
        let failure = record.failure.as_ref();
        Self {
            generation: record.generation,
            token: token.as_ref().map(|(_, token)| token.id()),
            expires_in: token
                .and_then(|(lifetime, token)| lifetime.or_else(|| token.expires_at().map(claimed))),
            refresh_token: record.login.as_ref().and_then(|login| Some(login.token()?.id())),
            is_maybe_spent: record.login.as_ref().is_some_and(|login| login.maybe_spent),
            is_refreshing: record.lease.is_some_and(|lease| !lease.rest.is_zero()),
            failure: failure.map(|failure| failure.message.clone()),
            retry_in: failure.map(|failure| failure.rest),
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "generation {}", self.generation)?;
        match self.token {
            Some(id) => write!(f, ", token {id}")?,
            None => f.write_str(", no token")?,
        }
        if let Some(rest) = self.expires_in {
            write!(f, " for {}", humantime::format_duration(Duration::from_secs(rest.as_secs())))?;
        }
        if let Some(id) = self.refresh_token {
            write!(f, ", refresh token {id}")?;
        }
        if self.is_maybe_spent {
            f.write_str(" (maybe spent)")?;
        }
        if self.is_refreshing {
            f.write_str(", being refreshed")?;
        }
        if let Some(failure) = &self.failure {
            write!(f, ", failed: {failure}")?;
        }
        Ok(())
    }
}
