//! Integration tests through the public API; `tests/README.md` maps behaviour ids to files.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    reason = "test helpers panic on failure, like the tests themselves"
)]

mod annotate;
mod api;
mod architecture;
mod behaviours;
mod choose_auth;
mod cli;
mod clocks;
mod composition;
mod environment;
mod errors;
mod failures;
mod file_store;
mod files;
#[cfg(feature = "fleet")]
mod fleet;
#[cfg(feature = "fleet")]
mod fleet_builder;
#[cfg(feature = "fleet")]
mod fleet_stores;
mod handshake;
mod headers;
mod hosts;
mod inbound;
mod logins;
mod memory;
mod mint;
mod oauth;
mod origins;
mod redirects;
mod reentrancy;
mod refresh_layer;
mod refreshing;
mod rejections;
mod replay;
mod retry;
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
mod throttle;
mod tower_contract;
mod two_versions;
#[cfg(feature = "verify")]
mod verify;
mod voice_agent;
mod waiting;
mod wire;
mod with_extension;
