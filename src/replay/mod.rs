//! Replays a request once after a 401, with a refreshed credential: [`RefreshLayer`].
//!
//! It goes between the layer that reads errors and the layers that write credentials:
//!
//! ```
//! use bytes::Bytes;
//! use http::{Request, Response};
//! use http_body_util::Full;
//! use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
//! use tower_selam::{
//!     AuthErrorLayer, BoxError, JwtLayer, RefreshLayer, Refreshing, Token,
//!     source::{Reason, source_fn},
//! };
//!
//! # tokio_test::block_on(async {
//! // The API has revoked the first token.
//! let api = service_fn(|request: Request<Full<Bytes>>| async move {
//!     let status = if request.headers()["authorization"] == "Bearer second" { 200 } else { 401 };
//!     Ok::<_, BoxError>(Response::builder().status(status).body(Full::<Bytes>::default())?)
//! });
//! let jwts = Refreshing::new(source_fn(|reason: Reason<Token>| async move {
//!     let text = if let Reason::Rejected(_) = reason { "second" } else { "first" };
//!     Ok::<_, BoxError>(Token::new(text)?)
//! }));
//! let service = ServiceBuilder::new()
//!     .layer(AuthErrorLayer::new())
//!     .layer(RefreshLayer::new())
//!     .layer(JwtLayer::new(jwts))
//!     .service(api);
//!
//! let request = Request::post("https://api.selamgpt.com/v1/chat/completions").body(Full::default())?;
//! assert_eq!(service.oneshot(request).await?.status(), 200);
//! # Ok::<(), BoxError>(())
//! # }).unwrap();
//! ```
//!
//! # What a 401 causes
//!
//! | The API said | and the request carried | then |
//! |---|---|---|
//! | `invalid_api_key` | a key from a source | the source is asked again; the request is replayed if the key has changed |
//! | `missing_api_key` | | the 401 is returned |
//! | anything else | a JWT | it is refreshed, and the request replayed |
//! | anything else | only a key | as for `invalid_api_key` |
//!
//! The rejected credential is compared with the current one first: a late 401 for an older credential leaves the newer one
//! in place, and the request is replayed with that. Concurrent 401s share one refresh. A request is sent at most twice; a
//! 403 is never replayed. If replacements keep being rejected, refreshes are spaced like failed ones and the 401s are
//! returned meanwhile; an accepted replacement resets the spacing.
//!
//! A 401 that is returned has its body intact. To know what it says, up to 64 KiB of it are read, for at most 5 seconds.
//!
//! # Bodies
//!
//! To replay a request, its body has to be available again. [`RefreshLayer::new`] clones it, which is cheap for
//! `Full<Bytes>`. For a streaming body, [`RefreshLayer::buffered`] keeps a copy of what was sent, up to a limit, and
//! [`RefreshLayer::without_replay`] keeps nothing: the credential is refreshed all the same, and the 401 returned. An API
//! may reject a request before it has received the whole body. After the refresh the client has five seconds to let go of
//! the rest, as it does when it has sent it or when the API closes the connection or stream; otherwise the 401 is
//! returned, because two readers of one stream would each get half.

mod blame;
mod body;
mod captured;
mod future;
mod head;
mod layer;
mod pieces;
mod service;

pub(crate) use self::blame::{Blame, is_accepted};
pub use self::{
    body::{BufferBody, CapturedBody, CloneBody, NoReplay, Replay, ReplayBody},
    future::ResponseFuture,
    layer::RefreshLayer,
    service::Refresh,
};
