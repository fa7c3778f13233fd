//! [`News`]: what all members have to hear of soon, in one small record that each reads once a second.

use serde::{Deserialize, Serialize};

use super::record::Print;

/// How many items are kept. A member that is cut off for longer hears from the records themselves.
const MAX_ITEMS: usize = 64;

/// The latest items first.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct News {
    /// Grows with each item, so that a store that was rolled back is noticed.
    pub(super) count: u64,
    pub(super) items: Vec<Item>,
}

/// A credential has ended.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Item {
    pub(super) name: Print,
    /// The token that the API rejected; `None` if every token from before `epoch` has ended, by a login or a logout.
    pub(super) refused: Option<Print>,
    pub(super) epoch: u64,
}

impl News {
    pub(super) fn with(&self, item: Item) -> Self {
        let items = std::iter::once(item).chain(self.items.iter().copied()).take(MAX_ITEMS).collect();
        Self { count: self.count + 1, items }
    }
}
