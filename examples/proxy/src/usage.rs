//! From the metrics to a look at who uses the API, and at what is unusual about it: [`Report`].
//!
//! SelamAPI asks its users to watch for unusual activity and unauthorized access. The example `usage` prints what this
//! module makes of one reading of `/metrics`, or of two and the time between them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::Duration,
};

/// A caller's share of failed requests that is worth a look, and of how many at least.
const MANY_FAIL: f64 = 0.2;
const FEW: f64 = 10.0;

/// How many times its own average a caller's rate has to be to be worth a look.
const MUCH_MORE: f64 = 5.0;

/// What of the rate limit is little.
const LITTLE_LEFT: f64 = 0.1;

/// Metrics in [Prometheus' text format](https://prometheus.io/docs/instrumenting/exposition_formats/), as far as this
/// program's have it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reading(BTreeMap<Series, f64>);

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Series {
    name: String,
    labels: BTreeMap<String, String>,
}

impl Reading {
    /// Reads what it can; lines that are none of ours are left out.
    pub fn parse(text: &str) -> Self {
        Self(text.lines().filter(|line| !line.starts_with('#')).filter_map(sample).collect())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How much each counter has risen since `earlier`. One that has fallen began anew.
    fn since(&self, earlier: &Self) -> Self {
        let risen = self.0.iter().map(|(series, now)| {
            let before = earlier.0.get(series).copied().unwrap_or(0.0);
            (series.clone(), if *now < before { *now } else { now - before })
        });
        Self(risen.collect())
    }

    fn series<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (&'a BTreeMap<String, String>, f64)> {
        self.0
            .iter()
            .filter(move |(series, _)| series.name == name)
            .map(|(series, value)| (&series.labels, *value))
    }

    fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let fits = |found: &BTreeMap<String, String>| {
            labels.iter().all(|(label, value)| found.get(*label).is_some_and(|found| found == value))
        };
        self.series(name).filter(|(found, _)| fits(found)).fold(0.0, |sum, (_, value)| sum + value)
    }

    fn value(&self, name: &str) -> Option<f64> {
        self.series(name).map(|(_, value)| value).next()
    }

    fn values_of(&self, name: &str, label: &str) -> BTreeSet<String> {
        self.series(name).filter_map(|(labels, _)| labels.get(label).cloned()).collect()
    }
}

/// `name{label="value",…} 1.5`, and perhaps a time.
fn sample(line: &str) -> Option<(Series, f64)> {
    let end = line.find(['{', ' '])?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = BTreeMap::new();
    if let Some(inner) = rest.strip_prefix('{') {
        rest = inner;
        while !rest.starts_with('}') {
            let (label, after) = rest.split_once("=\"")?;
            let mut value = String::new();
            let mut chars = after.char_indices();
            let end = loop {
                match chars.next()? {
                    (at, '"') => break at + 1,
                    (_, '\\') => match chars.next()?.1 {
                        'n' => value.push('\n'),
                        other => value.push(other),
                    },
                    (_, other) => value.push(other),
                }
            };
            labels.insert(label.trim().to_owned(), value);
            rest = after[end..].trim_start_matches(',');
        }
        rest = &rest[1..];
    }
    let value = rest.split_whitespace().next()?.parse().ok()?;
    Some((Series { name: name.to_owned(), labels }, value))
}

/// What the readings say. `Display` is for people.
#[derive(Debug)]
pub struct Report {
    last: Reading,
    /// How much has risen, in how much time.
    risen: Option<(Reading, Duration)>,
    /// The keys that were in use before.
    keys: Vec<String>,
}

impl Report {
    /// All that happened since the proxy began.
    pub fn of(reading: Reading) -> Self {
        Self { last: reading, risen: None, keys: Vec::new() }
    }

    /// What happened between two readings, beside all there was.
    pub fn between(earlier: &Reading, last: Reading, time: Duration) -> Self {
        let risen = last.since(earlier);
        Self { last, risen: Some((risen, time)), keys: Keys::of(earlier).now }
    }

    /// What there is to look at: between the readings, if there are two.
    fn looked_at(&self) -> &Reading {
        self.risen.as_ref().map_or(&self.last, |(risen, _)| risen)
    }

    /// What somebody should look into; empty on a good day.
    pub fn unusual(&self) -> Vec<String> {
        let at = self.looked_at();
        let mut found = Vec::new();
        let mut tell = |count: f64, what: &str| {
            if count > 0.0 {
                found.push(format!("{what}: {}", number(count)));
            }
        };
        let refused = |reason| at.sum("selam_proxy_refusals_total", &[("reason", reason)]);
        tell(
            refused("invalid_token"),
            "requests with a token that nobody was given (an old one, or somebody who guesses)",
        );
        tell(refused("missing_token"), "requests with no token");
        for caller in at.values_of("selam_proxy_refusals_total", "caller") {
            let refused =
                |reason| at.sum("selam_proxy_refusals_total", &[("reason", reason), ("caller", &caller)]);
            tell(
                refused("not_allowed"),
                &format!("requests of {caller} for what --allow does not let it call"),
            );
            tell(
                refused("bad_path"),
                &format!("requests of {caller} for paths that are written to be misread"),
            );
        }
        tell(refused("foreign_origin"), "requests of web pages that are not of this machine");
        tell(refused("loop"), "requests that came back, as the base URL leads to the proxy");
        tell(refused("no_upstream"), "requests that did not reach the API");
        tell(refused("no_credential"), "requests for which there was no key or JWT");

        let errors = |kind| at.sum("tower_selam_auth_errors_total", &[("kind", kind)]);
        tell(errors("invalid_api_key"), "the API did not know the key (was it revoked?)");
        tell(errors("missing_api_key"), "the API saw no key (what is between it and the proxy?)");
        tell(errors("insufficient_permissions"), "the account does not have a feature that was asked for");
        tell(errors("token_rejected"), "the API refused a JWT, and a new one too");
        for (labels, count) in at.series("tower_selam_renewals_total") {
            let label = |name: &str| labels.get(name).map_or("", String::as_str);
            if !matches!(label("outcome"), "renewed" | "unchanged") {
                let credential = if label("credential") == "token" { "JWT" } else { "key" };
                tell(
                    count,
                    &format!("renewals of the {credential} that came to nothing ({})", label("outcome")),
                );
            }
        }
        tell(
            at.sum("tower_selam_replays_total", &[("outcome", "refused")]),
            "requests that were refused again with another key or JWT",
        );

        for caller in at.values_of(REQUESTS, "caller").into_iter().filter(|caller| caller != "unknown") {
            let requests = Requests::of(at, &caller);
            if requests.total >= FEW && requests.failed() > MANY_FAIL {
                found.push(format!("{} of the requests of {caller} failed", percent(requests.failed())));
            }
            found.extend(self.burst(&caller, requests.total));
        }
        let keys = Keys::of(&self.last);
        if !self.keys.is_empty() && self.keys != keys.now {
            found.push(format!("the API key was {} and is {}", self.keys.join(", "), keys.now.join(", ")));
        }
        if keys.before.is_empty() && keys.now.len() > 1 {
            found.push(format!("{} keys are in use at once", keys.now.len()));
        }
        if let (Some(left), Some(limit)) = (self.last.value(REMAINING), self.last.value(LIMIT))
            && left < limit * LITTLE_LEFT
        {
            found.push(format!("little is left of the rate limit: {} of {}", number(left), number(limit)));
        }
        found
    }

    /// Whether the caller is much faster than it was before.
    fn burst(&self, caller: &str, requests: f64) -> Option<String> {
        let (_, time) = self.risen.as_ref()?;
        let before = Requests::of(&self.last, caller).total - requests;
        if requests < FEW {
            return None;
        }
        if before == 0.0 {
            return Some(format!("{caller} called for the first time, {} times", number(requests)));
        }
        let uptime = self.last.value(UPTIME)? - time.as_secs_f64();
        let factor = (requests / time.as_secs_f64()) / (before / uptime);
        (uptime > 0.0 && factor > MUCH_MORE)
            .then(|| format!("{caller} called {} times as often as before on average", number(factor)))
    }
}

const REQUESTS: &str = "selam_proxy_requests_total";
const REMAINING: &str = "selam_proxy_rate_limit_remaining";
const LIMIT: &str = "selam_proxy_rate_limit";
const RESET: &str = "selam_proxy_rate_limit_reset_seconds";
const UPTIME: &str = "selam_proxy_uptime_seconds";

/// A caller's requests.
struct Requests {
    total: f64,
    good: f64,
    /// 4xx and 5xx, of the API's and of the proxy's own.
    api: [f64; 2],
    proxy: [f64; 2],
}

impl Requests {
    fn of(reading: &Reading, caller: &str) -> Self {
        let of = |by, status| reading.sum(REQUESTS, &[("caller", caller), ("by", by), ("status", status)]);
        Self {
            total: reading.sum(REQUESTS, &[("caller", caller)]),
            good: of("api", "1xx") + of("api", "2xx") + of("api", "3xx"),
            api: [of("api", "4xx"), of("api", "5xx")],
            proxy: [of("proxy", "4xx"), of("proxy", "5xx")],
        }
    }

    fn failed(&self) -> f64 {
        if self.total > 0.0 { 1.0 - self.good / self.total } else { 0.0 }
    }
}

/// Ids of keys.
struct Keys {
    now: Vec<String>,
    before: Vec<String>,
}

impl Keys {
    fn of(reading: &Reading) -> Self {
        let mut this = Self { now: Vec::new(), before: Vec::new() };
        for (labels, value) in reading.series("tower_selam_credential_info") {
            let ids = if value > 0.0 { &mut this.now } else { &mut this.before };
            ids.extend(labels.get("id").cloned());
        }
        this
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let or_none = |ids: &[String]| if ids.is_empty() { "none yet".to_owned() } else { ids.join(", ") };
        let keys = Keys::of(&self.last);
        write!(f, "{:<12}{}", "API key", or_none(&keys.now))?;
        if !keys.before.is_empty() {
            write!(f, "   (before: {})", keys.before.join(", "))?;
        }
        writeln!(f)?;
        if let Some(left) = self.last.value(REMAINING) {
            write!(f, "{:<12}{}", "Rate limit", number(left))?;
            if let Some(limit) = self.last.value(LIMIT) {
                write!(f, " of {}", number(limit))?;
            }
            f.write_str(" requests left")?;
            if let Some(reset) = self.last.value(RESET) {
                write!(f, ", {} s to go when last heard of", number(reset))?;
            }
            writeln!(f)?;
        }
        if let Some(uptime) = self.last.value(UPTIME) {
            writeln!(
                f,
                "{:<12}{}",
                "Running",
                span(Duration::try_from_secs_f64(uptime).unwrap_or_default())
            )?;
        }
        writeln!(
            f,
            "{:<12}{}",
            "Looked at",
            match &self.risen {
                Some((_, time)) => format!("what happened within {}", span(*time)),
                None => "everything since the proxy began".to_owned(),
            }
        )?;
        self.callers(f)?;
        self.failures(f)?;
        let unusual = self.unusual();
        writeln!(f, "\n{}", if unusual.is_empty() { "Nothing unusual" } else { "Unusual" })?;
        unusual.iter().try_for_each(|what| writeln!(f, "  ! {what}"))
    }
}

impl Report {
    fn callers(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = self.looked_at();
        writeln!(
            f,
            "\n{:<24}{:>9}{:>9}{:>16}{:>18}{:>9}",
            "Caller", "requests", "good", "API 4xx / 5xx", "proxy 4xx / 5xx", "failed"
        )?;
        let mut any = false;
        for caller in self.last.values_of(REQUESTS, "caller") {
            let requests = Requests::of(at, &caller);
            let pair = |[client, server]: [f64; 2]| format!("{} / {}", number(client), number(server));
            any = true;
            writeln!(
                f,
                "  {caller:<22}{:>9}{:>9}{:>16}{:>18}{:>9}",
                number(requests.total),
                number(requests.good),
                pair(requests.api),
                pair(requests.proxy),
                percent(requests.failed()),
            )?;
        }
        if any { Ok(()) } else { writeln!(f, "  nobody yet") }
    }

    fn failures(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const KINDS: [(&str, &str, &[&str]); 6] = [
            ("the API refused", "tower_selam_auth_errors_total", &["kind"]),
            ("sent again after a 401", "tower_selam_replays_total", &["outcome"]),
            ("not sent", "tower_selam_unsent_requests_total", &["kind"]),
            ("renewal", "tower_selam_renewals_total", &["credential", "outcome"]),
            ("the proxy refused", "selam_proxy_refusals_total", &["reason", "caller"]),
            ("broken off by", "selam_proxy_broken_off_total", &["by"]),
        ];
        let late = |late: &str| if self.risen.is_some() { format!("{late:>9}") } else { String::new() };
        writeln!(f, "\n{:<65}{:>9}{}", "What became of credentials and requests", "in all", late("of late"))?;
        let mut any = false;
        for (what, name, labels) in KINDS {
            // One row for each combination of the labels that are shown.
            let key = |found: &BTreeMap<String, String>| -> Vec<String> {
                labels.iter().map(|label| found.get(*label).cloned().unwrap_or_default()).collect()
            };
            let mut sums: BTreeMap<Vec<String>, (f64, f64)> = BTreeMap::new();
            for (found, value) in self.last.series(name) {
                sums.entry(key(found)).or_default().0 += value;
            }
            for (found, value) in self.looked_at().series(name) {
                sums.entry(key(found)).or_default().1 += value;
            }
            for (labels, (all, risen)) in sums.into_iter().filter(|(_, (all, _))| *all > 0.0) {
                any = true;
                writeln!(
                    f,
                    "  {what:<25}{:<38}{:>9}{}",
                    labels.join(", "),
                    number(all),
                    late(&number(risen))
                )?;
            }
        }
        if any { Ok(()) } else { writeln!(f, "  nothing but success") }
    }
}

/// `1,234,567`.
fn number(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut grouped = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

fn percent(share: f64) -> String {
    match share * 100.0 {
        share if share > 0.0 && share < 1.0 => "<1 %".to_owned(),
        share => format!("{share:.0} %"),
    }
}

/// `3 h 20 min`.
fn span(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..120 => format!("{:.0} s", time.as_secs_f64()),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EARLIER: &str = r#"
# HELP selam_proxy_requests_total Requests
# TYPE selam_proxy_requests_total counter
selam_proxy_requests_total{status="2xx",by="api",caller="web"} 1200
selam_proxy_requests_total{status="4xx",by="api",caller="web"} 3
selam_proxy_refusals_total{reason="invalid_token",caller="unknown"} 0
tower_selam_auth_errors_total{kind="invalid_api_key",code="invalid_api_key"} 1
tower_selam_credential_info{credential="api_key",id="9da0f3"} 1
selam_proxy_uptime_seconds 3600
selam_proxy_rate_limit 600
selam_proxy_rate_limit_remaining 598
"#;

    const LATER: &str = r#"
selam_proxy_requests_total{status="2xx",by="api",caller="web"} 1220
selam_proxy_requests_total{status="4xx",by="api",caller="web"} 3
selam_proxy_requests_total{status="2xx",by="api",caller="mobile"} 700
selam_proxy_requests_total{status="5xx",by="api",caller="mobile"} 300
selam_proxy_requests_total{status="4xx",by="proxy",caller="unknown"} 40
selam_proxy_refusals_total{reason="invalid_token",caller="unknown"} 40
tower_selam_auth_errors_total{kind="invalid_api_key",code="invalid_api_key"} 1
tower_selam_credential_info{credential="api_key",id="9da0f3"} 0
tower_selam_credential_info{credential="api_key",id="77aa90"} 1
selam_proxy_uptime_seconds 3660
selam_proxy_rate_limit 600
selam_proxy_rate_limit_remaining 12
selam_proxy_rate_limit_reset_seconds 41
"#;

    #[test]
    fn the_text_format_is_read_with_its_escapes() {
        let read =
            Reading::parse("a{x=\"q\\\"\\\\,}\",y=\"\"} 1.5e3 1700000000\nb 2\n# c 3\nno number\nd{x=\"\n\n");
        let labels: Vec<_> = read.series("a").collect();
        assert_eq!(labels[0].0["x"], "q\"\\,}");
        assert_eq!((labels[0].1, read.value("b"), read.0.len()), (1500.0, Some(2.0), 2));
    }

    #[test]
    fn a_good_day_has_nothing_unusual() {
        let report =
            Report::between(&Reading::parse(EARLIER), Reading::parse(EARLIER), Duration::from_secs(60));
        assert_eq!(report.unusual(), Vec::<String>::new());
        assert!(report.to_string().ends_with("Nothing unusual\n"));
    }

    #[test]
    fn what_changed_between_two_readings_is_told() {
        let report =
            Report::between(&Reading::parse(EARLIER), Reading::parse(LATER), Duration::from_secs(60));
        assert_eq!(
            report.unusual(),
            [
                "requests with a token that nobody was given (an old one, or somebody who guesses): 40",
                "30 % of the requests of mobile failed",
                "mobile called for the first time, 1,000 times",
                "the API key was 9da0f3 and is 77aa90",
                "little is left of the rate limit: 12 of 600",
            ]
        );
        let shown = report.to_string();
        for line in [
            "API key     77aa90   (before: 9da0f3)",
            "Rate limit  12 of 600 requests left, 41 s to go when last heard of",
            "Looked at   what happened within 60 s",
            "  mobile                    1,000      700         0 / 300             0 / 0     30 %",
            "  the API refused          invalid_api_key                               1        0",
        ] {
            assert!(shown.contains(&format!("{line}\n")), "{shown}");
        }
    }

    #[test]
    fn one_that_calls_much_more_than_before_stands_out() {
        let more = EARLIER.replace("1200", "1500").replace("3600", "3660");
        let report =
            Report::between(&Reading::parse(EARLIER), Reading::parse(&more), Duration::from_secs(60));
        assert_eq!(report.unusual(), ["web called 15 times as often as before on average"]);
        let restarted = EARLIER.replace("1200", "12").replace("3600", "30");
        let report =
            Report::between(&Reading::parse(EARLIER), Reading::parse(&restarted), Duration::from_secs(60));
        assert!(report.to_string().contains("  web                          12       12"), "{report}");
    }

    #[test]
    fn one_reading_is_looked_at_from_the_beginning() {
        let unusual = Report::of(Reading::parse(LATER)).unusual();
        assert!(
            unusual.iter().any(|what| what.starts_with("the API did not know the key (was it revoked?): 1")),
            "{unusual:?}"
        );
    }
}
