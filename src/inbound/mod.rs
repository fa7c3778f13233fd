//! Layers for servers that forward requests: they remove what a caller sent that must not go upstream.
//!
//! [`StripCredentialsLayer`] removes the caller's credentials, and what tells of its network or identity. Doing so is its job
//! alone: the layers that write credentials replace the headers that they own and touch no others. [`StripHopByHopLayer`]
//! removes the headers that were meant for the caller's connection. [`StripResponsesLayer`] removes from responses what would
//! speak for the proxy, such as `Set-Cookie`. A proxy puts them outside of the stack that writes its own credentials:
//!
//! ```text
//! caller ─▶ authenticate ─▶ StripHopByHop ─▶ StripCredentials ─▶ Selam ─▶ client
//!           (your code)     Connection,      Authorization,      our credentials
//!                           TE, Upgrade, …   Cookie, ?token=, …
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
//! Without `StripCredentialsLayer`, three kinds of credentials would reach the API: those in headers that no layer of the
//! stack owns, such as `Cookie`, or `X-API-Key` under a layer that writes `Authorization` alone; those in the query; and
//! all of them in a request that is sent without our credentials
//! ([`RequestAuth::Anonymous`](crate::RequestAuth::Anonymous)).
//!
//! [`PathRule`] tells whether a path may be called, [`WebSocketProtocols`] finds the tokens that browsers hide among
//! subprotocols, [`is_forwarded`] recognises requests that passed through another proxy, and [`EchoMask`] overwrites our
//! credentials in what the API sends back.
//!
//! # Order
//!
//! Outside of the layers that write credentials, and inside of the code that authenticates the caller, which needs to see
//! the caller's credentials. Their order does not matter. A caller's `Connection` header cannot remove what inner
//! layers write: `StripHopByHopLayer` has already dropped it, and the layers that write credentials also remove the names of
//! the headers they own from it.

mod credentials;
mod hop_by_hop;
mod mask;
mod names;
mod path;
mod responses;
mod websocket;

pub use self::{
    credentials::{StripCredentials, StripCredentialsLayer},
    hop_by_hop::{ResponseFuture, StripHopByHop, StripHopByHopLayer},
    mask::EchoMask,
    names::is_forwarded,
    path::PathRule,
    responses::{StripResponses, StripResponsesLayer, StrippedBody, StrippedResponseFuture},
    websocket::WebSocketProtocols,
};
