//! The layers in the words of one client each. Each adapter is a feature of its client's name.

#[cfg(feature = "tonic")]
pub mod tonic;
