use std::sync::Arc;

use http::{HeaderMap, Request, header::AUTHORIZATION};

use crate::{
    ApiKey, AuthError, AuthErrorKind, Credentials, Jwts, MaybeRenewing, Origins, RequestAuth, Subject,
    credentials::Form,
    event,
    origin::Admission,
    plan::{Head, Plan, Rules, X_API_KEY},
    supply::{Need, Supplied, Supplies, Supply, Waiting},
};

const ONE_FOR_ALL: &str = "the request names a `Subject`, and this layer has the same credentials for all";

/// What is written, and when.
#[derive(Clone, Debug)]
pub(crate) struct Policy {
    pub(crate) provider: Provider,
    pub(crate) origins: Origins,
    pub(crate) if_absent: bool,
    pub(crate) require_choice: bool,
}

/// Where the credentials come from.
#[derive(Clone, Debug)]
pub(crate) enum Provider {
    /// Every request brings its own.
    Nothing,
    Fixed(Credentials),
    Renewing(Arc<Supply>),
    PerSubject(Arc<Supplies>),
}

/// What became of a request.
pub(super) enum Authorized {
    /// It may be sent, with these credentials.
    Now(Option<Credentials>),
    /// It may be sent once there are credentials.
    Later(Waiting),
}

impl Provider {
    /// Of a key and a JWT, one of which may be missing.
    pub(crate) fn new(
        form: Form,
        as_header: bool,
        key: Option<MaybeRenewing<ApiKey>>,
        jwt: Option<Jwts>,
    ) -> Self {
        event::key_given(key.as_ref());
        let jwt = match jwt {
            Some(Jwts::PerSubject(tokens)) => return Self::PerSubject(Supplies::new(form, key, tokens)),
            Some(Jwts::Shared(jwt)) => Some(jwt),
            None => None,
        };
        let supply = Supply::new(form, as_header, key, jwt);
        match supply.fixed() {
            Some(credentials) => Self::Fixed(credentials),
            None => Self::Renewing(supply),
        }
    }

    pub(crate) fn renews(&self) -> bool {
        matches!(self, Self::Renewing(_) | Self::PerSubject(_))
    }
}

impl Policy {
    pub(super) fn new(provider: Provider) -> Self {
        Self { provider, origins: Origins::selam(), if_absent: false, require_choice: false }
    }

    #[inline]
    pub(super) fn authorize<B>(&self, request: &mut Request<B>) -> Result<Authorized, AuthError> {
        match &self.provider {
            Provider::Nothing => self.write(request, None).map(Authorized::Now),
            Provider::Fixed(credentials) => {
                self.refuse_subject(request, credentials.form())?;
                self.write(request, Some(credentials)).map(Authorized::Now)
            }
            Provider::Renewing(supply) => {
                self.refuse_subject(request, supply.form())?;
                self.authorize_from(supply, request)
            }
            Provider::PerSubject(supplies) => self.authorize_subject(supplies, request),
        }
    }

    #[inline]
    fn authorize_from<B>(&self, supply: &Supply, request: &mut Request<B>) -> Result<Authorized, AuthError> {
        let Some(need) = self.need(request) else {
            // Its own, or none: ours are not sent, but must not leave with it either.
            return self.write(request, supply.last().as_ref()).map(Authorized::Now);
        };
        match supply.fresh(need) {
            Some(credentials) => self.write(request, Some(&credentials)).map(Authorized::Now),
            None => self.authorize_stale(supply, need, request),
        }
    }

    fn authorize_subject<B>(
        &self,
        supplies: &Supplies,
        request: &mut Request<B>,
    ) -> Result<Authorized, AuthError> {
        let subject = request.extensions().get::<Subject>();
        let Some(need) = self.need(request) else {
            return self.write(request, supplies.last(subject).as_ref()).map(Authorized::Now);
        };
        let supply = match supplies.find(need, subject)? {
            Some(supply) => supply,
            // Nobody is remembered for a request that is refused or goes without.
            None if self.origins.admit(request.uri(), request.headers())? == Admission::Scrub => {
                return self.write(request, supplies.last(subject).as_ref()).map(Authorized::Now);
            }
            None => supplies.of(need, subject)?,
        };
        self.authorize_from(&supply, request)
    }

    /// After waiting: with what there is by now.
    pub(super) fn authorize_later<B>(
        &self,
        request: &mut Request<B>,
        credentials: &Credentials,
    ) -> Result<Option<Credentials>, AuthError> {
        let need = self.need(request);
        let fresh = need.and_then(|need| match &self.provider {
            Provider::Renewing(supply) => supply.fresh(need),
            Provider::PerSubject(supplies) => {
                supplies.find(need, request.extensions().get()).ok()??.fresh(need)
            }
            Provider::Nothing | Provider::Fixed(_) => None,
        });
        self.write(request, Some(fresh.as_ref().unwrap_or(credentials)))
    }

    /// A JWT that is the same for all is not what a request wants that names a user.
    #[inline]
    fn refuse_subject<B>(&self, request: &Request<B>, form: Form) -> Result<(), AuthError> {
        // The half with the key leaves that to the layer beside it.
        if request.extensions().is_empty() || form == Form::KeyHalf {
            return Ok(());
        }
        let names = request.extensions().get::<Subject>().is_some();
        if names && self.need(request) == Some(Need::All) {
            return Err(AuthError::local(AuthErrorKind::CredentialUnavailable, ONE_FOR_ALL));
        }
        Ok(())
    }

    #[cold]
    fn authorize_stale<B>(
        &self,
        supply: &Supply,
        need: Need,
        request: &mut Request<B>,
    ) -> Result<Authorized, AuthError> {
        // What is refused, or goes without, has nothing to wait for.
        if self.origins.admit(request.uri(), request.headers())? == Admission::Scrub {
            return self.write(request, supply.last().as_ref()).map(Authorized::Now);
        }
        if self.if_absent && brings(request.headers(), supply.form()) {
            return Ok(Authorized::Now(None));
        }
        if let Provider::PerSubject(supplies) = &self.provider {
            supplies.sweep();
        }
        match supply.demand(need)? {
            Supplied::Ready(credentials) => self.write(request, Some(&credentials)).map(Authorized::Now),
            Supplied::Wait(waiting) => Ok(Authorized::Later(waiting)),
        }
    }

    /// What the request needs of ours.
    #[inline]
    fn need<B>(&self, request: &Request<B>) -> Option<Need> {
        match request.extensions().get::<RequestAuth>() {
            None if self.require_choice => None,
            None | Some(RequestAuth::ApiKeyAndJwt | RequestAuth::VoiceAgent) => Some(Need::All),
            Some(RequestAuth::ApiKey) => Some(Need::KeyAlone),
            Some(RequestAuth::Anonymous | RequestAuth::Own(_)) => None,
        }
    }

    #[inline]
    fn write<B>(
        &self,
        request: &mut Request<B>,
        credentials: Option<&Credentials>,
    ) -> Result<Option<Credentials>, AuthError> {
        let Self { if_absent, require_choice, .. } = *self;
        let rules = Rules { credentials, origins: &self.origins, if_absent, require_choice };
        let head = Head {
            method: Some(request.method()),
            uri: request.uri(),
            headers: request.headers(),
            extensions: request.extensions(),
        };
        let plan = Plan::new(rules, head)?;
        plan.apply(request.headers_mut())?;
        let (uri, credentials) = plan.into_parts();
        if let Some(uri) = uri {
            *request.uri_mut() = *uri;
        }
        Ok(credentials)
    }
}

/// Whether a request came with credentials in a header that would be written.
fn brings(headers: &HeaderMap, form: Form) -> bool {
    let authorization = form != Form::KeyHalf && headers.contains_key(AUTHORIZATION);
    authorization || (form != Form::JwtHalf && headers.contains_key(&X_API_KEY))
}
