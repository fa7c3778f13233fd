use std::{
    error::Error,
    fmt, io,
    path::{Path, PathBuf},
};

/// Why a key, token, URL or origin was refused when it was given.
///
/// Says what was refused, where it came from and why; never the value.
///
/// ```
/// let error = tower_selam::ApiKey::new("sk-selam\u{200b}-pasted").unwrap_err();
/// assert_eq!(error.to_string(), "API key has a character that is not ASCII at byte 8");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    subject: Subject,
    place: Place,
    kind: ConfigErrorKind,
}

impl ConfigError {
    #[cold]
    pub(crate) fn new(subject: Subject, place: Place, kind: ConfigErrorKind) -> Self {
        Self { subject, place, kind }
    }

    /// What is wrong.
    #[must_use]
    pub fn kind(&self) -> ConfigErrorKind {
        self.kind
    }

    /// The environment variable the value came from; `None` when it came from elsewhere.
    #[must_use]
    pub fn env_var(&self) -> Option<&str> {
        match &self.place {
            Place::EnvVar(name) => Some(name),
            Place::Argument | Place::File(_) | Place::Number(_) => None,
        }
    }

    /// The file the value came from; `None` when it came from elsewhere.
    #[must_use]
    pub fn file(&self) -> Option<&Path> {
        match &self.place {
            Place::File(path) => Some(path),
            Place::Argument | Place::EnvVar(_) | Place::Number(_) => None,
        }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{} {}", self.subject, self.place, self.kind)
    }
}

impl Error for ConfigError {}

/// What is wrong with a key, token, URL or origin.
///
/// Positions count bytes from the start of the value, surrounding blanks left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConfigErrorKind {
    /// Not given, or the environment variable is not set.
    Missing,
    /// Nothing in it but white space.
    Empty,
    /// The environment variable or file is not valid Unicode.
    NotUnicode,
    /// The file cannot be read.
    Unreadable {
        /// Why.
        error: io::ErrorKind,
    },
    /// The file is larger than any credential: more than 64 KiB.
    TooLong,
    /// A space or a tab inside.
    WhiteSpace {
        /// Where it stands.
        at: usize,
    },
    /// A line break or another control character inside.
    ControlCharacter {
        /// Where it stands.
        at: usize,
    },
    /// A character that is not ASCII: a byte order mark, a zero-width space, a curly quote, …
    NonAscii {
        /// Where it stands.
        at: usize,
    },
    /// Quotation marks around it, as some tools leave them from an `.env` file.
    Quoted,
    /// Starts with `Bearer `, which the layers add themselves.
    BearerPrefix,
    /// No absolute URL with a host.
    InvalidUrl,
    /// The host is no name, and no address written in full.
    InvalidHost,
    /// The port is no number from 0 to 65535.
    InvalidPort,
    /// A user name or password in the URL.
    UserInfo,
    /// A path, query or fragment where none belongs.
    Excess,
    /// A scheme other than `https`.
    NotHttps,
    /// Plain `http` was allowed to loopback, but this is neither a loopback address nor `localhost`.
    NotLoopback,
    /// The origin is not among the allowed ones.
    NotAllowed,
    /// The environment variable is set, and so is another that stands for the same.
    GivenTwice {
        /// The other.
        other: &'static str,
    },
    /// The environment variable needs an HTTP client, and none was given.
    NeedsClient,
    /// A parameter that the source sets itself.
    ReservedParameter,
    /// No private key in PEM of a kind that an algorithm signs with, or a damaged one.
    InvalidKey,
    /// The private key is encrypted.
    Encrypted,
    /// The key is too short for its algorithm.
    TooShort {
        /// How many bits it needs.
        least: usize,
    },
    /// The key is of another kind than the algorithm signs with.
    WrongAlgorithm {
        /// What it is.
        key: &'static str,
        /// What the algorithm signs with.
        needed: &'static str,
    },
    /// The claims do not serialize to a JSON object, or to one nested deeper than parsers read: 127 levels.
    NotAnObject,
    /// The claims have an `iat` or `exp`.
    ReservedClaim,
    /// No plain path: one that begins with `/`, and has no empty segments, none of dots alone, and nothing
    /// percent-encoded.
    InvalidPath,
}

impl fmt::Display for ConfigErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("is not set"),
            Self::Empty => f.write_str("is empty"),
            Self::NotUnicode => f.write_str("is not valid Unicode"),
            Self::Unreadable { error } => write!(f, "cannot be read: {error}"),
            Self::TooLong => f.write_str("is longer than 64 KiB"),
            Self::WhiteSpace { at } => write!(f, "has white space at byte {at}"),
            Self::ControlCharacter { at } => write!(f, "has a control character at byte {at}"),
            Self::NonAscii { at } => write!(f, "has a character that is not ASCII at byte {at}"),
            Self::Quoted => f.write_str("is in quotes: give it without them"),
            Self::BearerPrefix => f.write_str("starts with `Bearer `: give the value alone"),
            Self::InvalidUrl => f.write_str("is not an absolute URL such as https://api.selamgpt.com"),
            Self::InvalidHost => f.write_str("has an invalid host: give a name or an address in full"),
            Self::InvalidPort => f.write_str("has an invalid port"),
            Self::UserInfo => f.write_str("has a user name or password in it"),
            Self::Excess => f.write_str("has a part that does not belong: path, query or fragment"),
            Self::NotHttps => f.write_str("is not https"),
            Self::NotLoopback => f.write_str("is neither https nor on a loopback address"),
            Self::NotAllowed => f.write_str("is not among the allowed origins"),
            Self::GivenTwice { other } => write!(f, "is set beside {other}: set one of the two"),
            Self::NeedsClient => {
                f.write_str("needs an HTTP client: give one by `SelamLayerBuilder::with_token_client`")
            }
            Self::ReservedParameter => f.write_str("is one that the source sets itself"),
            Self::InvalidKey => f.write_str(
                "is not a private key in PEM: RSA of up to 4096 bits, EC on P-256 or P-384, or Ed25519",
            ),
            Self::Encrypted => f.write_str("is encrypted: give it decrypted"),
            Self::TooShort { least } => {
                write!(f, "is shorter than the {least} bits its algorithm asks for")
            }
            Self::WrongAlgorithm { key, needed } => {
                write!(f, "is {key}, but its algorithm signs with {needed}")
            }
            Self::NotAnObject => f.write_str("is not a JSON object, or is nested too deeply"),
            Self::InvalidPath => f.write_str("is not a plain path such as /v1/audio"),
            Self::ReservedClaim => f.write_str("has an `iat` or `exp`, which the signer sets"),
        }
    }
}

/// What was being made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Subject {
    ApiKey,
    Token,
    BaseUrl,
    Origin,
    TokenUrl,
    ClientId,
    ClientSecret,
    RefreshToken,
    Parameter,
    PathPrefix,
    #[cfg(feature = "sign")]
    SigningKey,
    #[cfg(feature = "sign")]
    Claims,
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ApiKey => "API key",
            Self::Token => "JWT",
            Self::BaseUrl => "base URL",
            Self::Origin => "origin",
            Self::TokenUrl => "token endpoint's URL",
            Self::ClientId => "client id",
            Self::ClientSecret => "client secret",
            Self::RefreshToken => "refresh token",
            Self::Parameter => "token request's parameter",
            Self::PathPrefix => "path prefix",
            #[cfg(feature = "sign")]
            Self::SigningKey => "signing key",
            #[cfg(feature = "sign")]
            Self::Claims => "JWT claims set",
        })
    }
}

/// Where the value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Argument,
    EnvVar(String),
    File(PathBuf),
    /// In a list, counted from one.
    Number(usize),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Argument => Ok(()),
            Self::EnvVar(name) => write!(f, " from the environment variable {name}"),
            Self::File(path) => write!(f, " from the file {}", path.display()),
            Self::Number(number) => write!(f, " number {number}"),
        }
    }
}
