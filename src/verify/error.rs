//! [`VerifyError`]: why a JWT was not accepted.

use std::{error::Error, fmt, time::Duration};

/// Why a JWT was not accepted. Its text shows nothing of the JWT.
///
/// A server answers [`Unavailable`](Self::Unavailable) with 503, and all others with 401 and
/// `WWW-Authenticate: Bearer error="invalid_token"`
/// ([RFC 6750 section 3.1](https://www.rfc-editor.org/rfc/rfc6750#section-3.1)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VerifyError {
    /// It is longer than 8 KiB.
    TooLong,
    /// It is not a signed JWT in the compact form.
    Malformed,
    /// Its `alg` is `none`, an HMAC, unknown, or does not fit the key.
    Algorithm,
    /// Its header has `crit`: extensions that a verifier has to understand.
    Critical,
    /// Its `typ` says that it is another kind of token.
    Type,
    /// This claim is missing, or not of the type that its definition demands.
    Claim {
        /// The name of the claim.
        name: &'static str,
    },
    /// It has expired.
    Expired,
    /// It is not valid yet.
    NotYetValid,
    /// Another issuer issued it.
    Issuer,
    /// It is for somebody else.
    Audience,
    /// The issuer has no key with its `kid`.
    UnknownKey,
    /// Its signature does not match.
    Signature,
    /// The issuer's keys are not known now. The JWT may be valid.
    Unavailable {
        /// After this time they are fetched again.
        retry_after: Duration,
    },
}

impl fmt::Display for VerifyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooLong => "the JWT is longer than 8 KiB",
            Self::Malformed => "the token is not a signed JWT",
            Self::Algorithm => "the JWT's `alg` is not one that the issuer's key verifies",
            Self::Critical => "the JWT's `crit` demands extensions that are not supported",
            Self::Type => "the JWT's `typ` is neither `JWT` nor `at+jwt`",
            Self::Claim { name } => {
                return write!(f, "the JWT's claim `{name}` is missing, or of the wrong type");
            }
            Self::Expired => "the JWT has expired",
            Self::NotYetValid => "the JWT is not valid yet; is a clock wrong?",
            Self::Issuer => "the JWT's `iss` is another issuer",
            Self::Audience => "the JWT's `aud` is another audience",
            Self::UnknownKey => "the issuer has no key with the JWT's `kid`",
            Self::Signature => "the JWT's signature does not match",
            Self::Unavailable { .. } => "the issuer's keys cannot be fetched now",
        })
    }
}

impl Error for VerifyError {}
