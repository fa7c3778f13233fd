//! The client's error does not implement `From<AuthError>`.

use std::io;

use http::{Request, Response};
use tower::{Layer, Service, service_fn};
use tower_selam::{ApiKey, ApiKeyLayer};

fn main() {
    let client = service_fn(|_: Request<()>| async { Ok::<_, io::Error>(Response::new(())) });
    let layer = ApiKeyLayer::bearer(ApiKey::new("sk-selam-example").unwrap());
    sends(layer.layer(client));
}

fn sends<S: Service<Request<()>>>(_: S) {}
