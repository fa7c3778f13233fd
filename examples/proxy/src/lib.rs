//! The backend proxy that SelamAPI's documentation asks for: frontends call it with a token of their own, and the API key
//! stays on the server. `README.md` beside this tells how to run it.
//!
//! A request's way through, and where to read about each step:
//!
//! ```text
//!  caller ─▶ server ──▶ proxy::forward ─▶ StripHopByHop ─▶ StripCredentials ─▶ ChooseAuth ─▶ to_api ─▶ AnnotatedSelam ─▶ Upstream
//!            HTTP/1.1   rules: a path      Connection,      Authorization,     JWT and key    the        key or JWT, and    HTTP/1.1
//!            and /2     of the API's?      Upgrade, …       Cookie, …: the     or the key     base       again after a      and /2,
//!                       callers: who?                       caller's own       alone          URL        401                over TLS
//!                       rules: allowed?
//!                            │
//!                            └─▶ reply: 401, 403, 404, …
//! ```
//!
//! The four in the middle are `tower_selam`'s: [`proxy`] puts them together. Beside the way: [`config`] has the flags and
//! the environment, [`metrics`] what is counted and logged, and [`usage`] what
//! somebody should look at of that.

pub mod callers;
pub mod config;
pub mod metrics;
pub mod proxy;
pub mod reply;
pub mod rules;
pub mod server;
pub mod trailers;
pub mod upstream;
pub mod usage;
