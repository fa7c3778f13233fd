//! Which parts of a caller's request are removed, and which are forwarded.

use std::{convert::Infallible, future::ready};

use http::{HeaderName, Request, Response, Version};
use proptest::prelude::*;
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_selam::{
    ApiKeyLayer, RequestAuth,
    inbound::{StripCredentialsLayer, StripHopByHopLayer},
};

use crate::support::{KEY, MODELS, get, key, send, values};

type Headers = Vec<(String, Vec<u8>)>;

fn headers(map: &http::HeaderMap) -> Headers {
    map.iter().map(|(name, value)| (name.to_string(), value.as_bytes().to_vec())).collect()
}

fn request(uri: &str, headers: &[(&str, &str)]) -> Request<()> {
    let build = |request: http::request::Builder, (name, value): &(&str, &str)| request.header(*name, *value);
    headers.iter().fold(Request::get(uri), build).body(()).unwrap()
}

async fn stripped(uri: &str) -> String {
    send(&StripCredentialsLayer::new(), get(uri)).await.unwrap().uri().to_string()
}

/// Sends `given` headers through the layer, and returns the headers that go upstream.
async fn forwarded(version: Version, given: &[(&str, &str)]) -> Headers {
    let mut request = request(MODELS, given);
    *request.version_mut() = version;
    headers(send(&StripHopByHopLayer::new(), request).await.unwrap().headers())
}

/// Answers a request with `asked` headers by a response with `given` headers, and returns the headers that the caller gets.
async fn returned(asked: &[(&str, &str)], status: u16, given: &[(&str, &str)]) -> Headers {
    let build =
        |response: http::response::Builder, (name, value): &(&str, &str)| response.header(*name, *value);
    let response = given.iter().fold(Response::builder().status(status), build).body(()).unwrap();
    let mut response = Some(response);
    let api = service_fn(move |_: Request<()>| ready(Ok::<_, Infallible>(response.take().unwrap())));
    headers(StripHopByHopLayer::new().layer(api).oneshot(request(MODELS, asked)).await.unwrap().headers())
}

fn pairs(expected: &[(&str, &str)]) -> Headers {
    expected.iter().map(|(name, value)| ((*name).to_owned(), value.as_bytes().to_vec())).collect()
}

#[tokio::test]
async fn credential_headers_are_removed() {
    for name in [
        "Authorization",
        "AUTHORIZATION",
        "X-API-Key",
        "x_api_key",
        "X-Api_Key",
        "api-key",
        "Api_Key",
        "x-goog-api-key",
        "X_Goog_Api_Key",
        "Cookie",
        "Proxy-Authorization",
        "Proxy_Authorization",
        "proxy-connection",
        "Proxy-Anything-Else",
        "proxy-",
    ] {
        let given = [(name, "theirs"), ("accept", "*/*"), (name, "theirs too")];
        let sent = send(&StripCredentialsLayer::new(), request(MODELS, &given)).await.unwrap();
        assert_eq!(headers(sent.headers()), pairs(&[("accept", "*/*")]), "{name}");
    }
}

#[tokio::test]
async fn other_headers_stay_byte_for_byte() {
    let mut given = request(
        "https://api.selamgpt.com/v1/a%2fb//c/../d;x?q=%C3%a9+&&=&b",
        &[
            ("content-type", "multipart/form-data; boundary=\"a b\""),
            ("authorization-x", "1"),
            ("api-keys", "1"),
            ("x-cookie", "1"),
            ("x-request-id", "1"),
            ("traceparent", "1"),
            ("cdn-loop", "1"),
            ("prox", "1"),
            ("accept", "a"),
            ("accept", " b ,"),
            ("trailer", "x-sum"),
        ],
    );
    given.headers_mut().append("x-odd", http::HeaderValue::from_bytes(b"\xff\t\x80").unwrap());
    *given.version_mut() = Version::HTTP_10;
    let (expected, uri) = (headers(given.headers()), given.uri().clone());
    let sent = send(&StripCredentialsLayer::new(), given).await.unwrap();
    assert_eq!(headers(sent.headers()), expected);
    assert_eq!((sent.uri(), sent.version()), (&uri, Version::HTTP_10));
}

#[tokio::test]
async fn credential_parameters_are_removed() {
    for parameter in [
        "token=theirs",
        "api_key=theirs",
        "token",
        "token=",
        "=token=theirs",
        "TOKEN=theirs",
        "Api_Key=theirs",
        "%74oken=theirs",
        "%54%4f%4B%45%4e=theirs",
        "api%5fkey=theirs",
        "api%5Fkey=theirs",
        "%2574oken=theirs",
        "%252574oken=theirs",
        "api-key=theirs",
        "api.key=theirs",
        "api+key=theirs",
        "api%20key=theirs",
        "+token=theirs",
        "%20token%09=theirs",
        "token%00=theirs",
        "token[]=theirs",
        "token%5B0%5D=theirs",
        "api_key[a]=theirs",
        "token%3Dx=theirs",
        "token=a=b",
    ] {
        let uri = |query: &str| format!("https://api.selamgpt.com/v1/models{query}");
        let expected = if parameter.starts_with('=') { "?=token=theirs" } else { "" };
        assert_eq!(stripped(&uri(&format!("?{parameter}"))).await, uri(expected), "{parameter}");
        if expected.is_empty() {
            for (query, expected) in [
                (format!("?a=1&{parameter}"), "?a=1"),
                (format!("?{parameter}&a=1"), "?a=1"),
                (format!("?a=1&{parameter}&b=2"), "?a=1&b=2"),
                (format!("?{parameter}&{parameter}&a=1&{parameter}"), "?a=1"),
                (format!("?a=1;{parameter}"), "?a=1"),
                (format!("?{parameter};a=1"), "?a=1"),
                // `&` is kept: a server that does not split at `;` still reads the same parameters.
                (format!("?a=1;{parameter}&b=2"), "?a=1&b=2"),
                (format!("?a=1&{parameter};b=2"), "?a=1&b=2"),
                (format!("?a;{parameter};b"), "?a;b"),
                (format!("?a;b&{parameter}"), "?a;b"),
                (format!("?a&{parameter}&"), "?a&"),
                (format!("?q=%C3%a9+%2b&&{parameter}&=&%zz"), "?q=%C3%a9+%2b&&=&%zz"),
            ] {
                assert_eq!(stripped(&uri(&query)).await, uri(expected), "{query}");
            }
        }
    }
}

#[tokio::test]
async fn other_parameters_stay() {
    for uri in [
        "https://api.selamgpt.com/v1/models",
        "https://api.selamgpt.com/v1/models?",
        "https://api.selamgpt.com/v1/models?tokens=1&max_token=2&xtoken&api_keys&apikey&my_api_key=3&q=token",
        "https://api.selamgpt.com/v1/models?a=token=1&q=%26token%3D2&to+ken=3&%74=4&max-token",
        "https://api.selamgpt.com/token=1/api_key=2?x=%74oken",
        "/v1/models?limit=20",
        "*",
    ] {
        assert_eq!(stripped(uri).await, uri);
    }
    assert_eq!(stripped("/v1/models?limit=20&token=1").await, "/v1/models?limit=20");
    assert_eq!(stripped("https://api.selamgpt.com?token=1&x=2").await, "https://api.selamgpt.com/?x=2");
}

#[tokio::test]
async fn extra_headers_and_parameters_are_removed() {
    let layer = StripCredentialsLayer::new()
        .with_header(HeaderName::from_static("x-session"))
        .with_query_parameter("access_token")
        .with_query_parameter("Key");
    let given = request(
        "/v1?access%5ftoken=1&key=2&keys=3&token=4",
        &[("X_Session", "1"), ("x-sessions", "2"), ("cookie", "3")],
    );
    let sent = send(&layer, given).await.unwrap();
    assert_eq!(sent.uri(), "/v1?keys=3");
    assert_eq!(headers(sent.headers()), pairs(&[("x-sessions", "2")]));
}

#[tokio::test]
async fn extensions_and_responses_are_untouched() {
    let mut given = get("/v1?token=1");
    given.extensions_mut().insert(RequestAuth::ApiKey);
    given.extensions_mut().insert("theirs");
    let service = StripCredentialsLayer::new().layer(service_fn(|request: Request<()>| async move {
        assert!(matches!(request.extensions().get(), Some(RequestAuth::ApiKey)));
        assert_eq!(request.extensions().get(), Some(&"theirs"));
        Ok::<_, Infallible>(("set-cookie", request.uri().to_string()))
    }));
    assert_eq!(service.oneshot(given).await.unwrap(), ("set-cookie", "/v1".to_owned()));
}

#[test]
fn stripping_nothing_allocates_nothing() {
    let api = service_fn(|request: Request<()>| {
        let response = Response::new(());
        drop(request);
        ready(Ok::<_, Infallible>(response))
    });
    let layers = ServiceBuilder::new().layer(StripHopByHopLayer::new()).layer(StripCredentialsLayer::new());
    let mut service = layers.service(api);
    let uri = "https://api.selamgpt.com/v1/models?limit=20&q=%C3%A9&after=m_1";
    let mut given =
        Some(request(uri, &[("accept", "*/*"), ("x-custom", "1"), ("content-type", "text/plain")]));
    let counted = allocation_counter::measure(|| {
        let call = service.call(given.take().unwrap());
        let mut call = std::pin::pin!(call);
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(call.as_mut().poll(&mut context).is_ready());
    });
    assert_eq!(counted.count_total, 0);
}

proptest! {
    /// Whatever an edge calls its next header, it belongs to its family.
    #[test]
    fn families_are_removed_in_every_spelling(
        family in proptest::sample::select(vec![
            "cf-", "x-forwarded-", "x-amz-cf-", "x-amzn-oidc-", "cloudfront-", "fastly-", "akamai-", "fly-", "x-vercel-", "x-nf-",
            "x-azure-", "x-arr-", "x-ms-", "x-goog-", "x-envoy-", "x-original-", "x-real-", "x-auth-request-", "x-pomerium-",
            "x-authentik-", "tailscale-", "remote-", "x-token-", "x-ssl-", "x-ssl-client-", "client-cert-", "proxy-", "sec-fetch-",
        ]),
        rest in "[a-z0-9]{1,8}([-_][a-z0-9]{1,8}){0,2}",
        marks in proptest::collection::vec(proptest::sample::select(vec!['-', '_', '.', '~']), 4),
    ) {
        let mut marks = marks.into_iter();
        let spell = |letter: char| if letter == '-' { marks.next().unwrap_or('_') } else { letter };
        let name: String = format!("{family}{rest}").chars().map(spell).collect();
        let mut headers = http::HeaderMap::new();
        headers.insert(HeaderName::from_bytes(name.as_bytes()).unwrap(), "1".parse().unwrap());
        StripCredentialsLayer::new().strip_trailers(&mut headers);
        prop_assert!(headers.is_empty(), "{}", name);
    }

    #[test]
    fn other_headers_are_kept(name in "(openai|x-stainless|content|accept|x-request|traceparent|idempotency)(-(id|key|type|lang|os|version)){0,2}") {
        let mut headers = http::HeaderMap::new();
        headers.insert(HeaderName::from_bytes(name.as_bytes()).unwrap(), "1".parse().unwrap());
        StripCredentialsLayer::new().strip_trailers(&mut headers);
        prop_assert_eq!(headers.len(), 1, "{}", name);
    }

    #[test]
    fn other_parameters_keep_their_order(
        parameters in proptest::collection::vec(
            "(token|api_key|Token|%74oken|api%5Fkey|a|tokens|q|%C3%A9|)(=[a-z%0-9+=]{0,4})?", 0..8
        )
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let uri = format!("/v1?{}", parameters.join("&"));
        let left = runtime.block_on(stripped(&uri));
        let is_credential = |parameter: &&String| {
            let name = parameter.split('=').next().unwrap().to_ascii_lowercase();
            ["token", "api_key", "%74oken", "api%5fkey"].contains(&&*name)
        };
        let kept: Vec<_> = parameters.iter().filter(|parameter| !is_credential(parameter)).cloned().collect();
        let expected = match kept.len() {
            0 if !parameters.is_empty() => "/v1".to_owned(),
            _ => format!("/v1?{}", kept.join("&")),
        };
        prop_assert_eq!(left, expected);
    }
}

#[tokio::test]
async fn only_hop_by_hop_headers_are_removed() {
    for version in [Version::HTTP_10, Version::HTTP_11, Version::HTTP_2, Version::HTTP_3] {
        let given = [
            ("connection", "keep-alive, X-Mine ,,"),
            ("connection", "close"),
            ("x-mine", "1"),
            ("x-mine", "2"),
            ("x-yours", "1"),
            ("close", "1"),
            ("keep-alive", "timeout=5"),
            ("keep-alive", "max=1"),
            ("proxy-connection", "keep-alive"),
            ("te", "gzip;q=0.5"),
            ("transfer-encoding", "gzip, chunked"),
            ("upgrade", "websocket"),
            ("trailer", "x-sum"),
            ("content-type", "text/plain"),
            ("host", "proxy.example"),
        ];
        let expected = [
            ("x-yours", "1"),
            ("trailer", "x-sum"),
            ("content-type", "text/plain"),
            ("host", "proxy.example"),
        ];
        let mut expected = pairs(&expected);
        expected.sort();
        let mut left = forwarded(version, &given).await;
        left.sort();
        assert_eq!(left, expected, "{version:?}");
        let mut left = returned(&[], 200, &given).await;
        left.sort();
        assert_eq!(left, expected);
    }
}

#[tokio::test]
async fn headers_that_detect_loops_stay() {
    let given =
        [("connection", "via, CDN-Loop, x-mine"), ("via", "1.1 a"), ("cdn-loop", "b"), ("x-mine", "1")];
    let mut left = forwarded(Version::HTTP_11, &given).await;
    left.sort();
    assert_eq!(left, pairs(&[("cdn-loop", "b"), ("via", "1.1 a")]));
}

#[tokio::test]
async fn an_overridden_content_length_is_removed() {
    let given = [("content-length", "5"), ("transfer-encoding", "chunked")];
    assert_eq!(forwarded(Version::HTTP_11, &given).await, pairs(&[]));
    assert_eq!(returned(&[], 200, &given).await, pairs(&[]));
    assert_eq!(forwarded(Version::HTTP_11, &given[..1]).await, pairs(&given[..1]));
    assert_eq!(returned(&[], 200, &given[..1]).await, pairs(&given[..1]));
}

#[tokio::test]
async fn only_te_trailers_is_kept() {
    for (given, left) in [
        (&[("te", "trailers")][..], &[("te", "trailers")][..]),
        (&[("te", "Trailers")], &[("te", "trailers")]),
        (&[("te", "deflate;q=0.5, trailers")], &[("te", "trailers")]),
        (&[("te", "gzip"), ("te", "trailers")], &[("te", "trailers")]),
        (&[("te", "trailers"), ("connection", "TE")], &[("te", "trailers")]),
        (&[("te", "")], &[]),
        (&[("te", "xtrailers, trailers-x")], &[]),
    ] {
        for version in [Version::HTTP_11, Version::HTTP_2] {
            assert_eq!(forwarded(version, given).await, pairs(left), "{given:?}");
        }
    }
    assert_eq!(returned(&[], 200, &[("te", "trailers")]).await, pairs(&[]));
}

#[tokio::test]
async fn an_upgrade_keeps_its_two_headers() {
    let asked = [
        ("connection", "keep-alive, UPGRADE, x-mine"),
        ("upgrade", "WebSocket"),
        ("x-mine", "1"),
        ("keep-alive", "timeout=5"),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ];
    let mut left = forwarded(Version::HTTP_11, &asked).await;
    left.sort();
    let mut expected = [
        ("connection", "upgrade"),
        ("upgrade", "WebSocket"),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ];
    expected.sort_unstable();
    assert_eq!(left, pairs(&expected));

    let answer = [("connection", "Upgrade, x-hop"), ("upgrade", "websocket"), ("x-hop", "1"), ("x-end", "1")];
    let mut left = returned(&asked, 101, &answer).await;
    left.sort();
    assert_eq!(left, pairs(&[("connection", "upgrade"), ("upgrade", "websocket"), ("x-end", "1")]));
    // The server declined the upgrade, or the request did not ask for one.
    assert_eq!(returned(&asked, 426, &answer).await, pairs(&[("x-end", "1")]));
    assert_eq!(returned(&[], 101, &answer).await, pairs(&[("x-end", "1")]));
}

#[tokio::test]
async fn upgrades_need_http_1_1_and_both_headers() {
    let given = [("connection", "upgrade"), ("upgrade", "websocket")];
    for version in [Version::HTTP_10, Version::HTTP_2, Version::HTTP_3] {
        assert_eq!(forwarded(version, &given).await, pairs(&[]), "{version:?}");
    }
    for given in [
        &[("upgrade", "websocket")][..],
        &[("connection", "upgrade")],
        &[("connection", "upgrades"), ("upgrade", "websocket")],
    ] {
        assert_eq!(forwarded(Version::HTTP_11, given).await, pairs(&[]));
    }
}

#[tokio::test]
async fn upgrades_that_hide_requests_are_removed() {
    for protocol in ["h2c", "H2C", "h2", "HTTP/2.0", "TLS/1.0", "h2c, TLS/1.2"] {
        let given = [
            ("connection", "upgrade, http2-settings"),
            ("upgrade", protocol),
            ("http2-settings", "AAMAAABkAARAAAAAAAIAAAAA"),
        ];
        assert_eq!(forwarded(Version::HTTP_11, &given).await, pairs(&[]), "{protocol}");
        let given = [("connection", "upgrade"), ("upgrade", protocol), ("upgrade", "websocket")];
        let expected = pairs(&[("connection", "upgrade"), ("upgrade", "websocket")]);
        assert_eq!(forwarded(Version::HTTP_11, &given).await, expected);
    }
}

/// H3: holds for every order of the layers.
#[tokio::test]
async fn connection_cannot_remove_our_headers() {
    let tricks = [
        ("connection", "authorization, X-API-Key, close"),
        ("connection", "Authorization"),
        ("authorization", "Bearer theirs"),
    ];
    let ours = vec![format!("Bearer {KEY}")];
    let (hops, credentials) = (StripHopByHopLayer::new(), StripCredentialsLayer::new());
    let layer =
        ServiceBuilder::new().layer(hops).layer(credentials.clone()).layer(ApiKeyLayer::bearer(key()));
    let sent = send(&layer, request(MODELS, &tricks)).await.unwrap();
    assert_eq!((values(&sent, "authorization"), values(&sent, "connection")), (ours.clone(), vec![]));
    let layer = ServiceBuilder::new().layer(credentials).layer(hops).layer(ApiKeyLayer::bearer(key()));
    let sent = send(&layer, request(MODELS, &tricks)).await.unwrap();
    assert_eq!((values(&sent, "authorization"), values(&sent, "connection")), (ours.clone(), vec![]));
    let layer = ServiceBuilder::new().layer(ApiKeyLayer::bearer(key())).layer(hops);
    let sent = send(&layer, request(MODELS, &tricks)).await.unwrap();
    assert_eq!((values(&sent, "authorization"), values(&sent, "connection")), (ours, vec![]));
}
