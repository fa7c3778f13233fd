//! What a member does next, and how it changes a record: plain functions of records, without I/O or clocks.
//!
//! ```text
//!  the engine asks: First | Expiring(held) | Rejected(held)
//!    │
//!    ▼ next(record)
//!    ├─ it has a token that is neither held, rejected nor about to expire ─▶ Adopt
//!    ├─ another fetch holds the lease ────────────────────────────────────▶ Follow, and look again    ┐ unless it has
//!    ├─ a fetch failed a moment ago ──────────────────────────────────────▶ Fail, as that one did     │ another token that
//!    ├─ its refresh token may be spent, and its token is still valid ─────▶ Spare it                  ┘ is valid: Adopt
//!    └─ otherwise ────────────────────────────────────────────────────────▶ Claim the lease, by compare-and-set
//!                                                                            │ won: fetch
//!                                                                            ▼
//!                                                          with_child (a rotated login), then settle
//! ```

use std::time::Duration;

use super::record::{Failure, Lease, Print, Record, Rejections, SharedLogin, SharedToken};
use crate::oauth::RefreshToken;

/// The back-off after a failure or a rejection: the first, doubled each time, up to the second.
const BACKOFF: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(60)];

/// How long after the end of a login one member tries again, and the longest time that an endpoint may ask for.
const PROBE_INTERVAL: Duration = Duration::from_secs(5 * 60);
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60 * 60);

/// After this long without a rejection, the next one counts as the first of a streak.
const STREAK_RESET: Duration = Duration::from_secs(5 * 60);

/// Why the engine asks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Ask {
    First,
    Expiring(Print),
    Rejected(Print),
}

/// The member that decides.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asker {
    pub(super) id: Print,
    pub(super) identity: Option<Print>,
    /// Whether the credential is fetched with a refresh token that the fleet shares.
    pub(super) has_login: bool,
    pub(super) lease: Duration,
}

/// What a token is still good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Worth {
    /// An engine would use it for a while.
    Fresh,
    /// An engine would refresh it at once.
    Aging,
    Expired,
}

/// What a member does next.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Step {
    Adopt(SharedToken),
    /// Fetch, once this has been put in the record's place.
    Claim(Box<Record>),
    /// Wait for the leader.
    Follow,
    Fail(Failure),
    /// Nobody has logged in.
    LoggedOut,
    /// The refresh token may be spent. Do not risk it while there is a valid token.
    Spare,
}

/// How a fetch ended.
#[derive(Clone, Debug)]
pub(super) enum Fetch {
    Done(SharedToken),
    Failed {
        message: String,
        /// Whether the login has ended. Any other cause may lie with one member.
        permanent: bool,
        retry_after: Option<Duration>,
        /// Whether the refresh token may have been spent.
        unanswered: bool,
    },
}

/// Decides what to do about a record.
pub(super) fn next(record: &Record, ask: Ask, asker: &Asker, worth: impl Fn(&SharedToken) -> Worth) -> Step {
    let token = record.token.as_ref().filter(|token| token.identity == asker.identity);
    let is_rejected = |token: Print| ask == Ask::Rejected(token) || record.refused.contains(&token);
    if let Some(token) = token
        && !is_rejected(token.print())
        && ask != Ask::Expiring(token.print())
        && worth(token) == Worth::Fresh
    {
        return Step::Adopt(token.clone());
    }
    if let Some(token) = token
        && ask == Ask::Rejected(token.print())
        && record.rejections.is_some_and(|rejections| rejections.are_too_close())
        && worth(token) != Worth::Expired
    {
        // It was fetched a moment ago, after another rejection. Something else than the token is wrong.
        return Step::Adopt(token.clone());
    }
    let is_valid = |token: &SharedToken| !is_rejected(token.print()) && worth(token) != Worth::Expired;
    // Better a token that expires soon than none.
    let or_adopt = |step| match token.filter(|token| is_valid(token) && ask != Ask::Expiring(token.print())) {
        Some(token) => Step::Adopt(token.clone()),
        None => step,
    };
    if record.lease.is_some_and(|lease| !lease.rest.is_zero()) {
        return or_adopt(Step::Follow);
    }
    if let Some(failure) = record.failure.as_ref().filter(|failure| !failure.rest.is_zero())
        && failure.identity == asker.identity
    {
        return or_adopt(Step::Fail(failure.clone()));
    }
    let mut claim = Box::new(record.clone());
    if asker.has_login {
        let Some(login) = &mut claim.login else { return Step::LoggedOut };
        if login.maybe_spent && token.is_some_and(is_valid) {
            return or_adopt(Step::Spare);
        }
        login.maybe_spent = true;
    }
    if let Ask::Rejected(rejected) = ask {
        claim.refuse(rejected);
    }
    claim.lease = Some(Lease { owner: asker.id, rest: asker.lease });
    Step::Claim(claim)
}

/// Notes that `leader` is about to spend the login that the record holds now; `None` if it has lost its lease.
pub(super) fn reclaim(record: &Record, leader: Print, lease: Duration) -> Option<Record> {
    let mut reclaimed = extend(record, leader, lease)?;
    if let Some(login) = &mut reclaimed.login {
        login.maybe_spent = true;
    }
    Some(reclaimed)
}

/// Extends the lease of `leader`; `None` if it has lost it.
pub(super) fn extend(record: &Record, leader: Print, lease: Duration) -> Option<Record> {
    let lease = Some(Lease { owner: leader, rest: lease });
    record.is_led_by(leader).then(|| Record { lease, ..record.clone() })
}

/// Ends the lease of `leader`; `None` if it has none.
pub(super) fn release(record: &Record, leader: Print) -> Option<Record> {
    record.is_led_by(leader).then(|| Record { lease: None, ..record.clone() })
}

/// Replaces the refresh token `spent` by `child`, which was issued for it; `None` if the record has another login.
///
/// No lease is needed. A late leader must not lose the login: nobody else can ever get this token.
pub(super) fn with_child(record: &Record, spent: &RefreshToken, child: &RefreshToken) -> Option<Record> {
    record.is_login(spent).then(|| Record {
        generation: record.generation + 1,
        login: Some(SharedLogin::new(child)),
        failure: None,
        ..record.clone()
    })
}

/// Records how the fetch ended that `leader` began at the generation `base`. `None` if another member was faster.
pub(super) fn settle(record: &Record, leader: &Asker, base: u64, ask: Ask, fetch: &Fetch) -> Option<Record> {
    let (identity, leader) = (leader.identity, leader.id);
    let leads = record.is_led_by(leader);
    let mut settled = record.clone();
    settled.lease = settled.lease.filter(|lease| lease.owner != leader);
    match fetch {
        Fetch::Done(token) => {
            // A late leader's token is as good as any, unless there is a newer one.
            if !leads && record.generation > base {
                return None;
            }
            let print = token.print();
            let is_new = record.token.as_ref().is_none_or(|token| token.print() != print);
            if is_new {
                settled.generation = record.generation.max(base + 1);
            }
            settled.refused.retain(|refused| *refused != print);
            settled.token = Some(token.clone());
            if let Some(login) = &mut settled.login {
                login.maybe_spent = false;
            }
            settled.failure = None;
            if matches!(ask, Ask::Rejected(_)) {
                let count = record.rejections.map_or(0, |rejections| rejections.count_now());
                settled.rejections = Some(Rejections { count: count + 1, since_last: Duration::ZERO });
            } else if ask == Ask::Expiring(print) {
                // The others need not ask for what the issuer does not have yet.
                let message = "the source returned the same token again".to_owned();
                settled.failure = Some(failure(record, identity, &message, false, None));
            }
        }
        Fetch::Failed { message, permanent, retry_after, unanswered } => {
            if !leads {
                return None;
            }
            if let Some(login) = &mut settled.login {
                login.maybe_spent = *unanswered;
            }
            settled.failure = Some(failure(record, identity, message, *permanent, *retry_after));
        }
    }
    Some(settled)
}

/// Begins another login. `now` is the time in milliseconds.
pub(super) fn log_in(record: &Record, token: &RefreshToken, now: u64) -> Record {
    Record { login: Some(SharedLogin::new(token)), ..end(record, now) }
}

/// Ends a credential and its login.
pub(super) fn end(record: &Record, now: u64) -> Record {
    let epoch = now.max(record.generation + 1);
    Record { refused: record.refused.clone(), epoch, ..Record::new(epoch) }
}

fn failure(
    record: &Record,
    identity: Option<Print>,
    message: &str,
    permanent: bool,
    retry_after: Option<Duration>,
) -> Failure {
    let attempts = record.failure.as_ref().map_or(0, |failure| failure.attempts).saturating_add(1);
    let mut rest = retry_after.map_or(backoff(attempts), |told| told.clamp(BACKOFF[0], MAX_RETRY_AFTER));
    if permanent {
        rest = rest.max(PROBE_INTERVAL);
    }
    Failure { message: Failure::short(message), identity, permanent, attempts, rest }
}

fn backoff(attempts: u32) -> Duration {
    let [first, max] = BACKOFF;
    first.saturating_mul(2u32.saturating_pow(attempts.saturating_sub(1))).min(max)
}

impl Rejections {
    fn count_now(&self) -> u32 {
        if self.since_last >= STREAK_RESET { 0 } else { self.count.min(16) }
    }

    fn are_too_close(&self) -> bool {
        self.since_last < backoff(self.count_now()) && self.count_now() > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Token, source::Fetched};

    const LEASE: Duration = Duration::from_secs(6);

    fn print(byte: u8) -> Print {
        Print([byte; 16])
    }

    fn asker(has_login: bool) -> Asker {
        Asker { id: print(1), identity: None, has_login, lease: LEASE }
    }

    fn token(text: &str) -> SharedToken {
        SharedToken::new(&Fetched::new(Token::new(text).unwrap()), None)
    }

    fn refresh_token(text: &str) -> RefreshToken {
        RefreshToken::new(text).unwrap()
    }

    fn with(text: &str) -> Record {
        Record { token: Some(token(text)), ..Record::new(1) }
    }

    fn fresh(_: &SharedToken) -> Worth {
        Worth::Fresh
    }

    fn ask(record: &Record, ask: Ask) -> Step {
        next(record, ask, &asker(false), fresh)
    }

    fn claimed(step: Step) -> Record {
        match step {
            Step::Claim(record) => *record,
            step => panic!("{step:?}"),
        }
    }

    /// N1
    #[test]
    fn what_counts_as_another_token() {
        let (record, held) = (with("a"), token("a").print());
        assert_eq!(ask(&record, Ask::First), Step::Adopt(token("a")));
        assert_eq!(ask(&record, Ask::Expiring(print(9))), Step::Adopt(token("a")));
        assert_eq!(ask(&record, Ask::Rejected(print(9))), Step::Adopt(token("a")));
        claimed(ask(&record, Ask::Expiring(held)));
        assert_eq!(claimed(ask(&record, Ask::Rejected(held))).refused, [held]);
        let refused = claimed(ask(&record, Ask::Rejected(held)));
        let refused = Record { lease: None, ..refused };
        claimed(ask(&refused, Ask::First));
        for worth in [Worth::Aging, Worth::Expired] {
            claimed(next(&record, Ask::First, &asker(false), |_| worth));
        }
        let other = Asker { identity: Some(print(7)), ..asker(false) };
        claimed(next(&record, Ask::First, &other, fresh));
    }

    /// N1: better than to wait, or to fail.
    #[test]
    fn a_token_that_expires_soon_is_adopted_if_nothing_else_can_be_had() {
        let (lease, held) = (Some(Lease { owner: print(2), rest: LEASE }), token("a").print());
        let fetch =
            Fetch::Failed { message: "no".into(), permanent: false, retry_after: None, unanswered: false };
        let claim = claimed(next(&with("a"), Ask::First, &asker(false), |_| Worth::Aging));
        let failed = settle(&claim, &asker(false), 1, Ask::First, &fetch).unwrap();
        for record in [Record { lease, ..with("a") }, failed] {
            let ask = |ask, worth| next(&record, ask, &asker(false), |_| worth);
            assert_eq!(ask(Ask::First, Worth::Aging), Step::Adopt(token("a")));
            assert_eq!(ask(Ask::Rejected(print(9)), Worth::Aging), Step::Adopt(token("a")));
            for (asked, worth) in [
                (Ask::First, Worth::Expired),
                (Ask::Expiring(held), Worth::Aging),
                (Ask::Rejected(held), Worth::Aging),
            ] {
                assert!(matches!(ask(asked, worth), Step::Follow | Step::Fail(_)), "{asked:?}");
            }
        }
    }

    /// N7
    #[test]
    fn a_lease_is_respected_until_it_lapses() {
        let leading = |owner, rest| Record { lease: Some(Lease { owner, rest }), ..Record::new(1) };
        assert_eq!(ask(&leading(print(2), LEASE), Ask::First), Step::Follow);
        assert_eq!(ask(&leading(print(2), LEASE).aged(LEASE / 2), Ask::First), Step::Follow);
        let lapsed = claimed(ask(&leading(print(2), LEASE).aged(LEASE), Ask::First));
        assert!(lapsed.is_led_by(print(1)));
        assert_eq!(ask(&leading(print(1), LEASE), Ask::First), Step::Follow, "a lease of its own, too");
        assert_eq!(extend(&lapsed, print(2), LEASE), None);
        assert_eq!(release(&lapsed, print(2)), None);
        assert_eq!(extend(&lapsed.aged(LEASE), print(1), LEASE), Some(lapsed.clone()));
        assert_eq!(release(&lapsed, print(1)).unwrap().lease, None);
    }

    /// N5
    #[test]
    fn failures_hold_for_all_members() {
        let failed = |permanent, retry_after| Fetch::Failed {
            message: "no".into(),
            permanent,
            retry_after,
            unanswered: false,
        };
        let settled = |record: &Record, fetch| settle(record, &asker(false), 1, Ask::First, &fetch).unwrap();
        let mut record = Record::new(1);
        for expected in [1, 2, 4, 8, 16, 32, 60, 60] {
            let claim = claimed(ask(&record, Ask::First));
            record = settled(&claim, failed(false, None));
            let Step::Fail(failure) = ask(&record, Ask::First) else { panic!() };
            assert_eq!(failure.rest, Duration::from_secs(expected));
            record = record.aged(failure.rest);
        }
        for (permanent, told, expected) in
            [(false, 0, 1), (false, 7, 7), (true, 1, 300), (false, 9_999, 3_600)]
        {
            let claim = claimed(ask(&Record::new(1), Ask::First));
            let record = settled(&claim, failed(permanent, Some(Duration::from_secs(told))));
            assert_eq!(record.failure.as_ref().unwrap().rest, Duration::from_secs(expected));
        }
    }

    /// N5: an issuer that returns its token until it expires.
    #[test]
    fn an_unchanged_token_is_not_asked_for_by_all() {
        let held = token("a").print();
        let claim = claimed(ask(&with("a"), Ask::Expiring(held)));
        let done = Fetch::Done(token("a"));
        let record = settle(&claim, &asker(false), 1, Ask::Expiring(held), &done).unwrap();
        assert!(matches!(ask(&record, Ask::Expiring(held)), Step::Fail(_)));
        assert_eq!(ask(&record, Ask::First), Step::Adopt(token("a")));
        assert_eq!(record.generation, 1);
    }

    /// N2
    #[test]
    fn a_maybe_spent_login_is_spared_while_a_token_is_valid() {
        let login = Some(SharedLogin::new(&refresh_token("rt1")));
        let record = Record { login, ..with("a") };
        let held = token("a").print();
        let member = asker(true);
        assert_eq!(next(&with("a"), Ask::Expiring(held), &member, fresh), Step::LoggedOut);
        let claim = claimed(next(&record, Ask::Expiring(held), &member, fresh));
        assert!(claim.login.as_ref().unwrap().maybe_spent);

        let lapsed = claim.aged(LEASE);
        let other = Asker { id: print(2), ..member };
        for worth in [Worth::Fresh, Worth::Aging] {
            assert_eq!(next(&lapsed, Ask::Expiring(held), &other, |_| worth), Step::Spare);
        }
        claimed(next(&lapsed, Ask::Expiring(held), &other, |_| Worth::Expired));
        claimed(next(&lapsed, Ask::Rejected(held), &other, fresh));

        let ended = |unanswered| {
            let message = String::new();
            let fetch = Fetch::Failed { message, permanent: false, retry_after: None, unanswered };
            settle(&claim, &asker(false), 1, Ask::Expiring(held), &fetch).unwrap().login.unwrap().maybe_spent
        };
        assert_eq!([ended(true), ended(false)], [true, false]);
        let done = settle(&claim, &asker(false), 1, Ask::Expiring(held), &Fetch::Done(token("b"))).unwrap();
        assert!(!done.login.unwrap().maybe_spent);
    }

    /// N2: the child of the stored login is accepted from anybody, at any time, and no other.
    #[test]
    fn the_child_of_the_stored_login_is_accepted() {
        let [parent, child, other] = ["rt1", "rt2", "rt9"].map(refresh_token);
        let login = |token| Record { login: Some(SharedLogin::new(token)), ..Record::new(5) };
        let lease = Some(Lease { owner: print(9), rest: LEASE });
        let led_by_another = Record { lease, ..login(&parent) };
        let stored = with_child(&led_by_another, &parent, &child).unwrap();
        assert!(stored.is_login(&child) && stored.is_led_by(print(9)) && stored.generation == 6);
        for record in [login(&child), login(&other), Record::new(5)] {
            assert_eq!(with_child(&record, &parent, &child), None);
        }
    }

    /// N1: the first to publish wins, and a late leader takes nothing back.
    #[test]
    fn a_late_token_replaces_no_newer_one() {
        let claim = claimed(ask(&Record::new(1), Ask::First));
        let done =
            |record: &Record, text| settle(record, &asker(false), 1, Ask::First, &Fetch::Done(token(text)));
        let published = done(&claim, "a").unwrap();
        assert_eq!((published.generation, published.lease), (2, None));
        assert_eq!(done(&published, "late"), None);
        let lease = Some(Lease { owner: print(2), rest: LEASE });
        let taken_over = Record { lease, ..claim };
        let published = done(&taken_over, "late").unwrap();
        assert_eq!((published.generation, published.lease), (2, lease));
    }

    /// N4
    #[test]
    fn rejections_are_spaced_for_the_fleet() {
        let mut record = with("t0");
        let mut texts = (1..).map(|number| format!("t{number}"));
        for expected in [0, 1, 2, 4, 8, 16, 32, 60, 60] {
            let rejected = record.token.as_ref().unwrap().clone();
            let asked = Ask::Rejected(rejected.print());
            if expected > 0 {
                let early = record.aged(Duration::from_secs(expected) - Duration::from_millis(1));
                assert_eq!(ask(&early, asked), Step::Adopt(rejected));
            }
            let claim = claimed(ask(&record.aged(Duration::from_secs(expected)), asked));
            let fetched = Fetch::Done(token(&texts.next().unwrap()));
            record = settle(&claim, &asker(false), claim.generation, asked, &fetched).unwrap();
        }
        let rejected = Ask::Rejected(record.token.as_ref().unwrap().print());
        let claim = claimed(ask(&record.aged(STREAK_RESET), rejected));
        let record =
            settle(&claim, &asker(false), claim.generation, rejected, &Fetch::Done(token("x"))).unwrap();
        assert_eq!(record.rejections.unwrap().count, 1);
    }

    /// N4: a token that the issuer brings again after a rejection is used on.
    #[test]
    fn the_issuer_may_stand_by_a_rejected_token() {
        let held = token("a").print();
        let claim = claimed(ask(&with("a"), Ask::Rejected(held)));
        let done = Fetch::Done(token("a"));
        let record = settle(&claim, &asker(false), 1, Ask::Rejected(held), &done).unwrap();
        assert_eq!(ask(&record, Ask::First), Step::Adopt(token("a")));
    }

    /// N2: after the store lost everything, a new login is newer than what members remember.
    #[test]
    fn logins_and_logouts_are_newer_than_all_before() {
        let record = Record { generation: 500, ..with("a") };
        let login = log_in(&record, &refresh_token("rt"), 1_000);
        assert_eq!((login.generation, &login.token), (1_000, &None));
        assert_eq!(end(&login, 900).generation, 1_001);
        assert!(end(&login, 900).login.is_none());
    }
}
