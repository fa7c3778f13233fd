//! Names of the metrics and events; [the guide](crate::guide::telemetry) lists their labels, fields and uses, and the spans.

pub(crate) mod event;
pub(crate) mod span;

/// The target of every event and span.
pub const TARGET: &str = "tower_selam";

/// Counter: completed refreshes, by `credential` and `outcome`.
pub const REFRESHES: &str = "tower_selam_renewals_total";

/// Counter: requests that the API rejected with 401 or 403, by `kind` and `code`.
pub const AUTH_ERRORS: &str = "tower_selam_auth_errors_total";

/// Counter: requests that were replayed after a 401, by `outcome`.
pub const REPLAYS: &str = "tower_selam_replays_total";

/// Counter: requests that a layer refused to send, by `kind`.
pub const UNSENT_REQUESTS: &str = "tower_selam_unsent_requests_total";

/// Counter: refresh tokens that their store failed to save.
pub const UNSAVED_REFRESH_TOKENS: &str = "tower_selam_unsaved_refresh_tokens_total";

/// Counter: tokens that a member of a fleet obtained, by `outcome`: it `led` and asked its source, `adopted` another member's,
/// or asked `alone` because the store failed.
#[cfg(feature = "fleet")]
pub const FLEET_FETCHES: &str = "tower_selam_fleet_fetches_total";

/// Counter: calls of a fleet's store, by `call` and `outcome`.
#[cfg(feature = "fleet")]
pub const FLEET_STORE_CALLS: &str = "tower_selam_fleet_store_calls_total";

/// Gauge: 1 while a fleet's store fails, so that this member goes on alone.
#[cfg(feature = "fleet")]
pub const FLEET_ALONE: &str = "tower_selam_fleet_alone";

/// Gauge: 1 for the API key in use, 0 for a replaced one, by `credential` and `id`.
pub const CREDENTIAL_INFO: &str = "tower_selam_credential_info";

/// Describes the metrics to the installed recorder and registers every counter series at zero, because a counter that
/// first appears with a value above zero shows no increase.
///
/// ```
/// tower_selam::telemetry::describe_metrics(); // once, after installing the recorder
/// ```
#[cfg(feature = "metrics")]
pub fn describe_metrics() {
    event::describe_metrics();
}
