//! M3: with `panic = "abort"`, missing and shut-down runtimes cause typed errors, or none. An abort fails the program.

use std::{
    cell::RefCell,
    future::{pending, ready},
    panic::Location,
    pin::{Pin, pin},
    sync::{Arc, Mutex, mpsc::channel},
    task::{Context, Poll, Wake, Waker},
    thread::{self, Thread},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Frame;
use http_body_util::Full;
use tokio::runtime::{Builder, Runtime};
use tower::{BoxError, Layer, Service, ServiceExt, service_fn};
use tower_selam::{
    ApiKey, ApiKeyLayer, AuthError, AuthErrorKind, AuthErrorLayer, JwtLayer, PerSubject, RefreshLayer,
    RefreshPolicy, Refreshing, Subject, Token,
    oauth::{MemoryStore, OAuthSource, RefreshToken, TokenEndpoint},
    source::{FileSource, Reason, Source, source_fn},
};

const SHORT: Duration = Duration::from_millis(20);
const SECOND: Duration = Duration::from_secs(1);
const MODELS: &str = "https://api.selamgpt.com/v1/models";

type Jwts = Refreshing<Token>;

fn main() {
    if cfg!(panic = "unwind") {
        panic!("build with `--profile abort`");
    }
    tokens_on_every_runtime();
    endpoints_on_every_runtime();
    slow_sources_on_every_runtime();
    without_a_runtime();
    on_a_runtime_that_has_shut_down();
    while_a_runtime_shuts_down();
    on_another_runtime();
    on_a_thread_that_ends();
    with_a_source_that_blocks();
    error_bodies_end_everywhere();
    println!("nothing aborted");
}

/// Every kind of runtime that a program may have. A runtime without timers is as good as any here.
fn runtimes() -> [Runtime; 4] {
    [
        Builder::new_current_thread().enable_time().build(),
        Builder::new_current_thread().build(),
        Builder::new_multi_thread().worker_threads(2).enable_time().build(),
        Builder::new_multi_thread().worker_threads(2).build(),
    ]
    .map(Result::unwrap)
}

fn jwts() -> Jwts {
    Refreshing::new(source_fn(|_: Reason<Token>| async {
        tokio::task::yield_now().await;
        Ok::<_, BoxError>(Token::new("a-token")?)
    }))
}

/// The token of a source that never answers.
fn hanging() -> Jwts {
    let source = source_fn(|_: Reason<Token>| pending::<Result<Token, BoxError>>());
    Refreshing::with_policy(source, RefreshPolicy::new().with_timeout(SHORT))
}

/// An OAuth source of each kind, whose endpoint answers after a while, or never.
fn oauth(answers: bool) -> [OAuthSource; 2] {
    let endpoint = || {
        let client = service_fn(move |_: Request<Full<Bytes>>| async move {
            tokio::task::yield_now().await;
            let body =
                r#"{"access_token":"a-token","token_type":"Bearer","expires_in":600,"refresh_token":"next"}"#;
            let body = Body { data: Some(Bytes::from_static(body.as_bytes())), ends: answers };
            Ok::<_, BoxError>(Response::new(body))
        });
        TokenEndpoint::new("https://api.selamgpt.com/oauth/token", client).unwrap()
    };
    let store = MemoryStore::new(RefreshToken::new("first").unwrap());
    [OAuthSource::client_credentials(endpoint()), OAuthSource::refresh_token(endpoint(), store)]
}

/// A body of one frame, which may never end.
struct Body {
    data: Option<Bytes>,
    ends: bool,
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self.data.take() {
            Some(data) => Poll::Ready(Some(Ok(Frame::data(data)))),
            None if self.ends => Poll::Ready(None),
            None => Poll::Pending,
        }
    }
}

fn poll<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

/// Waits for a future on this thread, without a runtime.
fn wait<F: Future>(future: F) -> F::Output {
    struct Unpark(Thread);

    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }

    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(output) => return output,
            Poll::Pending => thread::park(),
        }
    }
}

#[track_caller]
fn failed(error: &AuthError) {
    assert_eq!(error.kind(), AuthErrorKind::RefreshFailed, "{} {error}", Location::caller());
}

#[track_caller]
fn refused<T>(sent: Poll<Result<T, BoxError>>) {
    let Poll::Ready(Err(error)) = sent else { panic!("sent") };
    failed(AuthError::find(&*error).unwrap());
}

/// Sends a request through all layers, to an API that accepts it.
fn request(jwts: &Jwts) -> impl Future<Output = Result<(), BoxError>> + use<> {
    let api = service_fn(|_: Request<Full<Bytes>>| {
        ready(Ok::<_, BoxError>(Response::new(Full::<Bytes>::default())))
    });
    let layers = (JwtLayer::new(jwts), ApiKeyLayer::x_api_key(ApiKey::new("sk-selam-a-key").unwrap()));
    let service = AuthErrorLayer::new().layer(RefreshLayer::new().layer(layers.layer(api)));
    let request = Request::get(MODELS).body(Full::default()).unwrap();
    async { service.oneshot(request).await.map(drop) }
}

fn tokens_on_every_runtime() {
    for runtime in runtimes() {
        let jwts = jwts();
        runtime.block_on(request(&jwts)).unwrap();
        assert_eq!(runtime.block_on(jwts.token()).unwrap().expose_secret(), "a-token");
        let subjects = PerSubject::new(|_: &Subject| {
            source_fn(|_: Reason<Token>| async { Ok::<_, BoxError>(Token::new("a-token")?) })
        });
        runtime.block_on(subjects.of_subject(&Subject::new("user-7")).token()).unwrap();
    }
}

fn endpoints_on_every_runtime() {
    for runtime in runtimes() {
        for source in oauth(true) {
            runtime.block_on(source.fetch(Reason::First)).unwrap();
            assert_eq!(runtime.block_on(Refreshing::new(source).token()).unwrap().expose_secret(), "a-token");
        }
    }
}

fn slow_sources_on_every_runtime() {
    for runtime in runtimes() {
        let policy = || RefreshPolicy::new().with_timeout(SHORT);
        let [client, refresh] = oauth(false).map(|source| Refreshing::with_policy(source, policy()));
        for jwts in [hanging(), client, refresh] {
            failed(&runtime.block_on(jwts.token()).unwrap_err());
        }
    }
}

fn without_a_runtime() {
    for jwts in oauth(true).map(Refreshing::new).into_iter().chain([jwts(), hanging()]) {
        failed(&wait(jwts.token()).unwrap_err());
        refused(poll(pin!(request(&jwts))));
        jwts.rejected(&Token::new("another").unwrap());
    }
    for source in oauth(true) {
        assert!(!wait(source.fetch(Reason::First)).unwrap_err().is_permanent());
    }
    let file: FileSource<ApiKey> = FileSource::new("/nowhere");
    assert!(!wait(file.fetch(Reason::First)).unwrap_err().is_permanent());
    let subjects = PerSubject::new(|_: &Subject| {
        source_fn(|_: Reason<Token>| async { Ok::<_, BoxError>(Token::new("a-token")?) })
    });
    failed(&wait(subjects.of_subject(&Subject::new("user-7")).token()).unwrap_err());
}

fn on_a_runtime_that_has_shut_down() {
    for runtime in runtimes() {
        let handle = runtime.handle().clone();
        drop(runtime);
        for jwts in oauth(true).map(Refreshing::new).into_iter().chain([jwts(), hanging()]) {
            let _entered = handle.enter();
            failed(&wait(jwts.token()).unwrap_err());
            refused(poll(pin!(request(&jwts))));
            let [client, refresh] = oauth(true);
            assert!(wait(refresh.fetch(Reason::First)).is_err());
            let _ = poll(pin!(client.fetch(Reason::First)));
            let file: FileSource<ApiKey> = FileSource::new("/nowhere");
            assert!(wait(file.fetch(Reason::First)).is_err());
        }
    }
}

fn while_a_runtime_shuts_down() {
    for runtime in runtimes() {
        let [client, refresh] = oauth(false).map(Refreshing::new);
        for jwts in [client, refresh, hanging()] {
            let (first, second) = (jwts.clone(), jwts);
            runtime.spawn(async move { first.token().await });
            let mut waiting = Box::pin(async move { second.token().await });
            let _entered = runtime.enter();
            assert!(poll(waiting.as_mut()).is_pending());
            runtime.spawn(waiting);
        }
        drop(runtime);
    }
}

fn on_another_runtime() {
    for (refreshing, waiting) in runtimes().into_iter().zip(runtimes()) {
        // The refresh is dropped with its runtime, and a waiter on the other one takes over.
        let jwts = jwts();
        let mut token = Box::pin(jwts.token());
        {
            let _entered = refreshing.enter();
            if poll(token.as_mut()).is_ready() {
                token = Box::pin(jwts.token());
            }
        }
        drop(refreshing);
        assert_eq!(waiting.block_on(token).unwrap().expose_secret(), "a-token");
    }
    // The runtime of the refresh is not driven, so a waiter abandons the refresh.
    let undriven = Builder::new_current_thread().build().unwrap();
    for waiting in runtimes().map(Some).into_iter().chain([None]) {
        let jwts = hanging();
        let token = || {
            let jwts = jwts.clone();
            Box::pin(async move { jwts.token().await })
        };
        {
            let _entered = undriven.enter();
            assert!(poll(token().as_mut()).is_pending());
        }
        failed(
            &match &waiting {
                Some(runtime) => runtime.block_on(token()),
                None => wait(token()),
            }
            .unwrap_err(),
        );
    }
}

fn on_a_thread_that_ends() {
    struct AtTheEnd(Jwts);

    impl Drop for AtTheEnd {
        fn drop(&mut self) {
            let _ = poll(pin!(self.0.token()));
            let _ = poll(pin!(request(&self.0)));
            let _ = poll(pin!(rejected(SHORT)));
            let [client, refresh] = oauth(true);
            let _ = poll(pin!(client.fetch(Reason::First)));
            let _ = poll(pin!(refresh.fetch(Reason::First)));
        }
    }

    thread_local! {
        static AT_THE_END: RefCell<Option<AtTheEnd>> = const { RefCell::new(None) };
    }

    for uses_runtime in [false, true] {
        // The order in which thread-locals are dropped depends on which is used first.
        let ends = thread::spawn(move || {
            let keep = || AT_THE_END.with(|slot| *slot.borrow_mut() = Some(AtTheEnd(jwts())));
            if !uses_runtime {
                keep();
            }
            for runtime in runtimes() {
                runtime.block_on(jwts().token()).unwrap();
            }
            keep();
        });
        ends.join().unwrap();
    }
}

fn with_a_source_that_blocks() {
    let runtime = Builder::new_multi_thread().worker_threads(2).build().unwrap();
    let (release, blocked) = channel::<()>();
    let blocked = Mutex::new(Some(blocked));
    let source = source_fn(move |_: Reason<Token>| {
        // The first fetch blocks until the end.
        let first = blocked.lock().unwrap().take();
        let _ = first.map(|blocked| blocked.recv());
        async { Ok::<_, BoxError>(Token::new("a-token")?) }
    });
    let jwts = Refreshing::with_policy(source, RefreshPolicy::new().with_timeout(SHORT));
    let _ = runtime.block_on(jwts.token());
    drop(release);
}

/// The error for a 401 whose body never ends.
fn rejected(limit: Duration) -> impl Future<Output = AuthError> {
    let api = service_fn(|_: Request<()>| {
        let body = Body { data: Some(Bytes::from_static(b"no")), ends: false };
        ready(Response::builder().status(401).body(body).map_err(BoxError::from))
    });
    let mut service = AuthErrorLayer::new().with_body_timeout(limit).layer(api);
    let call = service.call(Request::get(MODELS).body(()).unwrap());
    async { AuthError::find(&*call.await.unwrap_err()).unwrap().clone() }
}

fn error_bodies_end_everywhere() {
    let [first, second, ..] = runtimes();
    for runtime in runtimes() {
        assert_eq!(runtime.block_on(rejected(SHORT)).body(), b"no");
        let mut moved = Box::pin(rejected(SECOND));
        for other in [&first, &second, &runtime] {
            let _entered = other.enter();
            assert!(poll(moved.as_mut()).is_pending());
        }
        drop(runtime);
        wait(moved);
    }
    wait(rejected(SHORT));
}
