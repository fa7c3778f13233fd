//! Tokens from an OAuth 2.0 token endpoint: [`OAuthSource`].
//!
//! | To obtain a token | Use |
//! |---|---|
//! | as the program itself | [`OAuthSource::client_credentials`], [RFC 6749 section 4.4](https://www.rfc-editor.org/rfc/rfc6749#section-4.4) |
//! | for a user who has logged in | [`OAuthSource::refresh_token`], [RFC 6749 section 6](https://www.rfc-editor.org/rfc/rfc6749#section-6) |
//! | in exchange for a token that another service issued | [`OAuthSource::token_exchange`], [RFC 8693](https://www.rfc-editor.org/rfc/rfc8693) |
//! | in exchange for a JWT signed by this program or a trusted party | [`OAuthSource::jwt_bearer`], [RFC 7523 section 2.1](https://www.rfc-editor.org/rfc/rfc7523#section-2.1) |
//!
//! The source sends requests to a [`TokenEndpoint`] through any HTTP client that is a Tower service, with any
//! layers around it, and authenticates with a [`ClientAuth`].
//!
//! ```
//! use bytes::Bytes;
//! use http_body_util::Full;
//! use tower_selam::{
//!     Refreshing,
//!     oauth::{ClientAuth, OAuthSource, TokenEndpoint},
//!     simulator::Simulator,
//! };
//!
//! # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
//! let client = Simulator::new(); // or hyper-util, or any other Tower service
//! let (id, secret) = client.issue_client();
//!
//! let endpoint = TokenEndpoint::new::<_, Full<Bytes>, _>("https://api.selamgpt.com/oauth/token", client)?
//!     .with_client_auth(ClientAuth::client_secret_basic(id, secret)?);
//! let jwts = Refreshing::new(OAuthSource::client_credentials(endpoint).with_scope("audio"));
//! assert!(jwts.token().await?.expires_at().is_some());
//! # Ok::<(), tower_selam::BoxError>(())
//! # }).unwrap();
//! ```
//!
//! # Responses
//!
//! | The endpoint answers | Effect |
//! |---|---|
//! | a token ([RFC 6749 section 5.1](https://www.rfc-editor.org/rfc/rfc6749#section-5.1)) | It is used for `expires_in` from its arrival. If that is missing or not a number, the expiry in the JWT counts, and otherwise the [policy](crate::RefreshPolicy::with_assumed_lifetime). |
//! | `invalid_grant`, `invalid_client` or `unauthorized_client` ([section 5.2](https://www.rfc-editor.org/rfc/rfc6749#section-5.2)) | If the rejected credential is a refreshing one, it is refreshed and the request is replayed. Otherwise the failure is permanent until one of the credentials changes. |
//! | another error, 429, 5xx, or nothing | The failure is transient and is retried after `Retry-After`, if given, or a back-off. |
//! | a redirect | Likewise. It is not followed, because that would send the client secret to another URL. |
//! | more than 64 KiB, a body that is not JSON, or a token that is not a bearer token | Likewise. |
//!
//! [`OAuthError`] describes the failure. It is a cause of the [`AuthError`](crate::AuthError) that requests fail
//! with.
//!
//! # Refresh tokens
//!
//! Refresh tokens are assumed to be valid for one use
//! ([RFC 9700 section 4.14.2](https://www.rfc-editor.org/rfc/rfc9700#section-4.14.2)). Exchanges therefore run one
//! at a time, each on a task that completes even if every waiting request is dropped: the access token is kept for
//! the next request, and the new refresh token is saved in the [`RefreshTokenStore`]. The same refresh token is
//! sent again only if an exchange ends without a complete response: it is then unknown whether the endpoint has
//! spent it, and the source has no other token to try.

mod auth;
mod client;
mod endpoint;
mod exchange;
mod response;
mod rotation;
mod source;
mod store;
mod token_type;

pub(crate) use self::client::TokenClient;
pub use self::{
    auth::ClientAuth,
    endpoint::TokenEndpoint,
    response::OAuthError,
    source::OAuthSource,
    store::{MemoryStore, RefreshToken, RefreshTokenStore},
    token_type::TokenType,
};
