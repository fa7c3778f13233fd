//! `RetryPolicy` over a client whose request body is not `Clone`.

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{Empty, combinators::BoxBody};
use tower::{BoxError, Service, ServiceBuilder, service_fn};
use tower_selam::{ApiKey, SelamLayer, retry::RetryPolicy};

type Body = BoxBody<Bytes, BoxError>;

fn main() {
    let client = service_fn(|_: Request<Body>| async { Ok::<_, BoxError>(Response::new(Empty::<Bytes>::new())) });
    let layer = SelamLayer::builder().with_api_key(ApiKey::new("sk-selam-example").unwrap()).build().unwrap();
    let layers = ServiceBuilder::new().retry(RetryPolicy::new()).layer(layer.without_replay());
    sends(layers.service(client));
}

fn sends<S: Service<Request<Body>>>(_: S) {}
