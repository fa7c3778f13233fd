//! Readers for `X-RateLimit-*` and `Retry-After`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::{
    HeaderMap,
    header::{HeaderName, RETRY_AFTER},
};

use crate::util::clock;

const LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit");
const REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining");
const RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset");
const RESET_AFTER: HeaderName = HeaderName::from_static("x-ratelimit-reset-after");

/// Numbers at least this large are epoch seconds; smaller ones are delays.
const EPOCH_SECONDS: f64 = 1e9;

/// The account's rate limit, which every API response carries in `X-RateLimit-*`.
///
/// Limits are per account, not per key. A missing or unreadable header gives `None`.
///
/// ```
/// use http::HeaderMap;
/// use std::time::Duration;
/// use tower_selam::RateLimit;
///
/// let mut headers = HeaderMap::new();
/// headers.insert("x-ratelimit-remaining", "59".parse().unwrap());
/// headers.insert("x-ratelimit-reset-after", "1m30s".parse().unwrap());
///
/// let limit = RateLimit::from_headers(&headers).unwrap();
/// assert_eq!(limit.remaining, Some(59));
/// assert_eq!(limit.reset_after, Some(Duration::from_secs(90)));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RateLimit {
    /// Requests allowed in the current window.
    pub limit: Option<u64>,
    /// Requests left in the current window.
    pub remaining: Option<u64>,
    /// When the window ends: `X-RateLimit-Reset` as epoch seconds or RFC 3339, or now plus a delay.
    pub reset_at: Option<SystemTime>,
    /// Time until the window ends: `X-RateLimit-Reset-After`, or the time left until [`reset_at`](Self::reset_at).
    pub reset_after: Option<Duration>,
}

impl RateLimit {
    /// Reads the `X-RateLimit-*` headers; `None` if none of them can be read.
    #[must_use]
    pub fn from_headers(headers: &HeaderMap) -> Option<Self> {
        Self::read(headers, clock::now())
    }

    pub(super) fn read(headers: &HeaderMap, now: SystemTime) -> Option<Self> {
        let number = |name: &HeaderName| text(headers, name)?.parse().ok();
        let at = text(headers, &RESET).and_then(|text| reset_at(text, now));
        let after = text(headers, &RESET_AFTER).and_then(delay);
        let this = Self {
            limit: number(&LIMIT),
            remaining: number(&REMAINING),
            reset_at: at.or_else(|| now.checked_add(after?)),
            reset_after: after.or_else(|| Some(at?.duration_since(now).unwrap_or_default())),
        };
        (this.limit.is_some() || this.remaining.is_some() || this.reset_at.is_some()).then_some(this)
    }
}

/// Reads `Retry-After`, which is seconds or an HTTP date
/// ([RFC 9110 section 10.2.3](https://www.rfc-editor.org/rfc/rfc9110#section-10.2.3)), as a delay from `now`.
pub(crate) fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = text(headers, &RETRY_AFTER)?;
    let until = |at: SystemTime| at.duration_since(now).unwrap_or_default();
    seconds(text).or_else(|| httpdate::parse_http_date(text).ok().map(until))
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    Some(headers.get(name)?.to_str().ok()?.trim())
}

fn reset_at(text: &str, now: SystemTime) -> Option<SystemTime> {
    if let Ok(number) = text.parse::<f64>()
        && number >= EPOCH_SECONDS
    {
        return UNIX_EPOCH.checked_add(Duration::try_from_secs_f64(number).ok()?);
    }
    match delay(text) {
        Some(delay) => now.checked_add(delay),
        None => humantime::parse_rfc3339_weak(text).ok(),
    }
}

/// Parses `90`, `1.5` or `1m30s`.
fn delay(text: &str) -> Option<Duration> {
    // `humantime` 2.4 panics when a sum overflows; these limits rule that out.
    let within_limits =
        || text.len() <= 64 && text.split(|c: char| !c.is_ascii_digit()).all(|run| run.len() <= 9);
    seconds(text).or_else(|| within_limits().then(|| humantime::parse_duration(text).ok()).flatten())
}

fn seconds(text: &str) -> Option<Duration> {
    Duration::try_from_secs_f64(text.parse().ok()?).ok()
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    fn read(pairs: &[(HeaderName, &str)]) -> Option<RateLimit> {
        let headers = pairs
            .iter()
            .filter_map(|(name, value)| Some((name.clone(), HeaderValue::from_str(value).ok()?)))
            .collect();
        RateLimit::read(&headers, now())
    }

    fn now() -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    #[test]
    fn reset_is_read_in_each_form() {
        let in_90_s = Some(now() + Duration::from_secs(90));
        for form in ["1800000090", "1800000090.0", "90", "1m30s", "90s", "2027-01-15T08:01:30Z"] {
            let limit = read(&[(RESET, form)]).unwrap();
            assert_eq!(limit.reset_at, in_90_s, "{form}");
            assert_eq!(limit.reset_after, Some(Duration::from_secs(90)), "{form}");
        }
    }

    #[test]
    fn unreadable_headers_are_none() {
        let forms = "soon -1 NaN inf 1e400 99999999999999999999999 1m30 9e18s é 18446744073709551615s1000ms";
        for form in forms.split(' ').chain([""]) {
            assert_eq!(read(&[(RESET, form), (LIMIT, form), (RESET_AFTER, form)]), None, "{form}");
        }
        assert_eq!(read(&[]), None);
    }

    #[test]
    fn all_four_headers_are_read() {
        let limit =
            read(&[(LIMIT, "60"), (REMAINING, "0"), (RESET, "1800000030"), (RESET_AFTER, "29.5")]).unwrap();
        assert_eq!((limit.limit, limit.remaining), (Some(60), Some(0)));
        assert_eq!(limit.reset_at, Some(now() + Duration::from_secs(30)));
        assert_eq!(limit.reset_after, Some(Duration::from_millis(29_500)));
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let read = |value| {
            let headers = HeaderMap::from_iter([(RETRY_AFTER, HeaderValue::from_static(value))]);
            retry_after(&headers, now())
        };
        assert_eq!(read("120"), Some(Duration::from_secs(120)));
        assert_eq!(read("Fri, 15 Jan 2027 09:00:00 GMT"), Some(Duration::from_secs(3600)));
        assert_eq!(read("Fri, 31 Dec 1999 23:59:59 GMT"), Some(Duration::ZERO));
        assert_eq!(read("later"), None);
    }

    proptest! {
        #[test]
        fn reading_never_panics(text in "[0-9eE+.smhdTZ: -]{0,30}|([0-9]{1,22}(s|ms|ns|m|h|d|y| )){1,4}|[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}:[0-9]{2}(\\.[0-9]{1,12})?Z?|\\PC{0,20}") {
            let _ = read(&[(RESET, &text), (RESET_AFTER, &text), (LIMIT, &text)]);
        }
    }
}
