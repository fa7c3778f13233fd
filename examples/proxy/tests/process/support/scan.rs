//! No secret is where it should not be.

use std::{collections::BTreeSet, sync::Mutex};

static SECRETS: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// Has everything that the proxy says searched for this from now on, by every test.
pub(crate) fn secret(value: impl Into<String>) -> String {
    let value = value.into();
    assert!(value.len() >= 8, "too short to be told from what is no secret");
    SECRETS.lock().unwrap().insert(value.clone());
    value
}

#[track_caller]
pub(crate) fn assert_clean(what: &str, said: &[u8]) {
    for secret in SECRETS.lock().unwrap().iter() {
        let found = said.windows(secret.len()).any(|window| window == secret.as_bytes());
        assert!(!found, "{what} has a secret in it: {}", String::from_utf8_lossy(said));
    }
}
