//! What happens, for whoever watches the program: events of `tracing` and metrics of `metrics`, with the features of
//! those names. [`telemetry`](crate::telemetry) says what they are called and what they mean.
//!
//! Who calls these holds no lock of an engine: subscribers and recorders are others' code.

#[cfg(feature = "metrics")]
use std::sync::{Mutex, PoisonError};
use std::{
    error::Error,
    fmt::{self, Write as _},
};

use http::StatusCode;

use crate::{
    ApiKey, AuthError, Credentials, KeyId, Provider,
    error::{CODES, Redactor, Subject, is_auth_status, with_causes},
    oauth::RefreshToken,
    telemetry,
};

/// An event, with the feature `tracing`.
#[cfg(feature = "tracing")]
macro_rules! tell {
    ($level:ident, $($event:tt)+) => { tracing::$level!(target: telemetry::TARGET, $($event)+) };
}

#[cfg(not(feature = "tracing"))]
macro_rules! tell {
    ($level:ident, $($field:ident = $(%)? $value:expr,)* $message:literal $(,)?) => {{
        let _ = || { $(let _ = &$value;)* };
    }};
}

/// One more on a counter, with the feature `metrics`.
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

/// How a renewal ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Renewal {
    Renewed,
    Unchanged,
    Failed,
    Refused,
    TimedOut,
    Panicked,
    Aborted,
    Unfit,
}

impl Renewal {
    fn label(self) -> &'static str {
        match self {
            Self::Renewed => "renewed",
            Self::Unchanged => "unchanged",
            Self::Failed => "failed",
            Self::Refused => "refused",
            Self::TimedOut => "timed_out",
            Self::Panicked => "panicked",
            Self::Aborted => "aborted",
            Self::Unfit => "unfit",
        }
    }
}

/// A renewal has ended. `id` is of what there is now, and `secret` may not be shown.
#[cold]
pub(crate) fn renewal_ended(
    credential: Subject,
    outcome: Renewal,
    id: Option<KeyId>,
    error: Option<&AuthError>,
    secret: Option<&str>,
) {
    let (credential, label) = (name(credential), outcome.label());
    count!(telemetry::RENEWALS, "credential" => credential, "outcome" => label);
    let (id, error) = (Id(id), error.map(|error| Said { error, secret }));
    match (outcome, error) {
        (Renewal::Renewed, _) => {
            tell!(info, credential = credential, outcome = label, id = %id, "a credential was renewed");
        }
        (Renewal::Unchanged, _) => {
            tell!(trace, credential = credential, outcome = label, id = %id, "a credential is still the same");
        }
        (Renewal::Refused, Some(error)) => {
            tell!(error, credential = credential, outcome = label, id = %id, error = %error, "a credential cannot be renewed");
        }
        (_, Some(error)) => {
            tell!(warn, credential = credential, outcome = label, id = %id, error = %error, "a credential was not renewed");
        }
        (_, None) => {
            tell!(warn, credential = credential, outcome = label, id = %id, "a credential was not renewed");
        }
    }
}

/// A response goes up by which the API refused what was `sent`.
#[cold]
pub(crate) fn refused_by_api(error: &AuthError, sent: Option<&Credentials>) {
    let kind = error.kind().label();
    count!(telemetry::AUTH_ERRORS, "kind" => kind, "code" => code_label(error.code()));
    tell!(
        warn,
        kind = kind,
        api_key = %Id(sent.and_then(|sent| Some(sent.api_key()?.id()))),
        token = %Id(sent.and_then(|sent| Some(sent.jwt()?.id()))),
        request_id = error.request_id(),
        error = %error,
        "the API refused a request",
    );
}

/// A request was sent once more after a 401: what the answer is, if there is one.
#[cold]
pub(crate) fn sent_again(status: Option<StatusCode>) {
    let outcome = match status {
        Some(status) if is_auth_status(status) => "refused",
        Some(_) => "accepted",
        None => "failed",
    };
    count!(telemetry::REPLAYS, "outcome" => outcome);
    tell!(debug, outcome = outcome, "a request was sent again");
}

/// A layer has refused to send a request.
#[cold]
pub(crate) fn not_sent(error: &AuthError) {
    let kind = error.kind().label();
    count!(telemetry::UNSENT_REQUESTS, "kind" => kind);
    tell!(debug, kind = kind, error = %error, "a request was not sent");
}

/// A store of refresh tokens has failed.
#[cold]
pub(crate) fn refresh_token_not_saved(token: &RefreshToken, error: &dyn Error) {
    count!(telemetry::UNSAVED_REFRESH_TOKENS);
    let error = Said { error, secret: Some(token.expose_secret()) };
    tell!(
        warn,
        id = %token.id(),
        error = %error,
        "the new refresh token was not saved and is kept in memory alone",
    );
}

/// A layer was made with this key. One that renews itself is shown by its engine.
pub(crate) fn key_given(key: Option<&Provider<ApiKey>>) {
    if let Some(Provider::Fixed(key)) = key {
        show_key(key.id(), true);
    }
}

/// What a gauge shows of an engine's credential.
pub(crate) trait Shown: Default + Send + Sync {
    /// It may be another by now.
    fn show(&self, current: impl FnOnce() -> Option<KeyId>);
}

/// Nothing.
impl Shown for () {
    fn show(&self, _: impl FnOnce() -> Option<KeyId>) {}
}

/// Which key it is.
#[derive(Debug, Default)]
#[expect(unnameable_types, reason = "nobody outside is to use it")]
pub struct KeyInUse {
    #[cfg(feature = "metrics")]
    shown: Mutex<Option<KeyId>>,
}

impl Shown for KeyInUse {
    /// One after the other, so that the last to be shown is the last there is.
    #[cfg(feature = "metrics")]
    fn show(&self, current: impl FnOnce() -> Option<KeyId>) {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
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

    #[cfg(not(feature = "metrics"))]
    fn show(&self, _: impl FnOnce() -> Option<KeyId>) {}
}

/// With the engine, its key is out of use.
#[cfg(feature = "metrics")]
impl Drop for KeyInUse {
    fn drop(&mut self) {
        self.show(|| None);
    }
}

#[cfg(feature = "metrics")]
fn show_key(id: KeyId, in_use: bool) {
    let labels = [("credential", name(Subject::ApiKey).to_owned()), ("id", id.to_string())];
    metrics::gauge!(telemetry::CREDENTIAL_INFO, &labels).set(if in_use { 1.0 } else { 0.0 });
}

#[cfg(not(feature = "metrics"))]
fn show_key(_: KeyId, _: bool) {}

#[cfg(feature = "metrics")]
pub(crate) fn describe_metrics() {
    use metrics::{Unit, counter, describe_counter, describe_gauge};

    use crate::AuthErrorKind as Kind;

    describe_counter!(telemetry::RENEWALS, Unit::Count, "Renewals of a credential, by how they ended.");
    describe_counter!(telemetry::AUTH_ERRORS, Unit::Count, "Requests that the API refused with 401 or 403.");
    describe_counter!(
        telemetry::REPLAYS,
        Unit::Count,
        "Requests sent again after a 401, by what came of it."
    );
    describe_counter!(
        telemetry::UNSENT_REQUESTS,
        Unit::Count,
        "Requests that were refused before they were sent."
    );
    describe_counter!(
        telemetry::UNSAVED_REFRESH_TOKENS,
        Unit::Count,
        "Refresh tokens that their store did not take."
    );
    describe_gauge!(telemetry::CREDENTIAL_INFO, Unit::Count, "1 for the key in use, 0 for one that was.");

    use Renewal::{Aborted, Failed, Panicked, Refused, Renewed, TimedOut, Unchanged, Unfit};
    for credential in [Subject::ApiKey, Subject::Token].map(name) {
        for outcome in [Renewed, Unchanged, Failed, Refused, TimedOut, Panicked, Aborted, Unfit] {
            counter!(telemetry::RENEWALS, "credential" => credential, "outcome" => outcome.label())
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
    for kind in [
        Kind::OriginNotAllowed,
        Kind::CredentialUnavailable,
        Kind::RefreshFailed,
        Kind::RefreshRejected,
        Kind::InvalidRequest,
    ] {
        counter!(telemetry::UNSENT_REQUESTS, "kind" => kind.label()).increment(0);
    }
    counter!(telemetry::UNSAVED_REFRESH_TOKENS).increment(0);
}

const NO_CODE: &str = "none";
const OTHER_CODE: &str = "other";

/// A server may say whatever it likes, and labels are for ever.
fn code_label(code: Option<&str>) -> &'static str {
    let Some(code) = code else { return NO_CODE };
    CODES.iter().find(|(known, _)| *known == code).map_or(OTHER_CODE, |(known, _)| known)
}

fn name(credential: Subject) -> &'static str {
    if credential == Subject::ApiKey { "api_key" } else { "token" }
}

/// The id of a credential, if there is one.
struct Id(Option<KeyId>);

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(id) => id.fmt(f),
            None => f.write_str("none"),
        }
    }
}

/// An error and its causes, on one line and without credentials.
struct Said<'a> {
    error: &'a dyn Error,
    secret: Option<&'a str>,
}

impl fmt::Display for Said<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let said = Redactor::masking(self.secret).text(with_causes(self.error));
        for char in said.chars() {
            match char {
                char if char.is_control() => write!(f, "{}", char.escape_default())?,
                char => f.write_char(char)?,
            }
        }
        Ok(())
    }
}
