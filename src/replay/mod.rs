//! Renews what the API refused and sends the request once more: [`RefreshLayer`].
//!
//! Between the layer that reads errors and the ones that write credentials:
//!
//! ```
//! use bytes::Bytes;
//! use http::{Request, Response};
//! use http_body_util::Full;
//! use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
//! use tower_selam::{
//!     ApiKey, AuthErrorLayer, BoxError, JwtLayer, RefreshLayer, Refreshing, Token,
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
//!     .layer(JwtLayer::new(jwts, ApiKey::new("sk-selam-example")?))
//!     .service(api);
//!
//! let request = Request::post("https://api.selamgpt.com/v1/models").body(Full::default())?;
//! assert_eq!(service.oneshot(request).await?.status(), 200);
//! # Ok::<(), BoxError>(())
//! # }).unwrap();
//! ```
//!
//! # What a 401 leads to
//!
//! | The API said | and the request carried | then |
//! |---|---|---|
//! | `invalid_api_key` | a key from a source | the source is asked again; the request is sent again if there is another key |
//! | `missing_api_key` | | the 401 goes up |
//! | anything else | a JWT | it is renewed, and the request sent again |
//! | anything else | a key alone | as for `invalid_api_key` |
//!
//! What was sent is compared before it is forgotten: a late 401 for an older credential leaves the newer one in
//! place, and the request is sent again with that. However many requests are refused at once, one renewal serves
//! them all. A request is sent twice at most; a 403 never is. Where tokens are refused time and again, renewals
//! are spaced like failed ones, and the 401s go up in between; where the one that came after was accepted, they are not.
//!
//! The 401 that goes up has the body that it came with. To know what it says, 64 KiB of it are read, for 5
//! seconds at most.
//!
//! # Bodies
//!
//! To send a request again, its body has to be there again. [`RefreshLayer::new`] clones it, which is cheap for
//! `Full<Bytes>` and its like. For a body that is a stream, [`RefreshLayer::buffered`] keeps what was sent, up to
//! a limit, and [`RefreshLayer::without_replay`] keeps nothing: the credential is renewed all the same, and the
//! 401 goes up. An API may refuse a stream before it has all of it. The client is then given five seconds after the renewal
//! to let go of the rest, as it does when it has sent it, or when the API ends the connection or stream; if it does not, the
//! 401 goes up, as two who read one stream would each have half.

mod body;
mod future;
mod head;
mod layer;
mod service;

pub(crate) use self::future::{Again, Replaying, Stopped};
#[cfg(feature = "tonic")]
pub(crate) use self::future::{Blamed, Undecided};
pub use self::{
    body::{BufferBody, CapturedBody, CloneBody, NoReplay, Replay, ReplayBody},
    future::ResponseFuture,
    layer::RefreshLayer,
    service::Refresh,
};
