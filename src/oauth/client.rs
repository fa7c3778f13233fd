use std::{
    fmt,
    future::poll_fn,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body::Body;
use tower_service::Service;
use zeroize::Zeroizing;

use crate::{
    BoxError,
    auth_error::{Bounds, Collect, End},
};

/// No answer of a token endpoint is larger, and none takes longer once its head is there.
const BOUNDS: Bounds = Bounds::new(64 * 1024, Duration::from_secs(30));

/// An HTTP client whose type is forgotten. Renewals are rare, so a box for each does not matter.
#[derive(Clone)]
pub(crate) struct TokenClient(Arc<SendFn>);

type SendFn = dyn Fn(Request<Bytes>) -> Sending + Send + Sync;
type Sending = Pin<Box<dyn Future<Output = Result<Answer, BoxError>> + Send>>;

/// A response, read whole.
pub(super) struct Answer {
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

    pub(super) async fn send(&self, request: Request<Bytes>) -> Result<Answer, BoxError> {
        (self.0)(request).await
    }
}

async fn send<S, B, R>(mut client: S, request: Request<Bytes>) -> Result<Answer, BoxError>
where
    S: Service<Request<B>, Response = Response<R>, Error: Into<BoxError>>,
    B: From<Bytes>,
    R: Body<Error: Into<BoxError>>,
{
    poll_fn(|cx| client.poll_ready(cx)).await.map_err(Into::into)?;
    let response = client.call(request.map(B::from)).await.map_err(Into::into)?;
    let mut collect = Collect::new(response, BOUNDS);
    match poll_fn(|cx| collect.poll(cx)).await {
        End::Complete { .. } => {}
        End::Failed(error) => return Err(error.into()),
        End::OutOfBounds => return Err("the token endpoint's answer is too long, or takes too long".into()),
    }
    let body = Zeroizing::new(collect.body());
    Ok(Answer { status: collect.parts.status, headers: collect.parts.headers, body })
}
