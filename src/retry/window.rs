//! [`Window`]: how many requests the account's rate limit still allows, as a plain function of responses and time.

use std::time::Duration;

use http::{HeaderMap, StatusCode};
use tokio::time::Instant;

use super::MAX_WAIT;
use crate::RateLimit;

/// How many requests are in flight at once until a response tells the limit.
const PROBES: u64 = 10;

/// The API's window, for responses that do not tell when theirs ends.
const WINDOW: Duration = Duration::from_secs(60);

/// How far two responses may disagree about the end of one window: they round to seconds, and arrive at different times.
const ROUNDING: Duration = Duration::from_secs(2);

/// The current window of the account's rate limit.
///
/// A request in flight is taken as not yet counted by the API. So the requests of a window never exceed what the API said to
/// remain, even if their responses overtake each other.
#[derive(Debug)]
pub(super) struct Window {
    /// Which window this is, as a request may be answered after its window has ended.
    number: u64,
    /// How many requests may be in flight; `None` for any number.
    remaining: Option<u64>,
    in_flight: u64,
    /// When this window ends; `None` until a response has told it, and what remains.
    ends: Option<End>,
    /// Whether a request had to wait for the end.
    is_used_up: bool,
    /// The last limit that was told.
    limit: Option<u64>,
}

/// The time between which a window ends. A slow response told the rest of it when its request was counted, or when it was sent
/// itself.
#[derive(Clone, Copy, Debug)]
struct End {
    earliest: Instant,
    latest: Instant,
}

/// A request's place in a window.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ticket {
    window: u64,
    sent: Instant,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// Without a response, or with a 429 that tells nothing. The API may have counted it.
    Unknown,
    /// With a response that tells no limit.
    Unlimited,
    /// With a response that tells what remains, and for how long.
    Limited { limit: Option<u64>, remaining: u64, ends_after: Duration },
}

impl Answer {
    pub(super) fn read(status: StatusCode, headers: &HeaderMap) -> Self {
        let told = RateLimit::from_headers(headers);
        let limit = told.as_ref().and_then(|told| told.limit);
        if status == StatusCode::TOO_MANY_REQUESTS {
            return match RateLimit::retry_after(headers) {
                Some(ends_after) => Self::Limited { limit, remaining: 0, ends_after },
                None => Self::Unknown,
            };
        }
        match told {
            Some(RateLimit { remaining: Some(remaining), reset_after, .. }) => {
                Self::Limited { limit, remaining, ends_after: reset_after.unwrap_or(WINDOW) }
            }
            _ => Self::Unlimited,
        }
    }
}

impl Window {
    pub(super) fn new() -> Self {
        Self { number: 0, remaining: Some(PROBES), in_flight: 0, ends: None, is_used_up: false, limit: None }
    }

    /// Admits a request; or returns the end of the window, if one is known, for which it has to wait.
    pub(super) fn admit(&mut self, now: Instant) -> Result<Ticket, Option<Instant>> {
        if self.ends.is_some_and(|ends| now >= ends.latest) {
            *self = self.next();
        }
        if self.remaining.is_some_and(|remaining| self.in_flight >= remaining) {
            self.is_used_up = true;
            return Err(self.ends.map(|ends| ends.latest));
        }
        Ok(self.force(now))
    }

    /// Admits a request that has waited too long.
    pub(super) fn force(&mut self, now: Instant) -> Ticket {
        self.in_flight += 1;
        Ticket { window: self.number, sent: now }
    }

    /// Ends a request.
    pub(super) fn finish(&mut self, ticket: Ticket, answer: Answer, now: Instant) {
        if ticket.window != self.number {
            return;
        }
        self.in_flight -= 1;
        match answer {
            Answer::Limited { limit, remaining, ends_after } => {
                self.limit = limit.or(self.limit);
                // No header is believed for longer than a request waits.
                let ends_after = ends_after.min(MAX_WAIT);
                self.learn(remaining, End { earliest: ticket.sent + ends_after, latest: now + ends_after });
            }
            Answer::Unlimited if self.number == 0 && self.ends.is_none() => self.remaining = None,
            Answer::Unlimited | Answer::Unknown if self.ends.is_some() => {
                self.remaining = self.remaining.map(|remaining| remaining.saturating_sub(1));
            }
            Answer::Unlimited | Answer::Unknown => {}
        }
    }

    /// Takes what a response told: how many requests remain in the window with this end.
    fn learn(&mut self, remaining: u64, told: End) {
        let known = self.ends.filter(|known| told.earliest <= known.latest + ROUNDING);
        (self.remaining, self.ends) = match (known, self.remaining) {
            // About an earlier window.
            (Some(known), _) if told.latest + ROUNDING < known.earliest => return,
            // Of responses about one window, an older one may arrive later and tell that more remain.
            (Some(known), Some(less)) => (Some(remaining.min(less)), Some(known.and(told))),
            // About a new window.
            _ => (Some(remaining), Some(told)),
        };
    }

    /// The window after this one. If requests wait for it, few are sent until a response confirms that it has begun:
    /// clocks differ, and other programs may use the account. Otherwise the limit is assumed to be the last one, less what
    /// the API may count late.
    fn next(&self) -> Self {
        let remaining = match self.limit {
            limit if self.is_used_up => Some(limit.unwrap_or(PROBES).clamp(1, PROBES)),
            limit => limit.map(|limit| limit.saturating_sub(self.in_flight).max(1)),
        };
        Self { number: self.number + 1, remaining, limit: self.limit, ..Self::new() }
    }
}

impl End {
    /// The time that both allow.
    fn and(self, other: Self) -> Self {
        Self { earliest: self.earliest.max(other.earliest), latest: self.latest.min(other.latest) }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn now() -> Instant {
        crate::util::clock::monotonic()
    }

    fn told(remaining: u64, ends_after: Duration) -> Answer {
        Answer::Limited { limit: Some(60), remaining, ends_after }
    }

    /// A window in which one response has told this.
    fn window(remaining: u64, start: Instant) -> Window {
        let mut window = Window::new();
        let ticket = window.admit(start).unwrap();
        window.finish(ticket, told(remaining, 60 * SECOND), start);
        window
    }

    fn admitted(window: &mut Window, now: Instant) -> usize {
        (0..1000).take_while(|_| window.admit(now).is_ok()).count()
    }

    #[test]
    fn what_remains_is_sent_and_no_more() {
        let start = now();
        let mut window = window(5, start);
        assert_eq!(admitted(&mut window, start), 5);
        assert_eq!(window.admit(start).unwrap_err(), Some(start + 60 * SECOND));
        // Requests have waited for the next window, so only a few probe it.
        assert_eq!(admitted(&mut window, start + 60 * SECOND), PROBES as usize);
    }

    #[test]
    fn an_unused_limit_delays_nobody() {
        let start = now();
        assert_eq!(admitted(&mut window(50, start), start + 61 * SECOND), 60);
        let mut silent = Window::new();
        let ticket = silent.admit(start).unwrap();
        silent.finish(ticket, Answer::Unlimited, start);
        assert_eq!(admitted(&mut silent, start), 1000);
    }

    #[test]
    fn first_requests_are_few() {
        assert_eq!(admitted(&mut Window::new(), now()), PROBES as usize);
    }

    #[test]
    fn overtaken_responses_do_not_raise_the_rest() {
        let start = now();
        let mut window = window(30, start);
        let tickets = [(); 2].map(|()| window.admit(start).unwrap());
        window.finish(tickets[1], told(0, 60 * SECOND), start + SECOND);
        window.finish(tickets[0], told(29, 60 * SECOND), start + SECOND);
        assert_eq!(admitted(&mut window, start + SECOND), 0);
    }

    /// Slow responses: their numbers may be as old as their request.
    #[test]
    fn slow_responses_tell_of_their_window() {
        let start = now();
        let mut window = window(30, start);
        let tickets = [(); 2].map(|()| window.admit(start).unwrap());
        window.finish(tickets[0], told(3, 30 * SECOND), start + 30 * SECOND);
        // It was counted at the start, and told 60 seconds then.
        window.finish(tickets[1], told(29, 60 * SECOND), start + 30 * SECOND);
        assert_eq!(admitted(&mut window, start + 30 * SECOND), 3);
        assert_eq!(window.admit(start + 30 * SECOND).unwrap_err(), Some(start + 60 * SECOND));
    }

    #[test]
    fn a_quick_response_corrects_a_slow_one() {
        let start = now();
        let mut window = Window::new();
        let tickets = [start, start + 20 * SECOND].map(|now| window.admit(now).unwrap());
        // Both are about the same window, which ends in a minute.
        window.finish(tickets[0], told(9, 60 * SECOND), start + 20 * SECOND);
        window.finish(tickets[1], told(0, 40 * SECOND), start + 20 * SECOND);
        assert_eq!(window.admit(start + 20 * SECOND).unwrap_err(), Some(start + 60 * SECOND));
    }

    #[test]
    fn a_response_of_the_next_window_starts_it() {
        let start = now();
        let mut window = window(0, start);
        let ticket = window.force(start + 59 * SECOND);
        window.finish(ticket, told(40, 60 * SECOND), start + 59 * SECOND);
        assert_eq!(admitted(&mut window, start + 59 * SECOND), 40);
    }

    #[test]
    fn no_header_is_believed_for_long() {
        let start = now();
        let mut window = Window::new();
        let ticket = window.admit(start).unwrap();
        window.finish(ticket, told(0, 3600 * SECOND), start);
        assert_eq!(window.admit(start).unwrap_err(), Some(start + MAX_WAIT));
    }

    #[test]
    fn a_request_without_numbers_counts() {
        for answer in [Answer::Unknown, Answer::Unlimited] {
            let start = now();
            let mut window = window(1, start);
            let ticket = window.admit(start).unwrap();
            window.finish(ticket, answer, start);
            assert_eq!(admitted(&mut window, start), 0, "{answer:?}");
        }
    }

    /// The API may count a request in the window after the one in which it was sent.
    #[test]
    fn late_requests_count_in_the_next_window() {
        let (start, end) = (now(), now() + 60 * SECOND);
        let mut window = window(50, start);
        let late = window.admit(start).unwrap();
        assert_eq!(admitted(&mut window, end), 59);
        window.finish(late, Answer::Unknown, end);
        assert_eq!(admitted(&mut window, end), 0, "it was never counted here");
    }

    #[test]
    fn ends_that_are_rounded_are_one() {
        let start = now();
        let mut window = window(5, start);
        let ticket = window.admit(start + SECOND).unwrap();
        window.finish(ticket, told(30, 60 * SECOND), start + SECOND);
        assert_eq!(admitted(&mut window, start + SECOND), 5);
    }

    #[test]
    fn responses_of_an_earlier_window_are_ignored() {
        let start = now();
        let mut window = window(50, start);
        let (late, early) = (window.admit(start).unwrap(), window.force(start + 59 * SECOND));
        window.finish(early, told(40, 60 * SECOND), start + 59 * SECOND);
        window.finish(late, told(0, Duration::ZERO), start + 59 * SECOND);
        assert_eq!(admitted(&mut window, start + 59 * SECOND), 40);
    }

    /// A gateway's 429 has a `Retry-After` alone.
    #[test]
    fn a_refusal_leaves_the_limit_known() {
        let start = now();
        let mut window = Window::new();
        let tickets = [(); 2].map(|()| window.admit(start).unwrap());
        let answer = |limit, remaining| Answer::Limited { limit, remaining, ends_after: 60 * SECOND };
        window.finish(tickets[0], answer(Some(3), 1), start);
        window.finish(tickets[1], answer(None, 0), start);
        assert_eq!(admitted(&mut window, start), 0);
        assert_eq!(admitted(&mut window, start + 60 * SECOND), 3);
    }

    #[test]
    fn other_programs_are_seen() {
        let start = now();
        let mut window = window(30, start);
        let ticket = window.admit(start).unwrap();
        window.finish(ticket, told(2, 59 * SECOND), start + SECOND);
        assert_eq!(admitted(&mut window, start + SECOND), 2);
    }

    #[test]
    fn a_refusal_ends_the_window() {
        let headers = HeaderMap::from_iter([(http::header::RETRY_AFTER, "7".parse().unwrap())]);
        let refused = Answer::read(StatusCode::TOO_MANY_REQUESTS, &headers);
        assert_eq!(refused, Answer::Limited { limit: None, remaining: 0, ends_after: 7 * SECOND });
        assert_eq!(Answer::read(StatusCode::TOO_MANY_REQUESTS, &HeaderMap::new()), Answer::Unknown);
        assert_eq!(Answer::read(StatusCode::OK, &headers), Answer::Unlimited);
    }

    /// One step of a run against an API that counts as SelamAPI does.
    #[derive(Clone, Debug)]
    enum Step {
        Send,
        /// The API counts one of the requests on their way to it.
        Count(usize),
        /// One of the responses arrives.
        Arrive(usize),
        /// One of the requests is dropped, and may still be counted.
        Drop(usize),
        Pass(u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            6 => Just(Step::Send),
            5 => any::<usize>().prop_map(Step::Count),
            5 => any::<usize>().prop_map(Step::Arrive),
            1 => any::<usize>().prop_map(Step::Drop),
            2 => (0u64..20_000).prop_map(Step::Pass),
        ];
        prop::collection::vec(step, 0..400)
    }

    proptest! {
        /// In any order of events, at most the probes are refused in a window, and nobody waits past its end.
        #[test]
        fn requests_stay_within_the_limit(steps in steps(), limit in 1u64..40) {
            let start = now();
            let (mut time, mut ends, mut used, mut refused) = (start, start + 60 * SECOND, 0, 0);
            let mut window = Window::new();
            let (mut sent, mut answered) = (VecDeque::new(), VecDeque::new());
            // The API counts requests soon, and may answer late.
            let steps = steps.into_iter().flat_map(|step| match step {
                Step::Pass(_) => [vec![Step::Count(0); 100], vec![step]].concat(),
                step => vec![step],
            });
            for step in steps {
                match step {
                    Step::Send => match window.admit(time) {
                        Ok(ticket) => sent.push_back(ticket),
                        Err(until) => prop_assert!(until.is_none_or(|until| until > time)),
                    },
                    Step::Count(at) if !sent.is_empty() => {
                        if time >= ends {
                            (ends, used, refused) = (time + 60 * SECOND, 0, 0);
                        }
                        used += 1;
                        refused += u64::from(used > limit);
                        prop_assert!(refused <= PROBES, "{refused} requests were refused in one window");
                        let ticket = sent.remove(at % sent.len()).unwrap();
                        // In whole seconds, rounded up.
                        let left = (ends - time).as_millis().div_ceil(1000) as u64;
                        let answer = Answer::Limited {
                            limit: Some(limit),
                            remaining: limit.saturating_sub(used),
                            ends_after: Duration::from_secs(left),
                        };
                        answered.push_back((ticket, answer));
                    }
                    Step::Arrive(at) if !answered.is_empty() => {
                        let (ticket, answer) = answered.remove(at % answered.len()).unwrap();
                        window.finish(ticket, answer, time);
                    }
                    // Before the limit is told, a lost request makes room for another.
                    Step::Drop(at) if !answered.is_empty() && window.ends.is_some() => {
                        let (ticket, _) = answered.remove(at % answered.len()).unwrap();
                        window.finish(ticket, Answer::Unknown, time);
                    }
                    Step::Pass(millis) => time += Duration::from_millis(millis),
                    Step::Count(_) | Step::Arrive(_) | Step::Drop(_) => {}
                }
            }
        }
    }
}
