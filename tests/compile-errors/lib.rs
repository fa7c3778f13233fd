//! What the compiler says where a client does not fit: see `tests/messages.rs`.
