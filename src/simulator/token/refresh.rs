//! Single-use refresh tokens: [RFC 9700 section
//! 4.14.2](https://www.rfc-editor.org/rfc/rfc9700#section-4.14.2).

use std::collections::{HashMap, HashSet};

use crate::simulator::{
    random_hex,
    refusal::{Refusal, invalid_grant},
};

#[derive(Default)]
pub(super) struct RefreshTokens {
    /// Every token ever issued.
    tokens: HashMap<String, RefreshToken>,
    /// The families that are not revoked.
    families: HashSet<u64>,
    families_started: u64,
    /// Whether a token can be used again, and is not rotated.
    pub(super) reusable: bool,
    pub(super) reused: u64,
}

struct RefreshToken {
    /// Shared by all tokens that descend from the same first one.
    family: u64,
    spent: bool,
}

impl RefreshTokens {
    /// Issues the first token of a new family.
    pub(super) fn issue(&mut self) -> String {
        self.families_started += 1;
        self.families.insert(self.families_started);
        self.issue_into(self.families_started)
    }

    fn issue_into(&mut self, family: u64) -> String {
        let token = format!("refresh-{}", random_hex());
        self.tokens.insert(token.clone(), RefreshToken { family, spent: false });
        token
    }

    /// Spends `token` and returns the next one, if tokens rotate.
    ///
    /// Reuse of a spent token revokes its family: the token was copied, and either holder may be the thief.
    pub(super) fn redeem(&mut self, token: &str) -> Result<Option<String>, Refusal> {
        let found = self.tokens.get_mut(token).ok_or(invalid_grant("Unknown refresh token."))?;
        let family = found.family;
        if found.spent {
            self.reused += 1;
            self.families.remove(&family);
            return Err(invalid_grant("The refresh token was used before."));
        }
        if !self.families.contains(&family) {
            return Err(invalid_grant("The refresh token was revoked."));
        }
        if self.reusable {
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
}
