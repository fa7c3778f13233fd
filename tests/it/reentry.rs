//! F7 and F8: sources that ask the engine they renew for, and locks that nobody holds meanwhile.

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
    AuthError, AuthErrorKind, BoxError, JwtLayer, RefreshLayer, RefreshPolicy, Refreshing, RequestAuth,
    Token,
    auth_error::InspectedBody,
    source::{Fetched, Reason, Source, SourceError, source_fn},
};

use crate::{
    api::{Api, INVALID_TOKEN, request, request_with},
    mint::{Answer, MINUTE, Mint, SECOND, clock, engine, settle, text},
    support::{Body, HANG, MODELS, get, key, values},
};

#[tokio::test(start_paused = true)]
async fn f7_a_source_that_asks_for_its_own_token_is_told_so() {
    let slot: Arc<Mutex<Option<Refreshing<Token>>>> = Arc::default();
    let own = Arc::clone(&slot);
    let jwts = Refreshing::new(source_fn(move |_: Reason<Token>| {
        let own = own.lock().unwrap().clone().unwrap();
        async move { own.token().await.map_err(BoxError::from) }
    }));
    *slot.lock().unwrap() = Some(jwts.clone());
    let began = Instant::now();
    let error = jwts.token().await.unwrap_err();
    assert_eq!(began.elapsed(), Duration::ZERO, "no deadlock until a timeout");
    let own = AuthError::find(std::error::Error::source(&error).unwrap()).unwrap().to_string();
    assert!(own.contains("waits for the credential itself"), "{own}");
    *slot.lock().unwrap() = None;
}

/// Whether the error says that a source waits for itself.
fn told(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    std::iter::from_fn(|| {
        let error = next?;
        next = error.source();
        Some(error.to_string())
    })
    .any(|text| text.contains("waits for the credential itself"))
}

/// A place for a service that its own source sends with.
type Slot<S> = Arc<Mutex<Option<S>>>;

type Boxed = BoxCloneSyncService<Request<Body>, Response<InspectedBody<Body>>, BoxError>;

/// An engine whose source sends a request with such a choice through the service in the slot.
fn sending(slot: &Slot<Boxed>, choice: Option<RequestAuth>) -> Refreshing<Token> {
    let slot = Arc::clone(slot);
    Refreshing::new(source_fn(move |_: Reason<Token>| {
        let (service, choice) = (slot.lock().unwrap().clone().unwrap(), choice.clone());
        async move {
            service.oneshot(request_with(choice)).await?;
            Ok::<_, BoxError>(Token::new("of-the-same-stack")?)
        }
    }))
}

#[tokio::test(start_paused = true)]
async fn f7_a_source_that_sends_through_its_own_stack_is_told_so_and_how_to() {
    for (choice, buffered) in [
        (None, false),
        (None, true),
        (Some(RequestAuth::ApiKeyAndJwt), false),
        (Some(RequestAuth::ApiKey), false),
        (Some(RequestAuth::ApiKey), true),
        (Some(RequestAuth::Anonymous), false),
    ] {
        let slot = Slot::default();
        let jwts = sending(&slot, choice.clone());
        let api = Api::accepting_all();
        let stack = RefreshLayer::new().layer(JwtLayer::new(&jwts, key()).layer(api.service()));
        let service = if buffered {
            BoxCloneSyncService::new(Buffer::new(stack.clone(), 10))
        } else {
            BoxCloneSyncService::new(stack.clone())
        };
        *slot.lock().unwrap() = Some(service);
        let began = Instant::now();
        let answered = stack.oneshot(request()).await;
        assert_eq!(began.elapsed(), Duration::ZERO, "no deadlock until a timeout");
        let case = format!("{choice:?}, buffered: {buffered}");
        if matches!(choice, None | Some(RequestAuth::ApiKeyAndJwt)) {
            let error = answered.unwrap_err();
            assert_eq!(AuthError::find(&*error).unwrap().kind(), AuthErrorKind::RefreshFailed, "{case}");
            assert!(told(&*error), "{case}: {error:?}");
            assert!(api.bearers().is_empty(), "{case}");
        } else {
            answered.expect(&case);
            assert_eq!(api.bearers().last().unwrap(), "of-the-same-stack", "{case}");
            assert_eq!(api.bearers().len(), 2, "{case}");
        }
        *slot.lock().unwrap() = None;
    }
}

#[tokio::test(start_paused = true)]
async fn f7_two_sources_that_wait_for_each_other_are_told_so() {
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
    let began = Instant::now();
    let error = engines[0].token().await.unwrap_err();
    assert!(told(&error), "{error:?}");
    assert_eq!(began.elapsed(), Duration::ZERO);
    slots.iter().for_each(|slot| *slot.lock().unwrap() = None);
}

#[tokio::test(start_paused = true)]
async fn f7_a_source_that_asks_for_its_own_token_on_another_task_ends_at_the_timeout() {
    let slot: Slot<Refreshing<Token>> = Slot::default();
    let own = Arc::clone(&slot);
    let jwts = Refreshing::new(source_fn(move |_: Reason<Token>| {
        let own = own.lock().unwrap().clone().unwrap();
        async move { tokio::spawn(async move { own.token().await }).await?.map_err(BoxError::from) }
    }));
    *slot.lock().unwrap() = Some(jwts.clone());
    let began = Instant::now();
    assert_eq!(text(&jwts).await, Err(AuthErrorKind::RefreshFailed));
    assert_eq!(began.elapsed(), Duration::from_secs(30));
    *slot.lock().unwrap() = None;
}

#[tokio::test(start_paused = true)]
async fn f7_a_source_whose_own_request_is_refused_does_not_wait_for_itself() {
    // It sends with the old token, which the API refuses, and answers all the same.
    let (slot, asked) = (Slot::<Boxed>::default(), Arc::new(AtomicUsize::new(0)));
    let (own, counter) = (Arc::clone(&slot), Arc::clone(&asked));
    let clock = clock();
    let source = source_fn(move |_: Reason<Token>| {
        let number = counter.fetch_add(1, SeqCst) + 1;
        let service = own.lock().unwrap().clone().filter(|_| number > 1);
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
    let stack = RefreshLayer::new().layer(JwtLayer::new(&jwts, key()).layer(api.service()));
    *slot.lock().unwrap() = Some(BoxCloneSyncService::new(stack.clone()));
    sleep(54 * SECOND).await;
    let began = Instant::now();
    assert_eq!(text(&jwts).await.unwrap(), "token-1", "and a renewal beside");
    settle().await;
    assert_eq!(stack.oneshot(request()).await.unwrap().status(), StatusCode::OK);
    assert_eq!((began.elapsed(), asked.load(SeqCst)), (Duration::ZERO, 2));
    assert_eq!(api.bearers(), ["token-1", "token-2"]);
    *slot.lock().unwrap() = None;
}

/// All that is asked of an engine without waiting, and a request: what came of them.
fn ask_at_once(jwts: &Refreshing<Token>) -> String {
    jwts.invalidate(&Token::new("another").unwrap());
    let api = service_fn(|request: Request<()>| {
        let bearer = values(&request, "authorization").concat();
        std::future::ready(Ok::<_, BoxError>(Response::new(bearer)))
    });
    let mut service = JwtLayer::new(jwts, key()).layer(api);
    let sent = match task::spawn(service.call(get(MODELS))).poll() {
        Poll::Ready(Ok(response)) => response.into_body(),
        _ => "nothing yet".to_owned(),
    };
    let current = jwts.current().map(|token| token.expose_secret().to_owned());
    let expires = jwts.expires_at().is_some() && format!("{jwts:?}").contains("Some");
    format!("{current:?}, expires: {expires}, sent: {sent}")
}

/// The same on a thread that is given up when it does not come back.
fn ask_from_elsewhere(jwts: &Refreshing<Token>) -> String {
    let ((tell, told), jwts) = (channel(), jwts.clone());
    thread::spawn(move || tell.send(ask_at_once(&jwts)));
    told.recv_timeout(HANG).expect("somebody holds the lock")
}

#[tokio::test(start_paused = true)]
async fn f8_a_renewal_that_never_ends_holds_nobody_up() {
    let mint = Mint::default().then(Answer::Lives(MINUTE)).then(Answer::Hangs);
    let (jwts, _) = engine(&mint);
    let first = jwts.token().await.unwrap();
    sleep(54 * SECOND).await;
    jwts.token().await.unwrap();
    settle().await;
    assert_eq!(mint.asked(), 2, "a renewal is running");
    assert_eq!(ask_from_elsewhere(&jwts), r#"Some("token-1"), expires: true, sent: Bearer token-1"#);
    jwts.invalidate(&first);
    assert_eq!(ask_from_elsewhere(&jwts), "None, expires: false, sent: nothing yet");
    assert_eq!(mint.asked(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn f8_a_source_that_blocks_its_thread_holds_nobody_up() {
    let (enter, entered) = channel();
    let (release, released) = channel::<()>();
    let (asked, released) = (AtomicUsize::new(0), Arc::new(Mutex::new(released)));
    let source = source_fn(move |_: Reason<Token>| {
        let (number, enter, released) =
            (asked.fetch_add(1, SeqCst) + 1, enter.clone(), Arc::clone(&released));
        async move {
            if number == 2 {
                enter.send(())?;
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
    entered.recv_timeout(HANG).unwrap();
    assert_eq!(ask_from_elsewhere(&jwts), r#"Some("token-1"), expires: true, sent: Bearer token-1"#);
    release.send(()).unwrap();
}

/// Asks its own engine whatever it can wherever it is asked itself.
struct Curious(Slot<Refreshing<Token>>);

impl Curious {
    fn ask(&self) {
        let own = self.0.lock().unwrap().clone();
        if let Some(own) = own {
            let _ = (own.current(), own.expires_at(), format!("{own:?}"));
            own.invalidate(&Token::new("another").unwrap());
        }
    }
}

impl Source<Token> for Curious {
    async fn fetch(&self, _: Reason<Token>) -> Result<Fetched<Token>, SourceError> {
        self.ask();
        tokio::task::yield_now().await;
        self.ask();
        Ok(Fetched::new(Token::new("a-token")?))
    }

    fn version(&self) -> u64 {
        // To invalidate asks for it.
        let own = self.0.lock().unwrap().clone();
        own.map_or(0, |own| u64::from(own.current().is_some() && own.expires_at().is_none()))
    }
}

impl Wake for Curious {
    fn wake(self: Arc<Self>) {
        self.ask();
    }
}

#[test]
fn f8_neither_a_source_nor_a_waker_meets_a_lock() {
    let (tell, told) = channel();
    thread::spawn(move || {
        let slot = Slot::default();
        let jwts = Refreshing::new(Curious(Arc::clone(&slot)));
        *slot.lock().unwrap() = Some(jwts.clone());
        let runtime = Builder::new_current_thread().enable_time().build().unwrap();
        let waker = Waker::from(Arc::new(Curious(Arc::clone(&slot))));
        let first = runtime.block_on(async {
            let mut waiting = pin!(jwts.token());
            assert!(waiting.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
            settle().await;
            waiting.await.unwrap()
        });
        runtime.block_on(async {
            jwts.invalidate(&first);
            settle().await;
        });
        *slot.lock().unwrap() = None;
        tell.send(first.expose_secret().to_owned())
    });
    assert_eq!(told.recv_timeout(HANG).expect("somebody holds the lock"), "a-token");
}
