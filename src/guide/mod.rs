//! Guide pages.

pub mod composition {
    #![doc = include_str!("composition.md")]
}
