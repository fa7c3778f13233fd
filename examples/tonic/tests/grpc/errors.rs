//! What a caller gets that is not a greeting.

use std::error::Error as _;

use example_tonic::{GreeterClient, Name};
use http::Uri;
use tonic::{Code, Status, transport};
use tower::{Layer, ServiceBuilder, timeout::TimeoutLayer};
use tower_selam::{
    ApiKey, AuthError, AuthErrorKind, BaseUrl, BoxError, ConfigErrorKind, PerSubject, Refreshing,
    RequestAuth, SelamLayer, Subject, Token,
    adapter::tonic::SelamGrpcLayer,
    source::{Reason, SourceError, source_fn},
};

use crate::support::{DETAILS, Gate, HANG, How, KEY, client, greet, layer, until};

fn failing(permanent: bool) -> Refreshing<Token> {
    Refreshing::new(source_fn(move |_: Reason<Token>| async move {
        Err::<Token, _>(if permanent {
            SourceError::permanent("revoked")
        } else {
            SourceError::transient("busy")
        })
    }))
}

fn assert_found(status: &Status, code: Code, kind: AuthErrorKind) {
    assert_eq!(status.code(), code, "{status:?}");
    assert_eq!(AuthError::find(status).unwrap().kind(), kind, "{status:?}");
}

#[tokio::test]
async fn e7_what_was_never_sent_is_unauthenticated_or_permission_denied_with_its_cause() {
    let gate = Gate::default();
    let server = gate.serve().await;

    let status = greet(&mut client(&server, failing(false))).await.unwrap_err();
    assert_found(&status, Code::Unauthenticated, AuthErrorKind::RefreshFailed);
    assert!(AuthError::find(&status).unwrap().retry_after().is_some());
    assert!(status.message().starts_with("credential not renewed"), "{status}");

    let status = greet(&mut client(&server, failing(true))).await.unwrap_err();
    assert_found(&status, Code::Unauthenticated, AuthErrorKind::RefreshRejected);

    let mut request = tonic::Request::new(Name::of("Almaz"));
    request.extensions_mut().insert(Subject::new("user-7"));
    let status = client(&server, gate.jwts()).greet(request).await.unwrap_err();
    assert_found(&status, Code::Unauthenticated, AuthErrorKind::CredentialUnavailable);

    let elsewhere = Uri::from_static("https://elsewhere.example");
    let service = layer(&server, gate.jwts()).layer(server.endpoint().unwrap().connect_lazy());
    let status = greet(&mut GreeterClient::with_origin(service, elsewhere)).await.unwrap_err();
    assert_found(&status, Code::PermissionDenied, AuthErrorKind::OriginNotAllowed);

    assert!(gate.seen().is_empty());
}

#[tokio::test]
async fn e7_the_errors_survive_the_layers_of_tower_around() {
    let gate = Gate::refusing_with(How::Headers, Code::PermissionDenied);
    let server = gate.serve().await;
    let service = ServiceBuilder::new()
        .layer(TimeoutLayer::new(HANG))
        .buffer(8)
        .layer(layer(&server, gate.jwts()))
        .service(server.endpoint().unwrap().connect_lazy());
    gate.refuse_all();
    let status = GreeterClient::new(service).greet(Name::of("Almaz")).await.unwrap_err();
    assert_found(&status, Code::PermissionDenied, AuthErrorKind::Forbidden);
}

#[tokio::test]
async fn e5_what_is_no_refusal_passes_as_it_came() {
    let gate = Gate::refusing_with(How::Headers, Code::ResourceExhausted);
    let (server, mut refused) = gate.revoked().await;
    for how in [How::Headers, How::Trailers(1)] {
        gate.refuse(how, Code::ResourceExhausted);
        let status = greet(&mut refused).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(status.details(), DETAILS);
        assert!(AuthError::find(&status).is_none());
    }
    assert_eq!((gate.seen().len(), gate.minted()), (2, 1));

    // Nobody listens there any more.
    let mut client = client(&server, gate.jwts());
    drop(server);
    tokio::task::yield_now().await;
    let status = greet(&mut client).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert!(status.source().unwrap().is::<transport::Error>(), "{status:?}");
    assert!(AuthError::find(&status).is_none());
}

#[tokio::test]
async fn j8_the_servers_own_permission_denied_keeps_its_message_and_details() {
    let gate = Gate::default();
    let (_server, mut client) = gate.revoked().await;
    let status = client.forget(Name::of("Almaz")).await.unwrap_err();
    assert_found(&status, Code::PermissionDenied, AuthErrorKind::Forbidden);
    assert_eq!((status.message(), status.details()), ("greetings are for ever", DETAILS));
}

#[test]
fn o3_a_layer_is_not_had_without_an_origin_that_credentials_may_go_to() {
    let selam = |url: &str| {
        let base_url = BaseUrl::allow_insecure_loopback(url).unwrap();
        let key = ApiKey::new(KEY).unwrap();
        SelamLayer::builder().with_base_url(base_url).with_api_key(key).build().unwrap()
    };
    let refused = |url: &str, origin: &str| {
        SelamGrpcLayer::new(selam(url), &origin.parse().unwrap()).map(|_| ()).unwrap_err().kind()
    };
    let grpc = "https://grpc.example:8443";
    assert!(SelamGrpcLayer::new(selam(grpc), &"https://GRPC.example:8443/any".parse().unwrap()).is_ok());
    assert_eq!(refused(grpc, "https://grpc.example"), ConfigErrorKind::NotAllowed);
    assert_eq!(refused(grpc, "http://grpc.example:8443"), ConfigErrorKind::NotAllowed);
    assert_eq!(refused(grpc, "grpc.example:8443"), ConfigErrorKind::InvalidUrl);
    assert_eq!(refused(grpc, "/"), ConfigErrorKind::InvalidUrl);
    // Plain http is for loopback, where it was asked for.
    assert!(SelamGrpcLayer::new(selam("http://[::1]:50051"), &"http://[::1]:50051".parse().unwrap()).is_ok());
    assert_eq!(refused("https://[::1]:50051", "http://[::1]:50051"), ConfigErrorKind::NotAllowed);
}

#[tokio::test]
async fn s2_no_status_shows_a_credential_that_the_server_echoes() {
    for (how, code) in [
        (How::Headers, Code::Unauthenticated),
        (How::Headers, Code::PermissionDenied),
        (How::Trailers(0), Code::Unauthenticated),
        (How::Trailers(1), Code::PermissionDenied),
        (How::Http, Code::Unauthenticated),
        (How::Http, Code::PermissionDenied),
    ] {
        let gate = Gate::refusing_with(how, code).echoing();
        let (_server, mut client) = gate.revoked().await;
        gate.refuse_all();
        let status = greet(&mut client).await.unwrap_err();
        let mut shown = format!("{status} {status:?} {status:#?}");
        let mut cause = status.source();
        while let Some(error) = cause {
            shown += &format!("{error} {error:?} {error:#?}");
            cause = error.source();
        }
        shown += &String::from_utf8_lossy(status.details());
        if how != How::Http {
            let bytes = status.metadata().get_bin("echo-bin").unwrap().to_bytes().unwrap();
            shown += &String::from_utf8_lossy(&bytes);
            // What counts its bytes is as long as before.
            let length = format!("Bearer canary-token-0000 {KEY}").len();
            assert_eq!(bytes.len(), length);
            assert_eq!(status.details().len(), DETAILS.len() + length);
            assert!(status.message().ends_with("Bearer [redacted] [redacted]"), "{status}");
        }
        assert!(!shown.contains("canary"), "{how:?} {code:?}: {shown}");
    }
}

#[tokio::test]
async fn s2_nor_one_that_was_sent_again_and_is_echoed_in_trailers() {
    let gate = Gate::refusing(How::Headers).echoing();
    let (_server, mut client) = gate.revoked().await;
    gate.refuse_all();
    gate.hold();
    let renewed = async {
        until(|| gate.asked() == 2).await;
        gate.refuse(How::Trailers(0), Code::Unauthenticated);
        gate.release();
    };
    let (refused, ()) = tokio::join!(greet(&mut client), renewed);
    let status = refused.unwrap_err();
    assert_eq!((gate.seen().len(), gate.minted()), (2, 2));
    assert!(status.message().ends_with("Bearer [redacted] [redacted]"), "{status}");
    assert!(!format!("{status:?}").contains("canary"), "{status:?}");
}

#[tokio::test]
async fn h4_a_calls_own_choice_goes_by_its_extensions() {
    let gate = Gate::default();
    let (_server, mut client) = gate.revoked().await;
    let mut request = tonic::Request::new(Name::of("Almaz"));
    request.extensions_mut().insert(RequestAuth::ApiKey);
    // H3: what the caller wrote itself is replaced.
    request.metadata_mut().insert("authorization", "Bearer theirs".parse().unwrap());
    request.metadata_mut().append("x-api-key", "theirs".parse().unwrap());
    client.greet(request).await.unwrap();
    greet(&mut client).await.unwrap();
    let seen = gate.seen();
    let all = |at: usize, name| {
        let values = seen[at].head.get_all(name).iter();
        values.map(|value| value.to_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(all(0, "authorization"), [format!("Bearer {KEY}")]);
    assert!(all(0, "x-api-key").is_empty());
    assert_eq!(all(1, "authorization"), ["Bearer canary-token-0000"]);
    assert_eq!(all(1, "x-api-key"), [KEY]);
}

#[tokio::test]
async fn h4_each_user_has_a_jwt_by_the_calls_extension() {
    let gate = Gate::default();
    let server = gate.serve().await;
    let jwts = PerSubject::new(|user: &Subject| {
        let token = format!("of.{}", user.as_str());
        source_fn(move |_: Reason<Token>| {
            let token = token.clone();
            async move { Ok::<_, BoxError>(Token::new(token)?) }
        })
    });
    let mut client = client(&server, jwts);
    for user in ["user-7", "user-8"] {
        let mut request = tonic::Request::new(Name::of("Almaz"));
        request.extensions_mut().insert(Subject::new(user));
        client.greet(request).await.unwrap();
        let seen = gate.seen();
        assert_eq!(seen.last().unwrap().head["authorization"], format!("Bearer of.{user}"));
    }
    let status = greet(&mut client).await.unwrap_err();
    assert_found(&status, Code::Unauthenticated, AuthErrorKind::CredentialUnavailable);
    assert_eq!(gate.seen().len(), 2);
}

/// That a caller can put them all into one error type of its own.
#[test]
fn e7_an_auth_error_is_a_status_by_itself() {
    let response = http::Response::builder().status(403).body("").unwrap();
    let error = AuthError::from_response(&response).unwrap();
    let status = Status::from(error);
    assert_found(&status, Code::PermissionDenied, AuthErrorKind::Forbidden);
    let boxed: BoxError = status.into();
    assert_found(&Status::from_error(boxed), Code::PermissionDenied, AuthErrorKind::Forbidden);
}
