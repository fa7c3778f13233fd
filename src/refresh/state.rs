//! The state machine: decides what to do from state and time alone, without I/O, clocks or locks.
//!
//! ```text
//!             demand: nothing held           finish: fetched
//!   empty ───────────────────────▶ refreshing ──────────────▶ held
//!     ▲                             ▲    │                     │ │
//!     │ finish: failed, none held   │    │ finish: failed      │ │ demand: advisory window reached
//!     └─────────────────────────────┼────┴──▶ (back-off) ──────┘ │ reject: the API rejected it
//!                                   └────────────────────────────┘
//!
//!                     reject                finish: the source failed
//!   held:  good ────────────────▶ suspect ─────────────────────────────▶ suspect, served during the back-off
//!                                  ▲   │
//!                    reject, later │   │ finish: the source brought it again
//!                                  │   ▼
//!                                 vouched
//! ```

use std::{mem, sync::Arc, time::Duration};

use super::{
    RefreshPolicy,
    schedule::{Fresh, Schedule, Unusable},
};
use crate::{
    credential::Fingerprint,
    source::Reason,
    util::clock::{Deadline, MAX_DRIFT, Time},
};

/// The longest `Retry-After` that is honoured.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60 * 60);

/// After this long without a rejection, the next one counts as the first of a streak.
const STREAK_RESET: Duration = Duration::from_secs(5 * 60);

/// How many accepted replacements end a streak early. If rejections keep coming, accepted replacements prove nothing: one of
/// several servers may reject everything.
const MAX_FORGIVEN: u32 = 64;

/// How long after a permanent failure the source is asked again: its cause may have been temporary after all.
const PROBE_INTERVAL: Duration = Duration::from_secs(5 * 60);

/// How often to re-check `Source::version` after a permanent failure.
const VERSION_CHECK: Duration = Duration::from_secs(1);

/// Safety margin for delivering the credential to the caller.
const DELIVERY_MARGIN: Duration = Duration::from_secs(1);

/// A credential as the state machine sees it. Equal credentials have equal fingerprints.
pub(super) trait Value: Clone {
    fn fingerprint(&self) -> Fingerprint;
}

/// The state of one engine. There may be one for each of many subjects, so what most of them never need is boxed.
#[derive(Debug)]
pub(super) struct State<V, E> {
    policy: Arc<RefreshPolicy>,
    rng: fastrand::Rng,
    held: Option<Held<V>>,
    running: Option<Box<Running>>,
    /// How many refreshes were started.
    started: u64,
    /// How long the last refresh took.
    last_duration: Duration,
    setbacks: Option<Box<Setbacks<E>>>,
}

/// What has gone wrong.
#[derive(Debug)]
struct Setbacks<E> {
    /// Why the last refresh failed.
    failure: Option<Failure<E>>,
    rejections: Streak,
    /// Whether the last refresh was aborted together with its runtime.
    was_aborted: bool,
}

/// The current credential.
#[derive(Debug)]
struct Held<V> {
    value: V,
    schedule: Schedule,
    trust: Trust,
}

/// Whether the API rejected a credential, which is evidence against it and no proof: one endpoint may reject what all
/// others accept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trust {
    /// It was not rejected.
    Good,
    /// It was rejected, and its source has not answered since.
    Suspect {
        /// Whether requests wait for the answer: only after the first rejection of a streak.
        blocks: bool,
    },
    /// It was rejected, and its source brought it again.
    Vouched,
}

#[derive(Debug)]
struct Running {
    id: u64,
    began: Time,
    /// Whether the current credential was rejected during this refresh, which may have fetched it before that.
    predates_rejection: bool,
}

#[derive(Debug)]
struct Failure<E> {
    error: E,
    attempts: u32,
    retry: Deadline,
    /// The version that the source had, if the failure is permanent.
    permanent: Option<u64>,
}

/// Rejections in close succession.
#[derive(Debug, Default)]
struct Streak {
    length: u32,
    last: Option<Time>,
    /// How often an accepted replacement ended it.
    forgiven: u32,
}

/// A refresh to start.
#[derive(Debug)]
pub(super) struct Start<V> {
    pub(super) id: u64,
    pub(super) reason: Reason<V>,
}

/// The answer to a caller who needs a credential.
#[derive(Debug)]
pub(super) enum Answer<V, E> {
    Serve(V),
    /// A refresh is running or about to start.
    Wait,
    Fail(E),
    /// There is a credential, but the source's credentials never live as long as was asked for.
    TooShort,
}

/// The effect of a rejection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rejection {
    /// The rejected credential had already been replaced.
    Superseded,
    /// A refresh is running or about to start.
    Refreshing,
    /// None: it is too soon for another refresh.
    Ignored,
}

/// How a refresh ended.
#[derive(Debug)]
pub(super) enum Outcome<V> {
    Fetched(Fresh<V>),
    Failed {
        permanent: bool,
        retry_after: Option<Duration>,
    },
    /// Its task was dropped.
    Aborted,
}

/// What the driver does after a refresh has ended.
#[derive(Debug)]
pub(super) enum Finish<V> {
    /// Nothing: this refresh was given up earlier.
    Late,
    /// Start another one; its waiters keep waiting.
    Repeat(Start<V>),
    Done(Result<Refreshed, RefreshFailure>),
}

/// What a successful refresh brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refreshed {
    Replaced,
    Unchanged,
}

/// Why a refresh brought nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RefreshFailure {
    /// The source failed.
    Source,
    Aborted,
    Unusable(Unusable),
    /// It expires sooner than the current one.
    Older,
    /// It is already in its advisory window.
    Stale,
}

impl<V: Value, E: Clone> State<V, E> {
    pub(super) fn new(policy: impl Into<Arc<RefreshPolicy>>, seed: u64) -> Self {
        Self {
            policy: policy.into(),
            rng: fastrand::Rng::with_seed(seed),
            held: None,
            running: None,
            started: 0,
            last_duration: Duration::ZERO,
            setbacks: None,
        }
    }

    /// Handles a caller who needs a credential that stays valid for `min_validity`. `version` is the source's.
    pub(super) fn demand(
        &mut self,
        now: Time,
        min_validity: Duration,
        version: u64,
    ) -> (Answer<V, E>, Option<Start<V>>) {
        let Some(held) = self.usable(now) else { return self.wait_or_fail(now, version) };
        let lives_long_enough =
            min_validity.is_zero() || held.schedule.expires_at().remaining(now) >= min_validity;
        if !lives_long_enough && held.schedule.lifetime < min_validity.saturating_add(DELIVERY_MARGIN) {
            return (Answer::TooShort, None);
        }
        // After a failed refresh nobody waits for the next one while there is a credential to serve.
        let is_due = held.schedule.mandatory_at().has_come(now) || held.trust == Trust::BLOCKING;
        if (is_due && self.failure().is_none()) || !lives_long_enough {
            return self.wait_or_fail(now, version);
        }
        let value = held.value.clone();
        let refresh_is_due = held.is_suspect() || held.schedule.advisory_at().has_come(now);
        let start = if refresh_is_due { self.start(now, version) } else { None };
        (Answer::Serve(value), start)
    }

    fn wait_or_fail(&mut self, now: Time, version: u64) -> (Answer<V, E>, Option<Start<V>>) {
        if self.running.is_some() {
            return (Answer::Wait, None);
        }
        match (self.start(now, version), self.failure()) {
            (None, Some(failure)) => (Answer::Fail(failure.error.clone()), None),
            (start, _) => (Answer::Wait, start),
        }
    }

    /// Starts a refresh, unless one is running or backed off.
    fn start(&mut self, now: Time, version: u64) -> Option<Start<V>> {
        if self.running.is_some() || !self.may_start(now, version) {
            return None;
        }
        self.started += 1;
        let id = self.started;
        self.running = Some(Box::new(Running { id, began: now, predates_rejection: false }));
        let reason = match &self.held {
            Some(held) if held.is_suspect() => Reason::Rejected(held.value.clone()),
            Some(held) => Reason::Expiring(held.value.clone()),
            None => Reason::First,
        };
        Some(Start { id, reason })
    }

    fn may_start(&self, now: Time, version: u64) -> bool {
        self.failure().is_none_or(|Failure { retry, permanent, .. }| {
            retry.has_come(now) || permanent.is_some_and(|failed| failed != version)
        })
    }

    /// Handles a credential, known by its fingerprint, that the API rejected.
    pub(super) fn reject(
        &mut self,
        now: Time,
        fingerprint: Fingerprint,
        version: u64,
    ) -> (Rejection, Option<Start<V>>) {
        let Some(held) = self.held.as_ref().filter(|held| held.value.fingerprint() == fingerprint) else {
            return (Rejection::Superseded, None);
        };
        let trust = held.trust;
        // Otherwise it is one of several rejections that the same refresh answers.
        if !held.is_suspect() {
            let may_refresh = self.running.is_some() || self.may_start(now, version);
            let past = self.setbacks.get_or_insert_default();
            let number = if may_refresh { past.rejections.count(now, &self.policy) } else { None };
            let Some(number) = number else { return (self.join(), None) };
            if let Some(running) = &mut self.running {
                running.predates_rejection = true;
            }
            if let Some(held) = &mut self.held {
                held.trust = Trust::Suspect { blocks: trust == Trust::Good && number == 1 };
            }
        }
        let start = self.start(now, version);
        (self.join(), start)
    }

    fn join(&self) -> Rejection {
        if self.running.is_some() { Rejection::Refreshing } else { Rejection::Ignored }
    }

    /// Drops the current credential if this is its fingerprint. Returns whether it was.
    pub(super) fn withdraw(&mut self, fingerprint: Fingerprint) -> bool {
        self.held.take_if(|held| held.value.fingerprint() == fingerprint).is_some()
    }

    /// Whether a credential that the running refresh brings would be used for a while before the next refresh.
    #[cfg(feature = "fleet")]
    pub(super) fn would_keep(&self, now: Time, fresh: &Fresh<V>) -> bool {
        let duration = self.running.as_ref().map_or(self.last_duration, |running| now.since(running.began));
        Schedule::new(fresh, now, duration, 1.0, &self.policy)
            .is_ok_and(|schedule| !schedule.advisory_at().has_come(now))
    }

    /// Handles a request that was accepted with a credential that replaced a rejected one: the API does not reject
    /// everything, so the next rejection is the first of a streak.
    pub(super) fn accept(&mut self, is_accepted: impl FnOnce(Fingerprint) -> bool) {
        if let Some(past) = &mut self.setbacks
            && let Some(held) = self.held.as_ref().filter(|held| held.trust == Trust::Good)
            && is_accepted(held.value.fingerprint())
        {
            past.rejections.forgive();
        }
    }

    /// Handles the end of refresh `id`. `error` makes the error that waiters get, from the failure and the back-off.
    pub(super) fn finish(
        &mut self,
        now: Time,
        id: u64,
        outcome: Outcome<V>,
        version: u64,
        error: impl FnOnce(RefreshFailure, Deadline) -> E,
    ) -> Finish<V> {
        let Some(running) = self.running.take_if(|running| running.id == id) else { return Finish::Late };
        let was_aborted = self.setbacks.as_mut().is_some_and(|past| mem::take(&mut past.was_aborted));
        let (failure, permanent, retry_after) = match outcome {
            Outcome::Fetched(mut fresh) => {
                let recheck = fresh.recheck;
                self.last_duration = now.since(running.began);
                // If the machine was suspended meanwhile, the credential may have been issued before that.
                let suspended = now.unseen_since(running.began);
                for lifetime in
                    [&mut fresh.stated_lifetime, &mut fresh.claimed_lifetime].into_iter().flatten()
                {
                    *lifetime = lifetime.saturating_sub(suspended);
                }
                match self.install(now, fresh, !running.predates_rejection) {
                    Ok(refreshed) => {
                        if let Some(past) = &mut self.setbacks {
                            past.failure = None;
                        }
                        return match &self.held {
                            Some(held) if held.is_suspect() => self.repeat(now, version, Ok(refreshed)),
                            _ => Finish::Done(Ok(refreshed)),
                        };
                    }
                    Err(failure @ RefreshFailure::Unusable(Unusable::Expired)) if suspended >= MAX_DRIFT => {
                        return self.repeat(now, version, Err(failure));
                    }
                    Err(failure) => (failure, None, recheck),
                }
            }
            Outcome::Failed { permanent, retry_after } => {
                (RefreshFailure::Source, permanent.then_some(version), retry_after)
            }
            // The next caller's runtime may do better, once.
            Outcome::Aborted if !was_aborted => {
                self.setbacks_mut().was_aborted = true;
                return Finish::Done(Err(RefreshFailure::Aborted));
            }
            Outcome::Aborted => (RefreshFailure::Aborted, None, None),
        };
        self.fail(now, failure, permanent, retry_after, error);
        Finish::Done(Err(failure))
    }

    fn repeat(&mut self, now: Time, version: u64, ended: Result<Refreshed, RefreshFailure>) -> Finish<V> {
        self.start(now, version).map_or(Finish::Done(ended), Finish::Repeat)
    }

    /// Replaces the current credential. `vouches` tells whether the refresh began after the current one was rejected.
    fn install(&mut self, now: Time, fresh: Fresh<V>, vouches: bool) -> Result<Refreshed, RefreshFailure> {
        let fingerprint = fresh.value.fingerprint();
        let schedule = Schedule::new(&fresh, now, self.last_duration, self.rng.f64(), &self.policy)
            .map_err(RefreshFailure::Unusable)?;
        let is_same = |held: &Held<V>| held.value.fingerprint() == fingerprint;
        if let Some(held) = self.usable(now)
            && fresh.recheck.is_none()
            && !is_same(held)
            && !held.is_suspect()
            && held.schedule.expires
            && schedule.expires
            && schedule.expires_at().remaining(now) < held.schedule.expires_at().remaining(now)
        {
            return Err(RefreshFailure::Older);
        }
        let is_stale = schedule.advisory_at().has_come(now);
        let same = self.held.as_ref().filter(|held| is_same(held)).map(|held| held.trust);
        let is_unchanged = same.is_some();
        let trust = match same.unwrap_or(Trust::Good) {
            Trust::Suspect { .. } if vouches => Trust::Vouched,
            trust => trust,
        };
        self.held = Some(Held { value: fresh.value, schedule, trust });
        match (is_stale, is_unchanged) {
            (true, _) => Err(RefreshFailure::Stale),
            (false, true) => Ok(Refreshed::Unchanged),
            (false, false) => Ok(Refreshed::Replaced),
        }
    }

    fn fail(
        &mut self,
        now: Time,
        failure: RefreshFailure,
        permanent: Option<u64>,
        retry_after: Option<Duration>,
        error: impl FnOnce(RefreshFailure, Deadline) -> E,
    ) {
        let attempts = self.failure().map_or(0, |failure| failure.attempts).saturating_add(1);
        // A source that is asked more often while all is well may be asked as often now.
        let recheck = self.held.as_ref().and_then(|held| held.schedule.recheck).unwrap_or(Duration::MAX);
        let mut delay = match retry_after {
            Some(delay) => delay.min(MAX_RETRY_AFTER).max(self.policy.min_backoff.min(recheck)),
            None => self.policy.backoff(attempts).mul_f64(1.0 - self.rng.f64() / 2.0),
        };
        if permanent.is_some() {
            delay = delay.max(PROBE_INTERVAL);
        }
        let mut retry = now.after(delay);
        // A refresh that a rejection caused does not delay the next regular one, which is due before the credential expires.
        if let Some(held) = &self.held
            && retry_after.is_none()
            && !held.schedule.advisory_at().has_come(now)
        {
            retry = retry.earlier(held.schedule.advisory_at());
        }
        let error = error(failure, retry);
        self.setbacks_mut().failure = Some(Failure { error, attempts, retry, permanent });
    }

    /// The credential that requests may use without asking the state machine, and until when.
    pub(super) fn lease(&self, now: Time) -> Option<(&V, Deadline)> {
        let held = self.usable(now)?;
        let must_ask = held.trust == Trust::BLOCKING || (held.is_suspect() && self.running.is_none());
        if must_ask && self.failure().is_none() {
            return None;
        }
        let schedule = &held.schedule;
        let until = match (self.failure(), &self.running) {
            (None, None) => schedule.advisory_at(),
            (None, Some(_)) => schedule.mandatory_at(),
            (Some(_), Some(_)) => schedule.expires_at(),
            (Some(Failure { permanent: Some(_), retry, .. }), None) => {
                now.after(VERSION_CHECK).earlier(*retry)
            }
            (Some(failure), None) => failure.retry,
        };
        let until = until.earlier(schedule.expires_at());
        (!until.has_come(now)).then_some((&held.value, until))
    }

    /// The current credential, unless it has expired.
    fn usable(&self, now: Time) -> Option<&Held<V>> {
        self.held.as_ref().filter(|held| !held.schedule.expires_at().has_come(now))
    }

    /// The current credential and when it expires, if it does.
    pub(super) fn current(&self, now: Time) -> Option<(&V, Option<Deadline>)> {
        let Held { value, schedule, .. } = self.usable(now)?;
        Some((value, schedule.expires.then(|| schedule.expires_at())))
    }

    /// The last credential that was fetched, expired or not.
    pub(super) fn last(&self) -> Option<&V> {
        self.held.as_ref().map(|held| &held.value)
    }

    pub(super) fn is_running(&self, id: u64) -> bool {
        self.running.as_ref().is_some_and(|running| running.id == id)
    }

    pub(super) fn is_refreshing(&self) -> bool {
        self.running.is_some()
    }

    /// Whether the source failed and is not asked again yet.
    pub(super) fn is_backed_off(&self, now: impl FnOnce() -> Time) -> bool {
        self.failure().is_some_and(|failure| !failure.retry.has_come(now()))
    }

    /// Whether the last failure is permanent, unless the version of the source changes.
    pub(super) fn has_failed_permanently(&self) -> bool {
        self.failure().is_some_and(|failure| failure.permanent.is_some())
    }

    /// Why the last refresh failed, if it did.
    pub(super) fn error(&self) -> Option<&E> {
        self.failure().map(|failure| &failure.error)
    }

    fn failure(&self) -> Option<&Failure<E>> {
        self.setbacks.as_ref()?.failure.as_ref()
    }

    fn setbacks_mut(&mut self) -> &mut Setbacks<E> {
        self.setbacks.get_or_insert_default()
    }
}

impl<V> Held<V> {
    fn is_suspect(&self) -> bool {
        matches!(self.trust, Trust::Suspect { .. })
    }
}

impl Trust {
    const BLOCKING: Self = Self::Suspect { blocks: true };
}

// Derived, it would require a default of `E`.
impl<E> Default for Setbacks<E> {
    fn default() -> Self {
        Self { failure: None, rejections: Streak::default(), was_aborted: false }
    }
}

impl RefreshPolicy {
    fn backoff(&self, attempts: u32) -> Duration {
        let factor = 2u32.saturating_pow(attempts.saturating_sub(1));
        self.min_backoff.saturating_mul(factor).min(self.max_backoff)
    }
}

impl Streak {
    /// Counts a rejection and returns its number in the streak; `None` if it is too soon for another refresh.
    fn count(&mut self, now: Time, policy: &RefreshPolicy) -> Option<u32> {
        if let Some(last) = self.last {
            let elapsed = now.since(last);
            if elapsed >= STREAK_RESET {
                *self = Self::default();
            } else if self.length > 0 && elapsed < policy.backoff(self.length) {
                return None;
            }
        }
        self.length = self.length.saturating_add(1);
        self.last = Some(now);
        Some(self.length)
    }

    fn forgive(&mut self) {
        if self.length > 0 && self.forgiven < MAX_FORGIVEN {
            self.length = 0;
            self.forgiven += 1;
        }
    }
}
