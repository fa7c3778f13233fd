//! From what is known of a credential to when it is renewed.

use std::time::{Duration, SystemTime};

use super::RefreshPolicy;
use crate::util::clock::{Deadline, LONG, Time};

/// An advisory window is at least so long: enough for one renewal before any was timed.
const ONE_RENEWAL: Duration = Duration::from_secs(1);

/// What lives no longer than this expires on its way to whoever waits for it.
const TOO_BRIEF: Duration = Duration::from_millis(100);

/// Another is not fetched sooner than this; for a lifetime below one second, sooner than the same part of that.
const SPACING: Duration = Duration::from_millis(400);

/// A credential as it came from its source.
#[derive(Clone, Debug)]
pub(super) struct Offer<V> {
    pub(super) value: V,
    /// When it expires by its own word.
    pub(super) expiry: Option<SystemTime>,
    /// How long it lives from its issue by its own word.
    pub(super) lifetime: Option<Duration>,
    /// How long it still lives by its source's word.
    pub(super) stated: Option<Duration>,
    /// Another may stand in its place after this time.
    pub(super) recheck: Option<Duration>,
    /// Without an expiry it lives until it is rejected.
    pub(super) lasting: bool,
}

/// When what is to be done with it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Schedule {
    /// When it came; all else is so long after that.
    came: Time,
    renew: Span,
    wait: Span,
    expire: Span,
    /// Whether it said, or its source, when it expires.
    pub(super) expires: bool,
}

/// A [`Duration`] in half the room: in nanoseconds, of which there are enough for centuries.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Span(u64);

impl From<Duration> for Span {
    fn from(time: Duration) -> Self {
        Self(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))
    }
}

impl From<Span> for Duration {
    fn from(Span(nanos): Span) -> Self {
        Self::from_nanos(nanos)
    }
}

/// Why it is of no use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unfit {
    Expired,
    NoExpiry,
}

impl Schedule {
    /// `took` is how long the last renewal took, `chance` lies between 0 and 1.
    pub(super) fn new<V>(
        offer: &Offer<V>,
        now: Time,
        took: Duration,
        chance: f64,
        policy: &RefreshPolicy,
    ) -> Result<Self, Unfit> {
        let lives = lifetime(offer, now, policy)?;
        let expire = lives.unwrap_or(LONG).min(LONG);
        if expire < TOO_BRIEF {
            return Err(Unfit::Expired);
        }

        let (mut renew, mut wait) = (expire, expire);
        if lives.is_some() {
            let whole = offer.lifetime.unwrap_or(expire).clamp(expire, LONG);
            let advisory =
                (whole / 10).min(policy.advisory).max(ONE_RENEWAL.max(took.saturating_mul(2))).min(whole / 2);
            let mandatory = (advisory / 10).min(policy.mandatory);
            renew = expire.saturating_sub(advisory + advisory.mul_f64(policy.jitter * chance));
            if !renew.is_zero() {
                renew = renew.max(SPACING.min(expire.mul_f64(SPACING.as_secs_f64())));
            }
            wait = expire.saturating_sub(mandatory);
        }
        if let Some(recheck) = offer.recheck {
            renew = recheck.min(expire);
            // Whoever comes after a pause had better have what stands there now.
            wait = recheck.saturating_mul(2).min(expire);
        }
        let [renew, wait, expire] = [renew, wait, expire].map(Span::from);
        Ok(Self { came: now, renew, wait, expire, expires: lives.is_some() })
    }

    /// A renewal runs beside.
    pub(super) fn renew(&self) -> Deadline {
        self.came.after(self.renew.into())
    }

    /// Callers wait for the renewal.
    pub(super) fn wait(&self) -> Deadline {
        self.came.after(self.wait.into())
    }

    /// It is not handed out any more.
    pub(super) fn expire(&self) -> Deadline {
        self.came.after(self.expire.into())
    }

    /// How long it lived when it came.
    pub(super) fn lifetime(&self) -> Duration {
        self.expire.into()
    }
}

/// How long the credential still lives; `None` for one that does not expire.
fn lifetime<V>(offer: &Offer<V>, now: Time, policy: &RefreshPolicy) -> Result<Option<Duration>, Unfit> {
    let of_issue = offer.lifetime.unwrap_or(LONG);
    if let Some(stated) = offer.stated {
        return Ok(Some(stated.min(of_issue)));
    }
    match offer.expiry {
        // A clock that is behind sees the expiry later than it is: no token lives longer than it does.
        Some(expiry) => Ok(Some(expiry.duration_since(now.wall).unwrap_or_default().min(of_issue))),
        None if offer.lasting => Ok(None),
        None => policy.assumed_lifetime.map(Some).ok_or(Unfit::NoExpiry),
    }
}
