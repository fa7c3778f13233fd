//! The account's rate limit and its response headers.

use std::time::Duration;

use http::{HeaderMap, HeaderName};
use tokio::time::Instant;

use super::{jwt::epoch_seconds, replies::set};
use crate::util::clock;

pub(super) const MINUTE: Duration = Duration::from_secs(60);

/// Counts requests in windows of one length, a minute by default.
#[derive(Clone, Copy)]
pub(super) struct Window {
    limit: u64,
    length: Duration,
    used: u64,
    ends: Instant,
}

impl Window {
    pub(super) fn new(limit: u64, length: Duration) -> Self {
        Self { limit, length, used: 0, ends: Instant::now() + length }
    }

    /// Counts a request and returns the window as of that request.
    pub(super) fn count(&mut self) -> Self {
        if Instant::now() >= self.ends {
            *self = Self::new(self.limit, self.length);
        }
        self.used += 1;
        *self
    }

    pub(super) fn is_exceeded(&self) -> bool {
        self.used > self.limit
    }

    pub(super) fn reset_after(&self) -> Duration {
        self.ends.saturating_duration_since(Instant::now())
    }

    /// Adds the headers that an injected response does not already have.
    pub(super) fn write(&self, headers: &mut HeaderMap) {
        let after = whole_seconds(self.reset_after());
        for (name, value) in [
            ("x-ratelimit-limit", self.limit),
            ("x-ratelimit-remaining", self.limit.saturating_sub(self.used)),
            ("x-ratelimit-reset", epoch_seconds(clock::now()) + after),
            ("x-ratelimit-reset-after", after),
        ] {
            set_if_absent(headers, name, &value.to_string());
        }
    }
}

impl Default for Window {
    fn default() -> Self {
        Self::new(600, MINUTE)
    }
}

/// Rounds up, so that the wait is over after that many seconds.
pub(super) fn whole_seconds(wait: Duration) -> u64 {
    wait.as_secs() + u64::from(wait.subsec_nanos() > 0)
}

pub(super) fn set_if_absent(headers: &mut HeaderMap, name: &'static str, value: &str) {
    let name = HeaderName::from_static(name);
    if !headers.contains_key(&name) {
        set(headers, &name, value);
    }
}
