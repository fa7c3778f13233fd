//! [`FleetLogin`]: the refresh token of a login that a fleet shares.

use std::{
    fmt,
    sync::{Arc, atomic::Ordering},
};

use super::member::Member;
use crate::{
    error::BoxError,
    oauth::{RefreshToken, RefreshTokenStore, StoreLock},
};

const NOT_LEADING: &str = "this member of the fleet does not hold the lease of the login";

/// The refresh token of a login that a fleet shares, for a source that spends it; see
/// [`Fleet::share_login`](super::Fleet::share_login).
pub struct FleetLogin {
    pub(super) member: Arc<Member>,
}

impl FleetLogin {
    /// Sets the refresh token to begin with if the fleet has had none under this name for 30 days, for example from a variable
    /// that a deployment sets.
    ///
    /// A store that holds nothing may have lost what it held, so the member waits for two seconds: others may be putting it back.
    #[must_use]
    pub fn with_initial(self, token: RefreshToken) -> Self {
        let _ = self.member.initial.set(token);
        self
    }
}

impl RefreshTokenStore for FleetLogin {
    /// The lease that the fleet has claimed already.
    async fn lock(&self) -> Result<StoreLock, BoxError> {
        let lead = self.member.lead().ok_or(NOT_LEADING)?;
        Ok(StoreLock::lapsing(lead))
    }

    async fn load(&self) -> Result<Option<RefreshToken>, BoxError> {
        let lead = self.member.lead().ok_or(NOT_LEADING)?;
        let is_another = !lead.is_new.swap(false, Ordering::AcqRel);
        Ok(self.member.login(lead.asker.id, is_another).await?)
    }

    async fn save(&self, token: &RefreshToken, replaced: &RefreshToken) -> Result<(), BoxError> {
        Ok(self.member.save_login(token, replaced).await?)
    }

    fn version(&self) -> u64 {
        self.member.changes.load(Ordering::Acquire)
    }
}

impl fmt::Debug for FleetLogin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FleetLogin").finish_non_exhaustive()
    }
}
