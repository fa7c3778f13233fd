//! The client is not `Clone`.

use std::{
    future::{Ready, ready},
    task::{Context, Poll},
};

use http::{Request, Response};
use tower::{BoxError, Layer, Service};
use tower_selam::{ApiKey, ApiKeyLayer};

struct Client;

impl Service<Request<()>> for Client {
    type Response = Response<()>;
    type Error = BoxError;
    type Future = Ready<Result<Response<()>, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<()>) -> Self::Future {
        ready(Ok(Response::new(())))
    }
}

fn main() {
    let layer = ApiKeyLayer::bearer(ApiKey::new("sk-selam-example").unwrap());
    sends(layer.layer(Client));
}

fn sends<S: Service<Request<()>>>(_: S) {}
