use std::{borrow::Cow, fmt, sync::Arc};

use bytes::Bytes;
use form_urlencoded::{Serializer, byte_serialize};
use http::{
    HeaderValue, Method as HttpMethod, Request,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE},
};
use zeroize::Zeroizing;

use super::{
    OAuthError, RefreshToken, RefreshTokenStore, TokenEndpoint,
    answer::{self, Granted},
    auth::Method,
    refresh::Rotation,
};
use crate::{
    ApiKey, AuthErrorKind, ConfigError, ConfigErrorKind, Provider, Token,
    credential::Credential,
    error::{Place, Subject},
    refresh::Wait,
    source::{Fetched, Reason, Source, SourceError},
};

/// A [`Source`] of tokens from an OAuth 2.0 token endpoint. See the [module docs](super).
///
/// Cheap to clone; clones share what is known of refresh tokens.
#[derive(Clone)]
pub struct OAuthSource(Arc<Parts>);

#[derive(Clone)]
struct Parts {
    endpoint: TokenEndpoint,
    grant: Grant,
    parameters: Vec<(Cow<'static, str>, String)>,
}

#[derive(Clone)]
enum Grant {
    ClientCredentials,
    RefreshToken(Arc<Rotation>),
    TokenExchange { subject: (Provider<Token>, TokenType), actor: Option<(Provider<Token>, TokenType)> },
    JwtBearer { assertion: Provider<Token> },
}

/// What a token that is exchanged is ([RFC 8693 section 3](https://www.rfc-editor.org/rfc/rfc8693#section-3)).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TokenType {
    /// An access token of OAuth 2.0.
    AccessToken,
    /// A refresh token of OAuth 2.0.
    RefreshToken,
    /// An ID token of OpenID Connect.
    IdToken,
    /// A SAML 1.1 assertion, in Base64url.
    Saml1,
    /// A SAML 2.0 assertion, in Base64url.
    Saml2,
    /// A JWT.
    Jwt,
    /// Any other, by its URI.
    Other(Cow<'static, str>),
}

impl OAuthSource {
    /// Tokens for the program itself.
    #[must_use]
    pub fn client_credentials(endpoint: TokenEndpoint) -> Self {
        Self::new(endpoint, Grant::ClientCredentials)
    }

    /// Tokens for somebody who has logged in, from the refresh token in `store`, which is replaced whenever the endpoint
    /// gives another.
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
    /// let store = MemoryStore::new(first.clone()); // a store of yours, to outlive the program
    /// let jwts = Refreshing::new(OAuthSource::refresh_token(endpoint, store.clone()));
    /// jwts.token().await?;
    /// assert_ne!(store.current().id(), first.id());
    /// # Ok::<(), tower_selam::BoxError>(())
    /// # }).unwrap();
    /// ```
    #[must_use]
    pub fn refresh_token(endpoint: TokenEndpoint, store: impl RefreshTokenStore) -> Self {
        Self::new(endpoint, Grant::RefreshToken(Arc::new(Rotation::new(store))))
    }

    /// Tokens in exchange for `subject`'s, which another service issued
    /// ([RFC 8693 section 2.1](https://www.rfc-editor.org/rfc/rfc8693#section-2.1)).
    ///
    /// One that renews itself is renewed when the endpoint refuses it.
    #[must_use]
    pub fn token_exchange(
        endpoint: TokenEndpoint,
        subject: impl Into<Provider<Token>>,
        subject_type: TokenType,
    ) -> Self {
        Self::new(endpoint, Grant::TokenExchange { subject: (subject.into(), subject_type), actor: None })
    }

    /// Tokens for a JWT, the assertion
    /// ([RFC 7523 section 2.1](https://www.rfc-editor.org/rfc/rfc7523#section-2.1)): a
    /// [`Refreshing`](crate::Refreshing) of a source that signs it, say.
    #[must_use]
    pub fn jwt_bearer(endpoint: TokenEndpoint, assertion: impl Into<Provider<Token>>) -> Self {
        Self::new(endpoint, Grant::JwtBearer { assertion: assertion.into() })
    }

    fn new(endpoint: TokenEndpoint, grant: Grant) -> Self {
        Self(Arc::new(Parts { endpoint, grant, parameters: Vec::new() }))
    }

    /// The party that acts for the subject of a [token exchange](Self::token_exchange); other grants have none, and
    /// leave it out.
    #[must_use]
    pub fn with_actor(mut self, actor: impl Into<Provider<Token>>, actor_type: TokenType) -> Self {
        if let Grant::TokenExchange { actor: slot, .. } = &mut Arc::make_mut(&mut self.0).grant {
            *slot = Some((actor.into(), actor_type));
        }
        self
    }

    /// What the token is to be good for: names with a space between
    /// ([RFC 6749 section 3.3](https://www.rfc-editor.org/rfc/rfc6749#section-3.3)).
    #[must_use]
    pub fn with_scope(self, scope: impl Into<String>) -> Self {
        self.with(Cow::Borrowed("scope"), scope.into())
    }

    /// Whom the token is to be shown to, by name; may be given more than once
    /// ([RFC 8693 section 2.1](https://www.rfc-editor.org/rfc/rfc8693#section-2.1)).
    #[must_use]
    pub fn with_audience(self, audience: impl Into<String>) -> Self {
        self.with(Cow::Borrowed("audience"), audience.into())
    }

    /// Where the token is to be shown, as a URI; may be given more than once
    /// ([RFC 8707 section 2](https://www.rfc-editor.org/rfc/rfc8707#section-2)).
    #[must_use]
    pub fn with_resource(self, resource: impl Into<String>) -> Self {
        self.with(Cow::Borrowed("resource"), resource.into())
    }

    /// Another parameter, as the endpoint's documentation has it.
    ///
    /// # Errors
    ///
    /// When it is one that this source sets itself.
    pub fn with_parameter(
        self,
        name: impl Into<Cow<'static, str>>,
        value: impl Into<String>,
    ) -> Result<Self, ConfigError> {
        let name = name.into();
        let kind = match &*name {
            "" => ConfigErrorKind::Empty,
            "grant_type" | "client_id" | "client_secret" | "scope" | "refresh_token" | "assertion"
            | "subject_token" | "subject_token_type" | "actor_token" | "actor_token_type" => {
                ConfigErrorKind::ReservedParameter
            }
            _ => return Ok(self.with(name, value.into())),
        };
        Err(ConfigError::new(Subject::Parameter, Place::Argument, kind))
    }

    fn with(mut self, name: Cow<'static, str>, value: String) -> Self {
        let parameters = &mut Arc::make_mut(&mut self.0).parameters;
        // Only these two may repeat.
        if !matches!(&*name, "audience" | "resource") {
            parameters.retain(|(other, _)| *other != name);
        }
        parameters.push((name, value));
        self
    }

    pub(super) fn rotation(&self) -> Option<&Arc<Rotation>> {
        match &self.0.grant {
            Grant::RefreshToken(rotation) => Some(rotation),
            _ => None,
        }
    }

    /// Asks the endpoint; once more when it refused what is another by then.
    pub(super) async fn exchange(&self, refresh: Option<&RefreshToken>) -> Result<Granted, Trouble> {
        let used = self.used().await?;
        match self.ask(&used, refresh).await {
            Err(Trouble::Refused(error)) if used.replaced(&error).await => {
                self.ask(&self.used().await?, refresh).await
            }
            result => result,
        }
    }

    async fn ask(&self, used: &Used, refresh: Option<&RefreshToken>) -> Result<Granted, Trouble> {
        let answer = self.0.endpoint.client.send(self.request(used, refresh)).await;
        let answer = answer.map_err(|error| Trouble::Failed(error.into()))?;
        let secrets = self.secrets(used, refresh);
        answer::read(&answer, secrets.iter().map(|secret| &***secret)).map_err(Trouble::Refused)
    }

    /// What renews itself and goes into the request.
    async fn used(&self) -> Result<Used, Trouble> {
        let Parts { endpoint, grant, .. } = &*self.0;
        let key = match &endpoint.auth.0 {
            Method::ApiKey(key) => Some(Sent::of(key).await?),
            _ => None,
        };
        let (first, second) = match grant {
            Grant::ClientCredentials | Grant::RefreshToken(_) => (None, None),
            Grant::TokenExchange { subject, actor } => {
                (Some(&subject.0), actor.as_ref().map(|actor| &actor.0))
            }
            Grant::JwtBearer { assertion } => (Some(assertion), None),
        };
        let mut tokens = Vec::new();
        for token in first.into_iter().chain(second) {
            tokens.push(Sent::of(token).await?);
        }
        Ok(Used { key, tokens })
    }

    fn request(&self, used: &Used, refresh: Option<&RefreshToken>) -> Request<Bytes> {
        let endpoint = &self.0.endpoint;
        let mut request = Request::new(encode(&self.form(used, refresh)));
        *request.method_mut() = HttpMethod::POST;
        *request.uri_mut() = endpoint.uri.clone();
        let headers = request.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"));
        headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
        let authorization = match (&endpoint.auth.0, &used.key) {
            (Method::Basic { id, secret }, _) => Method::basic(id, secret),
            (_, Some(key)) => Some(key.value.0.bearer().clone()),
            _ => None,
        };
        headers.extend(authorization.map(|value| (AUTHORIZATION, value)));
        request
    }

    fn form<'a>(&'a self, used: &'a Used, refresh: Option<&'a RefreshToken>) -> Vec<(&'a str, &'a str)> {
        let Parts { endpoint, grant, parameters } = &*self.0;
        let mut form = vec![("grant_type", grant.name())];
        form.extend(refresh.map(|token| ("refresh_token", token.expose_secret())));
        let mut tokens = used.tokens.iter().map(|token| token.value.expose_secret());
        match grant {
            Grant::ClientCredentials | Grant::RefreshToken(_) => {}
            Grant::TokenExchange { subject: (_, subject_type), actor } => {
                form.extend(tokens.next().map(|token| ("subject_token", token)));
                form.push(("subject_token_type", subject_type.uri()));
                form.extend(tokens.next().map(|token| ("actor_token", token)));
                form.extend(actor.as_ref().map(|(_, actor_type)| ("actor_token_type", actor_type.uri())));
            }
            Grant::JwtBearer { .. } => form.extend(tokens.next().map(|token| ("assertion", token))),
        }
        form.extend(parameters.iter().map(|(name, value)| (&**name, &**value)));
        match &endpoint.auth.0 {
            Method::Post { id, secret } => form.extend([("client_id", &**id), ("client_secret", secret)]),
            Method::Public { id } => form.push(("client_id", id)),
            Method::Nothing | Method::Basic { .. } | Method::ApiKey(_) => {}
        }
        form
    }

    /// What must not be shown of the request: its secrets as they are, and in each form that they are sent in.
    fn secrets(&self, used: &Used, refresh: Option<&RefreshToken>) -> Vec<Zeroizing<String>> {
        let Parts { endpoint, parameters, .. } = &*self.0;
        let (basic, secret) = match &endpoint.auth.0 {
            Method::Basic { id, secret } => (Method::basic(id, secret), Some(&***secret)),
            Method::Post { secret, .. } => (None, Some(&***secret)),
            _ => (None, None),
        };
        let key = used.key.iter().map(|key| key.value.expose_secret());
        let tokens = used.tokens.iter().map(|token| token.value.expose_secret());
        // Whatever a program adds may be a password; what these three say is no secret.
        let added =
            parameters.iter().filter(|(name, _)| !matches!(&**name, "scope" | "audience" | "resource"));
        let raw = secret.into_iter().chain(key).chain(tokens).chain(refresh.map(RefreshToken::expose_secret));
        let raw = raw.chain(added.map(|(_, value)| &**value));
        let encoded = basic.and_then(|value| Some(value.to_str().ok()?.strip_prefix("Basic ")?.to_owned()));
        raw.flat_map(|secret| [secret.to_owned(), byte_serialize(secret.as_bytes()).collect()])
            .chain(encoded)
            .map(Zeroizing::new)
            .collect()
    }
}

impl Source<Token> for OAuthSource {
    async fn fetch(&self, _: Reason<Token>) -> Result<Fetched<Token>, SourceError> {
        if self.rotation().is_some() {
            return Rotation::fetch(self.clone()).await;
        }
        Ok(self.exchange(None).await?.fetched?)
    }

    fn version(&self) -> u64 {
        let Parts { endpoint, grant, .. } = &*self.0;
        let tokens = match grant {
            Grant::ClientCredentials => [None, None],
            Grant::RefreshToken(rotation) => {
                return mix([endpoint.auth.0.version(), Some(rotation.version())]);
            }
            Grant::TokenExchange { subject, actor } => {
                [subject.0.version(), actor.as_ref().and_then(|actor| actor.0.version())]
            }
            Grant::JwtBearer { assertion } => [assertion.version(), None],
        };
        mix([endpoint.auth.0.version(), Some(mix(tokens))])
    }
}

/// One number of two, another when either changes.
fn mix(versions: [Option<u64>; 2]) -> u64 {
    let [first, second] = versions.map(|version| version.map_or(0, |version| version.wrapping_add(1)));
    first.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32) ^ second
}

/// What renews itself and went into a request.
struct Used {
    key: Option<Sent<ApiKey>>,
    tokens: Vec<Sent<Token>>,
}

struct Sent<C: Credential> {
    from: Provider<C>,
    value: C,
}

impl Used {
    /// Has renewed what `error` is about; whether it is another now.
    async fn replaced(&self, error: &OAuthError) -> bool {
        let mut any = false;
        if error.blames_client()
            && let Some(key) = &self.key
        {
            any |= key.replaced().await;
        }
        if error.blames_grant() {
            for token in &self.tokens {
                any |= token.replaced().await;
            }
        }
        any
    }
}

impl<C: Credential> Sent<C> {
    async fn of(from: &Provider<C>) -> Result<Self, Trouble> {
        match from.get().await {
            Ok(value) => Ok(Self { from: from.clone(), value }),
            Err(error) => Err(Trouble::Failed(match error.retry_after() {
                _ if error.kind() == AuthErrorKind::RefreshRejected => SourceError::permanent(error),
                Some(time) => SourceError::transient(error).with_retry_after(time),
                None => SourceError::transient(error),
            })),
        }
    }

    async fn replaced(&self) -> bool {
        let fingerprint = self.value.secret().fingerprint();
        if let (_, Some(landing)) = self.from.reject(fingerprint) {
            // Whether it succeeded shows in what there is afterwards.
            let _ = Wait::new(landing).await;
        }
        self.from.current().is_some_and(|other| other.secret().fingerprint() != fingerprint)
    }
}

/// Why there is no answer, or none of use.
pub(super) enum Trouble {
    Refused(OAuthError),
    Failed(SourceError),
}

impl From<Trouble> for SourceError {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Refused(error) => error.into(),
            Trouble::Failed(error) => error,
        }
    }
}

impl Grant {
    fn name(&self) -> &'static str {
        match self {
            Self::ClientCredentials => "client_credentials",
            Self::RefreshToken(_) => "refresh_token",
            Self::TokenExchange { .. } => "urn:ietf:params:oauth:grant-type:token-exchange",
            Self::JwtBearer { .. } => "urn:ietf:params:oauth:grant-type:jwt-bearer",
        }
    }
}

impl TokenType {
    /// The URI that stands for it.
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

/// The form as bytes that are wiped. Of the right size from the start: a buffer that grows leaves copies behind.
fn encode(form: &[(&str, &str)]) -> Bytes {
    let room = form.iter().map(|(name, value)| 3 * (name.len() + value.len()) + "&=".len()).sum();
    let mut encoder = Serializer::new(String::with_capacity(room));
    encoder.extend_pairs(form);
    Bytes::from_owner(Zeroizing::new(encoder.finish().into_bytes()))
}

impl fmt::Debug for OAuthSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Parts { endpoint, grant, .. } = &*self.0;
        let mut debug = f.debug_struct("OAuthSource");
        debug.field("endpoint", endpoint).field("grant_type", &grant.name()).finish_non_exhaustive()
    }
}
