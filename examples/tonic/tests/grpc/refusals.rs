//! What `grpc-status` 16 and 7 lead to.

use example_tonic::{GreeterClient, Greeting, Name};
use tokio::{sync::mpsc, task::JoinSet, time::timeout};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Code, Status, Streaming};
use tower::Layer;
use tower_selam::{AuthError, AuthErrorKind};

use crate::support::{Client, DETAILS, Gate, HANG, How, SAID, client, greet, layer, until};

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

#[tokio::test]
async fn j8_sixteen_in_headers_or_a_401_is_renewed_and_the_call_sent_once_more() {
    for how in [How::Headers, How::Http] {
        for (kind, expected) in KINDS {
            let gate = Gate::refusing(how).reading_first();
            let (_server, mut client) = gate.revoked().await;
            assert_eq!(call(&mut client, kind).await.unwrap(), expected, "{how:?} {kind:?}");
            assert_eq!(gate.minted(), 2, "{how:?} {kind:?}");
            let seen = gate.seen();
            let [first, second] = &seen[..] else { panic!("{how:?} {kind:?}: {seen:?}") };
            // J7: the same bytes, and never none.
            assert_eq!(first.bytes(), second.bytes(), "{how:?} {kind:?}");
            assert!(!first.bytes().is_empty());
            let unlike: Vec<_> =
                first.head.iter().filter(|(name, value)| second.head.get(*name) != Some(value)).collect();
            assert_eq!(unlike.len(), 1, "only the token differs: {unlike:?}");
        }
    }
}

#[tokio::test]
async fn j8_seven_and_a_403_go_up_and_renew_nothing() {
    for how in [How::Headers, How::Trailers(0), How::Trailers(2), How::Http] {
        let gate = Gate::refusing_with(how, Code::PermissionDenied).reading_first();
        let (_server, mut client) = gate.revoked().await;
        for (round, (kind, _)) in (1..).zip(KINDS) {
            let status = call(&mut client, kind).await.unwrap_err();
            assert_eq!(status.code(), Code::PermissionDenied, "{how:?} {kind:?}");
            let error = AuthError::find(&status).unwrap();
            assert_eq!(error.kind(), AuthErrorKind::Forbidden, "{how:?} {kind:?}");
            assert_eq!((gate.seen().len(), gate.minted()), (round, 1), "{how:?} {kind:?}");
        }
    }
}

#[tokio::test]
async fn j8_sixteen_in_trailers_goes_up_and_the_next_call_has_another_token() {
    for how in [How::Trailers(0), How::Trailers(2)] {
        for (kind, expected) in KINDS {
            let gate = Gate::refusing(how).reading_first();
            let (_server, mut client) = gate.revoked().await;
            let status = call(&mut client, kind).await.unwrap_err();
            assert_eq!((status.code(), status.message()), (Code::Unauthenticated, SAID), "{kind:?}");
            assert_eq!(status.details(), DETAILS);
            assert_eq!(status.metadata().get("x-request-id").unwrap(), "req-1");
            let error = AuthError::find(&status).unwrap();
            assert_eq!(error.kind(), AuthErrorKind::Unauthorized);
            assert_eq!((error.message(), error.request_id()), (Some(SAID), Some("req-1")));
            assert_eq!(gate.seen().len(), 1, "nothing is sent again");

            assert_eq!(call(&mut client, kind).await.unwrap(), expected, "{how:?} {kind:?}");
            assert_eq!((gate.seen().len(), gate.minted()), (2, 2), "{how:?} {kind:?}");
        }
    }
}

#[tokio::test]
async fn j8_the_messages_before_the_trailers_are_delivered() {
    let gate = Gate::refusing(How::Trailers(2));
    let (_server, mut client) = gate.revoked().await;
    let mut stream = client.greet_in_every_language(Name::of("Almaz")).await.unwrap().into_inner();
    assert_eq!(stream.message().await.unwrap().unwrap().text, "Selam!");
    assert_eq!(stream.message().await.unwrap().unwrap().text, "Selam!");
    let status = stream.message().await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    assert!(AuthError::find(&status).is_some());
}

#[tokio::test]
async fn j4_the_second_refusal_goes_up_as_the_server_said_it() {
    for how in [How::Headers, How::Trailers(0), How::Http] {
        let gate = Gate::refusing(how).reading_first();
        let (_server, mut client) = gate.revoked().await;
        gate.refuse_all();
        let status = greet(&mut client).await.unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated, "{how:?}");
        assert_eq!(status.metadata().get("x-request-id").unwrap(), "req-1", "{how:?}");
        let error = AuthError::find(&status).unwrap();
        assert_eq!(error.kind(), AuthErrorKind::Unauthorized, "{how:?}");
        assert_eq!(error.status().unwrap(), 401, "{how:?}");
        assert_eq!(error.message(), Some(SAID), "{how:?}");
        if how != How::Http {
            assert_eq!((status.message(), status.details()), (SAID, DETAILS), "{how:?}");
        }
        let sends = if how == How::Trailers(0) { 1 } else { 2 };
        assert_eq!(gate.seen().len(), sends, "{how:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn j2_many_calls_that_are_refused_at_once_make_one_renewal_and_all_succeed() {
    const CALLS: usize = 500;
    let gate = Gate::refusing(How::Headers);
    let (_server, client) = gate.revoked().await;
    gate.hold();
    let mut calls = JoinSet::new();
    for _ in 0..CALLS {
        let mut client = client.clone();
        calls.spawn(async move { greet(&mut client).await });
    }
    // Those that come late wait for the renewal before they are sent at all.
    until(|| gate.asked() == 2).await;
    gate.release();
    let results = calls.join_all().await;
    assert!(results.iter().all(Result::is_ok), "{:?}", results.iter().find(|result| result.is_err()));
    assert_eq!(gate.minted(), 2);
    let seen = gate.seen().len();
    assert!((CALLS + 1..=2 * CALLS).contains(&seen), "{seen}");
}

#[tokio::test]
async fn j7_a_large_request_that_is_refused_before_it_is_read_is_sent_again() {
    // More than the windows of HTTP/2 let through unread.
    let more: Vec<u8> = (0..3_000_000u32).map(|n| n.to_le_bytes()[1]).collect();
    let name = Name { name: "Almaz".to_owned(), more };
    let length = prost::Message::encoded_len(&name) + 5;
    let gate = Gate::refusing(How::Headers);
    let (_server, client) = gate.revoked().await;
    let mut client = client.max_decoding_message_size(8 << 20);
    assert_eq!(client.greet(name).await.unwrap().into_inner().text, "Selam, Almaz!");
    let seen = gate.seen();
    assert_eq!(seen.len(), 2);
    assert_eq!(seen[1].bytes().len(), length);
}

#[tokio::test]
async fn j7_a_stream_that_is_refused_before_its_end_is_sent_again_from_its_beginning() {
    let gate = Gate::refusing(How::Headers);
    let (_server, mut client) = gate.revoked().await;
    let (send, names) = mpsc::unbounded_channel();
    send.send(Name::of("Almaz")).unwrap();
    let refused = gate.clone();
    let later = async move {
        until(|| refused.seen().len() == 2).await;
        send.send(Name::of("Kaleb")).unwrap();
    };
    let all = client.greet_all(UnboundedReceiverStream::new(names));
    let (greeting, ()) = timeout(HANG, async { tokio::join!(all, later) }).await.unwrap();
    assert_eq!(greeting.unwrap().into_inner().text, "Selam, Almaz and Kaleb!");
    assert_eq!(gate.seen().len(), 2);
}

#[tokio::test]
async fn j7_what_is_beyond_the_limit_is_not_sent_again_and_the_next_call_has_another_token() {
    let gate = Gate::refusing(How::Headers).reading_first();
    let server = gate.serve().await;
    for unkept in
        [layer(&server, gate.jwts()).with_replay_limit(8), layer(&server, gate.jwts()).without_replay()]
    {
        let mut client = GreeterClient::new(unkept.layer(server.endpoint().unwrap().connect_lazy()));
        greet(&mut client).await.unwrap();
        gate.revoke();
        let sent = gate.seen().len();
        let status = greet(&mut client).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (Code::Unauthenticated, SAID));
        assert_eq!(gate.seen().len(), sent + 1);
        assert_eq!(greet(&mut client).await.unwrap(), "Selam, Almaz!");
        assert!(gate.seen().iter().all(|seen| !seen.bytes().is_empty()));
    }
}

#[tokio::test]
async fn t3_a_call_that_is_dropped_while_it_waits_leaves_the_renewal_to_the_next() {
    let gate = Gate::refusing(How::Headers);
    gate.hold();
    let server = gate.serve().await;
    let mut client = client(&server, gate.jwts());
    tokio::select! {
        answer = greet(&mut client) => panic!("{answer:?}"),
        () = until(|| gate.asked() == 1) => {}
    }
    gate.release();
    assert_eq!(greet(&mut client).await.unwrap(), "Selam, Almaz!");
    assert_eq!((gate.seen().len(), gate.minted()), (1, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn j7_streams_that_are_refused_before_their_end_are_all_sent_again_however_fast_the_renewal() {
    let gate = Gate::refusing(How::Headers);
    let (_server, client) = gate.revoked().await;
    let mut calls = JoinSet::new();
    for n in 0..100 {
        let mut client = client.clone();
        calls.spawn(async move {
            let (send, names) = mpsc::unbounded_channel();
            // Half of them say more than the windows of HTTP/2 let through unread.
            let more = vec![7; if n % 2 == 0 { 100_000 } else { 1 }];
            send.send(Name { name: "Almaz".to_owned(), more }).unwrap();
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
