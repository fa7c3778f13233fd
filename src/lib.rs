//! Tower layers that authenticate an HTTP client to SelamAPI: API keys, JWTs, an origin check, typed errors.
//!
//! # A request's way
//!
//! ```text
//!            AuthErrorLayer           RefreshLayer             ApiKeyLayer, JwtLayer
//! request ─▶ 401 and 403 become a  ─▶ 401: renew, and send  ─▶ write Authorization and   ─▶ your client
//!            typed error              once more                X-API-Key, for allowed
//!                                          │                   https origins only
//!                                          └──▶ Refreshing ◀──┘
//!                                                  ▲ source: file, OAuth 2.0, signed here,
//!                                                    closure, service
//! ```
//!
//! [`SelamLayer`] is that stack, ready-made, from the environment or a builder, over any client:
//!
//! ```
//! use http::{Request, StatusCode};
//! use tower::{Layer, ServiceExt};
//! use tower_selam::{ApiKey, AuthErrorKind, SelamLayer, simulator::Simulator};
//!
//! # tokio_test::block_on(async {
//! let client = Simulator::new(); // or hyper-util, or anything that is a Tower service
//! let layer = SelamLayer::builder().with_api_key(ApiKey::new(client.issue_key())?).build()?;
//! let selam = layer.layer(client);
//!
//! let chat = layer.base_url().endpoint("chat/completions")?;
//! let question = r#"{"messages":[{"role":"user","content":"Selam!"}]}"#.to_owned();
//! let response = selam.clone().oneshot(Request::post(chat).body(question.clone())?).await?;
//! assert_eq!(response.status(), StatusCode::OK);
//!
//! let plain = Request::post("http://api.selamgpt.com/v1/chat/completions").body(question)?;
//! let error = selam.oneshot(plain).await.unwrap_err();
//! assert_eq!(error.auth().unwrap().kind(), AuthErrorKind::OriginNotAllowed);
//! # Ok::<(), tower_selam::BoxError>(())
//! # }).unwrap();
//! ```
//!
//! # What is here
//!
//! | | |
//! |---|---|
//! | [`SelamLayer`], [`Selam`] | the stack, in annotate mode too; see [`selam`] |
//! | [`ApiKeyLayer`], [`JwtLayer`] | write credentials; see [`authorize`] |
//! | [`Refreshing`], [`RefreshPolicy`], [`Provider`] | credentials that renew themselves; see [how renewal works](engine) |
//! | [`PerSubject`], [`Subject`], [`JwtProvider`] | a JWT for each user, and the name of one |
//! | [`mod@source`] | where they come from |
//! | [`oauth`] | from an OAuth 2.0 token endpoint |
//! | [`RefreshLayer`] | renews after a 401 and sends once more; see [`refresh`] |
//! | [`AuthErrorLayer`], [`AnnotateAuthErrorLayer`] | read 401 and 403; see [`auth_error`] |
//! | [`ChooseAuthLayer`] | chooses credentials by what a request is; see [`choose_auth`] |
//! | [`inbound`] | for proxies: takes off what their callers sent |
//! | [`ApiKey`], [`Token`], [`Credential`], [`KeyId`] | secrets, what they have in common, and the name of one in logs |
//! | [`Credentials`], [`RequestAuth`] | what is written, and a request's own choice of it |
//! | [`Origins`], [`BaseUrl`] | where credentials may go, and where the API is |
//! | [`AuthError`], [`AuthErrorKind`], [`Error`] | why a request was not authenticated |
//! | [`ErrorBody`], [`RateLimit`] | readers of what the API says |
//! | [`ConfigError`], [`ConfigErrorKind`] | why a key, token, URL or origin was refused |
//! | `adapter` | the layers and clients that have types of their own: reqwest, reqwest-middleware, tonic |
//! | [`bounds`] | what the layers ask of a client |
//! | [`composition`] | where other Tower layers go |
//! | [`telemetry`] | what can be watched, and by which names |
//! | [`mod@env`] | the names of the environment variables |
//! | `simulator`, `TestClock` | SelamAPI for tests, and their time |
//!
//! # Features
//!
//! None is on by default, and each only adds.
//!
//! - `tonic`: `adapter::tonic::SelamGrpcLayer`, for gRPC.
//! - `tracing`: events of renewals, refusals and replays, through the `tracing` crate; see [`telemetry`].
//! - `metrics`: the same counted, and the id of the key in use, through the `metrics` crate.
//! - `sign`: `source::JwtSigner`, which signs JWTs itself.
//! - `reqwest`: `adapter::reqwest`, the layers over a `reqwest::Client`, with its requests and responses.
//! - `reqwest-middleware`: `adapter::reqwest_middleware`, the layers as a middleware of that crate.
//! - `test-util`: `simulator::Simulator`, SelamAPI in process.
//! - `test-server`: `simulator::Server`, the same on a loopback port over http or TLS, HTTP/1.1 and HTTP/2.

#![cfg_attr(docsrs, feature(doc_cfg))]

#[macro_use]
mod util;

#[cfg(any(feature = "reqwest", feature = "tonic"))]
pub mod adapter;
pub mod auth_error;
pub mod authorize;
pub mod choose_auth;
mod credential;
mod error;
pub mod guide;
pub mod inbound;
pub mod oauth;
mod origin;
pub mod refresh;
pub mod replay;
#[cfg(feature = "test-util")]
pub mod simulator;
pub mod source;
pub mod stack;
pub mod telemetry;

#[cfg(feature = "test-util")]
pub use self::util::clock::TestClock;
pub use self::{
    auth_error::AuthErrorLayer,
    authorize::{ApiKeyLayer, JwtLayer},
    choose_auth::ChooseAuthLayer,
    credential::{ApiKey, Credential, Credentials, KeyId, RequestAuth, Subject, Token, env},
    error::{
        AuthError, AuthErrorKind, BoxError, CloneClient, ConfigError, ConfigErrorKind, Error, ErrorBody,
        FromAuthError, RateLimit,
    },
    origin::{BaseUrl, Origins},
    refresh::{JwtProvider, PerSubject, Provider, RefreshPolicy, Refreshing},
    replay::RefreshLayer,
    stack::{Selam, SelamLayer, SelamLayerBuilder},
};

/// The README's example compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
