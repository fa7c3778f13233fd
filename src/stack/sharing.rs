//! [`Sharing`]: whether the JWTs of a stack's token endpoint are shared with other processes.

use crate::{
    JwtProvider, PerSubject, Refreshing, Subject,
    oauth::{OAuthSource, SubjectTokens},
};
#[cfg(feature = "fleet")]
use crate::{
    credential::Token,
    fleet::{Fleet, FleetSource},
    source::{EngineHandle, Fetched, Reason, Source, SourceError},
};

/// The names in the fleet: of the program's own JWT, and before each user's.
#[cfg(feature = "fleet")]
const SERVICE: &str = "service";
#[cfg(feature = "fleet")]
const USER: &str = "user:";

/// The fleet that shares the JWTs, if there is one.
#[derive(Clone, Debug, Default)]
pub(super) struct Sharing {
    #[cfg(feature = "fleet")]
    pub(super) fleet: Option<Fleet>,
}

impl Sharing {
    /// One JWT for all requests.
    pub(super) fn one(&self, source: OAuthSource) -> JwtProvider {
        #[cfg(feature = "fleet")]
        if let Some(fleet) = &self.fleet {
            return Refreshing::new(fleet.share(SERVICE, source)).into();
        }
        Refreshing::new(source).into()
    }

    /// One JWT for each subject that presents tokens.
    pub(super) fn per_subject(
        &self,
        tokens: SubjectTokens,
        source: impl Fn(&SubjectTokens, &Subject) -> OAuthSource + Send + Sync + 'static,
    ) -> JwtProvider {
        #[cfg(feature = "fleet")]
        if let Some(fleet) = self.fleet.clone() {
            let shared = move |subject: &Subject| {
                let name = match tokens.is_own(subject) {
                    true => SERVICE.to_owned(),
                    false => format!("{USER}{}", subject.as_str()),
                };
                let shared = fleet.share(&name, source(&tokens, subject));
                OfSubject { tokens: tokens.clone(), subject: subject.clone(), shared }
            };
            return PerSubject::new(shared).into();
        }
        PerSubject::new(move |subject: &Subject| source(&tokens, subject)).into()
    }
}

/// The shared JWT of one subject, for as long as it has presented a valid token to this member.
///
/// Without one, the fleet is not asked: a failure that concerns this member alone would make the others wait.
#[cfg(feature = "fleet")]
struct OfSubject {
    tokens: SubjectTokens,
    subject: Subject,
    shared: FleetSource<OAuthSource>,
}

#[cfg(feature = "fleet")]
impl Source<Token> for OfSubject {
    async fn fetch(&self, reason: Reason<Token>) -> Result<Fetched<Token>, SourceError> {
        if !self.tokens.is_own(&self.subject) {
            self.tokens.current(&self.subject)?;
        }
        self.shared.fetch(reason).await
    }

    fn version(&self) -> u64 {
        self.shared.version()
    }

    fn attach(&self, engine: EngineHandle<Token>) {
        self.shared.attach(engine);
    }
}
