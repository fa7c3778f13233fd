//! [`FileStore`]: the records of a fleet in files, for several programs on one machine.

use std::{
    fs::{self, File},
    io::{self, ErrorKind, Read, Write as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::{Entry, FleetStore, Put, Revision, Write, record::Print};
use crate::{
    error::BoxError,
    source::unblock,
    util::{
        clock::now,
        private_file::{self, create_directory, describe, recreate, try_lock},
    },
};

/// The first byte of a file.
const FORMAT: u8 = 1;

/// Of the files that hold an entry each.
const EXTENSION: &str = "record";

/// How often expired entries are removed.
const SWEEP_INTERVAL: Duration = Duration::from_secs(60 * 60);

/// A [`FleetStore`] in a directory, for several programs on one machine that share their tokens. No server is needed.
///
/// ```
/// use tower_selam::fleet::{FileStore, Fleet, SealingKey};
///
/// # let directory = std::env::temp_dir().join(format!("tower-selam-fleet-{}", std::process::id()));
/// let store = FileStore::new(directory.join("fleet"));
/// let fleet = Fleet::new("my-app", store, SealingKey::new([7; 32]))?;
/// # Ok::<(), tower_selam::ConfigError>(())
/// ```
///
/// - **One program at a time** writes. The lock is the operating system's, on the file `fleet.lock`. It is released when its
///   holder ends, even if it is killed.
/// - **A file is always whole**: it is written under another name, synchronized with the disk, and renamed.
/// - **Only their owner can read them**: on Unix, files are created with mode 0600, and missing directories with 0700. A
///   file that others can read or write is refused. On Windows the files inherit the access rights of their directory,
///   which should be in the user's profile.
/// - **Expired entries** are removed once an hour.
///
/// Members on several machines need a server: the ages of entries are measured by the machine's clock. The directory must be on
/// a file system with locks and atomic renames; if in doubt, choose a local one.
///
/// File operations run on tokio's blocking threads.
#[derive(Clone, Debug)]
pub struct FileStore {
    directory: Arc<Path>,
}

/// What a file holds: format, revision, when it was written, when it expires, and the sealed record.
struct Stored {
    entry: Entry,
    is_expired: bool,
}

/// The size of what precedes the record.
const HEAD: usize = 1 + 16 + 8 + 8;

impl FileStore {
    /// Keeps the records in files in `directory`, which does not have to exist.
    #[must_use]
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self { directory: directory.into().into() }
    }

    /// The file of a key, in a name that no file system reserves or takes for another one.
    fn path(&self, key: &str) -> PathBuf {
        let name = u128::from_be_bytes(Print::of(key.as_bytes()).0);
        self.directory.join(format!("{name:032x}.{EXTENSION}"))
    }

    async fn lock(&self) -> Result<File, BoxError> {
        private_file::lock(async || {
            let directory = Arc::clone(&self.directory);
            let locking = unblock(move || {
                create_directory(&directory)?;
                try_lock(&directory.join("fleet.lock"))
            });
            Ok(locking.await??)
        })
        .await
    }
}

impl FleetStore for FileStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>, BoxError> {
        let path = self.path(key);
        unblock(move || find(&path)).await?
    }

    async fn put(&self, key: &str, write: Write<'_>) -> Result<Put, BoxError> {
        let path = self.path(key);
        let Write { expected, revision, value, keep } = write;
        let content = encode(revision, value, keep);
        let lock = self.lock().await?;
        unblock(move || {
            let found = find(&path)?;
            if found.as_ref().map(|entry| entry.revision) != expected {
                return Ok(Put::Conflict(found));
            }
            replace(&path, &content).map_err(|error| describe("replace", &path, &error))?;
            // The entry is written. What is expired can be removed later, too.
            let _ = sweep(&path, &lock);
            Ok(Put::Done)
        })
        .await?
    }
}

/// Returns what a file holds, unless its time is over.
fn find(path: &Path) -> Result<Option<Entry>, BoxError> {
    let stored = read(path)?;
    Ok(stored.filter(|stored| !stored.is_expired).map(|stored| stored.entry))
}

/// Returns what a file holds; `None` if there is none, or a part of one.
fn read(path: &Path) -> Result<Option<Stored>, BoxError> {
    let mut content = Vec::new();
    let read = private_file::open(path).and_then(|mut file| file.read_to_end(&mut content));
    match read {
        Ok(length) if length < HEAD => Ok(None),
        Ok(_) if content[0] != FORMAT => {
            Err(format!("another version of tower-selam wrote {}", path.display()).into())
        }
        Ok(_) => Ok(decode(&content)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(describe("read", path, &error).into()),
    }
}

fn encode(revision: Revision, value: &[u8], keep: Option<Duration>) -> Vec<u8> {
    let now = now();
    // Zero means never, and so does a time that no clock can show.
    let expires = keep.and_then(|keep| now.checked_add(keep)).map_or(0, millis);
    let head = [&[FORMAT], &revision.as_bytes()[..], &millis(now).to_be_bytes(), &expires.to_be_bytes()];
    [&head.concat(), value].concat()
}

fn decode(content: &[u8]) -> Option<Stored> {
    let (revision, rest) = content.get(1..)?.split_first_chunk()?;
    let (written, rest) = rest.split_first_chunk()?;
    let (expires, value) = rest.split_first_chunk()?;
    let [written, expires] = [written, expires].map(|time| u64::from_be_bytes(*time));
    let now = millis(now());
    let entry = Entry {
        revision: Revision::from_bytes(*revision),
        value: value.to_vec(),
        age: Duration::from_millis(now.saturating_sub(written)),
    };
    Some(Stored { entry, is_expired: expires != 0 && expires <= now })
}

fn millis(time: SystemTime) -> u64 {
    let passed = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(passed.as_millis()).unwrap_or(u64::MAX)
}

/// Replaces a file. Needs the lock.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let next = path.with_file_name("fleet.next");
    let mut file = recreate(&next)?;
    file.write_all(content)?;
    file.sync_all()?;
    private_file::publish(&next, path)
}

/// Removes the expired entries of the directory that `path` is in, if nobody has for an hour. Needs the lock, whose file
/// shows when that was.
fn sweep(path: &Path, lock: &File) -> io::Result<()> {
    let last = lock.metadata()?.modified()?;
    if now().duration_since(last).is_ok_and(|passed| passed < SWEEP_INTERVAL) {
        return Ok(());
    }
    lock.set_modified(now())?;
    let files = fs::read_dir(path.parent().unwrap_or(path))?;
    for file in files.filter_map(Result::ok).map(|file| file.path()) {
        let is_record = file.extension().is_some_and(|extension| extension == EXTENSION);
        if is_record && matches!(read(&file), Ok(Some(stored)) if stored.is_expired) {
            fs::remove_file(&file)?;
        }
    }
    Ok(())
}
