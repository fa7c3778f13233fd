//! K1: keys and tokens in files that are replaced.

use std::{
    env,
    error::Error as _,
    fs,
    io::Write as _,
    iter,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering::SeqCst},
    time::{Duration, UNIX_EPOCH},
};

use http::{Request, Response, StatusCode};
use proptest::prelude::*;
use tokio::time::{Instant, sleep};
use tower::{Layer, ServiceExt, util::BoxCloneSyncService};
use tower_selam::{
    ApiKey, ApiKeyLayer, AuthError, AuthErrorKind, BoxError, JwtLayer, RefreshLayer, RefreshPolicy,
    Refreshing, SelamLayer, TestClock, Token,
    auth_error::InspectedBody,
    oauth::ClientSecret,
    source::{EnvSource, FileSource, Reason, Source},
};

use crate::{
    api::{Api, INVALID_KEY, INVALID_TOKEN, request},
    environment::{CASE, run, tell},
    mint::clock,
    support::{Body, MODELS, get, jwt_claiming, key, send, values},
};

/// A temporary directory, removed on drop.
pub(crate) struct Directory(PathBuf);

impl Directory {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("tower-selam-{}-{}", std::process::id(), NEXT.fetch_add(1, SeqCst));
        let path = env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
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

/// Writes a file that looks as if it had been written long ago.
pub(crate) fn write_old(path: &Path, content: impl AsRef<[u8]>) {
    fs::write(path, content).unwrap();
    let file = fs::File::options().append(true).open(path).unwrap();
    file.set_modified(UNIX_EPOCH + Duration::from_secs(1_000_000_000)).unwrap();
}

fn read(path: &Path) -> Result<String, String> {
    let key = FileSource::<ApiKey>::new(path).read();
    key.map(|key| key.expose_secret().to_owned()).map_err(|error| error.to_string())
}

/// K1: a byte order mark, CRLF and surrounding blanks are trimmed.
#[test]
fn byte_order_mark_and_newline_are_trimmed() {
    let directory = Directory::new();
    let file = directory.file();
    for text in ["sk-selam-a", "sk-selam-a\n", "sk-selam-a\r\n", "\u{feff}sk-selam-a\r\n", "  sk-selam-a \n"]
    {
        write_old(&file, text);
        assert_eq!(read(&file).unwrap(), "sk-selam-a", "{text:?}");
    }
}

/// K1: the error names the file and does not show its content.
#[test]
fn invalid_file_is_named_without_its_content() {
    let directory = Directory::new();
    let file = directory.file();
    let named = format!("API key from the file {}", file.display());
    assert_eq!(read(&file).unwrap_err(), format!("{named} cannot be read: entity not found"));
    for (content, message) in [
        (&b""[..], "is empty"),
        (b"\n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"secret secret", "has white space at byte 6"),
        (b"secret\nsecret\n", "has a control character at byte 6"),
        (b"secret\xff", "is not valid Unicode"),
        (&[b'a'; 70_000], "is longer than 64 KiB"),
    ] {
        write_old(&file, content);
        assert_eq!(read(&file).unwrap_err(), format!("{named} {message}"));
    }
    assert!(read(&directory.0).unwrap_err().contains("cannot be read"));
}

/// Makes an engine that has read the file once, with a clock that only the test moves.
async fn engine(file: &Path) -> (Refreshing<ApiKey>, TestClock) {
    let clock = TestClock::new(UNIX_EPOCH + Duration::from_secs(1_900_000_000));
    let policy = RefreshPolicy::new().with_clock(clock.clone());
    let keys = Refreshing::with_policy(FileSource::new(file), policy);
    keys.prefetch().await.unwrap();
    (keys, clock)
}

/// Returns the key that a request made after the recheck interval gets.
async fn later(keys: &Refreshing<ApiKey>, clock: &TestClock) -> String {
    clock.jump(Duration::from_millis(2_100));
    keys.api_key().await.unwrap().expose_secret().to_owned()
}

/// K1: the last good key is kept while the file is truncated or missing.
#[tokio::test(start_paused = true)]
async fn replaced_or_deleted_file_is_followed() {
    let directory = Directory::new();
    let file = directory.file();
    write_old(&file, "sk-selam-one");
    let (keys, clock) = engine(&file).await;
    assert_eq!(later(&keys, &clock).await, "sk-selam-one");

    replace(&file, b"sk-selam-two\n");
    assert_eq!(later(&keys, &clock).await, "sk-selam-two", "replaced atomically");

    fs::write(&file, "").unwrap();
    assert_eq!(later(&keys, &clock).await, "sk-selam-two", "truncated: the last good one");
    fs::remove_file(&file).unwrap();
    assert_eq!(later(&keys, &clock).await, "sk-selam-two", "deleted: the last good one");

    fs::write(&file, "sk-selam-three").unwrap();
    // After a failure, the old key is served while the file is read in the background.
    let mut current = later(&keys, &clock).await;
    for _ in 0..1_000 {
        if current == "sk-selam-three" {
            break;
        }
        sleep(Duration::from_millis(1)).await;
        current = keys.api_key().await.unwrap().expose_secret().to_owned();
    }
    assert_eq!(current, "sk-selam-three");
}

/// K1: a Kubernetes secret volume, whose symlink is swapped.
#[cfg(unix)]
#[tokio::test(start_paused = true)]
async fn swapped_symlink_is_followed() {
    use std::os::unix::fs::symlink;

    let directory = Directory::new();
    let at = |name: &str| directory.0.join(name);
    for (version, key) in [("..1", "sk-selam-one"), ("..2", "sk-selam-two")] {
        fs::create_dir(at(version)).unwrap();
        write_old(&at(version).join("key"), key);
    }
    symlink("..1", at("..data")).unwrap();
    symlink("..data/key", at("key")).unwrap();
    let (keys, clock) = engine(&at("key")).await;
    assert_eq!(later(&keys, &clock).await, "sk-selam-one");
    symlink("..2", at("..data_tmp")).unwrap();
    fs::rename(at("..data_tmp"), at("..data")).unwrap();
    assert_eq!(later(&keys, &clock).await, "sk-selam-two");
}

/// K1: without waiting for the next recheck.
#[tokio::test(start_paused = true)]
async fn rejected_key_is_read_again_at_once() {
    let directory = Directory::new();
    let file = directory.file();
    write_old(&file, "sk-selam-one");
    let (keys, _) = engine(&file).await;
    let first = keys.api_key().await.unwrap();
    fs::write(&file, "sk-selam-two").unwrap();
    keys.rejected(&first);
    assert_eq!(keys.api_key().await.unwrap().expose_secret(), "sk-selam-two");
}

const REQUEST_INTERVAL: Duration = Duration::from_millis(10);

/// Sends a request every ten milliseconds for `time`, expects 200 for each, and returns the bearers that were sent.
async fn load(service: &Stack, api: &Api, time: Duration) -> Vec<String> {
    let before = api.bearers().len();
    let start = Instant::now();
    while start.elapsed() < time {
        assert_eq!(service.clone().oneshot(request()).await.unwrap().status(), StatusCode::OK);
        // Paused time does not advance while a file is being read.
        sleep(REQUEST_INTERVAL).await;
    }
    api.bearers().split_off(before)
}

type Stack = BoxCloneSyncService<Request<Body>, Response<InspectedBody<Body>>, BoxError>;

/// Makes a stack that sends the key in the file, with a clock that follows paused time.
fn key_stack(file: &Path, api: &Api) -> Stack {
    let policy = RefreshPolicy::new().with_clock(clock());
    let keys = Refreshing::<ApiKey>::with_policy(FileSource::new(file), policy);
    BoxCloneSyncService::new(RefreshLayer::new().layer(ApiKeyLayer::bearer(keys).layer(api.service())))
}

/// Like [`key_stack`], for a JWT in the file and a fixed key.
fn jwt_stack(file: &Path, api: &Api) -> Stack {
    let policy = RefreshPolicy::new().with_clock(clock());
    let jwts = Refreshing::<Token>::with_policy(FileSource::new(file), policy);
    BoxCloneSyncService::new(
        RefreshLayer::new().layer((JwtLayer::new(jwts), ApiKeyLayer::x_api_key(key())).layer(api.service())),
    )
}

/// Returns how many requests were sent with the old credential before the new one, which must then stay in use.
fn requests_before_switch(sent: &[String], old: &str, new: &str) -> usize {
    let at = sent.iter().position(|bearer| bearer != old).unwrap_or(sent.len());
    assert!(sent[at..].iter().all(|bearer| bearer == new), "{sent:?}");
    at
}

/// One second of requests, the read of the file, and the request that started it.
const LIMIT: usize = 102;

/// Replaces the file atomically.
fn replace(file: &Path, content: &[u8]) {
    let next = file.with_extension("next");
    fs::write(&next, content).unwrap();
    fs::rename(&next, file).unwrap();
}

/// K1: under load, at any offset into the recheck interval.
#[tokio::test(start_paused = true)]
async fn new_key_is_used_within_a_second() {
    for (name, content) in [
        ("bare", &b"sk-selam-two"[..]),
        ("with a newline", b"sk-selam-two\n"),
        ("with CRLF", b"sk-selam-two\r\n"),
        ("with a byte order mark", b"\xef\xbb\xbfsk-selam-two\r\n"),
    ] {
        // Different offsets into the second between two reads.
        for phase in [0, 10, 330, 980, 990] {
            let directory = Directory::new();
            let file = directory.file();
            write_old(&file, "sk-selam-one");
            let api = Api::accepting_all();
            let service = key_stack(&file, &api);
            let time = Duration::from_millis(2_000 + phase);
            assert_eq!(
                requests_before_switch(&load(&service, &api, time).await, "sk-selam-one", "never"),
                (200 + phase as usize / 10)
            );
            if phase % 20 == 0 {
                replace(&file, content);
            } else {
                fs::write(&file, content).unwrap();
            }
            let sent = load(&service, &api, Duration::from_millis(2_500)).await;
            let after = requests_before_switch(&sent, "sk-selam-one", "sk-selam-two");
            assert!(after <= LIMIT, "{name}, at {phase}: after {after} requests");
        }
    }
}

/// K1: under load, for as long as the file holds no valid key.
#[tokio::test(start_paused = true)]
async fn last_good_key_is_kept() {
    type Break = (&'static str, fn(&Path));
    let breaks: [Break; 7] = [
        ("truncated", |file| fs::write(file, "").unwrap()),
        ("deleted", |file| fs::remove_file(file).unwrap()),
        ("not text", |file| fs::write(file, b"\xff\xfe").unwrap()),
        ("two lines", |file| fs::write(file, "sk-selam-two\nsk-selam-three\n").unwrap()),
        ("half of a byte order mark", |file| fs::write(file, b"\xef\xbbsk-selam-two").unwrap()),
        ("too long", |file| fs::write(file, [b'a'; 70_000]).unwrap()),
        ("a directory", |file| {
            fs::remove_file(file).unwrap();
            fs::create_dir(file).unwrap();
        }),
    ];
    for (name, damage) in breaks {
        let directory = Directory::new();
        let file = directory.file();
        write_old(&file, "sk-selam-one");
        let api = Api::accepting_all();
        let service = key_stack(&file, &api);
        load(&service, &api, Duration::from_millis(500)).await;
        let mut current = "sk-selam-one".to_owned();
        // The first is long enough for a back-off to grow, if one applied; the others end anywhere between two reads.
        for (number, time) in iter::once(20_000).chain((400..1_600).step_by(30)).enumerate() {
            damage(&file);
            let sent = load(&service, &api, Duration::from_millis(time)).await;
            assert_eq!(requests_before_switch(&sent, &current, "never"), sent.len(), "{name}");
            let _ = fs::remove_dir(&file);
            let next = format!("sk-selam-{number}");
            replace(&file, next.as_bytes());
            let sent = load(&service, &api, Duration::from_millis(1_100)).await;
            let after = requests_before_switch(&sent, &current, &next);
            assert!(after <= LIMIT, "{name} for {time} ms: after {after} requests");
            current = next;
        }
    }
}

/// K1: under load, a secret volume is updated eight times.
#[cfg(unix)]
#[tokio::test(start_paused = true)]
async fn every_secret_volume_update_is_followed() {
    use std::os::unix::fs::symlink;

    let directory = Directory::new();
    let at = |name: &str| directory.0.join(name);
    let publish = |version: u32| {
        let name = format!("..{version}");
        fs::create_dir(at(&name)).unwrap();
        fs::write(at(&name).join("key"), format!("sk-selam-{version}")).unwrap();
        symlink(&name, at("..data_tmp")).unwrap();
        fs::rename(at("..data_tmp"), at("..data")).unwrap();
        // As the kubelet does, remove the old version at once.
        let _ = fs::remove_dir_all(at(&format!("..{}", version - 1)));
    };
    publish(1);
    symlink("..data/key", at("key")).unwrap();
    let api = Api::accepting_all();
    let service = key_stack(&at("key"), &api);
    load(&service, &api, Duration::from_millis(770)).await;
    for version in 2..10 {
        publish(version);
        let sent = load(&service, &api, Duration::from_millis(1_770)).await;
        let after = requests_before_switch(
            &sent,
            &format!("sk-selam-{}", version - 1),
            &format!("sk-selam-{version}"),
        );
        assert!(after <= LIMIT, "version {version}: after {after} requests");
    }
}

/// K1: the next 401 causes a re-read, for a key and for a JWT.
#[tokio::test(start_paused = true)]
async fn file_is_read_again_after_a_401() {
    for jwt in [false, true] {
        let directory = Directory::new();
        let file = directory.file();
        write_old(&file, "old-credential");
        let rejection = if jwt { INVALID_TOKEN } else { INVALID_KEY };
        let api = Api::accepting("old-credential", rejection);
        let service = if jwt { jwt_stack(&file, &api) } else { key_stack(&file, &api) };
        load(&service, &api, REQUEST_INTERVAL).await;
        // The API learns of the rotation before the file does.
        api.accept("new-credential");
        let rejected = service.clone().oneshot(request()).await.unwrap();
        assert_eq!(rejected.status(), StatusCode::UNAUTHORIZED);
        assert_eq!(api.bearers(), ["old-credential", "old-credential"], "the file is unchanged");
        sleep(Duration::from_millis(500)).await;
        // A rejected credential stays in use, and the 401 is returned to the caller.
        for sends in 3..10 {
            let answered = service.clone().oneshot(request()).await.unwrap();
            assert_eq!((answered.status(), api.bearers().len()), (StatusCode::UNAUTHORIZED, sends));
        }
        let before = api.bearers().len();
        replace(&file, b"new-credential\n");
        sleep(Duration::from_secs(1)).await;
        // The file is re-read in the background, or because of the 401.
        let answered = service.clone().oneshot(request()).await.unwrap();
        assert_eq!(answered.status(), StatusCode::OK, "JWT: {jwt}");
        let sent = api.bearers().split_off(before);
        assert_eq!(sent.last().unwrap(), "new-credential");
        assert!(sent.len() <= 2, "{sent:?}");
    }
}

/// K1: the file is authoritative, even if its new JWT expires sooner.
#[tokio::test(start_paused = true)]
async fn shorter_lived_jwt_in_file_is_used() {
    let directory = Directory::new();
    let file = directory.file();
    let until = |exp: u32| jwt_claiming(&format!(r#"{{"exp":{exp}}}"#)).expose_secret().to_owned();
    let (long, short) = (until(1_900_003_600), until(1_900_000_060));
    write_old(&file, &long);
    let api = Api::accepting_all();
    let service = jwt_stack(&file, &api);
    load(&service, &api, Duration::from_millis(500)).await;
    replace(&file, short.as_bytes());
    let sent = load(&service, &api, Duration::from_secs(2)).await;
    assert!(requests_before_switch(&sent, &long, &short) <= LIMIT);
    // Once it has expired, requests fail. The longer-lived token is not used again.
    sleep(Duration::from_secs(60)).await;
    let before = api.bearers().len();
    let error = service.clone().oneshot(request()).await.unwrap_err();
    assert_eq!(AuthError::find(&*error).unwrap().kind(), AuthErrorKind::RefreshFailed);
    assert_eq!(api.bearers().len(), before);
}

/// Writes `content` into `file` in place, in as many steps as there are pauses.
async fn write_slowly(file: &Path, content: &[u8], pauses: &[u64]) {
    let mut writer = fs::File::create(file).unwrap();
    for (number, pause) in pauses.iter().enumerate() {
        sleep(Duration::from_millis(*pause)).await;
        let part = content.len() * number / pauses.len()..content.len() * (number + 1) / pauses.len();
        writer.write_all(&content[part]).unwrap();
    }
}

/// K1: written byte by byte, while requests are sent, and before there is any key.
#[tokio::test(start_paused = true)]
async fn half_a_key_is_never_sent() {
    const NEW: &str = "sk-selam-the-new-key-0123456789";
    for (name, pause) in [("at once", 0), ("steadily", 7), ("slowly", 90), ("with long pauses", 190)] {
        for starts_with_a_key in [true, false] {
            let directory = Directory::new();
            let file = directory.file();
            let api = Api::accepting_all();
            let service = key_stack(&file, &api);
            if starts_with_a_key {
                write_old(&file, "sk-selam-one");
                load(&service, &api, Duration::from_millis(500)).await;
            }
            let pauses = [pause; NEW.len()];
            // The first request waits until there is a key, but only for so long.
            let request = async {
                sleep(Duration::from_millis(5_000_u64.min(pause * NEW.len() as u64 / 2))).await;
                service.clone().oneshot(request()).await
            };
            let (sent, ()) = match starts_with_a_key {
                true => tokio::join!(
                    load(&service, &api, Duration::from_secs(9)),
                    write_slowly(&file, NEW.as_bytes(), &pauses)
                ),
                false => {
                    let (answered, ()) = tokio::join!(request, write_slowly(&file, NEW.as_bytes(), &pauses));
                    assert_eq!(answered.unwrap().status(), StatusCode::OK, "{name}");
                    (api.bearers(), ())
                }
            };
            let before = requests_before_switch(&sent, "sk-selam-one", NEW);
            let limit = (pause * NEW.len() as u64) as usize / 10 + LIMIT;
            assert!(before <= limit, "{name}: after {before} requests");
        }
    }
}

/// K1: a first read that ends while the file is empty or incomplete.
#[tokio::test(start_paused = true)]
async fn unfinished_first_file_is_an_error() {
    let directory = Directory::new();
    let file = directory.file();
    let start = Instant::now();
    fs::write(&file, "").unwrap();
    let keys: Refreshing<ApiKey> = Refreshing::new(FileSource::new(&file));
    let error = keys.api_key().await.unwrap_err();
    assert!(error.source().unwrap().to_string().ends_with("is empty"), "{error:?}");
    assert_eq!(start.elapsed(), Duration::from_secs(6));

    let pauses = [100; 100];
    let keys: Refreshing<ApiKey> = Refreshing::new(FileSource::new(&file));
    let (error, ()) = tokio::join!(keys.api_key(), write_slowly(&file, &[b'k'; 100], &pauses));
    let error = error.unwrap_err();
    assert!(error.source().unwrap().to_string().ends_with("is still being written"), "{error:?}");
}

/// K1: a rejected JWT or client secret in a file is replaced without a half in between.
#[tokio::test(start_paused = true)]
async fn half_a_secret_is_never_sent_to_the_token_endpoint() {
    let directory = Directory::new();
    let file = directory.file();
    write_old(&file, "first secret");
    let secrets: Refreshing<ClientSecret> = Refreshing::new(FileSource::new(&file));
    assert_eq!(secrets.current().map(|_| ()), None);
    secrets.prefetch().await.unwrap();
    let first = secrets.current().unwrap();
    let look = async {
        secrets.rejected(&first);
        for _ in 0..1_000 {
            sleep(Duration::from_millis(10)).await;
            secrets.prefetch().await.unwrap();
            let current = secrets.current().unwrap();
            assert!(
                ["first secret", "second secret"].contains(&current.expose_secret()),
                "{}",
                current.expose_secret()
            );
        }
    };
    tokio::join!(look, write_slowly(&file, b"second secret\n", &[190; 14]));
    assert_eq!(secrets.current().unwrap().expose_secret(), "second secret");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// K1: any rhythm of a writer that never pauses for as long as two looks are apart.
    #[test]
    fn no_rhythm_of_writes_shows_a_half(pauses in prop::collection::vec(0u64..190, 1..20), phase in 0u64..1_000) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        let sent = runtime.block_on(async {
            let directory = Directory::new();
            let file = directory.file();
            write_old(&file, "sk-selam-one");
            let api = Api::accepting_all();
            let service = key_stack(&file, &api);
            load(&service, &api, Duration::from_millis(phase)).await;
            let write = write_slowly(&file, b"sk-selam-two-0123456789", &pauses);
            tokio::join!(load(&service, &api, Duration::from_secs(7)), write).0
        });
        prop_assert_eq!(sent.last().map(String::as_str), Some("sk-selam-two-0123456789"));
        requests_before_switch(&sent, "sk-selam-one", "sk-selam-two-0123456789");
    }
}

/// K1: a variable is read on each fetch.
#[test]
fn environment_variable_is_read_on_fetch() {
    const NAME: &str = "files::environment_variable_is_read_on_fetch";
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

/// K1: `SELAM_API_KEY_FILE` and `SELAM_JWT_FILE`.
#[test]
fn environment_variables_name_files() {
    const NAME: &str = "files::environment_variables_name_files";
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
    write_old(&key, "sk-selam-from-a-file\n");
    write_old(&jwt, "a.j.wt\n");
    let (key, jwt) = (key.to_str().unwrap(), jwt.to_str().unwrap());
    assert_eq!(
        run(NAME, "both", &[("SELAM_API_KEY_FILE", key), ("SELAM_JWT_FILE", jwt)]),
        r#"["Bearer a.j.wt"] ["sk-selam-from-a-file"]"#
    );
    assert_eq!(
        run(NAME, "twice", &[("SELAM_API_KEY_FILE", key), ("SELAM_API_KEY", "sk-selam-x")]),
        "API key from the environment variable SELAM_API_KEY is set together with SELAM_API_KEY_FILE: set only one of them"
    );
    assert_eq!(
        run(NAME, "empty", &[("SELAM_API_KEY_FILE", "")]),
        "API key from the environment variable SELAM_API_KEY is not set"
    );
    let missing = run(NAME, "missing", &[("SELAM_API_KEY_FILE", "/nowhere/key")]);
    assert_eq!(missing, "API key from the file /nowhere/key cannot be read: entity not found");
}
