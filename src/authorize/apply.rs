//! [`Credentials::apply`]: the layers' decision, without Tower.

use std::mem;

use http::{Request, request::Parts};

use super::{
    headers::Owner,
    policy::{Decision, Policy, Settings},
    provider::CredentialProvider,
};
use crate::{AuthError, Credentials, Origins, RequestAuth};

impl Credentials {
    /// Writes the credentials into `parts`, if they may go to its URI. Obeys its [`RequestAuth`] extension.
    ///
    /// Replaces `Authorization` and `X-API-Key`. With [`Origins::strip_for_other_origins`], removes them from a request to
    /// another origin instead.
    ///
    /// # Errors
    ///
    /// When the origin is not allowed, the method must not carry credentials, or the request asks for a credential that
    /// is not in this set. Do not send the request then.
    pub fn apply(&self, origins: &Origins, parts: &mut Parts) -> Result<(), AuthError> {
        let settings = Settings { origins: origins.clone(), ..Settings::default() };
        let policy =
            Policy { owner: Owner::Both, provider: CredentialProvider::fixed(self).into(), settings };
        let choice = parts.extensions.remove::<RequestAuth>();
        parts.extensions.insert(match &choice {
            None => RequestAuth::Custom(self.clone()),
            Some(RequestAuth::ApiKeyAndJwt) if self.jwt().is_some() => RequestAuth::Custom(self.clone()),
            Some(RequestAuth::ApiKey) => RequestAuth::Custom(self.without_jwt()),
            Some(choice) => choice.clone(),
        });
        let (empty, ()) = Request::new(()).into_parts();
        let mut request = Request::from_parts(mem::replace(parts, empty), ());
        let decision = policy.authorize(&mut request);
        (*parts, ()) = request.into_parts();
        parts.extensions.remove::<RequestAuth>();
        if let Some(choice) = choice {
            parts.extensions.insert(choice);
        }
        // Fixed credentials are never waited for.
        decision.map(|decision| debug_assert!(matches!(decision, Decision::Send(_))))
    }
}
