//! What one request gets: decided from its URI, headers and extensions, then written into its headers.
//!
//! Every way of sending credentials comes through here, the layers as well as [`Credentials::apply`].

use http::{
    Extensions, HeaderMap, HeaderName, HeaderValue, Uri,
    header::{AUTHORIZATION, CONNECTION, REFERER},
};

use crate::{
    credentials::{Credentials, Form, RequestAuth, Slot},
    error::{AuthError, AuthErrorKind},
    handshake,
    origin::{Admission, Origins},
};

pub(crate) static X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");

const NO_CHOICE: &str = "the request has no `RequestAuth` extension, and this layer requires one";
const NO_OWN: &str = "the request asks for the layer's own credentials, and it has none";
const NO_JWT: &str = "the request asks for a JWT beside the key, and there is none";

#[derive(Debug)]
pub(crate) struct Plan {
    action: Action,
    credentials: Option<Credentials>,
    /// Instead of the request's own, where credentials go into it or come out of it.
    uri: Option<Box<Uri>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    /// Write the credentials into the headers.
    Write,
    /// They went into the query; take both headers off.
    Query,
    /// Nothing of ours may go along; take both headers off.
    Scrub,
    /// The request stays as it is.
    Leave,
}

impl Plan {
    /// `own` are the layer's credentials; `None` when each request has to choose.
    #[inline]
    pub(crate) fn new(
        own: Option<&Credentials>,
        origins: &Origins,
        uri: &Uri,
        headers: &HeaderMap,
        extensions: &Extensions,
    ) -> Result<Self, AuthError> {
        match extensions.get::<RequestAuth>() {
            None => Self::of(own.ok_or_else(|| unavailable(NO_CHOICE))?, origins, uri),
            Some(choice) => Self::chosen(choice, own, origins, uri, headers),
        }
    }

    #[inline]
    fn of(credentials: &Credentials, origins: &Origins, uri: &Uri) -> Result<Self, AuthError> {
        let credentials = credentials.clone();
        match origins.admit(uri)? {
            Admission::Write => Ok(Self { action: Action::Write, credentials: Some(credentials), uri: None }),
            Admission::Scrub => {
                let uri = handshake::without_secrets(uri, &credentials).map(Box::new);
                Ok(Self { action: Action::Scrub, credentials: Some(credentials), uri })
            }
        }
    }

    fn chosen(
        choice: &RequestAuth,
        own: Option<&Credentials>,
        origins: &Origins,
        uri: &Uri,
        headers: &HeaderMap,
    ) -> Result<Self, AuthError> {
        let own = own.ok_or_else(|| unavailable(NO_OWN));
        match choice {
            RequestAuth::Anonymous => Ok(Self { action: Action::Scrub, credentials: None, uri: None }),
            RequestAuth::Own(credentials) => Self::of(credentials, origins, uri),
            RequestAuth::ApiKey => match own?.key_alone() {
                Some(key) => Self::of(key, origins, uri),
                // The layer beside this one has the key.
                None => Ok(Self { action: Action::Leave, credentials: None, uri: None }),
            },
            RequestAuth::ApiKeyAndJwt => Self::of(with_jwt(own?)?, origins, uri),
            RequestAuth::VoiceAgent => {
                let credentials = with_jwt(own?)?;
                let plan = Self::of(credentials, origins, uri)?;
                if plan.action != Action::Write {
                    return Ok(plan);
                }
                let uri = handshake::with_query(uri, headers, credentials)?;
                Ok(Self { action: Action::Query, uri: Some(Box::new(uri)), ..plan })
            }
        }
    }

    /// Leaves a request as it is that came with credentials in a header that would be written.
    pub(crate) fn unless_present(self, headers: &HeaderMap) -> Self {
        let present = match self.credentials.as_ref().map(Credentials::form) {
            Some(Form::JwtHalf) => headers.contains_key(AUTHORIZATION),
            Some(Form::KeyHalf) => headers.contains_key(&X_API_KEY),
            _ => headers.contains_key(AUTHORIZATION) || headers.contains_key(&X_API_KEY),
        };
        match self.action {
            Action::Write if present => Self { action: Action::Leave, credentials: None, uri: None },
            _ => self,
        }
    }

    #[inline]
    pub(crate) fn apply(&self, headers: &mut HeaderMap) -> Result<(), AuthError> {
        match (self.action, &self.credentials) {
            (Action::Write, Some(credentials)) => write(headers, credentials),
            (Action::Leave, _) => Ok(()),
            (_, credentials) => {
                scrub(headers, credentials.as_ref());
                Ok(())
            }
        }
    }

    /// The URI to send the request to, where it is another than the request came with, and the credentials
    /// that go along.
    #[inline]
    pub(crate) fn into_parts(self) -> (Option<Box<Uri>>, Option<Credentials>) {
        let sent = matches!(self.action, Action::Write | Action::Query);
        (self.uri, self.credentials.filter(|_| sent))
    }
}

fn with_jwt(credentials: &Credentials) -> Result<&Credentials, AuthError> {
    match credentials.form() {
        Form::Key => Err(unavailable(NO_JWT)),
        Form::Pair | Form::KeyHalf | Form::JwtHalf => Ok(credentials),
    }
}

#[cold]
fn unavailable(detail: &'static str) -> AuthError {
    AuthError::local(AuthErrorKind::CredentialUnavailable, detail)
}

#[inline]
fn write(headers: &mut HeaderMap, credentials: &Credentials) -> Result<(), AuthError> {
    put(headers, &AUTHORIZATION, credentials.authorization())?;
    put(headers, &X_API_KEY, credentials.x_api_key())?;
    if headers.contains_key(CONNECTION) {
        keep_from_connection(headers);
    }
    Ok(())
}

#[inline]
fn put(headers: &mut HeaderMap, name: &HeaderName, slot: &Slot) -> Result<(), AuthError> {
    match slot {
        Slot::Write(value) => {
            // `insert` would panic on a full map.
            let inserted = headers.try_insert(name, value.clone());
            inserted.map_err(|_| {
                AuthError::local(AuthErrorKind::InvalidRequest, "the request has too many headers")
            })?;
        }
        Slot::Remove => {
            headers.remove(name);
        }
        Slot::Leave => {}
    }
    Ok(())
}

fn scrub(headers: &mut HeaderMap, credentials: Option<&Credentials>) {
    headers.remove(AUTHORIZATION);
    headers.remove(&X_API_KEY);
    let leaks = |referer: &HeaderValue| {
        let referer = Uri::try_from(referer.as_bytes()).ok();
        referer.zip(credentials).is_some_and(|(uri, set)| handshake::without_secrets(&uri, set).is_some())
    };
    if headers.get(REFERER).is_some_and(leaks) {
        headers.remove(REFERER);
    }
}

/// Takes our headers out of `Connection`: whoever forwards the request would drop what it names
/// ([RFC 9110 section 7.6.1](https://www.rfc-editor.org/rfc/rfc9110#section-7.6.1)).
#[cold]
fn keep_from_connection(headers: &mut HeaderMap) {
    fn is_ours(option: &[u8]) -> bool {
        let option = option.trim_ascii();
        option.eq_ignore_ascii_case(AUTHORIZATION.as_str().as_bytes())
            || option.eq_ignore_ascii_case(X_API_KEY.as_str().as_bytes())
    }
    let options = |value: &HeaderValue| value.as_bytes().split(|byte| *byte == b',').any(is_ours);
    if !headers.get_all(CONNECTION).iter().any(options) {
        return;
    }
    let kept: Vec<&[u8]> = headers
        .get_all(CONNECTION)
        .iter()
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
        .filter(|option| !is_ours(option) && !option.trim_ascii().is_empty())
        .map(<[u8]>::trim_ascii)
        .collect();
    let kept = kept.join(&b", "[..]);
    match HeaderValue::from_bytes(&kept) {
        Ok(kept) if !kept.is_empty() => {
            headers.insert(CONNECTION, kept);
        }
        _ => {
            headers.remove(CONNECTION);
        }
    }
}
