//! Errors of the tonic adapter: kinds, codes, redaction and the extensions of a call.

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

use crate::support::{DETAILS, Gate, HANG, KEY, RejectIn, client, greet, layer, until};

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

/// E7: a call that is not sent ends with `Unauthenticated` or `PermissionDenied`, and with the cause.
#[tokio::test]
async fn unsent_calls_end_with_a_typed_status() {
    let gate = Gate::default();
    let server = gate.serve().await;

    let status = greet(&mut client(&server, failing(false))).await.unwrap_err();
    assert_found(&status, Code::Unauthenticated, AuthErrorKind::RefreshFailed);
    assert!(AuthError::find(&status).unwrap().retry_after().is_some());
    assert!(status.message().starts_with("credential refresh failed"), "{status}");

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

    assert!(gate.received().is_empty());
}

/// E7: the error is found through tower's timeout and buffer.
#[tokio::test]
async fn errors_survive_outer_tower_layers() {
    let gate = Gate::rejecting_with(RejectIn::Headers, Code::PermissionDenied);
    let server = gate.serve().await;
    let service = ServiceBuilder::new()
        .layer(TimeoutLayer::new(HANG))
        .buffer(8)
        .layer(layer(&server, gate.jwts()))
        .service(server.endpoint().unwrap().connect_lazy());
    gate.reject_all();
    let status = GreeterClient::new(service).greet(Name::of("Almaz")).await.unwrap_err();
    assert_found(&status, Code::PermissionDenied, AuthErrorKind::Forbidden);
}

/// E5: a status that is not an authentication error passes with its details.
#[tokio::test]
async fn other_statuses_pass_unchanged() {
    let gate = Gate::rejecting_with(RejectIn::Headers, Code::ResourceExhausted);
    let (server, mut rejected) = gate.serve_with_revoked_token().await;
    for how in [RejectIn::Headers, RejectIn::Trailers(1)] {
        gate.reject(how, Code::ResourceExhausted);
        let status = greet(&mut rejected).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(status.details(), DETAILS);
        assert!(AuthError::find(&status).is_none());
    }
    assert_eq!((gate.received().len(), gate.minted()), (2, 1));

    // The server is gone: the transport's error passes unchanged.
    let mut client = client(&server, gate.jwts());
    drop(server);
    tokio::task::yield_now().await;
    let status = greet(&mut client).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert!(status.source().unwrap().is::<transport::Error>(), "{status:?}");
    assert!(AuthError::find(&status).is_none());
}

/// J8: the status of the server's handler keeps its message and details.
#[tokio::test]
async fn permission_denied_keeps_message_and_details() {
    let gate = Gate::default();
    let (_server, mut client) = gate.serve_with_revoked_token().await;
    let status = client.forget(Name::of("Almaz")).await.unwrap_err();
    assert_found(&status, Code::PermissionDenied, AuthErrorKind::Forbidden);
    assert_eq!((status.message(), status.details()), ("greetings cannot be forgotten", DETAILS));
}

/// O3: a layer cannot be built without an allowed origin.
#[test]
fn a_layer_needs_an_allowed_origin() {
    let selam = |url: &str| {
        let base_url = BaseUrl::allow_insecure_loopback(url).unwrap();
        let key = ApiKey::new(KEY).unwrap();
        SelamLayer::builder().with_base_url(base_url).with_api_key(key).build().unwrap()
    };
    let error = |url: &str, origin: &str| {
        SelamGrpcLayer::new(selam(url), &origin.parse().unwrap()).map(|_| ()).unwrap_err().kind().clone()
    };
    let grpc = "https://grpc.example:8443";
    assert!(SelamGrpcLayer::new(selam(grpc), &"https://GRPC.example:8443/any".parse().unwrap()).is_ok());
    assert_eq!(error(grpc, "https://grpc.example"), ConfigErrorKind::NotAllowed);
    assert_eq!(error(grpc, "http://grpc.example:8443"), ConfigErrorKind::NotAllowed);
    assert_eq!(error(grpc, "grpc.example:8443"), ConfigErrorKind::InvalidUrl);
    assert_eq!(error(grpc, "/"), ConfigErrorKind::InvalidUrl);
    // Plain http is allowed for loopback addresses that opted in.
    assert!(SelamGrpcLayer::new(selam("http://[::1]:50051"), &"http://[::1]:50051".parse().unwrap()).is_ok());
    assert_eq!(error("https://[::1]:50051", "http://[::1]:50051"), ConfigErrorKind::NotAllowed);
}

/// S2: no status shows a credential that the server echoes.
#[tokio::test]
async fn statuses_redact_echoed_credentials() {
    for (how, code) in [
        (RejectIn::Headers, Code::Unauthenticated),
        (RejectIn::Headers, Code::PermissionDenied),
        (RejectIn::Trailers(0), Code::Unauthenticated),
        (RejectIn::Trailers(1), Code::PermissionDenied),
        (RejectIn::Http, Code::Unauthenticated),
        (RejectIn::Http, Code::PermissionDenied),
    ] {
        let gate = Gate::rejecting_with(how, code).echoing();
        let (_server, mut client) = gate.serve_with_revoked_token().await;
        gate.reject_all();
        let status = greet(&mut client).await.unwrap_err();
        let mut shown = format!("{status} {status:?} {status:#?}");
        let mut cause = status.source();
        while let Some(error) = cause {
            shown += &format!("{error} {error:?} {error:#?}");
            cause = error.source();
        }
        shown += &String::from_utf8_lossy(status.details());
        if how != RejectIn::Http {
            let bytes = status.metadata().get_bin("echo-bin").unwrap().to_bytes().unwrap();
            shown += &String::from_utf8_lossy(&bytes);
            // Redaction keeps the length, because binary details count their bytes.
            let length = format!("Bearer canary-token-0000 {KEY}").len();
            assert_eq!(bytes.len(), length);
            assert_eq!(status.details().len(), DETAILS.len() + length);
            assert!(status.message().ends_with("Bearer [redacted] [redacted]"), "{status}");
        }
        assert!(!shown.contains("canary"), "{how:?} {code:?}: {shown}");
    }
}

/// S2: a credential that was replayed and is echoed in trailers is redacted as well.
#[tokio::test]
async fn replayed_credentials_are_redacted_in_trailers() {
    let gate = Gate::rejecting(RejectIn::Headers).echoing();
    let (_server, mut client) = gate.serve_with_revoked_token().await;
    gate.reject_all();
    gate.hold();
    let refresh = async {
        until(|| gate.refreshes_started() == 2).await;
        gate.reject(RejectIn::Trailers(0), Code::Unauthenticated);
        gate.release();
    };
    let (greeting, ()) = tokio::join!(greet(&mut client), refresh);
    let status = greeting.unwrap_err();
    assert_eq!((gate.received().len(), gate.minted()), (2, 2));
    assert!(status.message().ends_with("Bearer [redacted] [redacted]"), "{status}");
    assert!(!format!("{status:?}").contains("canary"), "{status:?}");
}

/// H3, H4: the extension chooses the credentials; what the call wrote itself is replaced.
#[tokio::test]
async fn a_call_chooses_its_credentials() {
    let gate = Gate::default();
    let (_server, mut client) = gate.serve_with_revoked_token().await;
    let mut request = tonic::Request::new(Name::of("Almaz"));
    request.extensions_mut().insert(RequestAuth::ApiKey);
    request.metadata_mut().insert("authorization", "Bearer theirs".parse().unwrap());
    request.metadata_mut().append("x-api-key", "theirs".parse().unwrap());
    client.greet(request).await.unwrap();
    greet(&mut client).await.unwrap();
    let received = gate.received();
    let all = |at: usize, name| {
        let values = received[at].head.get_all(name).iter();
        values.map(|value| value.to_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(all(0, "authorization"), [format!("Bearer {KEY}")]);
    assert!(all(0, "x-api-key").is_empty());
    assert_eq!(all(1, "authorization"), ["Bearer canary-token-0000"]);
    assert_eq!(all(1, "x-api-key"), [KEY]);
}

/// H4: the extension names the subject.
#[tokio::test]
async fn each_subject_has_its_own_jwt() {
    let gate = Gate::default();
    let server = gate.serve().await;
    let jwts = PerSubject::new(|subject: &Subject| {
        let token = format!("of.{}", subject.as_str());
        source_fn(move |_: Reason<Token>| {
            let token = token.clone();
            async move { Ok::<_, BoxError>(Token::new(token)?) }
        })
    });
    let mut client = client(&server, jwts);
    for subject in ["user-7", "user-8"] {
        let mut request = tonic::Request::new(Name::of("Almaz"));
        request.extensions_mut().insert(Subject::new(subject));
        client.greet(request).await.unwrap();
        let received = gate.received();
        assert_eq!(received.last().unwrap().head["authorization"], format!("Bearer of.{subject}"));
    }
    let status = greet(&mut client).await.unwrap_err();
    assert_found(&status, Code::Unauthenticated, AuthErrorKind::CredentialUnavailable);
    assert_eq!(gate.received().len(), 2);
}

/// E7: callers can collect all errors in one type.
#[test]
fn an_auth_error_converts_into_a_status() {
    let response = http::Response::builder().status(403).body("").unwrap();
    let error = AuthError::from_response(&response).unwrap();
    let status = Status::from(error);
    assert_found(&status, Code::PermissionDenied, AuthErrorKind::Forbidden);
    let boxed: BoxError = status.into();
    assert_found(&Status::from_error(boxed), Code::PermissionDenied, AuthErrorKind::Forbidden);
}
