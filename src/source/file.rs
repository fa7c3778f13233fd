//! [`FileSource`]: a credential from a file that is replaced when the credential is rotated.

use std::{
    marker::PhantomData,
    path::{Path, PathBuf},
    time::Duration,
};

use secrecy::{ExposeSecret, SecretSlice};

use super::{Fetched, Reason, SettledFile, Source, SourceError};
use crate::{
    credential::Credential,
    error::{ConfigError, ConfigErrorKind, Place},
};

/// So that a new credential is used within a second: a read may overlook it in its last 200 milliseconds, and the next one
/// takes another 200.
const RECHECK: Duration = Duration::from_millis(500);

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// A [`Source`] that reads one credential from a file which is replaced on rotation: a Kubernetes secret
/// volume, or a file that an agent writes.
///
/// While requests are made, the file is re-read at most twice a second, and also when the API rejects the
/// credential, so that a new credential is used within a second. A file that is just being written is never read in half: see [`SettledFile`]. If it is missing, empty, still
/// being written or holds no valid credential, reading fails and the previous credential stays in use until it expires. A
/// byte order mark and a trailing newline are trimmed.
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
    file: SettledFile,
    credential: PhantomData<fn() -> C>,
}

impl<C> FileSource<C> {
    /// Reads the credential from the file at `path`.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { file: SettledFile::new(path), credential: PhantomData }
    }

    /// Returns the path of the file.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.file.path()
    }
}

impl<C: Credential> FileSource<C> {
    /// Reads the file now and blocks this thread: for a program that must not start without it. If the file is just being
    /// written, waits for up to 6 seconds.
    ///
    /// # Errors
    ///
    /// Fails if the file cannot be read or holds no valid credential. The error names the file.
    pub fn read(&self) -> Result<C, ConfigError> {
        self.parse(self.file.read_blocking())
    }

    fn parse(&self, content: Result<SecretSlice<u8>, ConfigErrorKind>) -> Result<C, ConfigError> {
        let place = || Place::File(self.path().to_owned());
        let content = content.map_err(|kind| C::refuse(place(), kind))?;
        let text = text(&content).map_err(|kind| C::refuse(place(), kind))?;
        C::parse(text, place())
    }
}

impl<C: Credential> Source<C> for FileSource<C> {
    async fn fetch(&self, _: Reason<C>) -> Result<Fetched<C>, SourceError> {
        let credential = self
            .parse(self.file.settled().await?)
            .map_err(|error| SourceError::transient(error).with_retry_after(RECHECK))?;
        Ok(Fetched::new(credential).with_recheck_after(RECHECK))
    }
}

/// The text of a file, without a byte order mark.
pub(super) fn text(bytes: &SecretSlice<u8>) -> Result<&str, ConfigErrorKind> {
    let bytes = bytes.expose_secret();
    let bytes = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes);
    std::str::from_utf8(bytes).map_err(|_| ConfigErrorKind::NotUnicode)
}
