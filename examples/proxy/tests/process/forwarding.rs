//! Paths, queries, headers and statuses, compared byte for byte in both directions.

use http::{HeaderMap, HeaderValue, Method, Response, Version};
use tokio::io::AsyncWriteExt;

use crate::support::{
    Api, Caller, Launch, Protocol, TlsListener, assert_clean, assert_ended, empty, full, random, raw, read,
    read_head, read_to_end, response_head, secret, with_timeout,
};

/// Returns the header lines of a head, sorted by name.
fn sorted(head: &str) -> Vec<&str> {
    let mut lines: Vec<&str> = head.trim_end().split("\r\n").skip(1).collect();
    lines.sort_by_key(|line| line.split(':').next().map(str::to_ascii_lowercase));
    lines
}

#[tokio::test]
async fn requests_and_responses_are_stripped_over_http1() {
    let api = TlsListener::listen(Protocol::Http1).await;
    let key = secret(format!("sk-selam-{}", random()));
    let (name, token) = ("web", secret(random()));
    let proxy =
        Launch::for_api(&api).env("SELAM_API_KEY", &key).callers(&format!("{name}:{token}\n")).start().await;
    let host = api.base_url().replace("https://", "").replace("/v1", "");

    let mut caller = raw(&proxy).await;
    let head = format!(
        "POST /v1/chat/completions?a=1&token=theirs&b=%20x&&API_KEY=theirs&api%5Fkey=theirs&%74oken=theirs&c&=d&a=2 HTTP/1.1\r\n\
         Host: localhost\r\n\
         aUTHORIZATION: Basic dGhlaXJz\r\n\
         Authorization: Bearer {token}\r\n\
         X-Api-KEY: theirs\r\n\
         x-api-key: theirs too\r\n\
         API-key: theirs\r\n\
         X-Goog-Api-Key: theirs\r\n\
         Cookie: session=theirs\r\n\
         COOKIE: other=theirs\r\n\
         Proxy-Authorization: Basic dGhlaXJz\r\n\
         Proxy-Anything: theirs\r\n\
         Connection: keep-alive, X-Hop\r\n\
         Connection: authorization, x-api-key, te\r\n\
         X-Hop: theirs\r\n\
         Keep-Alive: timeout=5\r\n\
         TE: gzip;q=0.5, trailers\r\n\
         Upgrade: h2c\r\n\
         Proxy-Connection: keep-alive\r\n\
         X-Forwarded-For: 192.0.2.7\r\n\
         Content-Type: application/json\r\n\
         Content-Length: 12\r\n\
         X-Odd-Case: One\r\n\
         x-odd-case:   Two  \r\n\
         X-ODD-CASE: \"three\", four\r\n\
         X-Empty:\r\n\
         X-Latin: caf\u{e9}\r\n\
         Authorization-Info: kept\r\n\
         \r\n\
         {{\"a\": \"b\"  }}"
    );
    caller.write_all(head.as_bytes()).await.unwrap();

    let mut connection = api.accept().await;
    let sent = read_head(&mut connection).await;
    assert_eq!(sent.split("\r\n").next().unwrap(), "POST /v1/chat/completions?a=1&b=%20x&&c&=d&a=2 HTTP/1.1");
    let via =
        sorted(&sent).into_iter().find(|line| line.starts_with("via: 1.1 ")).expect("the proxy adds Via");
    let mut expected = vec![
        format!("authorization: Bearer {key}"),
        "authorization-info: kept".to_owned(),
        "content-length: 12".to_owned(),
        "content-type: application/json".to_owned(),
        format!("host: {host}"),
        via.to_owned(),
        "x-empty: ".to_owned(),
        "x-latin: caf\u{e9}".to_owned(),
        "x-odd-case: One".to_owned(),
        "x-odd-case: Two".to_owned(),
        "x-odd-case: \"three\", four".to_owned(),
    ];
    // `TE: trailers` may be forwarded; the rest of `TE` is hop-by-hop.
    let te = sorted(&sent).into_iter().find(|line| line.starts_with("te:"));
    if let Some(te) = te {
        assert_eq!(te, "te: trailers");
        expected.insert(5, te.to_owned());
    }
    assert_eq!(sorted(&sent), expected);
    let mut body = [0; 12];
    with_timeout(tokio::io::AsyncReadExt::read_exact(&mut connection, &mut body)).await.unwrap();
    assert_eq!(&body, b"{\"a\": \"b\"  }");
    // No other header carries a credential of the caller.
    assert!(!sent.contains("theirs") && !sent.contains(&token), "{sent}");

    // In the response, hop-by-hop headers are removed, and those that would speak for the proxy.
    let answer = "HTTP/1.1 207 Odd Reason\r\n\
         Content-Type: text/event-stream; charset=odd\r\n\
         Connection: X-Hop-Back\r\n\
         X-Hop-Back: end\r\n\
         Keep-Alive: timeout=7\r\n\
         Proxy-Authenticate: Basic\r\n\
         Set-Cookie: a=1\r\n\
         set-cookie: b=2\r\n\
         X-RateLimit-Remaining: 5\r\n\
         x-request-id: req_1\r\n\
         Date: Tue, 15 Nov 1994 08:12:31 GMT\r\n\
         Content-Length: 5\r\n\r\nhello";
    connection.write_all(answer.as_bytes()).await.unwrap();
    let head = response_head(&mut caller).await;
    assert!(head.starts_with("HTTP/1.1 207 "), "{head}");
    assert_eq!(
        sorted(&head).into_iter().filter(|line| !line.starts_with("proxy-authenticate")).collect::<Vec<_>>(),
        [
            "content-length: 5",
            "content-type: text/event-stream; charset=odd",
            "date: Tue, 15 Nov 1994 08:12:31 GMT",
            "x-ratelimit-remaining: 5",
            "x-request-id: req_1",
        ]
    );
    let mut body = [0; 5];
    with_timeout(tokio::io::AsyncReadExt::read_exact(&mut caller, &mut body)).await.unwrap();
    assert_eq!(&body, b"hello");
}

#[tokio::test]
async fn requests_are_stripped_over_http2() {
    let mut api = TlsListener::listen(Protocol::Http2).await.exchanges();
    let key = secret(format!("sk-selam-{}", random()));
    let proxy = Launch::for_api(&api).env("SELAM_API_KEY", &key).start().await;
    let caller = Caller::http2(&proxy);
    let mut request = caller
        .request(Method::PUT, "/v1/files/7?api_key=theirs&x=%2F")
        .header("authorization", "Bearer theirs")
        .header("authorization", "Bearer theirs")
        .header("x-api-key", "theirs")
        .header("api-key", "theirs")
        .header("x-goog-api-key", "theirs")
        .header("cookie", "a=theirs")
        .header("cookie", "b=theirs")
        .header("proxy-authorization", "theirs")
        .header("te", "trailers")
        .header("x-kept", "1")
        .header("x-kept", "2");
    request.headers_mut().unwrap().insert("user-agent", HeaderValue::from_static("test"));
    let sending = tokio::spawn({
        let request = request.body(full("body")).unwrap();
        async move { read(caller.send(request).await).await }
    });
    let exchange = api.next().await;
    let sent = &exchange.request;
    assert_eq!((sent.method(), sent.version()), (&Method::PUT, Version::HTTP_2));
    assert_eq!(sent.uri().path_and_query().unwrap(), "/v1/files/7?x=%2F");
    assert_eq!(format!("https://{}/v1", sent.uri().authority().unwrap()), api.base_url());
    let mut headers = sent.headers().clone();
    assert!(headers.remove("via").unwrap().to_str().unwrap().starts_with("2 "));
    headers.remove("te");
    let expected: HeaderMap = [
        ("authorization", &*format!("Bearer {key}")),
        ("content-length", "4"),
        ("user-agent", "test"),
        ("x-kept", "1"),
        ("x-kept", "2"),
    ]
    .into_iter()
    .fold(HeaderMap::new(), |mut all, (name, value)| {
        all.append(name, value.parse().unwrap());
        all
    });
    assert_eq!(headers, expected);
    exchange.respond(200, full("answer"));
    assert_eq!(sending.await.unwrap().body, "answer");
}

#[tokio::test]
async fn v1_is_replaced_by_the_base_url() {
    let mut api = TlsListener::listen(Protocol::Http1).await.exchanges();
    let origin = api.base_url().replace("/v1", "");
    // Base URLs with another path, with a trailing slash, and without a path.
    for (base, root) in [("/v1", "/v1"), ("/gateway/selam/v2/", "/gateway/selam/v2"), ("", "")] {
        let proxy = Launch::with_key(&api).args(["--base-url", &format!("{origin}{base}")]).start().await;
        let caller = Caller::http1(&proxy);
        for (method, below) in [
            ("GET", "/models"),
            ("HEAD", "/models"),
            ("POST", "/chat/completions?stream=true"),
            ("PUT", "/files/a%20b/%C3%A9?x=%2F&y=a+b&z=%7e"),
            ("PATCH", "/a;b=c/d:e@f/(g)!$&'*+,~"),
            ("DELETE", "/files/7"),
            ("OPTIONS", "/models?"),
            ("GET", "/models??a=?&b"),
            ("GET", "/models/org%2Fmodel"),
            ("GET", "/ends/"),
        ] {
            let request =
                caller.request(method.parse().unwrap(), &format!("/v1{below}")).body(empty()).unwrap();
            let sending = tokio::spawn({
                let caller = caller.clone();
                async move { read(caller.send(request).await).await }
            });
            let exchange = api.next().await;
            assert_eq!(exchange.request.method().as_str(), method);
            // An empty query may be dropped.
            let sent = exchange.request.uri().to_string();
            assert_eq!(sent.trim_end_matches('?'), format!("{root}{below}").trim_end_matches('?'));
            exchange.respond(200, empty());
            assert_eq!(sending.await.unwrap().status, 200);
        }
    }
}

#[tokio::test]
async fn other_and_ambiguous_paths_are_refused() {
    let mut api = TlsListener::listen(Protocol::Http1).await.exchanges();
    let proxy = Launch::with_key(&api).start().await;
    for path in ["/", "/v2/models", "/v1x", "/V1/models", "/v", "/models", "//v1/models"] {
        Caller::http1(&proxy).get(path).await.assert_error(404, "invalid_request_error", "not_found");
    }
    for path in [
        "/v1/../admin",
        "/v1/./models",
        "/v1/%2e%2e/admin",
        "/v1/.%2E/admin",
        "/v1//models",
        "/v1/a%2f%2fb",
        "/v1/..%2fadmin",
        "/v1/a\\b",
        "/v1/%6dodels",
        "/v1/models%00",
        "/v1/%zz",
        "/v1/..;/admin",
    ] {
        let mut caller = raw(&proxy).await;
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        caller.write_all(request.as_bytes()).await.unwrap();
        let answer = String::from_utf8(read_to_end(&mut caller).await).unwrap();
        assert!(answer.starts_with("HTTP/1.1 400 "), "{path}: {answer}");
    }
    api.assert_silent();
}

/// H6: such a request is refused even with a valid token, and the API receives nothing.
#[tokio::test]
async fn trace_and_connect_are_refused() {
    let mut api = TlsListener::listen(Protocol::Http1).await.exchanges();
    let token = secret(random());
    let proxy = Launch::with_key(&api).callers(&format!("web:{token}\n")).start().await;
    for (target, headers, status, code) in [
        ("TRACE /v1/models", "", 400, "invalid_request"),
        ("TRACE /v1/models", "Upgrade: websocket\r\nConnection: upgrade\r\n", 400, "invalid_request"),
        ("CONNECT /v1/models", "", 400, "invalid_request"),
        // The usual form of CONNECT has no path.
        ("CONNECT api.example:443", "", 404, "not_found"),
    ] {
        let mut caller = raw(&proxy).await;
        let request = format!(
            "{target} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n{headers}Connection: close\r\n\r\n"
        );
        caller.write_all(request.as_bytes()).await.unwrap();
        let answer = read_to_end(&mut caller).await;
        assert_clean("an answer", &answer);
        let answer = String::from_utf8(answer).unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{target}: {answer}");
        assert!(answer.contains(&format!(r#""code":"{code}""#)), "{target}: {answer}");
    }
    let http2 = Caller::http2(&proxy).with_token(&token);
    let answer =
        read(http2.send(http2.request(Method::TRACE, "/v1/models").body(empty()).unwrap()).await).await;
    answer.assert_error(400, "invalid_request_error", "invalid_request");

    // The first request that the API receives is one with another method.
    let sending = tokio::spawn(async move { http2.get("/v1/models").await });
    let received = api.next().await.respond(200, empty());
    assert_eq!(received.method, Method::GET);
    assert_eq!(sending.await.unwrap().status, 200);
    api.assert_silent();
}

#[tokio::test]
async fn empty_answers_keep_their_content_length() {
    for (callers, apis) in Protocol::PAIRS {
        let mut api = TlsListener::listen(apis).await.exchanges();
        let proxy = Launch::with_key(&api).start().await;
        let caller = Caller::new(&proxy, callers);
        for (method, status, length) in
            [("HEAD", 200, Some("1234")), ("GET", 304, None), ("GET", 204, None), ("GET", 200, Some("0"))]
        {
            let request = caller.request(method.parse().unwrap(), "/v1/files/7").body(empty()).unwrap();
            let sending = tokio::spawn({
                let caller = caller.clone();
                async move { caller.send(request).await }
            });
            let mut response = Response::builder().status(status);
            if let Some(length) = length {
                response = response.header("content-length", length);
            }
            api.next().await.answer(response.body(empty()).unwrap());
            let mut response = sending.await.unwrap();
            let answered = response.headers().get("content-length").and_then(|length| length.to_str().ok());
            assert_eq!(answered, length, "{callers:?} {apis:?} {method} {status}");
            assert_ended(response.body_mut()).await;
        }
    }
}

#[tokio::test]
async fn every_status_passes_and_redirects_are_not_followed() {
    let mut api = TlsListener::listen(Protocol::Http2).await.exchanges();
    let proxy = Launch::with_key(&api).start().await;
    let caller = Caller::http1(&proxy);
    for status in [
        200, 201, 202, 206, 299, 301, 302, 307, 308, 400, 402, 404, 408, 409, 413, 418, 422, 429, 451, 500,
        502, 503, 529, 599,
    ] {
        let sending = tokio::spawn({
            let caller = caller.clone();
            async move { caller.post("/v1/chat/completions", "{}").await }
        });
        let response = Response::builder()
            .status(status)
            .header("location", "https://elsewhere.example/")
            .header("retry-after", "7")
            .header("content-type", "application/x-odd")
            .body(full(vec![0, 159, 146, 150]))
            .unwrap();
        api.next().await.answer(response);
        let answer = sending.await.unwrap();
        assert_eq!((answer.status.as_u16(), &*answer.body), (status, &[0, 159, 146, 150][..]));
        assert_eq!(answer.headers["location"], "https://elsewhere.example/");
        assert_eq!(answer.headers["retry-after"], "7");
        assert_eq!(answer.headers["content-type"], "application/x-odd");
    }
    api.assert_silent();
}

#[tokio::test]
async fn healthz_needs_no_token() {
    let api = TlsListener::listen(Protocol::Http2).await;
    let token = secret(random());
    let proxy = Launch::with_key(&api)
        .callers(&format!("web:{token}"))
        .args(["--allow", "GET:/v1/models"])
        .start()
        .await;
    for caller in Protocol::BOTH.map(|protocol| Caller::new(&proxy, protocol)) {
        assert_eq!(caller.get("/healthz").await.status, 200);
        caller.post("/healthz", "").await.assert_error(405, "invalid_request_error", "method_not_allowed");
    }
}

#[tokio::test]
async fn loops_are_detected_by_via() {
    let mut api = TlsListener::listen(Protocol::Http1).await.exchanges();
    let token = secret(random());
    let proxy = Launch::with_key(&api).callers(&format!("web:{token}\n")).start().await;
    let caller = Caller::http1(&proxy).with_token(&token);
    let send = |via: Option<HeaderValue>| {
        let mut request = caller.request(Method::GET, "/v1/models");
        if let Some(via) = via {
            request = request.header("via", "1.1 other-gateway").header("via", via);
        }
        let (caller, request) = (caller.clone(), request.body(empty()).unwrap());
        tokio::spawn(async move { read(caller.send(request).await).await })
    };
    let sending = send(None);
    let via = api.next().await.respond(200, empty()).headers["via"].clone();
    assert_eq!(sending.await.unwrap().status, 200);
    send(Some(via)).await.unwrap().assert_error(508, "api_error", "loop_detected");
    // Other gateways in `Via` do not matter.
    let sending = send(Some(HeaderValue::from_static("1.1 selam-proxy")));
    api.next().await.respond(200, empty());
    assert_eq!(sending.await.unwrap().status, 200);
    api.assert_silent();
}
