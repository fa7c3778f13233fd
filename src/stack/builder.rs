//! The builder: [`SelamLayerBuilder`].

use std::{fmt, time::Duration};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use tower::Service;

use super::{SelamLayer, sharing::Sharing};
use crate::{
    ApiKey, AuthErrorLayer, BaseUrl, BoxError, ConfigError, ConfigErrorKind, JwtProvider, Origins, Provider,
    Refreshing, Token,
    authorize::{CredentialProvider, Owner, Policy, Settings},
    credential::{ClientSecret, Credential, text},
    env,
    error::{Place, Setting},
    oauth::{ClientAuth, OAuthSource, SubjectTokens, TokenClient, TokenEndpoint, TokenType},
    source::FileSource,
};

/// Builds a [`SelamLayer`].
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct SelamLayerBuilder {
    api_key: Option<Provider<ApiKey>>,
    jwt: Option<JwtProvider>,
    base_url: Option<BaseUrl>,
    origins: Option<Origins>,
    token_client: Option<TokenClient>,
    token_url: Option<TokenUrl>,
    client_auth: Option<ClientAuth>,
    token_scope: Option<String>,
    token_audience: Option<String>,
    token_resource: Option<String>,
    subject_tokens: Option<SubjectTokens>,
    sharing: Sharing,
    errors: AuthErrorLayer,
    if_not_present: bool,
    require_request_auth: bool,
    allow_insecure_loopback: bool,
}

impl SelamLayerBuilder {
    /// Sets the key. Required.
    pub fn with_api_key(mut self, key: impl Into<Provider<ApiKey>>) -> Self {
        self.api_key = Some(key.into());
        self
    }

    /// Sets a JWT to send with the key on every request, or [one per subject](crate::PerSubject). By default the key is
    /// sent alone.
    pub fn with_jwt(mut self, jwt: impl Into<JwtProvider>) -> Self {
        self.jwt = Some(jwt.into());
        self
    }

    /// Sets the HTTP client that requests JWTs from the token endpoint, if `SELAM_TOKEN_URL` names one; see
    /// [`build_with_env`](Self::build_with_env). It should not follow redirects on its own.
    ///
    /// `B` is the client's request body, as for [`TokenEndpoint::new`].
    ///
    /// ```no_run
    /// use bytes::Bytes;
    /// use http_body_util::Full;
    /// use hyper_rustls::HttpsConnectorBuilder;
    /// use hyper_util::{client::legacy::Client, rt::TokioExecutor};
    /// use tower::Layer;
    /// use tower_selam::SelamLayer;
    ///
    /// let tls = HttpsConnectorBuilder::new().with_native_roots()?.https_only().enable_all_versions().build();
    /// let client = Client::builder(TokioExecutor::new()).build::<_, Full<Bytes>>(tls);
    /// let layer = SelamLayer::builder().with_token_client(client.clone()).build_with_env()?;
    /// let selam = layer.layer(client);
    /// # Ok::<(), tower_selam::BoxError>(())
    /// ```
    pub fn with_token_client<S, B, R>(mut self, client: S) -> Self
    where
        S: Service<Request<B>, Response = Response<R>, Error: Into<BoxError>, Future: Send>
            + Clone
            + Send
            + 'static,
        B: From<Bytes> + Send + 'static,
        R: Body<Error: Into<BoxError>> + Send + 'static,
    {
        self.token_client = Some(TokenClient::new(client));
        self
    }

    /// Sets the token endpoint that issues the JWT, in place of [`SELAM_TOKEN_URL`](env::SELAM_TOKEN_URL). It is used by
    /// [`build_with_env`](Self::build_with_env), which says how the client authenticates there.
    pub fn with_token_url(mut self, url: impl Into<String>) -> Self {
        self.token_url = Some(TokenUrl(url.into()));
        self
    }

    /// Sets how the client authenticates to the token endpoint, in place of [`SELAM_CLIENT_ID`](env::SELAM_CLIENT_ID) and
    /// the variables that belong to it.
    pub fn with_client_auth(mut self, auth: ClientAuth) -> Self {
        self.client_auth = Some(auth);
        self
    }

    /// Sets the scopes to request from the token endpoint, in place of [`SELAM_TOKEN_SCOPE`](env::SELAM_TOKEN_SCOPE). See
    /// [`OAuthSource::with_scope`].
    pub fn with_token_scope(mut self, scope: impl Into<String>) -> Self {
        self.token_scope = Some(scope.into());
        self
    }

    /// Sets the service that the JWT is for, in place of [`SELAM_TOKEN_AUDIENCE`](env::SELAM_TOKEN_AUDIENCE). See
    /// [`OAuthSource::with_audience`].
    pub fn with_token_audience(mut self, audience: impl Into<String>) -> Self {
        self.token_audience = Some(audience.into());
        self
    }

    /// Sets the resource that the JWT is for, in place of [`SELAM_TOKEN_RESOURCE`](env::SELAM_TOKEN_RESOURCE). See
    /// [`OAuthSource::with_resource`].
    pub fn with_token_resource(mut self, resource: impl Into<String>) -> Self {
        self.token_resource = Some(resource.into());
        self
    }

    /// Exchanges the token that each [`Subject`](crate::Subject) presents for its JWT at the token endpoint
    /// ([RFC 8693](https://www.rfc-editor.org/rfc/rfc8693)), in place of one JWT for all: every request then names its subject.
    /// The subject tokens' type is `urn:ietf:params:oauth:token-type:jwt`. Without a token endpoint, this has no effect.
    pub fn with_subject_tokens(mut self, tokens: SubjectTokens) -> Self {
        self.subject_tokens = Some(tokens);
        self
    }

    /// Shares the JWTs that the token endpoint issues with the other members of a fleet (feature `fleet`), which then ask the
    /// endpoint once for all of them.
    ///
    /// The program's own JWT has the name `service` in the fleet, that of a [subject](Self::with_subject_tokens) `user:` and the
    /// subject's name. A member uses a subject's JWT only while the subject's own token, presented to this member, is valid. All
    /// members authenticate to the endpoint as the same client, or with keys of the same account.
    ///
    /// Keys, and JWTs from variables, files and [`with_jwt`](Self::with_jwt), are not shared.
    ///
    /// ```
    /// use tower_selam::{SelamLayer, fleet::{Fleet, MemoryStore, SealingKey}, simulator::Simulator};
    ///
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
    /// let client = Simulator::new();
    /// let fleet = Fleet::new("billing", MemoryStore::default(), SealingKey::new([7; 32]))?;
    /// let layer = SelamLayer::builder()
    ///     .with_api_key(tower_selam::ApiKey::new(client.issue_key())?)
    ///     .with_token_client::<_, http_body_util::Full<bytes::Bytes>, _>(client)
    ///     .with_token_url("https://api.selamgpt.com/oauth/token")
    ///     .with_fleet(fleet.clone())
    ///     .build_with_env()?;
    /// layer.prefetch().await?;
    /// assert!(fleet.status("service").await?.is_some());
    /// # Ok::<(), tower_selam::BoxError>(())
    /// # }).unwrap();
    /// ```
    #[cfg(feature = "fleet")]
    pub fn with_fleet(mut self, fleet: crate::fleet::Fleet) -> Self {
        self.sharing.fleet = Some(fleet);
        self
    }

    /// Sets where the API lives; [`BaseUrl::DEFAULT`] by default.
    pub fn with_base_url(mut self, base_url: BaseUrl) -> Self {
        self.base_url = Some(base_url);
        self
    }

    /// Sets the origins that receive the credentials; only the base URL's origin by default.
    pub fn with_origins(mut self, origins: Origins) -> Self {
        self.origins = Some(origins);
        self
    }

    /// See [`ApiKeyLayer::if_not_present`](crate::ApiKeyLayer::if_not_present).
    pub fn if_not_present(mut self) -> Self {
        self.if_not_present = true;
        self
    }

    /// See [`ApiKeyLayer::require_request_auth`](crate::ApiKeyLayer::require_request_auth).
    pub fn require_request_auth(mut self) -> Self {
        self.require_request_auth = true;
        self
    }

    /// See [`AuthErrorLayer::with_body_limit`].
    pub fn with_error_body_limit(mut self, bytes: usize) -> Self {
        self.errors = self.errors.with_body_limit(bytes);
        self
    }

    /// See [`AuthErrorLayer::with_body_timeout`].
    pub fn with_error_body_timeout(mut self, time: Duration) -> Self {
        self.errors = self.errors.with_body_timeout(time);
        self
    }

    /// Allows `SELAM_BASE_URL` to be plain `http` to a loopback address or `localhost`, for tests.
    pub fn allow_insecure_loopback(mut self) -> Self {
        self.allow_insecure_loopback = true;
        self
    }

    /// Builds the layer from the builder alone.
    ///
    /// # Errors
    ///
    /// When there is no key, or the base URL's origin is not among the allowed ones.
    pub fn build(self) -> Result<SelamLayer, ConfigError> {
        let Some(key) = self.api_key else {
            return Err(ConfigError::new(Setting::ApiKey, Place::Argument, ConfigErrorKind::Missing));
        };
        let base_url = self.base_url.unwrap_or_default();
        let origins = self.origins.unwrap_or_else(|| base_url.origins());
        if !origins.contains(base_url.origin()) {
            return Err(ConfigError::new(Setting::BaseUrl, Place::Argument, ConfigErrorKind::NotAllowed));
        }
        let policy = Policy {
            owner: Owner::Both,
            provider: CredentialProvider::new(Some(key), self.jwt).into(),
            settings: Settings {
                origins,
                if_not_present: self.if_not_present,
                require_request_auth: self.require_request_auth,
            },
        };
        Ok(SelamLayer::new(policy, self.errors, base_url))
    }

    /// Builds the layer from the builder and, for what the builder leaves open, from the environment:
    ///
    /// - the key from [`SELAM_API_KEY`], or from the file that [`SELAM_API_KEY_FILE`] names;
    /// - the JWT, which is optional, from [`SELAM_JWT`], from the file that [`SELAM_JWT_FILE`] names, or from the OAuth 2.0
    ///   token endpoint at [`SELAM_TOKEN_URL`], through the client given to
    ///   [`with_token_client`](Self::with_token_client);
    /// - the client of that endpoint from [`SELAM_CLIENT_ID`] and [`SELAM_CLIENT_SECRET`], or the file that
    ///   [`SELAM_CLIENT_SECRET_FILE`] names, by the method that [`SELAM_CLIENT_AUTH`] names. Without them, the client
    ///   authenticates with the API key as bearer;
    /// - what to request there, which is optional, from [`SELAM_TOKEN_SCOPE`], [`SELAM_TOKEN_AUDIENCE`] and
    ///   [`SELAM_TOKEN_RESOURCE`];
    /// - [`SELAM_BASE_URL`], which is optional.
    ///
    /// A variable that is set to nothing counts as not set.
    ///
    /// A file is read now, and again when it is replaced: see [`FileSource`]. The endpoint is asked for the first JWT when a
    /// request needs it: see [`OAuthSource::client_credentials`].
    ///
    /// # Errors
    ///
    /// When there is no key, a variable or file contains something invalid, or two variables contradict each other; the
    /// error names the variable.
    ///
    /// [`SELAM_API_KEY`]: env::SELAM_API_KEY
    /// [`SELAM_API_KEY_FILE`]: env::SELAM_API_KEY_FILE
    /// [`SELAM_JWT`]: env::SELAM_JWT
    /// [`SELAM_JWT_FILE`]: env::SELAM_JWT_FILE
    /// [`SELAM_TOKEN_URL`]: env::SELAM_TOKEN_URL
    /// [`SELAM_CLIENT_ID`]: env::SELAM_CLIENT_ID
    /// [`SELAM_CLIENT_SECRET`]: env::SELAM_CLIENT_SECRET
    /// [`SELAM_CLIENT_SECRET_FILE`]: env::SELAM_CLIENT_SECRET_FILE
    /// [`SELAM_CLIENT_AUTH`]: env::SELAM_CLIENT_AUTH
    /// [`SELAM_TOKEN_SCOPE`]: env::SELAM_TOKEN_SCOPE
    /// [`SELAM_TOKEN_AUDIENCE`]: env::SELAM_TOKEN_AUDIENCE
    /// [`SELAM_TOKEN_RESOURCE`]: env::SELAM_TOKEN_RESOURCE
    /// [`SELAM_BASE_URL`]: env::SELAM_BASE_URL
    pub fn build_with_env(mut self) -> Result<SelamLayer, ConfigError> {
        let key = match self.api_key.take() {
            Some(key) => key,
            None => match one_of::<ApiKey>(&[env::SELAM_API_KEY, env::SELAM_API_KEY_FILE])? {
                Some(env::SELAM_API_KEY_FILE) => from_file(env::SELAM_API_KEY_FILE)?,
                _ => ApiKey::from_env()?.into(),
            },
        };
        if self.jwt.is_none() && self.token_url.is_some() {
            self.jwt = Some(self.jwts_from_token_endpoint(&key)?);
        }
        if self.jwt.is_none() {
            self.jwt = match one_of::<Token>(&[env::SELAM_JWT, env::SELAM_JWT_FILE, env::SELAM_TOKEN_URL])? {
                Some(env::SELAM_JWT_FILE) => Some(from_file::<Token>(env::SELAM_JWT_FILE)?.into()),
                Some(env::SELAM_TOKEN_URL) => Some(self.jwts_from_token_endpoint(&key)?),
                Some(_) => Some(Token::from_env()?.into()),
                None => None,
            };
        }
        self.api_key = Some(key);
        if self.base_url.is_none() {
            self.base_url = Some(BaseUrl::read_env(self.allow_insecure_loopback)?);
        }
        self.build()
    }

    /// JWTs from the builder's endpoint, or from the environment's.
    fn jwts_from_token_endpoint(&self, key: &Provider<ApiKey>) -> Result<JwtProvider, ConfigError> {
        let place = match self.token_url {
            Some(_) => Place::Argument,
            None => Place::EnvVar(env::SELAM_TOKEN_URL.to_owned()),
        };
        let Some(client) = self.token_client.clone() else {
            return Err(ConfigError::new(Setting::TokenUrl, place, ConfigErrorKind::NeedsClient));
        };
        let url = match &self.token_url {
            Some(TokenUrl(url)) => url.clone(),
            None => read(Setting::TokenUrl, env::SELAM_TOKEN_URL)?,
        };
        let endpoint = TokenEndpoint::over(client, &url, place, self.allow_insecure_loopback)?;
        let auth = match &self.client_auth {
            Some(auth) => auth.clone(),
            None => client_from_env()?.unwrap_or_else(|| ClientAuth::api_key(key.clone())),
        };
        let endpoint = endpoint.with_client_auth(auth);
        let given = |value: &Option<String>, name| match value {
            Some(value) => Ok(Some(value.clone())),
            None => parameter(name),
        };
        let scope = given(&self.token_scope, env::SELAM_TOKEN_SCOPE)?;
        let audience = given(&self.token_audience, env::SELAM_TOKEN_AUDIENCE)?;
        let resource = given(&self.token_resource, env::SELAM_TOKEN_RESOURCE)?;
        let requesting = move |mut source: OAuthSource| {
            if let Some(scope) = &scope {
                source = source.with_scope(scope);
            }
            if let Some(audience) = &audience {
                source = source.with_audience(audience);
            }
            if let Some(resource) = &resource {
                source = source.with_resource(resource);
            }
            source
        };
        Ok(match self.subject_tokens.clone() {
            None => self.sharing.one(requesting(OAuthSource::client_credentials(endpoint))),
            Some(tokens) => self.sharing.per_subject(tokens, move |tokens, subject| {
                requesting(match tokens.is_own(subject) {
                    true => OAuthSource::client_credentials(endpoint.clone()),
                    false => tokens.exchange(endpoint.clone(), subject, TokenType::Jwt),
                })
            }),
        })
    }
}

/// A URL whose query may contain a secret.
#[derive(Clone)]
struct TokenUrl(String);

impl fmt::Debug for TokenUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenUrl([redacted])")
    }
}

/// Which of these alternative variables is set.
fn one_of<C: Credential>(names: &[&'static str]) -> Result<Option<&'static str>, ConfigError> {
    let mut set = names.iter().copied().filter(|name| env::var_os(name).is_some());
    let (first, second) = (set.next(), set.next());
    match (first, second) {
        (Some(first), Some(other)) => {
            Err(C::refuse(Place::EnvVar(first.to_owned()), ConfigErrorKind::Conflict { other }))
        }
        _ => Ok(first),
    }
}

/// The credential in the file that the variable `named_by` names.
fn from_file<C: Credential>(named_by: &'static str) -> Result<Provider<C>, ConfigError> {
    let source = FileSource::new(env::var_os(named_by).unwrap_or_default());
    // Report an unusable file now.
    source.read()?;
    Ok(Provider::Refreshing(Refreshing::new(source)))
}

/// The client of the token endpoint, if a variable tells of one.
fn client_from_env() -> Result<Option<ClientAuth>, ConfigError> {
    let in_header = match env::var(env::SELAM_CLIENT_AUTH).as_deref().map(str::trim) {
        Err(ConfigErrorKind::Missing) | Ok("client_secret_basic") => Ok(Some(true)),
        Ok("client_secret_post") => Ok(Some(false)),
        Ok("none") => Ok(None),
        Ok(_) => Err(ConfigErrorKind::UnknownMethod),
        Err(kind) => Err(kind.clone()),
    };
    let at = |name: &str| Place::EnvVar(name.to_owned());
    let in_header =
        in_header.map_err(|kind| ConfigError::new(Setting::ClientAuth, at(env::SELAM_CLIENT_AUTH), kind))?;
    let secret = one_of::<ClientSecret>(&[env::SELAM_CLIENT_SECRET, env::SELAM_CLIENT_SECRET_FILE])?;
    let names = [env::SELAM_CLIENT_ID, env::SELAM_CLIENT_AUTH];
    if secret.is_none() && names.iter().all(|name| env::var_os(name).is_none()) {
        return Ok(None);
    }
    let id = read(Setting::ClientId, env::SELAM_CLIENT_ID)?;
    let secret = match (secret, in_header) {
        (None, None) => None,
        (Some(name), None) => {
            let kind = ConfigErrorKind::Conflict { other: "SELAM_CLIENT_AUTH=none" };
            return Err(ConfigError::new(Setting::ClientSecret, at(name), kind));
        }
        (Some(env::SELAM_CLIENT_SECRET_FILE), _) => Some(from_file(env::SELAM_CLIENT_SECRET_FILE)?),
        _ => Some(ClientSecret::from_env_var(env::SELAM_CLIENT_SECRET)?.into()),
    };
    ClientAuth::found(&id, at(env::SELAM_CLIENT_ID), secret, in_header.unwrap_or_default()).map(Some)
}

/// A parameter of the token request, if the variable `name` is set.
fn parameter(name: &str) -> Result<Option<String>, ConfigError> {
    let value = match env::var(name) {
        Err(ConfigErrorKind::Missing) => return Ok(None),
        value => value.and_then(|value| text(&value).map(str::to_owned)),
    };
    // RFC 8707 section 2: an absolute URI without a fragment.
    let is_uri = |value: &String| value.contains(':') && !value.contains(['#', ' ']);
    let value = match value {
        Ok(value) if name == env::SELAM_TOKEN_RESOURCE && !is_uri(&value) => Err(ConfigErrorKind::InvalidUrl),
        value => value,
    };
    value.map(Some).map_err(|kind| ConfigError::new(Setting::Parameter, Place::EnvVar(name.to_owned()), kind))
}

fn read(setting: Setting, name: &str) -> Result<String, ConfigError> {
    env::var(name).map_err(|kind| ConfigError::new(setting, Place::EnvVar(name.to_owned()), kind))
}
