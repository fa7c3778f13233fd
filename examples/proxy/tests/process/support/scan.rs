//! Searches all output for registered secrets.

use std::{collections::BTreeSet, sync::Mutex};

static SECRETS: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// Registers a secret: from now on, every test searches all output for it.
pub(crate) fn secret(value: impl Into<String>) -> String {
    let value = value.into();
    assert!(value.len() >= 8, "too short: it could occur by chance");
    assert!(value.is_ascii(), "it would not be found in output that is not text");
    SECRETS.lock().unwrap().insert(value.clone());
    value
}

#[track_caller]
pub(crate) fn assert_clean(what: &str, output: &[u8]) {
    let output = String::from_utf8_lossy(output);
    // The lock is released first: a panic would poison it, and fail every other test.
    let is_clean = !SECRETS.lock().unwrap().iter().any(|secret| output.contains(secret));
    assert!(is_clean, "{what} contains a secret: {output}");
}
