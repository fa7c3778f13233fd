//! What to do, decided from state and time alone: no I/O, no clock, no lock.
//!
//! ```text
//!             demand: none held             finish: a credential
//!   empty ───────────────────────▶ renewing ───────────────────▶ held
//!     ▲                             ▲    │                        │ │
//!     │ finish: failed, none held   │    │ finish: failed         │ │ demand: renew has come
//!     └─────────────────────────────┼────┴──▶ (back-off) ─────────┘ │ reject: it was refused
//!                                   └───────────────────────────────┘
//! ```

use std::{collections::VecDeque, mem, sync::Arc, time::Duration};

use super::{
    RefreshPolicy,
    schedule::{Offer, Schedule, Span, Unfit},
};
use crate::{
    credential::Fingerprint,
    source::Reason,
    util::clock::{Deadline, Time},
};

/// So many rejected credentials are remembered, not to be taken again.
const REMEMBERED: usize = 16;

/// No `Retry-After` is honoured for longer.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60 * 60);

/// After so long without a rejection, the next one counts as the first.
const QUIET: Duration = Duration::from_secs(5 * 60);

/// By less than this the machine's two clocks part while a renewal runs, unless it was suspended or one was set.
const PARTED: Duration = Duration::from_secs(1);

/// So often is looked whether a permanent failure may be over.
const VERSION_CHECK: Duration = Duration::from_secs(1);

/// So much of a lifetime is not promised to anyone: some of it passes before a caller has the credential.
const ON_THE_WAY: Duration = Duration::from_secs(1);

/// What is held. Equal ones have the same fingerprint.
pub(super) trait Value: Clone {
    fn fingerprint(&self) -> Fingerprint;
}

/// There may be one for each of many users, nearly all of whom hold a credential and have no trouble: what is not always
/// there is boxed.
#[derive(Debug)]
pub(super) struct Core<V, E> {
    policy: Arc<RefreshPolicy>,
    chance: fastrand::Rng,
    held: Option<Held<V>>,
    running: Option<Box<Running>>,
    troubles: Option<Box<Troubles<V, E>>>,
    started: u64,
    took: Span,
}

/// The credential there is.
#[derive(Debug)]
struct Held<V> {
    value: V,
    schedule: Schedule,
    lasting: bool,
    /// The API refused it, and its source has not been asked since.
    suspect: bool,
}

#[derive(Debug)]
struct Running {
    id: u64,
    began: Time,
    /// What was rejected while it ran; what it brings may be older than the rejection.
    rejected: Option<Fingerprint>,
}

/// What went wrong lately.
#[derive(Debug)]
struct Troubles<V, E> {
    failure: Option<Failure<E>>,
    /// The last one that was rejected, until there is another.
    refused: Option<V>,
    rejected: VecDeque<Fingerprint>,
    rejections: Streak,
    /// Nobody ended the last renewal: its runtime did.
    aborted: bool,
}

#[derive(Debug)]
struct Failure<E> {
    error: E,
    attempts: u32,
    retry: Deadline,
    /// The source's version at the time, if the failure is permanent.
    permanent: Option<u64>,
}

/// Rejections that followed each other closely.
#[derive(Debug, Default)]
struct Streak {
    length: u32,
    last: Option<Time>,
}

/// A renewal to be started.
#[derive(Debug)]
pub(super) struct Start<V> {
    pub(super) id: u64,
    pub(super) reason: Reason<V>,
}

/// What a caller who wants a credential gets.
#[derive(Debug)]
pub(super) enum Answer<V, E> {
    Serve(V),
    /// A renewal is running, or to be started.
    Wait,
    Fail(E),
    /// There is one, but what the source gives never lives as long as was asked for.
    TooShort,
}

/// What a rejection led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rejection {
    /// Another credential is in its place already.
    Superseded,
    /// A renewal is running, or to be started.
    Refreshing,
    /// Nothing: it is too soon for another renewal.
    Ignored,
}

/// How a renewal ended.
#[derive(Debug)]
pub(super) enum Outcome<V> {
    Fetched(Offer<V>),
    Failed {
        permanent: bool,
        retry_after: Option<Duration>,
    },
    /// Its task was dropped.
    Aborted,
}

/// What became of the end of a renewal.
#[derive(Debug)]
pub(super) enum Finish<V> {
    /// It was not the one that is running: nothing.
    Late,
    /// It has to be repeated.
    Again(Start<V>),
    Over(Result<Brought, Trouble>),
}

/// What a renewal brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Brought {
    Another,
    TheSame,
}

/// What is to be said of a renewal that brought nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    Failed,
    Aborted,
    Unfit(Unfit),
    /// The API has refused what it brought.
    Rejected,
    /// What it brought expires sooner than what there is.
    Older,
    /// What it brought should be renewed at once again.
    Stale,
}

impl<V: Value, E: Clone> Core<V, E> {
    pub(super) fn new(policy: impl Into<Arc<RefreshPolicy>>, seed: u64) -> Self {
        Self {
            policy: policy.into(),
            chance: fastrand::Rng::with_seed(seed),
            held: None,
            running: None,
            troubles: None,
            started: 0,
            took: Span::default(),
        }
    }

    /// Somebody needs a credential that is good for `lasting` at least. `version` is the source's.
    pub(super) fn demand(
        &mut self,
        now: Time,
        lasting: Duration,
        version: u64,
    ) -> (Answer<V, E>, Option<Start<V>>) {
        let Some(held) = self.usable(now) else { return self.wait_or_fail(now, version) };
        let long_enough = lasting.is_zero() || held.schedule.expire().remaining(now) >= lasting;
        if !long_enough && held.schedule.lifetime() < lasting.saturating_add(ON_THE_WAY) {
            return (Answer::TooShort, None);
        }
        // Who has seen a renewal fail does not wait for the next while there is one to serve.
        let must_wait = (held.schedule.wait().has_come(now) || held.suspect) && self.failure().is_none();
        if must_wait || !long_enough {
            return self.wait_or_fail(now, version);
        }
        let (value, due) = (held.value.clone(), held.suspect || held.schedule.renew().has_come(now));
        let start = if due { self.start(now, version) } else { None };
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

    /// A renewal, if none is running and none has just failed.
    fn start(&mut self, now: Time, version: u64) -> Option<Start<V>> {
        if self.running.is_some() || !self.may_start(now, version) {
            return None;
        }
        self.started += 1;
        let id = self.started;
        self.running = Some(Box::new(Running { id, began: now, rejected: None }));
        let reason = match (&self.held, self.refused()) {
            (Some(held), _) if held.suspect => Reason::Rejected(held.value.clone()),
            (None, Some(refused)) => Reason::Rejected(refused.clone()),
            (Some(held), _) => Reason::Expiring(held.value.clone()),
            (None, None) => Reason::First,
        };
        Some(Start { id, reason })
    }

    fn may_start(&self, now: Time, version: u64) -> bool {
        match self.failure() {
            None => true,
            Some(Failure { permanent: Some(failed), .. }) => *failed != version,
            Some(Failure { retry, .. }) => retry.has_come(now),
        }
    }

    /// The API refused the credential with this fingerprint. A caller who insists has it forgotten even if it
    /// is too soon for another renewal.
    pub(super) fn reject(
        &mut self,
        now: Time,
        fingerprint: Fingerprint,
        insist: bool,
        version: u64,
    ) -> (Rejection, Option<Start<V>>) {
        match &self.held {
            Some(held) if held.value.fingerprint() != fingerprint => return (Rejection::Superseded, None),
            // One of many rejections of the same.
            None => return self.join(now, version),
            Some(held) if held.suspect => return self.join(now, version),
            Some(_) => {}
        }
        let may_start = self.running.is_some() || self.may_start(now, version);
        let policy = &self.policy;
        let too_soon =
            self.troubles.as_mut().is_some_and(|troubles| troubles.rejections.is_too_soon(now, policy));
        if !insist && (too_soon || !may_start) {
            return (Rejection::Ignored, None);
        }
        self.troubles_mut().rejections.count(now);
        if let Some(running) = &mut self.running {
            running.rejected = Some(fingerprint);
        }
        self.forget(fingerprint);
        self.join(now, version)
    }

    /// The API took what came after `refused`: it does not refuse all there is, and the next rejection counts as the first.
    pub(super) fn accept(&mut self, refused: Fingerprint) {
        let other = self.held.as_ref().is_some_and(|held| held.value.fingerprint() != refused);
        if let Some(troubles) = self.troubles.as_mut().filter(|_| other) {
            troubles.rejections = Streak::default();
            self.forget_troubles();
        }
    }

    fn forget(&mut self, fingerprint: Fingerprint) {
        match &mut self.held {
            Some(held) if held.lasting => held.suspect = true,
            held => {
                let refused = held.take().map(|held| held.value);
                let troubles = self.troubles_mut();
                if troubles.rejected.len() == REMEMBERED {
                    troubles.rejected.pop_front();
                }
                troubles.rejected.push_back(fingerprint);
                troubles.refused = refused;
            }
        }
    }

    fn join(&mut self, now: Time, version: u64) -> (Rejection, Option<Start<V>>) {
        let start = self.start(now, version);
        match self.running {
            Some(_) => (Rejection::Refreshing, start),
            None => (Rejection::Ignored, None),
        }
    }

    /// A renewal ended: how it went, in words made by `error`.
    pub(super) fn finish(
        &mut self,
        now: Time,
        id: u64,
        outcome: Outcome<V>,
        version: u64,
        error: impl FnOnce(Trouble, Duration) -> E,
    ) -> Finish<V> {
        let Some(running) = self.running.take_if(|running| running.id == id) else { return Finish::Late };
        let aborted = self.troubles.as_mut().is_some_and(|troubles| mem::take(&mut troubles.aborted));
        let (trouble, retry_after) = match outcome {
            Outcome::Fetched(mut offer) => {
                let recheck = offer.recheck;
                self.took = now.since(running.began).into();
                // Suspended meanwhile, it may have been issued before that.
                let unseen = now.unseen_since(running.began);
                for lives in [&mut offer.stated, &mut offer.lifetime].into_iter().flatten() {
                    *lives = lives.saturating_sub(unseen);
                }
                let stale = running.rejected == Some(offer.value.fingerprint());
                match self.install(now, offer) {
                    Ok(brought) => {
                        if let Some(troubles) = &mut self.troubles {
                            troubles.failure = None;
                        }
                        self.forget_troubles();
                        // It may have been fetched before the rejection: once more.
                        let again = stale && self.held.as_ref().is_some_and(|held| held.suspect);
                        if let Some(held) = self.held.as_mut().filter(|_| !again) {
                            held.suspect = false;
                        }
                        return if again {
                            self.again(now, version, Ok(brought))
                        } else {
                            Finish::Over(Ok(brought))
                        };
                    }
                    Err(trouble @ Trouble::Rejected) if stale => {
                        return self.again(now, version, Err(trouble));
                    }
                    Err(trouble @ Trouble::Unfit(Unfit::Expired)) if unseen >= PARTED => {
                        return self.again(now, version, Err(trouble));
                    }
                    Err(trouble) => (trouble, recheck),
                }
            }
            Outcome::Failed { permanent, retry_after } => {
                self.fail(now, Trouble::Failed, permanent.then_some(version), retry_after, error);
                return Finish::Over(Err(Trouble::Failed));
            }
            // Another runtime may do better, once.
            Outcome::Aborted if !aborted => {
                self.troubles_mut().aborted = true;
                return Finish::Over(Err(Trouble::Aborted));
            }
            Outcome::Aborted => (Trouble::Aborted, None),
        };
        self.fail(now, trouble, None, retry_after, error);
        Finish::Over(Err(trouble))
    }

    fn again(&mut self, now: Time, version: u64, ended: Result<Brought, Trouble>) -> Finish<V> {
        self.start(now, version).map_or(Finish::Over(ended), Finish::Again)
    }

    fn install(&mut self, now: Time, offer: Offer<V>) -> Result<Brought, Trouble> {
        let fingerprint = offer.value.fingerprint();
        if self.troubles.as_ref().is_some_and(|troubles| troubles.rejected.contains(&fingerprint)) {
            return Err(Trouble::Rejected);
        }
        let chance = self.chance.f64();
        let schedule =
            Schedule::new(&offer, now, self.took.into(), chance, &self.policy).map_err(Trouble::Unfit)?;
        let same = |held: &Held<V>| held.value.fingerprint() == fingerprint;
        if let Some(held) = self.usable(now)
            && offer.recheck.is_none()
            && !same(held)
            && held.schedule.expires
            && schedule.expires
            && schedule.expire().remaining(now) < held.schedule.expire().remaining(now)
        {
            return Err(Trouble::Older);
        }
        let stale = schedule.renew().has_come(now);
        let unchanged = self.held.as_ref().is_some_and(same);
        let suspect = unchanged && self.held.as_ref().is_some_and(|held| held.suspect);
        let Offer { value, lasting, .. } = offer;
        self.held = Some(Held { value, schedule, lasting, suspect });
        if let Some(troubles) = &mut self.troubles {
            troubles.refused = None;
        }
        match (stale, unchanged) {
            (true, _) => Err(Trouble::Stale),
            (false, true) => Ok(Brought::TheSame),
            (false, false) => Ok(Brought::Another),
        }
    }

    fn fail(
        &mut self,
        now: Time,
        trouble: Trouble,
        permanent: Option<u64>,
        retry_after: Option<Duration>,
        error: impl FnOnce(Trouble, Duration) -> E,
    ) {
        if let Some(held) = &mut self.held {
            held.suspect = false;
        }
        let attempts = self.failure().map_or(0, |failure| failure.attempts).saturating_add(1);
        let delay = match retry_after {
            Some(delay) => delay.min(MAX_RETRY_AFTER).max(self.policy.min_backoff),
            None => self.policy.backoff(attempts).mul_f64(1.0 - self.chance.f64() / 2.0),
        };
        let error = error(trouble, delay);
        self.troubles_mut().failure = Some(Failure { error, attempts, retry: now.after(delay), permanent });
    }

    /// What may be served without asking again, and until when.
    pub(super) fn lease(&self, now: Time) -> Option<(V, Deadline)> {
        let held = self.usable(now).filter(|held| !held.suspect)?;
        let schedule = &held.schedule;
        let until = match (self.failure(), &self.running) {
            (None, None) => schedule.renew(),
            (None, Some(_)) => schedule.wait(),
            (Some(_), Some(_)) => schedule.expire(),
            (Some(Failure { permanent: Some(_), .. }), None) => now.after(VERSION_CHECK),
            (Some(failure), None) => failure.retry,
        };
        let until = until.earlier(schedule.expire());
        (!until.has_come(now)).then(|| (held.value.clone(), until))
    }

    /// The credential there is, if it may be handed out.
    fn usable(&self, now: Time) -> Option<&Held<V>> {
        self.held.as_ref().filter(|held| !held.schedule.expire().has_come(now))
    }

    pub(super) fn current(&self, now: Time) -> Option<(&V, Option<Deadline>)> {
        let held = self.usable(now)?;
        Some((&held.value, held.schedule.expires.then_some(held.schedule.expire())))
    }

    /// The one there is or was, as long as there is no other.
    pub(super) fn last(&self) -> Option<&V> {
        self.held.as_ref().map(|held| &held.value).or(self.refused())
    }

    pub(super) fn is_running(&self, id: u64) -> bool {
        self.running.as_ref().is_some_and(|running| running.id == id)
    }

    pub(super) fn is_renewing(&self) -> bool {
        self.running.is_some()
    }

    /// Whether nothing is fetched until the source has another version.
    pub(super) fn has_failed_for_good(&self) -> bool {
        self.failure().is_some_and(|failure| failure.permanent.is_some())
    }

    /// Why there is none, if a renewal failed.
    pub(super) fn error(&self) -> Option<&E> {
        self.failure().map(|failure| &failure.error)
    }

    fn failure(&self) -> Option<&Failure<E>> {
        self.troubles.as_ref()?.failure.as_ref()
    }

    fn refused(&self) -> Option<&V> {
        self.troubles.as_ref()?.refused.as_ref()
    }

    fn troubles_mut(&mut self) -> &mut Troubles<V, E> {
        self.troubles.get_or_insert_default()
    }

    /// Keeps no room for them when they are over.
    fn forget_troubles(&mut self) {
        self.troubles.take_if(|troubles| troubles.are_over());
    }
}

impl<V, E> Troubles<V, E> {
    fn are_over(&self) -> bool {
        let Self { failure, refused, rejected, rejections, aborted } = self;
        let remembers = !rejected.is_empty() || rejections.last.is_some();
        failure.is_none() && refused.is_none() && !remembers && !aborted
    }
}

// Derived, it would ask for defaults of `V` and `E`.
impl<V, E> Default for Troubles<V, E> {
    fn default() -> Self {
        Self {
            failure: None,
            refused: None,
            rejected: VecDeque::new(),
            rejections: Streak::default(),
            aborted: false,
        }
    }
}

impl RefreshPolicy {
    fn backoff(&self, attempts: u32) -> Duration {
        let doubled = 2u32.saturating_pow(attempts.saturating_sub(1));
        self.min_backoff.saturating_mul(doubled).min(self.max_backoff)
    }
}

impl Streak {
    fn is_too_soon(&mut self, now: Time, policy: &RefreshPolicy) -> bool {
        let Some(last) = self.last else { return false };
        let since = now.since(last);
        if since >= QUIET {
            *self = Self::default();
            return false;
        }
        since < policy.backoff(self.length)
    }

    fn count(&mut self, now: Time) {
        self.length = self.length.saturating_add(1);
        self.last = Some(now);
    }
}
