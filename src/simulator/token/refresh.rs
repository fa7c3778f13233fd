use std::collections::{HashMap, HashSet};

use super::denial::Denial;
use crate::simulator::random_hex;

/// Refresh tokens for one use each ([RFC 9700 section
/// 4.14.2](https://www.rfc-editor.org/rfc/rfc9700#section-4.14.2)).
pub(super) struct RefreshTokens {
    /// Every one that ever was.
    tokens: HashMap<String, RefreshToken>,
    /// The families that are not revoked.
    families: HashSet<u64>,
    started: u64,
    rotate: bool,
    reused: u64,
}

struct RefreshToken {
    /// Those that come of one another.
    family: u64,
    spent: bool,
}

impl RefreshTokens {
    pub(super) fn new() -> Self {
        Self { tokens: HashMap::new(), families: HashSet::new(), started: 0, rotate: true, reused: 0 }
    }

    /// The first of a new family.
    pub(super) fn issue(&mut self) -> String {
        self.started += 1;
        self.families.insert(self.started);
        self.issue_into(self.started)
    }

    fn issue_into(&mut self, family: u64) -> String {
        let token = format!("refresh-{}", random_hex());
        self.tokens.insert(token.clone(), RefreshToken { family, spent: false });
        token
    }

    /// Spends `token` for the next one, if they rotate. One that was spent revokes its family: somebody has a
    /// copy, and it is not known who.
    pub(super) fn redeem(&mut self, token: &str) -> Result<Option<String>, Denial> {
        let found = self.tokens.get_mut(token).ok_or(Denial::invalid_grant("Unknown refresh token."))?;
        let family = found.family;
        if found.spent {
            self.reused += 1;
            self.families.remove(&family);
            return Err(Denial::invalid_grant("The refresh token was used before."));
        }
        if !self.families.contains(&family) {
            return Err(Denial::invalid_grant("The refresh token was revoked."));
        }
        if !self.rotate {
            return Ok(None);
        }
        found.spent = true;
        Ok(Some(self.issue_into(family)))
    }

    pub(super) fn is_valid(&self, token: &str) -> bool {
        self.tokens.get(token).is_some_and(|found| !found.spent && self.families.contains(&found.family))
    }

    pub(super) fn revoke_all(&mut self) {
        self.families.clear();
    }

    pub(super) fn rotate(&mut self, rotate: bool) {
        self.rotate = rotate;
    }

    pub(super) fn reused(&self) -> u64 {
        self.reused
    }
}
