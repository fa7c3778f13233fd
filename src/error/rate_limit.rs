//! Readers for rate-limit headers and `Retry-After`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::{
    HeaderMap,
    header::{HeaderName, RETRY_AFTER},
};
use sfv::{BareItem, Dictionary, FieldType, Item, List, ListEntry, Parser};

use crate::util::clock;

/// The names of one family of headers: limit, remaining, reset, and reset as a delay.
type Names = [HeaderName; 4];

/// What SelamAPI sends.
const X_RATE_LIMIT: Names = [
    HeaderName::from_static("x-ratelimit-limit"),
    HeaderName::from_static("x-ratelimit-remaining"),
    HeaderName::from_static("x-ratelimit-reset"),
    HeaderName::from_static("x-ratelimit-reset-after"),
];

/// What drafts of the IETF before the seventh define; the last name is not theirs.
const IETF_DRAFT_06: Names = [
    HeaderName::from_static("ratelimit-limit"),
    HeaderName::from_static("ratelimit-remaining"),
    HeaderName::from_static("ratelimit-reset"),
    HeaderName::from_static("ratelimit-reset-after"),
];

const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
const RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
const RETRY_AFTER_MS: HeaderName = HeaderName::from_static("retry-after-ms");

/// Numbers at least this large are epoch seconds; smaller ones are delays. A delay of thirty years is absurd.
const EPOCH_SECONDS: f64 = 1e9;

/// Numbers at least this large are epoch milliseconds: as seconds, they would lie three thousand years ahead.
const EPOCH_MILLISECONDS: f64 = 1e11;

/// The longest structured field that is read, in bytes: every limit is compared with every policy.
const MAX_FIELD: usize = 4096;

/// A rate limit, as the headers of a response tell it.
///
/// SelamAPI sends `X-RateLimit-Limit`, `-Remaining`, `-Reset` and `-Reset-After` with every response; its limits are per
/// account, not per key. Gateways may send the fields of
/// [draft-ietf-httpapi-ratelimit-headers](https://datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers/) instead:
/// `RateLimit` and `RateLimit-Policy`, or `RateLimit-Limit`, `-Remaining` and `-Reset` of its earlier versions. A missing or
/// unreadable header gives `None`; so does a reset thirty years ahead, and a structured field of more than 4 KiB.
///
/// A response may tell several limits. All of them have to allow a request, so the first to be used up decides: that with the fewest
/// requests remaining and, among equals, with the latest reset. Quotas that do not count requests, such
/// as `qu="content-bytes"`, are ignored.
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
///
/// headers.insert("ratelimit", r#""minute";r=7;t=20, "day";r=900;t=3600"#.parse().unwrap());
/// let limit = RateLimit::from_headers(&headers).unwrap();
/// assert_eq!((limit.remaining, limit.reset_after), (Some(7), Some(Duration::from_secs(20))));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RateLimit {
    /// Requests allowed in the current window.
    pub limit: Option<u64>,
    /// Requests left in the current window.
    pub remaining: Option<u64>,
    /// When the window ends: `X-RateLimit-Reset` as epoch seconds, epoch milliseconds or RFC 3339, or now plus a delay.
    pub reset_at: Option<SystemTime>,
    /// Time until the window ends: `X-RateLimit-Reset-After`, or the time left until [`reset_at`](Self::reset_at).
    pub reset_after: Option<Duration>,
}

impl RateLimit {
    /// Reads the rate-limit headers of a response; `None` if none of them can be read.
    #[must_use]
    pub fn from_headers(headers: &HeaderMap) -> Option<Self> {
        Self::read(headers, clock::now())
    }

    /// Reads from any response how long to wait before the next request; the status does not matter.
    ///
    /// That is `Retry-After`, which is seconds or an HTTP date
    /// ([RFC 9110 section 10.2.3](https://www.rfc-editor.org/rfc/rfc9110#section-10.2.3)), or `retry-after-ms`, which some
    /// gateways add. Of both, the longer wait is returned, because too short a wait costs another refusal. Failing these, it is
    /// the time until the limit is reset, if no request remains. `Retry-After` takes precedence over that time, as the draft
    /// of the IETF requires, because it is about this very response.
    ///
    /// ```
    /// use http::HeaderMap;
    /// use std::time::Duration;
    /// use tower_selam::RateLimit;
    ///
    /// let mut headers = HeaderMap::new();
    /// assert_eq!(RateLimit::retry_after(&headers), None);
    /// headers.insert("x-ratelimit-remaining", "0".parse().unwrap());
    /// headers.insert("x-ratelimit-reset-after", "30".parse().unwrap());
    /// assert_eq!(RateLimit::retry_after(&headers), Some(Duration::from_secs(30)));
    /// headers.insert("retry-after", "5".parse().unwrap());
    /// assert_eq!(RateLimit::retry_after(&headers), Some(Duration::from_secs(5)));
    /// ```
    #[must_use]
    pub fn retry_after(headers: &HeaderMap) -> Option<Duration> {
        retry_after(headers, clock::now())
    }

    pub(super) fn read(headers: &HeaderMap, now: SystemTime) -> Option<Self> {
        let families = [Self::named(headers, &X_RATE_LIMIT, now), Self::named(headers, &IETF_DRAFT_06, now)];
        let limits =
            families.into_iter().chain(structured(headers, now)).filter(|limit| *limit != Self::default());
        limits.min_by_key(|limit| {
            // `None` is less than any number.
            let remaining = limit.remaining.unwrap_or(u64::MAX);
            (remaining, std::cmp::Reverse(limit.reset_after))
        })
    }

    fn named(headers: &HeaderMap, [limit, remaining, reset, reset_after]: &Names, now: SystemTime) -> Self {
        // Some servers append policies: `100, 100;w=60`.
        let number = |name| text(headers, name)?.split([',', ';']).next()?.trim().parse().ok();
        let at = text(headers, reset).and_then(|text| reset_at(text, now));
        let after = text(headers, reset_after).and_then(delay);
        Self {
            limit: number(limit),
            remaining: number(remaining),
            reset_at: at.or_else(|| now.checked_add(after?)),
            reset_after: after.or_else(|| Some(at?.duration_since(now).unwrap_or_default())),
        }
    }

    /// A limit from a structured field, whose reset is a delay in seconds.
    fn of(limit: Option<u64>, remaining: Option<u64>, reset: Option<u64>, now: SystemTime) -> Self {
        let reset_after = reset.map(Duration::from_secs).filter(is_plausible);
        Self { limit, remaining, reset_at: reset_after.and_then(|after| now.checked_add(after)), reset_after }
    }
}

/// Reads how long to wait, from `now` on; see [`RateLimit::retry_after`].
pub(crate) fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let until = |at: SystemTime| at.duration_since(now).unwrap_or_default();
    let seconds_or_date = text(headers, &RETRY_AFTER)
        .and_then(|text| seconds(text).or_else(|| httpdate::parse_http_date(text).ok().map(until)));
    let millis = text(headers, &RETRY_AFTER_MS)
        .and_then(|text| Duration::try_from_secs_f64(text.parse::<f64>().ok()? / 1e3).ok());
    // `None` is less than any duration.
    seconds_or_date.max(millis).filter(is_plausible).or_else(|| {
        let limit = RateLimit::read(headers, now)?;
        limit.reset_after.filter(|_| limit.remaining == Some(0))
    })
}

fn is_plausible(wait: &Duration) -> bool {
    wait.as_secs_f64() < EPOCH_SECONDS
}

/// Reads `RateLimit` and `RateLimit-Policy`, which are structured fields
/// ([RFC 9651](https://www.rfc-editor.org/rfc/rfc9651)): lists of items with a name, or a dictionary in the seventh draft.
fn structured(headers: &HeaderMap, now: SystemTime) -> Vec<RateLimit> {
    let policies: List = parse(headers, &RATE_LIMIT_POLICY).unwrap_or_default();
    if let Some(limits) = parse::<List>(headers, &RATE_LIMIT).filter(|limits| limits.iter().any(is_named)) {
        let policy = |named: &Item| {
            policies.iter().filter_map(item).find(|policy| policy.bare_item == named.bare_item)
        };
        let limits = limits.iter().filter(|limit| is_named(limit)).filter_map(item);
        let of_requests = limits.filter(|limit| policy(limit).is_none_or(counts_requests));
        return of_requests
            .map(|limit| {
                let quota = policy(limit).and_then(|policy| parameter(policy, "q"));
                RateLimit::of(quota, parameter(limit, "r"), parameter(limit, "t"), now)
            })
            .collect();
    }
    let Some(limits) = parse::<Dictionary>(headers, &RATE_LIMIT) else { return Vec::new() };
    let member = |name| whole(&item(limits.get(name)?)?.bare_item);
    vec![RateLimit::of(member("limit"), member("remaining"), member("reset"), now)]
}

/// Parses all lines of a field; `None` if there is none, a mistake anywhere, or too much of it.
fn parse<T: FieldType>(headers: &HeaderMap, name: &HeaderName) -> Option<T> {
    let lines: Vec<_> = headers.get_all(name).iter().map(|line| line.as_bytes()).collect();
    let field = lines.join(&b", "[..]);
    if lines.is_empty() || field.len() > MAX_FIELD {
        return None;
    }
    Parser::new(&field).parse().ok()
}

/// Whether a member of `RateLimit` has the name of its policy, and is not a word of a dictionary.
fn is_named(member: &ListEntry) -> bool {
    item(member).is_some_and(|item| item.params.contains_key("r"))
}

fn item(member: &ListEntry) -> Option<&Item> {
    match member {
        ListEntry::Item(item) => Some(item),
        ListEntry::InnerList(_) => None,
    }
}

fn counts_requests(policy: &Item) -> bool {
    let unit = policy.params.get("qu").and_then(BareItem::as_string);
    unit.is_none_or(|unit| unit.as_str() == "requests")
}

fn parameter(item: &Item, name: &str) -> Option<u64> {
    whole(item.params.get(name)?)
}

fn whole(value: &BareItem) -> Option<u64> {
    u64::try_from(value.as_integer()?).ok()
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    Some(headers.get(name)?.to_str().ok()?.trim())
}

fn reset_at(text: &str, now: SystemTime) -> Option<SystemTime> {
    let at = match text.parse::<f64>() {
        Ok(number) if number >= EPOCH_SECONDS => {
            let seconds = if number >= EPOCH_MILLISECONDS { number / 1e3 } else { number };
            UNIX_EPOCH.checked_add(Duration::try_from_secs_f64(seconds).ok()?)?
        }
        _ => match delay(text) {
            Some(delay) => now.checked_add(delay)?,
            None => humantime::parse_rfc3339_weak(text).ok()?,
        },
    };
    is_plausible(&at.duration_since(now).unwrap_or_default()).then_some(at)
}

/// Parses `90`, `1.5` or `1m30s`.
fn delay(text: &str) -> Option<Duration> {
    // `humantime` 2.4 panics when a sum overflows; these limits rule that out.
    let within_limits =
        || text.len() <= 64 && text.split(|c: char| !c.is_ascii_digit()).all(|run| run.len() <= 9);
    let delay =
        seconds(text).or_else(|| within_limits().then(|| humantime::parse_duration(text).ok()).flatten());
    delay.filter(is_plausible)
}

fn seconds(text: &str) -> Option<Duration> {
    Duration::try_from_secs_f64(text.parse().ok()?).ok()
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    const LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit");
    const REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining");
    const RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset");
    const RESET_AFTER: HeaderName = HeaderName::from_static("x-ratelimit-reset-after");

    fn headers(pairs: &[(HeaderName, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            if let Ok(value) = HeaderValue::from_str(value) {
                headers.append(name, value);
            }
        }
        headers
    }

    fn read(pairs: &[(HeaderName, &str)]) -> Option<RateLimit> {
        RateLimit::read(&headers(pairs), now())
    }

    /// Limit, remaining and the seconds until the reset.
    fn numbers(pairs: &[(HeaderName, &str)]) -> Option<(Option<u64>, Option<u64>, Option<u64>)> {
        let limit = read(pairs)?;
        assert_eq!(limit.reset_at, limit.reset_after.map(|after| now() + after));
        Some((limit.limit, limit.remaining, limit.reset_after.map(|after| after.as_secs())))
    }

    fn now() -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    #[test]
    fn reset_is_read_in_each_form() {
        let in_90_s = Some(now() + Duration::from_secs(90));
        for form in
            ["1800000090", "1800000090.0", "1800000090000", "90", "1m30s", "90s", "2027-01-15T08:01:30Z"]
        {
            let limit = read(&[(RESET, form)]).unwrap();
            assert_eq!(limit.reset_at, in_90_s, "{form}");
            assert_eq!(limit.reset_after, Some(Duration::from_secs(90)), "{form}");
        }
    }

    #[test]
    fn unreadable_headers_are_none() {
        let forms =
            "soon -1 NaN inf 1e400 99999999999999999999999 1m30 9e18s é 18446744073709551615s1000ms 9e15";
        for form in forms.split(' ').chain([""]) {
            assert_eq!(read(&[(RESET, form), (LIMIT, form), (RESET_AFTER, form)]), None, "{form}");
        }
        assert_eq!(read(&[]), None);
    }

    #[test]
    fn resets_decades_ahead_are_none() {
        for form in ["9999-12-31T23:59:59Z", "2800000000", "2800000000000", "34999999999999"] {
            assert_eq!(read(&[(RESET, form)]), None, "{form}");
        }
        let past = read(&[(RESET, "1000000000")]).unwrap();
        assert_eq!(past.reset_after, Some(Duration::ZERO));
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
    fn ietf_fields_are_read_in_each_draft() {
        let [limit, remaining, reset, _] = IETF_DRAFT_06;
        let expected = Some((Some(100), Some(50), Some(30)));
        let policy = (RATE_LIMIT_POLICY, "\"default\";q=100;w=60");
        assert_eq!(numbers(&[(RATE_LIMIT, "\"default\";r=50;t=30"), policy.clone()]), expected);
        assert_eq!(numbers(&[(RATE_LIMIT, "limit=100, remaining=50, reset=30")]), expected);
        assert_eq!(
            numbers(&[(limit.clone(), "100"), (remaining.clone(), "50"), (reset.clone(), "30")]),
            expected
        );
        assert_eq!(numbers(&[(limit, "100, 100;w=60"), (remaining, "50"), (reset, "30")]), expected);
        assert_eq!(numbers(&[(RATE_LIMIT, "\"other\";r=50"), policy]), Some((None, Some(50), None)));
    }

    #[test]
    fn the_limit_used_up_first_decides() {
        let limits = "\"minute\";r=9;t=20, \"hour\";r=3;t=1800, \"day\";r=3;t=7200, \"bytes\";r=1;t=5";
        let policies = "\"minute\";q=60, \"hour\";q=600, \"day\";q=900, \"bytes\";q=1;qu=\"content-bytes\"";
        let day = Some((Some(900), Some(3), Some(7200)));
        assert_eq!(numbers(&[(RATE_LIMIT, limits), (RATE_LIMIT_POLICY, policies)]), day);
        // Split over two lines, as any list may be.
        let (one, two) = limits.split_once(", ").unwrap();
        assert_eq!(numbers(&[(RATE_LIMIT, one), (RATE_LIMIT, two), (RATE_LIMIT_POLICY, policies)]), day);
        let api = [
            (LIMIT, "60"),
            (REMAINING, "2"),
            (RESET_AFTER, "7"),
            (RATE_LIMIT, limits),
            (RATE_LIMIT_POLICY, policies),
        ];
        assert_eq!(numbers(&api), Some((Some(60), Some(2), Some(7))));
    }

    #[test]
    fn malformed_fields_are_none() {
        for field in
            ["", "\"default\"", "\"default\";r=-1", "\"a\";r=5;t", "limit=100,", "r=5;", "(\"a\");r=1", "é"]
        {
            assert_eq!(numbers(&[(RATE_LIMIT, field)]).filter(|limit| limit.1 != Some(5)), None, "{field}");
        }
        let unreadable = [(RATE_LIMIT, "\"a\";r=1;t=9"), (RATE_LIMIT, "limit=")];
        assert_eq!(read(&unreadable), None, "one mistake makes the whole field invalid");
    }

    /// Otherwise one response could keep a thread busy for seconds.
    #[test]
    fn long_fields_are_not_read() {
        let limit = (RATE_LIMIT, "\"default\";r=50;t=30");
        let policies = |length: usize| format!("\"default\";q=100{}", " ".repeat(length - 15));
        let quota = |length| read(&[limit.clone(), (RATE_LIMIT_POLICY, &policies(length))]).unwrap().limit;
        assert_eq!((quota(MAX_FIELD), quota(MAX_FIELD + 1)), (Some(100), None));
        let limits = vec![limit; MAX_FIELD / 17];
        assert_eq!(read(&limits), None, "all lines count");
    }

    fn wait(pairs: &[(HeaderName, &str)]) -> Option<u128> {
        retry_after(&headers(pairs), now()).map(|wait| wait.as_millis())
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let wait = |value| wait(&[(RETRY_AFTER, value)]);
        assert_eq!(wait("120"), Some(120_000));
        assert_eq!(wait("Fri, 15 Jan 2027 09:00:00 GMT"), Some(3_600_000));
        assert_eq!(wait("Fri, 31 Dec 1999 23:59:59 GMT"), Some(0));
        for absurd in ["later", "-1", "1e40", "9999999999", "NaN", ""] {
            assert_eq!(wait(absurd), None, "{absurd}");
        }
    }

    #[test]
    fn the_longer_retry_after_wins() {
        assert_eq!(wait(&[(RETRY_AFTER_MS, "250")]), Some(250));
        assert_eq!(wait(&[(RETRY_AFTER_MS, "250"), (RETRY_AFTER, "1")]), Some(1_000));
        assert_eq!(wait(&[(RETRY_AFTER_MS, "1500"), (RETRY_AFTER, "1")]), Some(1_500));
        assert_eq!(wait(&[(RETRY_AFTER_MS, "-1"), (RETRY_AFTER, "1")]), Some(1_000));
    }

    #[test]
    fn the_reset_counts_if_nothing_remains() {
        let with = |remaining| [(REMAINING, remaining), (RESET_AFTER, "30")];
        assert_eq!(wait(&with("0")), Some(30_000));
        assert_eq!(wait(&with("1")), None);
        assert_eq!(wait(&[(RATE_LIMIT, "\"default\";r=0;t=30")]), Some(30_000));
        let [remaining, reset] = with("0");
        assert_eq!(
            wait(&[remaining, reset, (RETRY_AFTER, "2")]),
            Some(2_000),
            "`Retry-After` takes precedence"
        );
    }

    proptest! {
        #[test]
        fn reading_never_panics(text in "[0-9eE+.smhdTZ: -]{0,30}|([0-9]{1,22}(s|ms|ns|m|h|d|y| )){1,4}|[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}:[0-9]{2}(\\.[0-9]{1,12})?Z?|\\PC{0,20}") {
            let _ = read(&[(RESET, &text), (RESET_AFTER, &text), (LIMIT, &text)]);
            let _ = wait(&[(RETRY_AFTER, &text), (RETRY_AFTER_MS, &text)]);
        }

        /// What is written as a structured field is read back, and what is cut off is not misread.
        #[test]
        fn structured_fields_are_read_back(
            limits in prop::collection::vec((0u64..1000, 0u64..100_000), 1..5),
            cut in 0usize..80,
        ) {
            let members: Vec<_> =
                limits.iter().enumerate().map(|(at, (r, t))| format!("\"p{at}\";r={r};t={t}")).collect();
            let field = members.join(", ");
            let (r, t) = limits.iter().copied().min_by_key(|(r, t)| (*r, std::cmp::Reverse(*t))).unwrap();
            prop_assert_eq!(numbers(&[(RATE_LIMIT, &field)]), Some((None, Some(r), Some(t))));
            let _ = read(&[(RATE_LIMIT, &field[..cut.min(field.len())])]);
        }

        #[test]
        fn structured_fields_never_panic(field in "[\"a-c;,=rtqw0-9?:()*. -]{0,40}|\\PC{0,20}") {
            let _ = read(&[(RATE_LIMIT, &field), (RATE_LIMIT_POLICY, &field)]);
        }
    }
}
