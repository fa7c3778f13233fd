//! Tokens from an OAuth 2.0 token endpoint: [`OAuthSource`].
//!
//! | To obtain a token | Build |
//! |---|---|
//! | as the program itself | [`OAuthSource::client_credentials`], [RFC 6749 section 4.4](https://www.rfc-editor.org/rfc/rfc6749#section-4.4) |
//! | for somebody who has logged in | [`OAuthSource::refresh_token`], [RFC 6749 section 6](https://www.rfc-editor.org/rfc/rfc6749#section-6) |
//! | for somebody whose token another service issued | [`OAuthSource::token_exchange`], [RFC 8693](https://www.rfc-editor.org/rfc/rfc8693) |
//! | for a JWT that this program, or somebody it trusts, has signed | [`OAuthSource::jwt_bearer`], [RFC 7523 section 2.1](https://www.rfc-editor.org/rfc/rfc7523#section-2.1) |
//!
//! It asks a [`TokenEndpoint`] through any HTTP client that is a Tower service, with layers of yours around it, and
//! proves who it is by a [`ClientAuth`].
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
//! let client = Simulator::new(); // or hyper-util, or anything that is a Tower service
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
//! # What the endpoint answers
//!
//! | It answers | then |
//! |---|---|
//! | a token ([RFC 6749 section 5.1](https://www.rfc-editor.org/rfc/rfc6749#section-5.1)) | it lives for `expires_in` from its arrival; where that is missing or no number, for as long as a JWT says itself, else as the [policy](crate::RefreshPolicy::with_assumed_lifetime) says |
//! | `invalid_grant`, `invalid_client`, `unauthorized_client` ([section 5.2](https://www.rfc-editor.org/rfc/rfc6749#section-5.2)) | what was refused is renewed, where it renews itself, and sent once more; otherwise the source has failed for good, until one of its credentials changes |
//! | another error, 429, 5xx, no answer | it is asked again, after `Retry-After` if that is given |
//! | a redirect | the same: it is not followed, as it would take the client's secret along |
//! | more than 64 KiB, what is no JSON, a token that is no bearer token | the same |
//!
//! [`OAuthError`] tells which; it is among the causes of the [`AuthError`](crate::AuthError) that requests get.
//!
//! # Refresh tokens
//!
//! They are assumed to be good for one use
//! ([RFC 9700 section 4.14.2](https://www.rfc-editor.org/rfc/rfc9700#section-4.14.2)). An exchange runs on a task of its
//! own, one at a time, to its end whoever leaves: its answer is kept for the next who asks, and the new refresh token goes
//! to the [`RefreshTokenStore`]. Only where an exchange ends without a whole answer is the same token sent again: whether
//! it was spent nobody can know then, and there is no other.

mod answer;
mod auth;
mod client;
mod endpoint;
mod refresh;
mod source;
mod store;

pub(crate) use self::client::TokenClient;
pub use self::{
    answer::OAuthError,
    auth::ClientAuth,
    endpoint::TokenEndpoint,
    source::{OAuthSource, TokenType},
    store::{MemoryStore, RefreshToken, RefreshTokenStore},
};
