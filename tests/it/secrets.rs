//! Tests that secrets are never printed, and that their bytes are wiped.

use std::{
    fmt::{self, Write as _},
    future::ready,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use bytes::Bytes;
use http::Response;
use tokio::task::yield_now;
use tower::{Layer, ServiceExt};
use tower_selam::{
    ApiKey, ApiKeyLayer, AuthError, BaseUrl, BoxError, Credentials, JwtLayer, Origins, PerSubject,
    Refreshing, RequestAuth, SelamLayer, Subject, Token,
    simulator::{Fault, Server, Simulator},
    source::{Reason, source_fn},
};

#[cfg(target_os = "linux")]
use crate::environment::{CASE, run, tell};
use crate::support::{
    BOTH, Body, CHAT, HANG, Http, JWT, KEY, MODELS, builder, get, handshake, https, jwt, key, post, send,
    voice_agent,
};

fn assert_no_secret(shown: &str) {
    for secret in [KEY, JWT, "canary"] {
        assert!(!shown.contains(secret), "{shown}");
    }
}

/// S2: `Debug` of every type that holds a secret is redacted.
#[test]
fn debug_output_is_redacted() {
    let selam = SelamLayer::builder().with_api_key(key()).with_jwt(jwt());
    let layer = selam.clone().build().unwrap();
    let service = layer.layer(());
    let custom = RequestAuth::Custom(Credentials::key_and_jwt(key(), jwt()));
    let (layers, halves) = (
        (ApiKeyLayer::bearer(key()), (JwtLayer::new(jwt()), ApiKeyLayer::x_api_key(key()))),
        (ApiKeyLayer::x_api_key(key()), JwtLayer::new(jwt())),
    );
    let all = format!(
        "{:#?} {:?} {:#?} {:?} {custom:#?} {selam:?} {layer:#?} {service:#?} {layers:#?} {halves:#?}",
        key(),
        key(),
        jwt(),
        Credentials::x_api_key(key()),
    );
    assert_no_secret(&all);
    assert!(all.contains(&format!("ApiKey([redacted] id={})", key().id())), "{all}");
    assert!(all.contains(&format!("Token([redacted] id={})", jwt().id())), "{all}");
    let credentials = format!("{:?}", Credentials::key_and_jwt(key(), jwt()));
    let (key, jwt) = (key().id(), jwt().id());
    assert_eq!(credentials, format!("Credentials(ApiKey([redacted] id={key}), Token([redacted] id={jwt}))"));
}

/// S2: no panic message holds a secret.
#[test]
fn panic_messages_hold_no_secret() {
    fn message<T>(panics: impl FnOnce() -> T + std::panic::UnwindSafe) -> String {
        let payload = std::panic::catch_unwind(panics).map(|_| ()).unwrap_err();
        payload.downcast::<String>().map(|message| *message).unwrap_or_default()
    }
    let messages = [
        message(|| ApiKey::new(format!("Bearer {KEY}")).unwrap()),
        message(|| ApiKey::new(KEY).unwrap_err()),
        message(|| Token::new(format!("{JWT} ")).unwrap_err()),
        message(|| BaseUrl::new(&format!("http://{KEY}")).unwrap()),
        message(|| SelamLayer::builder().with_api_key(key()).build().map(Err::<(), _>).unwrap().unwrap()),
        message(|| Option::<()>::None.ok_or_else(|| Credentials::key_and_jwt(key(), jwt())).unwrap()),
    ];
    for message in messages {
        assert!(message.len() > 20, "{message}");
        assert_no_secret(&message);
    }
}

/// S2: errors of constructors and refused requests hold no secret.
#[tokio::test]
async fn errors_hold_no_secret() {
    for bad in [format!("Bearer {KEY}"), format!("{KEY} {KEY}"), format!("{KEY}\u{e9}"), format!("\"{KEY}\"")]
    {
        for error in [ApiKey::new(&*bad).unwrap_err(), Token::new(&*bad).unwrap_err()] {
            assert_no_secret(&format!("{error} {error:?} {error:#?}"));
        }
    }
    for bad in [format!("https://{KEY}@h"), format!("https://h/?{KEY}"), format!("http://{KEY}")] {
        let errors = [Origins::new(&bad).unwrap_err(), BaseUrl::new(&bad).unwrap_err()];
        assert_no_secret(&format!("{errors:?} {} {}", errors[0], errors[1]));
    }
    for uri in [format!("https://{KEY}@api.selamgpt.com/"), format!("http://h/?token={JWT}")] {
        let refused =
            send(&(JwtLayer::new(jwt()), ApiKeyLayer::x_api_key(key())), get(&uri)).await.unwrap_err();
        assert_no_secret(&format!("{refused} {refused:?} {refused:#?}"));
    }
}

/// A subscriber that records the events and spans of this thread at every level.
#[derive(Clone, Default)]
pub(crate) struct Log(Arc<Mutex<String>>);

impl Log {
    #[cfg(feature = "tracing")]
    pub(crate) fn text(&self) -> String {
        self.0.lock().unwrap().clone()
    }
}

struct Fields<'a>(&'a mut String);

impl tracing::field::Visit for Fields<'_> {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn fmt::Debug) {
        write!(self.0, " {field}={value:?} {value:#?}").unwrap();
    }
}

impl tracing::Subscriber for Log {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, span: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        span.record(&mut Fields(&mut self.0.lock().unwrap()));
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, values: &tracing::span::Record<'_>) {
        values.record(&mut Fields(&mut self.0.lock().unwrap()));
    }

    fn event(&self, event: &tracing::Event<'_>) {
        write!(self.0.lock().unwrap(), "\n{}", event.metadata().target()).unwrap();
        event.record(&mut Fields(&mut self.0.lock().unwrap()));
    }

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

/// S2: no log of any level holds a secret or an echo of one.
///
/// Client and server share one thread, so that the log covers both.
#[tokio::test]
async fn logs_hold_no_secret_at_any_level() {
    let log = Log::default();
    let guard = tracing::subscriber::set_default(log.clone());
    let simulator = Simulator::new();
    simulator.add_key(KEY);
    let server = Server::tls(&simulator).await.unwrap();
    let layer = builder(&server).with_api_key(key()).with_jwt(jwt()).build().unwrap();
    for http in BOTH {
        let client = layer.layer(https(&server, http));
        let echo = format!(r#"{{"error":{{"message":"bad key {KEY}","code":"invalid_api_key"}}}}"#);
        simulator.inject(Fault::Answer(Response::builder().status(401).body(Bytes::from(echo)).unwrap()));
        for _ in 0..2 {
            let call = client.clone().oneshot(post(&layer, "chat/completions", CHAT));
            let error = tokio::time::timeout(HANG, call).await.unwrap().unwrap_err();
            assert!(AuthError::find(&error).is_some());
            let mut level: Option<&dyn std::error::Error> = Some(&error);
            while let Some(error) = level {
                assert_no_secret(&format!("{error} {error:?} {error:#?}"));
                level = error.source();
            }
        }
    }
    // The handshake, whose URI holds the credentials.
    let request = handshake(&voice_agent(&server)).map(|()| Body::default());
    let refused = layer.layer(https(&server, Http::One)).oneshot(request);
    let refused = tokio::time::timeout(HANG, refused).await.unwrap().unwrap_err();
    assert_no_secret(&format!("{refused} {refused:?} {refused:#?}"));
    assert!(simulator.received().pop().unwrap().uri.query().unwrap().contains(JWT));

    drop(guard);
    let log = log.0.lock().unwrap();
    assert!(log.len() > 1_000, "the log must include the output of h2: {log}");
    assert_no_secret(&log);
}

/// S2: `Debug` of the simulator's recorded requests is redacted.
#[test]
fn simulator_hides_received_secrets() {
    let simulator = Simulator::new();
    simulator.add_key(KEY);
    let request = http::Request::post("/v1/chat/completions?api_key=canary")
        .header("authorization", format!("Bearer {KEY}"))
        .body(CHAT.to_owned())
        .unwrap();
    tokio_test::block_on(simulator.clone().oneshot(request)).unwrap();
    assert_no_secret(&format!("{simulator:?} {:#?}", simulator.received()));
}

/// Counts copies of a secret in this process's writable memory.
///
/// `masked` is the secret with every bit flipped. Memory is masked as soon as it is read and the read buffer is
/// skipped, so that the scan does not count its own copies. The buffers are reused: a new allocation could overwrite
/// memory that was freed without being wiped.
#[cfg(target_os = "linux")]
pub(crate) fn resident(masked: &[u8]) -> usize {
    // The allocator overwrites the first bytes of freed memory, so only the end of the secret is searched.
    let masked = &masked[40..];
    use std::{cell::RefCell, fs::File, io::Read, os::unix::fs::FileExt};

    thread_local! {
        static BUFFERS: RefCell<(Vec<u8>, String)> = RefCell::new((vec![0; 1 << 20], String::with_capacity(1 << 16)));
    }
    let (mut buffer, mut maps) = BUFFERS.take();
    let memory = File::open("/proc/self/mem").unwrap();
    let skipped = buffer.as_ptr() as u64..buffer.as_ptr() as u64 + buffer.len() as u64;
    let mut count = |from: u64, to: u64| {
        let (mut at, mut found) = (from, 0);
        while at < to {
            let length = buffer.len().min((to - at) as usize);
            let Ok(read) = memory.read_at(&mut buffer[..length], at) else { break };
            buffer[..read].iter_mut().for_each(|byte| *byte = !*byte);
            found += buffer[..read].windows(masked.len()).filter(|window| *window == masked).count();
            // The overlap finds a copy that spans two reads, and counts none twice.
            at += read as u64;
            if at < to {
                at -= masked.len() as u64 - 1;
            }
        }
        found
    };
    maps.clear();
    File::open("/proc/self/maps").unwrap().read_to_string(&mut maps).unwrap();
    let writable = maps.lines().filter_map(|line| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-').filter(|_| rest.starts_with("rw"))?;
        Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
    });
    let found = writable
        .map(|(start, end)| match start <= skipped.start && skipped.end <= end {
            true => count(start, skipped.start) + count(skipped.end, end),
            false => count(start, end),
        })
        .sum();
    BUFFERS.set((buffer, maps));
    found
}

/// Unmasks a secret where it is needed, so that memory holds no other copy of it.
#[cfg(target_os = "linux")]
fn unmasked(masked: &[u8]) -> String {
    let mut text = String::with_capacity(masked.len());
    text.extend(masked.iter().map(|byte| char::from(!byte)));
    text
}

/// Returns a masked secret of 120 letters without repeated parts, so that each copy counts once.
#[cfg(target_os = "linux")]
fn masked(seed: u32) -> Vec<u8> {
    let next = |state: &u32| Some(state.wrapping_mul(1_103_515_245).wrapping_add(12_345));
    let states = std::iter::successors(Some(seed), next);
    states.map(|state| !(b'a' + (state >> 16) as u8 % 26)).take(120).collect()
}

/// S3: the bytes of a secret are wiped when its last reference drops.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn secrets_are_wiped_on_last_drop() {
    // A separate process has less memory to scan, and none of other tests.
    if std::env::var_os(CASE).is_none() {
        run("secrets::secrets_are_wiped_on_last_drop", "separate process", &[]);
        return;
    }
    let (masked_key, masked_jwt) = (masked(1), masked(2));

    let key = ApiKey::new(unmasked(&masked_key)).unwrap();
    let jwt = Token::new(unmasked(&masked_jwt)).unwrap();
    assert_eq!(resident(&masked_key), 1, "the key has one buffer, and its source text is wiped");
    assert_eq!(resident(&masked_jwt), 1);

    let layer = (JwtLayer::new(jwt), ApiKeyLayer::x_api_key(key));
    let sent = send(&layer, get(MODELS)).await.unwrap();
    let replaced = send(&layer, sent).await.unwrap();
    drop(layer);
    assert_eq!(resident(&masked_key), 1, "the request holds a reference, not a copy");

    let voice = handshake("wss://api.selamgpt.com/socket.io/?EIO=4&transport=websocket");
    let key = ApiKey::new(unmasked(&masked_key)).unwrap();
    let jwt = Token::new(unmasked(&masked_jwt)).unwrap();
    let layer = SelamLayer::builder().with_api_key(key).with_jwt(jwt).build().unwrap();
    let (mut parts, ()) = voice.into_parts();
    layer.authorize(&mut parts).await.unwrap();
    assert!(
        resident(&masked_jwt) >= 3,
        "the earlier request, this layer and the handshake's query hold one each"
    );

    drop((replaced, parts, layer));
    assert_eq!((resident(&masked_key), resident(&masked_jwt)), (0, 0));
    tell("wiped");
}

/// S3: replaced credentials are wiped, also those last sent by idle layers and for idle subjects.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn replaced_credentials_are_wiped_everywhere() {
    if std::env::var_os(CASE).is_none() {
        run("secrets::replaced_credentials_are_wiped_everywhere", "separate process", &[]);
        return;
    }
    let next =
        |fetches: &AtomicUsize, seeds: [u32; 2]| unmasked(&masked(seeds[fetches.fetch_add(1, Relaxed)]));
    let fetches = AtomicUsize::new(0);
    let keys = Refreshing::new(source_fn(move |_: Reason<ApiKey>| {
        ready(ApiKey::new(next(&fetches, [3, 4])).map_err(BoxError::from))
    }));
    let fetches = AtomicUsize::new(0);
    let jwts = Refreshing::new(source_fn(move |_: Reason<Token>| {
        ready(Token::new(next(&fetches, [5, 6])).map_err(BoxError::from))
    }));
    let per_subject =
        PerSubject::new(|_: &Subject| source_fn(|_: Reason<Token>| ready(Ok::<_, BoxError>(jwt()))));
    let (shared, for_subjects) = (
        (JwtLayer::new(&jwts), ApiKeyLayer::x_api_key(&keys)),
        (JwtLayer::new(&per_subject), ApiKeyLayer::x_api_key(&keys)),
    );
    let dropped = (JwtLayer::new(&per_subject), ApiKeyLayer::x_api_key(&keys));
    let idle = (JwtLayer::new(&jwts), ApiKeyLayer::x_api_key(key()));
    let request_of = |name: &str| {
        let mut request = get(MODELS);
        request.extensions_mut().insert(Subject::new(name));
        request
    };
    let key_only = || {
        let mut request = get(MODELS);
        request.extensions_mut().insert(RequestAuth::ApiKey);
        request
    };
    for (layer, request) in [
        (&for_subjects, request_of("idle")),
        (&for_subjects, request_of("returning")),
        (&for_subjects, key_only()),
        (&shared, get(MODELS)),
        (&shared, key_only()),
        (&idle, get(MODELS)),
        (&dropped, request_of("of a dropped layer")),
    ] {
        drop(send(layer, request).await.unwrap());
    }
    drop(dropped);
    assert!(resident(&masked(3)) > 0 && resident(&masked(5)) > 0);

    keys.rejected(&keys.current().unwrap());
    jwts.rejected(&jwts.current().unwrap());
    while resident(&masked(4)) == 0 || resident(&masked(6)) == 0 {
        yield_now().await;
    }
    // Many references are released on a task.
    yield_now().await;
    drop(send(&for_subjects, request_of("returning")).await.unwrap());
    drop(send(&shared, get(MODELS)).await.unwrap());
    assert_eq!((resident(&masked(3)), resident(&masked(5))), (0, 0));
    drop((idle, shared, for_subjects));
    tell("wiped");
}

/// S4: the key id is stable, short and distinct, and is no part of the key.
#[test]
fn key_id_is_stable_and_short() {
    assert_eq!(ApiKey::new("sk-selam-example").unwrap().id().to_string(), "9da0f3");
    assert_eq!(ApiKey::new(" opaque\n").unwrap().id(), Token::new("opaque").unwrap().id());
    assert_ne!(key().id(), ApiKey::new(format!("{KEY}x")).unwrap().id());
    assert!(!KEY.contains(&key().id().to_string()));
}
