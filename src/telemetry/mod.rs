#![doc = include_str!("../guide/telemetry.md")]

pub(crate) mod event;

/// The target of every event.
pub const TARGET: &str = "tower_selam";

/// Counter: renewals that ended, by `credential` and `outcome`.
pub const RENEWALS: &str = "tower_selam_renewals_total";

/// Counter: responses by which the API refused a request, by `kind` and `code`.
pub const AUTH_ERRORS: &str = "tower_selam_auth_errors_total";

/// Counter: requests that were sent again after a 401, by `outcome`.
pub const REPLAYS: &str = "tower_selam_replays_total";

/// Counter: requests that were not sent, by `kind`.
pub const UNSENT_REQUESTS: &str = "tower_selam_unsent_requests_total";

/// Counter: refresh tokens that their store did not take.
pub const UNSAVED_REFRESH_TOKENS: &str = "tower_selam_unsaved_refresh_tokens_total";

/// Gauge: 1 for the key in use, 0 for one that was; by `credential` and `id`.
pub const CREDENTIAL_INFO: &str = "tower_selam_credential_info";

/// Describes the metrics to the recorder that is installed, and has it show from the start, at zero, all counters that
/// there can be: what counts up from nothing is not seen to rise.
///
/// ```
/// tower_selam::telemetry::describe_metrics(); // once, after the recorder is installed
/// ```
#[cfg(feature = "metrics")]
pub fn describe_metrics() {
    event::describe_metrics();
}
