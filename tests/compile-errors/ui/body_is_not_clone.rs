//! The request body is not `Clone`, so it cannot be replayed.

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{Empty, combinators::BoxBody};
use tower::{BoxError, Layer, Service, service_fn};
use tower_selam::{ApiKey, SelamLayer};

type Body = BoxBody<Bytes, BoxError>;

fn main() {
    let client = service_fn(|_: Request<Body>| async { Ok::<_, BoxError>(Response::new(Empty::<Bytes>::new())) });
    let layer = SelamLayer::builder().with_api_key(ApiKey::new("sk-selam-example").unwrap()).build().unwrap();
    sends(layer.layer(client));
}

fn sends<S: Service<Request<Body>>>(_: S) {}
