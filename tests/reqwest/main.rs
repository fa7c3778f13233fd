//! The layers with reqwest and reqwest-middleware, over real connections. Named as in `tests/it`.
//!
//! Over TLS, HTTP/1.1 and HTTP/2, with all features; with the feature `reqwest` alone, which brings no TLS, over
//! plain HTTP/1.1.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    reason = "helpers of tests fail loudly too"
)]

mod client;
mod contract;
#[cfg(feature = "reqwest-middleware")]
mod middleware;
mod redirects;
mod secrets;
mod support;
