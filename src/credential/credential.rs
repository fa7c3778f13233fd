//! The sealed trait behind every API key and token.

#![expect(private_interfaces, private_bounds, reason = "the trait is sealed")]

use std::time::{Duration, SystemTime};

use super::{ApiKey, Secret, Token};
use crate::{
    error::{ConfigError, ConfigErrorKind, Place, Setting},
    util::per_thread::Unshare,
};

/// A credential that can be refreshed: an [`ApiKey`] or a [`Token`]. Sealed.
pub trait Credential: Sealed {}

impl Credential for ApiKey {}
impl Credential for Token {}

/// What the engine and the sources need to know of a [`Credential`].
#[expect(unnameable_types, reason = "the trait is sealed")]
pub trait Sealed: Unshare + Clone + Send + Sync + 'static {
    const SETTING: Setting;

    /// Whether it stays in use when the API rejected it and its source has no other.
    ///
    /// A key does: the API's answer says more than an error of ours could. A token does not: it has expired.
    const OUTLIVES_REJECTION: bool;

    fn from_secret(secret: Secret) -> Self;

    fn secret(&self) -> &Secret;

    /// When it expires by its own claims.
    fn expiry(&self) -> Option<SystemTime>;

    /// The time from issue to expiry by its own claims.
    fn lifetime(&self) -> Option<Duration>;

    fn parse(value: &str, place: Place) -> Result<Self, ConfigError> {
        Secret::new(value, Self::SETTING, place).map(Self::from_secret)
    }

    fn refuse(place: Place, kind: ConfigErrorKind) -> ConfigError {
        ConfigError::new(Self::SETTING, place, kind)
    }
}

impl Sealed for ApiKey {
    const SETTING: Setting = Setting::ApiKey;
    const OUTLIVES_REJECTION: bool = true;

    fn from_secret(secret: Secret) -> Self {
        Self(secret)
    }

    fn secret(&self) -> &Secret {
        &self.0
    }

    fn expiry(&self) -> Option<SystemTime> {
        None
    }

    fn lifetime(&self) -> Option<Duration> {
        None
    }
}

impl Sealed for Token {
    const SETTING: Setting = Setting::Token;
    const OUTLIVES_REJECTION: bool = false;

    fn from_secret(secret: Secret) -> Self {
        Self(secret)
    }

    fn secret(&self) -> &Secret {
        &self.0
    }

    fn expiry(&self) -> Option<SystemTime> {
        self.expires_at()
    }

    fn lifetime(&self) -> Option<Duration> {
        self.lifetime()
    }
}

impl Unshare for ApiKey {
    fn unshare(&self) -> Self {
        Self(self.0.unshare())
    }
}

impl Unshare for Token {
    fn unshare(&self) -> Self {
        Self(self.0.unshare())
    }
}
