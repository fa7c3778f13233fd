//! Small tools that know nothing of credentials.

#[macro_use]
mod macros;

pub(crate) mod clock;
#[cfg(all(test, model))]
pub(crate) mod loom;
pub(crate) mod per_thread;
#[cfg(any(unix, windows))]
pub(crate) mod private_file;
pub(crate) mod query;
pub(crate) mod sync;
pub(crate) mod timer;
