//! A backend proxy for SelamAPI: frontends call it with a token the operator gave them, and the API key stays on the server.
//! `README.md` in this folder says how to run it.
//!
//! The path of a request, and the module for each step:
//!
//! ```text
//!  caller ─▶ server ──▶ proxy::forward ─▶ StripHopByHop ─▶ StripCredentials ─▶ ChooseAuth ─▶ to_api ─▶ SelamLayer ─▶ Upstream
//!            HTTP/1.1   rules: valid      Connection,      Authorization,      JWT and key   the       key or JWT,   HTTP/1.1
//!            and /2     path?             Upgrade, …       Cookie, …: the      or the key    base      and a replay  and /2,
//!                       callers, login:                    caller's            alone         URL       after a 401   over TLS
//!                       whose token?
//!                       rules: allowed?
//!                            │
//!                            └─▶ reply: 401, 403, 404, …
//! ```
//!
//! With `--allow-origin`, [`browsers`] goes before all of it, for web pages. Without client tokens, [`local`] refuses what does not
//! come from a program on this machine. On the way back, [`location`]
//! keeps callers on the proxy. [`proxy`] assembles this stack; `StripHopByHop`, `StripCredentials`, `ChooseAuth` and `SelamLayer` come from `tower_selam`.
//! [`voice`] does the same for the voice agent, whose packets it reads.
//! Off the request path: [`config`] parses flags and environment, [`fleet`] connects the replicas that share JWTs, [`metrics`] counts and logs requests, and [`usage`] reports
//! unusual activity found in those metrics.

pub mod browsers;
pub mod callers;
pub mod config;
pub mod fleet;
pub mod local;
pub mod location;
pub mod login;
pub mod metrics;
pub mod proxy;
pub mod reply;
pub mod rules;
pub mod server;
pub mod trailers;
pub mod upstream;
pub mod usage;
pub mod voice;
