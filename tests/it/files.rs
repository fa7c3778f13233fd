//! K1: keys and tokens in files that are replaced.

use std::{
    env, fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering::SeqCst},
    time::Duration,
};

use http::{Request, Response, StatusCode};
use tokio::time::{Instant, sleep};
use tower::{Layer, ServiceExt, util::BoxCloneSyncService};
use tower_selam::{
    ApiKey, ApiKeyLayer, AuthError, AuthErrorKind, BoxError, JwtLayer, RefreshLayer, RefreshPolicy,
    Refreshing, SelamLayer, TestClock, Token,
    auth_error::InspectedBody,
    source::{EnvSource, FileSource, Reason, Source},
};

use crate::{
    api::{Api, INVALID_KEY, INVALID_TOKEN, request},
    environment::{CASE, run, tell},
    mint::clock,
    support::{Body, MODELS, get, jwt_claiming, key, send, values},
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
async fn engine(file: &Path) -> (Refreshing<ApiKey>, TestClock) {
    let clock = TestClock::new(std::time::UNIX_EPOCH + Duration::from_secs(1_900_000_000));
    let policy = RefreshPolicy::new().with_clock(clock.clone());
    let keys = Refreshing::with_policy(FileSource::new(file), policy);
    keys.prefetch().await.unwrap();
    (keys, clock)
}

/// What a request gets that is made a while later.
async fn later(keys: &Refreshing<ApiKey>, clock: &TestClock) -> String {
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

const EVERY: Duration = Duration::from_millis(10);

/// Sends a request every ten milliseconds for so long: what each was sent with. Every one is answered with 200.
async fn load(service: &Stack, api: &Api, time: Duration) -> Vec<String> {
    let before = api.bearers().len();
    let began = Instant::now();
    while began.elapsed() < time {
        assert_eq!(service.clone().oneshot(request()).await.unwrap().status(), StatusCode::OK);
        // Paused time does not go on while a file is being read.
        sleep(EVERY).await;
    }
    api.bearers().split_off(before)
}

type Stack = BoxCloneSyncService<Request<Body>, Response<InspectedBody<Body>>, BoxError>;

/// An engine over the file, with a clock that goes with paused time, in a stack.
fn watched(file: &Path, api: &Api) -> Stack {
    let policy = RefreshPolicy::new().with_clock(clock());
    let keys = Refreshing::<ApiKey>::with_policy(FileSource::new(file), policy);
    BoxCloneSyncService::new(RefreshLayer::new().layer(ApiKeyLayer::bearer(keys).layer(api.service())))
}

/// The same of a JWT, beside a key that is fixed.
fn watched_jwt(file: &Path, api: &Api) -> Stack {
    let policy = RefreshPolicy::new().with_clock(clock());
    let jwts = Refreshing::<Token>::with_policy(FileSource::new(file), policy);
    BoxCloneSyncService::new(RefreshLayer::new().layer(JwtLayer::new(jwts, key()).layer(api.service())))
}

/// After how many of the requests the other credential was there; afterwards it stays.
fn turned(sent: &[String], old: &str, new: &str) -> usize {
    let at = sent.iter().position(|bearer| bearer != old).unwrap_or(sent.len());
    assert!(sent[at..].iter().all(|bearer| bearer == new), "{sent:?}");
    at
}

fn replace(file: &Path, content: &[u8]) {
    let beside = file.with_extension("next");
    fs::write(&beside, content).unwrap();
    fs::rename(&beside, file).unwrap();
}

#[tokio::test(start_paused = true)]
async fn k1_under_load_a_new_key_is_there_within_a_second() {
    // One reading of the file, and the request that began it.
    const WITHIN: usize = 102;
    for (name, content) in [
        ("bare", &b"sk-selam-two"[..]),
        ("with a line end", b"sk-selam-two\n"),
        ("with the other line end", b"sk-selam-two\r\n"),
        ("with a byte order mark", b"\xef\xbb\xbfsk-selam-two\r\n"),
    ] {
        // In every part of the second that passes between two readings.
        for phase in [0, 10, 330, 980, 990] {
            let directory = Directory::new();
            let file = directory.file();
            fs::write(&file, "sk-selam-one").unwrap();
            let api = Api::accepting_all();
            let service = watched(&file, &api);
            let time = Duration::from_millis(2_000 + phase);
            assert_eq!(
                turned(&load(&service, &api, time).await, "sk-selam-one", "never"),
                (200 + phase as usize / 10)
            );
            if phase % 20 == 0 {
                replace(&file, content);
            } else {
                fs::write(&file, content).unwrap();
            }
            let sent = load(&service, &api, Duration::from_millis(2_500)).await;
            let after = turned(&sent, "sk-selam-one", "sk-selam-two");
            assert!(after <= WITHIN, "{name}, at {phase}: after {after} requests");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn k1_under_load_the_last_good_key_is_kept_for_as_long_as_there_is_none() {
    type Break = (&'static str, fn(&Path));
    let breaks: [Break; 7] = [
        ("truncated", |file| fs::write(file, "").unwrap()),
        ("deleted", |file| fs::remove_file(file).unwrap()),
        ("no text", |file| fs::write(file, b"\xff\xfe").unwrap()),
        ("two lines", |file| fs::write(file, "sk-selam-two\nsk-selam-three\n").unwrap()),
        ("half of a byte order mark", |file| fs::write(file, b"\xef\xbbsk-selam-two").unwrap()),
        ("endless", |file| fs::write(file, [b'a'; 70_000]).unwrap()),
        ("a directory", |file| {
            fs::remove_file(file).unwrap();
            fs::create_dir(file).unwrap();
        }),
    ];
    for (name, happen) in breaks {
        let directory = Directory::new();
        let file = directory.file();
        fs::write(&file, "sk-selam-one").unwrap();
        let api = Api::accepting_all();
        let service = watched(&file, &api);
        load(&service, &api, Duration::from_millis(500)).await;
        happen(&file);
        // Long enough for a back-off to grow, if there were one.
        let sent = load(&service, &api, Duration::from_secs(40)).await;
        assert_eq!(turned(&sent, "sk-selam-one", "never"), 4_000, "{name}");
        let _ = fs::remove_dir(&file);
        replace(&file, b"sk-selam-two");
        let sent = load(&service, &api, Duration::from_millis(2_500)).await;
        let after = turned(&sent, "sk-selam-one", "sk-selam-two");
        assert!(after <= 102, "{name}: after {after} requests");
    }
}

#[cfg(unix)]
#[tokio::test(start_paused = true)]
async fn k1_under_load_a_secret_volume_is_followed_from_one_version_to_the_next() {
    use std::os::unix::fs::symlink;

    let directory = Directory::new();
    let at = |name: &str| directory.0.join(name);
    let publish = |version: u32| {
        let name = format!("..{version}");
        fs::create_dir(at(&name)).unwrap();
        fs::write(at(&name).join("key"), format!("sk-selam-{version}")).unwrap();
        symlink(&name, at("..data_tmp")).unwrap();
        fs::rename(at("..data_tmp"), at("..data")).unwrap();
        // As the kubelet does: the old version goes at once.
        let _ = fs::remove_dir_all(at(&format!("..{}", version - 1)));
    };
    publish(1);
    symlink("..data/key", at("key")).unwrap();
    let api = Api::accepting_all();
    let service = watched(&at("key"), &api);
    load(&service, &api, Duration::from_millis(770)).await;
    for version in 2..10 {
        publish(version);
        let sent = load(&service, &api, Duration::from_millis(1_770)).await;
        let after = turned(&sent, &format!("sk-selam-{}", version - 1), &format!("sk-selam-{version}"));
        assert!(after <= 102, "version {version}: after {after} requests");
    }
}

#[tokio::test(start_paused = true)]
async fn k1_after_a_401_the_file_is_read_again_at_once_for_a_key_and_for_a_jwt() {
    for jwt in [false, true] {
        let directory = Directory::new();
        let file = directory.file();
        fs::write(&file, "an-old-one").unwrap();
        let refusal = if jwt { INVALID_TOKEN } else { INVALID_KEY };
        let api = Api::accepting("an-old-one", refusal);
        let service = if jwt { watched_jwt(&file, &api) } else { watched(&file, &api) };
        load(&service, &api, EVERY).await;
        // The API knows first.
        api.accept("a-new-one");
        let refused = service.clone().oneshot(request()).await.unwrap();
        assert_eq!(refused.status(), StatusCode::UNAUTHORIZED);
        assert_eq!(api.bearers(), ["an-old-one", "an-old-one"], "the file has no other");
        sleep(Duration::from_millis(500)).await;
        // A key is used on, and what the API says of it goes up; a JWT that was refused is not sent again.
        for sends in 3..10 {
            let answered = service.clone().oneshot(request()).await;
            assert_eq!(answered.is_err(), jwt, "{answered:?}");
            assert_eq!(api.bearers().len(), if jwt { 2 } else { sends });
        }
        let before = api.bearers().len();
        replace(&file, b"a-new-one\n");
        sleep(Duration::from_secs(1)).await;
        // The file is looked at beside, or because of the 401.
        let answered = service.clone().oneshot(request()).await.unwrap();
        assert_eq!(answered.status(), StatusCode::OK, "JWT: {jwt}");
        let sent = api.bearers().split_off(before);
        assert_eq!(sent.last().unwrap(), "a-new-one");
        assert!(sent.len() <= if jwt { 1 } else { 2 }, "{sent:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn k1_what_stands_in_the_file_counts_even_if_it_expires_sooner() {
    let directory = Directory::new();
    let file = directory.file();
    let until = |exp: u32| jwt_claiming(&format!(r#"{{"exp":{exp}}}"#)).expose_secret().to_owned();
    let (long, short) = (until(1_900_003_600), until(1_900_000_060));
    fs::write(&file, &long).unwrap();
    let api = Api::accepting_all();
    let service = watched_jwt(&file, &api);
    load(&service, &api, Duration::from_millis(500)).await;
    replace(&file, short.as_bytes());
    let sent = load(&service, &api, Duration::from_secs(2)).await;
    assert!(turned(&sent, &long, &short) <= 102);
    // It expires, and nothing else comes: an error, and not the token that lives longer.
    sleep(Duration::from_secs(60)).await;
    let before = api.bearers().len();
    let error = service.clone().oneshot(request()).await.unwrap_err();
    assert_eq!(AuthError::find(&*error).unwrap().kind(), AuthErrorKind::RefreshFailed);
    assert_eq!(api.bearers().len(), before);
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
