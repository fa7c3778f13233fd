//! Authenticates callers by the JWTs of the app's own login: [`Login`].

use std::{
    collections::HashSet,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use sha2::{Digest, Sha256};
use tower_selam::{
    Subject, Token,
    verify::{Claims, JwtVerifier, VerifyError},
};

use crate::{
    callers::{Identity, Name},
    metrics,
    reply::Refusal,
};

/// How many groups have a name of their own in the metrics.
const MAX_GROUPS: usize = 100;

/// The name of further ones.
const OTHER_GROUPS: &str = "other";

/// The longest name of a group, in bytes.
const MAX_GROUP_LENGTH: usize = 64;

/// In front of a group's name. Names of client tokens have no colon, so no group can pass for one of them.
const GROUP: &str = "jwt:";

/// How a user is named in the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogCallers {
    /// By the first digits of a hash.
    #[default]
    Hash,
    /// By the claim that names it.
    Plain,
    /// Not at all.
    Off,
}

/// What the claims of a JWT have to be, and mean.
#[derive(Clone, Debug)]
pub struct Rules {
    /// The claim that names the user.
    pub caller_claim: String,
    /// The claim that names the user's group in the metrics; without one, the issuer is the group.
    pub group_claim: Option<String>,
    /// Claims and their values without which a user may not call.
    pub required: Vec<(String, String)>,
    pub log: LogCallers,
}

/// The app's login. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Login {
    verifier: JwtVerifier,
    rules: Arc<Rules>,
    groups: Arc<Mutex<HashSet<Name>>>,
}

/// A user who has logged in to the app.
pub struct User {
    /// Tells issuer and user from all others. A digest, so that nothing that prints it shows who it is.
    pub subject: Subject,
    /// The JWT that was verified.
    pub jwt: Token,
    /// The name in the log.
    pub logged: Option<String>,
}

impl fmt::Debug for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("User").field("logged", &self.logged).finish_non_exhaustive()
    }
}

impl User {
    /// Whether the JWT has expired since it was verified, or was about to and accepted for the clocks' sake.
    #[expect(clippy::disallowed_methods, reason = "`exp` is a time of the wall clock")]
    pub fn has_expired(&self) -> bool {
        self.jwt.expires_at().is_some_and(|expiry| expiry <= SystemTime::now())
    }
}

impl Login {
    pub fn new(verifier: JwtVerifier, rules: Rules) -> Self {
        Self { verifier, rules: Arc::new(rules), groups: Arc::default() }
    }

    /// Whether this has the form of a JWT, however invalid.
    pub fn is_jwt(token: &[u8]) -> bool {
        token.iter().filter(|byte| **byte == b'.').count() == 2
    }

    /// Returns the user to whom this JWT was issued.
    ///
    /// # Errors
    ///
    /// The reason to refuse the request.
    pub async fn authenticate(&self, jwt: &[u8]) -> Result<Identity, Refusal> {
        let claims = self.verifier.verify(jwt).await.map_err(|error| match error {
            VerifyError::Unavailable { retry_after } => Refusal::IdentityUnavailable(retry_after),
            VerifyError::Expired => Refusal::ExpiredJwt,
            error => Refusal::InvalidJwt(error),
        })?;
        let Rules { caller_claim, required, log, .. } = &*self.rules;
        let user = claims.text(caller_claim).ok_or(Refusal::NotPermitted)?;
        if !required.iter().all(|(name, value)| claims.has(name, value)) {
            return Err(Refusal::NotPermitted);
        }
        let id = user_id(claims.issuer(), &user);
        let logged = match log {
            LogCallers::Hash => Some(id[..16].to_owned()),
            LogCallers::Plain => Some(metrics::shorten(&user, metrics::LOGGED_ERROR)),
            LogCallers::Off => None,
        };
        let jwt = std::str::from_utf8(jwt).ok().and_then(|jwt| Token::new(jwt).ok());
        let jwt = jwt.ok_or(Refusal::InvalidJwt(VerifyError::Malformed))?;
        let user = User { subject: Subject::new(id), jwt, logged };
        Ok(Identity { name: self.group(&claims), user: Some(Arc::new(user)) })
    }

    /// The name in metrics. Users do not choose it, and there are few.
    fn group(&self, claims: &Claims) -> Name {
        let group = match &self.rules.group_claim {
            None => claims.issuer().map(str::to_owned),
            Some(claim) => claims
                .text(claim)
                .map(std::borrow::Cow::into_owned)
                .or_else(|| claims.get::<Vec<String>>(claim)?.into_iter().next()),
        };
        let group = metrics::shorten(group.as_deref().unwrap_or("none"), MAX_GROUP_LENGTH);
        let name = Name::from(format!("{GROUP}{group}"));
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        match groups.get(&name) {
            Some(known) => known.clone(),
            None if groups.len() < MAX_GROUPS => {
                groups.insert(name.clone());
                name
            }
            None => Name::from(format!("{GROUP}{OTHER_GROUPS}")),
        }
    }
}

/// The SHA-256 of issuer and user, in hex. The length in front of the issuer tells where it ends.
fn user_id(issuer: Option<&str>, user: &str) -> String {
    let issuer = issuer.unwrap_or_default();
    let digest = Sha256::digest(format!("{}:{issuer}{user}", issuer.len()));
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jwt_has_three_parts() {
        for (token, is_jwt) in
            [("a.b.c", true), ("..", true), ("a.b", false), ("a.b.c.d.e", false), ("sk-selam-1", false)]
        {
            assert_eq!(Login::is_jwt(token.as_bytes()), is_jwt, "{token}");
        }
    }

    #[test]
    fn no_two_users_have_one_id() {
        let ids =
            [(Some("a"), "bc"), (Some("ab"), "c"), (None, "abc"), (Some("1:a"), "bc"), (Some("a"), "b")];
        let ids: HashSet<_> = ids.into_iter().map(|(issuer, user)| user_id(issuer, user)).collect();
        assert_eq!(ids.len(), 5);
        // As the README computes it.
        assert!(user_id(Some("https://login.example"), "user-7").starts_with("a0afafafbae4929f"));
    }
}
