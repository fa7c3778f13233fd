//! Strips credentials and hop-by-hop fields from the trailers of a request: [`strip`].

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

/// Fields that concern one connection, and have no meaning in trailers.
const HOP_BY_HOP: [HeaderName; 5] =
    [CONNECTION, HeaderName::from_static("keep-alive"), TE, TRANSFER_ENCODING, UPGRADE];

/// Wraps a request body so that its trailers carry no credentials.
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
