//! N6: the stores of a fleet: what each has to do, and the files of `FileStore`.

#[cfg(any(unix, windows))]
use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Child, Command},
    time::{Duration, SystemTime},
};

use tower_selam::fleet::MemoryStore;
#[cfg(any(unix, windows))]
use tower_selam::fleet::{FileStore, FleetStore, Put, Write};

#[cfg(any(unix, windows))]
use crate::{environment::CASE, files::Directory};

mod contract;

use contract::{contract, revision};

contract!(memory, ((), MemoryStore::default()));

#[cfg(any(unix, windows))]
contract!(files, {
    let directory = Directory::new();
    let store = FileStore::new(directory.path().join("a").join("fleet"));
    (directory, store)
});

const KEY: &str = "selam:billing:name";

async fn put(store: &impl FleetStore, key: &str, write: Write<'_>) {
    assert!(matches!(store.put(key, write).await.unwrap(), Put::Done), "{key}");
}

/// The files that hold an entry each.
fn records(directory: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(directory).unwrap().map(|file| file.unwrap().path());
    files.filter(|file| file.extension().is_some_and(|extension| extension == "record")).collect()
}

/// The file of the only entry.
fn record(directory: &Path) -> PathBuf {
    let records = records(directory);
    assert_eq!(records.len(), 1, "{records:?}");
    records[0].clone()
}

/// N6: programs that count together lose no step.
#[tokio::test]
async fn programs_exclude_each_other() {
    const NAME: &str = "fleet_stores::programs_exclude_each_other";
    const PROGRAMS: u8 = 4;
    const STEPS: u8 = 20;
    if let Ok(directory) = env::var(CASE) {
        let store = FileStore::new(directory);
        let mut counted = 0;
        while counted < STEPS {
            let (expected, count) = match store.get(KEY).await.unwrap() {
                Some(entry) => (Some(entry.revision), entry.value[0]),
                None => (None, 0),
            };
            let value = [count + 1];
            let write = Write::new(expected, revision(count + 1), &value);
            counted += u8::from(matches!(store.put(KEY, write).await.unwrap(), Put::Done));
        }
        return;
    }
    let directory = Directory::new();
    let start = |_| {
        let mut program = Command::new(env::current_exe().unwrap());
        program.args(["--exact", NAME]).env(CASE, directory.path()).spawn().unwrap()
    };
    let programs: Vec<Child> = (0..PROGRAMS).map(start).collect();
    for mut program in programs {
        assert!(program.wait().unwrap().success());
    }
    let entry = FileStore::new(directory.path()).get(KEY).await.unwrap().unwrap();
    assert_eq!(entry.value, [PROGRAMS * STEPS]);
}

/// N6: a put waits for another program's lock, without a thread, and can be given up.
#[tokio::test]
async fn a_locked_directory_blocks_no_thread() {
    use tower_selam::oauth::{FileStore as Login, RefreshTokenStore};

    let directory = Directory::new();
    let store = FileStore::new(directory.path());
    // The file of this login's lock has the same name.
    let lock = Login::new(directory.path().join("fleet")).lock().await.unwrap();
    let write = Write::new(None, revision(1), b"value");
    assert!(tokio::time::timeout(Duration::from_millis(50), store.put(KEY, write)).await.is_err());
    assert!(store.get(KEY).await.unwrap().is_none());
    drop(lock);
    put(&store, KEY, write).await;
}

/// N6
#[cfg(unix)]
#[tokio::test]
async fn only_their_owner_can_use_the_files() {
    use std::os::unix::fs::PermissionsExt;

    let directory = Directory::new();
    let path = directory.path().join("fleet");
    let store = FileStore::new(&path);
    put(&store, KEY, Write::new(None, revision(1), b"value")).await;
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&path), 0o700);
    for file in fs::read_dir(&path).unwrap() {
        let file = file.unwrap().path();
        assert_eq!(mode(&file), 0o600, "{}", file.display());
    }

    fs::set_permissions(record(&path), PermissionsExt::from_mode(0o640)).unwrap();
    let refused = store.get(KEY).await.unwrap_err().to_string();
    assert!(refused.contains("others may use it (mode 0640); run `chmod 600` on it"), "{refused}");
    let write = Write::new(Some(revision(1)), revision(2), b"x");
    assert_eq!(store.put(KEY, write).await.unwrap_err().to_string(), refused);
}

/// N6: what a killed program or a full disk left behind is replaced.
#[tokio::test]
async fn incomplete_files_hold_nothing() {
    let directory = Directory::new();
    let store = FileStore::new(directory.path());
    put(&store, KEY, Write::new(None, revision(1), b"value")).await;
    let file = record(directory.path());
    fs::write(directory.path().join("fleet.next"), "half a rec").unwrap();
    put(&store, KEY, Write::new(Some(revision(1)), revision(2), b"value")).await;

    let whole = fs::read(&file).unwrap();
    for length in [0, 1, whole.len() - b"value".len() - 1] {
        fs::write(&file, &whole[..length]).unwrap();
        assert!(store.get(KEY).await.unwrap().is_none(), "{length}");
    }
    put(&store, KEY, Write::new(None, revision(3), b"value")).await;
}

/// N6: a file in another format is neither used nor replaced.
#[tokio::test]
async fn files_of_other_versions_are_left_alone() {
    let directory = Directory::new();
    let store = FileStore::new(directory.path());
    put(&store, KEY, Write::new(None, revision(1), b"value")).await;
    let file = record(directory.path());
    let mut content = fs::read(&file).unwrap();
    content[0] += 1;
    fs::write(&file, &content).unwrap();
    for expected in [None, Some(revision(1))] {
        let put = store.put(KEY, Write::new(expected, revision(2), b"x")).await;
        assert!(put.unwrap_err().to_string().starts_with("another version of tower-selam wrote "));
    }
    assert_eq!(fs::read(&file).unwrap(), content);
}

/// N6: expired entries do not pile up.
#[tokio::test]
async fn expired_entries_are_removed() {
    const SOON: Duration = Duration::from_millis(1);
    let directory = Directory::new();
    let store = FileStore::new(directory.path());
    for user in 0..10 {
        let write = Write::new(None, revision(1), b"value");
        let write = if user < 8 { write.with_keep(SOON) } else { write };
        put(&store, &format!("selam:billing:{user}"), write).await;
    }
    let theirs = directory.path().join("notes.record");
    fs::write(&theirs, "not of a fleet").unwrap();
    while store.get("selam:billing:7").await.unwrap().is_some() {}
    put(&store, KEY, Write::new(None, revision(1), b"value")).await;
    assert_eq!(records(directory.path()).len(), 12, "it is done once an hour");

    let lock = fs::File::options().write(true).open(directory.path().join("fleet.lock")).unwrap();
    #[allow(clippy::disallowed_methods, reason = "sets a file's time")]
    lock.set_modified(SystemTime::now() - Duration::from_secs(3601)).unwrap();
    put(&store, KEY, Write::new(Some(revision(1)), revision(2), b"value")).await;
    assert_eq!(records(directory.path()).len(), 4);
    assert!(theirs.exists() && store.get("selam:billing:8").await.unwrap().is_some());
}
