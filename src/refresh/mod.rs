//! The refresh engine: holds one credential, a key or a token, and fetches the next from its source in time.
//!
//! [How refreshing works](crate::guide::refreshing) describes what happens when. The engine knows nothing of HTTP:
//!
//! ```text
//!  Refreshing ─▶ driver ──▶ state ─▶ schedule      decisions: plain functions of state and time
//!   (handle)     lock, task    │
//!                   │          └▶ lease             published for requests, read without a lock
//!                   └▶ fetch ─▶ Source              one at a time; waiters share an InFlight
//! ```

mod driver;
mod fetch;
mod in_flight;
mod lease;
mod per_subject;
mod policy;
#[cfg(test)]
mod proptests;
mod provider;
mod reentrancy;
mod refreshing;
mod schedule;
mod state;
mod turns;

#[cfg(all(test, model))]
pub(crate) use self::driver::loom_tests;
pub(crate) use self::{
    driver::Demand,
    in_flight::{InFlight, WaitForRefresh},
    lease::{Engine, Lease},
    per_subject::SubjectEngine,
    reentrancy::on_behalf,
    state::Rejection,
};
pub use self::{
    per_subject::PerSubject,
    policy::RefreshPolicy,
    provider::{JwtProvider, Provider},
    refreshing::Refreshing,
};
