//! Tests the reqwest and reqwest-middleware adapters over real connections.
//!
//! With feature `tls`, which is on by default, they use TLS with HTTP/1.1 and HTTP/2; without it, plain HTTP/1.1.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    reason = "test helpers fail loudly"
)]

mod client;
mod contract;
#[cfg(feature = "middleware")]
mod middleware;
mod redirects;
mod retry;
mod secrets;
mod support;
