//! J12: requests with `Expect: 100-continue` whose first attempt the API rejects.

use std::sync::Arc;

use http::{Method, Response};
use http_body_util::BodyExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{
    Api, Body, Caller, Exchange, Launch, Protocol, Proxy, TlsListener, full, random, raw, read, read_head,
    response_head, secret, with_timeout,
};

const INVALID_KEY: &str =
    r#"{"error":{"message":"no","type":"authentication_error","code":"invalid_api_key"}}"#;

/// When the API answers with a 401.
#[derive(Clone, Copy, Debug)]
enum Rejects {
    BeforeTheBody,
    AfterTheBody,
}

fn rejection() -> Response<Body> {
    Response::builder()
        .status(401)
        .header("content-type", "application/json")
        .body(full(INVALID_KEY))
        .unwrap()
}

/// Starts a proxy whose key is read from a file, and returns the key that replaces it.
async fn rotating(api: &impl Api) -> (Proxy, String) {
    let key = || secret(format!("sk-selam-{}", random()));
    (Launch::for_api(api).key_file(&key()).start().await, key())
}

/// Sends a request with `Expect: 100-continue`, waits for it over HTTP/1.1, and returns the status of the response.
async fn upload(proxy: &Proxy, protocol: Protocol, body: Vec<u8>) -> u16 {
    match protocol {
        Protocol::Http1 => {
            let mut caller = raw(proxy).await;
            let head = format!(
                "POST /v1/files HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: {}\r\n\r\n",
                body.len()
            );
            caller.write_all(head.as_bytes()).await.unwrap();
            let head = response_head(&mut caller).await;
            assert!(head.starts_with("HTTP/1.1 100 "), "{head}");
            caller.write_all(&body).await.unwrap();
            let head = response_head(&mut caller).await;
            head.split(' ').nth(1).unwrap().parse().unwrap()
        }
        Protocol::Http2 => {
            let caller = Caller::http2(proxy);
            let request = caller.request(Method::POST, "/v1/files").header("expect", "100-continue");
            read(caller.send(request.body(full(body)).unwrap()).await).await.status.as_u16()
        }
    }
}

/// J12: with any version of HTTP on either side, whether or not the API has read the body.
#[tokio::test]
async fn an_expecting_request_is_replayed() {
    for (callers, apis) in Protocol::PAIRS {
        for rejects in [Rejects::BeforeTheBody, Rejects::AfterTheBody] {
            let mut api = TlsListener::listen(apis).await.exchanges();
            let (proxy, key) = rotating(&api).await;
            let (proxy, body) = (Arc::new(proxy), vec![b'u'; 100_000]);
            let (uploading, asked) = (Arc::clone(&proxy), body.clone());
            let calling = tokio::spawn(async move { upload(&uploading, callers, asked).await });

            let Exchange { request, answer } = api.next().await;
            let (head, mut received) = request.into_parts();
            assert_eq!(head.headers["expect"], "100-continue");
            if matches!(rejects, Rejects::AfterTheBody) {
                let read = with_timeout((&mut received).collect()).await.unwrap().to_bytes();
                assert!(read == body, "{callers:?} {apis:?} {rejects:?}");
            }
            proxy.scratch().write("key", &key);
            answer.send(rejection()).unwrap();
            // Otherwise the API neither reads the body nor closes the connection. If it takes so long that the proxy has begun
            // to send the body, the proxy cannot get it back.
            drop(received);

            let Exchange { request, answer } = api.next().await;
            assert_eq!(request.headers()["authorization"], format!("Bearer {key}"));
            assert_eq!(request.headers()["expect"], "100-continue");
            let read = with_timeout(request.into_body().collect()).await.unwrap().to_bytes();
            assert!(read == body, "{callers:?} {apis:?} {rejects:?}");
            answer.send(Response::new(full("well"))).unwrap();
            assert_eq!(calling.await.unwrap(), 200, "{callers:?} {apis:?} {rejects:?}");
        }
    }
}

/// J12: an API that never sends `100 Continue` gets the body after a while, in each attempt.
#[tokio::test]
async fn an_api_without_continue_gets_the_replayed_body() {
    let api = TlsListener::listen(Protocol::Http1).await;
    let (proxy, key) = rotating(&api).await;
    let mut caller = raw(&proxy).await;
    let head =
        "POST /v1/files HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n";
    caller.write_all(head.as_bytes()).await.unwrap();
    let mut connection = api.accept().await;
    read_head(&mut connection).await;
    assert!(response_head(&mut caller).await.starts_with("HTTP/1.1 100 "));
    caller.write_all(b"body").await.unwrap();
    let mut body = [0; 4];
    with_timeout(connection.read_exact(&mut body)).await.unwrap();
    proxy.scratch().write("key", &key);
    let rejection =
        format!("HTTP/1.1 401 Unauthorized\r\nContent-Length: {}\r\n\r\n{INVALID_KEY}", INVALID_KEY.len());
    connection.write_all(rejection.as_bytes()).await.unwrap();

    let head = read_head(&mut connection).await;
    assert!(head.contains(&key) && head.contains("expect: 100-continue"), "{head}");
    with_timeout(connection.read_exact(&mut body)).await.unwrap();
    assert_eq!(&body, b"body");
    connection.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await.unwrap();
    assert!(response_head(&mut caller).await.starts_with("HTTP/1.1 200 "));
}
