//! What the service answers, and where it listens.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests")]

use std::{process::Stdio, time::Duration};

use axum::{
    body::Body,
    http::{Method, Request, Response, StatusCode},
};
use example_ext_authz::{Authorizer, Callers};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::Command,
    time::timeout,
};
use tower::ServiceExt;
use tower_selam::{
    ApiKey, PerSubject, Provider, Refreshing, SelamLayer, SelamLayerBuilder, Subject, Token,
    source::{Reason, SourceError, source_fn},
};

const KEY: &str = "sk-selam-canary-0123456789abcdef";
const CALLERS: &str = "web:token-of-the-web-site mobile:token-of-the-mobile-app";

fn builder(key: impl Into<Provider<ApiKey>>) -> SelamLayerBuilder {
    SelamLayer::builder().with_api_key(key)
}

fn key() -> ApiKey {
    ApiKey::new(KEY).unwrap()
}

fn authorizer(layer: SelamLayerBuilder) -> Authorizer {
    Authorizer::new(layer.build().unwrap(), Callers::parse(CALLERS).unwrap())
}

async fn ask(authorizer: Authorizer, method: Method, path: &str, authorization: &[&str]) -> Response<Body> {
    let mut request = Request::builder().method(method).uri(path);
    for value in authorization {
        request = request.header("authorization", *value);
    }
    let response = authorizer.router().oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
    if path != "/" {
        assert_eq!(response.headers()["cache-control"], "no-store");
    }
    response
}

fn header<'a>(response: &'a Response<Body>, name: &str) -> Option<&'a str> {
    response.headers().get(name).map(|value| value.to_str().unwrap())
}

#[tokio::test]
async fn known_callers_get_the_credentials() {
    let bearer = format!("Bearer {KEY}");
    for authorization in ["Bearer token-of-the-web-site", "bearer  token-of-the-mobile-app"] {
        for path in ["/authorize", "/authorize/v1/chat/completions?n=1"] {
            let response = ask(authorizer(builder(key())), Method::POST, path, &[authorization]).await;
            assert_eq!(
                (response.status(), header(&response, "authorization")),
                (StatusCode::OK, Some(&*bearer))
            );
            assert!(response.headers()["authorization"].is_sensitive());
            // Envoy removes the caller's own.
            assert_eq!(header(&response, "x-envoy-auth-headers-to-remove"), Some("x-api-key"));
            assert!(!response.headers().contains_key("x-api-key"));
        }
    }
    assert_eq!(ask(authorizer(builder(key())), Method::GET, "/", &[]).await.status(), StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn unknown_callers_get_nothing() {
    for authorization in [
        &[][..],
        &["Bearer "],
        &["Bearer token-of-the-web-sit"],
        &["Basic token-of-the-web-site"],
        &["token-of-the-web-site"],
        &["Bearer token-of-the-web-site", "Bearer token-of-the-web-site"],
        &["Bearer sk-selam-canary-0123456789abcdef"],
    ] {
        let response = ask(authorizer(builder(key())), Method::GET, "/authorize", authorization).await;
        assert_eq!(response.status(), StatusCode::UNAUTHORIZED, "{authorization:?}");
        assert_eq!(header(&response, "www-authenticate"), Some("Bearer"));
        assert!(!response.headers().contains_key("authorization"));
    }
    let response =
        ask(authorizer(builder(key())), Method::TRACE, "/authorize", &["Bearer token-of-the-web-site"]).await;
    assert_eq!(response.status(), StatusCode::FORBIDDEN);
    assert!(!response.headers().contains_key("authorization"));
}

#[tokio::test]
async fn each_caller_has_its_jwt() {
    let jwts = PerSubject::new(|caller: &Subject| {
        let jwt = Token::new(format!("jwt.of.{}", caller.as_str()));
        source_fn(move |_: Reason<Token>| std::future::ready(jwt.clone()))
    });
    for (token, jwt) in
        [("token-of-the-web-site", "jwt.of.web"), ("token-of-the-mobile-app", "jwt.of.mobile")]
    {
        let authorizer = authorizer(builder(key()).with_jwt(jwts.clone())).per_caller();
        let response = ask(authorizer, Method::GET, "/authorize", &[&format!("Bearer {token}")]).await;
        assert_eq!(header(&response, "authorization"), Some(&*format!("Bearer {jwt}")));
        assert_eq!(header(&response, "x-api-key"), Some(KEY));
        assert_eq!(header(&response, "x-envoy-auth-headers-to-remove"), None);
    }
}

#[tokio::test]
async fn outage_is_a_503_with_retry_after() {
    let sealed = || {
        Refreshing::new(source_fn(|_: Reason<ApiKey>| async {
            let error = SourceError::transient("the vault is sealed");
            Err::<ApiKey, _>(error.with_retry_after(Duration::from_millis(6_500)))
        }))
    };
    for path in ["/authorize", "/ready"] {
        let token = ["Bearer token-of-the-web-site"];
        let response = ask(authorizer(builder(sealed())), Method::GET, path, &token).await;
        assert_eq!(
            (response.status(), header(&response, "retry-after")),
            (StatusCode::SERVICE_UNAVAILABLE, Some("7"))
        );
        let response = ask(authorizer(builder(key())), Method::GET, path, &token).await;
        assert_eq!(response.status(), StatusCode::OK);
    }
}

#[test]
fn callers_are_checked_and_hidden() {
    let callers = Callers::parse(CALLERS).unwrap();
    assert_eq!(format!("{callers:?}"), r#"{"web", "mobile"}"#);
    for invalid in ["", "web", ":token-of-the-web-site", "web:short", "../web:token-of-the-web-site"] {
        let error = Callers::parse(invalid).unwrap_err().to_string();
        assert!(!error.contains("token-of"), "{error}");
    }
}

#[tokio::test]
async fn other_addresses_have_to_be_allowed() {
    let start = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_example-ext-authz"));
        command.args(arguments).env("SELAM_API_KEY", KEY).env("CALLERS", CALLERS).kill_on_drop(true);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let refused = start(&["--listen", "0.0.0.0:0"]).wait_with_output();
    let output = timeout(Duration::from_secs(30), refused).await.unwrap().unwrap();
    assert!(!output.status.success() && output.stdout.is_empty());
    assert!(String::from_utf8(output.stderr).unwrap().contains("--dangerous-listen-remote"));

    for arguments in
        [&["--listen", "127.0.0.1:0"][..], &["--listen", "0.0.0.0:0", "--dangerous-listen-remote"]]
    {
        let mut child = start(arguments);
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let line = timeout(Duration::from_secs(30), lines.next_line()).await.unwrap().unwrap();
        assert!(line.unwrap().starts_with("listening on http://"));
    }
}
