//! The Tower contract: readiness, auto traits, clones and cancellation (T1 to T3); what a fixed credential costs (R1).

use std::{marker::PhantomData, marker::PhantomPinned, rc::Rc, task::Poll};

use http::{Request, Response};
use tokio_test::{assert_pending, assert_ready, assert_ready_err, assert_ready_ok, task};
use tower::{Layer, Service, ServiceBuilder, limit::ConcurrencyLimitLayer, service_fn};
use tower_selam::{
    ApiKey, ApiKeyLayer, AuthErrorLayer, BoxError, JwtLayer, Provider, RefreshPolicy, Refreshing,
    RequestAuth, Selam, SelamLayer, Token,
    auth_error::{self, InspectedBody, MapAuthError},
    authorize::{self, Authorize},
    replay::{NoReplay, Refresh},
    source::EnvSource,
};
use tower_test::mock;

use crate::support::{Body, MODELS, get, jwt, key, response};

/// T1: `call` goes to the instance that was polled ready.
#[test]
fn instance_polled_ready_is_the_one_called() {
    /// Ready for one call after each poll; a clone has to be polled itself.
    #[derive(Default)]
    struct PollFirst {
        ready: bool,
    }

    impl Clone for PollFirst {
        fn clone(&self) -> Self {
            Self { ready: false }
        }
    }

    impl Service<Request<()>> for PollFirst {
        type Response = Response<Body>;
        type Error = BoxError;
        type Future = std::future::Ready<Result<Response<Body>, BoxError>>;

        fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> Poll<Result<(), BoxError>> {
            self.ready = true;
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: Request<()>) -> Self::Future {
            assert!(std::mem::take(&mut self.ready), "called without being ready");
            std::future::ready(Ok(response(200, "")))
        }
    }

    let selam = SelamLayer::builder().with_api_key(key()).build().unwrap();
    let stack = ServiceBuilder::new()
        .layer(AuthErrorLayer::new().annotated())
        .layer(AuthErrorLayer::new())
        .layer(JwtLayer::new(jwt()))
        .layer(ApiKeyLayer::x_api_key(key()))
        .service(PollFirst::default());
    let mut stack = mock::Spawn::new(stack);
    let mut selam = mock::Spawn::new(selam.layer(PollFirst::default()));
    for _ in 0..2 {
        assert_ready_ok!(stack.poll_ready::<Request<()>>());
        assert_ready_ok!(task::spawn(stack.call(get(MODELS))).poll());
        assert_ready_ok!(selam.poll_ready::<Request<()>>());
        assert_ready_ok!(task::spawn(selam.call(get(MODELS))).poll());
    }
}

/// T1: readiness, and the error it may give, are those of the inner service.
#[test]
fn readiness_and_its_errors_are_the_inner_services() {
    let (mock, mut handle) = mock::pair::<Request<()>, Response<Body>>();
    let selam = SelamLayer::builder().with_api_key(key()).build().unwrap();
    let mut service = mock::Spawn::new(selam.layer(mock));
    handle.allow(0);
    assert_pending!(service.poll_ready::<Request<()>>());
    handle.allow(1);
    assert!(service.is_woken());
    assert_ready_ok!(service.poll_ready::<Request<()>>());
    handle.send_error("inner");
    drop(task::spawn(service.call(get(MODELS))));
    let error = assert_ready_err!(service.poll_ready::<Request<()>>());
    assert!(error.auth().is_none(), "{error:?}");
}

/// T1: a request refused by the layer frees its permit for the next.
#[test]
fn refused_request_frees_its_permit() {
    let (mock, mut handle) = mock::pair::<Request<()>, Response<Body>>();
    handle.allow(10);
    let layer = ServiceBuilder::new().layer(ApiKeyLayer::bearer(key())).layer(ConcurrencyLimitLayer::new(1));
    let mut service = mock::Spawn::new(layer.service(mock));
    for _ in 0..3 {
        assert_ready_ok!(service.poll_ready::<Request<()>>());
        assert_ready_err!(task::spawn(service.call(get("http://api.selamgpt.com/"))).poll());
    }
    assert_ready_ok!(service.poll_ready::<Request<()>>());
    let mut call = task::spawn(service.call(get(MODELS)));
    assert_pending!(call.poll());
    assert_pending!(service.poll_ready::<Request<()>>());
    let (_, send) = assert_ready!(handle.poll_request()).unwrap();
    send.send_response(response(200, ""));
    assert_ready_ok!(call.poll());
    drop(call);
    assert_ready_ok!(service.poll_ready::<Request<()>>());
}

/// T1: no permit is held while an error body is being read.
#[test]
fn reading_an_error_body_pins_no_permit() {
    #[derive(Debug)]
    struct Endless;

    impl http_body::Body for Endless {
        type Data = bytes::Bytes;
        type Error = BoxError;

        fn poll_frame(
            self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
        ) -> Poll<Option<Result<http_body::Frame<bytes::Bytes>, BoxError>>> {
            Poll::Pending
        }
    }

    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let _guard = runtime.enter();
    let api = service_fn(|_: Request<()>| async {
        Ok::<_, BoxError>(Response::builder().status(401).body(Endless)?)
    });
    let layer = ServiceBuilder::new().layer(AuthErrorLayer::new()).layer(ConcurrencyLimitLayer::new(1));
    let mut service = mock::Spawn::new(layer.service(api));
    assert_ready_ok!(service.poll_ready::<Request<()>>());
    let mut call = task::spawn(service.call(get(MODELS)));
    assert_pending!(call.poll());
    assert_ready_ok!(service.poll_ready::<Request<()>>());
}

/// The traits a type does not implement.
trait Missing {
    const SEND: bool = false;
    const SYNC: bool = false;
    const UNPIN: bool = false;
    const CLONE: bool = false;
}

/// Which of `Send`, `Sync`, `Unpin` and `Clone` a type implements. Where a bound holds, an inherent constant shadows
/// the one of `Missing`.
macro_rules! traits {
    ($type:ty) => {{
        macro_rules! is {
            ($bound:ident, $constant:ident) => {{
                struct Is<T>(PhantomData<T>);
                impl<T> Missing for Is<T> {}
                #[allow(dead_code, reason = "used only where the bound holds")]
                impl<T: $bound> Is<T> {
                    const $constant: bool = true;
                }
                <Is<$type>>::$constant
            }};
        }
        [is!(Send, SEND), is!(Sync, SYNC), is!(Unpin, UNPIN), is!(Clone, CLONE)]
    }};
}

/// T2: services and futures are `Send`, `Sync`, `Unpin` and `Clone` exactly when the inner ones are.
#[test]
fn auto_traits_are_those_of_the_inner_type() {
    struct NoClone;
    type Cell = std::cell::Cell<u8>;
    type Future<S> = <S as Service<Request<()>>>::Future;

    /// A service whose future has the same auto traits as `T`.
    #[derive(Debug)]
    struct Inner<T>(PhantomData<T>);

    impl<T> Clone for Inner<T> {
        fn clone(&self) -> Self {
            Self(PhantomData)
        }
    }

    impl<T, B> Service<Request<B>> for Inner<T> {
        type Response = Response<Body>;
        type Error = BoxError;
        type Future = InnerFuture<T>;

        fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> Poll<Result<(), BoxError>> {
            unreachable!()
        }

        fn call(&mut self, _: Request<B>) -> Self::Future {
            unreachable!()
        }
    }

    struct InnerFuture<T>(PhantomData<T>);

    impl<T> std::future::Future for InnerFuture<T> {
        type Output = Result<Response<Body>, BoxError>;

        fn poll(self: std::pin::Pin<&mut Self>, _: &mut std::task::Context<'_>) -> Poll<Self::Output> {
            unreachable!()
        }
    }
    macro_rules! like_inner {
        ($($inner:ty),*) => {$(
            assert_eq!(traits!(Authorize<$inner>), traits!($inner));
            assert_eq!(traits!(MapAuthError<$inner>), traits!($inner));
            // Futures are not `Clone`.
            assert_eq!(traits!(authorize::ResponseFuture<Inner<$inner>, $inner>)[..3], traits!($inner)[..3]);
            assert_eq!(traits!(auth_error::ResponseFuture<$inner, Body>)[..3], traits!($inner)[..3]);
        )*};
    }
    like_inner!((), Rc<()>, Cell, PhantomPinned, NoClone, std::sync::MutexGuard<'static, ()>);

    // These share a spare clone of the inner service. If that is `Sync` but not `Send`, they are neither.
    macro_rules! like_inner_shared {
        ($($inner:ty),*) => {$(
            assert_eq!(traits!(Selam<$inner>), traits!($inner));
            assert_eq!(traits!(Refresh<$inner>), traits!($inner));
            assert_eq!(traits!(Future<Refresh<Inner<$inner>, NoReplay>>)[..3], traits!($inner)[..3]);
            assert_eq!(traits!(Future<Selam<Inner<$inner>, NoReplay>>)[..3], traits!($inner)[..3]);
        )*};
    }
    like_inner_shared!((), Rc<()>, Cell, PhantomPinned, NoClone);
    assert_eq!(traits!(Rc<()>), [false, false, true, true], "the macro tells traits apart");
    assert_eq!(traits!(InspectedBody<Body>)[..3], [true, true, true]);
    assert_eq!(traits!(ApiKeyLayer), [true; 4]);
    assert_eq!(traits!(JwtLayer), [true; 4]);
    assert_eq!(traits!(SelamLayer), [true; 4]);
    assert_eq!(traits!(Refreshing<ApiKey>), [true; 4]);
    assert_eq!(traits!(Provider<Token>), [true; 4]);
    assert_eq!(traits!(RefreshPolicy), [true; 4]);
    let jwts: Refreshing<Token> = Refreshing::new(EnvSource::jwt());
    fn is_send<T: Send>(_: &T) {}
    is_send(&(jwts.token(), jwts.prefetch(), jwts.token_valid_for(std::time::Duration::ZERO)));
}

/// T2: clones share the bytes of their credentials.
#[test]
fn clones_share_the_credentials() {
    let sent = service_fn(|request: Request<()>| async move {
        let value = request.headers()["authorization"].as_bytes().as_ptr() as usize;
        Ok::<_, BoxError>(Response::new(value))
    });
    let service = ApiKeyLayer::bearer(key()).layer(sent);
    let address = |mut service: Authorize<_>| {
        let response: Response<usize> = assert_ready_ok!(task::spawn(service.call(get(MODELS))).poll());
        response.into_body()
    };
    assert_eq!(address(service.clone()), address(service));
}

/// T3: a dropped call leaves the service usable, and its request is sent only once.
#[test]
fn dropped_call_leaves_the_service_usable() {
    let (mock, mut handle) = mock::pair::<Request<()>, Response<Body>>();
    handle.allow(10);
    let selam = SelamLayer::builder().with_api_key(key()).build().unwrap();
    let mut service = mock::Spawn::new(selam.layer(mock));
    assert_ready_ok!(service.poll_ready::<Request<()>>());
    let mut call = task::spawn(service.call(get(MODELS)));
    assert_pending!(call.poll());
    drop(call);
    let (_, send) = assert_ready!(handle.poll_request()).unwrap();
    send.send_response(response(200, ""));

    assert_ready_ok!(service.poll_ready::<Request<()>>());
    let mut call = task::spawn(service.call(get(MODELS)));
    let (_, send) = assert_ready!(handle.poll_request()).unwrap();
    send.send_response(response(200, ""));
    assert_ready_ok!(call.poll());
    assert_pending!(handle.poll_request(), "nothing is sent twice");
}

/// R1: a request with fixed credentials allocates nothing.
#[test]
fn fixed_credential_allocates_nothing() {
    let api = service_fn(|request: Request<()>| {
        let (parts, ()) = request.into_parts();
        // Leaked, so that dropping the headers is not counted against the layers.
        std::mem::forget(parts.headers);
        std::future::ready(Ok::<_, BoxError>(Response::new(Body::default())))
    });
    let layer = |jwt: bool| {
        let builder = SelamLayer::builder().with_api_key(key());
        if jwt { builder.with_jwt(crate::support::jwt()) } else { builder }.build().unwrap()
    };
    let allocations = |layer: SelamLayer, auth: Option<RequestAuth>| {
        let mut service = layer.layer(api);
        let mut request = get(MODELS);
        for name in ["accept", "content-type", "user-agent"] {
            request.headers_mut().insert(name, "x".parse().unwrap());
        }
        if let Some(auth) = auth {
            request.extensions_mut().insert(auth);
        }
        let mut request = Some(request);
        let mut passed = false;
        let counted = allocation_counter::measure(|| {
            let mut call = std::pin::pin!(service.call(request.take().unwrap()));
            let mut context = std::task::Context::from_waker(std::task::Waker::noop());
            passed = matches!(call.as_mut().poll(&mut context), Poll::Ready(Ok(_)));
        });
        assert!(passed);
        counted.count_total
    };
    assert_eq!(allocations(layer(false), None), 0);
    assert_eq!(allocations(layer(true), None), 0);
    assert_eq!(allocations(layer(true), Some(RequestAuth::ApiKey)), 0);
    assert_eq!(allocations(layer(true), Some(RequestAuth::ApiKeyAndJwt)), 0);
}

/// R1: besides the body that is kept for a replay, the future of the stack adds at most 160 bytes.
#[test]
fn future_adds_at_most_160_bytes() {
    type Inner = mock::Mock<Request<Body>, Response<Body>>;
    type InnerFuture = <Inner as Service<Request<Body>>>::Future;
    type Future = <Selam<Inner> as Service<Request<Body>>>::Future;
    let overhead = size_of::<Future>() - size_of::<InnerFuture>() - size_of::<Body>();
    assert!(overhead <= 160, "{overhead}");
}
