//! [`OAuthSource`]: tokens from a token endpoint, by any of four grants.

use std::{borrow::Cow, fmt, sync::Arc};

use secrecy::SecretString;

use super::{
    RefreshTokenStore, TokenEndpoint, TokenType,
    exchange::{Exchange, GrantToken},
    rotation::{Rotate, Rotation},
    subject_tokens::Presented,
};
use crate::{
    credential::Token,
    error::{ConfigError, ConfigErrorKind, Place, Setting},
    refresh::Provider,
    source::{Fetched, Reason, Source, SourceError},
    util::timer::{TimeoutError, has_timers},
};

const TOKEN_EXCHANGE: &str = "urn:ietf:params:oauth:grant-type:token-exchange";

/// A [`Source`] of tokens from an OAuth 2.0 token endpoint. See the [module docs](super).
///
/// Cheap to clone. Clones share the state of the refresh token. Fetching needs a tokio runtime with its timers enabled, as
/// every refresh does.
#[derive(Clone)]
pub struct OAuthSource {
    exchange: Arc<Exchange>,
    /// With the refresh token grant alone.
    rotation: Option<Arc<dyn Rotate>>,
}

impl OAuthSource {
    /// Requests tokens for the program itself.
    #[must_use]
    pub fn client_credentials(endpoint: TokenEndpoint) -> Self {
        Self::new(endpoint, "client_credentials", None)
    }

    /// Requests tokens for a user who has logged in, with the refresh token in `store`. When the endpoint returns a
    /// new refresh token, it replaces the stored one.
    ///
    /// ```
    /// use bytes::Bytes;
    /// use http_body_util::Full;
    /// use tower_selam::{Refreshing, simulator::Simulator};
    /// use tower_selam::oauth::{ClientAuth, MemoryStore, OAuthSource, RefreshToken, TokenEndpoint};
    ///
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
    /// let client = Simulator::new();
    /// let first = RefreshToken::new(client.issue_refresh_token())?;
    /// let endpoint = TokenEndpoint::new::<_, Full<Bytes>, _>("https://api.selamgpt.com/oauth/token", client)?
    ///     .with_client_auth(ClientAuth::public("my-app")?);
    ///
    /// let store = MemoryStore::new(first.clone()); // implement `RefreshTokenStore` to survive a restart
    /// let jwts = Refreshing::new(OAuthSource::refresh_token(endpoint, store.clone()));
    /// jwts.token().await?;
    /// assert_ne!(store.current().id(), first.id());
    /// # Ok::<(), tower_selam::BoxError>(())
    /// # }).unwrap();
    /// ```
    #[must_use]
    pub fn refresh_token(endpoint: TokenEndpoint, store: impl RefreshTokenStore) -> Self {
        let rotation: Arc<dyn Rotate> = Arc::new(Rotation::new(store));
        Self { rotation: Some(rotation), ..Self::new(endpoint, "refresh_token", None) }
    }

    /// Exchanges the token of `subject`, which another service issued
    /// ([RFC 8693 section 2.1](https://www.rfc-editor.org/rfc/rfc8693#section-2.1)).
    ///
    /// A refreshing subject token is refreshed when the endpoint rejects it. For many subjects who present their own tokens, see
    /// [`SubjectTokens`](super::SubjectTokens).
    #[must_use]
    pub fn token_exchange(
        endpoint: TokenEndpoint,
        subject: impl Into<Provider<Token>>,
        subject_type: TokenType,
    ) -> Self {
        Self::exchange(endpoint, Presented::Provider(subject.into()), subject_type)
    }

    pub(super) fn exchange(endpoint: TokenEndpoint, provider: Presented, subject_type: TokenType) -> Self {
        let kind = Some(("subject_token_type", subject_type));
        let subject = GrantToken { provider, name: "subject_token", kind };
        Self::new(endpoint, TOKEN_EXCHANGE, Some(subject))
    }

    /// Exchanges a JWT, the assertion
    /// ([RFC 7523 section 2.1](https://www.rfc-editor.org/rfc/rfc7523#section-2.1)), which a
    /// [`Refreshing`](crate::Refreshing) over a signing source can supply.
    #[must_use]
    pub fn jwt_bearer(endpoint: TokenEndpoint, assertion: impl Into<Provider<Token>>) -> Self {
        let provider = Presented::Provider(assertion.into());
        let assertion = GrantToken { provider, name: "assertion", kind: None };
        Self::new(endpoint, "urn:ietf:params:oauth:grant-type:jwt-bearer", Some(assertion))
    }

    fn new(endpoint: TokenEndpoint, grant_type: &'static str, token: Option<GrantToken>) -> Self {
        let tokens = token.into_iter().collect();
        let exchange = Exchange { endpoint, grant_type, tokens, parameters: Vec::new() };
        Self { exchange: Arc::new(exchange), rotation: None }
    }

    /// Sets the party that acts for the subject of a [token exchange](Self::token_exchange). Other grants ignore
    /// it.
    #[must_use]
    pub fn with_actor(mut self, actor: impl Into<Provider<Token>>, actor_type: TokenType) -> Self {
        if self.exchange.grant_type == TOKEN_EXCHANGE {
            let kind = Some(("actor_token_type", actor_type));
            let provider = Presented::Provider(actor.into());
            let actor = GrantToken { provider, name: "actor_token", kind };
            let tokens = &mut Arc::make_mut(&mut self.exchange).tokens;
            tokens.truncate(1);
            tokens.push(actor);
        }
        self
    }

    /// Sets the requested scopes, separated by spaces
    /// ([RFC 6749 section 3.3](https://www.rfc-editor.org/rfc/rfc6749#section-3.3)).
    #[must_use]
    pub fn with_scope(self, scope: impl Into<String>) -> Self {
        self.with(Cow::Borrowed("scope"), scope.into())
    }

    /// Adds the name of a service that the token is for; may be called more than once
    /// ([RFC 8693 section 2.1](https://www.rfc-editor.org/rfc/rfc8693#section-2.1)).
    #[must_use]
    pub fn with_audience(self, audience: impl Into<String>) -> Self {
        self.with(Cow::Borrowed("audience"), audience.into())
    }

    /// Adds the URI of a resource that the token is for; may be called more than once
    /// ([RFC 8707 section 2](https://www.rfc-editor.org/rfc/rfc8707#section-2)).
    #[must_use]
    pub fn with_resource(self, resource: impl Into<String>) -> Self {
        self.with(Cow::Borrowed("resource"), resource.into())
    }

    /// Sets another form parameter that the endpoint documents. The value may be a secret.
    ///
    /// # Errors
    ///
    /// Fails if `name` is empty or a parameter that this source sets itself.
    pub fn with_parameter(
        self,
        name: impl Into<Cow<'static, str>>,
        value: impl Into<SecretString>,
    ) -> Result<Self, ConfigError> {
        let name = name.into();
        let kind = match &*name {
            "" => ConfigErrorKind::Empty,
            "grant_type"
            | "client_id"
            | "client_secret"
            | "client_assertion"
            | "client_assertion_type"
            | "scope"
            | "refresh_token"
            | "assertion"
            | "subject_token"
            | "subject_token_type"
            | "actor_token"
            | "actor_token_type" => ConfigErrorKind::ReservedParameter,
            _ => return Ok(self.with(name, value)),
        };
        Err(ConfigError::new(Setting::Parameter, Place::Argument, kind))
    }

    fn with(mut self, name: Cow<'static, str>, value: impl Into<SecretString>) -> Self {
        let parameters = &mut Arc::make_mut(&mut self.exchange).parameters;
        // Only these two may be repeated.
        if !matches!(&*name, "audience" | "resource") {
            parameters.retain(|(other, _)| *other != name);
        }
        parameters.push((name, value.into()));
        self
    }
}

impl Source<Token> for OAuthSource {
    async fn fetch(&self, _: Reason<Token>) -> Result<Fetched<Token>, SourceError> {
        if !has_timers() {
            return Err(SourceError::transient(TimeoutError::NoTimers));
        }
        match &self.rotation {
            Some(rotation) => Arc::clone(rotation).fetch(Arc::clone(&self.exchange)).await,
            None => Ok(self.exchange.run(None).await?.fetched?),
        }
    }

    fn version(&self) -> u64 {
        let store = self.rotation.as_ref().map_or(0, |rotation| rotation.version());
        self.exchange.version() ^ store
    }

    /// Consists of the endpoint, the grant, the client's id and all parameters except tokens. What may be secret is hashed.
    fn identity(&self) -> Option<String> {
        Some(self.exchange.identity())
    }
}

impl fmt::Debug for OAuthSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Exchange { endpoint, grant_type, .. } = &*self.exchange;
        let mut debug = f.debug_struct("OAuthSource");
        debug.field("endpoint", endpoint).field("grant_type", grant_type).finish_non_exhaustive()
    }
}
