//! Emits the events and metrics that [the guide](crate::guide::telemetry) documents.
//!
//! Callers must hold no lock: subscribers and recorders are foreign code.

#[cfg(feature = "metrics")]
use std::sync::{Mutex, PoisonError};
use std::{
    error::Error,
    fmt::{self, Write as _},
};

use http::StatusCode;

use crate::{
    ApiKey, AuthError, KeyId,
    error::{Redactor, Setting, is_auth_status, known_code, with_causes},
    telemetry,
};

/// Emits an event if the feature `tracing` is on.
#[cfg(feature = "tracing")]
macro_rules! emit {
    ($level:ident, $($event:tt)+) => { tracing::$level!(target: telemetry::TARGET, $($event)+) };
}

#[cfg(not(feature = "tracing"))]
macro_rules! emit {
    ($level:ident, $($field:ident = $(%)? $value:expr,)* $message:literal $(,)?) => {{
        let _ = || { $(let _ = &$value;)* };
    }};
}

/// Increments a counter if the feature `metrics` is on.
#[cfg(feature = "metrics")]
macro_rules! count {
    ($name:expr $(, $label:literal => $value:expr)*) => {
        metrics::counter!($name $(, $label => $value)*).increment(1)
    };
}

#[cfg(not(feature = "metrics"))]
macro_rules! count {
    ($name:expr $(, $label:literal => $value:expr)*) => {{
        let _ = || { let _ = $name; $(let _ = &$value;)* };
    }};
}

/// How a refresh ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RefreshOutcome {
    Refreshed,
    Unchanged,
    Failed,
    Rejected,
    TimedOut,
    Panicked,
    Aborted,
    Unusable,
}

impl RefreshOutcome {
    /// The stable name in metrics, events and spans.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Refreshed => "renewed",
            Self::Unchanged => "unchanged",
            Self::Failed => "failed",
            Self::Rejected => "rejected",
            Self::TimedOut => "timed_out",
            Self::Panicked => "panicked",
            Self::Aborted => "aborted",
            Self::Unusable => "unusable",
        }
    }
}

/// Reports that a refresh ended. `id` is the current credential's; `secret` is masked in the error.
#[cold]
pub(crate) fn refresh_ended(
    credential: Setting,
    outcome: RefreshOutcome,
    id: Option<KeyId>,
    error: Option<&AuthError>,
    secret: Option<&str>,
) {
    let (credential, label) = (name(credential), outcome.label());
    count!(telemetry::REFRESHES, "credential" => credential, "outcome" => label);
    let (id, error) = (Id(id), error.map(|error| Redacted { error, secret }));
    match (outcome, error) {
        (RefreshOutcome::Refreshed, _) => {
            emit!(info, credential = credential, outcome = label, id = %id, "credential refreshed");
        }
        (RefreshOutcome::Unchanged, _) => {
            emit!(trace, credential = credential, outcome = label, id = %id, "credential unchanged");
        }
        (RefreshOutcome::Rejected, Some(error)) => {
            emit!(error, credential = credential, outcome = label, id = %id, error = %error, "credential refresh rejected");
        }
        (_, Some(error)) => {
            emit!(warn, credential = credential, outcome = label, id = %id, error = %error, "credential refresh failed");
        }
        (_, None) => {
            emit!(warn, credential = credential, outcome = label, id = %id, "credential refresh failed");
        }
    }
}

/// Reports a 401 or 403 that is returned to the caller. `api_key` and `token` identify the credentials that were sent.
#[cold]
pub(crate) fn request_rejected(error: &AuthError, [api_key, token]: [Option<KeyId>; 2]) {
    let kind = error.kind().label();
    count!(telemetry::AUTH_ERRORS, "kind" => kind, "code" => code_label(error.code()));
    emit!(
        warn,
        kind = kind,
        api_key = %Id(api_key),
        token = %Id(token),
        request_id = error.request_id(),
        error = %error,
        "request rejected by the API",
    );
}

/// Reports the response to a replayed request; `None` if the client failed.
#[cold]
pub(crate) fn request_replayed(status: Option<StatusCode>) {
    let outcome = match status {
        Some(status) if is_auth_status(status) => "refused",
        Some(_) => "accepted",
        None => "failed",
    };
    count!(telemetry::REPLAYS, "outcome" => outcome);
    emit!(debug, outcome = outcome, "request replayed");
}

/// Reports a request that a layer refused to send.
#[cold]
pub(crate) fn request_not_sent(error: &AuthError) {
    let kind = error.kind().label();
    count!(telemetry::UNSENT_REQUESTS, "kind" => kind);
    emit!(debug, kind = kind, error = %error, "request not sent");
}

/// Reports a store that failed to save a refresh token.
#[cold]
pub(crate) fn refresh_token_not_saved(id: KeyId, secret: &str, error: &dyn Error) {
    count!(telemetry::UNSAVED_REFRESH_TOKENS);
    let error = Redacted { error, secret: Some(secret) };
    emit!(warn, id = %id, error = %error, "refresh token not saved; it is kept in memory, and saving it is tried again");
}

/// Reports an exchange of a refresh token that ended without an answer.
#[cold]
pub(crate) fn refresh_token_maybe_spent(id: KeyId, secret: &str, error: &dyn Error) {
    let error = Redacted { error, secret: Some(secret) };
    emit!(warn, id = %id, error = %error, "no answer to a refresh token, which may be spent");
}

/// A call of a fleet's store.
#[cfg(feature = "fleet")]
#[derive(Clone, Copy, Debug)]
pub(crate) enum StoreCall {
    Get,
    Put,
}

/// Where a member of a fleet got a token from.
#[cfg(feature = "fleet")]
#[derive(Clone, Copy, Debug)]
pub(crate) enum FleetFetch {
    /// It asked its source, for all members.
    Led,
    /// Another member had fetched it.
    Adopted,
    /// It asked its source for itself, because the store failed.
    Alone,
}

#[cfg(feature = "fleet")]
impl StoreCall {
    fn label(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::Put => "put",
        }
    }
}

#[cfg(feature = "fleet")]
impl FleetFetch {
    fn label(self) -> &'static str {
        match self {
            Self::Led => "led",
            Self::Adopted => "adopted",
            Self::Alone => "alone",
        }
    }
}

/// Reports where a member of a fleet got a token from.
#[cfg(feature = "fleet")]
#[cold]
pub(crate) fn fleet_fetched(from: FleetFetch) {
    count!(telemetry::FLEET_FETCHES, "outcome" => from.label());
}

/// Reports a call of a fleet's store.
#[cfg(feature = "fleet")]
#[cold]
pub(crate) fn fleet_store_called(call: StoreCall, succeeded: bool) {
    let outcome = if succeeded { "ok" } else { "failed" };
    count!(telemetry::FLEET_STORE_CALLS, "call" => call.label(), "outcome" => outcome);
}

/// Reports that a fleet's store is not called for a while.
#[cfg(feature = "fleet")]
#[cold]
pub(crate) fn fleet_store_lost(error: &(dyn Error + 'static)) {
    show_fleet_alone(true);
    let error = Redacted { error, secret: None };
    emit!(warn, error = %error, "the fleet's store fails; this member goes on alone");
}

/// Reports that a fleet's store answers again.
#[cfg(feature = "fleet")]
#[cold]
pub(crate) fn fleet_store_back() {
    show_fleet_alone(false);
    emit!(info, "the fleet's store is back");
}

/// Reports a record of a fleet that cannot be opened.
#[cfg(feature = "fleet")]
#[cold]
pub(crate) fn fleet_record_unreadable(reason: &'static str) {
    emit!(error, reason = reason, "a record of the fleet cannot be opened, and is left alone");
}

/// Reports a record that was put back into a fleet's store.
#[cfg(feature = "fleet")]
#[cold]
pub(crate) fn fleet_record_mended() {
    emit!(info, "the fleet's store had lost a record; it was put back");
}

#[cfg(all(feature = "fleet", feature = "metrics"))]
fn show_fleet_alone(alone: bool) {
    metrics::gauge!(telemetry::FLEET_ALONE).set(if alone { 1.0 } else { 0.0 });
}

#[cfg(all(feature = "fleet", not(feature = "metrics")))]
fn show_fleet_alone(_: bool) {}

/// Reports that the keys which verify callers' JWTs could not be fetched.
#[cfg(feature = "verify")]
#[cold]
pub(crate) fn issuer_keys_failed(error: &(dyn Error + 'static)) {
    let error = Redacted { error, secret: None };
    emit!(warn, error = %error, "the issuer's keys cannot be fetched; it is tried again");
}

/// Reports the fixed key that a layer was built with. A refreshing key is reported by its engine.
pub(crate) fn fixed_key_in_use(key: &ApiKey) {
    show_key(key.id(), true);
}

/// The gauge that shows which API key an engine uses. Tokens have none.
#[derive(Debug)]
pub(crate) struct KeyInUse {
    #[cfg(feature = "metrics")]
    shown: Option<Mutex<Option<KeyId>>>,
}

#[cfg(feature = "metrics")]
impl KeyInUse {
    pub(crate) fn new(credential: Setting) -> Self {
        Self { shown: (credential == Setting::ApiKey).then(Mutex::default) }
    }

    /// Shows the key that `current` returns. Callers take turns, so that the gauge ends with the latest key.
    pub(crate) fn show(&self, current: impl FnOnce() -> Option<KeyId>) {
        let Some(shown) = &self.shown else { return };
        let mut shown = shown.lock().unwrap_or_else(PoisonError::into_inner);
        let current = current();
        if *shown != current {
            if let Some(old) = *shown {
                show_key(old, false);
            }
            if let Some(new) = current {
                show_key(new, true);
            }
            *shown = current;
        }
    }
}

#[cfg(not(feature = "metrics"))]
impl KeyInUse {
    pub(crate) fn new(_: Setting) -> Self {
        Self {}
    }

    pub(crate) fn show(&self, _: impl FnOnce() -> Option<KeyId>) {}
}

/// Reports the key as no longer in use when the engine ends.
#[cfg(feature = "metrics")]
impl Drop for KeyInUse {
    fn drop(&mut self) {
        self.show(|| None);
    }
}

#[cfg(feature = "metrics")]
fn show_key(id: KeyId, in_use: bool) {
    let labels = [("credential", name(Setting::ApiKey).to_owned()), ("id", id.to_string())];
    metrics::gauge!(telemetry::CREDENTIAL_INFO, &labels).set(if in_use { 1.0 } else { 0.0 });
}

#[cfg(not(feature = "metrics"))]
fn show_key(_: KeyId, _: bool) {}

#[cfg(feature = "metrics")]
pub(crate) fn describe_metrics() {
    use metrics::{Unit, counter, describe_counter, describe_gauge};

    use crate::{
        AuthErrorKind as Kind,
        error::{CODES, UNSENT},
    };

    describe_counter!(telemetry::REFRESHES, Unit::Count, "Refreshes of a credential, by outcome.");
    describe_counter!(telemetry::AUTH_ERRORS, Unit::Count, "Requests that the API rejected with 401 or 403.");
    describe_counter!(telemetry::REPLAYS, Unit::Count, "Requests replayed after a 401, by outcome.");
    describe_counter!(telemetry::UNSENT_REQUESTS, Unit::Count, "Requests that a layer refused to send.");
    describe_counter!(
        telemetry::UNSAVED_REFRESH_TOKENS,
        Unit::Count,
        "Refresh tokens that their store failed to save."
    );
    describe_gauge!(
        telemetry::CREDENTIAL_INFO,
        Unit::Count,
        "1 for the API key in use, 0 for a replaced one."
    );

    use RefreshOutcome::{Aborted, Failed, Panicked, Refreshed, Rejected, TimedOut, Unchanged, Unusable};
    for credential in [Setting::ApiKey, Setting::Token, Setting::ClientSecret].map(name) {
        for outcome in [Refreshed, Unchanged, Failed, Rejected, TimedOut, Panicked, Aborted, Unusable] {
            counter!(telemetry::REFRESHES, "credential" => credential, "outcome" => outcome.label())
                .increment(0);
        }
    }
    for (code, kind) in CODES {
        counter!(telemetry::AUTH_ERRORS, "kind" => kind.label(), "code" => code).increment(0);
    }
    for kind in [Kind::Unauthorized, Kind::Forbidden] {
        for code in [NO_CODE, OTHER_CODE] {
            counter!(telemetry::AUTH_ERRORS, "kind" => kind.label(), "code" => code).increment(0);
        }
    }
    for outcome in ["accepted", "refused", "failed"] {
        counter!(telemetry::REPLAYS, "outcome" => outcome).increment(0);
    }
    for kind in UNSENT {
        counter!(telemetry::UNSENT_REQUESTS, "kind" => kind.label()).increment(0);
    }
    counter!(telemetry::UNSAVED_REFRESH_TOKENS).increment(0);
    #[cfg(feature = "fleet")]
    describe_fleet_metrics();
}

#[cfg(all(feature = "fleet", feature = "metrics"))]
fn describe_fleet_metrics() {
    use metrics::{Unit, counter, describe_counter, describe_gauge};

    describe_counter!(
        telemetry::FLEET_FETCHES,
        Unit::Count,
        "Tokens that a member of a fleet obtained, by origin."
    );
    describe_counter!(telemetry::FLEET_STORE_CALLS, Unit::Count, "Calls of a fleet's store, by outcome.");
    describe_gauge!(telemetry::FLEET_ALONE, Unit::Count, "1 while a fleet's store fails.");
    for from in [FleetFetch::Led, FleetFetch::Adopted, FleetFetch::Alone] {
        counter!(telemetry::FLEET_FETCHES, "outcome" => from.label()).increment(0);
    }
    for call in [StoreCall::Get, StoreCall::Put] {
        for outcome in ["ok", "failed"] {
            counter!(telemetry::FLEET_STORE_CALLS, "call" => call.label(), "outcome" => outcome).increment(0);
        }
    }
    show_fleet_alone(false);
}

const NO_CODE: &str = "none";
const OTHER_CODE: &str = "other";

/// Maps codes to a fixed set of labels: servers can send any code, and recorders never drop a series.
fn code_label(code: Option<&str>) -> &'static str {
    let Some(code) = code else { return NO_CODE };
    known_code(code).map_or(OTHER_CODE, |(known, _)| known)
}

pub(super) fn name(credential: Setting) -> &'static str {
    match credential {
        Setting::ApiKey => "api_key",
        Setting::ClientSecret => "client_secret",
        _ => "token",
    }
}

/// Displays the id of a credential, or `none`.
pub(super) struct Id(pub(super) Option<KeyId>);

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(id) => id.fmt(f),
            None => f.write_str("none"),
        }
    }
}

/// Displays an error and its causes on one line, with credentials masked.
struct Redacted<'a> {
    error: &'a dyn Error,
    secret: Option<&'a str>,
}

impl fmt::Display for Redacted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = Redactor::masking(self.secret).text(with_causes(self.error));
        for char in text.chars() {
            match char {
                char if char.is_control() => write!(f, "{}", char.escape_default())?,
                char => f.write_char(char)?,
            }
        }
        Ok(())
    }
}
