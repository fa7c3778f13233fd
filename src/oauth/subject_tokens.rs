//! [`SubjectTokens`]: the tokens that users present to a server, to be exchanged for JWTs of the same users.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::UNIX_EPOCH,
};

use quick_cache::sync::Cache;

use super::{OAuthSource, TokenEndpoint, TokenType};
use crate::{Subject, credential::Token, refresh::Provider, source::SourceError, util::clock};

/// For how many subjects a token is kept: as many as [`PerSubject`](crate::PerSubject) remembers.
const CAPACITY: usize = 131_072;

/// How often expired tokens are removed, in seconds.
const SWEEP_INTERVAL: u64 = 60;

const NONE: &str = "the subject has presented no token lately";
const EXPIRED: &str = "the subject's token has expired: it has to present a newer one";

/// The latest token of each of many users, which a server exchanges for JWTs of the same users
/// ([RFC 8693](https://www.rfc-editor.org/rfc/rfc8693)).
///
/// The server verifies the token of each request, for example with `verify::JwtVerifier` (feature `verify`),
/// [presents](Self::present) it, and sends its own request with the user's [`Subject`]. A refresh takes the token that was
/// presented last. If that has expired, or if the token endpoint refuses it, the refresh fails until the user presents another
/// one. No user's token is ever exchanged for another user: a subject's source looks up its own subject's tokens alone.
///
/// ```
/// use bytes::Bytes;
/// use http_body_util::Full;
/// use tower_selam::{PerSubject, Subject, Token, simulator::Simulator};
/// use tower_selam::oauth::{ClientAuth, SubjectTokens, TokenEndpoint, TokenType};
///
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// let client = Simulator::new();
/// let (id, secret) = client.issue_client();
/// let endpoint = TokenEndpoint::new::<_, Full<Bytes>, _>("https://api.selamgpt.com/oauth/token", client)?
///     .with_client_auth(ClientAuth::client_secret_basic(id, secret)?);
/// let tokens = SubjectTokens::new();
/// let exchanged = tokens.clone();
/// let jwts = PerSubject::new(move |subject| exchanged.exchange(endpoint.clone(), subject, TokenType::Jwt));
///
/// let user = Subject::new("user-7");
/// assert!(jwts.of_subject(&user).token().await.is_err());
/// tokens.present(&Subject::new("user-8"), &Token::new("verified.jwt.of-user-8")?);
/// tokens.present(&user, &Token::new("verified.jwt.of-user-7")?);
/// assert!(jwts.of_subject(&Subject::new("user-8")).token().await.is_ok());
/// # Ok::<(), tower_selam::BoxError>(())
/// # }).unwrap();
/// ```
///
/// Clones share the tokens. About 131,072 subjects have one, each until it expires, and is wiped then.
#[derive(Clone)]
pub struct SubjectTokens(Arc<Tokens>);

struct Tokens {
    latest: Cache<Subject, Token>,
    own: Option<Subject>,
    /// When expired tokens were last removed, in seconds since the epoch.
    swept: AtomicU64,
}

impl SubjectTokens {
    /// Creates an empty set.
    #[must_use]
    pub fn new() -> Self {
        Self::build(None)
    }

    /// Names the subject that stands for the program itself, which presents no token: where the set is given to
    /// [`SelamLayerBuilder::with_subject_tokens`](crate::SelamLayerBuilder::with_subject_tokens), its JWT is issued by client
    /// credentials. Users must not be able to choose this name. Call it before tokens are presented: it starts an empty set.
    #[must_use]
    pub fn with_own_subject(self, subject: Subject) -> Self {
        Self::build(Some(subject))
    }

    fn build(own: Option<Subject>) -> Self {
        Self(Arc::new(Tokens { latest: Cache::new(CAPACITY), own, swept: AtomicU64::new(0) }))
    }

    /// Keeps the token of a subject for the next refresh, in place of its previous one. The server has verified that it is the
    /// subject's.
    pub fn present(&self, subject: &Subject, token: &Token) {
        self.sweep();
        let fingerprint = |token: &Token| token.0.fingerprint();
        if self.get(subject).is_none_or(|known| fingerprint(&known) != fingerprint(token)) {
            self.0.latest.insert(subject.clone(), token.clone());
        }
    }

    /// Forgets a subject's token, after a logout. Its JWTs are forgotten by [`PerSubject::forget`](crate::PerSubject::forget).
    pub fn forget(&self, subject: &Subject) {
        self.0.latest.remove(subject);
    }

    /// Returns the source of a subject's JWTs.
    #[must_use]
    pub fn exchange(&self, endpoint: TokenEndpoint, subject: &Subject, token_type: TokenType) -> OAuthSource {
        OAuthSource::exchange(endpoint, Presented::By(self.clone(), subject.clone()), token_type)
    }

    pub(crate) fn is_own(&self, subject: &Subject) -> bool {
        self.0.own.as_ref() == Some(subject)
    }

    fn get(&self, subject: &Subject) -> Option<Token> {
        self.0.latest.get(subject)
    }

    /// The token that the subject presented last, if it is still valid.
    pub(crate) fn current(&self, subject: &Subject) -> Result<Token, SourceError> {
        let token = self.get(subject).ok_or_else(|| SourceError::transient(NONE))?;
        match token.expires_at() {
            // Until there is another one, asking again would not help.
            Some(expiry) if expiry <= clock::now() => Err(SourceError::permanent(EXPIRED)),
            _ => Ok(token),
        }
    }

    fn sweep(&self) {
        let now = clock::now();
        let seconds = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let swept = self.0.swept.load(Relaxed);
        let is_due = seconds.saturating_sub(swept) >= SWEEP_INTERVAL;
        if is_due && self.0.swept.compare_exchange(swept, seconds, Relaxed, Relaxed).is_ok() {
            self.0.latest.retain(|_, token| token.expires_at().is_none_or(|expiry| expiry > now));
        }
    }
}

impl Default for SubjectTokens {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for SubjectTokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SubjectTokens").field("len", &self.0.latest.len()).finish_non_exhaustive()
    }
}

/// Where the token of a grant comes from.
#[derive(Clone)]
pub(super) enum Presented {
    /// This program.
    Provider(Provider<Token>),
    /// A subject.
    By(SubjectTokens, Subject),
}

impl Presented {
    /// The token, refreshed if that is possible and necessary.
    pub(super) async fn obtain(&self) -> Result<Token, SourceError> {
        match self {
            Self::Provider(provider) => super::auth::obtain(provider).await,
            Self::By(tokens, subject) => tokens.current(subject),
        }
    }

    /// Reports that the endpoint rejected `sent`. Returns whether there is another token now.
    pub(super) async fn replace(&self, sent: &Token) -> bool {
        match self {
            Self::Provider(provider) => provider.replace(sent).await,
            Self::By(tokens, subject) => {
                let sent = sent.0.fingerprint();
                tokens.get(subject).is_some_and(|token| token.0.fingerprint() != sent)
            }
        }
    }

    pub(super) fn accepted_after(&self, rejected: &Token) {
        if let Self::Provider(provider) = self {
            provider.accepted_after(rejected);
        }
    }

    /// A number that changes with the token.
    pub(super) fn version(&self) -> Option<u64> {
        match self {
            Self::Provider(provider) => provider.version(),
            Self::By(tokens, subject) => Some(tokens.get(subject)?.0.fingerprint().number()),
        }
    }
}
