//! [`TokenClient`]: the HTTP client of a token endpoint, and the bounded reader of its responses.

use std::{
    future::poll_fn,
    pin::{Pin, pin},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::{Buf, BufMut, Bytes};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body::{Body, Frame};
use tokio::task::consume_budget;
use tower::{Service, ServiceExt};
use zeroize::Zeroizing;

use crate::{error::BoxError, telemetry::span::Span, util::timer::timeout};

const MAX_BODY_SIZE: usize = 64 * 1024;

/// Counts from the arrival of the response head.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

const OUT_OF_BOUNDS: &str = "the response is too long, or takes too long";

/// A type-erased HTTP client. Refreshes are rare, so one box per request does not matter.
#[derive(Clone)]
pub(crate) struct TokenClient(Arc<SendFn>);

type SendFn = dyn Fn(Request<Bytes>, Span) -> Sending + Send + Sync;
type Sending = Pin<Box<dyn Future<Output = Result<TokenResponse, BoxError>> + Send>>;

/// A response whose body was read completely.
pub(crate) struct TokenResponse {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Zeroizing<Vec<u8>>,
}

opaque_debug!(TokenClient);

impl TokenClient {
    pub(crate) fn new<S, B, R>(client: S) -> Self
    where
        S: Service<Request<B>, Response = Response<R>, Error: Into<BoxError>, Future: Send>,
        S: Clone + Send + 'static,
        B: From<Bytes> + Send + 'static,
        R: Body<Error: Into<BoxError>> + Send + 'static,
    {
        let client = Mutex::new(client);
        Self(Arc::new(move |request: Request<Bytes>, span| {
            let client = client.lock().unwrap_or_else(PoisonError::into_inner).clone();
            Box::pin(async move {
                let response = client.oneshot(request.map(B::from)).await.map_err(Into::into)?;
                let (head, body) = response.into_parts();
                span.responded(head.status);
                let body = timeout(BODY_TIMEOUT, read(body)).await.map_err(|_| OUT_OF_BOUNDS)??;
                Ok(TokenResponse { status: head.status, headers: head.headers, body })
            })
        }))
    }

    /// Sends a request, in a span. `resends` counts the sends before it, if there were any.
    pub(crate) async fn send(
        &self,
        request: Request<Bytes>,
        resends: Option<u64>,
    ) -> Result<TokenResponse, BoxError> {
        let span = Span::http_request(request.method(), request.uri(), resends);
        let sending = (self.0)(request, span.clone());
        let result = span.clone().instrument(sending).await;
        if result.is_err() {
            span.failed();
        }
        result
    }
}

async fn read<B>(body: B) -> Result<Zeroizing<Vec<u8>>, BoxError>
where
    B: Body<Error: Into<BoxError>>,
{
    let mut body = pin!(body);
    // Sized up front: a buffer that grows leaves unwiped copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_BODY_SIZE));
    while poll_fn(|cx| body.as_mut().poll_frame(cx).map(|frame| append(frame, &mut bytes))).await? {
        // A body may be ready forever without sending a byte.
        consume_budget().await;
    }
    Ok(bytes)
}

/// Appends the data of a frame, and returns whether more may follow. No await point holds the frame, so that neither its
/// data nor its error has to be `Send`.
fn append<D: Buf, E: Into<BoxError>>(
    frame: Option<Result<Frame<D>, E>>,
    bytes: &mut Vec<u8>,
) -> Result<bool, BoxError> {
    let Some(frame) = frame.transpose().map_err(Into::into)? else { return Ok(false) };
    // Trailers end the body.
    let Ok(data) = frame.into_data() else { return Ok(false) };
    if data.remaining() > MAX_BODY_SIZE - bytes.len() {
        return Err(OUT_OF_BOUNDS.into());
    }
    bytes.put(data);
    Ok(true)
}
