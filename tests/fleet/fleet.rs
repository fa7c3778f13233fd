//! Fleets whose members are processes, and whose store is a real Redis; `tests/README.md` maps behaviour ids to files.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    reason = "test helpers panic on failure, like the tests themselves"
)]

#[path = "../it/fleet_stores/contract.rs"]
mod contract;
mod faults;
mod members;
mod outages;
mod secrets;
mod support;

use tower_selam::fleet::RedisStore;

use self::{contract::contract, support::RedisServer};

contract!(redis_server, {
    let Some(server) = RedisServer::start().await else { return };
    let store = RedisStore::new(server.connect().await);
    (server, store)
});
