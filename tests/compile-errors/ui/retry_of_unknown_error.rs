//! `RetryPolicy` over a client with an error type of the program.

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use tower::{Service, ServiceBuilder, service_fn};
use tower_selam::{ApiKey, SelamLayer, retry::RetryPolicy};

#[derive(Debug)]
struct ClientError;

fn main() {
    let client = service_fn(|_: Request<Full<Bytes>>| async { Ok::<_, ClientError>(Response::new(Full::<Bytes>::default())) });
    let layer = SelamLayer::builder().with_api_key(ApiKey::new("sk-selam-example").unwrap()).build().unwrap();
    let layers = ServiceBuilder::new().retry(RetryPolicy::new()).layer(layer);
    sends(layers.service(client));
}

fn sends<S: Service<Request<Full<Bytes>>>>(_: S) {}
