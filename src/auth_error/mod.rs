//! Turns the API's 401 and 403 into [`AuthError`](crate::AuthError): [`AuthErrorLayer`] and
//! [`AnnotateAuthErrorLayer`].
//!
//! [`AuthErrorLayer`] makes the error out of the response: the caller gets `Err`. Anything but a 401 or 403
//! passes as it came, its body of the same type and unread.
//!
//! ```
//! use http::{Request, Response};
//! use http_body_util::Full;
//! use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
//! use tower_selam::{AuthError, AuthErrorKind, AuthErrorLayer, BoxError};
//!
//! # tokio_test::block_on(async {
//! let api = service_fn(|_: Request<()>| async {
//!     let body = r#"{"error":{"message":"No API key provided.","code":"missing_api_key"}}"#;
//!     Ok::<_, BoxError>(Response::builder().status(401).body(Full::<bytes::Bytes>::from(body))?)
//! });
//! let service = ServiceBuilder::new().layer(AuthErrorLayer::new()).service(api);
//!
//! let error = service.oneshot(Request::new(())).await.unwrap_err();
//! let error = AuthError::find(&*error).unwrap();
//! assert_eq!(error.kind(), AuthErrorKind::MissingApiKey);
//! assert_eq!(error.remedy(), Some("send the API key in a header on all requests"));
//! # });
//! ```
//!
//! [`AnnotateAuthErrorLayer`] is for proxies: the response goes on with its status, headers and body, and
//! the error is in its extensions. [`SelamLayer::annotated`](crate::SelamLayer::annotated) is the whole stack with it.
//!
//! # The body
//!
//! An error body is read up to 64 KiB and for 5 seconds at most; both can be set. Whatever stops it, too
//! much, too slow or broken off, the error has the status and what was read. The time is tokio's: outside a
//! tokio runtime, or in one without timers, only what is there at once is read.
//!
//! # Order
//!
//! Outside of the layers that write credentials. Those tell it which they sent, so that an API that echoes a
//! key cannot get it printed. Layers that retry or time out go on either side.

mod body;
mod future;
mod inspect;
mod layer;
mod service;

pub(crate) use self::inspect::{Bounds, Collect, End, Inspect, Read};
pub use self::{
    body::{AnnotateAuthError, AnnotateFuture, InspectedBody},
    future::ResponseFuture,
    layer::{AnnotateAuthErrorLayer, AuthErrorLayer},
    service::MapAuthError,
};
