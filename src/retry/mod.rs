//! Retries requests and waits for rate limits, after authentication has done its part: feature `retry`.
//!
//! [`RetryPolicy`] is a policy for tower's `retry`. [`ThrottleLayer`] lets requests wait while the account's rate limit is used
//! up, so that few are refused in the first place. Both stand outside [`SelamLayer`](crate::SelamLayer), which then chooses
//! the credential after the wait:
//!
//! ```
//! use http::{Request, StatusCode};
//! use tower::{ServiceBuilder, ServiceExt};
//! use tower_selam::{
//!     ApiKey, SelamLayer,
//!     retry::{RetryPolicy, ThrottleLayer},
//!     simulator::{Fault, Simulator},
//! };
//! # use std::time::Duration;
//!
//! # tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap().block_on(async {
//! let client = Simulator::new(); // or hyper-util, or any other Tower service
//! let layer = SelamLayer::builder().with_api_key(ApiKey::new(client.issue_key())?).build()?;
//! let chat = layer.base_url().endpoint("chat/completions")?;
//! let service = ServiceBuilder::new()
//!     .retry(RetryPolicy::new())
//!     .layer(ThrottleLayer::new())
//!     .layer(layer)
//!     .service(client.clone());
//!
//! client.inject(Fault::RateLimited { retry_after: Duration::from_secs(20) });
//! let question = r#"{"messages":[{"role":"user","content":"Selam!"}]}"#.to_owned();
//! let began = tokio::time::Instant::now();
//! let response = service.oneshot(Request::post(chat).body(question)?).await?;
//! assert_eq!(response.status(), StatusCode::OK);
//! assert_eq!(client.requests(), 2);
//! assert!(began.elapsed() >= Duration::from_secs(20), "it waited as told");
//! # Ok::<(), tower_selam::BoxError>(())
//! # }).unwrap();
//! ```
//!
//! # What is retried
//!
//! | Outcome | Retried |
//! |---|---|
//! | 429: not processed | always |
//! | 502, 503, 504; a connection that broke off: perhaps processed | if it does no harm twice |
//! | no connection; a request that was not written; `REFUSED_STREAM`, or a `GOAWAY` that excludes it | always |
//! | a temporary [`AuthError`](crate::AuthError): a refresh failed, and nothing was sent | always |
//! | 401, 403, a permanent `AuthError` | never: [`RefreshLayer`](crate::RefreshLayer) has replayed what can be |
//! | any other response or error, time limits included | never |
//!
//! A request does no harm twice if its method is idempotent
//! ([RFC 9110 section 9.2.2](https://www.rfc-editor.org/rfc/rfc9110#section-9.2.2)), if it has an `Idempotency-Key`, or if you
//! say so: for one request by [`MayProcessTwice`], for all by [`RetryPolicy::allow_processing_twice`]. Chat completions are
//! POSTs, so without that they are retried only where nothing was processed. [`Failure`] has the rules for errors.
//!
//! # How long it waits
//!
//! As long as the server says, as [`RateLimit::retry_after`](crate::RateLimit::retry_after) reads it, or until a source may be
//! asked again ([`AuthError::retry_after`](crate::AuthError::retry_after)); jitter is added, and nothing subtracted. If the
//! server says more than [`with_max_wait`](RetryPolicy::with_max_wait), its response is returned instead. If it says nothing,
//! the wait doubles with each retry. The result is also returned after the last of the retries, where no timers of tokio run,
//! and once the budget is spent: then too many requests fail for retries to help.
//!
//! Use one policy. The retries of two policies multiply: with one outside of `SelamLayer` and one inside, a request is sent up
//! to 16 times.
//!
//! # Throttling
//!
//! A policy alone lets each of many requests find out by its own 429 that the limit is used up. [`ThrottleLayer`] remembers
//! what responses said: how many requests remain in the account's window, and when it ends. Requests in flight count as not
//! yet included in that number. If none remain, requests wait in the order of their calls, and go when the window ends.
//! Dropping one gives its place away.
//!
//! - Until the first response tells the limit, ten requests are in flight at most; so too at the beginning of a window that
//!   requests have waited for. Where responses tell no limit, nothing is delayed.
//! - A request waits for at most [`with_max_wait`](ThrottleLayer::with_max_wait), even if a header or clock is wrong. Then it is
//!   sent, and the API decides; the 429 is the policy's business. If more requests wait than the windows of that time allow,
//!   raise it, or refuse requests outside.
//! - Other programs on the account, and other layers, are seen through what responses say to remain, so a few requests are
//!   refused when several use up the last of a window together. Keep the policy outside. In this crate's tests, twenty clients
//!   that share a limit of 60 make 200 calls with 200 to 210 requests through one layer, and with 217 to 221 through two.
//! - Poll the future of a waiting request, or drop it. One whose turn has come and that nobody polls, as in a
//!   `buffer_unordered` whose consumer is busy, holds up those behind it until they have waited for the longest time.
//! - A waiting request holds no permit of an inner service. It does hold those of outer layers, such as a `timeout`, which
//!   must allow for the wait.
//!
//! # Bodies
//!
//! tower's `retry` keeps a clone of each request, so its body has to be `Clone`, as `String`, `Bytes` and
//! `http_body_util::Full<Bytes>` are. Collect a streaming body before, with `http_body_util::BodyExt::collect` and a limit
//! (`http_body_util::Limited`), or send it without the policy: the throttle takes any body. For reqwest's body, use
//! `RetryPolicy::new().with_clone(TryCloneBody)`; a request whose body is a stream is then sent once.
//!
//! The compiler reports a body that is not `Clone`, and an error that is not [`AsError`], as "the method `oneshot` exists for
//! struct `Retry<RetryPolicy, …>`, but its trait bounds were not satisfied". It names the cause, and what to do, if a function
//! asks for the bound: `fn check<S: tower::Service<http::Request<Body>>>(_: &S) {}`, called with the service.

mod failure;
mod policy;
mod throttle;
mod window;

use std::time::Duration;

#[cfg(feature = "reqwest")]
pub(crate) use self::failure::impl_as_error;
pub use self::{
    failure::{AsError, Failure},
    policy::{CloneRequestBody, MayProcessTwice, RetryPolicy, Wait},
    throttle::{ResponseFuture, Throttle, ThrottleLayer},
};

/// The longest wait by default: the API's window, and a margin for clocks that differ.
const MAX_WAIT: Duration = Duration::from_secs(90);
