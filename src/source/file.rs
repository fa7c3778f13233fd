//! [`FileSource`]: a credential from a file that is replaced when the credential is rotated.

use std::{
    fs::File,
    io::{self, Read},
    marker::PhantomData,
    path::{Path, PathBuf},
    time::Duration,
};

use zeroize::Zeroizing;

use super::{Fetched, Reason, Source, SourceError, unblock};
use crate::{
    credential::Credential,
    error::{ConfigError, ConfigErrorKind, Place},
};

/// Larger than any key or token.
const MAX_SIZE: usize = 64 * 1024;

const RECHECK: Duration = Duration::from_secs(1);

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// A [`Source`] that reads one credential from a file which is replaced on rotation: a Kubernetes secret
/// volume, or a file that an agent writes.
///
/// While requests are made, the file is re-read at most once a second, and also when the API rejects the
/// credential. If it is missing, empty or holds no valid credential, reading fails and the previous credential
/// stays in use until it expires. A byte order mark and a trailing newline are trimmed.
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
    /// Reads the credential from the file at `path`.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), credential: PhantomData }
    }

    /// Returns the path of the file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl<C: Credential> FileSource<C> {
    /// Reads the file now and blocks this thread: for a program that must not start without it.
    ///
    /// # Errors
    ///
    /// Fails if the file cannot be read or holds no valid credential. The error names the file.
    pub fn read(&self) -> Result<C, ConfigError> {
        let place = || Place::File(self.path.clone());
        let text = read(&self.path).map_err(|kind| C::refuse(place(), kind))?;
        C::parse(&Zeroizing::new(text), place())
    }
}

impl<C: Credential> Source<C> for FileSource<C> {
    async fn fetch(&self, _: Reason<C>) -> Result<Fetched<C>, SourceError> {
        let file = Self::new(&self.path);
        let credential = unblock(move || file.read())
            .await?
            .map_err(|error| SourceError::transient(error).with_retry_after(RECHECK))?;
        Ok(Fetched::new(credential).with_recheck_after(RECHECK))
    }
}

/// Reads the text of a file that holds a secret.
pub(super) fn read(path: &Path) -> Result<String, ConfigErrorKind> {
    let unreadable = |error: io::Error| ConfigErrorKind::Unreadable { error: error.kind() };
    let file = File::open(path).map_err(unreadable)?;
    // Sized up front: a buffer that grows leaves unwiped copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_SIZE + 1));
    file.take(MAX_SIZE as u64 + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() > MAX_SIZE {
        return Err(ConfigErrorKind::TooLong);
    }
    let bytes = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&bytes);
    std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| ConfigErrorKind::NotUnicode)
}
