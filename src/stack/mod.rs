//! The ready-made stack: [`SelamLayer`].
//!
//! ```text
//!  request ─▶ MapAuthError ─▶ Refresh ────────▶ Authorize ─▶ your client
//!             401, 403 as     401: renew, and    key, or JWT
//!             typed errors    send once more     and key
//! ```
//!
//! It fits any client, whatever its error type: its own is [`Error`](crate::Error), either the client's
//! error or an [`AuthError`](crate::AuthError).
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
//! let models = layer.base_url().endpoint("models").unwrap();
//! let service = ServiceBuilder::new().layer(layer).service(client);
//!
//! service.oneshot(Request::get(models).body(()).unwrap()).await.unwrap();
//! # Ok::<(), tower_selam::ConfigError>(())
//! # }).unwrap();
//! ```
//!
//! A proxy wants the API's own words to reach its caller: [`SelamLayer::annotated`] is the same stack in annotate mode, as
//! [`AnnotateAuthErrorLayer`](crate::AnnotateAuthErrorLayer) has it.

mod annotated;
mod builder;
mod layer;
mod sending;
mod service;

pub use self::{
    annotated::{AnnotatedFuture, AnnotatedSelam, AnnotatedSelamLayer},
    builder::SelamLayerBuilder,
    layer::SelamLayer,
    service::{ResponseFuture, Selam},
};
