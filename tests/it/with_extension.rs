//! Handles that speak for a user, and layers that add extensions: which one wins, and that none leaks (H4).

use std::{collections::HashMap, time::Duration};

use http::Request;
use tokio::task::JoinSet;
use tower::{Layer, Service, ServiceBuilder, ServiceExt};
use tower_http::follow_redirect::FollowRedirectLayer;
use tower_selam::{
    ApiKey, AuthErrorKind, Credentials, PerSubject, RequestAuth, SelamLayer, Subject, Token, WithExtension,
    WithExtensionLayer,
    simulator::{Fault, JwtAlgorithm, Simulator},
    source::{Reason, source_fn},
};

use crate::support::{KEY, MODELS, get, key, send, values};

/// Sends `jwt-of-NAME` for the subject of that name.
fn stack() -> SelamLayer {
    let jwts = PerSubject::new(|subject: &Subject| {
        let jwt = format!("jwt-of-{}", subject.as_str());
        source_fn(move |_: Reason<Token>| std::future::ready(Token::new(jwt.clone())))
    });
    SelamLayer::builder().with_api_key(key()).with_jwt(jwts).build().unwrap()
}

fn with<T: Clone + Send + Sync + 'static>(extension: T) -> Request<()> {
    let mut request = get(MODELS);
    request.extensions_mut().insert(extension);
    request
}

/// H4: the request's own extension wins over a handle's, and the outer handle's over the inner's.
#[tokio::test]
async fn the_most_specific_extension_wins() {
    let selam = stack();
    let [almaz, kaleb] = ["almaz", "kaleb"].map(|name| WithExtensionLayer::new(Subject::new(name)));
    let nested = ServiceBuilder::new().layer(&kaleb).layer(&almaz).layer(&selam).into_inner();
    let for_almaz = ServiceBuilder::new().layer(&almaz).layer(&selam).into_inner();
    let replaced = almaz.clone().with_extension(Subject::new("kaleb"));
    let replaced = ServiceBuilder::new().layer(&replaced).layer(&selam).into_inner();
    for (sent, expected) in [
        (send(&for_almaz, get(MODELS)).await, "Bearer jwt-of-almaz"),
        (send(&for_almaz, with(Subject::new("kaleb"))).await, "Bearer jwt-of-kaleb"),
        (send(&nested, get(MODELS)).await, "Bearer jwt-of-kaleb"),
        (send(&replaced, get(MODELS)).await, "Bearer jwt-of-kaleb"),
    ] {
        let sent = sent.unwrap();
        assert_eq!(values(&sent, "authorization"), [expected]);
        assert_eq!(values(&sent, "x-api-key"), [KEY]);
    }
}

/// H4: extensions of other types are added to those of the request.
#[tokio::test]
async fn each_type_is_decided_alone() {
    let selam = stack();
    let key_alone = WithExtensionLayer::new(RequestAuth::ApiKey).with_extension(Subject::new("almaz"));
    let layers = ServiceBuilder::new().layer(&key_alone).layer(&selam).into_inner();
    let sent = send(&layers, get(MODELS)).await.unwrap();
    assert_eq!(values(&sent, "authorization"), [format!("Bearer {KEY}")]);
    // The request chooses credentials, and the handle names the subject.
    let sent = send(&layers, with(RequestAuth::ApiKeyAndJwt)).await.unwrap();
    assert_eq!(values(&sent, "authorization"), ["Bearer jwt-of-almaz"]);
    let other = Credentials::bearer(ApiKey::new("sk-selam-other").unwrap());
    let sent = send(&layers, with(RequestAuth::Custom(other))).await.unwrap();
    assert_eq!(values(&sent, "authorization"), ["Bearer sk-selam-other"]);
    // An extension that nobody here reads passes through.
    let sent = send(&layers, with("note")).await.unwrap();
    assert_eq!(sent.extensions().get(), Some(&"note"));
    assert_eq!(values(&sent, "authorization"), [format!("Bearer {KEY}")]);
}

/// H4: without a subject nothing is sent, also after a handle of the same stack was used.
#[tokio::test]
async fn a_forgotten_subject_is_refused() {
    let simulator = Simulator::new();
    let selam = stack().layer(simulator.clone());
    let handle = selam.for_subject(&Subject::new("almaz"));
    let _ = handle.send(get(MODELS).map(|()| String::new())).await;
    let sent = simulator.requests();
    assert!(sent > 0);
    let error = selam.send(get(MODELS).map(|()| String::new())).await.unwrap_err();
    assert_eq!(error.auth().unwrap().kind(), AuthErrorKind::CredentialUnavailable);
    let inner = handle.get_ref().send(get(MODELS).map(|()| String::new())).await;
    assert_eq!(inner.unwrap_err().auth().unwrap().kind(), AuthErrorKind::CredentialUnavailable);
    assert_eq!(simulator.requests(), sent);
}

/// H4: a redirect to another origin, followed inside of the handle, loses the subject; outside, each hop gets it.
#[tokio::test]
async fn redirects_belong_outside() {
    let simulator = Simulator::new();
    let redirect = || {
        let answer =
            http::Response::builder().status(307).header("location", "https://other.example/v1/models");
        simulator.inject(Fault::Answer(answer.body(bytes::Bytes::new()).unwrap()));
    };
    let origins = tower_selam::Origins::selam().with_origin("https://other.example").unwrap();
    let jwts =
        PerSubject::new(|_: &Subject| source_fn(|_: Reason<Token>| std::future::ready(Token::new("jwt"))));
    let selam =
        SelamLayer::builder().with_api_key(key()).with_jwt(jwts).with_origins(origins).build().unwrap();
    let for_almaz = WithExtensionLayer::new(Subject::new("almaz"));
    let follow = FollowRedirectLayer::new;

    let inside =
        ServiceBuilder::new().layer(&for_almaz).layer(follow()).layer(&selam).service(simulator.clone());
    redirect();
    let error = inside.oneshot(get(MODELS).map(|()| String::new())).await.unwrap_err();
    assert_eq!(error.auth().unwrap().kind(), AuthErrorKind::CredentialUnavailable);
    assert_eq!(simulator.requests(), 1);

    let outside =
        ServiceBuilder::new().layer(follow()).layer(&for_almaz).layer(&selam).service(simulator.clone());
    redirect();
    let _ = outside.oneshot(get(MODELS).map(|()| String::new())).await;
    let received = simulator.received();
    assert_eq!(received[2].uri.host(), Some("other.example"));
    assert_eq!(received[2].headers["authorization"], "Bearer jwt");
}

/// H4, T2: handles share the stack, and no request carries the JWT of another's user.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn concurrent_handles_keep_their_subjects() {
    const USERS: usize = 4;
    const REQUESTS: usize = 50;
    let simulator = Simulator::new();
    let names: Vec<_> = (0..USERS).map(|number| format!("user-{number}")).collect();
    let minute = Duration::from_secs(60);
    let jwts: HashMap<_, _> =
        names.iter().map(|name| (name.clone(), simulator.mint_jwt(JwtAlgorithm::Es256, minute))).collect();
    let of_user = jwts.clone();
    let per_subject = PerSubject::new(move |subject: &Subject| {
        let jwt = of_user[subject.as_str()].clone();
        source_fn(move |_: Reason<Token>| std::future::ready(Token::new(jwt.clone())))
    });
    let key = ApiKey::new(simulator.issue_key()).unwrap();
    let layer = SelamLayer::builder().with_api_key(key).with_jwt(per_subject.clone()).build().unwrap();
    let sessions = layer.base_url().endpoint("audio/agent/sessions").unwrap();
    let selam = layer.layer(simulator.clone());

    let mut calls = JoinSet::new();
    for name in &names {
        let handle = selam.for_subject(&Subject::new(&**name));
        for _ in 0..REQUESTS {
            let request =
                Request::post(&sessions).header("x-user", name).body(r#"{"voice":"mekdes"}"#.to_owned());
            let handle = handle.clone();
            calls.spawn(async move { handle.send(request.unwrap()).await.unwrap().status() });
        }
    }
    assert!(calls.join_all().await.iter().all(|status| *status == 200));
    let received = simulator.received();
    assert_eq!(received.len(), USERS * REQUESTS);
    for sent in received {
        let user = sent.headers["x-user"].to_str().unwrap();
        assert_eq!(sent.headers["authorization"], format!("Bearer {}", jwts[user]));
    }
    assert_eq!(per_subject.len(), USERS, "the handles share one set");
}

/// T2: a handle has the auto traits of its service, and wraps any.
#[test]
fn handles_keep_auto_traits() {
    fn assert<T: Clone + Send + Sync + Unpin + 'static>(_: &T) {}
    let handle = stack().layer(Simulator::new()).for_subject(&Subject::new("almaz"));
    assert(&handle);
    assert(&WithExtensionLayer::new("note"));
    let any = WithExtension::new(
        tower::service_fn(|request: Request<()>| async move {
            Ok::<_, std::convert::Infallible>(*request.extensions().get::<u8>().unwrap())
        }),
        7_u8,
    );
    let mut any = tokio_test::task::spawn(async move { any.oneshot(get(MODELS)).await });
    assert_eq!(tokio_test::assert_ready!(any.poll()), Ok(7));
}

/// T1: readiness is that of the inner service.
#[tokio::test]
async fn readiness_is_passed_on() {
    let (mock, mut handle) = tower_test::mock::pair::<Request<()>, ()>();
    handle.allow(0);
    let mut service = tokio_test::task::spawn(WithExtension::new(mock, Subject::new("almaz")));
    let poll = |service: &mut tokio_test::task::Spawn<WithExtension<_>>| {
        service.enter(|cx, mut service| Service::<Request<()>>::poll_ready(&mut *service, cx))
    };
    assert!(poll(&mut service).is_pending());
    handle.allow(1);
    assert!(service.is_woken());
    assert!(poll(&mut service).is_ready());
}
