//! Tests the compiler's messages for clients that do not fit the layers: see `tests/messages.rs`.
