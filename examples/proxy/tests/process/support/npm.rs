//! Programs for Node, with their packages from npm: [`install`].
//!
//! The packages are installed below cargo's target directory, once for each lock file.

use std::{
    fs,
    io::Write,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::Duration,
};

use tokio::{process::Command, time};

use super::Scratch;

/// Generous, since npm may be slow.
const TIMEOUT: Duration = Duration::from_secs(300);

/// Prints why a test is skipped, although it passes: the test harness would capture `eprintln!`.
///
/// # Panics
///
/// In CI, where nothing may be missing.
pub(crate) fn skip(what: &str, why: &str) {
    assert!(std::env::var_os("CI").is_none(), "{what}: {why}");
    let _ = std::io::stderr().write_all(format!("\nSKIPPED {what}: {why}\n").as_bytes());
}

/// Copies the programs in a folder of `tests/` to where their packages are; returns that place, or why there is none.
pub(crate) async fn install(folder: &str, scratch: &Scratch) -> Result<PathBuf, String> {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(folder);
    let packages = packages(folder, &sources).await?;
    let place = scratch.path(folder);
    let copy = || {
        fs::create_dir_all(&place)?;
        for file in fs::read_dir(&sources)? {
            let file = file?;
            fs::copy(file.path(), place.join(file.file_name()))?;
        }
        symlink(packages, place.join("node_modules"))
    };
    copy().map_err(|error| error.to_string())?;
    Ok(place)
}

/// Returns the `node_modules` of a folder.
async fn packages(folder: &str, sources: &Path) -> Result<PathBuf, String> {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (ready, new) =
        (target.join(format!("npm-{folder}")), target.join(format!("npm-{}", std::process::id())));
    let lock = fs::read(sources.join("package-lock.json")).map_err(|error| error.to_string())?;
    // npm writes this file last.
    let is_installed = |place: &Path| {
        fs::read(place.join("package-lock.json")).is_ok_and(|installed| installed == lock)
            && place.join("node_modules/.package-lock.json").exists()
    };
    if !is_installed(&ready) {
        let _ = fs::remove_dir_all(&new);
        fs::create_dir_all(&new).map_err(|error| error.to_string())?;
        for name in ["package.json", "package-lock.json"] {
            fs::copy(sources.join(name), new.join(name)).map_err(|error| error.to_string())?;
        }
        let mut npm = Command::new("npm");
        npm.args(["ci", "--ignore-scripts", "--no-audit", "--no-fund"]).current_dir(&new);
        let installed = run(npm).await;
        if installed.is_ok() {
            // Renamed into place, since another process may use it at the same time.
            let _ = fs::remove_dir_all(&ready);
            let _ = fs::rename(&new, &ready);
        }
        let _ = fs::remove_dir_all(&new);
        installed?;
    }
    if is_installed(&ready) {
        Ok(ready.join("node_modules"))
    } else {
        Err("the installed packages have disappeared".to_owned())
    }
}

async fn run(mut command: Command) -> Result<Output, String> {
    let name = command.as_std().get_program().display().to_string();
    command.stdin(Stdio::null()).kill_on_drop(true);
    match time::timeout(TIMEOUT, command.output()).await {
        Err(_) => Err(format!("{name} timed out")),
        Ok(Err(error)) => Err(format!("{name}: {error}")),
        Ok(Ok(output)) if output.status.success() => Ok(output),
        Ok(Ok(output)) => Err(format!("{name}: {}", String::from_utf8_lossy(&output.stderr).trim())),
    }
}

/// Finds the first of these programs in `PATH`.
pub(crate) fn find_program(names: &[&str]) -> Result<PathBuf, String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let found = names.iter().flat_map(|name| folders.iter().map(move |folder| folder.join(name)));
    let missing = || format!("{} is not installed", names.first().copied().unwrap_or_default());
    found.into_iter().find(|program| program.is_file()).ok_or_else(missing)
}
