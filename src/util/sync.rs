//! The primitives that threads share state through, in one place, so that loom can replace them.
//!
//! With `--cfg model`, for the `loom_tests.rs` of `refresh` and `authorize`, they are stand-ins that let
//! [loom](https://docs.rs/loom) choose which thread runs next and which value a load sees.

#[cfg(not(all(test, model)))]
pub(crate) use {
    arc_swap::ArcSwapOption,
    std::sync::{Mutex, MutexGuard},
    tokio::{runtime::Handle, sync::watch, task::AbortHandle, task_local},
};

#[cfg(all(test, model))]
pub(crate) use {
    super::loom::{AbortHandle, ArcSwapOption, Handle, task_local, watch},
    loom::sync::{Mutex, MutexGuard},
};
