//! Python with packages from PyPI: [`install`].
//!
//! The packages are installed into a virtual environment below cargo's target directory, once for each requirement.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::Duration,
};

use tokio::{process::Command, time};

/// Generous, since PyPI may be slow.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(180);

/// Returns a Python interpreter that can import `module`, which `requirement` installs; or why there is none.
pub(crate) async fn install(module: &str, requirement: &str) -> Result<PathBuf, String> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (ready, new) = (folder.join(module), folder.join(format!("{module}-{}", std::process::id())));
    if is_installed(&ready, module, requirement).await {
        return Ok(python_of(&ready));
    }
    let installed = create(&new, requirement).await;
    if installed.is_ok() {
        // Renamed into place, since another process may use it at the same time.
        let _ = fs::remove_dir_all(&ready);
        let _ = fs::rename(&new, &ready);
    }
    let _ = fs::remove_dir_all(&new);
    installed?;
    if is_installed(&ready, module, requirement).await {
        Ok(python_of(&ready))
    } else {
        Err(format!("the installed {module} has disappeared"))
    }
}

fn python_of(environment: &Path) -> PathBuf {
    environment.join("bin/python")
}

/// A file written after the installation, with the installed requirement.
fn stamp_of(environment: &Path) -> PathBuf {
    environment.join("installed")
}

async fn is_installed(environment: &Path, module: &str, requirement: &str) -> bool {
    let import = ["-c".to_owned(), format!("import {module}")];
    fs::read_to_string(stamp_of(environment)).is_ok_and(|installed| installed == requirement)
        && run(python_of(environment), &import.each_ref().map(OsStr::new)).await.is_ok()
}

async fn create(environment: &Path, requirement: &str) -> Result<(), String> {
    let arguments = ["-m", "venv", "--clear"].map(OsStr::new);
    run("python3", &[&arguments[..], &[environment.as_os_str()]].concat()).await?;
    let mut arguments = vec!["-m", "pip", "install", "--quiet", "--disable-pip-version-check"];
    arguments.extend(requirement.split(' '));
    let arguments: Vec<_> = arguments.into_iter().map(OsStr::new).collect();
    run(python_of(environment), &arguments).await?;
    fs::write(stamp_of(environment), requirement).map_err(|error| error.to_string())
}

async fn run(program: impl AsRef<OsStr>, arguments: &[&OsStr]) -> Result<Output, String> {
    let mut command = Command::new(program.as_ref());
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    let command_line = || format!("{} {arguments:?}", program.as_ref().display());
    match time::timeout(TIMEOUT, command.output()).await {
        Err(_) => Err(format!("{} timed out", command_line())),
        Ok(Err(error)) => Err(format!("{}: {error}", command_line())),
        Ok(Ok(output)) if output.status.success() => Ok(output),
        Ok(Ok(output)) => {
            let text = [output.stdout, output.stderr].concat();
            let text = String::from_utf8_lossy(&text);
            Err(format!("{}: {}", command_line(), text.trim().lines().last().unwrap_or("failed")))
        }
    }
}
