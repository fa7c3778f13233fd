//! One exchange with the token endpoint: builds the request, sends it, and sends it again with refreshed
//! credentials if the endpoint rejected the first ones.

use std::borrow::Cow;

use bytes::Bytes;
use form_urlencoded::{Serializer, byte_serialize};
use http::{
    HeaderValue, Method, Request,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE},
};
use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

use super::{
    OAuthError, RefreshToken, TokenEndpoint,
    grant::GrantToken,
    response::{self, Granted},
};
use crate::{
    credential::{ApiKey, Credential, Token},
    error::AuthErrorKind,
    refresh::Provider,
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

/// The credentials of a request that a provider supplied.
struct Sent {
    key: Option<ApiKey>,
    tokens: Vec<Token>,
}

impl Exchange {
    /// Requests a token. If the endpoint rejects a credential that is refreshing, refreshes it and, if that brings
    /// another, sends the request once more.
    pub(super) async fn run(&self, refresh_token: Option<&RefreshToken>) -> Result<Granted, SourceError> {
        let sent = self.credentials().await?;
        let result = self.send(&sent, refresh_token).await;
        if let Err(error) = &result
            && let Some(error) = OAuthError::of(error)
            && self.refresh_rejected(&sent, error).await
        {
            return self.send(&self.credentials().await?, refresh_token).await;
        }
        result
    }

    /// Combines the versions of all credentials into one, which changes when any of them does.
    pub(super) fn version(&self) -> u64 {
        let key = self.endpoint.auth.key().and_then(Provider::version);
        self.tokens.iter().map(|token| token.provider.version()).fold(mix(0, key), mix)
    }

    async fn send(&self, sent: &Sent, refresh_token: Option<&RefreshToken>) -> Result<Granted, SourceError> {
        let response = self.endpoint.client.send(self.request(sent, refresh_token)).await?;
        let secrets = self.secrets(sent, refresh_token);
        Ok(response::read(&response, secrets.iter().map(|secret| &***secret))?)
    }

    /// Obtains the current credentials for a request, refreshing them if necessary.
    async fn credentials(&self) -> Result<Sent, SourceError> {
        let key = match self.endpoint.auth.key() {
            Some(key) => Some(obtain(key).await?),
            None => None,
        };
        let mut tokens = Vec::new();
        for token in &self.tokens {
            tokens.push(obtain(&token.provider).await?);
        }
        Ok(Sent { key, tokens })
    }

    /// Refreshes the credentials that `error` blames. Returns whether that brought a different one.
    async fn refresh_rejected(&self, sent: &Sent, error: &OAuthError) -> bool {
        let mut changed = false;
        if error.blames_client()
            && let (Some(provider), Some(key)) = (self.endpoint.auth.key(), &sent.key)
        {
            changed |= provider.replace(key).await;
        }
        if error.blames_grant() {
            for (token, sent) in self.tokens.iter().zip(&sent.tokens) {
                changed |= token.provider.replace(sent).await;
            }
        }
        changed
    }

    fn request(&self, sent: &Sent, refresh_token: Option<&RefreshToken>) -> Request<Bytes> {
        let mut request = Request::new(encode(&self.form(sent, refresh_token)));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.endpoint.uri.clone();
        let headers = request.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"));
        headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
        let bearer = sent.key.as_ref().map(|key| key.0.bearer().clone());
        headers.extend(bearer.or_else(|| self.endpoint.auth.basic()).map(|value| (AUTHORIZATION, value)));
        request
    }

    fn form<'a>(
        &'a self,
        sent: &'a Sent,
        refresh_token: Option<&'a RefreshToken>,
    ) -> Vec<(&'a str, &'a str)> {
        let mut form = vec![("grant_type", self.grant_type)];
        form.extend(refresh_token.map(|token| ("refresh_token", token.expose_secret())));
        for (token, sent) in self.tokens.iter().zip(&sent.tokens) {
            form.push((token.name, sent.expose_secret()));
            form.extend(token.kind.as_ref().map(|(name, kind)| (*name, kind.uri())));
        }
        form.extend(self.parameters.iter().map(|(name, value)| (&**name, value.expose_secret())));
        form.extend(self.endpoint.auth.parameters());
        form
    }

    /// Returns the secrets of the request in every form in which it carries them, to be masked in errors.
    fn secrets(&self, sent: &Sent, refresh_token: Option<&RefreshToken>) -> Vec<Zeroizing<String>> {
        let key = sent.key.iter().map(ApiKey::expose_secret);
        let tokens = sent.tokens.iter().map(Token::expose_secret);
        // Any other parameter may be a secret; these three are not.
        let parameters =
            self.parameters.iter().filter(|(name, _)| !matches!(&**name, "scope" | "audience" | "resource"));
        let raw = (self.endpoint.auth.secret().into_iter())
            .chain(key)
            .chain(tokens)
            .chain(refresh_token.map(RefreshToken::expose_secret))
            .chain(parameters.map(|(_, value)| value.expose_secret()));
        let basic = self.endpoint.auth.basic();
        let basic = basic.and_then(|value| Some(value.to_str().ok()?.strip_prefix("Basic ")?.to_owned()));
        raw.flat_map(|secret| [secret.to_owned(), byte_serialize(secret.as_bytes()).collect()])
            .chain(basic)
            .map(Zeroizing::new)
            .collect()
    }
}

/// Combines a hash with a version so that a change of either changes the result.
fn mix(hash: u64, version: Option<u64>) -> u64 {
    let version = version.map_or(0, |version| version.wrapping_add(1));
    hash.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32) ^ version
}

async fn obtain<C: Credential>(provider: &Provider<C>) -> Result<C, SourceError> {
    provider.get().await.map_err(|error| match error.retry_after() {
        _ if error.kind() == AuthErrorKind::RefreshRejected => SourceError::permanent(error),
        Some(time) => SourceError::transient(error).with_retry_after(time),
        None => SourceError::transient(error),
    })
}

/// Encodes the form into a buffer that is wiped on drop.
fn encode(form: &[(&str, &str)]) -> Bytes {
    // Sized up front: a buffer that grows leaves unwiped copies behind.
    let capacity = form.iter().map(|(name, value)| 3 * (name.len() + value.len()) + "&=".len()).sum();
    let mut encoder = Serializer::new(String::with_capacity(capacity));
    encoder.extend_pairs(form);
    Bytes::from_owner(Zeroizing::new(encoder.finish().into_bytes()))
}
