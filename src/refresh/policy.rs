//! [`RefreshPolicy`]: windows, timeout and back-off.

use std::time::Duration;

#[cfg(feature = "test-util")]
use crate::util::clock::TestClock;
use crate::util::clock::{Clock, Countdown, Deadline, Time};

/// When a credential is refreshed, and what happens when that fails.
///
/// The defaults suit tokens that live from seconds to months; see
/// [how refreshing works](crate::guide::refreshing).
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
    /// Creates the default policy.
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

    /// Limits the advisory window, in which the old token is served while a refresh runs in the background; 5 minutes by
    /// default.
    ///
    /// The window is the last tenth of the lifetime, but at least one second and twice what the last refresh took, and
    /// never more than half of the lifetime.
    #[must_use]
    pub fn with_advisory_window(mut self, max: Duration) -> Self {
        self.advisory = max;
        self
    }

    /// Limits the mandatory window, in which requests wait for the refresh so that no token expires on its way to the
    /// API; 10 seconds by default, and never more than a tenth of the advisory window.
    #[must_use]
    pub fn with_mandatory_window(mut self, max: Duration) -> Self {
        self.mandatory = max;
        self
    }

    /// Starts refreshes earlier by a random part of the advisory window, up to `fraction` of it, so that a fleet that was
    /// started at once does not refresh at once. From 0.0 to 1.0; 0.2 by default.
    #[must_use]
    pub fn with_jitter(mut self, fraction: f64) -> Self {
        self.jitter = if fraction.is_finite() { fraction.clamp(0.0, 1.0) } else { 0.0 };
        self
    }

    /// Sets after how long a refresh counts as failed; 30 seconds by default.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sets the back-off after a failed refresh: `first`, then twice as long each time, up to `max`, each shortened by a
    /// random part of up to a half. By default from one second to one minute. A source that says when to try again is
    /// obeyed instead, up to an hour, but not asked sooner than after `first`, or after its
    /// [recheck interval](crate::source::Fetched::with_recheck_after) if that is shorter.
    #[must_use]
    pub fn with_backoff(mut self, first: Duration, max: Duration) -> Self {
        self.min_backoff = first;
        self.max_backoff = max.max(first);
        self
    }

    /// Sets the lifetime of a token that does not say when it expires; 5 minutes by default.
    #[must_use]
    pub fn with_assumed_lifetime(mut self, lifetime: Duration) -> Self {
        self.assumed_lifetime = Some(lifetime);
        self
    }

    /// Treats a token that does not say when it expires as an error.
    #[must_use]
    pub fn require_expiry(mut self) -> Self {
        self.assumed_lifetime = None;
        self
    }

    /// Takes the time from `clock`, for tests.
    #[cfg(feature = "test-util")]
    #[must_use]
    pub fn with_clock(mut self, clock: TestClock) -> Self {
        self.clock = clock.into();
        self
    }

    pub(super) fn countdown(&self, deadline: Deadline) -> Countdown {
        self.clock.countdown(deadline)
    }

    #[inline]
    pub(crate) fn now(&self) -> Time {
        self.clock.now()
    }
}

impl Default for RefreshPolicy {
    fn default() -> Self {
        Self::new()
    }
}
