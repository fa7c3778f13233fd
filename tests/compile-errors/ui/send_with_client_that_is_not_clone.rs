//! `Selam::send`, as in the README, with a client that is not `Clone`.

use std::{
    future::{Ready, ready},
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Empty;
use tower::{BoxError, Layer, Service};
use tower_selam::{ApiKey, SelamLayer};

struct Client;

impl Service<Request<()>> for Client {
    type Response = Response<Empty<Bytes>>;
    type Error = BoxError;
    type Future = Ready<Result<Response<Empty<Bytes>>, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<()>) -> Self::Future {
        ready(Ok(Response::new(Empty::new())))
    }
}

fn main() {
    let layer = SelamLayer::builder().with_api_key(ApiKey::new("sk-selam-example").unwrap()).build().unwrap();
    let selam = layer.layer(Client);
    let _ = selam.send(Request::new(()));
}
