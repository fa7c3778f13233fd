//! Tokens from an OAuth 2.0 token endpoint: [`OAuthSource`].
//!
//! | To obtain a token | Use |
//! |---|---|
//! | as the program itself | [`OAuthSource::client_credentials`], [RFC 6749 section 4.4](https://www.rfc-editor.org/rfc/rfc6749#section-4.4) |
//! | for a user who has logged in | [`OAuthSource::refresh_token`], [RFC 6749 section 6](https://www.rfc-editor.org/rfc/rfc6749#section-6) |
//! | in exchange for a token that another service issued | [`OAuthSource::token_exchange`], [RFC 8693](https://www.rfc-editor.org/rfc/rfc8693) |
//! | the same, for many users who present their own | [`SubjectTokens`] |
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
//! | an error that blames the client, the grant or the user | If the rejected credential is a refreshing one, it is refreshed and the request is replayed. Otherwise the failure is [permanent](crate::AuthErrorKind::RefreshRejected) until one of the credentials changes, or the next attempt five minutes later. |
//! | another error, 408, 429, 5xx, or nothing | The failure is transient and is retried after `Retry-After`, if given, or a back-off. |
//! | a redirect | Likewise. It is not followed, because that would send the client secret to another URL. |
//! | more than 64 KiB, a body that is not JSON, or a token that is not a bearer token | Likewise. |
//!
//! [`OAuthError`] describes the failure. It is a cause of the [`AuthError`](crate::AuthError) that requests fail
//! with.
//!
//! # Errors
//!
//! The code decides what an error means; endpoints use many statuses, 200 among them. A response with an `access_token` is
//! never an error. The code and the message are found in the shapes that [`ErrorBody`](crate::ErrorBody) reads, in a form,
//! and in a body that is nothing but a code, whatever the `Content-Type`. Spellings such as `InvalidGrantException` count
//! as well.
//!
//! | The error blames | Codes | Why |
//! |---|---|---|
//! | the client | `invalid_client`, `unauthorized_client` ([RFC 6749 section 5.2](https://www.rfc-editor.org/rfc/rfc6749#section-5.2)), and those of Google, GitHub, Salesforce and Slack, such as `deleted_client` | Another attempt needs another secret, or a permission. |
//! | the grant | `invalid_grant`, `invalid_token`, `expired_token`, and issuers' own, such as `bad_refresh_token`, `refresh_token_not_found`, `session_expired` | The token is spent, revoked or expired, and stays so. |
//! | the user | `interaction_required`, `login_required`, `consent_required`, `account_selection_required` ([OpenID Connect Core section 3.1.2.6](https://openid.net/specs/openid-connect-core-1_0.html#AuthError)), `access_denied` ([RFC 6749 section 4.1.2.1](https://www.rfc-editor.org/rfc/rfc6749#section-4.1.2.1)), `insufficient_user_authentication` ([RFC 9470](https://www.rfc-editor.org/rfc/rfc9470)), multi-factor codes such as `mfa_required` and `insufficient_aal`, and codes of locked accounts, such as `user_disabled` | A human has to log in, consent, or open the account. |
//! | nobody, for now | `temporarily_unavailable`, `server_error`, `slow_down`, `authorization_pending`, `too_many_requests`, and every unknown code; any code with 408, 429 or 5xx | Time may help, or the endpoint blames itself. |
//! | the request | `invalid_request`, `invalid_scope`, `invalid_target`, `unsupported_grant_type` | It is treated like the row above: the issuer's configuration may change, which nothing here would notice. |
//!
//! # Refresh tokens
//!
//! Refresh tokens are assumed to be valid for one use, and an endpoint to end the login when one is used twice
//! ([RFC 9700 section 4.14.2](https://www.rfc-editor.org/rfc/rfc9700#section-4.14.2)). An exchange therefore
//!
//! 1. runs alone: one at a time in a source, and in all programs that share the login if the [`RefreshTokenStore`] can
//!    [lock](RefreshTokenStore::lock);
//! 2. reads the store first, so that a token that another program stored is found. What this source has spent is not spent
//!    again; if the store still holds it, because saving failed or the store lags, the newer token in memory is used;
//! 3. runs on a task that completes even if every waiting request is dropped. The access token is kept for the next request;
//! 4. saves the new refresh token before anybody is given the access token that came with it, or for 5 seconds at most. Then,
//!    or if saving fails, saving continues in the background, and the store stays locked until it succeeds.
//!
//! A process that is killed between the answer of the endpoint and the saving loses the login, and a process that ends in
//! the middle of an exchange may. No client can prevent that.
//!
//! # When a refresh token is sent again
//!
//! | The exchange ended with | The refresh token | Next |
//! |---|---|---|
//! | a new refresh token | is spent | It is never sent again by this source. |
//! | a token without a new refresh token ([RFC 6749 section 6](https://www.rfc-editor.org/rfc/rfc6749#section-6)) | is still valid | It is sent for each refresh. |
//! | `invalid_grant`, or another code that blames [the grant](#errors) | was spent elsewhere, has expired or was revoked | The store is read again. A different token in it is sent at once. Otherwise the failure is permanent until the store's [version](RefreshTokenStore::version) changes, or the next attempt five minutes later. |
//! | another 4xx, an error in a 200, a redirect or 503 | is unspent | It is sent again after the back-off. |
//! | no connection, or a refusal to send | was not sent | Likewise. |
//! | a reset, a timeout, a 2xx without a token, another 5xx | **may be spent** | The failure is an [`UnansweredExchange`], and raises a `WARN` event. After the back-off the store is read, and if it holds no other token, this one is sent again. |
//!
//! A token that may be spent is sent again until the endpoint answers, because that loses the fewest logins. If the first
//! exchange never reached the endpoint, the token is valid. If it did, its answer with the new refresh token is lost, and
//! nobody can continue the login without the endpoint's help. An endpoint with a grace period accepts the token
//! a second time, the sooner the better. A strict endpoint revokes the tokens of a login that was lost already; `invalid_grant` then says so
//! ([`UnansweredExchange::is_rejected`]). To fail at once would lose the login in the first and the second case too.

mod auth;
mod client;
mod endpoint;
mod exchange;
#[cfg(any(unix, windows))]
mod file_store;
mod login;
mod response;
mod rotation;
mod source;
mod store;
mod subject_tokens;
mod token_type;
mod unanswered;

pub(crate) use self::client::TokenClient;
#[cfg(feature = "verify")]
pub(crate) use self::endpoint::USER_AGENT;
#[cfg(any(unix, windows))]
pub use self::file_store::FileStore;
#[cfg(feature = "fleet")]
pub(crate) use self::unanswered::{is_rejected, may_be_spent};
pub use self::{
    auth::{Assertion, ClientAuth},
    endpoint::TokenEndpoint,
    response::OAuthError,
    source::OAuthSource,
    store::{MemoryStore, RefreshToken, RefreshTokenStore, StoreLock},
    subject_tokens::SubjectTokens,
    token_type::TokenType,
    unanswered::UnansweredExchange,
};
pub use crate::credential::ClientSecret;
