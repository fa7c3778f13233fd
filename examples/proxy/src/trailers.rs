//! What comes behind a request's body: off it goes what the layers take off the headers in front. [`strip`] does that.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use axum::{
    body::{Body, Bytes},
    http::{
        HeaderMap, HeaderName,
        header::{CONNECTION, TE, TRANSFER_ENCODING, UPGRADE},
    },
};
use http_body::{Body as _, Frame, SizeHint};
use tower_selam::inbound::StripCredentialsLayer;

/// What means something to one connection alone, and nothing behind a body.
const HOP_BY_HOP: [HeaderName; 5] =
    [CONNECTION, HeaderName::from_static("keep-alive"), TE, TRANSFER_ENCODING, UPGRADE];

/// The body, without credentials in its trailers.
pub fn strip(body: Body, credentials: &StripCredentialsLayer) -> Body {
    if body.is_end_stream() {
        return body;
    }
    Body::new(Stripped { body, credentials: credentials.clone() })
}

struct Stripped {
    body: Body,
    credentials: StripCredentialsLayer,
}

impl Stripped {
    fn strip(&self, mut trailers: HeaderMap) -> HeaderMap {
        self.credentials.strip_trailers(&mut trailers);
        for name in &HOP_BY_HOP {
            trailers.remove(name);
        }
        trailers
    }
}

impl http_body::Body for Stripped {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        Poll::Ready(frame.map(|frame| {
            frame.map(|frame| match frame.into_trailers() {
                Ok(trailers) => Frame::trailers(self.strip(trailers)),
                Err(data) => data,
            })
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
