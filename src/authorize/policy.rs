use std::{
    sync::Arc,
    task::{Context, Poll},
};

use http::{Extensions, HeaderMap, Request, header::AUTHORIZATION};

use crate::{
    ApiKey, AuthError, AuthErrorKind, Credentials, JwtProvider, Origins, Provider, RequestAuth, Subject,
    authorize::headers::{Head, Plan, Rules, X_API_KEY, write_usual},
    authorize::provider::{Found, Need, Supplied, Supplies, Supply, Waiting, Whose},
    credential::{Copies, Form},
    origin::Admission,
    telemetry::event,
    util::clock::Time,
};

const ONE_FOR_ALL: &str = "the request names a `Subject`, and this layer has the same credentials for all";

/// What is written, and when.
#[derive(Clone, Debug)]
pub(crate) struct Policy {
    pub(crate) provider: LayerCredentials,
    pub(crate) origins: Origins,
    pub(crate) if_not_present: bool,
    pub(crate) require_request_auth: bool,
}

/// Where the credentials come from.
#[derive(Clone, Debug)]
pub(crate) enum LayerCredentials {
    /// Every request brings its own.
    Nothing,
    Fixed(Copies),
    Refreshing(Arc<Supply>),
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

impl LayerCredentials {
    /// Of a key and a JWT, one of which may be missing.
    pub(crate) fn new(form: Form, key: Option<Provider<ApiKey>>, jwt: Option<JwtProvider>) -> Self {
        event::key_given(key.as_ref());
        let jwt = match jwt {
            Some(JwtProvider::PerSubject(tokens)) => {
                return Self::PerSubject(Supplies::new(form, key, tokens));
            }
            Some(JwtProvider::Shared(jwt)) => Some(jwt),
            None => None,
        };
        let supply = Supply::new(form, key, jwt);
        match supply.fixed() {
            Some(credentials) => Self::Fixed(Copies::of(credentials)),
            None => Self::Refreshing(supply),
        }
    }

    fn supply(&self) -> Option<&Supply> {
        match self {
            Self::Refreshing(supply) => Some(supply),
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
    pub(super) fn new(provider: LayerCredentials) -> Self {
        Self { provider, origins: Origins::selam(), if_not_present: false, require_request_auth: false }
    }

    /// The usual request: with the credentials that are at hand, to an origin spelled as usual, and nothing in it that
    /// asks for anything else. What was written; `None` where it is another, or they are not at hand.
    ///
    /// A function of its own, with all that it calls for such a request in it: it needs fewer registers so than as a part of
    /// its caller, and leaves that small.
    #[inline(never)]
    pub(crate) fn authorize_usual<B>(&self, request: &mut Request<B>) -> Option<Credentials> {
        let extensions = request.extensions();
        if self.require_request_auth || (!extensions.is_empty() && chooses(extensions)) {
            return None;
        }
        if !self.origins.spell(request.uri()) {
            return None;
        }
        // Not matched: a table to jump by costs more than two comparisons.
        let credentials = if let LayerCredentials::Fixed(credentials) = &self.provider {
            credentials.local().clone()
        } else if let LayerCredentials::Refreshing(supply) = &self.provider {
            supply.fresh_for_all(Need::All)?
        } else {
            return None;
        };
        write_usual(request.headers_mut(), &credentials, self.if_not_present).then_some(credentials)
    }

    /// Writes credentials into any request that may be sent: which, if any. Out of line, so that who asks for the usual first
    /// stays small.
    #[inline(never)]
    pub(crate) fn authorize_any<B>(&self, request: &mut Request<B>) -> Result<Option<Credentials>, Unsent> {
        match &self.provider {
            LayerCredentials::Nothing => self.write(request, None).map_err(Unsent::Refused),
            LayerCredentials::Fixed(credentials) => {
                let credentials = credentials.local();
                self.refuse_subject(request, credentials.form())?;
                self.write(request, Some(credentials)).map_err(Unsent::Refused)
            }
            LayerCredentials::Refreshing(supply) => {
                self.refuse_subject(request, supply.form())?;
                match self.need(request) {
                    Some(need) => self.authorize_from(supply, need, &Whose::Everybodys, None, request),
                    None => self.write_none(request),
                }
            }
            LayerCredentials::PerSubject(supplies) => self.authorize_subject(supplies, request),
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
            None => supplies.of(subject)?,
        };
        self.authorize_from(supplies.supply(), need, &whose, now, request)
    }

    /// Its own credentials, or none: ours are not sent, but must not leave with it either.
    fn write_none<B>(&self, request: &mut Request<B>) -> Result<Option<Credentials>, Unsent> {
        let last = match &self.provider {
            LayerCredentials::Refreshing(supply) => supply.last(),
            LayerCredentials::PerSubject(supplies) => supplies.last(request.extensions().get()),
            LayerCredentials::Nothing | LayerCredentials::Fixed(_) => None,
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
            LayerCredentials::Refreshing(supply) => supply.fresh_for_all(need),
            LayerCredentials::PerSubject(supplies) => {
                let Found { whose, now } = supplies.find(need, request.extensions().get()).ok()??;
                supplies.supply().fresh(need, &whose, now)
            }
            LayerCredentials::Nothing | LayerCredentials::Fixed(_) => None,
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
        if self.if_not_present && brings(request.headers(), supply.form()) {
            return Ok(None);
        }
        if let LayerCredentials::PerSubject(supplies) = &self.provider {
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
            None if self.require_request_auth => None,
            None | Some(RequestAuth::ApiKeyAndJwt | RequestAuth::VoiceAgent) => Some(Need::All),
            Some(RequestAuth::ApiKey) => Some(Need::KeyAlone),
            Some(RequestAuth::Anonymous | RequestAuth::Custom(_)) => None,
        }
    }

    fn write<B>(
        &self,
        request: &mut Request<B>,
        credentials: Option<&Credentials>,
    ) -> Result<Option<Credentials>, AuthError> {
        let Self { if_not_present, require_request_auth, .. } = *self;
        let former = self.provider.supply().map(Supply::former);
        let rules =
            Rules { credentials, origins: &self.origins, if_not_present, require_request_auth, former };
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

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::{collection::vec, prelude::*, sample::select};

    use super::*;
    use crate::Token;

    const URIS: [&str; 12] = [
        "https://api.selamgpt.com/v1/models",
        "https://API.selamgpt.com/v1/models",
        "https://api.selamgpt.com:443/v1/models",
        "https://api.selamgpt.com./v1/models",
        "https://api.selamgpt.com:8443/v1/models",
        "https://api.selamgpt.com@evil.com/v1/models",
        "https://evil.com/v1/models",
        "http://api.selamgpt.com/v1/models",
        "wss://api.selamgpt.com/v1/models",
        "https://gateway.example:8443/v1/models",
        "/v1/models",
        "api.selamgpt.com:443",
    ];

    fn policy(form: Option<Form>, origins: usize) -> Policy {
        let (key, jwt) = (ApiKey::new("sk-selam-example").unwrap(), Token::new("a.b.c").unwrap());
        let credentials = |form| match form {
            Form::Bearer | Form::Header | Form::KeyHalf => Credentials::new(form, Some(key), None),
            Form::Pair => Credentials::new(form, Some(key), Some(jwt)),
            Form::JwtHalf => Credentials::new(form, None, Some(jwt)),
        };
        let provider = form
            .map_or(LayerCredentials::Nothing, |form| LayerCredentials::Fixed(Copies::of(credentials(form))));
        let gateway = "https://gateway.example:8443";
        let origins = match origins {
            0 => Origins::selam(),
            1 => Origins::selam().strip_for_other_origins(),
            2 => Origins::new(gateway).unwrap(),
            3 => Origins::new(gateway).unwrap().with_origin("https://api.selamgpt.com").unwrap(),
            _ => Origins::selam().with_relative_uri_origin("https://api.selamgpt.com").unwrap(),
        };
        Policy { origins, ..Policy::new(provider) }
    }

    /// What becomes of a request.
    #[derive(Debug, PartialEq)]
    struct Outcome {
        /// What of it was ours.
        written: Result<Vec<String>, String>,
        uri: String,
        headers: Vec<(String, Vec<u8>, bool)>,
    }

    impl Outcome {
        fn of(result: Result<Option<Credentials>, Unsent>, request: &Request<()>) -> Self {
            let exposed = |credentials: Credentials| -> Vec<_> {
                credentials.secrets().map(|secret| secret.expose().to_owned()).collect()
            };
            let written = match result {
                Ok(credentials) => Ok(credentials.map(exposed).unwrap_or_default()),
                Err(Unsent::Refused(error)) => Err(format!("{:?} {error}", error.kind())),
                Err(Unsent::Waits(_)) => Err("it waits".to_owned()),
            };
            let headers = request.headers().iter();
            let headers = headers
                .map(|(name, value)| (name.to_string(), value.as_bytes().to_vec(), value.is_sensitive()));
            Self { written, uri: request.uri().to_string(), headers: headers.collect() }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn h3_h4_o2_the_usual_way_comes_to_what_the_long_one_does(
            form in select(vec![
                None,
                Some(Form::Bearer),
                Some(Form::Header),
                Some(Form::Pair),
                Some(Form::KeyHalf),
                Some(Form::JwtHalf),
            ]),
            // The usual ones most of the time, or else hardly any request would be.
            origins in prop_oneof![3 => Just(0_usize), 1 => 1..5_usize],
            uri in prop_oneof![3 => Just(URIS[0]), 1 => select(&URIS[..])],
            names in vec(
                select(vec!["accept", "authorization", "x-api-key", "host", "connection", "x-other"]), 0..4
            ),
            sensitive in any::<bool>(),
            choice in prop_oneof![3 => Just(0), 1 => 1..6],
            if_not_present in any::<bool>(),
            require_request_auth in prop::bool::weighted(0.1),
        ) {
            let policy = Policy { if_not_present, require_request_auth, ..policy(form, origins) };
            let request = || {
                let mut request = Request::builder().uri(uri).body(()).unwrap();
                for name in &names {
                    let mut value = HeaderValue::from_static("api.selamgpt.com");
                    value.set_sensitive(sensitive);
                    request.headers_mut().append(*name, value);
                }
                let extensions = request.extensions_mut();
                match choice {
                    1 => _ = extensions.insert(RequestAuth::ApiKey),
                    2 => _ = extensions.insert(RequestAuth::ApiKeyAndJwt),
                    3 => _ = extensions.insert(RequestAuth::Anonymous),
                    4 => _ = extensions.insert(Subject::new("user-7")),
                    5 => _ = extensions.insert(7_u8),
                    _ => {}
                }
                request
            };
            let (mut usual, mut long) = (request(), request());
            let by_usual = match policy.authorize_usual(&mut usual) {
                Some(credentials) => Ok(Some(credentials)),
                None => policy.authorize_any(&mut usual),
            };
            let by_long = policy.authorize_any(&mut long);
            prop_assert_eq!(Outcome::of(by_usual, &usual), Outcome::of(by_long, &long));
        }
    }
}
