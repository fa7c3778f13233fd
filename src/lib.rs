//! Tower layers that authenticate HTTP clients to SelamAPI: API keys, JWTs, an origin check and typed errors.
//!
//! [`SelamLayer`] is the complete stack. It takes its settings from the environment or a builder, and fits any client
//! that is a Tower service:
//!
//! ```
//! use http::{Request, StatusCode};
//! use tower::{Layer, ServiceExt};
//! use tower_selam::{ApiKey, AuthErrorKind, SelamLayer, simulator::Simulator};
//!
//! # tokio_test::block_on(async {
//! let client = Simulator::new(); // or hyper-util, or any other Tower service
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
//! It composes the other layers, which also work alone:
//!
//! ```text
//!            AuthErrorLayer         RefreshLayer              ApiKeyLayer, JwtLayer
//! request ─▶ turns 401 and 403  ─▶  after a 401: refreshes ─▶ write Authorization and ─▶ your client
//!            into typed errors      and replays once          X-API-Key, for allowed
//!                                         │                   https origins only
//!                                         │                        │
//!                                         └────▶ Refreshing ◀──────┘
//!                                                asks a source for the next key or token
//! ```
//!
//! [`guide::layers`] explains their order, and [`guide::composition`] where the layers of Tower and tower-http go.
//!
//! # Contents
//!
//! | To | Use |
//! |---|---|
//! | do everything at once | [`SelamLayer`], built by [`SelamLayerBuilder`]; its service is [`Selam`] ([`stack`]) |
//! | write credentials into requests | [`ApiKeyLayer`], [`JwtLayer`] ([`authorize`]); without Tower, [`SelamLayer::authorize`] and [`Authorized`] |
//! | override the credentials of one request | [`RequestAuth`], [`Credentials`], and [`Subject`] for one of many users |
//! | override them by path or method | [`ChooseAuthLayer`] ([`choose_auth`]) |
//! | name the user of a client that hides its requests | [`Selam::for_subject`], [`WithExtensionLayer`] ([`mod@with_extension`]) |
//! | name the origins that may receive credentials | [`Origins`], [`BaseUrl`] |
//! | refresh a JWT, or re-read a rotated key | [`Refreshing`], [`RefreshPolicy`] ([`refresh`], [`guide::refreshing`]) |
//! | keep a JWT for each subject | [`PerSubject`]; [`Provider`] and [`JwtProvider`] are what the layers accept |
//! | fetch credentials from files, variables, closures, services, or sign them | [`mod@source`] |
//! | fetch tokens from an OAuth 2.0 token endpoint | [`oauth`] |
//! | share tokens among the replicas of a service | `fleet` |
//! | replay a request after a 401 | [`RefreshLayer`] ([`replay`]) |
//! | retry other failures, wait for the rate limit | `retry` |
//! | read 401 and 403 as typed errors | [`AuthErrorLayer`] ([`auth_error`]) |
//! | handle those errors | [`AuthError`], [`AuthErrorKind`], [`Error`]; [`ErrorBody`] and [`RateLimit`] read any response |
//! | handle invalid settings | [`ConfigError`], [`ConfigErrorKind`] |
//! | hold secrets | [`ApiKey`], [`Token`], their trait [`Credential`], and [`KeyId`], which names one in logs |
//! | read settings from the environment | [`mod@env`] |
//! | forward requests in a proxy | [`inbound`] removes what neither side may tell the other, and compares paths |
//! | know who calls, by the JWT of an app's own login | `verify` |
//! | use reqwest, reqwest-middleware or tonic | `adapter` |
//! | watch events, spans and metrics | [`telemetry`], [`guide::telemetry`] |
//! | test without a server | `simulator`, `TestClock` |
//!
//! # Features
//!
//! All features are additive and off by default.
//!
//! | Feature | Adds |
//! |---|---|
//! | `reqwest` | `adapter::reqwest`: the layers over a `reqwest::Client`, with reqwest's requests and responses |
//! | `reqwest-middleware` | `adapter::reqwest_middleware`: the layers as a middleware of that crate |
//! | `tonic` | `adapter::tonic`: the stack over tonic's `Channel`, for gRPC |
//! | `retry` | `retry::RetryPolicy`, for tower's `retry`, and `retry::ThrottleLayer`, which waits for the rate limit |
//! | `tracing` | events for refreshes, rejections and replays, and OpenTelemetry's spans, through the `tracing` crate |
//! | `decompression` | reads compressed error bodies: gzip, deflate and Brotli. Without it, a compressed body tells neither its code nor which credential a 401 blames |
//! | `metrics` | counters for the same, and the id of the key in use, through the `metrics` crate |
//! | `verify` | `verify::JwtVerifier`, which verifies the JWTs that callers of a server present |
//! | `fleet` | `fleet::Fleet`: the replicas of a service share their tokens, in memory, in files, or in a store of your own |
//! | `fleet-redis` | `fleet::RedisStore`, in Redis or Valkey |
//! | `sign` | `source::JwtSigner`, which signs JWTs in the program |
//! | `test-util` | `simulator::Simulator`: SelamAPI in process |
//! | `test-server` | `simulator::Server`: the simulator on a loopback port, over http or TLS, HTTP/1.1 and HTTP/2 |

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
#[cfg(feature = "fleet")]
pub mod fleet;
pub mod guide;
pub mod inbound;
pub mod oauth;
mod origin;
pub mod refresh;
pub mod replay;
#[cfg(feature = "retry")]
pub mod retry;
#[cfg(feature = "test-util")]
pub mod simulator;
pub mod source;
pub mod stack;
pub mod telemetry;
#[cfg(feature = "verify")]
pub mod verify;
pub mod with_extension;

#[cfg(feature = "test-util")]
pub use self::util::clock::TestClock;
pub use self::{
    auth_error::AuthErrorLayer,
    authorize::{ApiKeyLayer, JwtLayer},
    choose_auth::ChooseAuthLayer,
    credential::{ApiKey, Credential, Credentials, KeyId, RequestAuth, Subject, Token, env},
    error::{
        AuthError, AuthErrorKind, BoxError, CloneClient, ConfigError, ConfigErrorKind, Error, ErrorBody,
        FromAuthError, HttpClient, RateLimit,
    },
    origin::{BaseUrl, Origins},
    refresh::{JwtProvider, PerSubject, Provider, RefreshPolicy, Refreshing},
    replay::RefreshLayer,
    stack::{Authorized, Selam, SelamLayer, SelamLayerBuilder},
    with_extension::{WithExtension, WithExtensionLayer},
};

/// Runs the README's examples as doctests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
