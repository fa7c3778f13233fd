//! Files that only their owner may use, and that several programs share under a lock.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, ErrorKind},
    path::Path,
    time::Duration,
};

use fs4::{FileExt, TryLockError};

use super::timer::sleep;

/// Between attempts to lock. Doubles each time, up to the second.
const LOCK_BACKOFF: [Duration; 2] = [Duration::from_millis(2), Duration::from_millis(50)];

/// Repeats `try_lock` until it succeeds.
pub(crate) async fn lock<T, E, F>(mut try_lock: impl FnMut() -> F) -> Result<T, E>
where
    F: Future<Output = Result<Option<T>, E>>,
{
    let [mut pause, max] = LOCK_BACKOFF;
    loop {
        if let Some(lock) = try_lock().await? {
            return Ok(lock);
        }
        // Not to lock in step with another program.
        sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
        pause = max.min(pause * 2);
    }
}

/// Takes the lock at `path` until the file is dropped; `None` if another program has it.
pub(crate) fn try_lock(path: &Path) -> io::Result<Option<File>> {
    let file = options().create(true).truncate(false).open(path);
    let file = file.map_err(|error| describe("open", path, &error))?;
    match FileExt::try_lock(&file) {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(describe("lock", path, &error)),
    }
}

/// Returns the options to write a file that nobody else may use.
pub(crate) fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
}

/// Creates a directory that nobody else may use, if it is missing.
pub(crate) fn create_directory(path: &Path) -> io::Result<()> {
    let mut builder = DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.recursive(true).create(path).map_err(|error| describe("create", path, &error))
}

/// Creates a file, and removes its predecessor.
pub(crate) fn recreate(path: &Path) -> io::Result<File> {
    // Not opened, but created, so that it is ours and no link.
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => options().create_new(true).open(path),
    }
}

/// Opens a file, unless others may use it.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    // Opening anything else might block.
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::new(ErrorKind::InvalidInput, "it is not a file"));
    }
    let file = File::open(path)?;
    #[cfg(unix)]
    {
        let mode = std::os::unix::fs::MetadataExt::mode(&file.metadata()?) & 0o777;
        if mode & 0o077 != 0 {
            let text = format!("others may use it (mode {mode:04o}); run `chmod 600` on it");
            return Err(io::Error::new(ErrorKind::PermissionDenied, text));
        }
    }
    Ok(file)
}

/// Renames the synchronized file `next`, so that it survives a crash under its new name.
pub(crate) fn publish(next: &Path, path: &Path) -> io::Result<()> {
    fs::rename(next, path)?;
    #[cfg(unix)]
    if let Some(directory) = path.parent() {
        File::open(directory)?.sync_all()?;
    }
    Ok(())
}

/// Says what could not be done with a file.
pub(crate) fn describe(verb: &str, path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("cannot {verb} {}: {error}", path.display()))
}
