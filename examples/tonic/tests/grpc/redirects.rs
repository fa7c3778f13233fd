//! Redirects from one server to another.

use bytes::Bytes;
use example_tonic::GreeterClient;
use http::Response;
use tonic::transport::Endpoint;
use tower::Layer;
use tower_selam::{
    ApiKey, BaseUrl, SelamLayer,
    adapter::tonic::SelamGrpcLayer,
    simulator::{Fault, Server, Simulator},
};

use crate::support::{KEY, greet};

/// O4: a redirect is not followed, and nothing reaches the other origin.
#[tokio::test]
async fn redirects_are_not_followed() {
    let (api, other) = (Simulator::new(), Simulator::new());
    let (server, elsewhere) = (Server::http(&api).await.unwrap(), Server::http(&other).await.unwrap());
    let base_url = BaseUrl::allow_insecure_loopback(server.base_url()).unwrap();
    let selam = SelamLayer::builder().with_api_key(ApiKey::new(KEY).unwrap()).with_base_url(base_url);
    let endpoint = Endpoint::from_shared(server.base_url().replace("/v1", "")).unwrap();
    let layer = SelamGrpcLayer::new(selam.build().unwrap(), endpoint.uri()).unwrap();
    let mut client = GreeterClient::new(layer.layer(endpoint.connect_lazy()));
    for status in [301, 302, 307, 308] {
        let redirect = Response::builder().status(status).header("location", elsewhere.base_url());
        api.inject(Fault::Answer(redirect.body(Bytes::new()).unwrap()));
        greet(&mut client).await.unwrap_err();
        let sent = api.received().pop().unwrap();
        assert_eq!(sent.headers["authorization"], format!("Bearer {KEY}"), "{status}");
    }
    assert_eq!((api.requests(), other.requests()), (4, 0));
}
