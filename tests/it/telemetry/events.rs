//! The events, as a subscriber sees them.

use tower_selam::ApiKey;

use super::{
    PAGE,
    scenario::{assert_clean, everything},
};
use crate::{
    environment::{CASE, run, tell},
    secrets::Log,
    support::KEY,
};

/// In a process of its own: `tracing` remembers for all threads whether anybody listens.
#[test]
fn events_have_their_names_and_fields_and_no_secret() {
    const NAME: &str = "telemetry::events::events_have_their_names_and_fields_and_no_secret";
    if std::env::var(CASE).is_err() {
        let events = run(NAME, "the events", &[]);
        for message in [
            "a credential was renewed",
            "a credential was not renewed",
            "a credential cannot be renewed",
            "the API refused a request",
            "a request was sent again",
            "a request was not sent",
            "the new refresh token was not saved and is kept in memory alone",
        ] {
            assert!(events.contains(message), "{message}: {events}");
            assert!(PAGE.contains(&format!("`{message}`")), "{message}");
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
            // On one line, and masked.
            r"no other than\r\n[redacted], [redacted] or [redacted]".to_owned(),
            r"no room for\n[redacted]".to_owned(),
        ] {
            assert!(events.contains(&field), "{field}: {events}");
        }
        assert_clean(&events);
        return;
    }
    let log = Log::default();
    let _guard = tracing::subscriber::set_default(log.clone());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(everything());
    let ours: Vec<_> =
        log.text().split('\n').filter(|line| line.starts_with("tower_selam ")).map(str::to_owned).collect();
    tell(&ours.join(" "));
}
