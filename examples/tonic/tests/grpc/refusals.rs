//! `grpc-status` 16 and 7, in headers and trailers: refresh, replay, or an error.

use example_tonic::{GreeterClient, Greeting, Name};
use tokio::{sync::mpsc, task::JoinSet, time::timeout};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Code, Status, Streaming};
use tower::Layer;
use tower_selam::{AuthError, AuthErrorKind};

use crate::support::{Client, DETAILS, Gate, HANG, MESSAGE, RejectIn, client, greet, layer, until};

const KINDS: [(Kind, &str); 4] = [
    (Kind::Unary, "Selam, Almaz!"),
    (Kind::ServerStreaming, "Selam, Almaz! Merhaba, Almaz! Hello, Almaz!"),
    (Kind::ClientStreaming, "Selam, Almaz and Kaleb!"),
    (Kind::Bidirectional, "Selam, Almaz! Selam, Kaleb!"),
];

#[derive(Clone, Copy, Debug)]
enum Kind {
    Unary,
    ServerStreaming,
    ClientStreaming,
    Bidirectional,
}

async fn call(client: &mut Client, kind: Kind) -> Result<String, Status> {
    let names = tokio_stream::iter(["Almaz", "Kaleb"].map(Name::of));
    match kind {
        Kind::Unary => greet(client).await,
        Kind::ServerStreaming => {
            joined(client.greet_in_every_language(Name::of("Almaz")).await?.into_inner()).await
        }
        Kind::ClientStreaming => Ok(client.greet_all(names).await?.into_inner().text),
        Kind::Bidirectional => joined(client.converse(names).await?.into_inner()).await,
    }
}

async fn joined(mut stream: Streaming<Greeting>) -> Result<String, Status> {
    let mut texts = Vec::new();
    while let Some(greeting) = stream.message().await? {
        texts.push(greeting.text);
    }
    Ok(texts.join(" "))
}

/// J7, J8: status 16 in headers, or a 401, leads to one refresh and one replay with the same bytes.
#[tokio::test]
async fn unauthenticated_is_refreshed_and_replayed() {
    for how in [RejectIn::Headers, RejectIn::Http] {
        for (kind, expected) in KINDS {
            let gate = Gate::rejecting(how).reading_request_first();
            let (_server, mut client) = gate.serve_with_revoked_token().await;
            assert_eq!(call(&mut client, kind).await.unwrap(), expected, "{how:?} {kind:?}");
            assert_eq!(gate.minted(), 2, "{how:?} {kind:?}");
            let received = gate.received();
            let [first, second] = &received[..] else { panic!("{how:?} {kind:?}: {received:?}") };
            // The replay has the same bytes, and they are not empty.
            assert_eq!(first.bytes(), second.bytes(), "{how:?} {kind:?}");
            assert!(!first.bytes().is_empty());
            let changed: Vec<_> =
                first.head.iter().filter(|(name, value)| second.head.get(*name) != Some(value)).collect();
            assert_eq!(changed.len(), 1, "only the token differs: {changed:?}");
        }
    }
}

/// J8: status 7 or a 403 is returned to the caller.
#[tokio::test]
async fn permission_denied_is_returned_without_a_refresh() {
    for how in [RejectIn::Headers, RejectIn::Trailers(0), RejectIn::Trailers(2), RejectIn::Http] {
        let gate = Gate::rejecting_with(how, Code::PermissionDenied).reading_request_first();
        let (_server, mut client) = gate.serve_with_revoked_token().await;
        for (round, (kind, _)) in (1..).zip(KINDS) {
            let status = call(&mut client, kind).await.unwrap_err();
            assert_eq!(status.code(), Code::PermissionDenied, "{how:?} {kind:?}");
            let error = AuthError::find(&status).unwrap();
            assert_eq!(error.kind(), AuthErrorKind::Forbidden, "{how:?} {kind:?}");
            assert_eq!((gate.received().len(), gate.minted()), (round, 1), "{how:?} {kind:?}");
        }
    }
}

/// J8: status 16 in trailers is returned, and the next call has a new token.
#[tokio::test]
async fn unauthenticated_in_trailers_replaces_the_token() {
    for how in [RejectIn::Trailers(0), RejectIn::Trailers(2)] {
        for (kind, expected) in KINDS {
            let gate = Gate::rejecting(how).reading_request_first();
            let (_server, mut client) = gate.serve_with_revoked_token().await;
            let status = call(&mut client, kind).await.unwrap_err();
            assert_eq!((status.code(), status.message()), (Code::Unauthenticated, MESSAGE), "{kind:?}");
            assert_eq!(status.details(), DETAILS);
            assert_eq!(status.metadata().get("x-request-id").unwrap(), "req-1");
            let error = AuthError::find(&status).unwrap();
            assert_eq!(error.kind(), AuthErrorKind::Unauthorized);
            assert_eq!((error.message(), error.request_id()), (Some(MESSAGE), Some("req-1")));
            assert_eq!(gate.received().len(), 1, "the call is not replayed");

            assert_eq!(call(&mut client, kind).await.unwrap(), expected, "{how:?} {kind:?}");
            assert_eq!((gate.received().len(), gate.minted()), (2, 2), "{how:?} {kind:?}");
        }
    }
}

/// J8: the caller gets the messages that precede status 16.
#[tokio::test]
async fn messages_before_the_trailers_are_delivered() {
    let gate = Gate::rejecting(RejectIn::Trailers(2));
    let (_server, mut client) = gate.serve_with_revoked_token().await;
    let mut stream = client.greet_in_every_language(Name::of("Almaz")).await.unwrap().into_inner();
    assert_eq!(stream.message().await.unwrap().unwrap().text, "Selam!");
    assert_eq!(stream.message().await.unwrap().unwrap().text, "Selam!");
    let status = stream.message().await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    assert!(AuthError::find(&status).is_some());
}

/// J4: the second rejection is returned with the server's message and details.
#[tokio::test]
async fn the_second_rejection_is_returned_unchanged() {
    for how in [RejectIn::Headers, RejectIn::Trailers(0), RejectIn::Http] {
        let gate = Gate::rejecting(how).reading_request_first();
        let (_server, mut client) = gate.serve_with_revoked_token().await;
        gate.reject_all();
        let status = greet(&mut client).await.unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated, "{how:?}");
        assert_eq!(status.metadata().get("x-request-id").unwrap(), "req-1", "{how:?}");
        let error = AuthError::find(&status).unwrap();
        assert_eq!(error.kind(), AuthErrorKind::Unauthorized, "{how:?}");
        assert_eq!(error.status().unwrap(), 401, "{how:?}");
        assert_eq!(error.message(), Some(MESSAGE), "{how:?}");
        if how != RejectIn::Http {
            assert_eq!((status.message(), status.details()), (MESSAGE, DETAILS), "{how:?}");
        }
        let sends = if how == RejectIn::Trailers(0) { 1 } else { 2 };
        assert_eq!(gate.received().len(), sends, "{how:?}");
    }
}

/// J2: 500 calls are rejected at once, one refresh serves them, and all succeed.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn concurrent_rejections_share_one_refresh() {
    const CALLS: usize = 500;
    let gate = Gate::rejecting(RejectIn::Headers);
    let (_server, client) = gate.serve_with_revoked_token().await;
    gate.hold();
    let mut calls = JoinSet::new();
    for _ in 0..CALLS {
        let mut client = client.clone();
        calls.spawn(async move { greet(&mut client).await });
    }
    // Later calls wait for the refresh before they are sent.
    until(|| gate.refreshes_started() == 2).await;
    gate.release();
    let results = calls.join_all().await;
    assert!(results.iter().all(Result::is_ok), "{:?}", results.iter().find(|result| result.is_err()));
    assert_eq!(gate.minted(), 2);
    let received = gate.received().len();
    assert!((CALLS + 1..=2 * CALLS).contains(&received), "{received}");
}

/// J7: a large request that is rejected unread is replayed in full.
#[tokio::test]
async fn an_unread_large_request_is_replayed() {
    // Larger than the HTTP/2 windows, so that the request cannot be sent completely unread.
    let padding: Vec<u8> = (0..3_000_000u32).map(|n| n.to_le_bytes()[1]).collect();
    let name = Name { name: "Almaz".to_owned(), padding };
    let length = prost::Message::encoded_len(&name) + 5;
    let gate = Gate::rejecting(RejectIn::Headers);
    let (_server, client) = gate.serve_with_revoked_token().await;
    let mut client = client.max_decoding_message_size(8 << 20);
    assert_eq!(client.greet(name).await.unwrap().into_inner().text, "Selam, Almaz!");
    let received = gate.received();
    assert_eq!(received.len(), 2);
    assert_eq!(received[1].bytes().len(), length);
}

/// J7: messages sent before and after the rejection all arrive.
#[tokio::test]
async fn an_unfinished_stream_is_replayed_from_its_start() {
    let gate = Gate::rejecting(RejectIn::Headers);
    let (_server, mut client) = gate.serve_with_revoked_token().await;
    let (send, names) = mpsc::unbounded_channel();
    send.send(Name::of("Almaz")).unwrap();
    let rejecting = gate.clone();
    let second_message = async move {
        until(|| rejecting.received().len() == 2).await;
        send.send(Name::of("Kaleb")).unwrap();
    };
    let call = client.greet_all(UnboundedReceiverStream::new(names));
    let (greeting, ()) = timeout(HANG, async { tokio::join!(call, second_message) }).await.unwrap();
    assert_eq!(greeting.unwrap().into_inner().text, "Selam, Almaz and Kaleb!");
    assert_eq!(gate.received().len(), 2);
}

/// J7: the rejection is returned, and the next call has a new token.
#[tokio::test]
async fn calls_over_the_replay_limit_are_not_replayed() {
    let gate = Gate::rejecting(RejectIn::Headers).reading_request_first();
    let server = gate.serve().await;
    for layer in
        [layer(&server, gate.jwts()).with_replay_limit(8), layer(&server, gate.jwts()).without_replay()]
    {
        let mut client = GreeterClient::new(layer.layer(server.endpoint().unwrap().connect_lazy()));
        greet(&mut client).await.unwrap();
        gate.revoke();
        let sent = gate.received().len();
        let status = greet(&mut client).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (Code::Unauthenticated, MESSAGE));
        assert_eq!(gate.received().len(), sent + 1);
        assert_eq!(greet(&mut client).await.unwrap(), "Selam, Almaz!");
        assert!(gate.received().iter().all(|received| !received.bytes().is_empty()));
    }
}

/// T3: the next call uses the refresh that a dropped call started.
#[tokio::test]
async fn a_dropped_call_leaves_its_refresh_running() {
    let gate = Gate::rejecting(RejectIn::Headers);
    gate.hold();
    let server = gate.serve().await;
    let mut client = client(&server, gate.jwts());
    tokio::select! {
        answer = greet(&mut client) => panic!("{answer:?}"),
        () = until(|| gate.refreshes_started() == 1) => {}
    }
    gate.release();
    assert_eq!(greet(&mut client).await.unwrap(), "Selam, Almaz!");
    assert_eq!((gate.received().len(), gate.minted()), (1, 1));
}

/// J7: unfinished streams are replayed even if the refresh is immediate.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_unfinished_streams_are_replayed() {
    let gate = Gate::rejecting(RejectIn::Headers);
    let (_server, client) = gate.serve_with_revoked_token().await;
    let mut calls = JoinSet::new();
    for n in 0..100 {
        let mut client = client.clone();
        calls.spawn(async move {
            let (send, names) = mpsc::unbounded_channel();
            // Half of the streams exceed the HTTP/2 windows, so that they cannot be sent completely unread.
            let padding = vec![7; if n % 2 == 0 { 100_000 } else { 1 }];
            send.send(Name { name: "Almaz".to_owned(), padding }).unwrap();
            let mut greetings = client.converse(UnboundedReceiverStream::new(names)).await?.into_inner();
            let first = greetings.message().await?.unwrap();
            send.send(Name::of("Kaleb")).unwrap();
            drop(send);
            Ok([first.text, joined(greetings).await?])
        });
    }
    let results: Vec<Result<_, Status>> = calls.join_all().await;
    for result in results {
        assert_eq!(result.unwrap(), ["Selam, Almaz!", "Selam, Kaleb!"]);
    }
    assert_eq!(gate.minted(), 2);
}
