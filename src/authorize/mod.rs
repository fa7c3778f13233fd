//! Writes credentials into requests: [`ApiKeyLayer`] and [`JwtLayer`].
//!
//! Both make the same service, [`Authorize`], and differ in what they have:
//!
//! | To send | Build |
//! |---|---|
//! | the key as `Authorization: Bearer` | [`ApiKeyLayer::bearer`] |
//! | the key as `X-API-Key` | [`ApiKeyLayer::x_api_key`] |
//! | the JWT as `Authorization: Bearer` and the key as `X-API-Key` | [`JwtLayer::new`] |
//! | the same, from two layers in either order | [`ApiKeyLayer::beside_jwt`] and [`JwtLayer::beside_api_key`] |
//! | what each request brings along | [`ApiKeyLayer::per_request`] |
//!
//! Whatever `Authorization` and `X-API-Key` the request came with are replaced, so that a proxy never
//! forwards its caller's. A request that may not have the credentials fails before anything is sent, and so
//! does one for which there are none.
//!
//! A layer that is not made to stand beside another minds both headers, and takes off what an outer one wrote:
//! `ApiKeyLayer::bearer` inside a `JwtLayer` sends the key alone. The two that are made for it each write
//! their own header and leave the other's, which they know by its sensitive mark; nothing that came over a
//! connection has that. Neither is of use without the other.
//!
//! ```
//! use http::{Request, Response};
//! use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
//! use tower_selam::{ApiKey, ApiKeyLayer, BoxError, JwtLayer, Token};
//!
//! # tokio_test::block_on(async {
//! let client = service_fn(|request: Request<()>| async move {
//!     assert_eq!(request.headers()["authorization"], "Bearer a.b.c");
//!     assert_eq!(request.headers()["x-api-key"], "sk-selam-example");
//!     Ok::<_, BoxError>(Response::new(()))
//! });
//! let key = ApiKey::new("sk-selam-example")?;
//! let service = ServiceBuilder::new().layer(JwtLayer::new(Token::new("a.b.c")?, key)).service(client);
//!
//! service.oneshot(Request::get("https://api.selamgpt.com/v1/models").body(())?).await?;
//! # Ok::<(), BoxError>(())
//! # }).unwrap();
//! ```
//!
//! # Order
//!
//! Innermost, next to the client: what is further in sees the credentials. A layer that follows redirects
//! goes outside, with [`Origins::strip_for_other_origins`](crate::Origins::strip_for_other_origins).

mod future;
pub(crate) mod headers;
mod layer;
mod policy;
pub(crate) mod provider;
mod service;
pub(crate) mod strip;
pub(crate) mod voice_agent;

pub use self::{
    future::ResponseFuture,
    layer::{ApiKeyLayer, JwtLayer},
    service::Authorize,
};
pub(crate) use self::{
    future::{Later, Sent},
    policy::{LayerCredentials, Policy, Unsent},
};
