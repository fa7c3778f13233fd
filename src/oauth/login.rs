//! [`Login`]: what a source knows of its refresh tokens, and which one it may spend.

use std::collections::VecDeque;

use super::RefreshToken;
use crate::credential::Fingerprint;

/// How many spent tokens are remembered. A store that lags, or is restored from a backup, may return any of them.
const MAX_SPENT: usize = 256;

/// The refresh tokens of one login. No I/O.
#[derive(Default)]
pub(super) struct Login {
    /// Loaded from the store, or issued since.
    newest: Option<RefreshToken>,
    /// What the store holds instead of `newest`; `None` if it holds `newest`.
    outdated: Option<RefreshToken>,
    /// Tokens whose successors were issued to this source.
    spent: VecDeque<Fingerprint>,
    /// A token that was sent and not answered for, so that it may be spent.
    unanswered: Option<Fingerprint>,
}

impl Login {
    /// Records that the store holds `held`, and returns the token to spend; `None` if `held` is spent and its successor
    /// is unknown.
    pub(super) fn found(&mut self, held: RefreshToken) -> Option<RefreshToken> {
        if self.holds(&held) {
            self.outdated = None;
        } else if self.spent.contains(&held.fingerprint()) {
            // Saving failed, or the store lags.
            self.outdated = self.newest.is_some().then_some(held);
        } else {
            // Somebody logged in, or another source of the same login rotated the token.
            self.newest = Some(held);
            self.outdated = None;
        }
        self.newest.clone()
    }

    /// Records that the store holds no login.
    pub(super) fn ended(&mut self) {
        (self.newest, self.outdated) = (None, None);
    }

    pub(super) fn newest(&self) -> Option<&RefreshToken> {
        self.newest.as_ref()
    }

    /// Whether `token` is the newest.
    fn holds(&self, token: &RefreshToken) -> bool {
        self.newest.as_ref().is_some_and(|newest| newest.fingerprint() == token.fingerprint())
    }

    /// Records that `token` is being sent. Returns whether it was before, without an answer.
    pub(super) fn sending(&mut self, token: &RefreshToken) -> bool {
        let sent = Some(token.fingerprint());
        self.unanswered.replace(token.fingerprint()) == sent
    }

    /// Records that `token`, which was being sent, is not spent.
    pub(super) fn unspent(&mut self) {
        self.unanswered = None;
    }

    /// Records that the endpoint accepted `token`, and issued `next` if it rotates refresh tokens.
    pub(super) fn accepted(&mut self, token: &RefreshToken, next: Option<RefreshToken>) {
        self.unanswered = None;
        let Some(next) = next.filter(|next| next.fingerprint() != token.fingerprint()) else { return };
        self.spent.retain(|spent| *spent != next.fingerprint());
        if self.spent.len() == MAX_SPENT {
            self.spent.pop_front();
        }
        self.spent.push_back(token.fingerprint());
        self.outdated.get_or_insert_with(|| token.clone());
        self.newest = Some(next);
    }

    /// The newest token and what the store holds instead, unless the newest is saved.
    pub(super) fn unsaved(&self) -> Option<(RefreshToken, RefreshToken)> {
        self.newest.clone().zip(self.outdated.clone())
    }

    /// Records that the newest token is saved.
    pub(super) fn saved(&mut self) {
        self.outdated = None;
    }
}
