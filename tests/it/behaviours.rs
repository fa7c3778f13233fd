//! Tests that `tests/README.md` maps every behaviour id to files that test it.

use std::{fs, path::Path};

const README: &str = include_str!("../README.md");

/// The groups of behaviour ids: their letter, and their first and last number.
const GROUPS: [(char, u32, u32); 13] = [
    ('H', 0, 6),
    ('O', 1, 4),
    ('S', 1, 4),
    ('E', 1, 7),
    ('R', 1, 7),
    ('F', 1, 8),
    ('W', 1, 3),
    ('J', 1, 12),
    ('K', 1, 8),
    ('V', 1, 3),
    ('M', 1, 3),
    ('N', 1, 8),
    ('T', 1, 3),
];

/// Returns the ids of the table and the last cell of each row.
fn rows() -> Vec<(&'static str, &'static str)> {
    let table = README.split_once("| Id | Behaviour | Files |").expect("the table of behaviours").1;
    let rows = table.lines().skip(2).take_while(|line| line.starts_with('|'));
    rows.map(|row| {
        let cells: Vec<_> = row.trim_matches('|').split('|').map(str::trim).collect();
        (cells[0], cells[cells.len() - 1])
    })
    .collect()
}

/// Tells whether a comment of `source` names `id`, or a test has it in its name.
fn names(source: &str, id: &str) -> bool {
    let code = format!("{}_", id.to_lowercase());
    source.lines().map(str::trim_start).any(|line| {
        if let Some(comment) = line.strip_prefix("//") {
            return comment.split(|letter: char| !letter.is_alphanumeric()).any(|word| word == id);
        }
        line.split_once("fn ").is_some_and(|(_, name)| {
            let name = name.split('(').next().unwrap_or_default();
            name.starts_with(&code) || name.contains(&format!("_{code}"))
        })
    })
}

#[test]
fn every_behaviour_has_one_row() {
    let expected: Vec<_> = GROUPS
        .iter()
        .flat_map(|&(letter, first, last)| (first..=last).map(move |number| format!("{letter}{number}")))
        .collect();
    assert_eq!(rows().into_iter().map(|(id, _)| id).collect::<Vec<_>>(), expected);
}

#[test]
fn every_listed_file_tests_its_behaviour() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut faults = Vec::new();
    for (id, cell) in rows() {
        let paths: Vec<_> = cell.split('`').skip(1).step_by(2).collect();
        if paths.is_empty() && cell != "*open*" {
            faults.push(format!("{id} lists no file and is not open"));
        }
        for path in paths {
            let in_tests = path.starts_with("it/") || path.starts_with("reqwest/");
            let file = if in_tests { root.join("tests").join(path) } else { root.join(path) };
            match fs::read_to_string(file) {
                Ok(source) if names(&source, id) => {}
                Ok(_) => faults.push(format!("no test of {path} names {id}")),
                Err(error) => faults.push(format!("{id} lists {path}: {error}")),
            }
        }
    }
    assert!(faults.is_empty(), "fix the table of tests/README.md: {faults:#?}");
}
