#![expect(
    private_bounds,
    private_interfaces,
    unnameable_types,
    reason = "the trait is sealed: nobody outside calls or implements it"
)]

use std::time::{Duration, SystemTime};

use super::{ApiKey, Secret, Token};
use crate::{
    error::{ConfigError, ConfigErrorKind, Place, Subject},
    telemetry::event::{KeyInUse, Shown},
};

/// What can be renewed: an [`ApiKey`] or a [`Token`]. Sealed.
pub trait Credential: Sealed {}

impl Credential for ApiKey {}
impl Credential for Token {}

/// What a [`Credential`] is to this crate.
pub trait Sealed: Clone + Send + Sync + 'static {
    const SUBJECT: Subject;

    /// What is shown of the one that is in use.
    type InUse: Shown;

    /// Whether it is used on when the API refused it and its source has no other.
    ///
    /// A key is: what the API says of it tells more than an error of ours could. A token is not: it expired.
    const OUTLIVES_REJECTION: bool;

    fn parse(value: String, place: Place) -> Result<Self, ConfigError>;

    fn secret(&self) -> &Secret;

    /// When it expires, as far as it says itself.
    fn expiry(&self) -> Option<SystemTime>;

    /// From its issue to its expiry, as far as it says itself.
    fn lifetime(&self) -> Option<Duration>;

    fn refuse(place: Place, kind: ConfigErrorKind) -> ConfigError {
        ConfigError::new(Self::SUBJECT, place, kind)
    }
}

impl Sealed for ApiKey {
    const SUBJECT: Subject = Subject::ApiKey;
    type InUse = KeyInUse;

    const OUTLIVES_REJECTION: bool = true;

    fn parse(value: String, place: Place) -> Result<Self, ConfigError> {
        Secret::new(value, Self::SUBJECT, place).map(Self)
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
    const SUBJECT: Subject = Subject::Token;
    type InUse = ();

    const OUTLIVES_REJECTION: bool = false;

    fn parse(value: String, place: Place) -> Result<Self, ConfigError> {
        Self::parse(value, place)
    }

    fn secret(&self) -> &Secret {
        &self.secret
    }

    fn expiry(&self) -> Option<SystemTime> {
        self.expires_at()
    }

    fn lifetime(&self) -> Option<Duration> {
        self.lifetime()
    }
}
