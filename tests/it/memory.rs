//! M1: what is kept of a body stays within its limit and a constant, however the body is cut into frames.

use std::{
    pin::Pin,
    sync::LazyLock,
    task::{Context, Poll, Waker},
};

use allocation_counter::measure;
use bytes::{Buf, Bytes};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use http_body::{Body, Frame};
use proptest::{collection::vec, prelude::*, sample::select};
use tokio::task::unconstrained;
use tower::{BoxError, Layer, ServiceExt, service_fn};
use tower_selam::{
    AuthErrorLayer,
    oauth::{OAuthSource, TokenEndpoint},
    replay::{BufferBody, Replay},
    source::{Reason, Source},
};

use crate::support::{MODELS, get};

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

/// What buffers may take beyond their limit.
const SLACK: usize = 160 * KIB;

/// The bytes of every body: each depends on its place.
static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| (0..=250).cycle().take(MIB).collect());

/// How the data of a body is cut into frames.
#[derive(Clone, Copy, Debug)]
enum Cut {
    /// Frames of this size.
    Frames(usize),
    /// Frames of this size, each after a hundred empty ones.
    AmidEmptyFrames(usize),
    /// Frames of this size, each part of a buffer of 16 KiB.
    PartsOfBuffers(usize),
    /// One frame, whose `Buf` has parts of this size.
    OneFrameInParts(usize),
}

/// The data of a frame that is not `Bytes`.
struct Parts {
    rest: &'static [u8],
    part: usize,
}

impl Buf for Parts {
    fn remaining(&self) -> usize {
        self.rest.len()
    }

    fn chunk(&self) -> &[u8] {
        &self.rest[..self.part.min(self.rest.len())]
    }

    fn advance(&mut self, count: usize) {
        self.rest = &self.rest[count..];
    }
}

/// A body that makes its frames while it is read.
struct Frames<I>(I);

impl<D: Buf, I: Iterator<Item = Frame<D>> + Unpin> Body for Frames<I> {
    type Data = D;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<D>, BoxError>>> {
        Poll::Ready(self.0.next().map(Ok))
    }
}

/// A body of `length` bytes in frames of `Bytes`.
fn of_bytes(length: usize, cut: Cut) -> impl Iterator<Item = Frame<Bytes>> + Unpin {
    let (size, empty) = match cut {
        Cut::Frames(size) | Cut::PartsOfBuffers(size) | Cut::OneFrameInParts(size) => (size, 0),
        Cut::AmidEmptyFrames(size) => (size, 100),
    };
    PATTERN[..length].chunks(size).flat_map(move |data| {
        let data = match cut {
            Cut::PartsOfBuffers(_) => {
                let mut buffer = Vec::with_capacity(16 * KIB);
                buffer.extend_from_slice(data);
                buffer.resize(16 * KIB, 0);
                Bytes::from(buffer).slice(..data.len())
            }
            _ => Bytes::from_static(data),
        };
        std::iter::repeat_n(Bytes::new(), empty).chain([data]).map(Frame::data)
    })
}

/// A body of `length` bytes in one frame, whose data is not `Bytes`.
fn of_parts(length: usize, part: usize) -> impl Iterator<Item = Frame<Parts>> + Unpin {
    [Frame::data(Parts { rest: &PATTERN[..length], part })].into_iter()
}

fn trailers(count: usize, length: usize) -> HeaderMap {
    let trailer = |index| {
        let name = HeaderName::from_bytes(format!("x-{index}").as_bytes()).unwrap();
        (name, HeaderValue::from_bytes(&vec![b'v'; length]).unwrap())
    };
    (0..count).map(trailer).collect()
}

/// Reads up to `frames` frames and checks their data. Returns the number of bytes, and the trailers.
fn read<B>(body: &mut B, frames: usize) -> (usize, HeaderMap)
where
    B: Body<Data = Bytes, Error: std::fmt::Debug> + Unpin,
{
    let (mut length, mut trailers) = (0, HeaderMap::new());
    let mut context = Context::from_waker(Waker::noop());
    for _ in 0..frames {
        let Poll::Ready(frame) = Pin::new(&mut *body).poll_frame(&mut context) else { panic!("pending") };
        let Some(frame) = frame else { break };
        match frame.unwrap().into_data() {
            Ok(data) => {
                assert!(data == PATTERN[length..length + data.len()], "other bytes after {length}");
                length += data.len();
            }
            Err(frame) => trailers.extend(frame.into_trailers().unwrap()),
        }
    }
    (length, trailers)
}

/// Sends a body that is kept up to `limit`, and restores it. Returns the peak of the memory that this took, and what was
/// restored.
fn replay<I, D>(limit: usize, frames: I, sent: usize) -> (usize, Option<(usize, HeaderMap)>)
where
    I: Iterator<Item = Frame<D>> + Unpin,
    D: Buf + 'static,
{
    LazyLock::force(&PATTERN);
    let buffer = BufferBody::new(limit);
    let mut restored = None;
    let counted = measure(|| {
        let (mut body, captured) = buffer.capture(Frames(frames));
        read(&mut body, sent);
        drop(body);
        restored = captured.and_then(|captured| buffer.restore(captured));
    });
    (counted.bytes_max as usize, restored.map(|mut body| read(&mut body, usize::MAX)))
}

/// M1, J7: a body within the limit is restored, a longer one is not, and neither takes more memory than the limit.
#[test]
fn kept_bodies_stay_within_the_limit() {
    let cuts = [1, 2, 100, 1_000, 16 * KIB, MIB].map(Cut::Frames).into_iter().chain([
        Cut::AmidEmptyFrames(1_000),
        Cut::PartsOfBuffers(1),
        Cut::PartsOfBuffers(100),
        Cut::PartsOfBuffers(4 * KIB),
        Cut::OneFrameInParts(1),
        Cut::OneFrameInParts(5_000),
        Cut::OneFrameInParts(MIB),
    ]);
    for cut in cuts {
        for (length, limit) in [(8 * KIB, MIB), (40 * KIB, 40 * KIB), (40 * KIB, 40 * KIB - 1), (40 * KIB, 0)]
        {
            if matches!(cut, Cut::PartsOfBuffers(1)) && length > 8 * KIB {
                continue;
            }
            let case = format!("{cut:?}, {length} bytes, limit {limit}");
            let (peak, restored) = match cut {
                Cut::OneFrameInParts(part) => replay(limit, of_parts(length, part), usize::MAX),
                _ => replay(limit, of_bytes(length, cut), usize::MAX),
            };
            assert_eq!(restored.map(|(length, _)| length), (length <= limit).then_some(length), "{case}");
            assert!(peak <= limit.min(2 * length) + SLACK, "{case}: {peak} bytes");
        }
    }
}

/// M1: a frame that is far longer than the limit is not copied as a whole.
#[test]
fn long_frames_are_not_copied() {
    for part in [1_000, MIB] {
        let (peak, restored) = replay(64 * KIB, of_parts(MIB, part), usize::MAX);
        assert_eq!((restored, peak <= 64 * KIB + SLACK), (None, true), "parts of {part}: {peak} bytes");
    }
}

/// M1: any number of empty frames costs nothing.
#[test]
fn empty_frames_cost_nothing() {
    let empty = std::iter::repeat_n(Bytes::new(), 100_000).map(Frame::data);
    let (peak, restored) = replay(64 * KIB, empty, usize::MAX);
    assert_eq!(restored.map(|(length, _)| length), Some(0));
    assert!(peak < 4 * KIB, "{peak} bytes");
}

/// M1, J7: trailers are kept up to a constant.
#[test]
fn kept_trailers_are_bounded() {
    let frames =
        |count, trailers: HeaderMap| std::iter::repeat_n(trailers, count).map(Frame::<Bytes>::trailers);
    for (count, map, is_kept) in [
        (1, trailers(1, 10), true),
        (1, trailers(300, 10), true),
        (1, trailers(1, 60_000), true),
        (9, trailers(20, 100), true),
        (1, trailers(1, 70_000), false),
        (1, trailers(1_000, 10), false),
        (10_000, trailers(1, 0), false),
        (1_000, trailers(1, 1_000), false),
    ] {
        let expected = map.clone();
        let (peak, restored) = replay(MIB, frames(count, map), usize::MAX);
        let case = format!("{count} frames of {} trailers", expected.len());
        assert_eq!(restored.is_some(), is_kept, "{case}");
        if let Some((_, restored)) = restored {
            assert_eq!(restored.keys().count(), expected.keys().count(), "{case}");
            assert!(expected.iter().all(|(name, value)| restored[name] == value), "{case}");
        }
        // The caller's map is counted, too.
        let own = expected.values().map(|value| value.len() + 400).sum::<usize>();
        assert!(peak <= 2 * own + SLACK, "{case}: {peak} bytes");
    }
    // A map without entries may have room for many.
    let large = || HeaderMap::with_capacity(20_000);
    let endless = (0..300).map(|_| Frame::<Bytes>::trailers(large()));
    let (peak, restored) = replay(MIB, endless, usize::MAX);
    assert_eq!(restored, Some((0, HeaderMap::new())));
    let one = measure(|| drop(large())).bytes_max as usize;
    assert!(peak <= one + SLACK, "{peak} bytes");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// M1, J7: for all sizes of frames, and all places where the client may stop.
    #[test]
    fn any_cut_is_restored_within_the_limit(
        sizes in vec(prop_oneof![4 => 0_usize..4, 2 => 0_usize..3_000, 1 => 0_usize..200_000], 0..200),
        with_trailers in any::<bool>(),
        is_bytes in any::<bool>(),
        limit in select(vec![0, 1_000, 40_000, 300_000, MIB]),
        sent in prop_oneof![Just(usize::MAX), 0_usize..300],
    ) {
        let mut at = 0;
        let mut data: Vec<&'static [u8]> = Vec::new();
        for size in sizes {
            let end = (at + size).min(PATTERN.len());
            data.push(&PATTERN[at..end]);
            at = end;
        }
        let map = with_trailers.then(|| trailers(2, 5));
        let (peak, restored) = if is_bytes {
            let frames = data.iter().map(|data| Frame::data(Bytes::from_static(data)));
            replay(limit, frames.chain(map.clone().map(Frame::trailers)), sent)
        } else {
            let frames = data.iter().map(|rest| Frame::data(Parts { rest, part: 77 }));
            replay(limit, frames.chain(map.clone().map(Frame::trailers)), sent)
        };
        prop_assert!(peak <= limit.min(2 * at) + SLACK, "{} bytes", peak);
        if at <= limit {
            prop_assert_eq!(restored, Some((at, map.unwrap_or_default())));
        } else if sent == usize::MAX {
            prop_assert_eq!(restored, None);
        }
    }
}

/// Reads a 401 with this body in the annotating layer. Returns the peak of the memory that this took.
fn inspect<I, D>(limit: usize, frames: I, expected: usize) -> usize
where
    I: Iterator<Item = Frame<D>> + Unpin,
    D: Buf,
{
    let mut body = Some(Frames(frames));
    let service =
        AuthErrorLayer::new().with_body_limit(limit).annotated().layer(service_fn(|_: Request<()>| {
            let response = Response::builder().status(401).body(body.take().unwrap());
            std::future::ready(response.map_err(BoxError::from))
        }));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let request = get(MODELS);
    let mut response = None;
    let counted = measure(|| response = Some(runtime.block_on(service.oneshot(request))));
    let (length, trailers) = read(response.unwrap().unwrap().body_mut(), usize::MAX);
    assert_eq!((length, trailers.len()), (expected, 1));
    counted.bytes_max as usize
}

/// M1, E4, E6: what is read of an error's body takes no more memory than the limit, and is returned byte for byte.
#[test]
fn error_bodies_stay_within_the_limit() {
    // The parser's copies count, too.
    let slack = |limit: usize| 2 * limit + SLACK;
    let cuts = [1, 100, 5_000, MIB].map(Cut::Frames).into_iter().chain([
        Cut::AmidEmptyFrames(1_000),
        Cut::PartsOfBuffers(10),
        Cut::OneFrameInParts(1),
        Cut::OneFrameInParts(MIB),
    ]);
    for cut in cuts {
        for (length, limit) in [(100, 64 * KIB), (20 * KIB, 20 * KIB), (30 * KIB, 8 * KIB)] {
            let end = [trailers(1, 10)];
            let peak = match cut {
                Cut::OneFrameInParts(part) => {
                    inspect(limit, of_parts(length, part).chain(end.map(Frame::trailers)), length)
                }
                _ => inspect(limit, of_bytes(length, cut).chain(end.map(Frame::trailers)), length),
            };
            assert!(peak <= limit + slack(limit), "{cut:?}, {length} bytes, limit {limit}: {peak} bytes");
        }
    }
}

/// M1, K3: a token endpoint's response takes no more memory than its limit of 64 KiB.
#[tokio::test(start_paused = true)]
async fn token_responses_stay_within_the_limit() {
    for cut in [
        Cut::Frames(1),
        Cut::Frames(MIB),
        Cut::AmidEmptyFrames(1_000),
        Cut::PartsOfBuffers(10),
        Cut::OneFrameInParts(1),
    ] {
        let client = service_fn(move |_: Request<http_body_util::Full<Bytes>>| async move {
            let frames: Box<dyn Iterator<Item = Frame<Box<dyn Buf + Send>>> + Send + Unpin> = match cut {
                Cut::OneFrameInParts(part) => {
                    Box::new(of_parts(MIB, part).map(|frame| frame.map_data(|data| Box::new(data) as _)))
                }
                _ => Box::new(of_bytes(MIB, cut).map(|frame| frame.map_data(|data| Box::new(data) as _))),
            };
            Ok::<_, BoxError>(Response::new(Frames(frames)))
        });
        let endpoint = TokenEndpoint::new("https://api.selamgpt.com/oauth/token", client).unwrap();
        let source = OAuthSource::client_credentials(endpoint);
        let mut fetching = Box::pin(unconstrained(source.fetch(Reason::First)));
        let mut context = Context::from_waker(Waker::noop());
        let counted = measure(|| {
            let Poll::Ready(fetched) = fetching.as_mut().poll(&mut context) else { panic!("pending") };
            assert!(fetched.is_err());
        });
        assert!(counted.bytes_max as usize <= 64 * KIB + SLACK, "{cut:?}: {counted:?}");
    }
}
