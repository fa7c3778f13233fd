use std::fmt;

use http::StatusCode;

/// What kind of [`AuthError`](crate::AuthError) it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AuthErrorKind {
    /// The API does not accept the key: `invalid_api_key`.
    InvalidApiKey,
    /// The API saw no key: `missing_api_key`.
    MissingApiKey,
    /// The account may not use this feature: `insufficient_permissions`, or `insufficient_scope` of RFC 6750.
    InsufficientPermissions,
    /// The API does not accept the token: `invalid_token` of RFC 6750, or a code of the same meaning.
    TokenRejected,
    /// Any other 401.
    Unauthorized,
    /// Any other 403.
    Forbidden,
    /// Nothing was sent: the request's URI is not one that credentials may go to.
    OriginNotAllowed,
    /// Nothing was sent: there is no credential of the sort that the request needs.
    CredentialUnavailable,
    /// Nothing was sent: the credential could not be renewed, and may be later.
    RefreshFailed,
    /// Nothing was sent: the credential cannot be renewed until somebody does something about it.
    RefreshRejected,
    /// Nothing was sent: the request cannot carry credentials.
    InvalidRequest,
}

/// The codes that say what kind of error it is; others are a server's own words, of which there is no end.
pub(crate) const CODES: [(&str, AuthErrorKind); 9] = [
    ("invalid_api_key", AuthErrorKind::InvalidApiKey),
    ("missing_api_key", AuthErrorKind::MissingApiKey),
    ("insufficient_permissions", AuthErrorKind::InsufficientPermissions),
    ("insufficient_scope", AuthErrorKind::InsufficientPermissions),
    ("invalid_token", AuthErrorKind::TokenRejected),
    ("invalid_jwt", AuthErrorKind::TokenRejected),
    ("token_expired", AuthErrorKind::TokenRejected),
    ("expired_token", AuthErrorKind::TokenRejected),
    ("jwt_expired", AuthErrorKind::TokenRejected),
];

impl AuthErrorKind {
    /// Its name in metrics and events.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::InvalidApiKey => "invalid_api_key",
            Self::MissingApiKey => "missing_api_key",
            Self::InsufficientPermissions => "insufficient_permissions",
            Self::TokenRejected => "token_rejected",
            Self::Unauthorized => "unauthorized",
            Self::Forbidden => "forbidden",
            Self::OriginNotAllowed => "origin_not_allowed",
            Self::CredentialUnavailable => "credential_unavailable",
            Self::RefreshFailed => "renewal_failed",
            Self::RefreshRejected => "renewal_refused",
            Self::InvalidRequest => "invalid_request",
        }
    }

    /// What a 401 or 403 is: by code first, then type, then status, as the API's own pages show
    /// `invalid_api_key` under two types.
    pub(super) fn classify(status: StatusCode, code: Option<&str>, error_type: Option<&str>) -> Self {
        let by_status = match status {
            StatusCode::UNAUTHORIZED => Self::Unauthorized,
            _ => Self::Forbidden,
        };
        let by_code = |code| CODES.iter().find(|(known, _)| *known == code).map(|(_, kind)| *kind);
        let by_type = || match error_type? {
            "authentication_error" => Some(Self::Unauthorized),
            "authorization_error" | "permission_error" => Some(Self::Forbidden),
            _ => None,
        };
        code.and_then(by_code).or_else(by_type).unwrap_or(by_status)
    }

    pub(super) fn is_auth(self) -> bool {
        !matches!(
            self,
            Self::OriginNotAllowed
                | Self::CredentialUnavailable
                | Self::RefreshFailed
                | Self::RefreshRejected
                | Self::InvalidRequest
        )
    }

    pub(super) fn is_permanent(self) -> bool {
        // A token may be renewed, and a bare 401 may be about one.
        !matches!(self, Self::TokenRejected | Self::Unauthorized | Self::RefreshFailed)
    }

    pub(super) fn remedy(self) -> Option<&'static str> {
        Some(match self {
            Self::InvalidApiKey => "verify the API key and check that it was not revoked",
            Self::MissingApiKey => "send the API key in a header on all requests",
            Self::InsufficientPermissions => "a higher account level has this feature",
            Self::TokenRejected => "obtain a new JWT",
            Self::OriginNotAllowed => {
                "send the request to an allowed https origin, or allow this one in `Origins`"
            }
            Self::CredentialUnavailable => "give the layer the credential that the request asks for",
            Self::RefreshRejected => {
                "renew by hand what the credential is made from: a login, a key, a client secret"
            }
            Self::Unauthorized | Self::Forbidden | Self::RefreshFailed | Self::InvalidRequest => return None,
        })
    }
}

impl fmt::Display for AuthErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InvalidApiKey => "invalid API key",
            Self::MissingApiKey => "missing API key",
            Self::InsufficientPermissions => "insufficient permissions",
            Self::TokenRejected => "token rejected",
            Self::Unauthorized => "unauthorized",
            Self::Forbidden => "forbidden",
            Self::OriginNotAllowed => "origin not allowed",
            Self::CredentialUnavailable => "no credential available",
            Self::RefreshFailed => "credential not renewed",
            Self::RefreshRejected => "credential cannot be renewed",
            Self::InvalidRequest => "invalid request",
        })
    }
}
