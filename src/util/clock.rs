//! [`Clock`], and all other code that reads the time: `.clippy.toml` forbids it elsewhere.

use std::time::{Duration, SystemTime};
#[cfg(feature = "test-util")]
use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
};

use tokio::time::Instant;

/// The longest time that anything is trusted or scheduled ahead, so that arithmetic does not overflow.
pub(crate) const LONG: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// How far the two clocks may drift apart before the machine counts as suspended or its clock as set.
pub(crate) const MAX_DRIFT: Duration = Duration::from_secs(1);

/// The wall-clock time, to which HTTP dates refer.
#[expect(clippy::disallowed_methods, reason = "only this module reads the time")]
pub(crate) fn now() -> SystemTime {
    SystemTime::now()
}

/// The time on both clocks of the machine.
///
/// Neither is enough: the wall clock can be set, by hand or by NTP, and the monotonic clock may stand still while the
/// machine is suspended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Time {
    pub(crate) wall: SystemTime,
    pub(crate) mono: Instant,
}

/// A point in time, which has come when either clock has reached it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Deadline {
    pub(crate) wall: SystemTime,
    mono: Instant,
}

impl Time {
    /// The deadline in `wait`, or in [`LONG`] if that is sooner.
    pub(crate) fn after(self, wait: Duration) -> Deadline {
        let wait = wait.min(LONG);
        Deadline {
            wall: self.wall.checked_add(wait).unwrap_or(self.wall),
            mono: self.mono.checked_add(wait).unwrap_or(self.mono),
        }
    }

    /// The time since `earlier` by the monotonic clock.
    pub(crate) fn since(self, earlier: Self) -> Duration {
        self.mono.saturating_duration_since(earlier.mono)
    }

    /// The time since `earlier` that the wall clock counts and the monotonic clock does not: a suspension, or a clock that
    /// was set forward.
    pub(crate) fn unseen_since(self, earlier: Self) -> Duration {
        let wall = self.wall.duration_since(earlier.wall).unwrap_or_default();
        wall.saturating_sub(self.since(earlier))
    }
}

impl Deadline {
    #[inline]
    pub(crate) fn has_come(&self, now: Time) -> bool {
        now.mono >= self.mono || now.wall >= self.wall
    }

    pub(crate) fn earlier(self, other: Self) -> Self {
        Self { wall: self.wall.min(other.wall), mono: self.mono.min(other.mono) }
    }

    /// The time that is left; zero if the deadline has come.
    pub(crate) fn remaining(&self, now: Time) -> Duration {
        let wall = self.wall.duration_since(now.wall).unwrap_or_default();
        wall.min(self.mono.saturating_duration_since(now.mono))
    }
}

/// A deadline, and the clock that tells how much of it is left.
#[derive(Clone, Debug)]
pub(crate) struct Countdown {
    deadline: Deadline,
    clock: Clock,
}

impl Countdown {
    /// The time that is left; zero if the deadline has come.
    pub(crate) fn remaining(&self) -> Duration {
        let now = self.clock.now();
        let mono = self.deadline.mono.saturating_duration_since(now.mono);
        let remaining = self.deadline.remaining(now);
        // The clocks always drift apart a little; more means that the machine was suspended or its clock set.
        if mono.saturating_sub(remaining) < MAX_DRIFT { mono } else { remaining }
    }
}

/// Where an engine gets the time from: the machine, or a test's clock.
#[derive(Clone, Debug, Default)]
pub(crate) struct Clock {
    #[cfg(feature = "test-util")]
    test: Option<TestClock>,
}

impl Clock {
    pub(crate) fn countdown(&self, deadline: Deadline) -> Countdown {
        Countdown { deadline, clock: self.clone() }
    }

    #[inline]
    pub(crate) fn now(&self) -> Time {
        #[cfg(feature = "test-util")]
        if let Some(test) = &self.test {
            return test.time();
        }
        Time { wall: now(), mono: monotonic() }
    }
}

/// The time on tokio's monotonic clock, which tests can pause.
#[inline]
pub(crate) fn monotonic() -> Instant {
    Instant::now()
}

/// A wall clock for tests (feature `test-util`).
///
/// It advances with tokio's time, paused or not, and can be set forward and back. Clones share one clock.
///
/// ```
/// use std::time::{Duration, UNIX_EPOCH};
/// use tower_selam::TestClock;
///
/// # tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap().block_on(async {
/// let clock = TestClock::new(UNIX_EPOCH + Duration::from_secs(1_900_000_000));
/// let before = clock.now();
/// tokio::time::advance(Duration::from_secs(60)).await; // tokio's time is paused
/// clock.jump_back(Duration::from_secs(3600)); // the clock is set back
/// assert_eq!(before.duration_since(clock.now()).unwrap(), Duration::from_secs(3540));
/// # });
/// ```
#[cfg(feature = "test-util")]
#[derive(Clone)]
pub struct TestClock(Arc<Wall>);

#[cfg(feature = "test-util")]
struct Wall {
    start: SystemTime,
    created: Instant,
    /// How far the clock was set forward, in milliseconds.
    offset: AtomicI64,
}

#[cfg(feature = "test-util")]
impl TestClock {
    /// Creates a clock that shows `start`.
    #[must_use]
    pub fn new(start: SystemTime) -> Self {
        Self(Arc::new(Wall { start, created: monotonic(), offset: AtomicI64::new(0) }))
    }

    /// Returns the time that the clock shows.
    #[must_use]
    pub fn now(&self) -> SystemTime {
        self.time().wall
    }

    /// Sets the clock forward, as after a suspension of the machine.
    pub fn jump(&self, by: Duration) {
        self.0.offset.fetch_add(millis(by), Ordering::SeqCst);
    }

    /// Sets the clock back.
    pub fn jump_back(&self, by: Duration) {
        self.0.offset.fetch_sub(millis(by), Ordering::SeqCst);
    }

    fn time(&self) -> Time {
        let mono = monotonic();
        let wall = self.0.start + mono.saturating_duration_since(self.0.created);
        let offset = self.0.offset.load(Ordering::SeqCst);
        let by = Duration::from_millis(offset.unsigned_abs());
        let wall = if offset < 0 { wall.checked_sub(by) } else { wall.checked_add(by) };
        Time { wall: wall.unwrap_or(self.0.start), mono }
    }
}

#[cfg(feature = "test-util")]
fn millis(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(feature = "test-util")]
impl From<TestClock> for Clock {
    fn from(clock: TestClock) -> Self {
        Self { test: Some(clock) }
    }
}

#[cfg(feature = "test-util")]
impl fmt::Debug for TestClock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("TestClock").field(&self.now()).finish()
    }
}
