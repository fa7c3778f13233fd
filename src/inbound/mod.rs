//! For servers that forward requests: what a caller sent that must not go upstream.
//!
//! [`StripCredentialsLayer`] takes off the caller's credentials, [`StripHopByHopLayer`] what was meant for this
//! connection alone. A proxy has both outside of the stack that writes ours:
//!
//! ```text
//! caller ─▶ who is it? ─▶ StripHopByHop ─▶ StripCredentials ─▶ Selam ─▶ client
//!           (yours)       Connection,      Authorization,      ours
//!                         TE, Upgrade, …   Cookie, ?token=, …
//! ```
//!
//! ```
//! use std::convert::Infallible;
//! use http::{Request, Response};
//! use tower::{ServiceBuilder, ServiceExt, service_fn};
//! use tower_selam::inbound::{StripCredentialsLayer, StripHopByHopLayer};
//!
//! # tokio_test::block_on(async {
//! let upstream = service_fn(|request: Request<()>| async move {
//!     assert_eq!(request.uri(), "/v1/chat/completions?n=1");
//!     assert_eq!(request.headers().len(), 1);
//!     assert_eq!(request.headers()["accept"], "text/event-stream");
//!     Ok::<_, Infallible>(Response::new(()))
//! });
//! let service = ServiceBuilder::new()
//!     .layer(StripHopByHopLayer::new())
//!     .layer(StripCredentialsLayer::new())
//!     .service(upstream);
//!
//! let request = Request::post("/v1/chat/completions?token=the.callers.own&n=1")
//!     .header("accept", "text/event-stream")
//!     .header("authorization", "Bearer the-callers-own")
//!     .header("cookie", "session=1")
//!     .header("connection", "keep-alive, x-internal")
//!     .header("x-internal", "1")
//!     .body(())
//!     .unwrap();
//! service.oneshot(request).await.unwrap();
//! # });
//! ```
//!
//! The layers that write credentials replace `Authorization` and `X-API-Key` by themselves; these two see to the rest:
//! the other headers and the query parameters that an API may read a credential from, and requests that go on with no
//! credential of ours ([`RequestAuth::Anonymous`](crate::RequestAuth::Anonymous)).
//!
//! # Order
//!
//! Outside of the layers that write credentials, and inside of what authenticates the caller, which needs to see them.
//! In either order beside each other. A `Connection` header cannot take off what layers further in write: it is gone by
//! then, and those keep their own headers out of it besides.

mod credentials;
mod hop_by_hop;

pub use self::{
    credentials::{StripCredentials, StripCredentialsLayer},
    hop_by_hop::{ResponseFuture, StripHopByHop, StripHopByHopLayer},
};
