//! What threads share state through, in one place, so that a model checker can put its own there.
//!
//! With `--cfg model`, for the tests in `engine/shell/model.rs`, these are stand-ins that let
//! [loom](https://docs.rs/loom) choose who runs next and what a load sees.

#[cfg(not(all(test, model)))]
pub(crate) use {
    arc_swap::ArcSwapOption,
    std::sync::{
        Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    tokio::{runtime::Handle, task::AbortHandle, task_local},
};

#[cfg(all(test, model))]
pub(crate) use {
    super::loom::{AbortHandle, ArcSwapOption, Handle, task_local},
    loom::sync::{
        Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
};
