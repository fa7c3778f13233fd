//! [`RetryPolicy`]: which requests are sent again, and when.

use std::{
    error::Error as StdError,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http::{Extensions, HeaderMap, HeaderName, Method, Request, Response, StatusCode};
use tower::retry::{
    Policy,
    budget::{Budget, TpsBudget},
};

use super::{AsError, Failure};
use crate::{
    AuthError, RateLimit,
    replay::CloneBody,
    util::{
        clock::LONG,
        timer::{self, Timer},
    },
};

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// Retries requests with tower's `retry`. See the [module docs](super).
///
/// Clones share the budget. tower clones the policy for each request, whose attempts it counts.
#[doc(alias("backoff"))]
#[derive(Clone, Debug)]
pub struct RetryPolicy<C = CloneBody> {
    clone: C,
    budget: Arc<TpsBudget>,
    max_retries: u32,
    max_wait: Duration,
    min_backoff: Duration,
    max_backoff: Duration,
    repeats_all: bool,
    /// The retries of this request so far.
    retries: u32,
}

impl RetryPolicy {
    /// Creates the policy: up to 3 retries, told waits of up to 90 seconds, and otherwise a back-off from half a second to 8
    /// seconds, plus jitter.
    #[must_use]
    pub fn new() -> Self {
        Self {
            clone: CloneBody,
            budget: Arc::default(),
            max_retries: 3,
            max_wait: super::MAX_WAIT,
            min_backoff: Duration::from_millis(500),
            max_backoff: Duration::from_secs(8),
            repeats_all: false,
            retries: 0,
        }
    }
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self::new()
    }
}

impl<C> RetryPolicy<C> {
    /// Limits the retries of a request; it is sent once more than that. The default is 3.
    #[must_use]
    pub fn with_max_retries(mut self, retries: u32) -> Self {
        self.max_retries = retries;
        self
    }

    /// Limits the wait that a server may ask for, beyond which its response is returned at once. The default is 90 seconds:
    /// the API's window of a minute, and a margin.
    #[must_use]
    pub fn with_max_wait(mut self, wait: Duration) -> Self {
        self.max_wait = wait;
        self
    }

    /// Sets the wait before the first retry, which doubles with each, and its upper limit. Applies where the server tells no
    /// wait. As much again is added at random at most, also to a told wait. The default is 500 ms and 8 seconds.
    #[must_use]
    pub fn with_backoff(mut self, min: Duration, max: Duration) -> Self {
        (self.min_backoff, self.max_backoff) = (min, max);
        self
    }

    /// Sets the budget of retries, which all clones share. The default is tower's: over ten seconds, a hundred retries and
    /// another for every five requests that are not retried.
    #[must_use]
    pub fn with_budget(mut self, budget: TpsBudget) -> Self {
        self.budget = Arc::new(budget);
        self
    }

    /// Retries requests with any method where only idempotent ones are safe, so that the API may process one twice.
    ///
    /// A chat completion may then be charged twice, for example. For single requests, use [`MayProcessTwice`].
    #[must_use]
    pub fn allow_processing_twice(mut self) -> Self {
        self.repeats_all = true;
        self
    }

    /// Clones bodies with `clone`, for bodies that are not `Clone`. For reqwest's, that is `TryCloneBody`.
    #[must_use]
    pub fn with_clone<D>(self, clone: D) -> RetryPolicy<D> {
        let Self { budget, max_retries, max_wait, min_backoff, max_backoff, repeats_all, retries, .. } = self;
        RetryPolicy { clone, budget, max_retries, max_wait, min_backoff, max_backoff, repeats_all, retries }
    }

    /// Decides about the outcome of an attempt.
    pub(crate) fn decide(
        &mut self,
        request: (&Method, &HeaderMap, Option<&Extensions>),
        outcome: Result<(StatusCode, &HeaderMap), &(dyn StdError + 'static)>,
    ) -> Option<Wait> {
        let (method, headers, extensions) = request;
        let is_repeatable = self.repeats_all
            || method.is_idempotent()
            || headers.contains_key(IDEMPOTENCY_KEY)
            || extensions.is_some_and(|extensions| extensions.get::<MayProcessTwice>().is_some());
        let Verdict::Retry { told } = judge(outcome, is_repeatable) else {
            self.budget.deposit();
            return None;
        };
        let is_refused = self.retries >= self.max_retries
            || told.is_some_and(|told| told > self.max_wait)
            || !timer::has_timers();
        if is_refused || !self.budget.withdraw() {
            return None;
        }
        let factor = 2_u32.saturating_pow(self.retries);
        let backoff = self.min_backoff.saturating_mul(factor).min(self.max_backoff).min(LONG);
        self.retries += 1;
        let jitter = backoff.mul_f64(fastrand::f64());
        Some(Wait { timer: Timer::new(told.unwrap_or(backoff).saturating_add(jitter)) })
    }
}

/// Whether a request is sent again.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Final,
    /// It is, after the wait that the server told.
    Retry {
        told: Option<Duration>,
    },
}

fn judge(
    outcome: Result<(StatusCode, &HeaderMap), &(dyn StdError + 'static)>,
    is_repeatable: bool,
) -> Verdict {
    let (may_retry, told) = match outcome {
        // Refused before it was processed, so any request may be repeated.
        Ok((StatusCode::TOO_MANY_REQUESTS, headers)) => (true, RateLimit::retry_after(headers)),
        Ok((
            StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT,
            headers,
        )) => (is_repeatable, RateLimit::retry_after(headers)),
        Ok(_) => (false, None),
        Err(error) => match AuthError::find(error) {
            // A 401 or 403 is `RefreshLayer`'s business. Otherwise nothing was sent.
            Some(error) => (!error.is_auth() && !error.is_permanent(), error.retry_after()),
            None => (Failure::of(error).may_retry(is_repeatable), None),
        },
    };
    if may_retry { Verdict::Retry { told } } else { Verdict::Final }
}

impl<B, R, E, C> Policy<Request<B>, Response<R>, E> for RetryPolicy<C>
where
    C: CloneRequestBody<B>,
    E: AsError,
{
    type Future = Wait;

    fn retry(&mut self, request: &mut Request<B>, result: &mut Result<Response<R>, E>) -> Option<Wait> {
        let outcome = match result {
            Ok(response) => Ok((response.status(), response.headers())),
            Err(error) => Err(error.as_error()),
        };
        self.decide((request.method(), request.headers(), Some(request.extensions())), outcome)
    }

    fn clone_request(&mut self, request: &Request<B>) -> Option<Request<B>> {
        let mut clone = Request::new(self.clone.try_clone(request.body())?);
        *clone.method_mut() = request.method().clone();
        *clone.uri_mut() = request.uri().clone();
        *clone.version_mut() = request.version();
        clone.headers_mut().clone_from(request.headers());
        clone.extensions_mut().clone_from(request.extensions());
        Some(clone)
    }
}

/// How [`RetryPolicy`] clones a request's body.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot clone the body `{B}` for a retry",
    label = "this policy cannot send such a request again",
    note = "for reqwest's body, use `RetryPolicy::new().with_clone(TryCloneBody)`",
    note = "collect any other body that is not `Clone` first, for example into `http_body_util::Full<Bytes>`"
)]
pub trait CloneRequestBody<B> {
    /// Returns a copy, or `None` if this body can be sent only once.
    fn try_clone(&self, body: &B) -> Option<B>;
}

#[diagnostic::do_not_recommend]
impl<B: Clone> CloneRequestBody<B> for CloneBody {
    fn try_clone(&self, body: &B) -> Option<B> {
        Some(body.clone())
    }
}

/// Marks a request, in its extensions, that the API may process twice: [`RetryPolicy`] retries it like an idempotent one.
///
/// The header `Idempotency-Key` has the same effect, without being added or changed.
///
/// ```
/// use http::Request;
/// use tower_selam::retry::MayProcessTwice;
///
/// let chat = Request::post("https://api.selamgpt.com/v1/chat/completions").extension(MayProcessTwice).body("{}")?;
/// assert!(chat.extensions().get::<MayProcessTwice>().is_some());
/// # Ok::<(), http::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MayProcessTwice;

/// The wait before a retry.
pub struct Wait {
    timer: Timer,
}

impl Future for Wait {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        // A runtime that has shut down keeps no time.
        self.timer.poll(cx).unwrap_or(Poll::Ready(()))
    }
}

opaque_debug!(Wait);
