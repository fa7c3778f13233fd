//! One exchange with the token endpoint, replayed once if the endpoint rejects the client's credentials.

use std::{
    borrow::Cow,
    hash::{DefaultHasher, Hash, Hasher},
};

use bytes::Bytes;
use form_urlencoded::{Serializer, byte_serialize};
use http::{
    HeaderValue, Method, Request,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, USER_AGENT},
};
use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

use super::{
    OAuthError, RefreshToken, TokenEndpoint, TokenType,
    auth::Proven,
    response::{self, Granted},
    subject_tokens::Presented,
};
use crate::{
    credential::{Fingerprint, Token},
    source::SourceError,
};

/// What to request, where, and as whom.
#[derive(Clone)]
pub(super) struct Exchange {
    pub(super) endpoint: TokenEndpoint,
    pub(super) grant_type: &'static str,
    pub(super) tokens: Vec<GrantToken>,
    /// Further form parameters. The values may be secrets, such as a password.
    pub(super) parameters: Vec<(Cow<'static, str>, SecretString)>,
}

/// A token that every request of a grant carries.
#[derive(Clone)]
pub(super) struct GrantToken {
    pub(super) provider: Presented,
    /// The form parameter that carries the token.
    pub(super) name: &'static str,
    /// The form parameter that states its type.
    pub(super) kind: Option<(&'static str, TokenType)>,
}

/// The credentials of a request, as of when it is sent.
struct Sent<'a> {
    refresh_token: Option<&'a RefreshToken>,
    client: Proven,
    tokens: Vec<Token>,
}

impl Exchange {
    /// Requests a token. If the endpoint rejects a credential that is refreshing, refreshes it and, if that brings
    /// another, replays the request.
    pub(super) async fn run(&self, refresh_token: Option<&RefreshToken>) -> Result<Granted, SourceError> {
        let sent = self.credentials(refresh_token).await?;
        let result = self.send(&sent, None).await;
        if let Err(error) = &result
            && let Some(error) = OAuthError::of(error)
            && self.refresh_rejected(&sent, error).await
        {
            let replayed = self.send(&self.credentials(refresh_token).await?, Some(1)).await;
            if replayed.is_ok() {
                self.endpoint.auth.accepted_after(&sent.client);
                for (token, sent) in self.tokens.iter().zip(&sent.tokens) {
                    token.provider.accepted_after(sent);
                }
            }
            return replayed;
        }
        result
    }

    /// Combines the versions of all credentials into one, which changes when any of them does.
    pub(super) fn version(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.endpoint.auth.version().hash(&mut hasher);
        self.tokens.iter().for_each(|token| token.provider.version().hash(&mut hasher));
        hasher.finish()
    }

    /// Says what is requested, where, and as which client. The same request says the same in every process and version.
    pub(super) fn identity(&self) -> String {
        let uri = &self.endpoint.uri;
        let query = uri.query().map(hashed).unwrap_or_default();
        let mut identity = vec![
            ("endpoint", format!("{}?{query}", self.endpoint.audience())),
            ("grant_type", self.grant_type.to_owned()),
        ];
        identity.extend(self.endpoint.auth.identity().map(|(name, value)| (name, value.to_owned())));
        let kinds = self.tokens.iter().filter_map(|token| token.kind.as_ref());
        identity.extend(kinds.map(|(name, kind)| (*name, kind.uri().to_owned())));
        identity.extend(self.parameters.iter().map(|(name, value)| {
            let value = value.expose_secret();
            (&**name, if may_be_secret(name) { hashed(value) } else { value.to_owned() })
        }));
        identity.sort_unstable();
        Serializer::new(String::new()).extend_pairs(identity).finish()
    }

    async fn send(&self, sent: &Sent<'_>, resends: Option<u64>) -> Result<Granted, SourceError> {
        let response = self.endpoint.client.send(self.request(sent), resends).await?;
        let secrets = self.secrets(sent);
        Ok(response::read(&response, secrets.iter().map(|secret| &***secret))?)
    }

    /// Obtains the current credentials for a request, refreshing them if necessary.
    async fn credentials<'a>(
        &self,
        refresh_token: Option<&'a RefreshToken>,
    ) -> Result<Sent<'a>, SourceError> {
        let mut tokens = Vec::new();
        for token in &self.tokens {
            tokens.push(token.provider.obtain().await?);
        }
        // Last, so that an assertion is not older than necessary.
        let client = self.endpoint.auth.prove(|| self.endpoint.audience()).await?;
        Ok(Sent { refresh_token, client, tokens })
    }

    /// Refreshes the credentials that `error` blames. Returns whether that brought a different one.
    async fn refresh_rejected(&self, sent: &Sent<'_>, error: &OAuthError) -> bool {
        let mut changed = false;
        if error.blames_client() {
            changed |= self.endpoint.auth.replace(&sent.client).await;
        }
        // An exchange is answered `invalid_request` if it is malformed or a token invalid (RFC 8693 section 2.2.2).
        let is_exchange = self.tokens.iter().any(|token| token.kind.is_some());
        if error.blames_grant() || (is_exchange && error.code() == Some("invalid_request")) {
            for (token, sent) in self.tokens.iter().zip(&sent.tokens) {
                changed |= token.provider.replace(sent).await;
            }
        }
        changed
    }

    fn request(&self, sent: &Sent<'_>) -> Request<Bytes> {
        let mut request = Request::new(encode(&self.form(sent)));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.endpoint.uri.clone();
        let headers = request.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"));
        headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
        headers.extend(self.endpoint.user_agent.clone().map(|value| (USER_AGENT, value)));
        headers.extend(self.endpoint.auth.authorization(&sent.client).map(|value| (AUTHORIZATION, value)));
        request
    }

    fn form<'a>(&'a self, sent: &'a Sent<'_>) -> Vec<(&'a str, &'a str)> {
        let mut form = vec![("grant_type", self.grant_type)];
        form.extend(sent.refresh_token.map(|token| ("refresh_token", token.expose_secret())));
        for (token, sent) in self.tokens.iter().zip(&sent.tokens) {
            form.push((token.name, sent.expose_secret()));
            form.extend(token.kind.as_ref().map(|(name, kind)| (*name, kind.uri())));
        }
        form.extend(self.parameters.iter().map(|(name, value)| (&**name, value.expose_secret())));
        form.extend(self.endpoint.auth.parameters(&sent.client));
        form
    }

    /// Returns the secrets of the request in every form in which it carries them, to be masked in errors.
    fn secrets(&self, sent: &Sent<'_>) -> Vec<Zeroizing<String>> {
        let tokens = sent.tokens.iter().map(Token::expose_secret);
        let parameters = self.parameters.iter().filter(|(name, _)| may_be_secret(name));
        let raw = (sent.client.secret().into_iter())
            .chain(tokens)
            .chain(sent.refresh_token.map(RefreshToken::expose_secret))
            .chain(parameters.map(|(_, value)| value.expose_secret()));
        let basic = self.endpoint.auth.authorization(&sent.client);
        let basic = basic.and_then(|value| Some(value.to_str().ok()?.strip_prefix("Basic ")?.to_owned()));
        raw.flat_map(|secret| [secret.to_owned(), byte_serialize(secret.as_bytes()).collect()])
            .chain(basic)
            .map(Zeroizing::new)
            .collect()
    }
}

/// Whether a parameter may hold a secret. These three do not.
fn may_be_secret(name: &str) -> bool {
    !matches!(name, "scope" | "audience" | "resource")
}

fn hashed(secret: &str) -> String {
    format!("{:016x}", Fingerprint::of(secret.as_bytes()).number())
}

/// Encodes the form into a buffer that is wiped on drop.
fn encode(form: &[(&str, &str)]) -> Bytes {
    // Sized up front: a buffer that grows leaves unwiped copies behind.
    let capacity = form.iter().map(|(name, value)| 3 * (name.len() + value.len()) + "&=".len()).sum();
    let mut encoder = Serializer::new(String::with_capacity(capacity));
    encoder.extend_pairs(form);
    Bytes::from_owner(Zeroizing::new(encoder.finish().into_bytes()))
}
