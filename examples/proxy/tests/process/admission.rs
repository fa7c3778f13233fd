//! Requests that are refused before they reach the API: by host, by origin, by method, by path and by their shape.

use bytes::Bytes;
use http::{Method, Request};
use tokio::io::AsyncWriteExt;

use crate::support::{
    Api, Caller, Exchanges, Launch, Protocol, Proxy, TlsListener, assert_clean, empty, random, raw,
    read_to_end, secret, with_timeout,
};

/// Sends these bytes on a connection, and returns the status of the response; 0 if the connection closes without one.
async fn status_of(proxy: &Proxy, request: &[u8]) -> u16 {
    let mut caller = raw(proxy).await;
    caller.write_all(request).await.unwrap();
    let answer = read_to_end(&mut caller).await;
    assert_clean("an answer", &answer);
    let answer = String::from_utf8_lossy(&answer);
    answer.split(' ').nth(1).map_or(0, |status| status.parse().unwrap())
}

/// Sends a request over HTTP/2 as it is, and returns the status of the response; 0 if the stream is reset.
async fn http2_status_of(proxy: &Proxy, request: Request<()>) -> u16 {
    let (sender, connection) =
        with_timeout(h2::client::handshake(raw(proxy).await)).await.expect("the proxy speaks HTTP/2");
    let connection = tokio::spawn(connection);
    let mut sender: h2::client::SendRequest<Bytes> = with_timeout(sender.ready()).await.unwrap();
    let status = match sender.send_request(request, true) {
        Ok((response, _)) => with_timeout(response).await.map_or(0, |response| response.status().as_u16()),
        Err(_) => 0,
    };
    connection.abort();
    status
}

fn get(uri: &str, headers: &[(&str, &str)]) -> Request<()> {
    let build = |request: http::request::Builder, (name, value): &(&str, &str)| request.header(*name, *value);
    headers.iter().fold(Request::get(uri), build).body(()).unwrap()
}

/// Answers everything that arrives, and fails if something arrives that should not.
async fn open(api: &mut Exchanges, sending: impl Future<Output = u16>) -> u16 {
    let answering = async { api.next().await.respond(200, empty()) };
    tokio::join!(sending, answering).0
}

#[tokio::test]
async fn without_tokens_only_this_machine_is_served() {
    let mut api = TlsListener::listen(Protocol::Http1).await.exchanges();
    let proxy = Launch::with_key(&api).start().await;
    let port = proxy.address().port();
    for (host, more) in [
        ("evil.example", ""),
        ("evil.example:8080", ""),
        ("localhost.evil.example", ""),
        ("127.0.0.1.evil.example", ""),
        ("0.0.0.0", ""),
        ("192.0.2.7", ""),
        ("[::]", ""),
        ("x.localhost", ""),
        ("localhost", "Sec-Fetch-Site: cross-site"),
        ("localhost", "Sec-Fetch-Site: same-site"),
        ("localhost", "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: no-cors\r\nSec-Fetch-Dest: image"),
        ("localhost", "Sec-Fetch-Site: none\r\nSec-Fetch-Site: cross-site"),
        ("localhost", "Origin: https://evil.example"),
        ("localhost", "Origin: null"),
        ("localhost", "Origin: http://localhost\r\nOrigin: https://evil.example"),
        ("localhost", "Referer: https://evil.example/"),
        ("localhost", "Origin: https://evil.example\r\nConnection: Upgrade\r\nUpgrade: websocket"),
        ("evil.example", "Connection: Upgrade\r\nUpgrade: websocket"),
        ("localhost", "Forwarded: for=192.0.2.7"),
        ("localhost", "X-Forwarded-For: 127.0.0.1"),
        ("localhost", "X-Forwarded-Proto: https"),
        ("localhost", "X_Forwarded_For: 127.0.0.1"),
        ("localhost", "Via: 1.1 tunnel"),
        ("localhost", "CF-Ray: 1"),
        ("localhost", "X-Real-IP: 127.0.0.1"),
        // A header that `Connection` names counts as well.
        ("localhost", "Via: 1.1 tunnel\r\nConnection: via"),
        ("localhost", "Sec-Fetch-Site: cross-site\r\nConnection: sec-fetch-site"),
    ] {
        for path in ["/v1/models", "/metrics"] {
            let request =
                format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n{more}\r\nConnection: close\r\n\r\n");
            let request = request.replace("\r\n\r\nConnection", "\r\nConnection");
            assert_eq!(status_of(&proxy, request.as_bytes()).await, 403, "{request}");
            let headers: Vec<(&str, &str)> = more
                .split("\r\n")
                .filter_map(|line| line.split_once(": "))
                .filter(|(name, _)| !["Connection", "Upgrade"].contains(name))
                .collect();
            let request = get(&format!("http://{host}{path}"), &headers);
            if host != "localhost" || !headers.is_empty() {
                assert_eq!(http2_status_of(&proxy, request).await, 403, "{host} {more}");
            }
        }
    }
    // `Host` and URI, or `:authority`, disagree.
    for (uri, host) in [
        ("http://localhost/v1/models", "evil.example"),
        ("http://evil.example/v1/models", "localhost"),
        ("http://localhost:1/v1/models", "localhost:2"),
    ] {
        let request = format!("GET {uri} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        assert_eq!(status_of(&proxy, request.as_bytes()).await, 400, "{request}");
        assert_eq!(http2_status_of(&proxy, get(uri, &[("host", host)])).await, 400, "{uri} {host}");
    }
    assert_eq!(status_of(&proxy, b"GET /v1/models HTTP/1.0\r\n\r\n").await, 403);
    api.assert_silent();

    for host in [&format!("127.0.0.1:{port}"), "localhost", "LOCALHOST:1", "[::1]", "localhost."] {
        let plain = format!("GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        assert_eq!(open(&mut api, status_of(&proxy, plain.as_bytes())).await, 200, "{host}");
        let request = get(
            &format!("http://{host}/v1/models"),
            &[("sec-fetch-site", "none"), ("origin", "http://localhost:1")],
        );
        assert_eq!(open(&mut api, http2_status_of(&proxy, request)).await, 200, "{host}");
        let metrics = format!("GET /metrics HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        assert_eq!(status_of(&proxy, metrics.as_bytes()).await, 200, "{host}");
    }
    // The answer says what to do.
    let answer =
        Caller::http1(&proxy).request(Method::GET, "/v1/models").header("via", "1.1 x").body(empty());
    let answer = crate::support::read(Caller::http1(&proxy).send(answer.unwrap()).await).await;
    answer.assert_error(403, "authorization_error", "insufficient_permissions");
    assert!(answer.text().contains("--client-token-file"));
    api.assert_silent();
}

/// With client tokens, the token decides, and any name will do.
#[tokio::test]
async fn requests_of_ambiguous_shape_are_refused() {
    let mut api = TlsListener::listen(Protocol::Http1).await.exchanges();
    let token = secret(random());
    let proxy = Launch::with_key(&api).callers(&format!("web:{token}\n")).start().await;
    let authorization = format!("Authorization: Bearer {token}\r\nConnection: close");
    for (line, headers) in [
        ("POST /v1/files HTTP/1.1", "Content-Length: 0"),
        ("POST /v1/files HTTP/1.1", "Host: a\r\nHost: b\r\nContent-Length: 0"),
        ("POST /v1/files HTTP/1.1", "Host: a\r\nHost: a\r\nContent-Length: 0"),
        ("POST /v1/files HTTP/1.1", "Host: a, b\r\nContent-Length: 0"),
        ("POST /v1/files HTTP/1.1", "Host: u@a\r\nContent-Length: 0"),
        ("POST /v1/files HTTP/1.1", "Host : a\r\nContent-Length: 0"),
        ("POST http://a/v1/files HTTP/1.1", "Host: b\r\nContent-Length: 0"),
        ("POST http://u@a/v1/files HTTP/1.1", "Host: a\r\nContent-Length: 0"),
        ("POST /v1/files HTTP/1.1", "Host: a\r\nContent-Length: 1\r\nContent-Length: 2"),
        ("POST /v1/files HTTP/1.1", "Host: a\r\nContent-Length: 1, 2"),
        ("POST /v1/files HTTP/1.1", "Host: a\r\nContent-Length: +1"),
        ("POST /v1/files HTTP/1.1", "Host: a\r\nContent-Length: 0x1"),
        ("POST /v1/files HTTP/1.1", "Host: a\r\nContent-Length: 99999999999999999999"),
        ("POST /v1/files HTTP/1.1", "Host: a\r\nTransfer-Encoding: identity"),
        ("POST /v1/files HTTP/1.1", "Host: a\r\nTransfer-Encoding: xchunked"),
        ("POST /v1/files HTTP/1.1", "Host: a\r\nTransfer-Encoding: chunked, identity"),
        ("POST /v1/files HTTP/1.1", "Host: a\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n"),
        ("POST /v1/files HTTP/1.1", "Host: a\r\nX: 1\r\n Transfer-Encoding: chunked\r\n\r\n0\r\n"),
        ("POST /v1/files HTTP/1.0", "Host: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"),
        ("POST /v1/files HTTP/1.1", "Host: a\r\nTransfer-Encoding:\x0bchunked"),
        ("POST /v1/files HTTP/1.1", "Host: a\r\nX: a\0b\r\nContent-Length: 0"),
        ("POST /v1/files HTTP/1.1", "Host: a\r\nX: a\rb\r\nContent-Length: 0"),
        ("POST /v1/files HTTP/2.0", "Host: a\r\nContent-Length: 0"),
        ("POST  /v1/files HTTP/1.1", "Host: a\r\nContent-Length: 0"),
        ("POST /v1/fi les HTTP/1.1", "Host: a\r\nContent-Length: 0"),
        ("POST /v1/files\tHTTP/1.1", "Host: a\r\nContent-Length: 0"),
    ] {
        let request = format!("{line}\r\n{authorization}\r\n{headers}\r\n\r\n");
        let status = tokio::select! {
            status = status_of(&proxy, request.as_bytes()) => status,
            _ = api.next() => panic!("the API received {request:?}"),
        };
        assert!([0, 400, 501, 505].contains(&status), "{status} {request:?}");
    }
    api.assert_silent();

    // These are fine.
    for (line, headers) in [
        ("POST /v1/files HTTP/1.1", "Host: the.proxy\r\nContent-Length: 0"),
        ("POST http://the.proxy/v1/files HTTP/1.1", "Host: the.proxy\r\nContent-Length: 0"),
        ("POST http://the.proxy/v1/files HTTP/1.1", "Host: THE.PROXY:80\r\nContent-Length: 0"),
        ("POST /v1/files HTTP/1.0", "Content-Length: 0"),
        (
            "POST /v1/files HTTP/1.1",
            "Host: a\r\nContent-Length: 0\r\nSec-Fetch-Site: cross-site\r\nX-Forwarded-For: 1",
        ),
        ("POST /v1/files HTTP/1.1", "Host: a\r\nTransfer-Encoding: chunked\r\n\r\n0;extension=\"x\"\r\n"),
        // `Transfer-Encoding` counts, and `Content-Length` is removed: RFC 9112 section 6.3.
        (
            "POST /v1/files HTTP/1.1",
            "Host: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
        ),
        (
            "POST /v1/files HTTP/1.1",
            "Host: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n",
        ),
    ] {
        let request = format!("{line}\r\n{authorization}\r\n{headers}\r\n\r\n");
        assert_eq!(open(&mut api, status_of(&proxy, request.as_bytes())).await, 200, "{request:?}");
    }
}

/// H6: methods that echo or tunnel are refused under all rules, in all spellings.
#[tokio::test]
async fn methods_outside_the_list_are_refused() {
    let mut api = TlsListener::listen(Protocol::Http1).await.exchanges();
    let (token, key) = (secret(random()), secret(format!("sk-selam-{}", random())));
    let callers = format!("web:{token}\n");
    let launch = || Launch::for_api(&api).env("SELAM_API_KEY", &key).callers(&callers);
    let rules = ["--allow", "*:/v1/*", "--allow", "PROPFIND:/v1/models"];
    let (all, ruled) = (launch().start().await, launch().args(rules).start().await);
    let error = launch().args(["--allow", "TRACE:/v1/models"]).fail().await;
    assert!(error.contains("never forwarded"), "{error}");
    let bearer = format!("Bearer {token}");
    for proxy in [&all, &ruled] {
        for method in [
            "TRACE", "CONNECT", "TRACK", "DEBUG", "trace", "Trace", "connect", "PURGE", "get", "QUERY", "PRI",
        ] {
            for target in ["/v1/models", "http://localhost/v1/models"] {
                let request = format!(
                    "{method} {target} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {bearer}\r\nConnection: close\r\n\r\n"
                );
                let status = status_of(proxy, request.as_bytes()).await;
                assert!([0, 400, 403].contains(&status), "{status} {request}");
            }
            let mut request = get("http://localhost/v1/models", &[("authorization", &bearer)]);
            *request.method_mut() = method.parse().unwrap();
            let status = http2_status_of(proxy, request).await;
            assert!([0, 400, 403, 404].contains(&status), "{status} {method}");
        }
        // CONNECT without a path, and extended CONNECT (RFC 8441).
        let mut request = get("http://api.example:443", &[("authorization", &bearer)]);
        *request.method_mut() = Method::CONNECT;
        *request.uri_mut() = "api.example:443".parse().unwrap();
        assert!([0, 400, 404].contains(&http2_status_of(proxy, request).await));
        let mut request = get("http://localhost/v1/models", &[("authorization", &bearer)]);
        *request.method_mut() = Method::CONNECT;
        request.extensions_mut().insert(h2::ext::Protocol::from_static("websocket"));
        assert!([0, 400, 403, 404].contains(&http2_status_of(proxy, request).await));
        api.assert_silent();
        for method in ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"] {
            let request = format!(
                "{method} /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: {bearer}\r\nConnection: close\r\n\r\n"
            );
            assert_eq!(open(&mut api, status_of(proxy, request.as_bytes())).await, 200, "{request}");
        }
    }
    let request = format!(
        "PROPFIND /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: {bearer}\r\nConnection: close\r\n\r\n"
    );
    assert_eq!(open(&mut api, status_of(&ruled, request.as_bytes())).await, 200);
}

/// Neither rules nor the choice of credentials can be got around by the spelling of a path.
#[tokio::test]
async fn no_spelling_of_a_path_gets_around_a_rule() {
    let mut api = TlsListener::listen(Protocol::Http1).await.exchanges();
    let key = secret(format!("sk-selam-{}", random()));
    let jwt = secret(format!("{0}.{0}.{0}", random()));
    let launch = || Launch::for_api(&api).env("SELAM_API_KEY", &key).env("SELAM_JWT", &jwt);
    let paths = ["--jwt-path", "/v1/audio"];
    let all = launch().args(paths).start().await;
    let ruled =
        launch().args(paths).args(["--allow", "GET:/v1/models/*", "--allow", "GET:/v1/files"]).start().await;
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    let climbing = "
        .. . %2e%2e .%2E ..; ..;x=1 ..%3B ..%3bx ..%20 .%20. ..%09 ..%00 ..%0d ..%2F ..%2f.. a%2F..%2F..%2Fb ..%5C ..%5c..
        %252e%252e ..%252F %25252e. ..%255c %c0%ae%c0%ae %c0%2e. %e0%80%ae. %f0%80%80%ae. ..%c0%af ..%c1%9c %u002e%u002e
        ..%u2215x %EF%BC%8E%EF%BC%8E .%EF%BC%8E ..%EF%BC%8F %E2%80%A5 ..%E2%80%8B ... ..%C2%A0 a%00 a%5Cb x. x%20 %2F a%2F%2Fb
        %zz % %2 %6d %ff
    ";
    for segment in climbing.split_whitespace() {
        for path in [
            format!("/v1/models/{segment}/files/7"),
            format!("/v1/models/{segment}"),
            format!("/v1/audio/{segment}/x"),
        ] {
            for proxy in [&all, &ruled] {
                assert_eq!(status_of(proxy, get(&path).as_bytes()).await, 400, "{path}");
            }
        }
    }
    for path in [
        "/v1/models",
        "/v1/models/",
        "/v1/files/",
        "/v1/files/7",
        "/v1/files%2F7",
        "/v1/models%2Fa",
        "/v1/Models/a",
        "/v1/models;x/a",
    ] {
        assert_eq!(status_of(&ruled, get(path).as_bytes()).await, 403, "{path}");
    }
    api.assert_silent();

    for (proxy, path, has_jwt) in [
        (&ruled, "/v1/models/org%2Fmodel", false),
        (&ruled, "/v1/models/a%20b;v=1", false),
        (&ruled, "/v1/files", false),
        (&all, "/v1/models/org%2Fmodel", false),
        (&all, "/v1/audio/a%2Fb", true),
        (&all, "/v1/audio%2Fb", false),
        (&all, "/v1/audio;x/b", false),
        (&all, "/v1/Audio/b", false),
    ] {
        let mut caller = raw(proxy).await;
        caller.write_all(get(path).as_bytes()).await.unwrap();
        let head = api.next().await.respond(200, empty());
        assert_eq!(head.uri, path);
        assert_eq!(head.headers.contains_key("x-api-key"), has_jwt, "{path}");
        read_to_end(&mut caller).await;
    }
    assert!(api.base_url().ends_with("/v1"));
}
