//! What must hold, seen from outside. Tests are named for the behaviour they prove; `tests/README.md` maps
//! the ids.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    reason = "helpers of tests fail loudly too"
)]

mod annotate;
mod api;
mod choose_auth;
mod clocks;
mod composition;
mod environment;
mod errors;
mod failures;
mod files;
mod handshake;
mod headers;
mod inbound;
mod mint;
mod oauth;
mod origins;
mod redirects;
mod reentry;
mod refresh;
mod renewal;
mod replay;
mod rotation;
mod runtimes;
mod secrets;
mod sharing;
#[cfg(feature = "sign")]
mod sign;
mod simulator;
mod subjects;
mod support;
mod telemetry;
mod tower_contract;
mod waiting;
mod wire;
