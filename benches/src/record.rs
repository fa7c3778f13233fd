//! The instructions kept in `benches/instructions.txt`.

use std::fs;

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
    let text = fs::read_to_string(PATH).unwrap_or_default();
    text.lines().filter(|line| !line.starts_with('#')).filter_map(parse).collect()
}

fn parse(line: &str) -> Option<Recorded> {
    let (rest, times_floor) = line.rsplit_once(char::is_whitespace)?;
    let (name, instructions) = rest.trim_end().rsplit_once(char::is_whitespace)?;
    Some(Recorded {
        name: name.trim_end().to_owned(),
        instructions: instructions.parse().ok()?,
        times_floor: times_floor.parse().ok()?,
    })
}
