//! The request extension that overrides which credentials a request is sent with.

use super::Credentials;

/// Selects the credentials of one request. Put it into the request's extensions.
///
/// It applies to that request alone. An outer layer that follows redirects may drop it, and the redirected request would
/// then carry the layer's own credentials: where that matters, build the layers with
/// [`require_request_auth`](crate::ApiKeyLayer::require_request_auth), which refuses a request without the extension.
/// (tower-http's `FollowRedirect` keeps extensions within an origin and drops them for good between origins.)
///
/// Each layer applies it to the headers that it owns; [the table](crate::authorize#overriding-the-credentials-of-one-request)
/// says what that means.
///
/// Layers find it by its type, so they see only that of their own version of this crate. Cargo therefore
/// [refuses two versions](crate::guide::layers#one-version-of-the-crate) in one dependency graph.
///
/// ```
/// use http::Request;
/// use tower_selam::RequestAuth;
///
/// let request = Request::post("https://api.selamgpt.com/v1/chat/completions")
///     .extension(RequestAuth::ApiKey)
///     .body(())
///     .unwrap();
/// # assert!(matches!(request.extensions().get(), Some(RequestAuth::ApiKey)));
/// ```
///
/// The voice agent's WebSocket handshake, for a client that takes a request:
///
/// ```
/// use http::Request;
/// use tower_selam::{ApiKey, RequestAuth, SelamLayer, Token};
///
/// # tokio_test::block_on(async {
/// let builder = SelamLayer::builder().with_api_key(ApiKey::new("sk-selam-example")?);
/// let layer = builder.with_jwt(Token::new("a.b.c")?).build()?;
/// let (mut head, ()) = Request::get("wss://api.selamgpt.com/socket.io/?EIO=4&transport=websocket&voice=mekdes")
///     .header("connection", "Upgrade")
///     .header("upgrade", "websocket")
///     .extension(RequestAuth::VoiceAgent)
///     .body(())?
///     .into_parts();
/// layer.authorize(&mut head).await?;
/// let query = "EIO=4&transport=websocket&voice=mekdes&token=a.b.c&api_key=sk-selam-example";
/// assert_eq!(head.uri.query(), Some(query));
/// # Ok::<(), tower_selam::BoxError>(())
/// # }).unwrap();
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum RequestAuth {
    /// The key without the JWT.
    ApiKey,
    /// The key and the JWT. Refused by a layer that has no JWT.
    ApiKeyAndJwt,
    /// No credentials: the layer removes what the request brought in its headers. The request may go to any origin.
    Anonymous,
    /// Other credentials than the layer's, such as another tenant's.
    #[doc(alias("tenant"))]
    Custom(Credentials),
    /// The key and the JWT as the query parameters `api_key` and `token`, for the voice agent.
    ///
    /// The voice agent speaks [Socket.IO](https://socket.io/docs/v4/engine-io-protocol/), whose clients send requests to
    /// `/socket.io/` with `EIO` and `transport` in the query: `GET` and `POST` while they poll, and a WebSocket handshake. Every one
    /// of them gets the credentials, those of an open session too. Other requests are refused.
    ///
    /// A 401 refreshes and replays such a request like any other: the API did not process it. A session outlives the rotation of
    /// the key that it was opened with, for its next request carries the new one. Credentials that the API refuses later, with a
    /// connect error in the namespace, are part of the conversation and not seen by any layer; report them with
    /// [`Refreshing::rejected`](crate::Refreshing::rejected).
    ///
    /// The URI then contains secrets: inner layers must not log it.
    VoiceAgent,
}
