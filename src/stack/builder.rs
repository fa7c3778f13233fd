use std::{fmt, time::Duration};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use tower_service::Service;

use super::SelamLayer;
use crate::{
    ApiKey, AuthErrorLayer, BaseUrl, BoxError, ConfigError, ConfigErrorKind, JwtProvider, Origins, Provider,
    Refreshing, Token,
    authorize::{LayerCredentials, Policy},
    credential::Credential,
    credential::Form,
    env,
    error::{Place, Subject},
    oauth::{ClientAuth, OAuthSource, TokenClient, TokenEndpoint},
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
    errors: AuthErrorLayer,
    if_not_present: bool,
    require_request_auth: bool,
    allow_insecure_loopback: bool,
}

impl SelamLayerBuilder {
    /// The key. Required.
    pub fn with_api_key(mut self, key: impl Into<Provider<ApiKey>>) -> Self {
        self.api_key = Some(key.into());
        self
    }

    /// A JWT to send with the key on every request, or [one for each user](crate::PerSubject); by default the key goes
    /// alone.
    pub fn with_jwt(mut self, jwt: impl Into<JwtProvider>) -> Self {
        self.jwt = Some(jwt.into());
        self
    }

    /// The HTTP client that asks the token endpoint for JWTs, where `SELAM_TOKEN_URL` names one; see
    /// [`build_with_env`](Self::build_with_env). It should not follow redirects by itself.
    ///
    /// `B` is the body that it takes, as for [`TokenEndpoint::new`].
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
        R: Body<Data: Send, Error: Into<BoxError> + Send> + Send + 'static,
    {
        self.token_client = Some(TokenClient::new(client));
        self
    }

    /// The token endpoint that JWTs come from: what [`SELAM_TOKEN_URL`](env::SELAM_TOKEN_URL) names otherwise. For
    /// [`build_with_env`](Self::build_with_env), which tells as whom it is asked.
    pub fn with_token_url(mut self, url: impl Into<String>) -> Self {
        self.token_url = Some(TokenUrl(url.into()));
        self
    }

    /// Where the API lives; by default [`BaseUrl::DEFAULT`].
    pub fn with_base_url(mut self, base_url: BaseUrl) -> Self {
        self.base_url = Some(base_url);
        self
    }

    /// Where credentials may go; by default to the base URL's origin alone.
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

    /// Lets `SELAM_BASE_URL` be plain `http` to a loopback address or `localhost`, for tests.
    pub fn allow_insecure_loopback(mut self) -> Self {
        self.allow_insecure_loopback = true;
        self
    }

    /// The layer, of what was given.
    ///
    /// # Errors
    ///
    /// When no key was given, or the base URL's origin is not among the allowed ones.
    pub fn build(self) -> Result<SelamLayer, ConfigError> {
        let Some(key) = self.api_key else {
            return Err(ConfigError::new(Subject::ApiKey, Place::Argument, ConfigErrorKind::Missing));
        };
        let base_url = self.base_url.unwrap_or_default();
        let origins = self.origins.unwrap_or_else(|| base_url.origins());
        if !origins.contains(base_url.origin()) {
            return Err(ConfigError::new(Subject::BaseUrl, Place::Argument, ConfigErrorKind::NotAllowed));
        }
        let policy = Policy {
            provider: match self.jwt {
                Some(jwt) => LayerCredentials::new(Form::Pair, Some(key), Some(jwt)),
                None => LayerCredentials::new(Form::Bearer, Some(key), None),
            },
            origins,
            if_not_present: self.if_not_present,
            require_request_auth: self.require_request_auth,
        };
        Ok(SelamLayer::new(policy, self.errors, base_url))
    }

    /// The layer, of what was given and, for what was not, the environment:
    ///
    /// - the key from [`SELAM_API_KEY`], or from the file that [`SELAM_API_KEY_FILE`] names;
    /// - the JWT, which may be missing, from [`SELAM_JWT`], from the file that [`SELAM_JWT_FILE`] names, or from the
    ///   OAuth 2.0 token endpoint at [`SELAM_TOKEN_URL`], asked through the client that
    ///   [`with_token_client`](Self::with_token_client) gave: as [`SELAM_CLIENT_ID`] with [`SELAM_CLIENT_SECRET`]
    ///   where they are set, else with the key as the bearer;
    /// - [`SELAM_BASE_URL`], which may be missing.
    ///
    /// A file is read now, and again when it is replaced: see [`FileSource`]. The endpoint is asked for the first JWT
    /// when a request needs it: see [`OAuthSource::client_credentials`].
    ///
    /// # Errors
    ///
    /// When there is no key, a variable or file that is read holds something invalid, or two variables that stand for
    /// the same are set; the error names it.
    ///
    /// [`SELAM_API_KEY`]: env::SELAM_API_KEY
    /// [`SELAM_API_KEY_FILE`]: env::SELAM_API_KEY_FILE
    /// [`SELAM_JWT`]: env::SELAM_JWT
    /// [`SELAM_JWT_FILE`]: env::SELAM_JWT_FILE
    /// [`SELAM_TOKEN_URL`]: env::SELAM_TOKEN_URL
    /// [`SELAM_CLIENT_ID`]: env::SELAM_CLIENT_ID
    /// [`SELAM_CLIENT_SECRET`]: env::SELAM_CLIENT_SECRET
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
            self.jwt = Some(self.ask_token_endpoint(&key)?.into());
        }
        if self.jwt.is_none() {
            self.jwt = match one_of::<Token>(&[env::SELAM_JWT, env::SELAM_JWT_FILE, env::SELAM_TOKEN_URL])? {
                Some(env::SELAM_JWT_FILE) => Some(from_file::<Token>(env::SELAM_JWT_FILE)?.into()),
                Some(env::SELAM_TOKEN_URL) => Some(self.ask_token_endpoint(&key)?.into()),
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

    /// JWTs from the endpoint that was given, or else the one that the environment names.
    fn ask_token_endpoint(&self, key: &Provider<ApiKey>) -> Result<Refreshing<Token>, ConfigError> {
        let place = match self.token_url {
            Some(_) => Place::Argument,
            None => Place::EnvVar(env::SELAM_TOKEN_URL.to_owned()),
        };
        let Some(client) = self.token_client.clone() else {
            return Err(ConfigError::new(Subject::TokenUrl, place, ConfigErrorKind::NeedsClient));
        };
        let url = match &self.token_url {
            Some(TokenUrl(url)) => url.clone(),
            None => read(Subject::TokenUrl, env::SELAM_TOKEN_URL)?,
        };
        let endpoint = TokenEndpoint::over(client, &url, place, self.allow_insecure_loopback)?;
        let is_set = |name| std::env::var_os(name).is_some();
        let auth = if is_set(env::SELAM_CLIENT_ID) || is_set(env::SELAM_CLIENT_SECRET) {
            let id = read(Subject::ClientId, env::SELAM_CLIENT_ID)?;
            let secret = read(Subject::ClientSecret, env::SELAM_CLIENT_SECRET)?;
            let places =
                [env::SELAM_CLIENT_ID, env::SELAM_CLIENT_SECRET].map(|name| Place::EnvVar(name.to_owned()));
            ClientAuth::found(id, secret, &places)?
        } else {
            ClientAuth::api_key(key.clone())
        };
        let source = OAuthSource::client_credentials(endpoint.with_client_auth(auth));
        Ok(Refreshing::new(source))
    }
}

/// Its query may hold a secret.
#[derive(Clone)]
struct TokenUrl(String);

impl fmt::Debug for TokenUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenUrl([redacted])")
    }
}

/// Which of these variables is set: they stand for the same.
fn one_of<C: Credential>(names: &[&'static str]) -> Result<Option<&'static str>, ConfigError> {
    let mut set = names.iter().copied().filter(|name| std::env::var_os(name).is_some());
    let (first, second) = (set.next(), set.next());
    match (first, second) {
        (Some(first), Some(other)) => {
            Err(C::refuse(Place::EnvVar(first.to_owned()), ConfigErrorKind::GivenTwice { other }))
        }
        _ => Ok(first),
    }
}

/// The credential in the file that the variable `named_by` names.
fn from_file<C: Credential>(named_by: &'static str) -> Result<Provider<C>, ConfigError> {
    let path = std::env::var_os(named_by).unwrap_or_default();
    if path.is_empty() {
        return Err(C::refuse(Place::EnvVar(named_by.to_owned()), ConfigErrorKind::Empty));
    }
    let source = FileSource::new(path);
    // A file that is no good is better known now.
    source.read()?;
    Ok(Provider::Refreshing(Refreshing::new(source)))
}

fn read(subject: Subject, name: &str) -> Result<String, ConfigError> {
    env::var(name).map_err(|kind| ConfigError::new(subject, Place::EnvVar(name.to_owned()), kind))
}
