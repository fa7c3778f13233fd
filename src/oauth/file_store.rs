//! [`FileStore`]: a refresh token in a file that several programs share.

use std::{
    fs::{self, File, Metadata},
    hash::{DefaultHasher, Hash, Hasher},
    io::{self, ErrorKind, Read, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use zeroize::Zeroizing;

use super::{RefreshToken, RefreshTokenStore, StoreLock};
use crate::{
    error::BoxError,
    source::unblock,
    util::{
        private_file::{self, create_directory, describe, recreate},
        timer::{TimeoutError, timeout},
    },
};

/// How long to wait for a program that uses the login. Less than the default timeout of a refresh.
const LOCK_PATIENCE: Duration = Duration::from_secs(20);

/// Larger than any refresh token.
const MAX_SIZE: usize = 64 * 1024;

/// How many symbolic links are followed, as Linux does.
const MAX_LINKS: usize = 40;

/// Keeps a refresh token in a file, for programs that end and start again, several at a time.
///
/// ```
/// use tower_selam::oauth::{FileStore, RefreshToken, RefreshTokenStore};
///
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// # let directory = std::env::temp_dir().join(format!("tower-selam-login-{}", std::process::id()));
/// let store = FileStore::new(directory.join("login"));
/// assert!(store.load().await?.is_none());
///
/// store.replace(&RefreshToken::new("from-the-login")?).await?;
/// assert_eq!(store.load().await?.unwrap().expose_secret(), "from-the-login");
/// # std::fs::remove_dir_all(directory)?;
/// # Ok::<(), tower_selam::BoxError>(())
/// # }).unwrap();
/// ```
///
/// # What it promises
///
/// - **One program at a time** exchanges the token, and the next one loads what the first has saved. The lock is the
///   operating system's, on a second file with the suffix `.lock`. It is released when its holder ends, even if it is killed. A
///   program waits for at most 20 seconds.
/// - **The file is always whole**: a token is written to a third file with the suffix `.next`, synchronized with the disk,
///   and renamed. A program that is killed in between leaves a whole token in either file, and the next one finds the newer.
/// - **A full disk is noticed before a token is spent**: the space for the next token is reserved first.
/// - **Only its owner can read it**: on Unix all three files are created with mode 0600, and missing directories with 0700. A
///   file that others can read or write is refused; `chmod 600` makes it usable. On Windows the files inherit the access
///   rights of their directory, which should be in the user's profile.
/// - **A symbolic link stays one**: the file that it points to is replaced, and programs that use either name exclude each
///   other.
///
/// The file holds the token and a newline. To log in, write it there, or call [`replace`](Self::replace), which also waits for
/// an exchange that is running. Either ends the permanent failure of a previous login. To log out, delete the file.
///
/// The directory must be on a file system with locks and atomic renames. That includes NFS version 4; if in doubt, choose a local
/// one. Copies of the file on several machines are several logins with one token, which ends in its reuse.
///
/// Clones share their state, and several stores over one file exclude each other as programs do. File operations run on
/// tokio's blocking threads; dropping a call is safe at any point.
#[derive(Clone, Debug)]
pub struct FileStore {
    path: Arc<Path>,
    initial: Option<RefreshToken>,
    shared: Arc<Mutex<Shared>>,
}

/// What the clones of a store share.
#[derive(Debug)]
struct Shared {
    /// The state of the file when this process last read or wrote it.
    seen: u64,
    /// How often another program has changed the file.
    changes: u64,
    /// The lock, while this process holds it.
    lock: Weak<File>,
}

impl FileStore {
    /// Keeps the token in the file at `path`, which does not have to exist.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let path: Arc<Path> = path.into().into();
        let shared = Shared { seen: state_of(&path), changes: 0, lock: Weak::new() };
        Self { path, initial: None, shared: Arc::new(Mutex::new(shared)) }
    }

    /// Sets the token to start with as long as there is no file, for example from a variable that a deployment sets.
    #[must_use]
    pub fn with_initial(mut self, token: RefreshToken) -> Self {
        self.initial = Some(token);
        self
    }

    /// Returns the path of the file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Stores the token of a new login.
    ///
    /// # Errors
    ///
    /// Fails if another program uses the previous login for more than 20 seconds, or if the file cannot be written.
    pub async fn replace(&self, token: &RefreshToken) -> Result<(), BoxError> {
        let (lock, token) = (self.lock_file().await?, token.clone());
        // `version` is to change, so the file counts as changed by another program.
        let replacing = self.blocking(move |files| {
            let _lock = lock;
            files.write(&token)
        });
        replacing.await.map(drop)
    }

    async fn lock_file(&self) -> Result<Arc<File>, BoxError> {
        let locking = private_file::lock(|| self.blocking(|files| files.try_lock()));
        match timeout(LOCK_PATIENCE, locking).await {
            Ok(locked) => locked.map(Arc::new),
            Err(error @ TimeoutError::NoTimers) => Err(error.into()),
            Err(TimeoutError::Elapsed) => {
                let path = self.path.display();
                Err(format!("another program has locked {path} for {LOCK_PATIENCE:?}").into())
            }
        }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Files) -> Result<T, BoxError> + Send + 'static,
    ) -> Result<T, BoxError> {
        let path = Arc::clone(&self.path);
        unblock(move || call(&Files::of(&path)?)).await?
    }

    /// Records the state of the file that this process has read, or written itself.
    fn saw(&self, state: u64, is_own_change: bool) {
        let mut shared = self.shared();
        if state != shared.seen && !is_own_change {
            shared.changes += 1;
        }
        shared.seen = state;
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RefreshTokenStore for FileStore {
    async fn lock(&self) -> Result<StoreLock, BoxError> {
        let lock = self.lock_file().await?;
        self.shared().lock = Arc::downgrade(&lock);
        Ok(StoreLock::new(lock))
    }

    async fn load(&self) -> Result<Option<RefreshToken>, BoxError> {
        let store = self.clone();
        let held = self.blocking(move |files| {
            // Before the file is read, so that a change after that is noticed.
            store.saw(state_of(&files.token), false);
            files.read()
        });
        Ok(held.await?.or_else(|| self.initial.clone()))
    }

    async fn save(&self, token: &RefreshToken, replaced: &RefreshToken) -> Result<(), BoxError> {
        let held = self.shared().lock.upgrade();
        let lock = match held {
            Some(lock) => lock,
            None => self.lock_file().await?,
        };
        let (store, token, replaced) = (self.clone(), token.clone(), replaced.clone());
        self.blocking(move |files| {
            // Here, because the call may be dropped before this ends.
            let _lock = lock;
            let held = files.read().map(|held| held.or_else(|| store.initial.clone()));
            let is = |token: &RefreshToken| token.fingerprint() == replaced.fingerprint();
            // A file that cannot be read any more holds no other login.
            if held.is_err() || held.is_ok_and(|held| held.as_ref().is_some_and(is)) {
                store.saw(files.write(&token)?, true);
            }
            Ok(())
        })
        .await
    }

    /// Looks at the file's metadata.
    fn version(&self) -> u64 {
        let state = state_of(&self.path);
        let shared = self.shared();
        shared.changes + u64::from(state != shared.seen)
    }
}

/// Returns a number that changes with the file, without reading it.
fn state_of(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| state(&metadata))
}

fn state(metadata: &Metadata) -> u64 {
    let mut hasher = DefaultHasher::new();
    (metadata.len(), metadata.modified().ok()).hash(&mut hasher);
    #[cfg(unix)]
    std::os::unix::fs::MetadataExt::ino(metadata).hash(&mut hasher);
    hasher.finish()
}

/// The three files of a login. All calls block.
struct Files {
    token: PathBuf,
    next: PathBuf,
    lock: PathBuf,
}

impl Files {
    /// Follows symbolic links, so that the lock has the same name for all programs, and creates a missing directory.
    fn of(path: &Path) -> Result<Self, BoxError> {
        let mut path = path.to_owned();
        for _ in 0..MAX_LINKS {
            let Ok(target) = fs::read_link(&path) else { break };
            path = path.parent().unwrap_or(Path::new("")).join(target);
        }
        let name = path.file_name().ok_or_else(|| format!("{} does not name a file", path.display()))?;
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        create_directory(parent)?;
        let parent = parent.canonicalize().map_err(|error| describe("find", parent, &error))?;
        let with = |suffix: &str| {
            let mut name = name.to_owned();
            name.push(suffix);
            parent.join(name)
        };
        Ok(Self { token: with(""), next: with(".next"), lock: with(".lock") })
    }

    /// Takes the lock and prepares for an exchange; `None` if another program has it.
    fn try_lock(&self) -> Result<Option<File>, BoxError> {
        let Some(file) = private_file::try_lock(&self.lock)? else { return Ok(None) };
        self.recover()?;
        self.reserve().map_err(|error| describe("write", &self.next, &error))?;
        Ok(Some(file))
    }

    /// Completes the saving of a program that was killed before it renamed the file.
    fn recover(&self) -> Result<(), BoxError> {
        // Half a token, or none, does not count.
        let is_whole = read(&self.next).is_ok_and(|text| {
            text.split_once('\n').is_some_and(|(token, rest)| {
                !token.trim_matches('\0').is_empty() && rest.bytes().all(|byte| byte == 0)
            })
        });
        let modified = |path| fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
        // An older one belongs to a previous login.
        if is_whole && modified(&self.next) >= modified(&self.token) {
            private_file::publish(&self.next, &self.token)
                .map_err(|error| describe("replace", &self.token, &error))?;
        }
        Ok(())
    }

    /// Fills the next file with as much as the next token may need, and nothing that can be taken for one.
    fn reserve(&self) -> io::Result<()> {
        let length = fs::metadata(&self.token).map_or(0, |metadata| metadata.len());
        let padding = vec![0; usize::try_from(length).unwrap_or(MAX_SIZE).clamp(2048, MAX_SIZE) * 2];
        let mut file = recreate(&self.next)?;
        file.write_all(&padding)?;
        file.sync_data()
    }

    fn read(&self) -> Result<Option<RefreshToken>, BoxError> {
        let text = match read(&self.token) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(describe("read", &self.token, &error).into()),
        };
        // A recovered token is followed by the space that was reserved for it.
        let text = text.trim_start_matches('\u{feff}').trim_end_matches('\0');
        if text.trim().is_empty() {
            return Err(format!("{} is empty: log in again", self.token.display()).into());
        }
        // An endpoint may issue tokens that nobody would type.
        let issued =
            || RefreshToken::received(Zeroizing::new(text.strip_suffix('\n').unwrap_or(text).to_owned()));
        Ok(RefreshToken::new(text).ok().or_else(issued))
    }

    /// Replaces the token, and returns the state of the file. Needs the lock.
    fn write(&self, token: &RefreshToken) -> Result<u64, BoxError> {
        let write = || {
            // The space is reserved, unless this is the second attempt.
            let mut file = match private_file::options().open(&self.next) {
                Err(error) if error.kind() == ErrorKind::NotFound => recreate(&self.next)?,
                opened => opened?,
            };
            let line = Zeroizing::new(format!("{}\n", token.expose_secret()).into_bytes());
            file.write_all(&line)?;
            file.set_len(line.len() as u64)?;
            file.sync_all()?;
            let state = state(&file.metadata()?);
            private_file::publish(&self.next, &self.token)?;
            Ok(state)
        };
        Ok(write().map_err(|error| describe("replace", &self.token, &error))?)
    }
}

/// Reads the text of a file that only its owner may read.
fn read(path: &Path) -> io::Result<Zeroizing<String>> {
    let file = private_file::open(path)?;
    // Sized up front: a buffer that grows leaves unwiped copies behind.
    let mut text = Zeroizing::new(String::with_capacity(MAX_SIZE + 1));
    file.take(MAX_SIZE as u64 + 1).read_to_string(&mut text)?;
    if text.len() > MAX_SIZE {
        return Err(io::Error::new(ErrorKind::InvalidData, "it is too long for a refresh token"));
    }
    Ok(text)
}
