//! A user per call: extensions of one call, handles of a subject, and interceptors (H4).

use std::future::ready;

use example_tonic::{GreeterClient, Name, Server};
use tonic::{
    Code, Request, Status, body::Body, service::interceptor::InterceptedService, transport::Channel,
};
use tower::Layer;
use tower_selam::{
    AuthError, AuthErrorKind, PerSubject, RequestAuth, Subject, Token,
    adapter::tonic::{ResponseBody, SelamGrpc},
    auth_error::InspectedBody,
    source::{Reason, source_fn},
};

use crate::support::{Gate, KEY, layer};

/// JWTs `of.NAME`, which the gate accepts like all others.
fn jwts() -> PerSubject {
    PerSubject::new(|subject: &Subject| {
        let token = Token::new(format!("of.{}", subject.as_str()));
        source_fn(move |_: Reason<Token>| ready(token.clone()))
    })
}

async fn serve() -> (Gate, Server, SelamGrpc<Channel>) {
    let gate = Gate::default();
    let server = gate.serve().await;
    let selam = layer(&server, jwts()).layer(server.endpoint().unwrap().connect_lazy());
    (gate, server, selam)
}

/// The `authorization` of each call that arrived.
fn bearers(gate: &Gate) -> Vec<String> {
    let received = gate.received();
    received.iter().map(|call| call.head["authorization"].to_str().unwrap().to_owned()).collect()
}

fn naming(user: &str) -> Request<Name> {
    let mut request = Request::new(Name::of("Almaz"));
    request.extensions_mut().insert(Subject::new(user));
    request
}

/// H4: in unary and streaming calls; the call's own subject wins, and nothing is kept for the next call.
#[tokio::test]
async fn a_handle_speaks_for_its_subject() {
    let (gate, _server, selam) = serve().await;
    let mut almaz = GreeterClient::new(selam.for_subject(&Subject::new("almaz")));
    let mut kaleb = GreeterClient::new(selam.for_subject(&Subject::new("kaleb")));
    almaz.greet(Name::of("Almaz")).await.unwrap();
    kaleb.greet(Name::of("Kaleb")).await.unwrap();
    almaz.greet_all(tokio_stream::iter([Name::of("Almaz")])).await.unwrap();
    almaz.greet(naming("kaleb")).await.unwrap();
    let mut stream = almaz.greet_in_every_language(Name::of("Almaz")).await.unwrap().into_inner();
    while stream.message().await.unwrap().is_some() {}
    assert_eq!(
        bearers(&gate),
        ["Bearer of.almaz", "Bearer of.kaleb", "Bearer of.almaz", "Bearer of.kaleb", "Bearer of.almaz"]
    );
    assert!(gate.received().iter().all(|call| call.head["x-api-key"] == KEY));

    let mut key_alone = Request::new(Name::of("Almaz"));
    key_alone.extensions_mut().insert(RequestAuth::ApiKey);
    almaz.greet(key_alone).await.unwrap();
    assert_eq!(bearers(&gate)[5], format!("Bearer {KEY}"));
}

/// H3, H4: what an interceptor puts into the extensions counts; what it puts into our headers is replaced.
#[tokio::test]
async fn an_interceptor_names_the_subject() {
    let (gate, _server, selam) = serve().await;
    let mut users = ["almaz", "kaleb"].into_iter().cycle();
    let interceptor = move |mut request: Request<()>| {
        let metadata = request.metadata_mut();
        metadata.insert("authorization", "Bearer theirs".parse().unwrap());
        metadata.insert("x-api-key", "theirs".parse().unwrap());
        metadata.insert("x-theirs", "kept".parse().unwrap());
        request.extensions_mut().insert(Subject::new(users.next().unwrap()));
        Ok(request)
    };
    let mut client = GreeterClient::with_interceptor(selam.clone(), interceptor);
    client.greet(Name::of("Almaz")).await.unwrap();
    client.greet_all(tokio_stream::iter([Name::of("Kaleb")])).await.unwrap();
    // The interceptor runs last.
    client.greet(naming("kaleb")).await.unwrap();
    assert_eq!(bearers(&gate), ["Bearer of.almaz", "Bearer of.kaleb", "Bearer of.almaz"]);
    for call in gate.received() {
        let all =
            |name| call.head.get_all(name).iter().map(|value| value.to_str().unwrap()).collect::<Vec<_>>();
        assert_eq!((all("x-api-key"), all("x-theirs")), (vec![KEY], vec!["kept"]));
        assert_eq!(all("authorization").len(), 1);
    }

    let key_alone = |mut request: Request<()>| {
        request.extensions_mut().insert(RequestAuth::ApiKey);
        Ok(request)
    };
    GreeterClient::with_interceptor(selam, key_alone).greet(Name::of("Almaz")).await.unwrap();
    assert_eq!(bearers(&gate)[3], format!("Bearer {KEY}"));
    assert!(!gate.received()[3].head.contains_key("x-api-key"));
}

/// A call that an interceptor refuses is not sent, and has an empty body.
#[tokio::test]
async fn an_interceptor_refuses_calls() {
    let (gate, _server, selam) = serve().await;
    let refuse = |_: Request<()>| Err(Status::cancelled("the user has left"));
    let status = GreeterClient::with_interceptor(selam, refuse).greet(Name::of("Almaz")).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Cancelled, "the user has left"));
    assert!(gate.received().is_empty());
    assert!(http_body::Body::is_end_stream(&ResponseBody::<InspectedBody<Body>>::default()));
}

/// Why interceptors belong around the layer: inside, they replace what it wrote.
#[tokio::test]
async fn an_interceptor_inside_replaces_ours() {
    let gate = Gate::default();
    let server = gate.serve().await;
    let theirs = |mut request: Request<()>| {
        request.metadata_mut().insert("authorization", "Bearer theirs".parse().unwrap());
        Ok(request)
    };
    let channel = InterceptedService::new(server.endpoint().unwrap().connect_lazy(), theirs);
    GreeterClient::new(layer(&server, jwts()).layer(channel)).greet(naming("almaz")).await.unwrap();
    assert_eq!(bearers(&gate), ["Bearer theirs"]);
}

/// H4: a call without a subject is refused, also after others of its stack were sent.
#[tokio::test]
async fn a_forgotten_subject_is_refused() {
    let (gate, _server, selam) = serve().await;
    GreeterClient::new(selam.for_subject(&Subject::new("almaz"))).greet(Name::of("Almaz")).await.unwrap();
    let status = GreeterClient::new(selam).greet(Name::of("Almaz")).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    assert_eq!(AuthError::find(&status).unwrap().kind(), AuthErrorKind::CredentialUnavailable);
    assert_eq!(bearers(&gate), ["Bearer of.almaz"]);
}
