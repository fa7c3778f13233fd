//! Tests that `src/` is built as `ARCHITECTURE.md` says: imports point one way, and the files it names exist.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    path::{Path, PathBuf},
};

const ARCHITECTURE: &str = include_str!("../../ARCHITECTURE.md");
const CRATE_ROOT: &str = include_str!("../../src/lib.rs");

fn src() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files = entries.flat_map(|path| if path.is_dir() { rust_files(&path) } else { vec![path] });
    files.filter(|path| path.extension().is_some_and(|extension| extension == "rs")).collect()
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|letter: char| !letter.is_alphanumeric() && letter != '_').filter(|word| !word.is_empty())
}

/// What `use` and paths name directly below the crate's root, outside tests and comments.
fn imports(code: &str) -> BTreeSet<&str> {
    let code = code.split("#[cfg(test)]").next().unwrap();
    let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    let offset = |line: &str| line.as_ptr() as usize - code.as_ptr() as usize;
    let mut names = BTreeSet::new();
    for line in lines {
        for (at, _) in line.match_indices("crate::") {
            let path = &code[offset(line) + at + "crate::".len()..];
            names.extend(match path.strip_prefix('{') {
                Some(list) => first_segments(list),
                None => words(path).take(1).collect(),
            });
        }
    }
    names
}

/// The first segment of each path in a `use` list, up to its closing brace.
fn first_segments(list: &str) -> Vec<&str> {
    let (mut depth, mut start, mut segments) = (0, 0, Vec::new());
    for (at, letter) in list.char_indices() {
        if depth == 0 && matches!(letter, ',' | '}') {
            segments.extend(words(&list[start..at]).next());
            start = at + 1;
        }
        match letter {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            _ => {}
        }
    }
    segments
}

/// The folder of each item that the crate's root re-exports.
fn reexports() -> HashMap<&'static str, &'static str> {
    let (_, list) = CRATE_ROOT.split_once("pub use self::{\n").unwrap();
    let (list, _) = list.split_once("\n};").unwrap();
    let entries = list.split(",\n    ").filter_map(|entry| entry.trim().split_once("::"));
    entries.flat_map(|(folder, items)| words(items).map(move |item| (item, folder))).collect()
}

/// The order of the folders: each imports only from those after it.
fn order() -> Vec<&'static str> {
    words(ARCHITECTURE.lines().find(|line| line.starts_with("`adapter →")).unwrap()).collect()
}

#[test]
fn imports_point_one_way() {
    let (order, reexports) = (order(), reexports());
    let rank = |folder: &str| order.iter().position(|ranked| *ranked == folder);
    let independent = ["choose_auth", "guide", "inbound", "simulator", "with_extension"];
    let mut checked = 0;
    for file in rust_files(&src()) {
        let path = file.strip_prefix(src()).unwrap();
        let is_test = path.to_string_lossy().ends_with("tests.rs");
        let Some(folder) =
            path.parent().and_then(|parent| parent.iter().next()).and_then(|name| name.to_str())
        else {
            continue;
        };
        let from = rank(folder);
        assert!(from.is_some() || independent.contains(&folder), "ARCHITECTURE.md does not rank {folder}");
        let code = fs::read_to_string(&file).unwrap();
        for name in if is_test { BTreeSet::new() } else { imports(&code) } {
            let imported = reexports.get(name).copied().unwrap_or(name);
            let Some(to) = rank(imported) else { continue };
            let from = from.unwrap_or_else(|| rank("origin").unwrap());
            assert!(from < to || imported == folder, "{} imports {imported}", path.display());
            checked += 1;
        }
    }
    assert!(checked > 100, "only {checked} imports were found");
}

#[test]
fn named_files_exist() {
    let names = ARCHITECTURE.split('`').skip(1).step_by(2).filter(|name| name.contains('/'));
    let mut checked = 0;
    for name in names {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        assert!(root.join(name).exists() || src().join(name).exists(), "there is no {name}");
        checked += 1;
    }
    assert!(checked > 30, "only {checked} names were found");
}

#[test]
fn every_file_says_what_it_contains() {
    for file in rust_files(&src()) {
        let code = fs::read_to_string(&file).unwrap();
        assert!(code.starts_with("//! "), "{} does not", file.display());
    }
}

#[test]
fn use_lists_are_parsed() {
    let code = "use crate::{\n    ApiKey, a::{B, c::D}, e::F,\n};\n// crate::no\nfn f(_: crate::g::H) {}\n#[cfg(test)]\nuse crate::t;";
    assert_eq!(imports(code), BTreeSet::from(["ApiKey", "a", "e", "g"]));
}
