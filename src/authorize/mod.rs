//! Writes credentials into requests: [`ApiKeyLayer`] and [`JwtLayer`].
//!
//! | To send | Build | Owns |
//! |---|---|---|
//! | the key as `Authorization: Bearer` | [`ApiKeyLayer::bearer`] | `Authorization` |
//! | the key as `X-API-Key` | [`ApiKeyLayer::x_api_key`] | `X-API-Key` |
//! | the JWT as `Authorization: Bearer` | [`JwtLayer::new`] | `Authorization` |
//! | the JWT as bearer and the key as `X-API-Key` | [`JwtLayer::new`] and [`ApiKeyLayer::x_api_key`] in either order, or [`SelamLayer`](crate::SelamLayer) | both |
//! | what each request brings in its extensions | [`ApiKeyLayer::per_request`] | both |
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
//! let service = ServiceBuilder::new()
//!     .layer(JwtLayer::new(Token::new("a.b.c")?))
//!     .layer(ApiKeyLayer::x_api_key(ApiKey::new("sk-selam-example")?))
//!     .service(client);
//!
//! service.oneshot(Request::post("https://api.selamgpt.com/v1/chat/completions").body(())?).await?;
//! # Ok::<(), BoxError>(())
//! # }).unwrap();
//! ```
//!
//! # Header ownership
//!
//! A layer owns exactly the headers that it writes. It replaces what a request brings in them, duplicates included, and
//! touches no other header. Two exceptions serve the same end: the names of headers that it wrote are removed from
//! `Connection`, so that no proxy drops them, and a stripped request loses a `Referer` that contains one of its secrets.
//!
//! Credentials that an inbound caller sent in a header which no layer owns pass through: removing them is the job of
//! [`StripCredentialsLayer`](crate::inbound::StripCredentialsLayer). `SelamLayer` gives a consistent pair: its key and JWT
//! were current at the same time, also while either is rotated. Two layers read theirs one after the other, and the outer
//! one's may expire while the inner one waits.
//!
//! # Which requests get credentials
//!
//! A request to an origin that is [not allowed](crate::Origins) is refused before anything is sent, or stripped of what
//! the layer owns if the origins say so. `TRACE` and `CONNECT` are refused
//! ([RFC 9110 section 9.3.8](https://www.rfc-editor.org/rfc/rfc9110#section-9.3.8)). If no credential is available the
//! request fails; it is never sent without.
//!
//! A request that waits for a refresh holds no permit of the inner service. What it is sent with was valid and current when
//! the service became ready; a wait within the service's call is [out of sight](crate::guide::composition#limits).
//!
//! # Overriding the credentials of one request
//!
//! [`RequestAuth`](crate::RequestAuth) in a request's extensions overrides what a layer writes into its headers:
//!
//! | | `ApiKeyLayer::bearer` | `ApiKeyLayer::x_api_key` | `JwtLayer` | `SelamLayer` |
//! |---|---|---|---|---|
//! | `ApiKey` | the key | the key | removes the header | the key as bearer |
//! | `ApiKeyAndJwt` | refuses | the key | the JWT | both; refuses without a JWT |
//! | `Anonymous` | removes the header | removes the header | removes the header | removes both |
//! | `Custom` | what goes into `Authorization`; refuses if something goes into `X-API-Key` | what goes into `X-API-Key`; refuses if nothing does | what goes into `Authorization` | all of it |
//! | `VoiceAgent` | refuses | the query parameter `api_key` | the query parameter `token` | both parameters; refuses without a JWT |
//!
//! # Order
//!
//! Innermost, next to the client: inner services see the credentials. A layer that follows redirects goes outside, with
//! [`Origins::strip_for_other_origins`](crate::Origins::strip_for_other_origins).

mod head;
mod headers;
mod layer;
mod policy;
mod provider;
mod sent;
mod service;
mod strip;
mod voice_agent;

pub(crate) use self::{
    headers::{Owner, X_API_KEY},
    policy::{Policy, Settings},
    provider::CredentialProvider,
    sent::Sent,
    service::Undecided,
};
pub use self::{
    layer::{ApiKeyLayer, JwtLayer},
    service::{Authorize, ResponseFuture},
};
