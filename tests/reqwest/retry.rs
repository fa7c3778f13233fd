//! `RetryPolicy` and `ThrottleLayer` in each place where reqwest's users can put them (J9).

use std::time::Duration;

use http::StatusCode;
use reqwest::Body;
use tower::{Service, ServiceBuilder, ServiceExt};
use tower_selam::{
    SelamLayer,
    adapter::reqwest::{Client, HttpService, TryCloneBody},
    retry::{MayProcessTwice, RetryPolicy, ThrottleLayer},
    simulator::Fault,
};

use crate::support::{CHAT, PROTOCOLS, World, in_time, stream, world};

fn policy() -> RetryPolicy<TryCloneBody> {
    let policy = RetryPolicy::new().with_backoff(Duration::from_millis(1), Duration::from_millis(1));
    policy.with_clone(TryCloneBody)
}

fn refuse(world: &World) {
    world.simulator.inject(Fault::RateLimited { retry_after: Duration::ZERO });
}

fn layer(world: &World) -> SelamLayer<TryCloneBody> {
    world.builder().build().unwrap().with_replay(TryCloneBody)
}

/// The policy clones bodies of bytes; a stream is sent once.
#[tokio::test]
async fn retries_within_the_client() {
    for protocol in PROTOCOLS {
        let world = world(*protocol).await;
        let layers = ServiceBuilder::new().retry(policy()).layer(ThrottleLayer::new()).layer(layer(&world));
        let client = Client::with_layers(&layers, HttpService::new(world.reqwest()).unwrap());
        let send = |body: Body| {
            in_time(client.execute(client.reqwest().post(world.url("chat/completions")).body(body)))
        };
        refuse(&world);
        assert_eq!(send(Body::from(CHAT)).await.unwrap().status(), StatusCode::OK);
        let received = world.simulator.received();
        assert_eq!(received.len(), 2);
        assert!(received.iter().all(|request| request.body == CHAT));

        refuse(&world);
        assert_eq!(send(stream(CHAT)).await.unwrap().status(), StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(world.simulator.requests(), 3);

        // A POST that may have been processed is sent twice only if the caller says so.
        for (client, sends) in [(client.clone(), 1), (client.clone().with_extension(MayProcessTwice), 2)] {
            let before = world.simulator.requests();
            world.simulator.inject(Fault::Unavailable);
            let request = client.reqwest().post(world.url("chat/completions")).body(CHAT);
            in_time(client.execute(request)).await.unwrap();
            assert_eq!(world.simulator.requests() - before, sends);
        }
    }
}

/// tower's `retry` around the client takes reqwest's own requests.
#[tokio::test]
async fn retries_around_the_client() {
    let world = world(PROTOCOLS[0]).await;
    let mut service = ServiceBuilder::new().retry(policy()).service(world.key_alone());
    refuse(&world);
    let request = world.key_alone().reqwest().post(world.url("chat/completions")).body(CHAT).build().unwrap();
    let response = in_time(service.ready().await.unwrap().call(request)).await.unwrap();
    assert_eq!((response.status(), world.simulator.requests()), (StatusCode::OK, 2));
}

#[cfg(feature = "middleware")]
mod middleware {
    use reqwest_middleware::ClientBuilder;
    use tower_selam::{
        AuthError, AuthErrorKind,
        adapter::{reqwest::redirect_policy, reqwest_middleware::AuthMiddleware},
    };

    use super::*;

    /// J9: the policy in the middleware retries what it should, and the layers replay once.
    #[tokio::test]
    async fn retries_within_the_middleware() {
        let world = world(PROTOCOLS[0]).await;
        let layers = ServiceBuilder::new().retry(policy()).layer(ThrottleLayer::new()).layer(layer(&world));
        let client = world.reqwest().redirect(redirect_policy()).build().unwrap();
        let client = ClientBuilder::new(client).with(AuthMiddleware::with_layers(layers)).build();
        let send = || client.post(world.url("chat/completions")).body(CHAT);

        refuse(&world);
        world.simulator.inject(Fault::Unavailable);
        let response = in_time(send().send()).await.unwrap();
        assert_eq!((response.status(), world.simulator.requests()), (StatusCode::SERVICE_UNAVAILABLE, 2));

        world.simulator.inject(Fault::Unavailable);
        let response = in_time(send().with_extension(MayProcessTwice).send()).await.unwrap();
        assert_eq!((response.status(), world.simulator.requests()), (StatusCode::OK, 4));

        world.simulator.revoke_key(&world.key);
        let error = in_time(send().send()).await.unwrap_err();
        assert_eq!(AuthError::find(&error).unwrap().kind(), AuthErrorKind::InvalidApiKey);
        assert_eq!(world.simulator.requests(), 5, "a 401 is final");
    }
}
