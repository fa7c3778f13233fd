//! [`ConfigError`]: why a key, token, URL, origin or path prefix is invalid.

use std::{
    error::Error,
    fmt, io,
    path::{Path, PathBuf},
};

/// Why a key, token, URL, origin or other setting is invalid.
///
/// Names the setting, where its value came from and what is wrong with it, but never the value itself.
///
/// ```
/// let error = tower_selam::ApiKey::new("sk-selam\u{200b}-pasted").unwrap_err();
/// assert_eq!(error.to_string(), "API key has a character that is not ASCII at byte 8");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    setting: Setting,
    place: Place,
    kind: ConfigErrorKind,
}

impl ConfigError {
    #[cold]
    pub(crate) fn new(setting: Setting, place: Place, kind: ConfigErrorKind) -> Self {
        Self { setting, place, kind }
    }

    /// Returns what is wrong with the value.
    #[must_use]
    pub fn kind(&self) -> &ConfigErrorKind {
        &self.kind
    }

    /// Returns the environment variable that the value came from, if it came from one.
    #[must_use]
    pub fn env_var(&self) -> Option<&str> {
        match &self.place {
            Place::EnvVar(name) => Some(name),
            _ => None,
        }
    }

    /// Returns the file that the value came from, if it came from one.
    #[must_use]
    pub fn file(&self) -> Option<&Path> {
        match &self.place {
            Place::File(path) => Some(path),
            _ => None,
        }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{} {}", self.setting, self.place, self.kind)
    }
}

impl Error for ConfigError {}

/// What is wrong with a key, token, URL, origin or other setting.
///
/// Positions count bytes from the start of the value, after leading blanks are trimmed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConfigErrorKind {
    /// No value was given, or the environment variable is not set.
    Missing,
    /// The value is empty or only white space.
    Empty,
    /// The environment variable or file is not valid Unicode.
    NotUnicode,
    /// The file cannot be read.
    #[non_exhaustive]
    Unreadable {
        /// The error of the failed read.
        error: io::ErrorKind,
    },
    /// The file is larger than what it holds can be.
    #[non_exhaustive]
    TooLong {
        /// The largest size that is read, in KiB.
        max_kib: usize,
    },
    /// The file is still being written.
    Unsettled,
    /// The value contains a space or a tab.
    #[non_exhaustive]
    WhiteSpace {
        /// The position of the first one.
        at: usize,
    },
    /// The value contains a line break or another control character.
    #[non_exhaustive]
    ControlCharacter {
        /// The position of the first one.
        at: usize,
    },
    /// The value contains a character outside ASCII: a byte order mark, a zero-width space, a curly quote, …
    #[non_exhaustive]
    NonAscii {
        /// The position of the first one.
        at: usize,
    },
    /// The value is in quotation marks, which some tools keep when they read an `.env` file.
    Quoted,
    /// The value starts with `Bearer `, which the layers add themselves.
    BearerPrefix,
    /// The value is not an absolute URL with a host.
    InvalidUrl,
    /// The host is neither a valid name nor a complete IP address.
    InvalidHost,
    /// The port is not a number from 0 to 65535.
    InvalidPort,
    /// The URL contains a user name or password.
    UserInfo,
    /// The URL has a path, query or fragment where none is allowed.
    UnexpectedPart,
    /// The scheme is not `https`.
    NotHttps,
    /// Plain `http` was allowed for loopback, but the host is neither a loopback address nor `localhost`.
    NotLoopback,
    /// The origin is not among the allowed ones.
    NotAllowed,
    /// Two environment variables are set that exclude each other.
    #[non_exhaustive]
    Conflict {
        /// The other variable.
        other: &'static str,
    },
    /// The value names no method of client authentication that can be chosen by name.
    UnknownMethod,
    /// The environment variable requires an HTTP client, and none was given.
    NeedsClient,
    /// The source sets this parameter itself.
    ReservedParameter,
    /// The value is not a valid PEM private key of a supported kind.
    InvalidKey,
    /// The value has no public key that can be used.
    InvalidPublicKey,
    /// The name is longer than 64 bytes, or has other characters than letters, digits, `-`, `_` and `.`.
    InvalidName,
    /// The value is not a key of 32 bytes in base64.
    InvalidSealingKey,
    /// The private key is encrypted.
    Encrypted,
    /// The key is too short for its algorithm.
    #[non_exhaustive]
    TooShort {
        /// The fewest bits that the algorithm accepts.
        min_bits: usize,
    },
    /// The algorithm does not sign with this kind of key.
    #[non_exhaustive]
    WrongAlgorithm {
        /// The kind of the key.
        key: &'static str,
        /// The kind of key that the algorithm signs with.
        needed: &'static str,
    },
    /// The claims do not serialize to a JSON object, or the object is nested deeper than the 127 levels that parsers read.
    NotAnObject,
    /// The claims contain `iat` or `exp`, which the signer sets itself.
    ReservedClaim,
    /// The path leads away from the base URL, or cannot be part of a URI. See [`BaseUrl::endpoint`](crate::BaseUrl::endpoint).
    InvalidEndpoint,
    /// The API key is a JWT.
    IsJwt,
    /// The JWT is an API key.
    IsApiKey,
    /// The value is not a plain path. A plain path starts with `/` and has no empty segments, no segments made only
    /// of dots, and no percent-encoding.
    InvalidPath,
}

impl fmt::Display for ConfigErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Missing => "is not set",
            Self::Empty => "is empty",
            Self::NotUnicode => "is not valid Unicode",
            Self::Unreadable { error } => return write!(f, "cannot be read: {error}"),
            Self::TooLong { max_kib } => return write!(f, "is longer than {max_kib} KiB"),
            Self::Unsettled => "is still being written",
            Self::WhiteSpace { at } => return write!(f, "has white space at byte {at}"),
            Self::ControlCharacter { at } => return write!(f, "has a control character at byte {at}"),
            Self::NonAscii { at } => return write!(f, "has a character that is not ASCII at byte {at}"),
            Self::Quoted => "is in quotes: remove them",
            Self::BearerPrefix => "starts with `Bearer `: remove that prefix",
            Self::InvalidUrl => "is not an absolute URL such as https://api.selamgpt.com",
            Self::InvalidHost => "has an invalid host: use a name or a complete IP address",
            Self::InvalidPort => "has an invalid port",
            Self::UserInfo => "has a user name or password in it",
            Self::UnexpectedPart => "has a path, query or fragment that is not allowed here",
            Self::NotHttps => "is not https",
            Self::NotLoopback => "is neither https nor on a loopback address",
            Self::NotAllowed => "is not among the allowed origins",
            Self::Conflict { other } => {
                return write!(f, "is set together with {other}: set only one of them");
            }
            Self::UnknownMethod => "is not client_secret_basic, client_secret_post or none",
            Self::NeedsClient => "needs an HTTP client: pass one to `SelamLayerBuilder::with_token_client`",
            Self::ReservedParameter => "is set by the source itself: remove it",
            Self::InvalidKey => {
                "is not a private key in PEM: RSA of up to 4096 bits, EC on P-256 or P-384, or Ed25519"
            }
            Self::InvalidPublicKey => {
                "has no usable public key, as a JWK set or in PEM: RSA of 2048 to 8192 bits, EC on P-256 or P-384, or Ed25519"
            }
            Self::Encrypted => "is encrypted: decrypt it first",
            Self::TooShort { min_bits } => {
                return write!(f, "is shorter than the {min_bits} bits that its algorithm requires");
            }
            Self::WrongAlgorithm { key, needed } => {
                return write!(f, "is {key}, but its algorithm signs with {needed}");
            }
            Self::InvalidName => "is not made of at most 64 letters, digits, `-`, `_` and `.`",
            Self::InvalidSealingKey => "is not 32 bytes in base64, as `openssl rand -base64 32` prints",
            Self::NotAnObject => "is not a JSON object, or is nested too deeply",
            Self::InvalidEndpoint => {
                "is not a path such as chat/completions: remove any host, fragment, backslash and dot segment, and \
                 percent-encode other characters"
            }
            Self::IsJwt => "is a JWT: set it as the JWT, and a key that begins with `sk-selam-` as the API key",
            Self::IsApiKey => "is an API key: set it as the API key, or leave the JWT out if you have none",
            Self::InvalidPath => "is not a plain path such as /v1/audio",
            Self::ReservedClaim => "has an `iat` or `exp`, which the signer sets",
        })
    }
}

/// The setting whose value is invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Setting {
    ApiKey,
    Token,
    BaseUrl,
    Origin,
    Endpoint,
    TokenUrl,
    ClientId,
    ClientSecret,
    ClientAuth,
    RefreshToken,
    Parameter,
    PathPrefix,
    #[cfg(feature = "fleet")]
    FleetName,
    #[cfg(feature = "fleet")]
    SealingKey,
    #[cfg(feature = "sign")]
    SigningKey,
    #[cfg(feature = "sign")]
    Claims,
    #[cfg(feature = "verify")]
    Issuer,
    #[cfg(feature = "verify")]
    KeySetUrl,
    #[cfg(feature = "verify")]
    VerifyingKeys,
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ApiKey => "API key",
            Self::Token => "JWT",
            Self::BaseUrl => "base URL",
            Self::Origin => "origin",
            Self::Endpoint => "endpoint",
            Self::TokenUrl => "token endpoint's URL",
            Self::ClientId => "client id",
            Self::ClientSecret => "client secret",
            Self::ClientAuth => "client authentication method",
            Self::RefreshToken => "refresh token",
            Self::Parameter => "token request parameter",
            Self::PathPrefix => "path prefix",
            #[cfg(feature = "fleet")]
            Self::FleetName => "fleet's name",
            #[cfg(feature = "fleet")]
            Self::SealingKey => "sealing key",
            #[cfg(feature = "sign")]
            Self::SigningKey => "signing key",
            #[cfg(feature = "sign")]
            Self::Claims => "JWT claims set",
            #[cfg(feature = "verify")]
            Self::Issuer => "issuer's URL",
            #[cfg(feature = "verify")]
            Self::KeySetUrl => "URL of the key set",
            #[cfg(feature = "verify")]
            Self::VerifyingKeys => "key set",
        })
    }
}

/// Where the invalid value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Argument,
    EnvVar(String),
    File(PathBuf),
    /// An item of a list argument, counted from one.
    Item(usize),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Argument => Ok(()),
            Self::EnvVar(name) => write!(f, " from the environment variable {name}"),
            Self::File(path) => write!(f, " from the file {}", path.display()),
            Self::Item(number) => write!(f, " number {number}"),
        }
    }
}
