//! What is written into a request, and how a request may choose it.

use std::{
    fmt,
    sync::{Arc, OnceLock},
};

use http::{Extensions, HeaderMap, HeaderValue, Uri, request::Parts};

use crate::{
    ApiKey, Origins, Token,
    authorize::headers::{Head, Plan, Rules},
    authorize::provider::Provenance,
    credential::Secret,
    error::AuthError,
    util::per_thread::Shards,
    util::sync::ArcSwapOption,
};

/// One consistent set of credentials and the headers it goes into. Cheap to clone; `Debug` shows ids alone.
///
/// The layers write it by themselves; [`apply`](Self::apply) does the same by hand, where there is no Tower
/// stack: in a proxy's request filter, or for a WebSocket handshake.
///
/// ```
/// use http::Request;
/// use tower_selam::{ApiKey, Credentials, Origins, Token};
///
/// let credentials = Credentials::key_and_jwt(ApiKey::new("sk-selam-example")?, Token::new("a.b.c")?);
/// let (mut parts, body) =
///     Request::get("https://api.selamgpt.com/v1/models").body(()).unwrap().into_parts();
/// credentials.apply(&Origins::selam(), &mut parts).unwrap();
///
/// assert_eq!(parts.headers["authorization"], "Bearer a.b.c");
/// assert_eq!(parts.headers["x-api-key"], "sk-selam-example");
/// # Ok::<(), tower_selam::ConfigError>(())
/// ```
#[derive(Clone)]
pub struct Credentials(Arc<Set>);

/// Of each user there may be one: what is in it is small.
struct Set {
    /// What goes into `Authorization`.
    bearer: Option<Bearer>,
    /// What goes into `X-API-Key`.
    api_key: Option<ApiKey>,
    takes_off: TakesOff,
    /// For requests that want the key without the JWT. A [`Supply`](crate::authorize::provider::Supply) has such sets beside the others.
    key_alone: Option<Credentials>,
    /// Where it came from, if another can come from there.
    provenance: Option<Provenance>,
}

enum Bearer {
    Key(ApiKey),
    Jwt(Token),
}

/// Which set it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// The key alone, as a bearer.
    Bearer,
    /// The key alone, in its own header.
    Header,
    /// JWT and key.
    Pair,
    /// The key, beside a layer that has the JWT.
    KeyHalf,
    /// The JWT, beside a layer that has the key.
    JwtHalf,
}

/// What is written.
pub(crate) struct Values<'a> {
    pub(crate) authorization: Option<&'a HeaderValue>,
    pub(crate) x_api_key: Option<&'a HeaderValue>,
    pub(crate) takes_off: TakesOff,
}

/// Of these headers, whether it is taken off where nothing goes into it; the other layer of the pair writes it else.
#[derive(Clone, Copy)]
pub(crate) struct TakesOff {
    pub(crate) authorization: bool,
    pub(crate) x_api_key: bool,
}

impl TakesOff {
    const NOTHING: Self = Self { authorization: false, x_api_key: false };
    const AUTHORIZATION: Self = Self { authorization: true, ..Self::NOTHING };
    const X_API_KEY: Self = Self { x_api_key: true, ..Self::NOTHING };
}

/// What becomes of a header.
#[derive(Clone, Copy)]
pub(crate) enum Slot<'a> {
    Write(&'a HeaderValue),
    Remove,
    /// The other layer of the pair writes it.
    Yield,
}

impl Credentials {
    /// The key as `Authorization: Bearer <key>`, without `X-API-Key`: what most operations need.
    #[must_use]
    pub fn bearer(key: ApiKey) -> Self {
        Self::new(Form::Bearer, Some(key), None)
    }

    /// The key as `X-API-Key`, without `Authorization`.
    #[must_use]
    pub fn x_api_key(key: ApiKey) -> Self {
        Self::new(Form::Header, Some(key), None)
    }

    /// The JWT as `Authorization: Bearer <jwt>` and the key as `X-API-Key`.
    #[must_use]
    pub fn key_and_jwt(key: ApiKey, jwt: Token) -> Self {
        Self::new(Form::Pair, Some(key), Some(jwt))
    }

    pub(crate) fn jwt_beside_key(jwt: Token) -> Self {
        Self::new(Form::JwtHalf, None, Some(jwt))
    }

    /// Stands in for the JWT's half where only the layer beside it is wanted.
    pub(crate) fn beside() -> Self {
        Self::new(Form::JwtHalf, None, None)
    }

    pub(crate) fn new(form: Form, api_key: Option<ApiKey>, jwt: Option<Token>) -> Self {
        let key_alone = match form {
            Form::Pair | Form::KeyHalf => api_key.clone().map(Self::bearer),
            Form::Bearer | Form::Header | Form::JwtHalf => None,
        };
        Self::of(form, api_key, jwt, key_alone, None)
    }

    /// Made of what comes from there.
    pub(crate) fn supplied(
        form: Form,
        api_key: Option<ApiKey>,
        jwt: Option<Token>,
        from: Provenance,
    ) -> Self {
        Self::of(form, api_key, jwt, None, Some(from))
    }

    fn of(
        form: Form,
        api_key: Option<ApiKey>,
        jwt: Option<Token>,
        key_alone: Option<Self>,
        provenance: Option<Provenance>,
    ) -> Self {
        let (bearer, api_key, takes_off) = match form {
            Form::Bearer => (api_key.map(Bearer::Key), None, TakesOff::X_API_KEY),
            Form::Header => (None, api_key, TakesOff::AUTHORIZATION),
            Form::Pair => (jwt.map(Bearer::Jwt), api_key, TakesOff::NOTHING),
            Form::KeyHalf => (None, api_key, TakesOff::NOTHING),
            Form::JwtHalf => (jwt.map(Bearer::Jwt), None, TakesOff::NOTHING),
        };
        let this = Self(Arc::new(Set { bearer, api_key, takes_off, key_alone, provenance }));
        debug_assert!(this.form() == form, "{form:?} of other parts");
        this
    }

    /// A copy that shares nothing which is counted when it is sent.
    fn apart(&self) -> Self {
        let Set { bearer, api_key, takes_off, key_alone, provenance } = &*self.0;
        Self(Arc::new(Set {
            bearer: bearer.as_ref().map(Bearer::apart),
            api_key: api_key.as_ref().map(|key| ApiKey(key.0.apart())),
            takes_off: *takes_off,
            key_alone: key_alone.as_ref().map(Self::apart),
            provenance: provenance.clone(),
        }))
    }

    pub(crate) fn provenance(&self) -> Option<&Provenance> {
        self.0.provenance.as_ref()
    }

    /// The key, where there is one.
    #[must_use]
    pub fn api_key(&self) -> Option<&ApiKey> {
        match &self.0.bearer {
            Some(Bearer::Key(key)) => Some(key),
            _ => self.0.api_key.as_ref(),
        }
    }

    /// The JWT, where there is one.
    #[must_use]
    pub fn jwt(&self) -> Option<&Token> {
        match &self.0.bearer {
            Some(Bearer::Jwt(jwt)) => Some(jwt),
            _ => None,
        }
    }

    /// Writes the credentials into `parts`, if they may go to its URI; its [`RequestAuth`] is obeyed.
    ///
    /// Headers that the request came with are replaced. With [`Origins::strip_for_other_origins`], a request to another
    /// origin is stripped instead.
    ///
    /// # Errors
    ///
    /// When the origin is not allowed, or the request asks for a credential that is not in this set. Then the
    /// request must not be sent.
    pub fn apply(&self, origins: &Origins, parts: &mut Parts) -> Result<(), AuthError> {
        let Parts { method, uri, headers, extensions, .. } = &*parts;
        let plan = Plan::new(self.rules(origins), Head { method: Some(method), uri, headers, extensions })?;
        plan.apply(&mut parts.headers)?;
        if let (Some(uri), _) = plan.into_parts() {
            parts.uri = *uri;
        }
        Ok(())
    }

    /// Writes the credentials into `headers` of a request to `uri`, for clients with request types of their
    /// own.
    ///
    /// # Errors
    ///
    /// As [`apply`](Self::apply). With [`Origins::strip_for_other_origins`], credentials of ours in `uri` itself are
    /// not taken off.
    pub fn apply_to_headers(
        &self,
        origins: &Origins,
        uri: &Uri,
        headers: &mut HeaderMap,
    ) -> Result<(), AuthError> {
        let head = Head { method: None, uri, headers, extensions: &Extensions::new() };
        Plan::new(self.rules(origins), head)?.apply(headers)
    }

    fn rules<'a>(&'a self, origins: &'a Origins) -> Rules<'a> {
        Rules {
            credentials: Some(self),
            origins,
            if_not_present: false,
            require_request_auth: false,
            former: None,
        }
    }

    pub(crate) fn form(&self) -> Form {
        let Set { bearer, api_key, takes_off, .. } = &*self.0;
        match (bearer, api_key, takes_off) {
            (Some(Bearer::Key(_)), ..) => Form::Bearer,
            (Some(Bearer::Jwt(_)), Some(_), _) => Form::Pair,
            (None, Some(_), TakesOff { authorization: true, .. }) => Form::Header,
            (None, Some(_), TakesOff { authorization: false, .. }) => Form::KeyHalf,
            (_, None, _) => Form::JwtHalf,
        }
    }

    /// What is written into `Authorization` and `X-API-Key`.
    #[inline]
    pub(crate) fn values(&self) -> Values<'_> {
        let Set { bearer, api_key, takes_off, .. } = &*self.0;
        Values {
            authorization: bearer.as_ref().map(|bearer| bearer.secret().bearer()),
            x_api_key: api_key.as_ref().map(|key| key.0.bare()),
            takes_off: *takes_off,
        }
    }

    /// What becomes of `Authorization` and of `X-API-Key`.
    pub(crate) fn slots(&self) -> [Slot<'_>; 2] {
        let Values { authorization, x_api_key, takes_off } = self.values();
        let slot = |value: Option<_>, takes_off| {
            value.map_or(if takes_off { Slot::Remove } else { Slot::Yield }, Slot::Write)
        };
        [slot(authorization, takes_off.authorization), slot(x_api_key, takes_off.x_api_key)]
    }

    /// The set without its JWT; `None` when there is no key in it.
    pub(crate) fn key_alone(&self) -> Option<&Self> {
        match self.form() {
            Form::Bearer | Form::Header => Some(self),
            _ => self.0.key_alone.as_ref(),
        }
    }

    /// What two layers beside each other sent together.
    pub(crate) fn joined(self, other: &Self) -> Self {
        match (self.api_key().or(other.api_key()), self.jwt().or(other.jwt())) {
            (Some(key), Some(jwt)) => Self::key_and_jwt(key.clone(), jwt.clone()),
            _ => self,
        }
    }

    /// Every secret in the set.
    pub(crate) fn secrets(&self) -> impl Iterator<Item = &Secret> {
        let key = self.api_key().map(|key| &key.0);
        key.into_iter().chain(self.jwt().map(|jwt| &jwt.secret))
    }
}

impl Bearer {
    #[inline]
    fn secret(&self) -> &Secret {
        match self {
            Self::Key(key) => &key.0,
            Self::Jwt(jwt) => &jwt.secret,
        }
    }

    fn apart(&self) -> Self {
        match self {
            Self::Key(key) => Self::Key(ApiKey(key.0.apart())),
            Self::Jwt(jwt) => Self::Jwt(Token { secret: jwt.secret.apart() }),
        }
    }
}

/// A set of which each of a few threads has a copy, so that they do not wait for one another's reference counts. A thread
/// makes its own when it first needs it.
#[derive(Clone, Debug)]
pub(crate) struct Copies {
    set: Credentials,
    copies: Shards<OnceLock<Credentials>>,
}

impl Copies {
    /// The present thread is going to need its own.
    pub(crate) fn of(set: Credentials) -> Self {
        let this = Self { set, copies: Shards::new(OnceLock::new) };
        let _ = this.local();
        this
    }

    /// The present thread's.
    #[inline]
    pub(crate) fn local(&self) -> &Credentials {
        let own = self.copies.local();
        match own.get() {
            Some(copy) => copy,
            None => self.fill(own),
        }
    }

    #[cold]
    fn fill<'a>(&self, own: &'a OnceLock<Credentials>) -> &'a Credentials {
        // Where threads share one, none waits until another has made it.
        let copy = self.set.apart();
        own.get_or_init(|| copy)
    }
}

/// Keeps one set for all threads, where requests find it without a lock.
pub(crate) struct Kept(ArcSwapOption<Set>);

impl Kept {
    pub(crate) fn nothing() -> Self {
        Self(ArcSwapOption::empty())
    }

    pub(crate) fn store(&self, credentials: Option<Credentials>) {
        self.0.store(credentials.map(|credentials| credentials.0));
    }

    /// Forgets the set if it is such a one.
    pub(crate) fn forget_if(&self, such: impl FnOnce(&Credentials) -> bool) {
        let set = self.0.load();
        if set.as_ref().is_some_and(|set| such(&Credentials(Arc::clone(set)))) {
            self.store(None);
        }
    }

    /// The set that there is, if it is still of use.
    #[inline]
    pub(crate) fn load(&self, is_of_use: impl FnOnce(&Provenance) -> bool) -> Option<Credentials> {
        let set = self.0.load();
        let set = set.as_ref().filter(|set| set.provenance.as_ref().is_some_and(is_of_use))?;
        Some(Credentials(Arc::clone(set)))
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_tuple("Credentials");
        if let Some(key) = self.api_key() {
            debug.field(key);
        }
        if let Some(jwt) = self.jwt() {
            debug.field(jwt);
        }
        debug.finish()
    }
}

/// A request's own choice of credentials, put into its extensions.
///
/// It holds for that request alone. A layer outside that follows redirects may lose it, and the request
/// that follows would get the layer's own credentials: where the choice matters, build the layers with
/// [`require_request_auth`](crate::ApiKeyLayer::require_request_auth), so that a request without one is refused.
/// (tower-http's `FollowRedirect` keeps it within an origin, and drops it between origins for good.)
///
/// ```
/// use http::Request;
/// use tower_selam::RequestAuth;
///
/// let request = Request::get("https://api.selamgpt.com/v1/models")
///     .extension(RequestAuth::ApiKey)
///     .body(())
///     .unwrap();
/// # assert!(matches!(request.extensions().get(), Some(RequestAuth::ApiKey)));
/// ```
///
/// The voice agent's handshake, by hand, for a WebSocket client that takes a request:
///
/// ```
/// use http::Request;
/// use tower_selam::{ApiKey, Credentials, Origins, RequestAuth, Token};
///
/// let credentials = Credentials::key_and_jwt(ApiKey::new("sk-selam-example")?, Token::new("a.b.c")?);
/// let (mut parts, ()) = Request::get("wss://api.selamgpt.com/v1/audio/agent?voice=mekdes")
///     .header("connection", "Upgrade")
///     .header("upgrade", "websocket")
///     .extension(RequestAuth::VoiceAgent)
///     .body(())
///     .unwrap()
///     .into_parts();
/// credentials.apply(&Origins::selam(), &mut parts).unwrap();
/// assert_eq!(parts.uri.query(), Some("voice=mekdes&token=a.b.c&api_key=sk-selam-example"));
/// # Ok::<(), tower_selam::ConfigError>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum RequestAuth {
    /// The key alone.
    ApiKey,
    /// JWT and key; refused by a layer that has no JWT, nor stands beside one that has.
    ApiKeyAndJwt,
    /// No credentials: those that the request came with are taken off. It may go anywhere.
    Anonymous,
    /// Credentials of its own: another tenant's, say. (Its own handshake with the voice agent is made by
    /// [`Credentials::apply`].)
    Custom(Credentials),
    /// JWT and key as query parameters, for the WebSocket handshake of the voice agent; refused on any
    /// request that is no such handshake.
    ///
    /// The request's URI then holds secrets: do not log it further in.
    VoiceAgent,
}
