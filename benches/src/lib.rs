//! What the benches share: the requests, the contenders with their floors, interleaved rounds, tables and plots.

pub mod contenders;
pub mod issuer;
pub mod plot;
pub mod record;
pub mod rounds;
pub mod table;
pub mod traffic;

/// Whether this argument was given. Cargo passes `--test` to a run that is only to show that it works.
#[must_use]
pub fn is_given(argument: &str) -> bool {
    std::env::args().any(|given| given == argument)
}

/// The first of two, or the second in a run that is only to show that it works.
#[must_use]
pub fn or_short<T>(full: T, short: T) -> T {
    if is_given("--test") { short } else { full }
}
