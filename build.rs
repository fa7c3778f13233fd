//! Does nothing. Cargo requires it for the key `links`; see `Cargo.toml`.

fn main() {
    // By default Cargo runs it again after each change.
    println!("cargo::rerun-if-changed=build.rs");
}
