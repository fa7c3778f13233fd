use std::{
    sync::Arc,
    task::{Context, Poll},
};

use http::{Extensions, HeaderMap, Request, header::AUTHORIZATION};

use crate::{
    ApiKey, AuthError, AuthErrorKind, Credentials, Jwts, MaybeRenewing, Origins, RequestAuth, Subject,
    clock::Time,
    credentials::{Copies, Form},
    event,
    origin::Admission,
    plan::{Head, Plan, Rules, X_API_KEY, write_usual},
    supply::{Found, Need, Supplied, Supplies, Supply, Waiting, Whose},
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
    Fixed(Copies),
    Renewing(Arc<Supply>),
    PerSubject(Arc<Supplies>),
}

/// Why a request is not sent, not yet or not at all.
pub(crate) enum Unsent {
    /// It may be sent once there are credentials.
    Waits(Waiting),
    Refused(AuthError),
}

impl From<AuthError> for Unsent {
    fn from(error: AuthError) -> Self {
        Self::Refused(error)
    }
}

impl Provider {
    /// Of a key and a JWT, one of which may be missing.
    pub(crate) fn new(form: Form, key: Option<MaybeRenewing<ApiKey>>, jwt: Option<Jwts>) -> Self {
        event::key_given(key.as_ref());
        let jwt = match jwt {
            Some(Jwts::PerSubject(tokens)) => return Self::PerSubject(Supplies::new(form, key, tokens)),
            Some(Jwts::Shared(jwt)) => Some(jwt),
            None => None,
        };
        let supply = Supply::new(form, key, jwt);
        match supply.fixed() {
            Some(credentials) => Self::Fixed(Copies::of(credentials)),
            None => Self::Renewing(supply),
        }
    }

    fn supply(&self) -> Option<&Supply> {
        match self {
            Self::Renewing(supply) => Some(supply),
            Self::PerSubject(supplies) => Some(supplies.supply()),
            Self::Nothing | Self::Fixed(_) => None,
        }
    }

    pub(crate) fn renews(&self) -> bool {
        self.supply().is_some()
    }
}

/// Whether a request asks for anything in particular. Out of line, as most have no extensions.
#[inline(never)]
fn chooses(extensions: &Extensions) -> bool {
    extensions.get::<RequestAuth>().is_some() || extensions.get::<Subject>().is_some()
}

impl Policy {
    pub(super) fn new(provider: Provider) -> Self {
        Self { provider, origins: Origins::selam(), if_absent: false, require_choice: false }
    }

    /// The usual request: with the credentials that are at hand, to an origin spelled as usual, and nothing in it that
    /// asks for anything else. What was written; `None` where it is another, or they are not at hand.
    ///
    /// A function of its own, with all that it calls for such a request in it: it needs fewer registers so than as a part of
    /// its caller, and leaves that small.
    #[inline(never)]
    pub(crate) fn authorize_usual<B>(&self, request: &mut Request<B>) -> Option<Credentials> {
        let extensions = request.extensions();
        if self.require_choice || (!extensions.is_empty() && chooses(extensions)) {
            return None;
        }
        if !self.origins.spell(request.uri()) {
            return None;
        }
        // Not matched: a table to jump by costs more than two comparisons.
        let credentials = if let Provider::Fixed(credentials) = &self.provider {
            credentials.local().clone()
        } else if let Provider::Renewing(supply) = &self.provider {
            supply.fresh_for_all(Need::All)?
        } else {
            return None;
        };
        write_usual(request.headers_mut(), &credentials, self.if_absent).then_some(credentials)
    }

    /// Writes credentials into any request that may be sent: which, if any. Out of line, so that who asks for the usual first
    /// stays small.
    #[inline(never)]
    pub(crate) fn authorize_any<B>(&self, request: &mut Request<B>) -> Result<Option<Credentials>, Unsent> {
        match &self.provider {
            Provider::Nothing => self.write(request, None).map_err(Unsent::Refused),
            Provider::Fixed(credentials) => {
                let credentials = credentials.local();
                self.refuse_subject(request, credentials.form())?;
                self.write(request, Some(credentials)).map_err(Unsent::Refused)
            }
            Provider::Renewing(supply) => {
                self.refuse_subject(request, supply.form())?;
                match self.need(request) {
                    Some(need) => self.authorize_from(supply, need, &Whose::Everybodys, None, request),
                    None => self.write_none(request),
                }
            }
            Provider::PerSubject(supplies) => self.authorize_subject(supplies, request),
        }
    }

    fn authorize_from<B>(
        &self,
        supply: &Supply,
        need: Need,
        whose: &Whose,
        now: Option<Time>,
        request: &mut Request<B>,
    ) -> Result<Option<Credentials>, Unsent> {
        match supply.fresh(need, whose, now) {
            Some(credentials) => self.write(request, Some(&credentials)).map_err(Unsent::Refused),
            None => self.authorize_stale(supply, need, whose, request),
        }
    }

    fn authorize_subject<B>(
        &self,
        supplies: &Supplies,
        request: &mut Request<B>,
    ) -> Result<Option<Credentials>, Unsent> {
        let Some(need) = self.need(request) else { return self.write_none(request) };
        let subject = request.extensions().get::<Subject>();
        let Found { whose, now } = match supplies.find(need, subject)? {
            Some(found) => found,
            // Nobody is remembered for a request that is refused or goes without.
            None if self.origins.admit(request.uri(), request.headers())? == Admission::Scrub => {
                return self.write_none(request);
            }
            None => supplies.of(need, subject)?,
        };
        self.authorize_from(supplies.supply(), need, &whose, now, request)
    }

    /// Its own credentials, or none: ours are not sent, but must not leave with it either.
    fn write_none<B>(&self, request: &mut Request<B>) -> Result<Option<Credentials>, Unsent> {
        let last = match &self.provider {
            Provider::Renewing(supply) => supply.last(),
            Provider::PerSubject(supplies) => supplies.last(request.extensions().get()),
            Provider::Nothing | Provider::Fixed(_) => None,
        };
        self.write(request, last.as_ref()).map_err(Unsent::Refused)
    }

    /// Waits for credentials.
    pub(super) fn poll(
        &self,
        waiting: &mut Waiting,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Credentials, AuthError>> {
        match self.provider.supply() {
            Some(supply) => waiting.poll(supply, cx),
            None => Poll::Pending,
        }
    }

    /// After waiting: with what there is by now.
    pub(super) fn authorize_later<B>(
        &self,
        request: &mut Request<B>,
        credentials: &Credentials,
    ) -> Result<Option<Credentials>, AuthError> {
        let need = self.need(request);
        let fresh = need.and_then(|need| match &self.provider {
            Provider::Renewing(supply) => supply.fresh_for_all(need),
            Provider::PerSubject(supplies) => {
                let Found { whose, now } = supplies.find(need, request.extensions().get()).ok()??;
                supplies.supply().fresh(need, &whose, now)
            }
            Provider::Nothing | Provider::Fixed(_) => None,
        });
        self.write(request, Some(fresh.as_ref().unwrap_or(credentials)))
    }

    /// A JWT that is the same for all is not what a request wants that names a user.
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
        whose: &Whose,
        request: &mut Request<B>,
    ) -> Result<Option<Credentials>, Unsent> {
        // What is refused, or goes without, has nothing to wait for.
        if self.origins.admit(request.uri(), request.headers())? == Admission::Scrub {
            return self.write_none(request);
        }
        if self.if_absent && brings(request.headers(), supply.form()) {
            return Ok(None);
        }
        if let Provider::PerSubject(supplies) = &self.provider {
            supplies.sweep();
        }
        match supply.demand(need, whose)? {
            Supplied::Ready(credentials) => self.write(request, Some(&credentials)).map_err(Unsent::Refused),
            Supplied::Wait(waiting) => Err(Unsent::Waits(waiting)),
        }
    }

    /// What the request needs of ours.
    fn need<B>(&self, request: &Request<B>) -> Option<Need> {
        match request.extensions().get::<RequestAuth>() {
            None if self.require_choice => None,
            None | Some(RequestAuth::ApiKeyAndJwt | RequestAuth::VoiceAgent) => Some(Need::All),
            Some(RequestAuth::ApiKey) => Some(Need::KeyAlone),
            Some(RequestAuth::Anonymous | RequestAuth::Own(_)) => None,
        }
    }

    fn write<B>(
        &self,
        request: &mut Request<B>,
        credentials: Option<&Credentials>,
    ) -> Result<Option<Credentials>, AuthError> {
        let Self { if_absent, require_choice, .. } = *self;
        let former = self.provider.supply().map(Supply::former);
        let rules = Rules { credentials, origins: &self.origins, if_absent, require_choice, former };
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
