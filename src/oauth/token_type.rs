//! [`TokenType`]: the types of tokens that can be exchanged.

use std::borrow::Cow;

/// The type of a token in a token exchange
/// ([RFC 8693 section 3](https://www.rfc-editor.org/rfc/rfc8693#section-3)).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TokenType {
    /// An OAuth 2.0 access token.
    AccessToken,
    /// An OAuth 2.0 refresh token.
    RefreshToken,
    /// An OpenID Connect ID token.
    IdToken,
    /// A Base64url-encoded SAML 1.1 assertion.
    Saml1,
    /// A Base64url-encoded SAML 2.0 assertion.
    Saml2,
    /// A JWT.
    Jwt,
    /// Any other type, by its URI.
    Other(Cow<'static, str>),
}

impl TokenType {
    /// Returns the URI that identifies the type.
    #[must_use]
    pub fn uri(&self) -> &str {
        match self {
            Self::AccessToken => "urn:ietf:params:oauth:token-type:access_token",
            Self::RefreshToken => "urn:ietf:params:oauth:token-type:refresh_token",
            Self::IdToken => "urn:ietf:params:oauth:token-type:id_token",
            Self::Saml1 => "urn:ietf:params:oauth:token-type:saml1",
            Self::Saml2 => "urn:ietf:params:oauth:token-type:saml2",
            Self::Jwt => "urn:ietf:params:oauth:token-type:jwt",
            Self::Other(uri) => uri,
        }
    }
}
