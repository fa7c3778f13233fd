//! [`TokenClient`]: the HTTP client of a token endpoint, and the bounded reader of its responses.

use std::{
    fmt,
    future::poll_fn,
    pin::{Pin, pin},
    sync::{Arc, Mutex, PoisonError},
    task::Poll,
    time::Duration,
};

use bytes::{Buf, Bytes};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body::Body;
use tower_service::Service;
use zeroize::Zeroizing;

use crate::{error::BoxError, util::timer::Timer};

const MAX_BODY_SIZE: usize = 64 * 1024;

/// Counts from the arrival of the response head.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// How many frames are read before other tasks get a turn: a body may be ready forever without sending a byte.
const FRAMES_PER_POLL: usize = 128;

const OUT_OF_BOUNDS: &str = "the token endpoint's response is too long, or takes too long";

/// A type-erased HTTP client. Refreshes are rare, so one box per request does not matter.
#[derive(Clone)]
pub(crate) struct TokenClient(Arc<SendFn>);

type SendFn = dyn Fn(Request<Bytes>) -> Sending + Send + Sync;
type Sending = Pin<Box<dyn Future<Output = Result<TokenResponse, BoxError>> + Send>>;

/// A response whose body was read completely.
pub(super) struct TokenResponse {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Zeroizing<Vec<u8>>,
}

impl fmt::Debug for TokenClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenClient").finish_non_exhaustive()
    }
}

impl TokenClient {
    pub(crate) fn new<S, B, R>(client: S) -> Self
    where
        S: Service<Request<B>, Response = Response<R>, Error: Into<BoxError>, Future: Send>
            + Clone
            + Send
            + 'static,
        B: From<Bytes> + Send + 'static,
        R: Body<Data: Send, Error: Into<BoxError> + Send> + Send + 'static,
    {
        let client = Mutex::new(client);
        Self(Arc::new(move |request: Request<Bytes>| {
            let client = client.lock().unwrap_or_else(PoisonError::into_inner).clone();
            Box::pin(send(client, request))
        }))
    }

    pub(super) async fn send(&self, request: Request<Bytes>) -> Result<TokenResponse, BoxError> {
        (self.0)(request).await
    }
}

async fn send<S, B, R>(mut client: S, request: Request<Bytes>) -> Result<TokenResponse, BoxError>
where
    S: Service<Request<B>, Response = Response<R>, Error: Into<BoxError>>,
    B: From<Bytes>,
    R: Body<Error: Into<BoxError>>,
{
    poll_fn(|cx| client.poll_ready(cx)).await.map_err(Into::into)?;
    let response = client.call(request.map(B::from)).await.map_err(Into::into)?;
    let (head, body) = response.into_parts();
    Ok(TokenResponse { status: head.status, headers: head.headers, body: read(body).await? })
}

async fn read<B>(body: B) -> Result<Zeroizing<Vec<u8>>, BoxError>
where
    B: Body<Error: Into<BoxError>>,
{
    let mut body = pin!(body);
    let mut timer = Timer::new(BODY_TIMEOUT);
    // Sized up front: a buffer that grows leaves unwiped copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_BODY_SIZE));
    let complete = poll_fn(|cx| {
        for _ in 0..FRAMES_PER_POLL {
            let Poll::Ready(frame) = body.as_mut().poll_frame(cx) else {
                // Without a runtime that drives timers, only what is ready is read.
                return timer.poll(cx).unwrap_or(Poll::Ready(())).map(|()| Ok(false));
            };
            let Some(frame) = frame.transpose().map_err(Into::into)? else { return Poll::Ready(Ok(true)) };
            // Trailers end the body.
            let Ok(mut data) = frame.into_data() else { return Poll::Ready(Ok(true)) };
            if data.remaining() > MAX_BODY_SIZE - bytes.len() {
                return Poll::Ready(Ok(false));
            }
            while data.has_remaining() {
                let chunk = data.chunk();
                bytes.extend_from_slice(chunk);
                data.advance(chunk.len());
            }
        }
        cx.waker().wake_by_ref();
        timer.poll(cx).unwrap_or(Poll::Ready(())).map(|()| Ok(false))
    });
    match complete.await {
        Ok(true) => Ok(bytes),
        Ok(false) => Err(OUT_OF_BOUNDS.into()),
        Err(error) => Err(error),
    }
}
