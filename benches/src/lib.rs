//! Shared by the benches: requests, contenders and their floors, interleaved rounds, tables, a plot.

pub mod contenders;
pub mod issuer;
pub mod layers;
pub mod plot;
pub mod requests;
pub mod rounds;
pub mod serve;
pub mod table;

/// Whether the program was started with `argument`.
#[must_use]
pub fn is_given(argument: &str) -> bool {
    std::env::args().any(|given| given == argument)
}

/// Returns `full`, or `smoke` in a smoke run: cargo passes `--test` to one.
#[must_use]
pub fn full_or_smoke<T>(full: T, smoke: T) -> T {
    if is_given("--test") { smoke } else { full }
}
