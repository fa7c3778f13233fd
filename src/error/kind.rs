//! [`AuthErrorKind`]: the kinds of authentication error, their classification, and the documented remedies.

use std::fmt;

use http::StatusCode;

/// The kind of an [`AuthError`](super::AuthError).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AuthErrorKind {
    /// The API rejected the key: `invalid_api_key`.
    InvalidApiKey,
    /// The API received no key: `missing_api_key`.
    MissingApiKey,
    /// The account may not use this feature: `insufficient_permissions`, or RFC 6750's `insufficient_scope`.
    InsufficientPermissions,
    /// The API rejected the token: RFC 6750's `invalid_token`, or a code with the same meaning.
    TokenRejected,
    /// Any other 401.
    Unauthorized,
    /// Any other 403.
    Forbidden,
    /// Nothing was sent: credentials may not go to the request's origin.
    OriginNotAllowed,
    /// Nothing was sent: the layer does not have the kind of credential that the request needs.
    CredentialUnavailable,
    /// Nothing was sent: refreshing the credential failed, but may succeed later.
    RefreshFailed,
    /// Nothing was sent: refreshing the credential was rejected, and probably will be until someone intervenes. The source
    /// is asked again every 5 minutes.
    RefreshRejected,
    /// Nothing was sent: the request cannot carry credentials.
    InvalidRequest,
}

/// The codes that determine the kind. Any other code is the server's own; the set of those is unbounded.
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

/// The kinds of requests that were not sent.
pub(crate) const UNSENT: [AuthErrorKind; 5] = [
    AuthErrorKind::OriginNotAllowed,
    AuthErrorKind::CredentialUnavailable,
    AuthErrorKind::RefreshFailed,
    AuthErrorKind::RefreshRejected,
    AuthErrorKind::InvalidRequest,
];

impl AuthErrorKind {
    /// The kind's name in metrics and events.
    pub(crate) fn label(self) -> &'static str {
        self.names().0
    }

    /// The label, which is stable because dashboards depend on it, and the text of `Display`.
    fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::InvalidApiKey => ("invalid_api_key", "invalid API key"),
            Self::MissingApiKey => ("missing_api_key", "missing API key"),
            Self::InsufficientPermissions => ("insufficient_permissions", "insufficient permissions"),
            Self::TokenRejected => ("token_rejected", "token rejected"),
            Self::Unauthorized => ("unauthorized", "unauthorized"),
            Self::Forbidden => ("forbidden", "forbidden"),
            Self::OriginNotAllowed => ("origin_not_allowed", "origin not allowed"),
            Self::CredentialUnavailable => ("credential_unavailable", "no credential available"),
            Self::RefreshFailed => ("refresh_failed", "credential refresh failed"),
            Self::RefreshRejected => ("refresh_rejected", "credential refresh rejected"),
            Self::InvalidRequest => ("invalid_request", "invalid request"),
        }
    }

    /// Classifies a 401 or 403 by code first, then type, then status: the API's documentation shows
    /// `invalid_api_key` with two different types.
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
        !UNSENT.contains(&self)
    }

    pub(super) fn is_permanent(self) -> bool {
        // A token can be refreshed, and a 401 without a known code may be about a token.
        !matches!(self, Self::TokenRejected | Self::Unauthorized | Self::RefreshFailed)
    }

    /// See [`AuthError::remedy`](super::AuthError::remedy).
    pub(super) fn remedy(self) -> Option<&'static str> {
        Some(match self {
            Self::InvalidApiKey => "verify the API key and check that it was not revoked",
            Self::MissingApiKey => "send the API key in a header on all requests",
            Self::InsufficientPermissions => "this feature needs a higher account level",
            Self::TokenRejected => "obtain a new JWT",
            Self::OriginNotAllowed => {
                "send the request to an allowed https origin, or add this one to `Origins`"
            }
            Self::CredentialUnavailable => "configure the layer with the credential that the request needs",
            Self::RefreshRejected => {
                "replace the login, key or client secret that the credential is obtained with"
            }
            Self::Unauthorized | Self::Forbidden | Self::RefreshFailed | Self::InvalidRequest => return None,
        })
    }
}

impl fmt::Display for AuthErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.names().1)
    }
}
