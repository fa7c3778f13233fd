//! Tests of panicking sources, of missing and shut-down runtimes, and of the end of an engine's task.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
        mpsc::channel,
    },
    task::Poll,
    thread,
    time::Duration,
};

use tokio::{
    runtime::{Builder, Handle, Runtime},
    time::sleep,
};
use tokio_test::{assert_pending, assert_ready_err, task};
use tower::{Layer, Service, ServiceExt};
use tower_selam::{
    ApiKeyLayer, AuthError, AuthErrorKind, BoxError, JwtLayer, RefreshLayer, RefreshPolicy, Refreshing,
    SelamLayer, Token,
    source::{Fetched, Reason, Source, SourceError, source_fn},
};

use crate::{
    api::{Api, request},
    mint::{Answer, Mint, SECOND, clock, engine, settle, text},
    support::{HANG, key},
};

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_time().build().unwrap()
}

/// F5: a source that panics causes a typed error, and the next call works.
#[tokio::test(start_paused = true)]
async fn panicking_source_is_an_error() {
    let mint = Mint::default().then(Answer::Panics);
    let (jwts, _) = engine(&mint);
    let error = jwts.token().await.unwrap_err();
    assert_eq!(error.kind(), AuthErrorKind::RefreshFailed);
    assert!(!format!("{error} {error:?}").contains("secret"));
    sleep(2 * SECOND).await;
    assert_eq!(text(&jwts).await.unwrap(), "token-2");
}

/// F5: without a runtime the result is a typed error; after a shut-down, another runtime takes over.
#[test]
fn missing_runtime_is_a_typed_error() {
    let jwts = Refreshing::new(source_fn(|_: Reason<Token>| async {
        tokio::task::yield_now().await;
        Ok::<_, BoxError>(Token::new("a-token")?)
    }));
    let error = task::spawn(jwts.token()).poll();
    assert!(matches!(error, Poll::Ready(Err(error)) if error.kind() == AuthErrorKind::RefreshFailed));

    // The refresh is dropped with the runtime that ran it.
    let jwts = Refreshing::new(Mint::default());
    let first = runtime();
    let _ = first.block_on(async { tokio::time::timeout(Duration::ZERO, jwts.token()).await });
    drop(first);
    assert_eq!(runtime().block_on(text(&jwts)).unwrap().split('-').next(), Some("token"));
}

/// F6: dropping the last handle ends the task.
#[tokio::test(start_paused = true)]
async fn last_handle_dropped_ends_the_task() {
    let mint = Mint::default().then(Answer::Hangs);
    let (jwts, _) = engine(&mint);
    let _ = tokio::time::timeout(SECOND, jwts.token()).await;
    assert_eq!(Arc::strong_count(&mint.asked), 2, "the engine holds the other reference");
    drop(jwts);
    settle().await;
    assert_eq!(Arc::strong_count(&mint.asked), 1);
}

/// A source whose first `fetch` panics before it returns a future.
#[derive(Default)]
struct PanicsBeforeFuture(AtomicUsize);

impl Source<Token> for PanicsBeforeFuture {
    fn fetch(&self, _: Reason<Token>) -> impl Future<Output = Result<Fetched<Token>, SourceError>> + Send {
        assert!(self.0.fetch_add(1, SeqCst) > 0, "sk-selam-a-secret-in-a-panic");
        async { Ok(Fetched::new(Token::new("a-token")?)) }
    }
}

/// F5: a source that panics before it returns its future causes a typed error.
#[tokio::test(start_paused = true)]
async fn panic_before_the_future_is_an_error() {
    let jwts = Refreshing::new(PanicsBeforeFuture::default());
    let error = jwts.token().await.unwrap_err();
    assert_eq!(error.kind(), AuthErrorKind::RefreshFailed);
    assert!(std::error::Error::source(&error).unwrap().to_string().contains("panicked"));
    assert!(!format!("{error} {error:?}").contains("secret"));
    sleep(2 * SECOND).await;
    assert_eq!(text(&jwts).await.unwrap(), "a-token");
}

/// A source whose `version` panics once, after a number of successful calls.
struct VersionPanics(Mint, AtomicUsize);

impl Source<Token> for VersionPanics {
    async fn fetch(&self, reason: Reason<Token>) -> Result<Fetched<Token>, SourceError> {
        self.0.fetch(reason).await
    }

    fn version(&self) -> u64 {
        assert!(self.1.fetch_sub(1, SeqCst) != 0, "no version");
        0
    }
}

/// F5: a panic in `Source::version` blocks no caller.
#[test]
fn panicking_version_blocks_no_caller() {
    for successes in 0..6 {
        let (sender, receiver) = channel();
        thread::spawn(move || {
            let (mint, clock) = (Mint::default(), clock());
            let source = VersionPanics(mint.clone(), AtomicUsize::new(successes));
            let jwts = Refreshing::with_policy(source, RefreshPolicy::new().with_clock(clock.clone()));
            let tokens = runtime().block_on(async {
                let first = jwts.token().await.unwrap();
                jwts.rejected(&first);
                [first, jwts.token().await.unwrap()]
            });
            sender.send((tokens.map(|token| token.expose_secret().to_owned()), mint.asked()))
        });
        let (tokens, asked) = receiver.recv_timeout(HANG).expect("the refresh must end");
        assert_eq!(
            (tokens, asked),
            (["token-1".to_owned(), "token-2".to_owned()], 2),
            "panic after {successes} calls of `version`"
        );
    }
}

/// F5: a runtime without timers gives a typed error; one with timers works afterwards.
#[test]
fn runtime_without_timers_is_a_typed_error() {
    let (jwts, clock) = engine(&Mint::default());
    let error = Builder::new_current_thread().build().unwrap().block_on(jwts.token()).unwrap_err();
    assert_eq!(error.kind(), AuthErrorKind::RefreshFailed);
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("with its timers enabled"), "{cause}");
    clock.jump(SECOND);
    assert!(runtime().block_on(text(&jwts)).is_ok());
}

/// F5: inside the context of a shut-down runtime the result is a typed error, and nothing is sent.
#[test]
fn shut_down_runtime_is_a_typed_error() {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let shut_down = runtime().handle().clone();
        let (mint, _guard) = (Mint::default(), shut_down.enter());
        let (jwts, clock) = engine(&mint);
        let api = Api::accepting_all();
        let mut service = RefreshLayer::new()
            .layer((JwtLayer::new(&jwts), ApiKeyLayer::x_api_key(key())).layer(api.service()));
        let error = assert_ready_err!(task::spawn(jwts.token()).poll());
        let refused = assert_ready_err!(task::spawn(service.call(request())).poll());
        assert_eq!(AuthError::find(&*refused).unwrap().kind(), AuthErrorKind::RefreshFailed);
        jwts.rejected(&Token::new("another").unwrap());
        assert!(api.bearers().is_empty());
        clock.jump(2 * SECOND);
        sender.send((error, runtime().block_on(text(&jwts)).unwrap(), mint.asked()))
    });
    let (error, token, asked) =
        receiver.recv_timeout(HANG).expect("a shut-down runtime must cause neither a loop nor a deadlock");
    assert_eq!(error.kind(), AuthErrorKind::RefreshFailed);
    assert!(error.to_string().contains("the task was dropped"), "{error}");
    assert_eq!(
        (token.as_str(), asked),
        ("token-1", 1),
        "the shut-down runtime must not have reached the source"
    );
}

/// F5: when the runtime of a refresh shuts down, a waiter on another runtime takes over.
#[test]
fn waiter_on_another_runtime_takes_over() {
    let mint = Mint::default().taking(Duration::from_millis(1));
    let jwts = Refreshing::new(mint.clone());
    let (first, second) = (runtime(), runtime());
    let mut waiting = task::spawn(jwts.token());
    {
        let _guard = first.enter();
        assert_pending!(task::spawn(jwts.token()).poll());
    }
    {
        let _guard = second.enter();
        assert_pending!(waiting.poll());
    }
    drop(first);
    assert!(waiting.is_woken());
    let token = second.block_on(async { waiting.await.unwrap() });
    assert_eq!(
        (token.expose_secret(), mint.asked()),
        ("token-1", 1),
        "the first fetch must not have started"
    );
}

/// F5: callers on two runtimes share one refresh, through a layer built outside both.
#[test]
fn callers_on_two_runtimes_share_one_refresh() {
    let mint = Mint::default().taking(Duration::from_millis(1));
    // Layer and service are built outside any runtime.
    let layer = SelamLayer::builder().with_api_key(key()).with_jwt(Refreshing::new(mint.clone()));
    let service = layer.build().unwrap().layer(Api::accepting_all().service());
    let runtimes = [runtime(), Builder::new_multi_thread().worker_threads(1).enable_time().build().unwrap()];
    let calls = runtimes.each_ref().map(|runtime| runtime.spawn(service.clone().oneshot(request())));
    let [here, there] = calls;
    runtimes[0].block_on(async {
        here.await.unwrap().unwrap();
        there.await.unwrap().unwrap();
    });
    assert_eq!(mint.asked(), 1);
}

/// F5: a request outside any runtime fails with a typed error and is not sent.
#[test]
fn request_outside_any_runtime_is_not_sent() {
    let api = Api::accepting_all();
    let jwts = Refreshing::new(Mint::default());
    let mut service = (JwtLayer::new(jwts), ApiKeyLayer::x_api_key(key())).layer(api.service());
    let Poll::Ready(Err(error)) = task::spawn(service.call(request())).poll() else { panic!("sent") };
    assert_eq!(AuthError::find(&*error).unwrap().kind(), AuthErrorKind::RefreshFailed);
    assert!(api.bearers().is_empty());
}

/// F6: the task ends with the last of the layers, services and requests that own the engine.
#[tokio::test(start_paused = true)]
async fn last_owner_dropped_ends_the_task() {
    let tasks = || Handle::current().metrics().num_alive_tasks();
    let mint = Mint::default().then(Answer::Hangs);
    let (jwts, _) = engine(&mint);
    let layer = (JwtLayer::new(jwts), ApiKeyLayer::x_api_key(key()));
    let api = Api::accepting_all();
    let mut service = RefreshLayer::new().layer(layer.layer(api.service()));
    let another = service.clone();
    let mut waiting = task::spawn(service.call(request()));
    assert_pending!(waiting.poll());
    settle().await;
    for dropped in [Box::new(layer) as Box<dyn std::any::Any>, Box::new(service), Box::new(another)] {
        assert_eq!(tasks(), 1, "the refresh must still run");
        drop(dropped);
        settle().await;
    }
    assert_eq!(tasks(), 1, "a request still waits for the refresh");
    drop(waiting);
    settle().await;
    assert_eq!((tasks(), Arc::strong_count(&mint.asked)), (0, 1));
    assert!(api.bearers().is_empty());
}

/// F6: an engine has no task between refreshes.
#[tokio::test(start_paused = true)]
async fn idle_engine_has_no_task() {
    let mint = Mint::default();
    let (jwts, _) = engine(&mint);
    jwts.prefetch().await.unwrap();
    settle().await;
    assert_eq!(Handle::current().metrics().num_alive_tasks(), 0);
    sleep(3_600 * SECOND).await;
    assert_eq!(mint.asked(), 1, "nothing may be refreshed without a request");
}

/// F4, F5: a runtime that is not driven does not block waiters on another one.
///
/// `first` runs the refresh but is not driven, so that not even the refresh's own timeout fires.
#[test]
fn undriven_runtime_blocks_no_other() {
    let runtime = |paused| Builder::new_current_thread().enable_all().start_paused(paused).build().unwrap();
    let (first, second) = (runtime(false), runtime(true));
    let fetches = Arc::new(AtomicUsize::new(0));
    let source = source_fn({
        let fetches = Arc::clone(&fetches);
        move |_: Reason<Token>| {
            let number = fetches.fetch_add(1, SeqCst) + 1;
            async move {
                tokio::task::yield_now().await;
                Ok::<_, BoxError>(Token::new(format!("token-{number}"))?)
            }
        }
    });
    let jwts = Refreshing::new(source);
    first.block_on(async {
        let mut call = task::spawn(jwts.token());
        assert!(call.poll().is_pending());
    });
    let began = second.block_on(async { tokio::time::Instant::now() });
    let token = second.block_on(async { tokio::time::timeout(60 * SECOND, jwts.token()).await });
    assert_eq!(token.unwrap().unwrap().expose_secret(), "token-1");
    let waited = second.block_on(async { began.elapsed() });
    assert_eq!(waited, 31 * SECOND, "the timeout of the refresh plus one second");

    // The late result of the first runtime changes nothing.
    first.block_on(async {
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
    });
    assert_eq!((jwts.current().unwrap().expose_secret(), fetches.load(SeqCst)), ("token-1", 1));
}

/// F4, F5: a wait that is first polled on one runtime and then on another ends on time.
///
/// `refreshing` runs the refresh but is not driven.
#[test]
fn wait_moved_between_runtimes_ends_on_time() {
    let paused = || Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    for (starts_where_it_refreshes, is_shut_down) in [(true, false), (false, false), (false, true)] {
        let (refreshing, start, end) = (paused(), paused(), paused());
        let jwts = Refreshing::new(Mint::default());
        {
            let _guard = refreshing.enter();
            assert_pending!(task::spawn(jwts.token()).poll());
        }
        let mut waiting = task::spawn(jwts.token());
        {
            let _guard = if starts_where_it_refreshes { &refreshing } else { &start }.enter();
            assert_pending!(waiting.poll());
        }
        if is_shut_down {
            drop(start);
        }
        let began = end.block_on(async { tokio::time::Instant::now() });
        let token = end.block_on(async { tokio::time::timeout(60 * SECOND, waiting).await });
        assert_eq!(token.expect("the wait must end").unwrap().expose_secret(), "token-1");
        // The timeout of the refresh plus one second, minus the time between the start of the two runtimes.
        let waited = end.block_on(async { began.elapsed() });
        assert!((30 * SECOND..=31 * SECOND).contains(&waited), "{waited:?}");
    }
}

/// F4: a source that blocks its thread still releases all waiters.
///
/// The refresh's own timeout cannot fire while its thread is blocked; a second later, a waiter checks the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn blocking_source_releases_all_waiters() {
    let (release, blocked) = channel::<()>();
    let blocked = std::sync::Mutex::new(Some(blocked));
    let source = source_fn(move |_: Reason<Token>| {
        // The first fetch blocks until the test drops `release`.
        if let Some(blocked) = blocked.lock().unwrap().take() {
            let _ = blocked.recv();
        }
        async { Ok::<_, BoxError>(Token::new("token")?) }
    });
    let policy = RefreshPolicy::default().with_timeout(SECOND / 100);
    let jwts = Refreshing::with_policy(source, policy);
    let calls: Vec<_> = (0..3)
        .map(|_| {
            let jwts = jwts.clone();
            tokio::spawn(async move { jwts.token().await })
        })
        .collect();
    for call in calls {
        let ended =
            tokio::time::timeout(60 * SECOND, call).await.expect("every waiter must be released").unwrap();
        let _ = ended.map(|token| assert_eq!(token.expose_secret(), "token"));
    }
    drop(release);
}
