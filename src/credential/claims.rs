//! Reads the claims of a JWT, without verifying it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jsonwebtoken::dangerous::insecure_decode_claims;
use serde::{Deserialize, de::DeserializeOwned};

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
    insecure_decode_claims(token).ok()
}
