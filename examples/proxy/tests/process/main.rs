//! The proxy as its users meet it: the built program, over real sockets, told by flags, variables and files.
//!
//! Nothing here knows how it works inside; the README is what it is held to. Whatever it prints, and whatever its callers get,
//! is searched for every secret of every test.

mod bodies;
mod callers;
mod configuration;
mod credentials;
mod ending;
mod forwarding;
mod metrics;
mod openai;
mod refusals;
mod rotation;
mod secrets;
mod streams;
mod support;
mod upgrades;
