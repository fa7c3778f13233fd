//! [`CloneClient`]: the bound that asks for a cloneable client, with a compiler message that says what to do.

/// A client that is `Clone`, which the layers need for requests that wait for a credential or are replayed.
///
/// Implemented for every `Clone` type. The trait exists for the compiler message that a client without `Clone` gets.
#[diagnostic::on_unimplemented(
    message = "the client `{Self}` is not `Clone`: wrap it in tower's `buffer`",
    label = "a request that waits for a credential or is replayed needs a clone of the client",
    note = "`ServiceBuilder::new().layer(…).buffer(64).service(client)`"
)]
pub trait CloneClient: Clone {}

#[diagnostic::do_not_recommend]
impl<S: Clone> CloneClient for S {}
