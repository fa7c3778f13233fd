//! The ready-made stack: [`SelamLayer`].
//!
//! It is the composition of the public layers, with one that owns both `Authorization` and `X-API-Key` and sends a
//! consistent pair of key and JWT. It fits any client: its error is [`Error`](crate::Error), either the client's or an
//! [`AuthError`](crate::AuthError).
//!
//! ```
//! use std::convert::Infallible;
//! use http::{Request, Response};
//! use http_body_util::Empty;
//! use bytes::Bytes;
//! use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
//! use tower_selam::{ApiKey, BaseUrl, SelamLayer};
//!
//! # tokio_test::block_on(async {
//! let client = service_fn(|request: Request<()>| async move {
//!     assert_eq!(request.headers()["authorization"], "Bearer sk-selam-example");
//!     Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
//! });
//! let layer = SelamLayer::builder().with_api_key(ApiKey::new("sk-selam-example")?).build()?;
//! let chat = layer.base_url().endpoint("chat/completions")?;
//! let service = ServiceBuilder::new().layer(layer).service(client);
//!
//! service.oneshot(Request::post(chat).body(()).unwrap()).await.unwrap();
//! # Ok::<(), tower_selam::ConfigError>(())
//! # }).unwrap();
//! ```
//!
//! A proxy passes the API's own answers on: [`SelamLayer::annotated`]. A host that is no Tower service calls
//! [`SelamLayer::authorize`]; see [`guide::hosts`](crate::guide::hosts).

mod authorized;
mod builder;
mod layer;
mod service;
mod sharing;

pub use self::{
    authorized::Authorized,
    builder::SelamLayerBuilder,
    layer::SelamLayer,
    service::{ResponseBody, Selam},
};
