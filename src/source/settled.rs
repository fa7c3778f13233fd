//! [`SettledFile`]: reads a file that another program writes, but never half of it.

use std::{
    fmt,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use secrecy::{ExposeSecret, SecretSlice};
use zeroize::Zeroizing;

use super::{SourceError, unblock};
use crate::{
    credential::Fingerprint,
    error::ConfigErrorKind,
    util::{
        clock::Clock,
        timer::{has_timers, sleep},
    },
};

/// Larger than any key or token.
const MAX_SIZE: usize = 64 * 1024;

/// The time between two looks. A writer that pauses for longer looks as if it had finished.
const INTERVAL: Duration = Duration::from_millis(200);

/// A file that nobody has written to for so long is complete. Longer than file servers' clocks are usually apart.
const OLD: Duration = Duration::from_secs(10);

/// How often a file is looked at while there is nothing to use in its place: for 6 seconds.
const FIRST_LOOKS: u32 = 31;

/// How often it is looked at otherwise.
const LOOKS: u32 = 3;

/// A file that holds a secret, and that another program replaces or overwrites at any time.
///
/// A program that writes a file in place truncates it first, so a reader can find it empty or cut off. What is read here is
/// returned only if it is the same as last time, if two looks 200 milliseconds apart agree, or if the file has not been
/// written to for 10 seconds. Files that are renamed into place are read in the same way: a new file may be incomplete, too.
///
/// Clones share what was read last. `Debug` shows the path alone.
///
/// ```
/// use secrecy::ExposeSecret;
/// use tower_selam::source::SettledFile;
///
/// # let path = std::env::temp_dir().join(format!("tower-selam-settled-{}", std::process::id()));
/// std::fs::write(&path, "web:s3cr3t\n")?;
/// let file = SettledFile::new(&path);
/// assert_eq!(file.read_blocking().unwrap().expose_secret(), b"web:s3cr3t\n");
/// # std::fs::remove_file(&path)?;
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone)]
pub struct SettledFile {
    path: PathBuf,
    max_size: usize,
    /// What was returned last.
    believed: Arc<Mutex<Option<Fingerprint>>>,
}

/// What a file held at one moment.
struct Look {
    content: SecretSlice<u8>,
    fingerprint: Fingerprint,
    modified: Option<SystemTime>,
}

impl SettledFile {
    /// Names the file. It need not exist yet.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), max_size: MAX_SIZE, believed: Arc::default() }
    }

    /// Sets the size up to which the file is read; 64 KiB by default. A larger file is an error.
    #[must_use]
    pub fn with_max_size(mut self, bytes: usize) -> Self {
        self.max_size = bytes;
        self
    }

    /// Returns the path of the file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the file once it has settled, and blocks this thread meanwhile: at start-up.
    ///
    /// # Errors
    ///
    /// Fails if the file cannot be read, is too large, or is still being written: after 6 seconds the first time, and 400
    /// milliseconds later on.
    pub fn read_blocking(&self) -> Result<SecretSlice<u8>, ConfigErrorKind> {
        let mut looks = Looks::default();
        loop {
            if let Some(settled) = looks.next(self, self.look()?) {
                return settled;
            }
            #[expect(clippy::disallowed_methods, reason = "the thread is blocked on purpose, as documented")]
            std::thread::sleep(INTERVAL);
        }
    }

    /// Reads the file once it has settled. The file system is accessed on tokio's blocking pool.
    ///
    /// # Errors
    ///
    /// As [`read_blocking`](Self::read_blocking), and if the runtime shuts down.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future changes nothing.
    pub async fn read(&self) -> Result<SecretSlice<u8>, ConfigErrorKind> {
        self.settled().await.map_err(|_| ConfigErrorKind::Unreadable { error: io::ErrorKind::Interrupted })?
    }

    /// Like [`read`](Self::read), with a separate error for a runtime that is missing or shuts down.
    pub(super) async fn settled(&self) -> Result<Result<SecretSlice<u8>, ConfigErrorKind>, SourceError> {
        if !has_timers() {
            let file = self.clone();
            return unblock(move || file.read_blocking()).await;
        }
        let mut looks = Looks::default();
        loop {
            let file = self.clone();
            let look = match unblock(move || file.look()).await? {
                Ok(look) => look,
                Err(kind) => return Ok(Err(kind)),
            };
            if let Some(settled) = looks.next(self, look) {
                return Ok(settled);
            }
            sleep(INTERVAL).await;
        }
    }

    fn look(&self) -> Result<Look, ConfigErrorKind> {
        let unreadable = |error: io::Error| ConfigErrorKind::Unreadable { error: error.kind() };
        let file = File::open(&self.path).map_err(unreadable)?;
        // Before the content: a write in between shows in the next look.
        let modified = file.metadata().and_then(|metadata| metadata.modified()).ok();
        // Sized up front: a buffer that grows leaves unwiped copies behind.
        let mut bytes = Zeroizing::new(Vec::with_capacity(self.max_size + 1));
        file.take(self.max_size as u64 + 1).read_to_end(&mut bytes).map_err(unreadable)?;
        if bytes.len() > self.max_size {
            return Err(ConfigErrorKind::TooLong { max_kib: self.max_size / 1024 });
        }
        let content = SecretSlice::new(Box::from(&**bytes));
        Ok(Look { content, fingerprint: Fingerprint::of(&bytes), modified })
    }
}

/// The looks of one read.
#[derive(Default)]
struct Looks {
    count: u32,
    last: Option<(Fingerprint, Option<SystemTime>)>,
}

impl Looks {
    /// Returns the content if it has settled, an error if that took too long, and otherwise `None`: look again later.
    fn next(&mut self, file: &SettledFile, look: Look) -> Option<Result<SecretSlice<u8>, ConfigErrorKind>> {
        let mut believed = file.believed.lock().unwrap_or_else(PoisonError::into_inner);
        let stamp = (look.fingerprint, look.modified);
        self.count += 1;
        let is_last = self.count >= if believed.is_some() { LOOKS } else { FIRST_LOOKS };
        let is_same = *believed == Some(look.fingerprint) || self.last.replace(stamp) == Some(stamp);
        let is_empty = look.content.expose_secret().is_empty();
        // A file that was just truncated is not worth an error yet.
        if (is_same && (!is_empty || is_last)) || is_old(look.modified) {
            if !is_empty {
                *believed = Some(look.fingerprint);
            }
            return Some(Ok(look.content));
        }
        is_last.then_some(Err(ConfigErrorKind::Unsettled))
    }
}

fn is_old(modified: Option<SystemTime>) -> bool {
    let now = Clock::default().now().wall;
    modified.is_some_and(|modified| now.duration_since(modified).is_ok_and(|age| age >= OLD))
}

impl fmt::Debug for SettledFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SettledFile").field(&self.path).finish()
    }
}
