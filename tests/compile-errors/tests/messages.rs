//! A bound that is missed names its remedy.
//!
//! What surrounds our own words is the compiler's, and differs from version to version, so that this compares with one of
//! them. With another at hand, look at the difference and record it: `TRYBUILD=overwrite cargo test -p compile-errors`.

#![allow(missing_docs, clippy::unwrap_used, clippy::print_stderr, reason = "a test")]

use std::process::Command;

const RECORDED_WITH: &str = "rustc 1.95.";

#[test]
fn a_bound_that_is_missed_names_its_remedy() {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let version = Command::new(rustc).arg("--version").output().unwrap().stdout;
    if !version.starts_with(RECORDED_WITH.as_bytes()) {
        eprintln!("skipped: the messages were recorded with {RECORDED_WITH}x");
        return;
    }
    trybuild::TestCases::new().compile_fail("ui/*.rs");
}
