use std::time::Duration;

#[cfg(feature = "test-util")]
use crate::util::clock::TestClock;
use crate::util::clock::{Clock, Time};

/// When a credential is renewed, and what happens when that fails.
///
/// The defaults suit tokens that live from seconds to months; see [how renewal works](super).
///
/// ```
/// use std::time::Duration;
/// use tower_selam::{BoxError, RefreshPolicy, Refreshing, Token, source::{Reason, source_fn}};
///
/// let policy = RefreshPolicy::new().with_timeout(Duration::from_secs(5)).with_jitter(0.0);
/// let source = source_fn(|_: Reason<Token>| async { Ok::<_, BoxError>(Token::new("a.b.c")?) });
/// let jwts = Refreshing::with_policy(source, policy);
/// # assert!(jwts.current().is_none());
/// ```
#[derive(Clone, Debug)]
pub struct RefreshPolicy {
    pub(super) advisory: Duration,
    pub(super) mandatory: Duration,
    pub(super) jitter: f64,
    pub(super) timeout: Duration,
    pub(super) min_backoff: Duration,
    pub(super) max_backoff: Duration,
    pub(super) assumed_lifetime: Option<Duration>,
    pub(super) clock: Clock,
}

impl RefreshPolicy {
    /// The defaults.
    #[must_use]
    pub fn new() -> Self {
        Self {
            advisory: Duration::from_secs(5 * 60),
            mandatory: Duration::from_secs(10),
            jitter: 0.2,
            timeout: Duration::from_secs(30),
            min_backoff: Duration::from_secs(1),
            max_backoff: Duration::from_secs(60),
            assumed_lifetime: Some(Duration::from_secs(5 * 60)),
            clock: Clock::default(),
        }
    }

    /// The advisory window is at most so long; 5 minutes by default.
    ///
    /// It is the last tenth of the lifetime, but at least one second and twice what the last renewal took, and
    /// never more than half of the lifetime. In it the old token is served while a new one is fetched.
    #[must_use]
    pub fn with_advisory_window(mut self, at_most: Duration) -> Self {
        self.advisory = at_most;
        self
    }

    /// The mandatory window is at most so long; 10 seconds by default, and never more than a tenth of the
    /// advisory one. In it requests wait for the renewal, so that no token expires on its way.
    #[must_use]
    pub fn with_mandatory_window(mut self, at_most: Duration) -> Self {
        self.mandatory = at_most;
        self
    }

    /// Renewals begin earlier by up to this part of the advisory window, by chance, so that a fleet that was
    /// started at once does not renew at once. From 0.0 to 1.0, by default 0.2.
    #[must_use]
    pub fn with_jitter(mut self, part: f64) -> Self {
        self.jitter = if part.is_finite() { part.clamp(0.0, 1.0) } else { 0.0 };
        self
    }

    /// A renewal that takes longer has failed; 30 seconds by default.
    #[must_use]
    pub fn with_timeout(mut self, time: Duration) -> Self {
        self.timeout = time;
        self
    }

    /// How long to wait after a failed renewal: `first`, then twice as long each time, up to `at_most`, less up
    /// to a half by chance. By default from one second to one minute. A source that says when to ask again
    /// is obeyed instead, from `first` up to an hour.
    #[must_use]
    pub fn with_backoff(mut self, first: Duration, at_most: Duration) -> Self {
        self.min_backoff = first;
        self.max_backoff = at_most.max(first);
        self
    }

    /// A token that does not say when it expires counts as expired after this time; 5 minutes by default.
    #[must_use]
    pub fn with_assumed_lifetime(mut self, time: Duration) -> Self {
        self.assumed_lifetime = Some(time);
        self
    }

    /// A token that does not say when it expires is an error.
    #[must_use]
    pub fn require_expiry(mut self) -> Self {
        self.assumed_lifetime = None;
        self
    }

    #[inline]
    pub(crate) fn now(&self) -> Time {
        self.clock.now()
    }

    /// Takes the time from `clock`, for tests.
    #[cfg(feature = "test-util")]
    #[must_use]
    pub fn with_clock(mut self, clock: TestClock) -> Self {
        self.clock = clock.into();
        self
    }
}

impl Default for RefreshPolicy {
    fn default() -> Self {
        Self::new()
    }
}
