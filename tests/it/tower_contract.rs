//! T1 to T3, and R1 as far as a fixed credential goes: readiness, auto traits, cost.

use std::{marker::PhantomData, marker::PhantomPinned, rc::Rc, task::Poll};

use http::{Request, Response};
use tokio_test::{assert_pending, assert_ready, assert_ready_err, assert_ready_ok, task};
use tower::{Layer, Service, ServiceBuilder, limit::ConcurrencyLimitLayer, service_fn};
use tower_selam::{
    AnnotateAuthErrorLayer, ApiKey, ApiKeyLayer, AuthErrorLayer, BoxError, JwtLayer, Provider, RefreshPolicy,
    Refreshing, RequestAuth, Selam, SelamLayer, Token,
    auth_error::{self, AnnotateAuthError, AnnotateFuture, InspectedBody, MapAuthError},
    authorize::{self, Authorize},
    replay::{self, CloneBody, NoReplay, Refresh},
    source::EnvSource,
    stack,
};
use tower_test::mock;

use crate::support::{Body, MODELS, get, jwt, key, response};

#[test]
fn t1_the_instance_that_was_ready_is_the_one_that_is_called() {
    /// Ready once polled, and only then.
    #[derive(Default)]
    struct Fussy {
        ready: bool,
    }

    impl Clone for Fussy {
        fn clone(&self) -> Self {
            Self { ready: false }
        }
    }

    impl Service<Request<()>> for Fussy {
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
        .layer(AnnotateAuthErrorLayer::new())
        .layer(AuthErrorLayer::new())
        .layer(JwtLayer::beside_api_key(jwt()))
        .layer(ApiKeyLayer::beside_jwt(key()))
        .service(Fussy::default());
    let mut stack = mock::Spawn::new(stack);
    let mut selam = mock::Spawn::new(selam.layer(Fussy::default()));
    for _ in 0..2 {
        assert_ready_ok!(stack.poll_ready::<Request<()>>());
        assert_ready_ok!(task::spawn(stack.call(get(MODELS))).poll());
        assert_ready_ok!(selam.poll_ready::<Request<()>>());
        assert_ready_ok!(task::spawn(selam.call(get(MODELS))).poll());
    }
}

#[test]
fn t1_readiness_is_the_inner_services_and_so_are_its_errors() {
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

#[test]
fn t1_a_refused_request_gives_its_permit_to_the_next() {
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

#[test]
fn t1_an_error_body_being_read_pins_no_permit() {
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

trait HasNot {
    const SEND: bool = false;
    const SYNC: bool = false;
    const UNPIN: bool = false;
    const CLONE: bool = false;
}

/// Which of the four a type is: the inherent constant, where its bound holds, hides the trait's.
macro_rules! has {
    ($type:ty) => {{
        macro_rules! is {
            ($bound:ident, $constant:ident) => {{
                struct Is<T>(PhantomData<T>);
                impl<T> HasNot for Is<T> {}
                #[allow(dead_code, reason = "only where the bound holds")]
                impl<T: $bound> Is<T> {
                    const $constant: bool = true;
                }
                <Is<$type>>::$constant
            }};
        }
        [is!(Send, SEND), is!(Sync, SYNC), is!(Unpin, UNPIN), is!(Clone, CLONE)]
    }};
}

#[test]
fn t2_auto_traits_are_those_of_what_is_within() {
    struct NoClone;
    type Cell = std::cell::Cell<u8>;
    macro_rules! like_inner {
        ($($inner:ty),*) => {$(
            assert_eq!(has!(Authorize<$inner>), has!($inner));
            assert_eq!(has!(MapAuthError<$inner>), has!($inner));
            assert_eq!(has!(AnnotateAuthError<$inner>), has!($inner));
            // Futures are not cloned.
            assert_eq!(has!(authorize::ResponseFuture<$inner, $inner, $inner>)[..3], has!($inner)[..3]);
            assert_eq!(has!(auth_error::ResponseFuture<$inner, Body>)[..3], has!($inner)[..3]);
            assert_eq!(has!(AnnotateFuture<$inner, Body>)[..3], has!($inner)[..3]);
        )*};
    }
    like_inner!((), Rc<()>, Cell, PhantomPinned, NoClone, std::sync::MutexGuard<'static, ()>);

    // These share a spare of the service within, so one that is `Sync` without being `Send` makes them neither.
    macro_rules! like_inner_shared {
        ($($inner:ty),*) => {$(
            assert_eq!(has!(Selam<$inner>), has!($inner));
            assert_eq!(has!(Refresh<$inner>), has!($inner));
            assert_eq!(has!(replay::ResponseFuture<$inner, $inner, NoReplay, (), Body>)[..3], has!($inner)[..3]);
            assert_eq!(has!(stack::ResponseFuture<$inner, $inner, NoReplay, (), Body>)[..3], has!($inner)[..3]);
        )*};
    }
    like_inner_shared!((), Rc<()>, Cell, PhantomPinned, NoClone);
    assert_eq!(has!(Rc<()>), [false, false, true, true], "the test can tell");
    assert_eq!(has!(InspectedBody<Body>)[..3], [true, true, true]);
    assert_eq!(has!(ApiKeyLayer), [true; 4]);
    assert_eq!(has!(JwtLayer), [true; 4]);
    assert_eq!(has!(SelamLayer), [true; 4]);
    assert_eq!(has!(Refreshing<ApiKey>), [true; 4]);
    assert_eq!(has!(Provider<Token>), [true; 4]);
    assert_eq!(has!(RefreshPolicy), [true; 4]);
    let jwts: Refreshing<Token> = Refreshing::new(EnvSource::jwt());
    fn is_send<T: Send>(_: &T) {}
    is_send(&(jwts.token(), jwts.prefetch(), jwts.token_valid_for(std::time::Duration::ZERO)));
}

#[test]
fn t2_clones_share_the_credentials() {
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

#[test]
fn t3_a_dropped_call_leaves_the_service_usable() {
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

#[test]
fn r1_a_request_with_a_fixed_credential_allocates_nothing() {
    let api = service_fn(|request: Request<()>| {
        let (parts, ()) = request.into_parts();
        // The headers are dropped where they cannot be counted against the layers.
        std::mem::forget(parts.headers);
        std::future::ready(Ok::<_, BoxError>(Response::new(Body::default())))
    });
    let layer = |jwt: bool| {
        let builder = SelamLayer::builder().with_api_key(key());
        if jwt { builder.with_jwt(crate::support::jwt()) } else { builder }.build().unwrap()
    };
    let allocations = |layer: SelamLayer, choice: Option<RequestAuth>| {
        let mut service = layer.layer(api);
        let mut request = get(MODELS);
        for name in ["accept", "content-type", "user-agent"] {
            request.headers_mut().insert(name, "x".parse().unwrap());
        }
        if let Some(choice) = choice {
            request.extensions_mut().insert(choice);
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

#[test]
fn r1_the_stacks_future_is_at_most_128_bytes_larger_than_the_inner_one() {
    type Inner = [u64; 40];
    let overhead = size_of::<stack::ResponseFuture<Inner, (), CloneBody, Body, Body>>() - size_of::<Inner>();
    assert!(overhead <= 128, "{overhead}");
}
