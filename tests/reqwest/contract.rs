//! T1 to T3: the Tower contract of `adapter::reqwest`.

use std::{
    cell::Cell,
    marker::{PhantomData, PhantomPinned},
    rc::Rc,
    sync::atomic::Ordering::SeqCst,
    task::{Context, Poll},
    time::Duration,
};

use http::{Request, Response, StatusCode};
use reqwest::Body;
use tower::{Layer, Service, ServiceBuilder, ServiceExt, layer::layer_fn, limit::ConcurrencyLimitLayer};
use tower_selam::{
    Error,
    adapter::reqwest::{Client, Execute, HttpFuture, HttpService, ResponseFuture, TryCloneBody},
    simulator::Fault,
};

use crate::support::{CHAT, PROTOCOLS, SESSION, in_time, plain, world};

/// Gives `false` for a bound that does not hold. Where it holds, an inherent constant shadows the trait's.
trait HasNot {
    const SEND: bool = false;
    const SYNC: bool = false;
    const UNPIN: bool = false;
    const CLONE: bool = false;
}

macro_rules! has {
    ($type:ty) => {{
        macro_rules! is {
            ($bound:ident, $constant:ident) => {{
                struct Is<T>(PhantomData<T>);
                impl<T> HasNot for Is<T> {}
                #[allow(dead_code, reason = "used only if the bound holds")]
                impl<T: $bound> Is<T> {
                    const $constant: bool = true;
                }
                <Is<$type>>::$constant
            }};
        }
        [is!(Send, SEND), is!(Sync, SYNC), is!(Unpin, UNPIN), is!(Clone, CLONE)]
    }};
}

/// A service with the auto traits of `T`, whose future has them too.
#[derive(Clone)]
struct Like<T>(T);

impl<T> Service<Request<Body>> for Like<T> {
    type Response = Response<Body>;
    type Error = Error<reqwest::Error>;
    type Future = LikeFuture<T>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Pending
    }

    fn call(&mut self, _: Request<Body>) -> Self::Future {
        unreachable!("used only as a type")
    }
}

struct LikeFuture<T>(PhantomData<T>);

impl<T> Future for LikeFuture<T> {
    type Output = Result<Response<Body>, Error<reqwest::Error>>;

    fn poll(self: std::pin::Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
        Poll::Pending
    }
}

/// T2: services and futures.
#[test]
fn auto_traits_match_the_inner_service() {
    struct NoClone;
    macro_rules! like_inner {
        ($($inner:ty),*) => {$(
            assert_eq!(has!(Client<$inner>), has!($inner));
            assert_eq!(has!(ResponseFuture<$inner>)[..3], has!($inner)[..3]);
            // It holds a reqwest request, so it is at most as `Sync` as that.
            let [send, sync, unpin, _] = has!($inner);
            let [request_send, request_sync, ..] = has!(reqwest::Request);
            assert_eq!(has!(Execute<Like<$inner>>)[..3], [send && request_send, sync && request_sync, unpin]);
        )*};
    }
    like_inner!((), Rc<()>, Cell<u8>, PhantomPinned, NoClone, std::sync::MutexGuard<'static, ()>);
    assert_eq!(has!(Rc<()>), [false, false, true, true], "the macro detects a missing bound");
    assert_eq!(has!(HttpService), has!(reqwest::Client));
    assert_eq!(has!(Client), [true; 4]);
    type Pending = <reqwest::Client as Service<reqwest::Request>>::Future;
    assert_eq!(has!(HttpFuture), has!(Pending));
    assert_eq!(has!(TryCloneBody), [true; 4]);
}

/// Panics if called without having been polled ready. Clones start as not ready.
struct Strict<S> {
    inner: S,
    ready: bool,
}

impl<S: Clone> Clone for Strict<S> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), ready: false }
    }
}

impl<S: Service<Request<B>>, B> Service<Request<B>> for Strict<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.ready = true;
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        assert!(std::mem::take(&mut self.ready), "called before poll_ready");
        self.inner.call(request)
    }
}

/// T1: the instance that was polled ready is called, on a replay too.
#[tokio::test]
async fn the_ready_instance_is_called() {
    let world = world(PROTOCOLS[0]).await;
    let (jwts, refreshes) = world.refreshing();
    let layers = ServiceBuilder::new()
        .layer(layer_fn(|inner| Strict { inner, ready: false }))
        .layer(world.builder().with_jwt(jwts.clone()).build().unwrap().with_replay(TryCloneBody))
        .layer(layer_fn(|inner| Strict { inner, ready: false }));
    let mut selam = Client::with_layers(&layers, HttpService::new(world.reqwest()).unwrap());
    let request = || selam.reqwest().post(world.url("audio/agent/sessions")).body(SESSION);
    assert_eq!(in_time(selam.execute(request())).await.unwrap().status(), StatusCode::OK);
    // Through the `Service` implementation, and across a refresh.
    let request = request().build().unwrap();
    world.simulator.expire_jwts();
    let response = in_time(selam.ready().await.unwrap().call(request)).await.unwrap();
    assert_eq!((response.status(), refreshes.load(SeqCst)), (StatusCode::OK, 2));
}

/// T1: with a limit of 1 outside and inside the layers.
#[tokio::test]
async fn concurrency_permits_are_released() {
    let world = world(PROTOCOLS[0]).await;
    let layers = ServiceBuilder::new()
        .layer(ConcurrencyLimitLayer::new(1))
        .layer(world.builder().build().unwrap().with_replay(TryCloneBody))
        .layer(ConcurrencyLimitLayer::new(1));
    let selam = Client::with_layers(&layers, HttpService::new(world.reqwest()).unwrap());
    let calls = (0..8).map(|_| selam.execute(selam.reqwest().post(world.url("chat/completions")).body(CHAT)));
    let calls: tokio::task::JoinSet<_> = calls.collect();
    for response in in_time(calls.join_all()).await {
        assert_eq!(response.unwrap().status(), StatusCode::OK);
    }
}

/// T2: futures dropped before their first poll do nothing.
#[tokio::test]
async fn unpolled_futures_send_nothing() {
    let world = plain().await;
    let mut selam = world.key_alone();
    let request = || selam.reqwest().post(world.url("chat/completions")).body(CHAT);
    drop(selam.execute(request()));
    let as_service = request().build().unwrap();
    let last = request();
    drop(selam.ready().await.unwrap().call(as_service));
    in_time(selam.execute(last)).await.unwrap();
    assert_eq!(world.simulator.requests(), 1);
}

/// T3: the call is dropped while it waits for the response.
#[tokio::test]
async fn client_survives_a_cancelled_call() {
    let world = world(PROTOCOLS[0]).await;
    let (jwts, refreshes) = world.refreshing();
    let layer = world.builder().with_jwt(jwts).build().unwrap().with_replay(TryCloneBody);
    let layers = ServiceBuilder::new().layer(ConcurrencyLimitLayer::new(1)).layer(layer);
    let selam = Client::with_layers(&layers, HttpService::new(world.reqwest()).unwrap());
    let send = || selam.execute(selam.reqwest().post(world.url("audio/agent/sessions")).body(SESSION));
    world.simulator.inject(Fault::Stall);
    assert!(tokio::time::timeout(Duration::from_millis(200), send()).await.is_err());
    assert_eq!(in_time(send()).await.unwrap().status(), StatusCode::OK);
    assert_eq!((world.simulator.requests(), refreshes.load(SeqCst)), (2, 1));
}

#[test]
fn foreign_layers_fit() {
    let _ = |http: HttpService| Client::with_layers(&tower::layer::util::Identity::new(), http);
    let _ = |http: HttpService| tower::layer::util::Identity::new().layer(http);
}
