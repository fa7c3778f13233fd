//! Shared by all tests: the program, callers, APIs, and the search for secrets.

mod api;
mod caller;
pub(crate) mod frames;
pub(crate) mod npm;
mod program;
pub(crate) mod python;
mod scan;
mod scratch;

use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use http_body::Frame;
use http_body_util::{BodyExt, Empty, Full, combinators::UnsyncBoxBody};
use tokio::{sync::mpsc, time};
use tower_selam::BoxError;

pub(crate) use self::{
    api::{Api, Exchange, Exchanges, Protocol, REMOTE_HOST, SYSTEM, TRUSTED, Tls, TlsListener, read_head},
    caller::{Answer, Caller, assert_ended, frame, raw, read, read_to_end, response_head, upgraded},
    program::{Launch, Proxy, example, random},
    scan::{assert_clean, secret},
    scratch::Scratch,
};

/// The longest wait before a test fails. Generous, for busy machines.
const TIMEOUT: Duration = Duration::from_secs(300);

pub(crate) type Body = UnsyncBoxBody<Bytes, BoxError>;

/// Awaits a future, and panics with the caller's location if it takes too long.
#[track_caller]
pub(crate) fn with_timeout<F: Future>(future: F) -> impl Future<Output = F::Output> {
    let place = std::panic::Location::caller();
    async move {
        match time::timeout(TIMEOUT, future).await {
            Ok(output) => output,
            Err(_) => panic!("timed out at {place}"),
        }
    }
}

/// Polls a condition until it holds, where no event announces it.
pub(crate) async fn eventually<T>(what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let polled = time::timeout(TIMEOUT, async {
        let mut ticks = time::interval(Duration::from_millis(10));
        ticks.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if let Some(value) = condition().await {
                return value;
            }
        }
    });
    match polled.await {
        Ok(value) => value,
        Err(_) => panic!("timed out waiting until {what}"),
    }
}

pub(crate) fn empty() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

pub(crate) fn full(body: impl Into<Bytes>) -> Body {
    Full::new(body.into()).map_err(|never| match never {}).boxed_unsync()
}

/// A body whose frames the test sends one by one.
pub(crate) fn channel_body() -> (Feed, Body) {
    let (sender, receiver) = mpsc::channel(1);
    (Feed(sender), ChannelBody(receiver).boxed_unsync())
}

#[derive(Debug)]
pub(crate) struct Feed(mpsc::Sender<Result<Frame<Bytes>, BoxError>>);

impl Feed {
    pub(crate) async fn data(&self, data: impl Into<Bytes>) {
        with_timeout(self.0.send(Ok(Frame::data(data.into())))).await.expect("the body is being read");
    }

    /// Sends data; returns whether the body is still being read.
    pub(crate) async fn try_data(&self, data: impl Into<Bytes>) -> bool {
        with_timeout(self.0.send(Ok(Frame::data(data.into())))).await.is_ok()
    }

    pub(crate) async fn trailers(self, name: &'static str, value: &'static str) {
        self.all_trailers([(name, value)]).await;
    }

    pub(crate) async fn all_trailers(self, trailers: impl IntoIterator<Item = (&'static str, &'static str)>) {
        let parsed = |(name, value): (&str, &str)| (name.parse().unwrap(), value.parse().unwrap());
        self.trailer_map(trailers.into_iter().map(parsed).collect()).await;
    }

    pub(crate) async fn trailer_map(self, trailers: HeaderMap) {
        with_timeout(self.0.send(Ok(Frame::trailers(trailers)))).await.expect("the trailers are being read");
    }

    /// Ends the body with an error.
    pub(crate) async fn fail(self) {
        let _ = with_timeout(self.0.send(Err("broken off".into()))).await;
    }

    /// Waits until the body is dropped.
    pub(crate) async fn closed(&self) {
        with_timeout(self.0.closed()).await;
    }
}

struct ChannelBody(mpsc::Receiver<Result<Frame<Bytes>, BoxError>>);

impl http_body::Body for ChannelBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        self.0.poll_recv(cx)
    }
}
