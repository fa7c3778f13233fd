//! K1: keys and tokens in files that are replaced.

use std::{
    env, fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering::SeqCst},
    time::Duration,
};

use tower_selam::{
    ApiKey, RenewalPolicy, Renewing, SelamLayer, TestClock,
    source::{EnvSource, FileSource, Reason, Source},
};

use crate::{
    environment::{CASE, run, tell},
    support::{MODELS, get, send, values},
};

/// A directory of one test's own, gone afterwards.
pub(crate) struct Directory(PathBuf);

impl Directory {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("tower-selam-{}-{}", std::process::id(), NEXT.fetch_add(1, SeqCst));
        let path = env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.0.join("key")
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn read(path: &Path) -> Result<String, String> {
    let key = FileSource::<ApiKey>::new(path).read();
    key.map(|key| key.expose_secret().to_owned()).map_err(|error| error.to_string())
}

#[test]
fn k1_a_byte_order_mark_and_line_ends_are_read() {
    let directory = Directory::new();
    let file = directory.file();
    for text in ["sk-selam-a", "sk-selam-a\n", "sk-selam-a\r\n", "\u{feff}sk-selam-a\r\n", "  sk-selam-a \n"]
    {
        fs::write(&file, text).unwrap();
        assert_eq!(read(&file).unwrap(), "sk-selam-a", "{text:?}");
    }
}

#[test]
fn k1_a_file_that_is_no_good_is_named_and_its_content_is_not() {
    let directory = Directory::new();
    let file = directory.file();
    let named = format!("API key from the file {}", file.display());
    assert_eq!(read(&file).unwrap_err(), format!("{named} cannot be read: entity not found"));
    for (content, said) in [
        (&b""[..], "is empty"),
        (b"\n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"secret secret", "has white space at byte 6"),
        (b"secret\nsecret\n", "has a control character at byte 6"),
        (b"secret\xff", "is not valid Unicode"),
        (&[b'a'; 70_000], "is longer than 64 KiB"),
    ] {
        fs::write(&file, content).unwrap();
        assert_eq!(read(&file).unwrap_err(), format!("{named} {said}"));
    }
    assert!(read(&directory.0).unwrap_err().contains("cannot be read"));
}

/// An engine over the file, after its first reading; real time stands still for it.
async fn engine(file: &Path) -> (Renewing<ApiKey>, TestClock) {
    let clock = TestClock::new(std::time::UNIX_EPOCH + Duration::from_secs(1_900_000_000));
    let policy = RenewalPolicy::new().with_clock(clock.clone());
    let keys = Renewing::with_policy(FileSource::new(file), policy);
    keys.prefetch().await.unwrap();
    (keys, clock)
}

/// What a request gets that is made a while later.
async fn later(keys: &Renewing<ApiKey>, clock: &TestClock) -> String {
    clock.jump(Duration::from_millis(2_100));
    keys.api_key().await.unwrap().expose_secret().to_owned()
}

#[tokio::test]
async fn k1_a_file_that_is_replaced_truncated_or_deleted_is_followed() {
    let directory = Directory::new();
    let file = directory.file();
    fs::write(&file, "sk-selam-one").unwrap();
    let (keys, clock) = engine(&file).await;
    assert_eq!(later(&keys, &clock).await, "sk-selam-one");

    let beside = directory.0.join("next");
    fs::write(&beside, "sk-selam-two\n").unwrap();
    fs::rename(&beside, &file).unwrap();
    assert_eq!(later(&keys, &clock).await, "sk-selam-two", "replaced atomically");

    fs::write(&file, "").unwrap();
    assert_eq!(later(&keys, &clock).await, "sk-selam-two", "truncated: the last good one");
    fs::remove_file(&file).unwrap();
    assert_eq!(later(&keys, &clock).await, "sk-selam-two", "deleted: the last good one");

    fs::write(&file, "sk-selam-three").unwrap();
    // After a failure the old one is served while the file is read beside.
    let mut found = later(&keys, &clock).await;
    for _ in 0..1_000_000 {
        if found == "sk-selam-three" {
            break;
        }
        tokio::task::yield_now().await;
        found = keys.api_key().await.unwrap().expose_secret().to_owned();
    }
    assert_eq!(found, "sk-selam-three");
}

#[cfg(unix)]
#[tokio::test]
async fn k1_a_secret_volume_whose_symlink_is_swapped_is_followed() {
    use std::os::unix::fs::symlink;

    let directory = Directory::new();
    let at = |name: &str| directory.0.join(name);
    for (version, key) in [("..1", "sk-selam-one"), ("..2", "sk-selam-two")] {
        fs::create_dir(at(version)).unwrap();
        fs::write(at(version).join("key"), key).unwrap();
    }
    symlink("..1", at("..data")).unwrap();
    symlink("..data/key", at("key")).unwrap();
    let (keys, clock) = engine(&at("key")).await;
    assert_eq!(later(&keys, &clock).await, "sk-selam-one");
    symlink("..2", at("..data_tmp")).unwrap();
    fs::rename(at("..data_tmp"), at("..data")).unwrap();
    assert_eq!(later(&keys, &clock).await, "sk-selam-two");
}

#[tokio::test]
async fn k1_a_rejected_key_is_read_again_at_once() {
    let directory = Directory::new();
    let file = directory.file();
    fs::write(&file, "sk-selam-one").unwrap();
    let (keys, _) = engine(&file).await;
    let first = keys.api_key().await.unwrap();
    fs::write(&file, "sk-selam-two").unwrap();
    keys.invalidate(&first);
    assert_eq!(keys.api_key().await.unwrap().expose_secret(), "sk-selam-two");
}

#[test]
fn k1_a_variable_that_the_program_sets_is_read_when_it_is_asked_for() {
    const NAME: &str = "files::k1_a_variable_that_the_program_sets_is_read_when_it_is_asked_for";
    if env::var(CASE).is_ok() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let source = EnvSource::<ApiKey>::api_key();
        return tell(&match runtime.block_on(source.fetch(Reason::First)) {
            Ok(fetched) => format!("{fetched:?}"),
            Err(error) => error.to_string(),
        });
    }
    assert!(run(NAME, "set", &[("SELAM_API_KEY", "sk-selam-example")]).contains("[redacted] id=9da0f3"));
    assert_eq!(run(NAME, "unset", &[]), "API key from the environment variable SELAM_API_KEY is not set");
}

#[test]
fn k1_the_environment_names_files() {
    const NAME: &str = "files::k1_the_environment_names_files";
    if env::var(CASE).is_ok() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        return tell(&match SelamLayer::from_env() {
            Ok(layer) => {
                let sent = runtime.block_on(send(&layer, get(MODELS))).unwrap();
                format!("{:?} {:?}", values(&sent, "authorization"), values(&sent, "x-api-key"))
            }
            Err(error) => error.to_string(),
        });
    }
    let directory = Directory::new();
    let (key, jwt) = (directory.file(), directory.0.join("jwt"));
    fs::write(&key, "sk-selam-from-a-file\n").unwrap();
    fs::write(&jwt, "a.j.wt\n").unwrap();
    let (key, jwt) = (key.to_str().unwrap(), jwt.to_str().unwrap());
    assert_eq!(
        run(NAME, "both", &[("SELAM_API_KEY_FILE", key), ("SELAM_JWT_FILE", jwt)]),
        r#"["Bearer a.j.wt"] ["sk-selam-from-a-file"]"#
    );
    assert_eq!(
        run(NAME, "twice", &[("SELAM_API_KEY_FILE", key), ("SELAM_API_KEY", "sk-selam-x")]),
        "API key from the environment variable SELAM_API_KEY is set beside SELAM_API_KEY_FILE: set one of the two"
    );
    assert_eq!(
        run(NAME, "empty", &[("SELAM_API_KEY_FILE", "")]),
        "API key from the environment variable SELAM_API_KEY_FILE is empty"
    );
    let missing = run(NAME, "missing", &[("SELAM_API_KEY_FILE", "/nowhere/key")]);
    assert_eq!(missing, "API key from the file /nowhere/key cannot be read: entity not found");
}
