//! When a credential is refreshed, from what is known of its lifetime.

use std::time::{Duration, SystemTime};

use super::RefreshPolicy;
use crate::util::clock::{Deadline, LONG, Time};

/// The shortest advisory window: room for one refresh before any was timed.
const MIN_ADVISORY_WINDOW: Duration = Duration::from_secs(1);

/// A credential with a shorter lifetime would expire on its way to a waiter.
const MIN_LIFETIME: Duration = Duration::from_millis(100);

/// The shortest time between refreshes; for lifetimes below one second, the same fraction of the lifetime.
const MIN_REFRESH_INTERVAL: Duration = Duration::from_millis(400);

/// A credential that a source just fetched.
#[derive(Clone, Debug)]
pub(super) struct Fresh<V> {
    pub(super) value: V,
    /// When it expires by its own claims.
    pub(super) expiry: Option<SystemTime>,
    /// The time from issue to expiry by its own claims.
    pub(super) claimed_lifetime: Option<Duration>,
    /// How long it lives from now on, as its source says.
    pub(super) stated_lifetime: Option<Duration>,
    /// After this time the source may have another one.
    pub(super) recheck: Option<Duration>,
    /// Whether it lives until it is replaced if nothing states its expiry.
    pub(super) may_last: bool,
}

/// The points in the life of a credential.
#[derive(Clone, Copy, Debug)]
pub(super) struct Schedule {
    fetched: Time,
    advisory: Duration,
    mandatory: Duration,
    /// How long the credential lived when it was fetched.
    pub(super) lifetime: Duration,
    /// Whether the credential or its source said when it expires.
    pub(super) expires: bool,
    /// How often the source wants to be asked.
    pub(super) recheck: Option<Duration>,
}

/// Why a credential cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unusable {
    Expired,
    NoExpiry,
}

impl Schedule {
    /// `last_refresh` is how long the last refresh took; `random` lies between 0 and 1.
    pub(super) fn new<V>(
        fresh: &Fresh<V>,
        now: Time,
        last_refresh: Duration,
        random: f64,
        policy: &RefreshPolicy,
    ) -> Result<Self, Unusable> {
        let known = remaining_lifetime(fresh, now, policy)?;
        let lifetime = known.unwrap_or(LONG).min(LONG);
        if lifetime < MIN_LIFETIME {
            return Err(Unusable::Expired);
        }

        let (mut advisory, mut mandatory) = (lifetime, lifetime);
        if known.is_some() {
            let whole = fresh.claimed_lifetime.unwrap_or(lifetime).clamp(lifetime, LONG);
            let advisory_window = (whole / 10)
                .min(policy.advisory)
                .max(MIN_ADVISORY_WINDOW.max(last_refresh.saturating_mul(2)))
                .min(whole / 2);
            let mandatory_window = (advisory_window / 10).min(policy.mandatory);
            let jitter = advisory_window.mul_f64(policy.jitter * random);
            advisory = lifetime.saturating_sub(advisory_window + jitter);
            if !advisory.is_zero() {
                let interval = MIN_REFRESH_INTERVAL.min(lifetime.mul_f64(MIN_REFRESH_INTERVAL.as_secs_f64()));
                advisory = advisory.max(interval);
            }
            mandatory = lifetime.saturating_sub(mandatory_window);
        }
        if let Some(recheck) = fresh.recheck {
            advisory = recheck.min(lifetime);
            // After an idle period, block until the source has been asked again.
            mandatory = recheck.saturating_mul(2).min(lifetime);
        }
        let expires = known.is_some();
        Ok(Self { fetched: now, advisory, mandatory, lifetime, expires, recheck: fresh.recheck })
    }

    /// From here on a refresh runs in the background.
    pub(super) fn advisory_at(&self) -> Deadline {
        self.fetched.after(self.advisory)
    }

    /// From here on callers wait for the refresh.
    pub(super) fn mandatory_at(&self) -> Deadline {
        self.fetched.after(self.mandatory)
    }

    /// From here on the credential is not handed out.
    pub(super) fn expires_at(&self) -> Deadline {
        self.fetched.after(self.lifetime)
    }
}

/// How long the credential still lives; `None` if it does not expire.
fn remaining_lifetime<V>(
    fresh: &Fresh<V>,
    now: Time,
    policy: &RefreshPolicy,
) -> Result<Option<Duration>, Unusable> {
    let claimed = fresh.claimed_lifetime.unwrap_or(LONG);
    if let Some(stated) = fresh.stated_lifetime {
        return Ok(Some(stated.min(claimed)));
    }
    match fresh.expiry {
        // A clock that is behind sees the expiry too far away, but no token lives longer than its claims say.
        Some(expiry) => Ok(Some(expiry.duration_since(now.wall).unwrap_or_default().min(claimed))),
        None if fresh.may_last => Ok(None),
        None => policy.assumed_lifetime.map(Some).ok_or(Unusable::NoExpiry),
    }
}
