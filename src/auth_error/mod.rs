//! Turns the API's 401 and 403 into an [`AuthError`](crate::AuthError): [`AuthErrorLayer`].
//!
//! The caller gets `Err` instead of the response. Any other response passes unread.
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
//! [`AuthErrorLayer::annotated`] is for proxies: the response is returned with its status, headers and body, and with the
//! error in its extensions.
//!
//! # The body
//!
//! The layer reads up to 64 KiB of an error body, for at most 5 seconds; both limits can be set. Whether the body is too
//! large, too slow or breaks off, the error has the status and what was read. Outside of a tokio runtime with timers, only
//! what is ready at once is read. The body of the response is an [`InspectedBody`] in either case: it yields the frames
//! that were read, then the rest.
//!
//! In annotate mode, the credentials that were sent are overwritten with `*` wherever the response echoes them: in its headers,
//! its trailers and the part of its body that was read. Lengths stay, so `Content-Length` stays right; digests of a masked
//! body are removed. What follows the part that was read is passed on as it comes.
//!
//! With the feature `decompression`, a body compressed with gzip, deflate or Brotli is decompressed, within the same limit, to read the
//! error and to find echoes. A response whose body echoes a credential then has the decompressed and masked body, without
//! `Content-Encoding`, as far as it was read. Without the feature, a compressed body is not read: the kind comes from headers and
//! status alone.
//!
//! # Order
//!
//! Outside of the layers that write credentials: they tell this layer what was sent, so that a key which the API echoes
//! is masked in the error. Layers that retry or time out go on either side.

mod inspect;
mod layer;

pub(crate) use self::inspect::{BodyLimits, Inspection};
pub use self::{
    inspect::InspectedBody,
    layer::{AuthErrorLayer, MapAuthError, ResponseFuture},
};
