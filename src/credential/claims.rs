//! Reads the claims of a JWT, without verifying it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use serde::{Deserialize, de::DeserializeOwned};
use zeroize::Zeroizing;

/// When a JWT expires.
pub(super) fn expires_at(token: &str) -> Option<SystemTime> {
    let since_epoch = Duration::try_from_secs_f64(claims::<Expiry>(token)?.exp).ok()?;
    UNIX_EPOCH.checked_add(since_epoch)
}

/// How long it was issued for.
pub(super) fn lifetime(token: &str) -> Option<Duration> {
    let (Expiry { exp }, Issue { iat }) = (claims(token)?, claims(token)?);
    Duration::try_from_secs_f64(exp - iat).ok()
}

// A NumericDate may have a fraction (RFC 7519 section 2).
#[derive(Deserialize)]
struct Expiry {
    exp: f64,
}

#[derive(Deserialize)]
struct Issue {
    iat: f64,
}

fn claims<T: DeserializeOwned>(token: &str) -> Option<T> {
    let (message, _signature) = token.rsplit_once('.')?;
    let (_header, claims) = message.rsplit_once('.')?;
    let claims = Zeroizing::new(BASE64_URL_SAFE_NO_PAD.decode(claims).ok()?);
    serde_json::from_slice(&claims).ok()
}
