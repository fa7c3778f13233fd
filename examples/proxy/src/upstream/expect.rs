//! `Expect: 100-continue`: holds back the body of a request until the API wants it.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{
    body::Bytes,
    http::{HeaderMap, Request, StatusCode, header::EXPECT},
};
use http_body::{Body, Frame, SizeHint};
use tokio::{sync::watch, time};
use tower_selam::BoxError;

/// How long a body waits for `100 Continue` ([RFC 9110 section 10.1.1](https://www.rfc-editor.org/rfc/rfc9110#section-10.1.1)).
const CONTINUE_TIMEOUT: Duration = Duration::from_secs(1);

pub fn expects_continue(headers: &HeaderMap) -> bool {
    headers.get(EXPECT).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

/// Holds back the body of a request with `Expect: 100-continue` until the API sends `100 Continue` over HTTP/1.1, or for one
/// second. hyper sends `100 Continue` to the caller when the body is first polled, so a caller whose request is refused does
/// not have to send the body.
///
/// Each attempt to send a request needs a hold of its own, below everything that may replay the request: a body that was not
/// wanted is given back, and can be sent with the next attempt.
pub(super) fn hold_body<B>(request: Request<B>) -> (Request<HeldBody<B>>, Option<AnswerSender>)
where
    B: Body + Send + 'static,
{
    if !expects_continue(request.headers()) || request.body().is_end_stream() {
        return (request.map(HeldBody::Sending), None);
    }
    let (sender, receiver) = watch::channel(Answer::None);
    let sender = AnswerSender(Arc::new(sender));
    let mut request = request
        .map(|body| HeldBody::Waiting { size: body.size_hint(), wanted: Box::pin(release(body, receiver)) });
    let on_continue = sender.clone();
    // hyper does not call this over HTTP/2, and drops it once the head is sent.
    hyper::ext::on_informational(&mut request, move |response| {
        if response.status() == StatusCode::CONTINUE {
            on_continue.send(Answer::Continue);
        }
    });
    (request, Some(sender))
}

/// The API's answer to the head of a request whose body is held back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    None,
    Continue,
    Final,
}

/// Passes the API's answer to a body that is held back. The body ends when all clones are dropped.
#[derive(Clone, Debug)]
pub(super) struct AnswerSender(Arc<watch::Sender<Answer>>);

impl AnswerSender {
    /// Reports that the API has sent the head of its response.
    pub(super) fn answered(&self) {
        self.send(Answer::Final);
    }

    /// Only the first answer counts.
    fn send(&self, answer: Answer) {
        self.0.send_if_modified(|current| {
            let first = *current == Answer::None;
            if first {
                *current = answer;
            }
            first
        });
    }
}

type Waiting<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// A request body that is held back until the API wants it.
pub(super) enum HeldBody<B> {
    Waiting {
        wanted: Waiting<Result<B, watch::Receiver<Answer>>>,
        size: SizeHint,
    },
    Sending(B),
    /// Pending until the response has been read, then an error: a body must not end early without one.
    Unwanted(Waiting<()>),
}

/// Waits for the API's answer. Returns the body, or drops it if it is not wanted.
async fn release<B>(body: B, mut receiver: watch::Receiver<Answer>) -> Result<B, watch::Receiver<Answer>> {
    let answer = time::timeout(CONTINUE_TIMEOUT, receiver.wait_for(|answer| *answer != Answer::None)).await;
    match answer.map(|answer| answer.map(|answer| *answer)) {
        // After the timeout: the API may not support `100 Continue`.
        Ok(Ok(Answer::Continue)) | Err(_) => Ok(body),
        Ok(_) => Err(receiver),
    }
}

impl<B> Body for HeldBody<B>
where
    B: Body<Data = Bytes, Error: Into<BoxError>> + Unpin,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        loop {
            match &mut *self {
                Self::Waiting { wanted, .. } => {
                    *self = match ready!(wanted.as_mut().poll(cx)) {
                        Ok(body) => Self::Sending(body),
                        // An error means that the response has been read, or was dropped.
                        Err(mut answers) => {
                            Self::Unwanted(Box::pin(async move { while answers.changed().await.is_ok() {} }))
                        }
                    };
                }
                Self::Sending(body) => {
                    return Pin::new(body)
                        .poll_frame(cx)
                        .map(|frame| frame.map(|frame| frame.map_err(Into::into)));
                }
                Self::Unwanted(response_read) => {
                    ready!(response_read.as_mut().poll(cx));
                    return Poll::Ready(Some(Err("the API answered without the body".into())));
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Sending(body) if body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Waiting { size, .. } => *size,
            Self::Sending(body) => body.size_hint(),
            Self::Unwanted(_) => SizeHint::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use http_body_util::{BodyExt, Full};
    use tower_selam::replay::{BufferBody, Replay};

    use super::*;

    /// J12: a body that was not wanted can be replayed, even if it is too long to be kept.
    #[tokio::test]
    async fn an_unwanted_body_is_given_back() {
        let keep = BufferBody::new(2);
        let (body, kept) = keep.capture(Full::new(Bytes::from_static(b"a long body")));
        let mut kept = kept.unwrap();
        let request = Request::post("/").header(EXPECT, "100-Continue").body(body).unwrap();
        let (request, answers) = hold_body(request);
        let (mut body, answers) = (request.into_body(), answers.unwrap());
        assert_eq!(body.size_hint().exact(), Some(11));
        answers.answered();
        let mut next = Box::pin(body.frame());
        assert!(poll_fn(|cx| Poll::Ready(next.as_mut().poll(cx))).await.is_pending());
        poll_fn(|cx| keep.poll_captured(&mut kept, cx)).await;
        let restored = keep.restore(kept).unwrap().collect().await.unwrap().to_bytes();
        assert_eq!(restored, "a long body");
        // The unfinished body is an error once the response has been read.
        drop(answers);
        assert!(next.await.unwrap().is_err());
    }

    #[tokio::test]
    async fn only_the_first_answer_counts() {
        for (continued, answered, expected) in [(true, true, true), (true, false, true), (false, true, false)]
        {
            let request =
                Request::post("/").header(EXPECT, "100-continue").body(Full::<Bytes>::from("x")).unwrap();
            let (request, answers) = hold_body(request);
            let (body, answers) = (request.into_body(), answers.unwrap());
            if continued {
                answers.send(Answer::Continue);
            }
            if answered {
                answers.answered();
            }
            drop(answers);
            assert_eq!(body.collect().await.is_ok(), expected);
        }
    }

    #[test]
    fn other_bodies_are_not_held() {
        for (expect, body) in [("", "x"), ("100-continue", ""), ("200-ok", "x")] {
            let request = Request::post("/").header(EXPECT, expect).body(Full::<Bytes>::from(body)).unwrap();
            assert!(hold_body(request).1.is_none(), "{expect}");
        }
    }
}
