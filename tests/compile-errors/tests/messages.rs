//! Checks that the compiler's message for an unmet bound names the remedy.
//!
//! Only part of each message is ours; the rest differs between compiler versions. Therefore the test compares with a
//! single version and skips all others. After a change, review the difference and record it:
//! `TRYBUILD=overwrite cargo test -p compile-errors`.

#![allow(missing_docs, clippy::unwrap_used, clippy::print_stderr, reason = "a test")]

use std::process::Command;

const RECORDED_WITH: &str = "rustc 1.95.";

#[test]
fn an_unmet_bound_names_its_remedy() {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let version = Command::new(rustc).arg("--version").output().unwrap().stdout;
    if !version.starts_with(RECORDED_WITH.as_bytes()) {
        eprintln!("skipped: the messages were recorded with {RECORDED_WITH}x");
        return;
    }
    trybuild::TestCases::new().compile_fail("ui/*.rs");
}
