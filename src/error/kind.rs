//! [`AuthErrorKind`]: the kinds of authentication error, their classification, and the documented remedies.

use std::fmt;

use http::StatusCode;

/// The kind of an [`AuthError`](super::AuthError).
///
/// The kind of a 401 or 403 is determined by, in this order:
///
/// 1. the error's code in the body, then the `error` of a `Bearer` challenge in `WWW-Authenticate`,
/// 2. the error's type: one of the codes, `authentication_error`, or `authorization_error` or `permission_error`,
/// 3. the status.
///
/// | Codes | Kind | Blames |
/// |---|---|---|
/// | `invalid_api_key` | [`InvalidApiKey`](Self::InvalidApiKey) | the key |
/// | `missing_api_key` | [`MissingApiKey`](Self::MissingApiKey) | nothing |
/// | `insufficient_permissions`, `insufficient_scope`, `missing_permissions`, `missing_scope`, also in the other number, and `permission_denied` | [`InsufficientPermissions`](Self::InsufficientPermissions) | nothing |
/// | `invalid_token`, `invalid_jwt`, `token_expired`, `expired_token`, `jwt_expired` | [`TokenRejected`](Self::TokenRejected) | the JWT, or the key without one |
/// | any other, in a 401 or with the type `authentication_error` | [`Unauthorized`](Self::Unauthorized) | the JWT, or the key without one |
/// | any other, in a 403 or with the type `authorization_error` or `permission_error` | [`Forbidden`](Self::Forbidden) | nothing |
///
/// After a 401, the credential that is blamed is refreshed, and the request is replayed. One that blames nothing is
/// returned as it is. Letter case and separators do not matter: `InsufficientScope` is `insufficient_scope`.
///
/// Only if all of this leads to `Unauthorized` or `Forbidden`, the message is read: if it is a code (`Invalid API key`), if
/// it contains one in its own spelling (`missing_scope: models.read`), or if it says that a permission or scope is missing
/// (`You have insufficient permissions`, `Missing scopes: …`), that determines the kind. gRPC has no other place for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AuthErrorKind {
    /// The API rejected the key: `invalid_api_key`.
    InvalidApiKey,
    /// The API received no key: `missing_api_key`.
    MissingApiKey,
    /// The account or token may not use this feature: `insufficient_permissions`, RFC 6750's `insufficient_scope`, or a code
    /// with the same meaning.
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

/// The codes that determine the kind, in the spelling of labels. Any other code is the server's own; the set of those is
/// unbounded.
pub(crate) const CODES: [(&str, AuthErrorKind); 16] = [
    ("invalid_api_key", AuthErrorKind::InvalidApiKey),
    ("missing_api_key", AuthErrorKind::MissingApiKey),
    ("insufficient_permissions", AuthErrorKind::InsufficientPermissions),
    ("insufficient_permission", AuthErrorKind::InsufficientPermissions),
    ("insufficient_scope", AuthErrorKind::InsufficientPermissions),
    ("insufficient_scopes", AuthErrorKind::InsufficientPermissions),
    ("missing_permission", AuthErrorKind::InsufficientPermissions),
    ("missing_permissions", AuthErrorKind::InsufficientPermissions),
    ("missing_scope", AuthErrorKind::InsufficientPermissions),
    ("missing_scopes", AuthErrorKind::InsufficientPermissions),
    ("permission_denied", AuthErrorKind::InsufficientPermissions),
    ("invalid_token", AuthErrorKind::TokenRejected),
    ("invalid_jwt", AuthErrorKind::TokenRejected),
    ("token_expired", AuthErrorKind::TokenRejected),
    ("expired_token", AuthErrorKind::TokenRejected),
    ("jwt_expired", AuthErrorKind::TokenRejected),
];

/// What a message says if a permission or scope is missing, as [`simplified`].
const PERMISSION_PHRASES: [&str; 6] = [
    "insufficientpermission",
    "insufficientscope",
    "missingpermission",
    "missingrequiredpermission",
    "missingrequiredscope",
    "missingscope",
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

    /// Classifies a 401 or 403. By code first, then type, then status: the API's documentation shows `invalid_api_key`
    /// with two different types. `codes` are the body's and the challenge's.
    pub(super) fn classify(
        status: StatusCode,
        codes: [Option<&str>; 2],
        error_type: Option<&str>,
        message: Option<&str>,
    ) -> Self {
        let by_status = match status {
            StatusCode::UNAUTHORIZED => Self::Unauthorized,
            _ => Self::Forbidden,
        };
        let by_code = |code: &str| known_code(code).map(|(_, kind)| kind);
        let by_type = |error_type: &str| match error_type {
            "authentication_error" => Some(Self::Unauthorized),
            "authorization_error" | "permission_error" => Some(Self::Forbidden),
            other => by_code(other),
        };
        let code = codes.into_iter().flatten().find_map(by_code);
        match code.or_else(|| error_type.and_then(by_type)).unwrap_or(by_status) {
            kind @ (Self::Unauthorized | Self::Forbidden) => {
                message.and_then(Self::by_message).unwrap_or(kind)
            }
            kind => kind,
        }
    }

    fn by_message(message: &str) -> Option<Self> {
        let is_separator = |char: char| !char.is_ascii_alphanumeric() && char != '_';
        let mut words = message.split(is_separator).filter(|word| word.contains('_'));
        if let Some((_, kind)) = known_code(message).or_else(|| words.find_map(known_code)) {
            return Some(kind);
        }
        let message: String = simplified(message).collect();
        let is_permission = PERMISSION_PHRASES.iter().any(|phrase| message.contains(phrase));
        is_permission.then_some(Self::InsufficientPermissions)
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

/// The entry of [`CODES`] for a code in any spelling.
pub(crate) fn known_code(code: &str) -> Option<(&'static str, AuthErrorKind)> {
    CODES.into_iter().find(|(known, _)| simplified(known).eq(simplified(code)))
}

/// The letters and digits of a code, in lower case.
fn simplified(code: &str) -> impl Iterator<Item = char> {
    code.chars().filter(char::is_ascii_alphanumeric).map(|char| char.to_ascii_lowercase())
}
