//! A strict parser of the Prometheus text format:
//! [text-based format 0.0.4](https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format).

use std::collections::{BTreeMap, BTreeSet, HashSet};

type Labels = BTreeMap<String, String>;

#[derive(Debug)]
pub(crate) struct Scrape(Vec<(String, Labels, f64)>);

impl Scrape {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        if !text.is_empty() && !text.ends_with('\n') {
            return Err("the last line has no newline".to_owned());
        }
        let mut scrape = Self(Vec::new());
        let mut types: BTreeMap<String, String> = BTreeMap::new();
        let mut helps = HashSet::new();
        // Families whose lines have ended.
        let mut finished = HashSet::new();
        let mut family = String::new();
        let mut seen = BTreeSet::new();
        for line in text.lines() {
            let invalid = |reason: &str| Err(format!("{reason}: {line:?}"));
            if line.is_empty() {
                continue;
            }
            let (of, sample) = if let Some(comment) = line.strip_prefix("# ") {
                let mut words = comment.splitn(3, ' ');
                let (kind, name, rest) = (words.next(), words.next().unwrap_or(""), words.next());
                if !is_name(name) {
                    return invalid("invalid name");
                }
                match (kind, rest) {
                    (Some("HELP"), _) => {
                        if !helps.insert(name.to_owned()) {
                            return invalid("second HELP");
                        }
                    }
                    (
                        Some("TYPE"),
                        Some(kind @ ("counter" | "gauge" | "histogram" | "summary" | "untyped")),
                    ) => {
                        if types.insert(name.to_owned(), kind.to_owned()).is_some() {
                            return invalid("second TYPE");
                        }
                        if scrape.0.iter().any(|(sample, ..)| base(&types, sample) == name) {
                            return invalid("TYPE after its samples");
                        }
                    }
                    _ => return invalid("comment that is neither HELP nor TYPE"),
                }
                (name.to_owned(), None)
            } else if line.starts_with('#') {
                return invalid("comment without a space");
            } else {
                let sample = sample(line).ok_or_else(|| format!("not a sample: {line:?}"))?;
                (base(&types, &sample.0), Some(sample))
            };
            if of != family {
                if !finished.insert(std::mem::replace(&mut family, of.clone())) && !of.is_empty() {
                    return invalid("family ended twice");
                }
                if finished.contains(&of) {
                    return invalid("lines of a family are not contiguous");
                }
            }
            if let Some((name, labels, value)) = sample {
                let Some(kind) = types.get(&of) else { return invalid("sample without a TYPE") };
                if kind == "counter" && !(name.ends_with("_total") && value >= 0.0) {
                    return invalid("counter with a wrong name or value");
                }
                if !seen.insert((name.clone(), labels.clone())) {
                    return invalid("duplicate sample");
                }
                scrape.0.push((name, labels, value));
            }
        }
        scrape.check_histograms(&types)?;
        Ok(scrape)
    }

    /// Checks that buckets increase, that the last one equals the count, and that there is a sum.
    fn check_histograms(&self, types: &BTreeMap<String, String>) -> Result<(), String> {
        for (name, _) in types.iter().filter(|(_, kind)| *kind == "histogram") {
            let mut series: BTreeMap<Labels, Vec<(f64, f64)>> = BTreeMap::new();
            for (_, labels, value) in self.0.iter().filter(|(sample, ..)| *sample == format!("{name}_bucket"))
            {
                let mut labels = labels.clone();
                let bound = labels.remove("le").and_then(|bound| number(&bound));
                series.entry(labels).or_default().push((bound.ok_or("bucket without a bound")?, *value));
            }
            for (labels, buckets) in series {
                let increasing =
                    buckets.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1);
                let find = |suffix: &str| {
                    let name = format!("{name}_{suffix}");
                    self.0
                        .iter()
                        .find(|(found, of, _)| *found == name && *of == labels)
                        .map(|sample| sample.2)
                };
                let complete =
                    buckets.last().is_some_and(|last| last.0.is_infinite() && find("count") == Some(last.1));
                if !increasing || !complete || find("sum").is_none() {
                    return Err(format!("histogram {name} is inconsistent"));
                }
            }
        }
        Ok(())
    }

    /// Returns the sample with exactly these labels.
    pub(crate) fn value(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let labels: Labels =
            labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        self.0.iter().find(|(found, of, _)| found == name && *of == labels).map(|sample| sample.2)
    }

    /// Sums all samples that have at least these labels.
    pub(crate) fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let has = |of: &Labels| {
            labels.iter().all(|(name, value)| of.get(*name).is_some_and(|found| found == value))
        };
        self.0.iter().filter(|(found, of, _)| found == name && has(of)).map(|sample| sample.2).sum()
    }
}

/// Returns the family of a sample.
fn base(types: &BTreeMap<String, String>, sample: &str) -> String {
    for suffix in ["_bucket", "_sum", "_count"] {
        if let Some(base) = sample.strip_suffix(suffix)
            && types.get(base).is_some_and(|kind| kind == "histogram" || kind == "summary")
        {
            return base.to_owned();
        }
    }
    sample.to_owned()
}

fn is_name(name: &str) -> bool {
    let mut chars = name.chars();
    chars.next().is_some_and(|first| first.is_ascii_alphabetic() || "_:".contains(first))
        && chars.all(|c| c.is_ascii_alphanumeric() || "_:".contains(c))
}

fn number(text: &str) -> Option<f64> {
    match text {
        "+Inf" => Some(f64::INFINITY),
        "-Inf" => Some(f64::NEG_INFINITY),
        "NaN" => Some(f64::NAN),
        _ if text.bytes().all(|byte| byte.is_ascii_digit() || b"+-.eE".contains(&byte)) => text.parse().ok(),
        _ => None,
    }
}

/// Parses `name{label="value",…} value`; a timestamp is not accepted.
fn sample(line: &str) -> Option<(String, Labels, f64)> {
    let end = line.find(['{', ' '])?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = Labels::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        while !rest.starts_with('}') {
            let (label, quoted) = rest.split_once("=\"")?;
            if !is_name(label) || label.contains(':') {
                return None;
            }
            let (value, after) = unquote(quoted)?;
            if labels.insert(label.to_owned(), value).is_some() {
                return None;
            }
            rest = match after.strip_prefix(',') {
                Some(more) if !more.starts_with('}') => more,
                Some(_) => return None,
                None if after.starts_with('}') => after,
                None => return None,
            };
        }
        rest = &rest[1..];
    }
    let value = number(rest.strip_prefix(' ')?)?;
    is_name(name).then(|| (name.to_owned(), labels, value))
}

/// Splits off the value before its closing quote.
fn unquote(quoted: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, &quoted[at + 1..])),
            '\\' => value.push(match chars.next()?.1 {
                'n' => '\n',
                escaped @ ('\\' | '"') => escaped,
                _ => return None,
            }),
            c => value.push(c),
        }
    }
    None
}

#[test]
fn invalid_text_is_refused() {
    const GOOD: &str = "# HELP a_total A\n# TYPE a_total counter\na_total{x=\"q\\\"\\\\\\n,}\",y=\"\"} 1.5e3\n\n\
         # HELP b B\n# TYPE b gauge\nb -1\n# HELP h H\n# TYPE h histogram\nh_bucket{le=\"1\"} 1\n\
         h_bucket{le=\"+Inf\"} 2\nh_sum 3\nh_count 2\n";
    let scrape = Scrape::parse(GOOD).unwrap();
    assert_eq!(scrape.value("a_total", &[("x", "q\"\\\n,}"), ("y", "")]), Some(1500.0));
    for (from, to) in [
        ("a_total{", "a_totale{"),
        ("b -1\n", "b -1\nb -1\n"),
        ("b -1\n", "b - 1\n"),
        ("b -1\n", "b\n"),
        ("b -1", "b{x=\"\",} 1"),
        ("b -1", "b{x=1} 1"),
        ("b -1", "b{x=\"1\" 1"),
        ("b -1", "a_total 1"),
        ("# TYPE b gauge\n", ""),
        ("# TYPE b gauge", "# TYPE b gouge"),
        ("h_bucket{le=\"1\"} 1", "h_bucket{le=\"1\"} 3"),
        ("h_count 2", "h_count 3"),
        ("h_sum 3\n", ""),
        ("h_count 2\n", "h_count 2"),
        ("a_total{x=", "a_total{x.y="),
    ] {
        let bad = GOOD.replacen(from, to, 1);
        assert_ne!(bad, GOOD);
        assert!(Scrape::parse(&bad).is_err(), "{bad}");
    }
}
