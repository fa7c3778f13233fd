//! Reports usage and unusual activity from the proxy's metrics: [`Report`].
//!
//! SelamAPI asks its users to monitor for unusual activity and unauthorized access. The example `usage` prints a report on one
//! snapshot of `/metrics`, or on the difference between two.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::Duration,
};

/// The share of a caller's requests that must fail to be reported, and the fewest requests for which that is judged.
const MAX_FAILED: f64 = 0.2;
const MIN_REQUESTS: f64 = 10.0;

/// How many times its own average a caller's request rate must be to be reported.
const BURST: f64 = 5.0;

/// The share of the rate limit below which the rest is reported.
const MIN_REMAINING: f64 = 0.1;

/// Metrics in the [Prometheus text format](https://prometheus.io/docs/instrumenting/exposition_formats/), to the extent that the
/// proxy uses it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snapshot(BTreeMap<Series, f64>);

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Series {
    name: String,
    labels: BTreeMap<String, String>,
}

impl Snapshot {
    /// Parses samples, and skips all other lines.
    pub fn parse(text: &str) -> Self {
        Self(text.lines().filter(|line| !line.starts_with('#')).filter_map(sample).collect())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The increase of each counter since `earlier`. A counter that has decreased was reset by a restart.
    fn since(&self, earlier: &Self) -> Self {
        let increase = self.0.iter().map(|(series, now)| {
            let before = earlier.0.get(series).copied().unwrap_or(0.0);
            (series.clone(), if *now < before { *now } else { now - before })
        });
        Self(increase.collect())
    }

    fn series<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (&'a BTreeMap<String, String>, f64)> {
        self.0
            .iter()
            .filter(move |(series, _)| series.name == name)
            .map(|(series, value)| (&series.labels, *value))
    }

    fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let matches = |found: &BTreeMap<String, String>| {
            labels.iter().all(|(label, value)| found.get(*label).is_some_and(|found| found == value))
        };
        self.series(name).filter(|(found, _)| matches(found)).fold(0.0, |sum, (_, value)| sum + value)
    }

    fn value(&self, name: &str) -> Option<f64> {
        self.series(name).map(|(_, value)| value).next()
    }

    fn values_of(&self, name: &str, label: &str) -> BTreeSet<String> {
        self.series(name).filter_map(|(labels, _)| labels.get(label).cloned()).collect()
    }
}

/// Parses `name{label="value",…} 1.5`, with an optional timestamp.
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

/// A report on the proxy's metrics. Its `Display` output is for people.
#[derive(Debug)]
pub struct Report {
    last: Snapshot,
    /// The increase of all counters in a period, and its length.
    increase: Option<(Snapshot, Duration)>,
    /// The keys in use at the start of the period.
    previous_keys: Vec<String>,
}

impl Report {
    /// Reports everything since the proxy started.
    pub fn of(snapshot: Snapshot) -> Self {
        Self { last: snapshot, increase: None, previous_keys: Vec::new() }
    }

    /// Reports what happened between two snapshots, in addition to the totals.
    pub fn between(earlier: &Snapshot, last: Snapshot, time: Duration) -> Self {
        let increase = last.since(earlier);
        Self { last, increase: Some((increase, time)), previous_keys: Keys::of(earlier).current }
    }

    /// The counts of the period, or the totals if there is only one snapshot.
    fn period(&self) -> &Snapshot {
        self.increase.as_ref().map_or(&self.last, |(increase, _)| increase)
    }

    /// Findings that someone should investigate. Usually empty.
    pub fn unusual(&self) -> Vec<String> {
        let period = self.period();
        let mut findings = Vec::new();
        let mut add = |count: f64, finding: &str| {
            if count > 0.0 {
                findings.push(format!("{finding}: {}", number(count)));
            }
        };
        let refused = |reason| period.sum("selam_proxy_refusals_total", &[("reason", reason)]);
        add(refused("invalid_token"), "requests with an unknown token (a removed one, or someone guessing)");
        add(
            refused("invalid_jwt"),
            "requests with a JWT that is not valid here (of another service, or forged)",
        );
        add(refused("missing_token"), "requests without a token");
        for caller in period.values_of("selam_proxy_refusals_total", "caller") {
            let refused =
                |reason| period.sum("selam_proxy_refusals_total", &[("reason", reason), ("caller", &caller)]);
            add(refused("not_allowed"), &format!("requests from {caller} that --allow does not permit"));
            add(
                refused("bad_path"),
                &format!("requests from {caller} with an ambiguous path (an attempt to evade --allow?)"),
            );
        }
        add(refused("origin_not_allowed"), "requests from web pages that --allow-origin does not list");
        add(refused("foreign_origin"), "requests from web pages on other machines");
        add(refused("foreign_host"), "requests that name another host than this machine");
        add(refused("forwarded"), "requests through a reverse proxy or tunnel, without client tokens");
        add(refused("identity_unavailable"), "requests whose JWT could not be verified: the issuer is down");
        add(refused("loop"), "requests in a loop: the base URL points back to the proxy");
        add(refused("no_upstream"), "requests that did not reach the API");
        add(refused("no_credential"), "requests for which no key or JWT was available");

        let errors = |kind| period.sum("tower_selam_auth_errors_total", &[("kind", kind)]);
        add(errors("invalid_api_key"), "requests whose key the API did not accept (was it revoked?)");
        add(
            errors("missing_api_key"),
            "requests that reached the API without a key (does a gateway in between remove it?)",
        );
        add(errors("insufficient_permissions"), "requests for a feature that the account does not have");
        add(
            errors("token_rejected"),
            "requests whose JWT the API rejected (after a refresh, where possible)",
        );
        for (labels, count) in period.series("tower_selam_renewals_total") {
            let label = |name: &str| labels.get(name).map_or("", String::as_str);
            if !matches!(label("outcome"), "renewed" | "unchanged") {
                let credential = if label("credential") == "token" { "JWT" } else { "key" };
                add(count, &format!("failed refreshes of the {credential} ({})", label("outcome")));
            }
        }
        add(
            period.sum("tower_selam_replays_total", &[("outcome", "refused")]),
            "replayed requests that the API rejected again",
        );

        for caller in period.values_of(REQUESTS, "caller").into_iter().filter(|caller| caller != "unknown") {
            let requests = Requests::of(period, &caller);
            if requests.total >= MIN_REQUESTS && requests.failed() > MAX_FAILED {
                findings.push(format!("{} of the requests from {caller} failed", percent(requests.failed())));
            }
            findings.extend(self.burst(&caller, requests.total));
        }
        let keys = Keys::of(&self.last);
        if !self.previous_keys.is_empty() && self.previous_keys != keys.current {
            findings.push(format!(
                "the API key changed from {} to {}",
                self.previous_keys.join(", "),
                keys.current.join(", ")
            ));
        }
        if keys.retired.is_empty() && keys.current.len() > 1 {
            findings.push(format!("{} keys are in use at once", keys.current.len()));
        }
        if let (Some(left), Some(limit)) = (self.last.value(REMAINING), self.last.value(LIMIT))
            && left < limit * MIN_REMAINING
        {
            findings.push(format!(
                "the rate limit is almost used up: {} of {} left",
                number(left),
                number(limit)
            ));
        }
        findings
    }

    /// Reports a caller that sends far more requests than on average before, or that is new.
    fn burst(&self, caller: &str, requests: f64) -> Option<String> {
        let (_, time) = self.increase.as_ref()?;
        let before = Requests::of(&self.last, caller).total - requests;
        if requests < MIN_REQUESTS {
            return None;
        }
        if before == 0.0 {
            return Some(format!("{caller} is a new caller, with {} requests", number(requests)));
        }
        let uptime = self.last.value(UPTIME)? - time.as_secs_f64();
        let factor = (requests / time.as_secs_f64()) / (before / uptime);
        (uptime > 0.0 && factor > BURST)
            .then(|| format!("{caller} sends {} times as many requests as on average before", number(factor)))
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
    succeeded: f64,
    /// Responses with a 4xx and a 5xx status, from the API and from the proxy itself.
    api: [f64; 2],
    proxy: [f64; 2],
}

impl Requests {
    fn of(snapshot: &Snapshot, caller: &str) -> Self {
        let of = |by, status| snapshot.sum(REQUESTS, &[("caller", caller), ("by", by), ("status", status)]);
        Self {
            total: snapshot.sum(REQUESTS, &[("caller", caller)]),
            succeeded: of("api", "1xx") + of("api", "2xx") + of("api", "3xx"),
            api: [of("api", "4xx"), of("api", "5xx")],
            proxy: [of("proxy", "4xx"), of("proxy", "5xx")],
        }
    }

    fn failed(&self) -> f64 {
        if self.total > 0.0 { 1.0 - self.succeeded / self.total } else { 0.0 }
    }
}

/// Ids of API keys: in use, and no longer in use.
struct Keys {
    current: Vec<String>,
    retired: Vec<String>,
}

impl Keys {
    fn of(snapshot: &Snapshot) -> Self {
        let mut this = Self { current: Vec::new(), retired: Vec::new() };
        for (labels, value) in snapshot.series("tower_selam_credential_info") {
            let ids = if value > 0.0 { &mut this.current } else { &mut this.retired };
            ids.extend(labels.get("id").cloned());
        }
        this
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let keys = Keys::of(&self.last);
        let current = if keys.current.is_empty() { "none yet".to_owned() } else { keys.current.join(", ") };
        write!(f, "{:<12}{current}", "API key")?;
        if !keys.retired.is_empty() {
            write!(f, "   (previously {})", keys.retired.join(", "))?;
        }
        writeln!(f)?;
        if let Some(left) = self.last.value(REMAINING) {
            write!(f, "{:<12}{}", "Rate limit", number(left))?;
            if let Some(limit) = self.last.value(LIMIT) {
                write!(f, " of {}", number(limit))?;
            }
            f.write_str(" requests left")?;
            if let Some(reset) = self.last.value(RESET) {
                write!(f, ", reset {} s after the API's last response", number(reset))?;
            }
            writeln!(f)?;
        }
        if let Some(uptime) = self.last.value(UPTIME) {
            writeln!(f, "{:<12}{}", "Uptime", span(Duration::try_from_secs_f64(uptime).unwrap_or_default()))?;
        }
        writeln!(
            f,
            "{:<12}{}",
            "Period",
            match &self.increase {
                Some((_, time)) => span(*time),
                None => "since the proxy started".to_owned(),
            }
        )?;
        self.callers(f)?;
        self.events(f)?;
        let unusual = self.unusual();
        writeln!(f, "\n{}", if unusual.is_empty() { "No unusual activity" } else { "Unusual activity" })?;
        unusual.iter().try_for_each(|finding| writeln!(f, "  ! {finding}"))
    }
}

impl Report {
    fn callers(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let period = self.period();
        writeln!(
            f,
            "\n{:<24}{:>9}{:>9}{:>16}{:>18}{:>9}",
            "Caller", "requests", "ok", "API 4xx / 5xx", "proxy 4xx / 5xx", "failed"
        )?;
        let mut any = false;
        for caller in self.last.values_of(REQUESTS, "caller") {
            let requests = Requests::of(period, &caller);
            let pair = |[client, server]: [f64; 2]| format!("{} / {}", number(client), number(server));
            any = true;
            writeln!(
                f,
                "  {caller:<22}{:>9}{:>9}{:>16}{:>18}{:>9}",
                number(requests.total),
                number(requests.succeeded),
                pair(requests.api),
                pair(requests.proxy),
                percent(requests.failed()),
            )?;
        }
        if any { Ok(()) } else { writeln!(f, "  none yet") }
    }

    fn events(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const EVENTS: [(&str, &str, &[&str]); 6] = [
            ("API error", "tower_selam_auth_errors_total", &["kind"]),
            ("replay after a 401", "tower_selam_replays_total", &["outcome"]),
            ("not sent", "tower_selam_unsent_requests_total", &["kind"]),
            ("refresh", "tower_selam_renewals_total", &["credential", "outcome"]),
            ("refused by the proxy", "selam_proxy_refusals_total", &["reason", "caller"]),
            ("aborted by", "selam_proxy_broken_off_total", &["by"]),
        ];
        let in_period =
            |text: &str| if self.increase.is_some() { format!("{text:>9}") } else { String::new() };
        writeln!(f, "\n{:<65}{:>9}{}", "Event", "total", in_period("period"))?;
        let mut any = false;
        for (event, name, labels) in EVENTS {
            // One row for each combination of the labels shown.
            let key = |found: &BTreeMap<String, String>| -> Vec<String> {
                labels.iter().map(|label| found.get(*label).cloned().unwrap_or_default()).collect()
            };
            let mut sums: BTreeMap<Vec<String>, (f64, f64)> = BTreeMap::new();
            for (found, value) in self.last.series(name) {
                sums.entry(key(found)).or_default().0 += value;
            }
            for (found, value) in self.period().series(name) {
                sums.entry(key(found)).or_default().1 += value;
            }
            for (labels, (total, increase)) in sums.into_iter().filter(|(_, (total, _))| *total > 0.0) {
                any = true;
                writeln!(
                    f,
                    "  {event:<25}{:<38}{:>9}{}",
                    labels.join(", "),
                    number(total),
                    in_period(&number(increase))
                )?;
            }
        }
        if any { Ok(()) } else { writeln!(f, "  none") }
    }
}

/// Formats `1,234,567`.
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

/// Formats `3 h 20 min`.
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
    fn escapes_in_labels_are_decoded() {
        let read = Snapshot::parse(
            "a{x=\"q\\\"\\\\,}\",y=\"\"} 1.5e3 1700000000\nb 2\n# c 3\nno number\nd{x=\"\n\n",
        );
        let labels: Vec<_> = read.series("a").collect();
        assert_eq!(labels[0].0["x"], "q\"\\,}");
        assert_eq!((labels[0].1, read.value("b"), read.0.len()), (1500.0, Some(2.0), 2));
    }

    #[test]
    fn steady_metrics_have_no_findings() {
        let report =
            Report::between(&Snapshot::parse(EARLIER), Snapshot::parse(EARLIER), Duration::from_secs(60));
        assert_eq!(report.unusual(), Vec::<String>::new());
        assert!(report.to_string().ends_with("No unusual activity\n"));
    }

    #[test]
    fn changes_between_snapshots_are_reported() {
        let report =
            Report::between(&Snapshot::parse(EARLIER), Snapshot::parse(LATER), Duration::from_secs(60));
        assert_eq!(
            report.unusual(),
            [
                "requests with an unknown token (a removed one, or someone guessing): 40",
                "30 % of the requests from mobile failed",
                "mobile is a new caller, with 1,000 requests",
                "the API key changed from 9da0f3 to 77aa90",
                "the rate limit is almost used up: 12 of 600 left",
            ]
        );
        let shown = report.to_string();
        for line in [
            "API key     77aa90   (previously 9da0f3)",
            "Rate limit  12 of 600 requests left, reset 41 s after the API's last response",
            "Period      60 s",
            "  mobile                    1,000      700         0 / 300             0 / 0     30 %",
            "  API error                invalid_api_key                               1        0",
        ] {
            assert!(shown.contains(&format!("{line}\n")), "{shown}");
        }
    }

    #[test]
    fn bursts_of_a_caller_are_reported() {
        let more = EARLIER.replace("1200", "1500").replace("3600", "3660");
        let report =
            Report::between(&Snapshot::parse(EARLIER), Snapshot::parse(&more), Duration::from_secs(60));
        assert_eq!(report.unusual(), ["web sends 15 times as many requests as on average before"]);
        let restarted = EARLIER.replace("1200", "12").replace("3600", "30");
        let report =
            Report::between(&Snapshot::parse(EARLIER), Snapshot::parse(&restarted), Duration::from_secs(60));
        assert!(report.to_string().contains("  web                          12       12"), "{report}");
    }

    #[test]
    fn one_snapshot_is_reported_from_the_start() {
        let unusual = Report::of(Snapshot::parse(LATER)).unusual();
        assert!(
            unusual.iter().any(|finding| finding
                .starts_with("requests whose key the API did not accept (was it revoked?): 1")),
            "{unusual:?}"
        );
    }
}
