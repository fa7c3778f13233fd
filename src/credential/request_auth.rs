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
/// The voice agent's handshake, for a WebSocket client that takes a request:
///
/// ```
/// use http::Request;
/// use tower_selam::{ApiKey, RequestAuth, SelamLayer, Token};
///
/// # tokio_test::block_on(async {
/// let builder = SelamLayer::builder().with_api_key(ApiKey::new("sk-selam-example")?);
/// let layer = builder.with_jwt(Token::new("a.b.c")?).build()?;
/// let (mut head, ()) = Request::get("wss://api.selamgpt.com/v1/audio/agent?voice=mekdes")
///     .header("connection", "Upgrade")
///     .header("upgrade", "websocket")
///     .extension(RequestAuth::VoiceAgent)
///     .body(())?
///     .into_parts();
/// layer.authorize(&mut head).await?;
/// assert_eq!(head.uri.query(), Some("voice=mekdes&token=a.b.c&api_key=sk-selam-example"));
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
    /// The key and the JWT as query parameters, for the WebSocket handshake of the voice agent; refused on any other
    /// request.
    ///
    /// The URI then contains secrets: inner layers must not log it.
    VoiceAgent,
}
