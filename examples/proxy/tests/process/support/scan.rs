//! Searches all output for registered secrets.

use std::{collections::BTreeSet, sync::Mutex};

static SECRETS: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// Registers a secret: from now on, every test searches all output for it.
pub(crate) fn secret(value: impl Into<String>) -> String {
    let value = value.into();
    assert!(value.len() >= 8, "too short: it could occur by chance");
    SECRETS.lock().unwrap().insert(value.clone());
    value
}

#[track_caller]
pub(crate) fn assert_clean(what: &str, output: &[u8]) {
    for secret in SECRETS.lock().unwrap().iter() {
        let found = output.windows(secret.len()).any(|window| window == secret.as_bytes());
        assert!(!found, "{what} contains a secret: {}", String::from_utf8_lossy(output));
    }
}
