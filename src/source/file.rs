use std::{
    io::{self, Read},
    marker::PhantomData,
    path::{Path, PathBuf},
    time::Duration,
};

use zeroize::Zeroizing;

use super::{Fetched, Reason, Source, SourceError};
use crate::{ConfigError, ConfigErrorKind, credential::Credential, error::Place};

/// No key and no token is larger.
const LIMIT: u64 = 64 * 1024;

const RECHECK: Duration = Duration::from_secs(1);

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// A [`Source`] of a file that holds one credential and is replaced when that is rotated: a secret volume of
/// Kubernetes, or what an agent beside the program writes.
///
/// It is read anew at most once a second while requests are made, and when the API has refused what it held.
/// A file that is missing, empty or holds no valid credential is an error; what was read before is used on
/// until it expires. A byte order mark and a line end are trimmed.
///
/// ```
/// use tower_selam::{ApiKey, Refreshing, source::FileSource};
///
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// # let path = std::env::temp_dir().join(format!("tower-selam-doc-{}", std::process::id()));
/// std::fs::write(&path, "sk-selam-from-a-file\n")?;
/// let keys: Refreshing<ApiKey> = Refreshing::new(FileSource::new(&path));
/// assert_eq!(keys.api_key().await?.expose_secret(), "sk-selam-from-a-file");
/// # std::fs::remove_file(&path)?;
/// # Ok::<(), tower_selam::BoxError>(())
/// # }).unwrap();
/// ```
#[derive(Clone, Debug)]
pub struct FileSource<C> {
    path: PathBuf,
    credential: PhantomData<fn() -> C>,
}

impl<C> FileSource<C> {
    /// The credential in the file at `path`.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), credential: PhantomData }
    }

    /// Where the file is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl<C: Credential> FileSource<C> {
    /// Reads the file now, on this thread: for a program that will not start without it.
    ///
    /// # Errors
    ///
    /// When it cannot be read or holds no valid credential; the error names the file.
    pub fn read(&self) -> Result<C, ConfigError> {
        let place = || Place::File(self.path.clone());
        let text = read(&self.path).map_err(|kind| C::refuse(place(), kind))?;
        C::parse(text, place())
    }
}

impl<C: Credential> Source<C> for FileSource<C> {
    async fn fetch(&self, _: Reason<C>) -> Result<Fetched<C>, SourceError> {
        let file = Self::new(&self.path);
        let read = tokio::task::spawn_blocking(move || file.read());
        let credential = read.await.map_err(SourceError::transient)?;
        let credential =
            credential.map_err(|error| SourceError::transient(error).with_retry_after(RECHECK))?;
        Ok(Fetched::new(credential).with_recheck_after(RECHECK))
    }
}

/// What the file holds. Of the right size from the start: a buffer that grows leaves copies behind.
pub(super) fn read(path: &Path) -> Result<String, ConfigErrorKind> {
    let unreadable = |error: io::Error| ConfigErrorKind::Unreadable { error: error.kind() };
    let mut file = std::fs::File::open(path).map_err(unreadable)?;
    let mut bytes = Zeroizing::new(Vec::with_capacity(LIMIT as usize + 1));
    Read::by_ref(&mut file).take(LIMIT + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > LIMIT {
        return Err(ConfigErrorKind::TooLong);
    }
    let bytes = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&bytes);
    std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| ConfigErrorKind::NotUnicode)
}
