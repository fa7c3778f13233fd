//! The sealed trait behind every API key and token.

#![expect(private_interfaces, private_bounds, reason = "the trait is sealed")]

use std::fmt;

use secrecy::ExposeSecret;

use super::{ApiKey, ClientSecret, KeyId, Secret, Token};
use crate::{
    error::{ConfigError, ConfigErrorKind, Place, Setting},
    util::per_thread::Unshare,
};

/// A credential that can be refreshed: an [`ApiKey`], a [`Token`] or a [`ClientSecret`]. Sealed.
pub trait Credential: Sealed {}

/// What the engine and the sources need to know of a [`Credential`].
#[expect(unnameable_types, reason = "the trait is sealed")]
pub trait Sealed: Unshare + Clone + Send + Sync + 'static {
    const SETTING: Setting;

    /// Whether it lives until it is replaced if nothing states its expiry. A key does; a token lives for an assumed time.
    const MAY_LAST: bool;

    fn from_secret(secret: Secret) -> Self;

    fn secret(&self) -> &Secret;

    fn parse(value: &str, place: Place) -> Result<Self, ConfigError> {
        Secret::new(value, Self::SETTING, place).map(Self::from_secret)
    }

    fn refuse(place: Place, kind: ConfigErrorKind) -> ConfigError {
        ConfigError::new(Self::SETTING, place, kind)
    }
}

/// Implements what [`ApiKey`] and [`Token`] have in common.
macro_rules! credential {
    ($type:ident, may_last: $may_last:literal) => {
        impl $type {
            /// Reads the credential from the environment variable `name`.
            ///
            /// # Errors
            ///
            /// When the variable is not set, or as for [`new`](Self::new); the error names the variable.
            pub fn from_env_var(name: &str) -> Result<Self, ConfigError> {
                Secret::from_env_var(name, Self::SETTING).map(Self)
            }

            /// Returns a short, non-reversible name for logs and metrics.
            #[must_use]
            pub fn id(&self) -> KeyId {
                self.0.id()
            }

            /// Returns the credential itself, for an API that takes nothing else. Do not print it.
            #[must_use]
            pub fn expose_secret(&self) -> &str {
                self.0.expose()
            }
        }

        impl ExposeSecret<str> for $type {
            fn expose_secret(&self) -> &str {
                self.0.expose()
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}([redacted] id={})", stringify!($type), self.id())
            }
        }

        impl Unshare for $type {
            fn unshare(&self) -> Self {
                Self(self.0.unshare())
            }
        }

        impl Credential for $type {}

        impl Sealed for $type {
            const SETTING: Setting = Setting::$type;
            const MAY_LAST: bool = $may_last;

            fn from_secret(secret: Secret) -> Self {
                Self(secret)
            }

            fn secret(&self) -> &Secret {
                &self.0
            }
        }
    };
}

credential!(ApiKey, may_last: true);
credential!(ClientSecret, may_last: true);
credential!(Token, may_last: false);
