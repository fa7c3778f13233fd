//! F5 and F6: sources that panic, runtimes that are not there or go, and the end of an engine.

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
    AuthError, AuthErrorKind, BoxError, JwtLayer, RefreshLayer, RefreshPolicy, Refreshing, SelamLayer, Token,
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

#[tokio::test(start_paused = true)]
async fn f5_a_source_that_panics_is_an_error_and_the_next_call_works() {
    let mint = Mint::default().then(Answer::Panics);
    let (jwts, _) = engine(&mint);
    let error = jwts.token().await.unwrap_err();
    assert_eq!(error.kind(), AuthErrorKind::RefreshFailed);
    assert!(!format!("{error} {error:?}").contains("secret"));
    sleep(2 * SECOND).await;
    assert_eq!(text(&jwts).await.unwrap(), "token-2");
}

#[test]
fn f5_without_a_runtime_it_is_a_typed_error_and_another_runtime_takes_over() {
    let jwts = Refreshing::new(source_fn(|_: Reason<Token>| async {
        tokio::task::yield_now().await;
        Ok::<_, BoxError>(Token::new("a-token")?)
    }));
    let error = task::spawn(jwts.token()).poll();
    assert!(matches!(error, Poll::Ready(Err(error)) if error.kind() == AuthErrorKind::RefreshFailed));

    // Its renewal is dropped with the runtime that ran it.
    let jwts = Refreshing::new(Mint::default());
    let first = runtime();
    let _ = first.block_on(async { tokio::time::timeout(Duration::ZERO, jwts.token()).await });
    drop(first);
    assert_eq!(runtime().block_on(text(&jwts)).unwrap().split('-').next(), Some("token"));
}

#[tokio::test(start_paused = true)]
async fn f6_the_last_handle_dropped_ends_the_task() {
    let mint = Mint::default().then(Answer::Hangs);
    let (jwts, _) = engine(&mint);
    let _ = tokio::time::timeout(SECOND, jwts.token()).await;
    assert_eq!(Arc::strong_count(&mint.asked), 2, "the engine has the other");
    drop(jwts);
    settle().await;
    assert_eq!(Arc::strong_count(&mint.asked), 1);
}

/// Panics when it is first asked, before there is a future.
#[derive(Default)]
struct Hasty(AtomicUsize);

impl Source<Token> for Hasty {
    fn fetch(&self, _: Reason<Token>) -> impl Future<Output = Result<Fetched<Token>, SourceError>> + Send {
        assert!(self.0.fetch_add(1, SeqCst) > 0, "sk-selam-a-secret-in-a-panic");
        async { Ok(Fetched::new(Token::new("a-token")?)) }
    }
}

#[tokio::test(start_paused = true)]
async fn f5_a_source_that_panics_before_its_future_is_an_error_as_well() {
    let jwts = Refreshing::new(Hasty::default());
    let error = jwts.token().await.unwrap_err();
    assert_eq!(error.kind(), AuthErrorKind::RefreshFailed);
    assert!(std::error::Error::source(&error).unwrap().to_string().contains("panicked"));
    assert!(!format!("{error} {error:?}").contains("secret"));
    sleep(2 * SECOND).await;
    assert_eq!(text(&jwts).await.unwrap(), "a-token");
}

/// Panics the first time it is asked for its version once so many have gone well.
struct Moody(Mint, AtomicUsize);

impl Source<Token> for Moody {
    async fn fetch(&self, reason: Reason<Token>) -> Result<Fetched<Token>, SourceError> {
        self.0.fetch(reason).await
    }

    fn version(&self) -> u64 {
        assert!(self.1.fetch_sub(1, SeqCst) != 0, "no version");
        0
    }
}

#[test]
fn f5_a_source_whose_version_panics_stops_nobody() {
    for well in 0..6 {
        let (tell, told) = channel();
        thread::spawn(move || {
            let (mint, clock) = (Mint::default(), clock());
            let source = Moody(mint.clone(), AtomicUsize::new(well));
            let jwts = Refreshing::with_policy(source, RefreshPolicy::new().with_clock(clock.clone()));
            let tokens = runtime().block_on(async {
                let first = jwts.token().await.unwrap();
                jwts.invalidate(&first);
                [first, jwts.token().await.unwrap()]
            });
            tell.send((tokens.map(|token| token.expose_secret().to_owned()), mint.asked()))
        });
        let (tokens, asked) = told.recv_timeout(HANG).expect("the renewal ends");
        assert_eq!((tokens, asked), (["token-1".to_owned(), "token-2".to_owned()], 2), "after {well}");
    }
}

#[test]
fn f5_without_timers_it_is_a_typed_error_and_a_runtime_that_has_them_does_better() {
    let (jwts, clock) = engine(&Mint::default());
    let error = Builder::new_current_thread().build().unwrap().block_on(jwts.token()).unwrap_err();
    assert_eq!(error.kind(), AuthErrorKind::RefreshFailed);
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("with its timers enabled"), "{cause}");
    clock.jump(SECOND);
    assert!(runtime().block_on(text(&jwts)).is_ok());
}

#[test]
fn f5_on_a_runtime_that_is_gone_it_is_a_typed_error() {
    let (tell, told) = channel();
    thread::spawn(move || {
        let gone = runtime().handle().clone();
        let (mint, _guard) = (Mint::default(), gone.enter());
        let (jwts, clock) = engine(&mint);
        let api = Api::accepting_all();
        let mut service = RefreshLayer::new().layer(JwtLayer::new(&jwts, key()).layer(api.service()));
        let error = assert_ready_err!(task::spawn(jwts.token()).poll());
        let refused = assert_ready_err!(task::spawn(service.call(request())).poll());
        assert_eq!(AuthError::find(&*refused).unwrap().kind(), AuthErrorKind::RefreshFailed);
        jwts.invalidate(&Token::new("another").unwrap());
        assert!(api.bearers().is_empty());
        clock.jump(2 * SECOND);
        tell.send((error, runtime().block_on(text(&jwts)).unwrap(), mint.asked()))
    });
    let (error, token, asked) = told.recv_timeout(HANG).expect("no loop and no deadlock");
    assert_eq!(error.kind(), AuthErrorKind::RefreshFailed);
    assert!(error.to_string().contains("its task was dropped"), "{error}");
    assert_eq!((token.as_str(), asked), ("token-1", 1), "it was never asked there");
}

#[test]
fn f5_who_waits_on_another_runtime_takes_over_when_the_first_is_shut_down() {
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
    assert_eq!((token.expose_secret(), mint.asked()), ("token-1", 1), "the first was not even begun");
}

#[test]
fn f5_callers_on_two_runtimes_share_one_renewal() {
    let mint = Mint::default().taking(Duration::from_millis(1));
    // Built where there is no runtime, layer and all.
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

#[test]
fn f5_a_request_outside_any_runtime_is_a_typed_error_and_is_not_sent() {
    let api = Api::accepting_all();
    let jwts = Refreshing::new(Mint::default());
    let mut service = JwtLayer::new(jwts, key()).layer(api.service());
    let Poll::Ready(Err(error)) = task::spawn(service.call(request())).poll() else { panic!("sent") };
    assert_eq!(AuthError::find(&*error).unwrap().kind(), AuthErrorKind::RefreshFailed);
    assert!(api.bearers().is_empty());
}

#[tokio::test(start_paused = true)]
async fn f6_the_last_of_layers_services_and_requests_that_is_dropped_ends_the_task() {
    let tasks = || Handle::current().metrics().num_alive_tasks();
    let mint = Mint::default().then(Answer::Hangs);
    let (jwts, _) = engine(&mint);
    let layer = JwtLayer::new(jwts, key());
    let api = Api::accepting_all();
    let mut service = RefreshLayer::new().layer(layer.layer(api.service()));
    let another = service.clone();
    let mut waiting = task::spawn(service.call(request()));
    assert_pending!(waiting.poll());
    settle().await;
    for dropped in [Box::new(layer) as Box<dyn std::any::Any>, Box::new(service), Box::new(another)] {
        assert_eq!(tasks(), 1, "the renewal");
        drop(dropped);
        settle().await;
    }
    assert_eq!(tasks(), 1, "somebody still waits for it");
    drop(waiting);
    settle().await;
    assert_eq!((tasks(), Arc::strong_count(&mint.asked)), (0, 1));
    assert!(api.bearers().is_empty());
}

#[tokio::test(start_paused = true)]
async fn f6_between_renewals_an_engine_has_no_task() {
    let mint = Mint::default();
    let (jwts, _) = engine(&mint);
    jwts.prefetch().await.unwrap();
    settle().await;
    assert_eq!(Handle::current().metrics().num_alive_tasks(), 0);
    sleep(3_600 * SECOND).await;
    assert_eq!(mint.asked(), 1, "nobody asks, so nothing is renewed");
}

/// `first` lives, and nobody drives it: the timeout of the renewal that it runs does not come either.
#[test]
fn f4_f5_a_runtime_that_nobody_drives_holds_up_no_other() {
    let runtime = |paused| Builder::new_current_thread().enable_all().start_paused(paused).build().unwrap();
    let (first, second) = (runtime(false), runtime(true));
    let asked = Arc::new(AtomicUsize::new(0));
    let source = source_fn({
        let asked = Arc::clone(&asked);
        move |_: Reason<Token>| {
            let number = asked.fetch_add(1, SeqCst) + 1;
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
    assert_eq!(waited, 31 * SECOND, "its time, and a second");

    // What comes of the first changes nothing.
    first.block_on(async {
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
    });
    assert_eq!((jwts.current().unwrap().expose_secret(), asked.load(SeqCst)), ("token-1", 1));
}

/// A wait is a future like any other: it may be polled on one runtime and then on another. `renews` lives, and nobody
/// drives it.
#[test]
fn f4_f5_a_wait_that_moves_to_another_runtime_ends_there_in_its_time() {
    let paused = || Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    for (begins_where_it_renews, is_shut_down) in [(true, false), (false, false), (false, true)] {
        let (renews, begins, ends) = (paused(), paused(), paused());
        let jwts = Refreshing::new(Mint::default());
        {
            let _guard = renews.enter();
            assert_pending!(task::spawn(jwts.token()).poll());
        }
        let mut waiting = task::spawn(jwts.token());
        {
            let _guard = if begins_where_it_renews { &renews } else { &begins }.enter();
            assert_pending!(waiting.poll());
        }
        if is_shut_down {
            drop(begins);
        }
        let began = ends.block_on(async { tokio::time::Instant::now() });
        let token = ends.block_on(async { tokio::time::timeout(60 * SECOND, waiting).await });
        assert_eq!(token.expect("it ends").unwrap().expose_secret(), "token-1");
        // A renewal's time and a second, less what lies between the beginnings of two runtimes.
        let waited = ends.block_on(async { began.elapsed() });
        assert!((30 * SECOND..=31 * SECOND).contains(&waited), "{waited:?}");
    }
}

/// The source's own time limit cannot come while it blocks; a second later, somebody else looks at the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn f4_a_source_that_blocks_its_thread_releases_all_who_wait() {
    let (release, blocked) = channel::<()>();
    let blocked = std::sync::Mutex::new(Some(blocked));
    let source = source_fn(move |_: Reason<Token>| {
        // The first time until it is released, and for good if it is not.
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
        let ended = tokio::time::timeout(60 * SECOND, call).await.expect("it was released").unwrap();
        let _ = ended.map(|token| assert_eq!(token.expose_secret(), "token"));
    }
    drop(release);
}
