//! The grant types of token requests, and the tokens they carry.

use std::borrow::Cow;

use crate::{credential::Token, refresh::Provider};

/// The grant type, with the tokens that the request carries. A refresh token is supplied for each exchange.
#[derive(Clone)]
pub(super) enum Grant {
    ClientCredentials,
    RefreshToken,
    TokenExchange { subject: (Provider<Token>, TokenType), actor: Option<(Provider<Token>, TokenType)> },
    JwtBearer { assertion: Provider<Token> },
}

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

impl Grant {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::ClientCredentials => "client_credentials",
            Self::RefreshToken => "refresh_token",
            Self::TokenExchange { .. } => "urn:ietf:params:oauth:grant-type:token-exchange",
            Self::JwtBearer { .. } => "urn:ietf:params:oauth:grant-type:jwt-bearer",
        }
    }

    /// Returns each token of the request with the name of its form parameter, and its type with the name of that.
    pub(super) fn tokens(&self) -> impl Iterator<Item = GrantToken<'_>> {
        let (first, second) = match self {
            Self::ClientCredentials | Self::RefreshToken => (None, None),
            Self::TokenExchange { subject: (token, kind), actor } => {
                let subject = GrantToken {
                    token,
                    name: "subject_token",
                    kind: Some(("subject_token_type", kind.uri())),
                };
                let actor = actor.as_ref().map(|(token, kind)| GrantToken {
                    token,
                    name: "actor_token",
                    kind: Some(("actor_token_type", kind.uri())),
                });
                (Some(subject), actor)
            }
            Self::JwtBearer { assertion: token } => {
                (Some(GrantToken { token, name: "assertion", kind: None }), None)
            }
        };
        first.into_iter().chain(second)
    }
}

/// A token that a request carries.
pub(super) struct GrantToken<'a> {
    pub(super) token: &'a Provider<Token>,
    /// The form parameter that carries the token.
    pub(super) name: &'static str,
    /// The form parameter that states its type.
    pub(super) kind: Option<(&'static str, &'a str)>,
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
