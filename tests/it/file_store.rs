//! K5: `FileStore`: exclusion, permissions, and programs that are killed.

use std::{
    env, fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use tokio::{runtime::Builder, time::timeout};
use tokio_test::{assert_ready_err, task::spawn};
use tower_selam::{
    AuthErrorKind, Refreshing,
    oauth::{ClientAuth, FileStore, OAuthSource, RefreshToken, RefreshTokenStore, TokenEndpoint},
    simulator::Simulator,
};

use crate::{
    environment::CASE,
    files::Directory,
    support::{Body, HANG},
};

const SHORT: Duration = Duration::from_millis(100);

fn token(text: &str) -> RefreshToken {
    RefreshToken::new(text).unwrap()
}

async fn held(store: &FileStore) -> Option<String> {
    store.load().await.unwrap().map(|token| token.expose_secret().to_owned())
}

fn beside(file: &Path, suffix: &str) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// The file of a login in a directory that does not exist yet.
fn login(directory: &Directory) -> PathBuf {
    directory.path().join("a").join("b").join("login")
}

#[cfg(unix)]
fn mode(path: &Path) -> u32 {
    std::os::unix::fs::MetadataExt::mode(&fs::metadata(path).unwrap()) & 0o777
}

#[cfg(unix)]
fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
}

#[tokio::test]
async fn token_is_kept() {
    let directory = Directory::new();
    let file = login(&directory);
    let store = FileStore::new(&file);
    assert_eq!(held(&store).await, None);
    for next in ["first", "a b", "with+/=.~"] {
        store.replace(&token(next)).await.unwrap();
        assert_eq!(held(&FileStore::new(&file)).await.as_deref(), Some(next));
        assert_eq!(fs::read_to_string(&file).unwrap(), format!("{next}\n"));
    }
    // The initial token counts only without a file.
    let store = FileStore::new(&file).with_initial(token("initial"));
    assert_eq!(held(&store).await.as_deref(), Some("with+/=.~"));
    fs::remove_file(&file).unwrap();
    assert_eq!(held(&store).await.as_deref(), Some("initial"));
}

/// A file that people and other programs have written.
#[tokio::test]
async fn handwritten_files_are_read() {
    let directory = Directory::new();
    let file = directory.file();
    let store = FileStore::new(&file);
    store.replace(&token("x")).await.unwrap();
    for (content, expected) in [
        ("token", Some("token")),
        ("token\n", Some("token")),
        ("token\r\n", Some("token")),
        (" token \n", Some("token")),
        ("\u{feff}token\n", Some("token")),
        ("token\n\0\0\0", Some("token")),
        ("t\u{f6}ken\n", Some("t\u{f6}ken")),
        ("", None),
        ("\n", None),
        (" \r\n", None),
        ("\0\0\0\0", None),
    ] {
        fs::write(&file, content).unwrap();
        let loaded = store.load().await.map(|token| token.unwrap().expose_secret().to_owned());
        assert_eq!(loaded.ok().as_deref(), expected, "{content:?}");
    }
    fs::write(&file, "x".repeat(70_000)).unwrap();
    assert!(store.load().await.unwrap_err().to_string().contains("too long"));
    fs::write(&file, b"\xff\xfe").unwrap();
    assert!(store.load().await.is_err());
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    assert!(store.load().await.unwrap_err().to_string().contains("not a file"));
}

/// Only the owner may read the files and the directories that the store makes.
#[cfg(unix)]
#[tokio::test]
async fn files_are_private() {
    let directory = Directory::new();
    let file = login(&directory);
    let store = FileStore::new(&file);
    store.replace(&token("first")).await.unwrap();
    let lock = store.lock().await.unwrap();
    for (path, expected) in [
        (file.clone(), 0o600),
        (beside(&file, ".lock"), 0o600),
        (beside(&file, ".next"), 0o600),
        (directory.path().join("a"), 0o700),
        (directory.path().join("a").join("b"), 0o700),
    ] {
        assert_eq!(mode(&path), expected, "{}", path.display());
    }
    drop(lock);
    for (set, accepted) in [
        (0o600, true),
        (0o400, true),
        (0o640, false),
        (0o604, false),
        (0o620, false),
        (0o601, false),
        (0o644, false),
    ] {
        set_mode(&file, set);
        match store.load().await {
            Ok(_) => assert!(accepted, "{set:o}"),
            Err(error) => {
                let error = error.to_string();
                assert!(
                    !accepted && error.contains("chmod 600") && error.contains("login"),
                    "{set:o}: {error}"
                );
                assert!(!error.contains("first"));
            }
        }
    }
}

/// K6: the access rights are changed between loading and saving.
#[cfg(unix)]
#[tokio::test]
async fn exposed_file_is_replaced() {
    let directory = Directory::new();
    let store = FileStore::new(directory.file());
    let first = token("first");
    store.replace(&first).await.unwrap();
    let _lock = store.lock().await.unwrap();
    set_mode(&directory.file(), 0o644);
    store.save(&token("second"), &first).await.unwrap();
    assert_eq!((mode(&directory.file()), held(&store).await.as_deref()), (0o600, Some("second")));
}

/// The link stays, its target is replaced, and both names exclude each other.
#[cfg(unix)]
#[tokio::test]
async fn symbolic_links_are_followed() {
    use std::os::unix::fs::symlink;

    let directory = Directory::new();
    let [link, chain, target] = ["link", "chain", "target"].map(|name| directory.path().join(name));
    symlink("target", &link).unwrap(); // relative, and still dangling
    symlink(&link, &chain).unwrap();
    for (path, text) in [(&link, "first"), (&chain, "second"), (&target, "third")] {
        FileStore::new(path).replace(&token(text)).await.unwrap();
        for path in [&link, &chain, &target] {
            assert_eq!(held(&FileStore::new(path)).await.as_deref(), Some(text));
        }
    }
    assert!(link.is_symlink() && chain.is_symlink() && !target.is_symlink());
    let lock = FileStore::new(&chain).lock().await.unwrap();
    let other = FileStore::new(&target);
    assert!(timeout(SHORT, other.lock()).await.is_err());
    drop(lock);
    timeout(HANG, other.lock()).await.unwrap().unwrap();

    // A loop is an error.
    let [one, two] = ["one", "two"].map(|name| directory.path().join(name));
    symlink(&one, &two).unwrap();
    symlink(&two, &one).unwrap();
    assert!(FileStore::new(&one).load().await.is_err());
}

/// What a killed program leaves in the next file.
#[tokio::test]
async fn half_written_tokens_do_not_count() {
    let directory = Directory::new();
    let file = directory.file();
    let store = FileStore::new(&file);
    for (left, expected) in [
        ("", "first"),
        ("seco", "first"),
        ("\0\0\0\0", "first"),
        ("seco\0\0\0\0", "first"),
        ("\n", "first"),
        ("\0\0\n", "first"),
        ("second\n", "second"),
        ("second\n\0\0\0\0", "second"),
    ] {
        store.replace(&token("first")).await.unwrap();
        let next = beside(&file, ".next");
        fs::write(&next, left).unwrap();
        #[cfg(unix)]
        set_mode(&next, 0o600);
        drop(store.lock().await.unwrap());
        assert_eq!(held(&store).await.as_deref(), Some(expected), "{left:?}");
    }
    // A login that was stored afterwards counts.
    let next = beside(&file, ".next");
    store.replace(&token("first")).await.unwrap();
    fs::write(&next, "older\n").unwrap();
    #[cfg(unix)]
    set_mode(&next, 0o600);
    let hour_ago = fs::metadata(&file).unwrap().modified().unwrap() - Duration::from_secs(3600);
    fs::File::options().write(true).open(&next).unwrap().set_modified(hour_ago).unwrap();
    drop(store.lock().await.unwrap());
    assert_eq!(held(&store).await.as_deref(), Some("first"));
}

/// K6: a file that cannot be written is noticed before a token is spent.
#[tokio::test]
async fn unwritable_file_spends_nothing() {
    let directory = Directory::new();
    let simulator = Simulator::new();
    let file = directory.file();
    let store = FileStore::new(&file);
    store.replace(&token(&simulator.issue_refresh_token())).await.unwrap();
    fs::create_dir(beside(&file, ".next")).unwrap();
    let jwts = Refreshing::new(OAuthSource::refresh_token(public(&simulator), store));
    assert_eq!(jwts.token().await.unwrap_err().kind(), AuthErrorKind::RefreshFailed);
    assert_eq!(simulator.token_requests(), 0);
}

fn public(simulator: &Simulator) -> TokenEndpoint {
    let endpoint =
        TokenEndpoint::new::<_, Body, _>("https://api.selamgpt.com/oauth/token", simulator.clone());
    endpoint.unwrap().with_client_auth(ClientAuth::public("app").unwrap())
}

/// K2: a file that another program writes, or removes, while this one runs.
#[tokio::test]
async fn new_login_in_the_file_is_used() {
    let directory = Directory::new();
    let simulator = Simulator::new();
    let store = FileStore::new(directory.file());
    store.replace(&token(&simulator.issue_refresh_token())).await.unwrap();
    let source = || OAuthSource::refresh_token(public(&simulator), store.clone());
    let jwts = Refreshing::new(source());
    simulator.revoke_refresh_tokens();
    assert_eq!(jwts.token().await.unwrap_err().kind(), AuthErrorKind::RefreshRejected);
    assert!(jwts.token().await.is_err());
    assert_eq!(simulator.token_requests(), 1);

    FileStore::new(directory.file()).replace(&token(&simulator.issue_refresh_token())).await.unwrap();
    jwts.token().await.unwrap();
    // Its own save is no new login.
    let version = store.version();
    Refreshing::new(source()).token().await.unwrap();
    assert_eq!(store.version(), version);
    assert_eq!((simulator.token_requests(), simulator.reused_refresh_tokens()), (3, 0));

    fs::remove_file(directory.file()).unwrap();
    let jwts = Refreshing::new(source());
    assert_eq!(jwts.token().await.unwrap_err().kind(), AuthErrorKind::RefreshRejected);
    assert_eq!(simulator.token_requests(), 3);
}

/// A waiter that is dropped leaves nothing locked.
#[tokio::test]
async fn dropped_waiters_release_the_lock() {
    let directory = Directory::new();
    let store = FileStore::new(directory.file());
    for _ in 0..20 {
        let lock = store.lock().await.unwrap();
        assert!(timeout(SHORT / 20, store.lock()).await.is_err());
        let waiter = tokio::spawn({
            let store = store.clone();
            async move { store.lock().await.map(drop) }
        });
        tokio::task::yield_now().await;
        waiter.abort();
        drop(lock);
        drop(timeout(HANG, store.lock()).await.unwrap().unwrap());
    }
}

/// F5: a runtime without timers, and none at all.
#[test]
fn missing_runtime_is_an_error() {
    let directory = Directory::new();
    let store = FileStore::new(directory.file());
    let without_timers = Builder::new_current_thread().build().unwrap();
    assert!(without_timers.block_on(store.lock()).is_err());
    assert!(without_timers.block_on(store.replace(&token("first"))).is_err());
    assert!(without_timers.block_on(store.load()).unwrap().is_none());
    assert_ready_err!(spawn(store.load()).poll());
    assert_ready_err!(spawn(store.lock()).poll());
    assert_ready_err!(spawn(store.replace(&token("first"))).poll());
}

/// Calls that are dropped in the middle leave a whole token, and none overtakes a holder of the lock.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropped_calls_leave_a_whole_token() {
    let directory = Directory::new();
    let store = FileStore::new(directory.file());
    store.replace(&token("login")).await.unwrap();
    for round in 0..100 {
        let calls = [0, 1, 2].map(|call| {
            let store = FileStore::new(directory.file());
            tokio::spawn(async move {
                if call == 0 {
                    return store.replace(&token("login")).await;
                }
                let _lock = store.lock().await?;
                let held = store.load().await?.unwrap();
                store.save(&token("rotated"), &held).await
            })
        });
        tokio::time::sleep(Duration::from_micros(round * 50)).await;
        calls.iter().for_each(|call| call.abort());
        let held = held(&store).await.unwrap();
        assert!(["login", "rotated"].contains(&&*held), "{held}");
    }
}

/// K5: a program that is killed at any moment: its lock is released, and the file holds a whole token, not older than the last
/// that it has reported as saved.
#[tokio::test]
async fn killed_programs_lose_no_saved_token() {
    const NAME: &str = "file_store::killed_programs_lose_no_saved_token";
    if let Ok(file) = env::var(CASE) {
        return save_until_killed(file).await;
    }
    let directory = Directory::new();
    let store = FileStore::new(login(&directory));
    store.replace(&token("token-0")).await.unwrap();
    let mut reported = 0;
    for kill in 0..20 {
        let mut program = Command::new(env::current_exe().unwrap())
            .args(["--exact", NAME, "--nocapture"])
            .env(CASE, store.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(program.stdout.take().unwrap()).lines().map_while(Result::ok);
        let mut saved = lines.by_ref().filter_map(|line| line.strip_prefix("saved ")?.parse::<u64>().ok());
        for _ in 0..=kill % 5 {
            reported = saved.next().expect("a token is saved");
        }
        // Somewhere in the next steps.
        for _ in 0..kill * 2_000 {
            std::hint::spin_loop();
        }
        program.kill().unwrap();
        program.wait().unwrap();
        reported = saved.last().unwrap_or(reported);
        drop(timeout(HANG, store.lock()).await.unwrap().unwrap());
        let kept = held(&store).await.unwrap();
        let kept: u64 = kept.strip_prefix("token-").unwrap().parse().unwrap();
        assert!(kept == reported || kept == reported + 1, "{kept} after {reported}");
    }
}

#[allow(clippy::print_stdout, reason = "the other process answers on stdout")]
async fn save_until_killed(file: String) {
    let store = FileStore::new(file);
    println!();
    loop {
        let _lock = store.lock().await.unwrap();
        let held = store.load().await.unwrap().unwrap();
        let number: u64 = held.expose_secret().strip_prefix("token-").unwrap().parse().unwrap();
        store.save(&token(&format!("token-{}", number + 1)), &held).await.unwrap();
        println!("saved {}", number + 1);
    }
}
