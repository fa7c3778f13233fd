//! What is counted and told of, by which names, and what is not: secrets, users, and requests that are well.

#[cfg(feature = "tracing")]
mod events;
#[cfg(feature = "metrics")]
mod metrics;
#[cfg(feature = "metrics")]
mod recorder;
#[cfg(any(feature = "metrics", feature = "tracing"))]
mod scenario;

use tower_selam::telemetry;

const PAGE: &str = include_str!("../../src/guide/telemetry.md");

#[test]
fn the_page_has_every_name() {
    for name in [
        telemetry::RENEWALS,
        telemetry::AUTH_ERRORS,
        telemetry::REPLAYS,
        telemetry::UNSENT_REQUESTS,
        telemetry::UNSAVED_REFRESH_TOKENS,
        telemetry::CREDENTIAL_INFO,
        telemetry::TARGET,
    ] {
        assert!(name.starts_with("tower_selam"));
        assert!(PAGE.contains(&format!("`{name}`")), "{name}");
    }
}
