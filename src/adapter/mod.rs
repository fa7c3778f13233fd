//! Adapters to clients with their own request and response types: one module and one feature each.

#[cfg(feature = "reqwest")]
pub mod reqwest;
#[cfg(feature = "reqwest-middleware")]
pub mod reqwest_middleware;
#[cfg(all(feature = "reqwest", feature = "retry"))]
mod reqwest_retry;
#[cfg(feature = "tonic")]
pub mod tonic;
