//! What the tests share: the program, callers, APIs for it to talk to, and the search for secrets.

mod api;
mod caller;
mod program;
mod scan;
mod scratch;

use std::time::Duration;

use bytes::Bytes;
use http_body::Frame;
use http_body_util::{BodyExt, Empty, Full, combinators::UnsyncBoxBody};
use tokio::{sync::mpsc, time};
use tower_selam::BoxError;

pub(crate) use self::{
    api::{Api, Exchange, Exchanges, Protocol, SYSTEM, Stream, TRUSTED, Tls, read_head},
    caller::{Answer, Caller, ended, frame, raw, read, read_to_end, response_head},
    program::{Launch, Proxy, unguessable},
    scan::{assert_clean, secret},
    scratch::Scratch,
};

/// No wait is longer. What takes so long has failed: it is generous for busy machines.
const LIMIT: Duration = Duration::from_secs(60);

pub(crate) type Body = UnsyncBoxBody<Bytes, BoxError>;

/// Waits for what comes soon.
#[track_caller]
pub(crate) fn soon<F: Future>(future: F) -> impl Future<Output = F::Output> {
    let place = std::panic::Location::caller();
    async move {
        match time::timeout(LIMIT, future).await {
            Ok(output) => output,
            Err(_) => panic!("waited in vain at {place}"),
        }
    }
}

/// Looks again and again until there is what the test waits for, where nothing tells when it has come.
pub(crate) async fn eventually<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let seen = time::timeout(LIMIT, async {
        let mut ticks = time::interval(Duration::from_millis(10));
        ticks.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if let Some(seen) = look().await {
                return seen;
            }
        }
    });
    match seen.await {
        Ok(seen) => seen,
        Err(_) => panic!("waited in vain until {what}"),
    }
}

pub(crate) fn empty() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

pub(crate) fn whole(body: impl Into<Bytes>) -> Body {
    Full::new(body.into()).map_err(|never| match never {}).boxed_unsync()
}

/// A body that is said bit by bit.
pub(crate) fn fed() -> (Feed, Body) {
    let (sender, receiver) = mpsc::channel(1);
    (Feed(sender), Fed(receiver).boxed_unsync())
}

#[derive(Debug)]
pub(crate) struct Feed(mpsc::Sender<Result<Frame<Bytes>, BoxError>>);

impl Feed {
    pub(crate) async fn data(&self, data: impl Into<Bytes>) {
        soon(self.0.send(Ok(Frame::data(data.into())))).await.expect("somebody reads the body");
    }

    /// Whether anybody reads on.
    pub(crate) async fn offer(&self, data: impl Into<Bytes>) -> bool {
        soon(self.0.send(Ok(Frame::data(data.into())))).await.is_ok()
    }

    pub(crate) async fn trailers(self, name: &'static str, value: &'static str) {
        self.all_trailers([(name, value)]).await;
    }

    pub(crate) async fn all_trailers(self, trailers: impl IntoIterator<Item = (&'static str, &'static str)>) {
        let parsed = |(name, value): (&str, &str)| (name.parse().unwrap(), value.parse().unwrap());
        let trailers = trailers.into_iter().map(parsed).collect();
        soon(self.0.send(Ok(Frame::trailers(trailers)))).await.expect("somebody reads the trailers");
    }

    /// The body does not come to its end.
    pub(crate) async fn break_off(self) {
        let _ = soon(self.0.send(Err("broken off".into()))).await;
    }

    /// Nobody reads the body any more.
    pub(crate) async fn closed(&self) {
        soon(self.0.closed()).await;
    }
}

struct Fed(mpsc::Receiver<Result<Frame<Bytes>, BoxError>>);

impl http_body::Body for Fed {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        self.0.poll_recv(cx)
    }
}
