//! Tests of metrics, events and spans: their names, and what they must not contain.

#[cfg(feature = "tracing")]
mod events;
#[cfg(feature = "metrics")]
mod metrics;
#[cfg(feature = "metrics")]
mod recorder;
#[cfg(any(feature = "metrics", feature = "tracing"))]
mod scenario;
#[cfg(feature = "tracing")]
mod spans;

use tower_selam::telemetry;

const GUIDE: &str = include_str!("../../src/guide/telemetry.md");

#[test]
fn guide_lists_every_name() {
    for name in [
        telemetry::REFRESHES,
        telemetry::AUTH_ERRORS,
        telemetry::REPLAYS,
        telemetry::UNSENT_REQUESTS,
        telemetry::UNSAVED_REFRESH_TOKENS,
        telemetry::CREDENTIAL_INFO,
        #[cfg(feature = "fleet")]
        telemetry::FLEET_FETCHES,
        #[cfg(feature = "fleet")]
        telemetry::FLEET_STORE_CALLS,
        #[cfg(feature = "fleet")]
        telemetry::FLEET_ALONE,
        telemetry::TARGET,
    ] {
        assert!(name.starts_with("tower_selam"));
        assert!(GUIDE.contains(&format!("`{name}`")), "{name}");
    }
}
