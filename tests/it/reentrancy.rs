//! Sources that use the engine or stack they refresh (F7), and calls during which no lock is held (F8).

use std::{
    pin::pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
        mpsc::channel,
    },
    task::{Context, Poll, Wake, Waker},
    thread,
    time::Duration,
};

use http::{Request, Response, StatusCode};
use tokio::{
    runtime::Builder,
    time::{Instant, sleep},
};
use tokio_test::task;
use tower::{Layer, Service, ServiceExt, buffer::Buffer, service_fn, util::BoxCloneSyncService};
use tower_selam::{
    ApiKeyLayer, AuthError, AuthErrorKind, BoxError, JwtLayer, RefreshLayer, RefreshPolicy, Refreshing,
    RequestAuth, Token,
    auth_error::InspectedBody,
    source::{Fetched, Reason, Source, SourceError, source_fn},
};

use crate::{
    api::{Api, INVALID_TOKEN, request, request_with},
    mint::{Answer, MINUTE, Mint, SECOND, clock, engine, settle, text},
    support::{Body, HANG, MODELS, get, key, values},
};

/// F7: a source that asks for its own token gets an error at once.
#[tokio::test(start_paused = true)]
async fn source_awaiting_its_own_token_fails_fast() {
    let slot: Slot<Refreshing<Token>> = Slot::default();
    let source_slot = Arc::clone(&slot);
    let jwts = Refreshing::new(source_fn(move |_: Reason<Token>| {
        let engine = source_slot.lock().unwrap().clone().unwrap();
        async move { engine.token().await.map_err(BoxError::from) }
    }));
    *slot.lock().unwrap() = Some(jwts.clone());
    let started = Instant::now();
    let error = jwts.token().await.unwrap_err();
    assert_eq!(started.elapsed(), Duration::ZERO, "fails at once, not at the timeout");
    let cause = AuthError::find(std::error::Error::source(&error).unwrap()).unwrap().to_string();
    assert!(cause.contains("waits for the credential itself"), "{cause}");
    *slot.lock().unwrap() = None;
}

/// Whether the error chain says that a source waits for itself.
fn reports_self_wait(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    std::iter::from_fn(|| {
        let error = next?;
        next = error.source();
        Some(error.to_string())
    })
    .any(|text| text.contains("waits for the credential itself"))
}

/// Where a source finds an engine or a service that is built only after the source.
type Slot<S> = Arc<Mutex<Option<S>>>;

type Boxed = BoxCloneSyncService<Request<Body>, Response<InspectedBody<Body>>, BoxError>;

/// An engine whose source sends a request with this `RequestAuth` through the service in the slot.
fn engine_sending_through(slot: &Slot<Boxed>, auth: Option<RequestAuth>) -> Refreshing<Token> {
    let slot = Arc::clone(slot);
    Refreshing::new(source_fn(move |_: Reason<Token>| {
        let (service, auth) = (slot.lock().unwrap().clone().unwrap(), auth.clone());
        async move {
            service.oneshot(request_with(auth)).await?;
            Ok::<_, BoxError>(Token::new("of-the-same-stack")?)
        }
    }))
}

/// F7: a source that sends through its own stack gets an error at once if the request needs the JWT, and succeeds
/// if it does not.
#[tokio::test(start_paused = true)]
async fn source_using_its_own_stack_never_deadlocks() {
    for (auth, buffered) in [
        (None, false),
        (None, true),
        (Some(RequestAuth::ApiKeyAndJwt), false),
        (Some(RequestAuth::ApiKey), false),
        (Some(RequestAuth::ApiKey), true),
        (Some(RequestAuth::Anonymous), false),
    ] {
        let slot = Slot::default();
        let jwts = engine_sending_through(&slot, auth.clone());
        let api = Api::accepting_all();
        let stack = RefreshLayer::new()
            .layer((JwtLayer::new(&jwts), ApiKeyLayer::x_api_key(key())).layer(api.service()));
        let service = if buffered {
            BoxCloneSyncService::new(Buffer::new(stack.clone(), 10))
        } else {
            BoxCloneSyncService::new(stack.clone())
        };
        *slot.lock().unwrap() = Some(service);
        let started = Instant::now();
        let answered = stack.oneshot(request()).await;
        assert_eq!(started.elapsed(), Duration::ZERO, "fails at once, not at the timeout");
        let case = format!("{auth:?}, buffered: {buffered}");
        if matches!(auth, None | Some(RequestAuth::ApiKeyAndJwt)) {
            let error = answered.unwrap_err();
            assert_eq!(AuthError::find(&*error).unwrap().kind(), AuthErrorKind::RefreshFailed, "{case}");
            assert!(reports_self_wait(&*error), "{case}: {error:?}");
            assert!(api.bearers().is_empty(), "{case}");
        } else {
            answered.expect(&case);
            assert_eq!(api.bearers().last().unwrap(), "of-the-same-stack", "{case}");
            assert_eq!(api.bearers().len(), 2, "{case}");
        }
        *slot.lock().unwrap() = None;
    }
}

/// F7: two sources that wait for each other get an error at once.
#[tokio::test(start_paused = true)]
async fn sources_awaiting_each_other_fail_fast() {
    let slots: [Slot<Refreshing<Token>>; 2] = Default::default();
    let engines = [0, 1].map(|other: usize| {
        let other = Arc::clone(&slots[1 - other]);
        Refreshing::new(source_fn(move |_: Reason<Token>| {
            let other = other.lock().unwrap().clone().unwrap();
            async move { other.token().await.map_err(BoxError::from) }
        }))
    });
    for (slot, engine) in slots.iter().zip(&engines) {
        *slot.lock().unwrap() = Some(engine.clone());
    }
    let started = Instant::now();
    let error = engines[0].token().await.unwrap_err();
    assert!(reports_self_wait(&error), "{error:?}");
    assert_eq!(started.elapsed(), Duration::ZERO);
    slots.iter().for_each(|slot| *slot.lock().unwrap() = None);
}

/// F7: a source that asks for its own token on another task ends at the refresh timeout.
#[tokio::test(start_paused = true)]
async fn self_wait_on_another_task_times_out() {
    let slot: Slot<Refreshing<Token>> = Slot::default();
    let source_slot = Arc::clone(&slot);
    let jwts = Refreshing::new(source_fn(move |_: Reason<Token>| {
        let engine = source_slot.lock().unwrap().clone().unwrap();
        async move { tokio::spawn(async move { engine.token().await }).await?.map_err(BoxError::from) }
    }));
    *slot.lock().unwrap() = Some(jwts.clone());
    let started = Instant::now();
    assert_eq!(text(&jwts).await, Err(AuthErrorKind::RefreshFailed));
    assert_eq!(started.elapsed(), Duration::from_secs(30));
    *slot.lock().unwrap() = None;
}

/// F7: a 401 for the request of a source does not make the source wait for itself.
#[tokio::test(start_paused = true)]
async fn source_whose_request_is_rejected_completes() {
    // The source sends with the old token, gets a 401 and returns a new token.
    let (slot, fetches) = (Slot::<Boxed>::default(), Arc::new(AtomicUsize::new(0)));
    let (source_slot, counter) = (Arc::clone(&slot), Arc::clone(&fetches));
    let clock = clock();
    let source = source_fn(move |_: Reason<Token>| {
        let number = counter.fetch_add(1, SeqCst) + 1;
        let service = source_slot.lock().unwrap().clone().filter(|_| number > 1);
        async move {
            if let Some(service) = service {
                assert_eq!(service.oneshot(request()).await?.status(), StatusCode::UNAUTHORIZED);
            }
            Ok::<_, BoxError>(Fetched::new(Token::new(format!("token-{number}"))?).with_lifetime(MINUTE))
        }
    });
    let jwts = Refreshing::with_policy(source, RefreshPolicy::new().with_clock(clock).with_jitter(0.0));
    jwts.prefetch().await.unwrap();
    let api = Api::accepting("token-2", INVALID_TOKEN);
    let stack =
        RefreshLayer::new().layer((JwtLayer::new(&jwts), ApiKeyLayer::x_api_key(key())).layer(api.service()));
    *slot.lock().unwrap() = Some(BoxCloneSyncService::new(stack.clone()));
    sleep(54 * SECOND).await;
    let started = Instant::now();
    assert_eq!(text(&jwts).await.unwrap(), "token-1", "the old token, and a refresh in the background");
    settle().await;
    assert_eq!(stack.oneshot(request()).await.unwrap().status(), StatusCode::OK);
    assert_eq!((started.elapsed(), fetches.load(SeqCst)), (Duration::ZERO, 2));
    assert_eq!(api.bearers(), ["token-1", "token-2"]);
    *slot.lock().unwrap() = None;
}

/// Calls the non-waiting methods of an engine, polls one request once, and describes the results.
fn use_without_waiting(jwts: &Refreshing<Token>) -> String {
    jwts.rejected(&Token::new("another").unwrap());
    let api = service_fn(|request: Request<()>| {
        let bearer = values(&request, "authorization").concat();
        std::future::ready(Ok::<_, BoxError>(Response::new(bearer)))
    });
    let mut service = (JwtLayer::new(jwts), ApiKeyLayer::x_api_key(key())).layer(api);
    let sent = match task::spawn(service.call(get(MODELS))).poll() {
        Poll::Ready(Ok(response)) => response.into_body(),
        _ => "pending".to_owned(),
    };
    let current = jwts.current().map(|token| token.expose_secret().to_owned());
    let expires = jwts.expires_at().is_some() && format!("{jwts:?}").contains("Some");
    format!("{current:?}, expires: {expires}, sent: {sent}")
}

/// Does the same on another thread, and panics if that thread hangs.
fn use_on_another_thread(jwts: &Refreshing<Token>) -> String {
    let ((sender, receiver), jwts) = (channel(), jwts.clone());
    thread::spawn(move || sender.send(use_without_waiting(&jwts)));
    receiver.recv_timeout(HANG).expect("a lock is held")
}

/// F8: a refresh that never completes holds no lock.
#[tokio::test(start_paused = true)]
async fn hanging_refresh_blocks_no_caller() {
    let mint = Mint::default().then(Answer::Lives(MINUTE)).then(Answer::Hangs);
    let (jwts, _) = engine(&mint);
    let first = jwts.token().await.unwrap();
    sleep(54 * SECOND).await;
    jwts.token().await.unwrap();
    settle().await;
    assert_eq!(mint.asked(), 2, "a refresh is running");
    assert_eq!(use_on_another_thread(&jwts), r#"Some("token-1"), expires: true, sent: Bearer token-1"#);
    jwts.rejected(&first);
    assert_eq!(use_on_another_thread(&jwts), r#"Some("token-1"), expires: true, sent: pending"#);
    assert_eq!(mint.asked(), 2);
}

/// F8: a source that blocks its thread holds no lock.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn blocking_source_blocks_no_caller() {
    let (signal_start, started) = channel();
    let (release, released) = channel::<()>();
    let (fetches, released) = (AtomicUsize::new(0), Arc::new(Mutex::new(released)));
    let source = source_fn(move |_: Reason<Token>| {
        let (number, signal_start, released) =
            (fetches.fetch_add(1, SeqCst) + 1, signal_start.clone(), Arc::clone(&released));
        async move {
            if number == 2 {
                signal_start.send(())?;
                let _ = released.lock().unwrap().recv();
            }
            Ok::<_, BoxError>(Fetched::new(Token::new(format!("token-{number}"))?).with_lifetime(60 * MINUTE))
        }
    });
    let clock = clock();
    let jwts = Refreshing::with_policy(source, RefreshPolicy::new().with_clock(clock.clone()));
    jwts.prefetch().await.unwrap();
    clock.jump(57 * MINUTE);
    jwts.token().await.unwrap();
    started.recv_timeout(HANG).unwrap();
    assert_eq!(use_on_another_thread(&jwts), r#"Some("token-1"), expires: true, sent: Bearer token-1"#);
    release.send(()).unwrap();
}

/// A source and a waker that call back into their own engine wherever they are called.
struct Reentrant(Slot<Refreshing<Token>>);

impl Reentrant {
    fn call_engine(&self) {
        let engine = self.0.lock().unwrap().clone();
        if let Some(engine) = engine {
            let _ = (engine.current(), engine.expires_at(), format!("{engine:?}"));
            engine.rejected(&Token::new("another").unwrap());
        }
    }
}

impl Source<Token> for Reentrant {
    async fn fetch(&self, _: Reason<Token>) -> Result<Fetched<Token>, SourceError> {
        self.call_engine();
        tokio::task::yield_now().await;
        self.call_engine();
        Ok(Fetched::new(Token::new("a-token")?))
    }

    fn version(&self) -> u64 {
        // `rejected` calls this.
        let engine = self.0.lock().unwrap().clone();
        engine.map_or(0, |engine| u64::from(engine.current().is_some() && engine.expires_at().is_none()))
    }
}

impl Wake for Reentrant {
    fn wake(self: Arc<Self>) {
        self.call_engine();
    }
}

/// F8: no lock is held while a source or a waker is called.
#[test]
fn sources_and_wakers_run_without_a_lock() {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let slot = Slot::default();
        let jwts = Refreshing::new(Reentrant(Arc::clone(&slot)));
        *slot.lock().unwrap() = Some(jwts.clone());
        let runtime = Builder::new_current_thread().enable_time().build().unwrap();
        let waker = Waker::from(Arc::new(Reentrant(Arc::clone(&slot))));
        let first = runtime.block_on(async {
            let mut waiting = pin!(jwts.token());
            assert!(waiting.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
            settle().await;
            waiting.await.unwrap()
        });
        runtime.block_on(async {
            jwts.rejected(&first);
            settle().await;
        });
        *slot.lock().unwrap() = None;
        sender.send(first.expose_secret().to_owned())
    });
    assert_eq!(receiver.recv_timeout(HANG).expect("a lock is held"), "a-token");
}
