//! A source whose error is the program's own type.

use tower_selam::{Refreshing, Token, source::{Reason, source_fn}};

#[derive(Debug)]
struct LoginError;

impl std::fmt::Display for LoginError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("login failed")
    }
}

impl std::error::Error for LoginError {}

fn main() {
    let _ = Refreshing::new(source_fn(|_: Reason<Token>| async { Err::<Token, _>(LoginError) }));
}
