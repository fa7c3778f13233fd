//! The one decision: what a request gets.

use std::sync::Arc;

use http::{Method, Request};

use super::{
    headers::{HeaderPlan, Owner},
    provider::{CredentialProvider, Lookup, PendingCredentials, Scope, unavailable},
    sent::Sent,
    strip, voice_agent,
};
use crate::{AuthError, AuthErrorKind, Credentials, Origins, RequestAuth, Subject, origin::Admission};

const NO_CREDENTIALS: &str = "this layer requires `RequestAuth::Custom` on every request";
const NO_JWT: &str = "the request asks for a JWT in addition to the key, and this layer has none";
const NO_REQUEST_AUTH: &str = "the request has no `RequestAuth` extension, and this layer requires one";
const OTHER_HEADER: &str = "the request's credentials go into a header that this layer does not own";

/// What a layer writes, and where to.
#[derive(Clone, Debug)]
pub(crate) struct Policy {
    pub(crate) owner: Owner,
    pub(crate) provider: Arc<CredentialProvider>,
    pub(crate) settings: Settings,
}

/// What users configure.
#[derive(Clone, Debug, Default)]
pub(crate) struct Settings {
    pub(crate) origins: Origins,
    pub(crate) if_not_present: bool,
    pub(crate) require_request_auth: bool,
}

/// What to do with a request.
pub(super) enum Decision {
    /// Send it. It carries these credentials, if any.
    Send(Sent),
    /// Decide again after a refresh.
    Wait(Box<PendingCredentials>),
}

impl Policy {
    /// Decides what `request` gets and writes it.
    ///
    /// # Errors
    ///
    /// When the request may not be sent. It carries no credential of this layer then.
    #[inline]
    pub(super) fn authorize<B>(&self, request: &mut Request<B>) -> Result<Decision, AuthError> {
        let Settings { origins, if_not_present, require_request_auth } = &self.settings;
        let choice = request.extensions().get::<RequestAuth>();
        if matches!(choice, Some(RequestAuth::Anonymous))
            || origins.admit(request.uri(), request.headers())? == Admission::Strip
        {
            self.strip(request)?;
            return Ok(Decision::Send(Sent::default()));
        }
        if never_carries_credentials(request.method()) {
            return Err(refused_method(request.method()));
        }
        let (scope, subject) = match choice {
            None if *require_request_auth => return Err(unavailable(NO_REQUEST_AUTH)),
            None if *if_not_present && self.owner.is_present(request.headers()) => {
                return Ok(Decision::Send(Sent::default()));
            }
            Some(RequestAuth::Custom(credentials)) => {
                let credentials = credentials.clone();
                return self.write_custom(request, &credentials);
            }
            Some(RequestAuth::ApiKey) => (Scope::KeyOnly, None),
            Some(RequestAuth::ApiKeyAndJwt | RequestAuth::VoiceAgent) if !self.may_send_jwt() => {
                return Err(unavailable(NO_JWT));
            }
            _ => (Scope::All, request.extensions().get::<Subject>()),
        };
        if self.provider.is_empty() {
            return Err(unavailable(NO_CREDENTIALS));
        }
        if self.owner.owns_authorization() {
            self.provider.refuse_subject(subject)?;
        }
        let sent = match self.provider.lookup(scope, subject)? {
            Lookup::Ready(sent) => sent,
            Lookup::Wait(pending) => return Ok(Decision::Wait(pending)),
        };
        if matches!(choice, Some(RequestAuth::VoiceAgent)) {
            let uri = voice_agent::with_query(request, &sent)?;
            let secrets = self.provider.secrets(subject);
            strip::remove_headers(request.headers_mut(), self.owner, &secrets);
            *request.uri_mut() = uri;
        } else {
            HeaderPlan::new(self.owner, &sent).write(request.headers_mut())?;
        }
        Ok(Decision::Send(sent))
    }

    /// Whether a JWT may be sent by this layer, or by the one that owns the other header.
    fn may_send_jwt(&self) -> bool {
        match self.owner {
            Owner::KeyAsBearer => false,
            Owner::KeyAsXApiKey => true,
            Owner::Jwt | Owner::Both => self.provider.has_jwt(),
        }
    }

    #[cold]
    fn write_custom<B>(
        &self,
        request: &mut Request<B>,
        credentials: &Credentials,
    ) -> Result<Decision, AuthError> {
        let is_sendable = match self.owner {
            Owner::KeyAsBearer => credentials.x_api_key_value().is_none(),
            Owner::KeyAsXApiKey => credentials.x_api_key_value().is_some(),
            Owner::Jwt | Owner::Both => true,
        };
        if !is_sendable {
            return Err(unavailable(OTHER_HEADER));
        }
        HeaderPlan::custom(self.owner, credentials).write(request.headers_mut())?;
        let sent = Sent::from(credentials);
        Ok(Decision::Send(match self.owner {
            Owner::Jwt if sent.jwt.is_some() => Sent { api_key: None, ..sent },
            Owner::KeyAsXApiKey => Sent { jwt: None, ..sent },
            _ => sent,
        }))
    }

    /// Strips this layer's credentials from a request to an origin that is not allowed.
    #[cold]
    fn strip<B>(&self, request: &mut Request<B>) -> Result<(), AuthError> {
        let extensions = request.extensions();
        let mut secrets = self.provider.secrets(extensions.get());
        if let Some(RequestAuth::Custom(credentials)) = extensions.get() {
            let jwt = credentials.jwt().map(|jwt| jwt.0.clone());
            secrets.extend_current(jwt.into_iter().chain([credentials.api_key().0.clone()]));
        }
        if let Some(uri) = secrets.uri_without(request.uri())? {
            *request.uri_mut() = uri;
        }
        strip::remove_headers(request.headers_mut(), self.owner, &secrets);
        Ok(())
    }
}

/// Whether the method is TRACE or CONNECT, in any case, since some servers ignore it, or TRACK, which some treat as TRACE.
pub(super) fn never_carries_credentials(method: &Method) -> bool {
    matches!(method.as_str().len(), 5 | 7)
        && ["TRACE", "TRACK", "CONNECT"].iter().any(|name| method.as_str().eq_ignore_ascii_case(name))
}

/// RFC 9110 section 9.3.8 forbids credentials in a TRACE request, which a server echoes; CONNECT is a request to a proxy
/// and not to the origin (section 9.3.6).
#[cold]
fn refused_method(method: &Method) -> AuthError {
    let detail = format!("credentials are not sent with the method {method}");
    AuthError::local(AuthErrorKind::InvalidRequest, detail)
}
