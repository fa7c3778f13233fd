use std::time::Duration;

use super::SelamLayer;
use crate::{
    ApiKey, AuthErrorLayer, BaseUrl, ConfigError, ConfigErrorKind, MaybeRenewing, Origins, Renewing, Token,
    authorize::{Policy, Provider},
    credentials::Form,
    env,
    error::{Place, Subject},
    secret::Credential,
    source::FileSource,
};

/// Builds a [`SelamLayer`].
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct SelamLayerBuilder {
    api_key: Option<MaybeRenewing<ApiKey>>,
    jwt: Option<MaybeRenewing<Token>>,
    base_url: Option<BaseUrl>,
    origins: Option<Origins>,
    errors: AuthErrorLayer,
    if_absent: bool,
    require_choice: bool,
    allow_insecure_loopback: bool,
}

impl SelamLayerBuilder {
    /// The key. Required.
    pub fn with_api_key(mut self, key: impl Into<MaybeRenewing<ApiKey>>) -> Self {
        self.api_key = Some(key.into());
        self
    }

    /// A JWT to send with the key on every request; by default the key goes alone.
    pub fn with_jwt(mut self, jwt: impl Into<MaybeRenewing<Token>>) -> Self {
        self.jwt = Some(jwt.into());
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

    /// See [`ApiKeyLayer::if_absent`](crate::ApiKeyLayer::if_absent).
    pub fn if_absent(mut self) -> Self {
        self.if_absent = true;
        self
    }

    /// See [`ApiKeyLayer::require_choice`](crate::ApiKeyLayer::require_choice).
    pub fn require_choice(mut self) -> Self {
        self.require_choice = true;
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
                Some(jwt) => Provider::new(Form::Pair, false, Some(key), Some(jwt)),
                None => Provider::new(Form::Key, false, Some(key), None),
            },
            origins,
            if_absent: self.if_absent,
            require_choice: self.require_choice,
        };
        Ok(SelamLayer::new(policy, self.errors, base_url))
    }

    /// The layer, of what was given and, for what was not, the environment:
    ///
    /// - the key from [`SELAM_API_KEY`], or from the file that [`SELAM_API_KEY_FILE`] names;
    /// - the JWT, which may be missing, from [`SELAM_JWT`], or from the file that [`SELAM_JWT_FILE`] names;
    /// - [`SELAM_BASE_URL`], which may be missing.
    ///
    /// A file is read now, and again when it is replaced: see [`FileSource`].
    ///
    /// # Errors
    ///
    /// When there is no key, a variable or file that is read holds something invalid, or both variables of a
    /// pair are set; the error names it.
    ///
    /// [`SELAM_API_KEY`]: env::SELAM_API_KEY
    /// [`SELAM_API_KEY_FILE`]: env::SELAM_API_KEY_FILE
    /// [`SELAM_JWT`]: env::SELAM_JWT
    /// [`SELAM_JWT_FILE`]: env::SELAM_JWT_FILE
    /// [`SELAM_BASE_URL`]: env::SELAM_BASE_URL
    pub fn build_with_env(mut self) -> Result<SelamLayer, ConfigError> {
        if self.api_key.is_none() {
            let from_file = from_file(env::SELAM_API_KEY, env::SELAM_API_KEY_FILE)?;
            self.api_key = Some(match from_file {
                Some(key) => key,
                None => ApiKey::from_env()?.into(),
            });
        }
        if self.jwt.is_none() {
            self.jwt = match from_file(env::SELAM_JWT, env::SELAM_JWT_FILE)? {
                None if std::env::var_os(env::SELAM_JWT).is_some() => Some(Token::from_env()?.into()),
                from_file => from_file,
            };
        }
        if self.base_url.is_none() {
            self.base_url = Some(BaseUrl::read_env(self.allow_insecure_loopback)?);
        }
        self.build()
    }
}

/// The credential in the file that the variable `named_by` names, if it does.
fn from_file<C: Credential>(variable: &str, named_by: &str) -> Result<Option<MaybeRenewing<C>>, ConfigError> {
    let Some(path) = std::env::var_os(named_by) else { return Ok(None) };
    if std::env::var_os(variable).is_some() {
        return Err(C::refuse(Place::EnvVar(variable.to_owned()), ConfigErrorKind::GivenTwice));
    }
    if path.is_empty() {
        return Err(C::refuse(Place::EnvVar(named_by.to_owned()), ConfigErrorKind::Empty));
    }
    let source = FileSource::new(path);
    // A file that is no good is better known now.
    source.read()?;
    Ok(Some(MaybeRenewing::Renewing(Renewing::new(source))))
}
