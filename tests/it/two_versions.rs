//! H4: Cargo refuses two versions of this crate, whose layers would not see each other's `RequestAuth`.

use std::{fs, path::Path, process::Command};

use crate::files::Directory;

const MANIFEST: &str = include_str!("../../Cargo.toml");

/// Writes a package without code.
fn write_package(at: &Path, manifest: &str) {
    fs::create_dir_all(at.join("src")).unwrap();
    fs::write(at.join("src/lib.rs"), "").unwrap();
    fs::write(at.join("build.rs"), "fn main() {}").unwrap();
    fs::write(at.join("Cargo.toml"), manifest).unwrap();
}

/// Resolves a program that depends on two versions of a package with this `[package]` table.
fn resolve(package: &str) -> Result<(), String> {
    let directory = Directory::new();
    for version in ["0.1.0", "0.2.0"] {
        let lines =
            package.lines().filter(|line| !line.starts_with("version ") && !line.starts_with("readme "));
        let lines: Vec<_> = lines.collect();
        let manifest = format!("[package]\nversion = \"{version}\"\n{}", lines.join("\n"));
        write_package(&directory.path().join(version), &manifest);
    }
    let program = "[package]\nname = \"program\"\nversion = \"0.0.0\"\n[workspace]\n[dependencies]\n\
        first = { path = \"../0.1.0\", package = \"tower-selam\" }\n\
        second = { path = \"../0.2.0\", package = \"tower-selam\" }\n";
    write_package(&directory.path().join("program"), program);
    let mut cargo = Command::new(env!("CARGO"));
    cargo
        .args(["metadata", "--offline", "--format-version", "1"])
        .current_dir(directory.path().join("program"));
    let output = cargo.output().unwrap();
    if output.status.success() { Ok(()) } else { Err(String::from_utf8(output.stderr).unwrap()) }
}

/// H4: a `RequestAuth` that the layers cannot see does not reach them.
#[test]
fn two_versions_do_not_resolve() {
    let package = MANIFEST.split("\n[package]\n").nth(1).unwrap().split("\n[").next().unwrap();
    let refused = resolve(package).unwrap_err();
    assert!(refused.contains("links to the native library `tower-selam`"), "{refused}");
    // Nothing else stands in the way.
    let unlinked: Vec<_> = package.lines().filter(|line| !line.starts_with("links ")).collect();
    resolve(&unlinked.join("\n")).unwrap();
}
