//! Black-box tests of the proxy: the built program, over real sockets, configured by flags, variables and files.
//!
//! They hold it to its README, and search all its output and all responses to callers for every secret of every test.

mod admission;
mod bodies;
mod browsers;
mod callers;
mod chromium;
mod configuration;
mod connections;
mod credentials;
mod errors;
mod expect;
mod fleet;
mod forwarding;
mod leaks;
mod login;
mod metrics;
mod openai;
mod resends;
mod rotation;
mod secrets;
mod shutdown;
mod socketio;
mod streams;
mod support;
mod upgrades;
mod upstream;
mod voice;
