//! S2 to S4: nothing secret is printed, and nothing is left behind.

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
};

fn assert_clean(shown: &str) {
    for secret in [KEY, JWT, "canary"] {
        assert!(!shown.contains(secret), "{shown}");
    }
}

#[test]
fn s2_debug_of_everything_that_holds_a_secret_is_redacted() {
    let selam = SelamLayer::builder().with_api_key(key()).with_jwt(jwt());
    let layer = selam.clone().build().unwrap();
    let service = layer.layer(());
    let own = RequestAuth::Custom(Credentials::key_and_jwt(key(), jwt()));
    let (layers, halves) = (
        (ApiKeyLayer::bearer(key()), JwtLayer::new(jwt(), key())),
        (ApiKeyLayer::beside_jwt(key()), JwtLayer::beside_api_key(jwt())),
    );
    let all = format!(
        "{:#?} {:?} {:#?} {:?} {own:#?} {selam:?} {layer:#?} {service:#?} {layers:#?} {halves:#?}",
        key(),
        key(),
        jwt(),
        Credentials::x_api_key(key()),
    );
    assert_clean(&all);
    assert!(all.contains(&format!("ApiKey([redacted] id={})", key().id())), "{all}");
    assert!(all.contains(&format!("Token([redacted] id={})", jwt().id())), "{all}");
    let credentials = format!("{:?}", Credentials::key_and_jwt(key(), jwt()));
    let (key, jwt) = (key().id(), jwt().id());
    assert_eq!(credentials, format!("Credentials(ApiKey([redacted] id={key}), Token([redacted] id={jwt}))"));
}

#[test]
fn s2_panic_messages_are_clean() {
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
        assert_clean(&message);
    }
}

#[tokio::test]
async fn s2_errors_of_construction_and_refusal_are_clean() {
    for bad in [format!("Bearer {KEY}"), format!("{KEY} {KEY}"), format!("{KEY}\u{e9}"), format!("\"{KEY}\"")]
    {
        for error in [ApiKey::new(&*bad).unwrap_err(), Token::new(&*bad).unwrap_err()] {
            assert_clean(&format!("{error} {error:?} {error:#?}"));
        }
    }
    for bad in [format!("https://{KEY}@h"), format!("https://h/?{KEY}"), format!("http://{KEY}")] {
        let errors = [Origins::new(&bad).unwrap_err(), BaseUrl::new(&bad).unwrap_err()];
        assert_clean(&format!("{errors:?} {} {}", errors[0], errors[1]));
    }
    for uri in [format!("https://{KEY}@api.selamgpt.com/"), format!("http://h/?token={JWT}")] {
        let refused = send(&JwtLayer::new(jwt(), key()), get(&uri)).await.unwrap_err();
        assert_clean(&format!("{refused} {refused:?} {refused:#?}"));
    }
}

/// Writes down every event and span of this thread, at every level.
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

/// One thread runs client and server, so that the log has both.
#[tokio::test]
async fn s2_no_log_of_any_level_has_a_secret_nor_an_echo_of_one() {
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
                assert_clean(&format!("{error} {error:?} {error:#?}"));
                level = error.source();
            }
        }
    }
    // The handshake, whose URI holds them.
    let uri = layer.base_url().endpoint("audio/agent?voice=mekdes").unwrap();
    let request = handshake(&uri.to_string()).map(|()| Body::default());
    let refused = layer.layer(https(&server, Http::One)).oneshot(request);
    let refused = tokio::time::timeout(HANG, refused).await.unwrap().unwrap_err();
    assert_clean(&format!("{refused} {refused:?} {refused:#?}"));
    assert!(simulator.received().pop().unwrap().uri.query().unwrap().contains(JWT));

    drop(guard);
    let log = log.0.lock().unwrap();
    assert!(log.len() > 1_000, "h2 logs what it does: {log}");
    assert_clean(&log);
}

#[test]
fn s2_what_the_simulator_received_is_not_shown() {
    let simulator = Simulator::new();
    simulator.add_key(KEY);
    let request = http::Request::post("/v1/chat/completions?api_key=canary")
        .header("authorization", format!("Bearer {KEY}"))
        .body(CHAT.to_owned())
        .unwrap();
    tokio_test::block_on(simulator.clone().oneshot(request)).unwrap();
    assert_clean(&format!("{simulator:?} {:#?}", simulator.received()));
}

/// How often the end of `masked` (every bit of the text flipped) stands in this process's writable memory, unmasked.
///
/// What is read is masked at once, and the buffer for it is passed over: it finds no copy of its own making. Nor
/// does it take memory anew, over something that was freed without being wiped.
#[cfg(target_os = "linux")]
pub(crate) fn resident(masked: &[u8]) -> usize {
    // The allocator writes into the beginning of what is freed.
    let masked = &masked[40..];
    use std::{cell::RefCell, fs::File, io::Read, os::unix::fs::FileExt};

    thread_local! {
        static OWN: RefCell<(Vec<u8>, String)> = RefCell::new((vec![0; 1 << 20], String::with_capacity(1 << 16)));
    }
    let (mut buffer, mut maps) = OWN.take();
    let memory = File::open("/proc/self/mem").unwrap();
    let own = buffer.as_ptr() as u64..buffer.as_ptr() as u64 + buffer.len() as u64;
    let mut count = |from: u64, to: u64| {
        let (mut at, mut found) = (from, 0);
        while at < to {
            let length = buffer.len().min((to - at) as usize);
            let Ok(read) = memory.read_at(&mut buffer[..length], at) else { break };
            buffer[..read].iter_mut().for_each(|byte| *byte = !*byte);
            found += buffer[..read].windows(masked.len()).filter(|window| *window == masked).count();
            // One on the border is seen next time, and none twice.
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
        .map(|(start, end)| match start <= own.start && own.end <= end {
            true => count(start, own.start) + count(own.end, end),
            false => count(start, end),
        })
        .sum();
    OWN.set((buffer, maps));
    found
}

/// A secret of 120 bytes, made where it is needed, so that no other copy of it is anywhere.
#[cfg(target_os = "linux")]
fn unmasked(masked: &[u8]) -> String {
    let mut text = String::with_capacity(masked.len());
    text.extend(masked.iter().map(|byte| char::from(!byte)));
    text
}

/// Letters that do not repeat, so that a text is found once where it stands once.
#[cfg(target_os = "linux")]
fn masked(seed: u32) -> Vec<u8> {
    let next = |state: &u32| Some(state.wrapping_mul(1_103_515_245).wrapping_add(12_345));
    let states = std::iter::successors(Some(seed), next);
    states.map(|state| !(b'a' + (state >> 16) as u8 % 26)).take(120).collect()
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn s3_our_bytes_are_wiped_when_the_last_reference_drops() {
    // In a process of its own there is less memory to look through, and nobody else's.
    if std::env::var_os(CASE).is_none() {
        run("secrets::s3_our_bytes_are_wiped_when_the_last_reference_drops", "own process", &[]);
        return;
    }
    let (masked_key, masked_jwt) = (masked(1), masked(2));

    let key = ApiKey::new(unmasked(&masked_key)).unwrap();
    let jwt = Token::new(unmasked(&masked_jwt)).unwrap();
    assert_eq!(resident(&masked_key), 1, "one buffer, and what it was made from is wiped");
    assert_eq!(resident(&masked_jwt), 1);

    let layer = JwtLayer::new(jwt, key);
    let sent = send(&layer, get(MODELS)).await.unwrap();
    let replaced = send(&layer, sent).await.unwrap();
    drop(layer);
    assert_eq!(resident(&masked_key), 1, "the request holds a reference, not a copy");

    let voice = handshake("wss://api.selamgpt.com/v1/audio/agent");
    let credentials = Credentials::key_and_jwt(
        ApiKey::new(unmasked(&masked_key)).unwrap(),
        Token::new(unmasked(&masked_jwt)).unwrap(),
    );
    let (mut parts, ()) = voice.into_parts();
    credentials.apply(&Origins::selam(), &mut parts).unwrap();
    assert!(resident(&masked_jwt) >= 3, "the request before, these credentials, and the handshake's query");

    drop((replaced, parts, credentials));
    assert_eq!((resident(&masked_key), resident(&masked_jwt)), (0, 0));
    tell("wiped");
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn s3_what_was_replaced_is_wiped_of_those_who_stay_away_too() {
    if std::env::var_os(CASE).is_none() {
        run("secrets::s3_what_was_replaced_is_wiped_of_those_who_stay_away_too", "own process", &[]);
        return;
    }
    let next = |asked: &AtomicUsize, seeds: [u32; 2]| unmasked(&masked(seeds[asked.fetch_add(1, Relaxed)]));
    let asked = AtomicUsize::new(0);
    let keys = Refreshing::new(source_fn(move |_: Reason<ApiKey>| {
        ready(ApiKey::new(next(&asked, [3, 4])).map_err(BoxError::from))
    }));
    let asked = AtomicUsize::new(0);
    let jwts = Refreshing::new(source_fn(move |_: Reason<Token>| {
        ready(Token::new(next(&asked, [5, 6])).map_err(BoxError::from))
    }));
    let users = PerSubject::new(|_: &Subject| source_fn(|_: Reason<Token>| ready(Ok::<_, BoxError>(jwt()))));
    let (shared, of_users) = (JwtLayer::new(&jwts, &keys), JwtLayer::new(&users, &keys));
    let goes = JwtLayer::new(&users, &keys);
    let idle = JwtLayer::new(&jwts, key());
    let of = |name: &str| {
        let mut request = get(MODELS);
        request.extensions_mut().insert(Subject::new(name));
        request
    };
    let alone = || {
        let mut request = get(MODELS);
        request.extensions_mut().insert(RequestAuth::ApiKey);
        request
    };
    for (layer, request) in [
        (&of_users, of("stays away")),
        (&of_users, of("comes again")),
        (&of_users, alone()),
        (&shared, get(MODELS)),
        (&shared, alone()),
        (&idle, get(MODELS)),
        (&goes, of("came by another layer")),
    ] {
        drop(send(layer, request).await.unwrap());
    }
    drop(goes);
    assert!(resident(&masked(3)) > 0 && resident(&masked(5)) > 0);

    keys.invalidate(&keys.current().unwrap());
    jwts.invalidate(&jwts.current().unwrap());
    while resident(&masked(4)) == 0 || resident(&masked(6)) == 0 {
        yield_now().await;
    }
    // Who lets go of many does so on a task.
    yield_now().await;
    drop(send(&of_users, of("comes again")).await.unwrap());
    drop(send(&shared, get(MODELS)).await.unwrap());
    assert_eq!((resident(&masked(3)), resident(&masked(5))), (0, 0));
    drop((idle, shared, of_users));
    tell("wiped");
}

#[test]
fn s4_the_id_is_stable_short_and_shared_by_nothing_else() {
    assert_eq!(ApiKey::new("sk-selam-example").unwrap().id().to_string(), "9da0f3");
    assert_eq!(
        ApiKey::new(" sk-selam-example\n").unwrap().id(),
        Token::new("sk-selam-example").unwrap().id()
    );
    assert_ne!(key().id(), ApiKey::new(format!("{KEY}x")).unwrap().id());
    assert!(!KEY.contains(&key().id().to_string()));
}
