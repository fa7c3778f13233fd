//! The instructions kept in `benches/instructions.txt`.

use std::{fmt, fs};

use crate::contenders::Target;

pub const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/instructions.txt");

/// What was recorded of a contender.
#[derive(Debug)]
pub struct Recorded {
    pub name: String,
    pub instructions: f64,
    pub times_floor: f64,
}

/// A line of it.
#[must_use]
pub fn line(name: &str, instructions: f64, times_floor: f64) -> String {
    format!("{name:<34}{instructions:>8.0}{times_floor:>8.3}\n")
}

/// What is recorded; nothing, when nothing is.
#[must_use]
pub fn read() -> Vec<Recorded> {
    parse(&fs::read_to_string(PATH).unwrap_or_default())
}

/// Whether it was recorded with this compiler, as [`head`] has it.
#[must_use]
pub fn is_of(compiler: &str) -> bool {
    fs::read_to_string(PATH).is_ok_and(|text| text.starts_with(&head(compiler)))
}

/// What stands above the lines.
#[must_use]
pub fn head(compiler: &str) -> String {
    format!(
        "# Instructions of a request that is built already, and how many times its floor's they are.\n\
         # The ratios are compared: the counts are another compiler's elsewhere. Made by `benches/instructions.sh --update`,\n\
         # with {compiler}.\n"
    )
}

fn parse(text: &str) -> Vec<Recorded> {
    text.lines().filter(|line| !line.starts_with('#')).filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Recorded> {
    let (rest, times_floor) = line.rsplit_once(char::is_whitespace)?;
    let (name, instructions) = rest.trim_end().rsplit_once(char::is_whitespace)?;
    Some(Recorded {
        name: name.trim_end().to_owned(),
        instructions: instructions.parse().ok()?,
        times_floor: times_floor.parse().ok()?,
    })
}

/// A contender's instructions now, and its floor's.
#[derive(Clone, Copy, Debug)]
pub struct Count<'a> {
    pub name: &'a str,
    pub instructions: f64,
    pub floor: &'a str,
    pub floor_instructions: f64,
    pub target: Option<Target>,
}

/// What has become of a contender since it was recorded: how many times its floor's it takes now, and took before.
#[derive(Clone, Copy, Debug)]
pub enum Change {
    Grown {
        now: f64,
        before: f64,
    },
    /// A target is missed that was met.
    Missed {
        now: f64,
        before: f64,
        target: Target,
    },
    Shrunk {
        now: f64,
        before: f64,
    },
    Unrecorded,
}

const GROWTH: f64 = 1.05;

/// As much may come of another libc, or of what the machine can do.
const SLACK: f64 = 1.01;

impl Count<'_> {
    #[must_use]
    pub fn times_floor(&self) -> f64 {
        self.instructions / self.floor_instructions
    }

    /// None, one, or two: what has grown may miss its target besides.
    #[must_use]
    pub fn changes(&self, recorded: &[Recorded]) -> Vec<Change> {
        let find = |name| recorded.iter().find(|recorded| recorded.name == name);
        let Some(own) = find(self.name) else { return vec![Change::Unrecorded] };
        let (now, before) = (self.times_floor(), own.times_floor);
        let mut changes = Vec::new();
        if now > before * GROWTH {
            changes.push(Change::Grown { now, before });
        } else if now * GROWTH < before {
            changes.push(Change::Shrunk { now, before });
        }
        if let (Some(target), Some(floor)) = (self.target, find(self.floor))
            && target.is_met(own.instructions, floor.instructions)
            // Rounded as what is recorded is.
            && !target.is_met(self.instructions.round(), self.floor_instructions.round())
        {
            changes.push(Change::Missed { now, before, target });
        }
        changes
    }
}

impl Change {
    /// Whether it costs more than it did, or than it may.
    #[must_use]
    pub fn is_worse(self) -> bool {
        matches!(self, Self::Grown { .. } | Self::Missed { .. })
    }

    /// Whether the run fails for it. With another compiler than it was recorded with, one may be some instructions better or
    /// worse, and with another libc or machine a few.
    #[must_use]
    pub fn fails(self, same_compiler: bool) -> bool {
        match self {
            Self::Grown { .. } | Self::Unrecorded => true,
            Self::Missed { now, before, .. } => same_compiler && now > before * SLACK,
            Self::Shrunk { .. } => false,
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Grown { now, before } => {
                write!(f, "{now:.3} x its floor, recorded is {before:.3} x: grown by more than 5 %")
            }
            Self::Missed { now, before, target } => write!(
                f,
                "{now:.3} x its floor, recorded is {before:.3} x: misses its target of {target}, which was met"
            ),
            Self::Shrunk { now, before } => {
                write!(f, "{now:.3} x its floor, recorded is {before:.3} x: record it with --update")
            }
            Self::Unrecorded => f.write_str("not recorded: record it with --update"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMES: Target = Target::Times(1.25);
    const TIMES_OR: Target = Target::TimesOr(1.02, 20.0);

    /// What is said of a contender whose floor was and is 1000.
    fn said(before: f64, now: f64, target: Option<Target>) -> Vec<String> {
        let lines = line("floor", 1000.0, 1.0) + &line("a layer, fixed", before, before / 1000.0);
        let count = Count {
            name: "a layer, fixed",
            instructions: now,
            floor: "floor",
            floor_instructions: 1000.0,
            target,
        };
        let changes = count.changes(&parse(&format!("# As it was.\n{lines}")));
        changes
            .iter()
            .map(|change| format!("{}{change}", if change.is_worse() { "worse: " } else { "" }))
            .collect()
    }

    #[test]
    fn growth_counts_beyond_five_percent() {
        assert_eq!(said(1200.0, 1260.0, None), [""; 0]);
        let grown = "worse: 1.261 x its floor, recorded is 1.200 x: grown by more than 5 %";
        assert_eq!(said(1200.0, 1261.0, None), [grown]);
        let shrunk = "1.200 x its floor, recorded is 1.261 x: record it with --update";
        assert_eq!(said(1261.0, 1200.0, None), [shrunk]);
    }

    #[test]
    fn a_target_that_was_met_and_is_missed_is_said_however_little_was_grown() {
        assert_eq!(said(1246.0, 1250.0, Some(TIMES)), [""; 0]);
        assert_eq!(said(1250.0, 1251.0, Some(TIMES)).len(), 1);
        let missed =
            "worse: 1.290 x its floor, recorded is 1.246 x: misses its target of <= 1.25 x, which was met";
        assert_eq!(said(1246.0, 1290.0, Some(TIMES)), [missed]);
        assert_eq!(said(1200.0, 1290.0, Some(TIMES)).len(), 2);
        // Of two ways to meet it, the easier one.
        assert_eq!(said(1000.0, 1020.0, Some(TIMES_OR)), [""; 0]);
        let missed = "worse: 1.021 x its floor, recorded is 1.000 x: misses its target of <= 1.02 x or +20, which was met";
        assert_eq!(said(1000.0, 1021.0, Some(TIMES_OR)), [missed]);
    }

    #[test]
    fn a_lost_target_fails_beyond_one_percent_and_with_the_same_compiler() {
        let missed = |before, now| Change::Missed { now, before, target: TIMES };
        assert!(!missed(1.240, 1.252).fails(true) && missed(1.239, 1.252).fails(true));
        assert!(!missed(1.240, 1.300).fails(false));
        assert!(Change::Grown { now: 1.31, before: 1.24 }.fails(false) && Change::Unrecorded.fails(false));
        assert!(!Change::Shrunk { now: 1.0, before: 1.2 }.fails(true));
    }

    #[test]
    fn a_target_that_was_missed_cannot_be_lost() {
        assert_eq!(said(1251.0, 1290.0, Some(TIMES)), [""; 0]);
    }

    #[test]
    fn what_is_not_recorded_is_to_be() {
        let floor = "floor";
        let new = Count {
            name: "new",
            instructions: 1300.0,
            floor,
            floor_instructions: 1000.0,
            target: Some(TIMES),
        };
        let changes = new.changes(&parse(&line(floor, 1000.0, 1.0)));
        assert!(matches!(changes[..], [Change::Unrecorded]), "{changes:?}");
    }
}
