//! The only reader of time (`.clippy.toml` forbids the others).

use std::time::SystemTime;

/// Wall-clock time, to which expiries and HTTP dates refer.
#[expect(clippy::disallowed_methods, reason = "this is the one place")]
pub(crate) fn now() -> SystemTime {
    SystemTime::now()
}
