//! [`FleetSource`]: a source that one member of a fleet asks for all.

use std::{
    fmt,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use super::{
    member::{Decision, Lead, Member, RecordError},
    protocol::{Ask, Fetch, Step},
    record::{Failure, SharedToken},
};
use crate::{
    credential::Token,
    error::{Redactor, with_causes},
    oauth::{is_rejected, may_be_spent},
    source::{EngineHandle, Fetched, Reason, Source, SourceError},
    telemetry::event::{self, FleetFetch},
    util::timer::{TimeoutError, has_timers, sleep},
};

/// Before a follower looks again. Grows by half each time, up to the second.
const LOOK_AGAIN: [Duration; 2] = [Duration::from_millis(10), Duration::from_millis(250)];

const LOGGED_OUT: &str = "nobody has logged in to the fleet's credential: log in";
const SPARED: &str = "another member may have spent the fleet's refresh token: it is sent again when its access token has expired";

/// How long until a spared refresh token is asked for again.
const SPARE_FOR: Duration = Duration::from_secs(5);

/// How long before the access token expires a fetch waits for it, so that requests wait, too, instead of failing in between.
const WAIT_FOR_EXPIRY: Duration = Duration::from_secs(1);

/// A source that one member of the fleet asks for all; see [`Fleet::share`](super::Fleet::share).
///
/// # Cancel safety
///
/// Dropping a fetch drops the fetch of the inner source, and gives the lease to another member.
pub struct FleetSource<S> {
    pub(super) member: Arc<Member>,
    pub(super) source: S,
}

impl<S: Source<Token>> FleetSource<S> {
    /// Fetches without the fleet, because its store fails.
    async fn fetch_alone(
        &self,
        ask: Ask,
        reason: Reason<Token>,
        error: RecordError,
    ) -> Result<Fetched<Token>, SourceError> {
        if self.member.has_login {
            // Another member may be spending the refresh token.
            return Err(error.into());
        }
        event::fleet_fetched(FleetFetch::Alone);
        let fetched = self.source.fetch(reason).await?;
        self.member.keep(ask, self.shared(&fetched)).await;
        Ok(fetched)
    }

    /// Fetches for the fleet. `None` if another member was faster, or the login has changed meanwhile.
    async fn fetch_for_all(
        &self,
        lead: &Lead,
        reason: Reason<Token>,
    ) -> Option<Result<Fetched<Token>, SourceError>> {
        event::fleet_fetched(FleetFetch::Led);
        let result = self.source.fetch(reason).await;
        let fetch = match &result {
            Ok(fetched) => Fetch::Done(self.shared(fetched)),
            Err(error) => Fetch::Failed {
                message: Redactor::masking(None).text(with_causes(error)),
                permanent: self.member.has_login && is_rejected(error),
                retry_after: error.retry_after(),
                unanswered: may_be_spent(error),
            },
        };
        lead.settle(&fetch).await.then_some(result)
    }

    fn shared(&self, fetched: &Fetched<Token>) -> SharedToken {
        SharedToken::new(fetched, self.member.identity.get().copied())
    }
}

/// Reports what the fleet knows to have failed.
fn failed(Failure { message, permanent, rest, .. }: Failure) -> SourceError {
    let error = format!("another member of the fleet failed: {message}");
    let error = if permanent { SourceError::permanent(error) } else { SourceError::transient(error) };
    error.with_retry_after(rest)
}

impl<S: Source<Token>> Source<Token> for FleetSource<S> {
    async fn fetch(&self, reason: Reason<Token>) -> Result<Fetched<Token>, SourceError> {
        if !has_timers() {
            return Err(SourceError::transient(TimeoutError::NoTimers));
        }
        self.member.fleet.watch();
        let ask = match &reason {
            Reason::First => Ask::First,
            Reason::Expiring(token) => Ask::Expiring(token.0.fingerprint().into()),
            Reason::Rejected(token) => Ask::Rejected(token.0.fingerprint().into()),
        };
        let [mut pause, max] = LOOK_AGAIN;
        let mut looks = false;
        loop {
            let step = match self.member.decide(ask, looks).await {
                Ok(Decision::Lead(lead)) => match self.fetch_for_all(&lead, reason.clone()).await {
                    Some(result) => return result,
                    None => Step::Follow,
                },
                Ok(Decision::Step(step)) => step,
                Err(error) => return self.fetch_alone(ask, reason, error).await,
            };
            match step {
                Step::Adopt(token) => {
                    event::fleet_fetched(FleetFetch::Adopted);
                    let invalid = || SourceError::transient("the fleet's token is not valid here");
                    return token.fetched().ok_or_else(invalid);
                }
                Step::Follow | Step::Claim(_) => {
                    sleep(pause.mul_f64(0.75 + fastrand::f64() / 2.0)).await;
                    pause = max.min(pause * 3 / 2);
                    looks = true;
                }
                Step::Fail(failure) => return Err(failed(failure)),
                Step::LoggedOut => return Err(SourceError::permanent(LOGGED_OUT)),
                Step::Spare => {
                    let rest = self.member.token_rest().await.unwrap_or(SPARE_FOR);
                    if rest > WAIT_FOR_EXPIRY {
                        let pause = SPARE_FOR.min(rest - WAIT_FOR_EXPIRY);
                        return Err(SourceError::transient(SPARED).with_retry_after(pause));
                    }
                    sleep(rest).await;
                    looks = true;
                }
            }
        }
    }

    fn version(&self) -> u64 {
        // A source with a login counts the same changes, in the lower bits. They must not cancel each other out.
        self.source.version() ^ self.member.changes.load(Ordering::Acquire).rotate_left(32)
    }

    fn identity(&self) -> Option<String> {
        self.source.identity()
    }

    fn attach(&self, engine: EngineHandle<Token>) {
        self.member.attach(engine.clone());
        self.source.attach(engine);
    }
}

impl<S> fmt::Debug for FleetSource<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FleetSource").field("has_login", &self.member.has_login).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        fleet::{Fleet, FleetLogin, MemoryStore, SealingKey},
        oauth::{RefreshToken, RefreshTokenStore},
    };

    /// Combines its version with that of its login, as `OAuthSource` does.
    struct Versioned(FleetLogin);

    impl Source<Token> for Versioned {
        async fn fetch(&self, _: Reason<Token>) -> Result<Fetched<Token>, SourceError> {
            Err(SourceError::transient("it is not asked for a token"))
        }

        fn version(&self) -> u64 {
            u64::MAX ^ RefreshTokenStore::version(&self.0)
        }
    }

    /// N4: a new login ends the permanent failure of the one before.
    #[tokio::test]
    async fn each_login_changes_the_version() {
        let fleet = Fleet::new("billing", MemoryStore::default(), SealingKey::new([1; 32])).unwrap();
        let source = fleet.share_login("selam", Versioned);
        let mut versions = vec![source.version()];
        for login in ["first", "second", "third"] {
            fleet.log_in("selam", &RefreshToken::new(login).unwrap()).await.unwrap();
            assert!(source.fetch(Reason::First).await.is_err());
            versions.push(source.version());
        }
        versions.dedup();
        assert_eq!(versions.len(), 4, "{versions:?}");
    }
}
