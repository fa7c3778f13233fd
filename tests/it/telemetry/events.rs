//! Tests of the events that a `tracing` subscriber receives.

use tower_selam::ApiKey;

use super::{
    GUIDE,
    scenario::{assert_no_secret, trigger_everything},
};
use crate::{
    environment::{CASE, run, tell},
    secrets::Log,
    support::KEY,
};

/// K2, S2, S4: events have stable names and fields, show key ids and hold no secret.
///
/// Runs in a separate process: `tracing` caches for all threads whether a subscriber is interested.
#[test]
fn events_are_stable_and_hold_no_secret() {
    const NAME: &str = "telemetry::events::events_are_stable_and_hold_no_secret";
    if std::env::var(CASE).is_err() {
        let events = run(NAME, "events", &[]);
        for message in [
            "credential refreshed",
            "credential refresh failed",
            "credential refresh rejected",
            "request rejected by the API",
            "request replayed",
            "request not sent",
            "refresh token not saved; it is kept in memory, and saving it is tried again",
        ] {
            assert!(events.contains(message), "{message}: {events}");
            assert!(GUIDE.contains(&format!("`{message}`")), "{message}");
        }
        let ids = [KEY, "sk-selam-canary-the-next"].map(|key| ApiKey::new(key).unwrap().id());
        for field in [
            format!("credential=\"api_key\" \"api_key\" outcome=\"renewed\" \"renewed\" id={} ", ids[0]),
            format!("credential=\"api_key\" \"api_key\" outcome=\"renewed\" \"renewed\" id={} ", ids[1]),
            format!(
                "kind=\"forbidden\" \"forbidden\" api_key={0} {0} token=none none error=forbidden (403",
                ids[0]
            ),
            "kind=\"origin_not_allowed\"".to_owned(),
            "outcome=\"accepted\"".to_owned(),
            "outcome=\"panicked\"".to_owned(),
            "outcome=\"refused\"".to_owned(),
            "request_id=\"req_".to_owned(),
            // Error texts are masked and stay on one line.
            r"no other than\r\n[redacted], [redacted] or [redacted]".to_owned(),
            r"no room for\n[redacted]".to_owned(),
        ] {
            assert!(events.contains(&field), "{field}: {events}");
        }
        assert_no_secret(&events);
        return;
    }
    let log = Log::default();
    let _guard = tracing::subscriber::set_default(log.clone());
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(trigger_everything());
    let lines: Vec<_> =
        log.text().split('\n').filter(|line| line.starts_with("tower_selam ")).map(str::to_owned).collect();
    tell(&lines.join(" "));
}
