//! Web pages on other origins: `--allow-origin`, CORS, and pages that are not listed.

use http::{HeaderMap, HeaderName, HeaderValue, Method, Response};
use http_body_util::BodyExt;
use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};
use tower_selam::simulator::{Server, Simulator};

use crate::support::{
    Answer, Api, Caller, Launch, Protocol, Proxy, TlsListener, channel_body, empty, full, random, read,
    secret,
};

const PAGE: &str = "https://app.example";

/// Headers of the API that would let pages of its choice read answers, or that speak for the proxy's origin.
const HOSTILE: &str = "
    Access-Control-Allow-Origin Access-Control-Allow-Credentials Access-Control-Allow-Headers Access-Control-Allow-Methods
    Access-Control-Expose-Headers Access-Control-Max-Age Access-Control-Allow-Private-Network Timing-Allow-Origin
    Set-Cookie Alt-Svc Server Strict-Transport-Security
";

fn hostile() -> impl Iterator<Item = HeaderName> {
    HOSTILE.split_whitespace().map(|name| name.parse().unwrap())
}

async fn send(proxy: &Proxy, method: Method, path: &str, headers: &[(&str, &str)]) -> Answer {
    send_over(Protocol::Http1, proxy, method, path, headers).await
}

async fn send_over(
    protocol: Protocol,
    proxy: &Proxy,
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
) -> Answer {
    let caller = Caller::new(proxy, protocol);
    let mut request = caller.request(method.clone(), path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let body = if method == Method::POST { full(r#"{"messages":[]}"#) } else { empty() };
    read(caller.send(request.body(body).unwrap()).await).await
}

/// Returns a header of the answer that occurs at most once.
#[track_caller]
fn header<'a>(answer: &'a Answer, name: &str) -> Option<&'a str> {
    let mut values = answer.headers.get_all(name).iter();
    let value = values.next().map(|value| value.to_str().unwrap());
    assert_eq!(values.next(), None, "{name} is repeated");
    value
}

#[track_caller]
fn assert_readable(answer: &Answer, origin: &str) {
    assert_eq!(header(answer, "access-control-allow-origin"), Some(origin));
    let exposed: Vec<_> = header(answer, "access-control-expose-headers").unwrap().split(", ").collect();
    for name in [
        "x-request-id",
        "retry-after",
        "retry-after-ms",
        "ratelimit",
        "x-ratelimit-remaining",
        "x-ratelimit-reset-after",
    ] {
        assert!(exposed.contains(&name), "{name} is not in {exposed:?}");
    }
    assert_eq!(header(answer, "access-control-allow-credentials"), None);
    assert_varies(answer);
}

#[track_caller]
fn assert_varies(answer: &Answer) {
    assert!(answer.headers.get_all("vary").iter().any(|vary| vary == "origin"), "{:?}", answer.headers);
}

#[track_caller]
fn assert_blocked(answer: &Answer) {
    answer.assert_error(403, "authorization_error", "origin_not_allowed");
    assert!(!answer.headers.keys().any(|name| name.as_str().starts_with("access-control-")), "{answer:?}");
    assert_varies(answer);
}

async fn launch() -> (Simulator, Server, Launch, String) {
    let simulator = Simulator::new();
    let api = Server::tls(&simulator).await.unwrap();
    let token = secret(format!("caller-{}", random()));
    let launch = Launch::for_api(&api)
        .env("SELAM_API_KEY", secret(simulator.issue_key()))
        .callers(&format!("web:{token}\n"))
        .args(["--allow-origin", PAGE]);
    (simulator, api, launch, token)
}

#[tokio::test]
async fn preflight_requests_are_answered_by_the_proxy() {
    let (simulator, _api, launch, _token) = launch().await;
    let proxy = launch.start().await;
    for protocol in Protocol::BOTH {
        let headers = [
            ("origin", PAGE),
            ("access-control-request-method", "POST"),
            ("access-control-request-headers", "authorization,content-type,x-stainless-lang"),
            ("access-control-request-private-network", "true"),
        ];
        // Whether the request itself is allowed is said by its own answer.
        for path in ["/v1/chat/completions", "/elsewhere", "/healthz"] {
            let answer = send_over(protocol, &proxy, Method::OPTIONS, path, &headers).await;
            assert_eq!((answer.status.as_u16(), &*answer.body), (204, &b""[..]));
            assert_readable(&answer, PAGE);
            for (name, value) in [
                ("access-control-allow-methods", "POST"),
                ("access-control-allow-headers", "authorization,content-type,x-stainless-lang"),
                ("access-control-allow-private-network", "true"),
                ("access-control-max-age", "7200"),
            ] {
                assert_eq!(header(&answer, name), Some(value), "{name}");
            }
        }
        let mut other = headers;
        other[0].1 = "https://evil.example";
        assert_blocked(&send_over(protocol, &proxy, Method::OPTIONS, "/v1/models", &other).await);
    }
    assert_eq!(simulator.requests(), 0);
}

#[tokio::test]
async fn other_options_requests_are_forwarded() {
    let mut api = TlsListener::listen(Protocol::Http2).await.exchanges();
    let proxy = Launch::with_key(&api).args(["--allow-origin", PAGE]).start().await;
    for headers in [&[("origin", PAGE)][..], &[], &[("access-control-request-method", "POST")]] {
        let answering = async { api.next().await.respond(200, empty()).method };
        let (answer, method) = tokio::join!(send(&proxy, Method::OPTIONS, "/v1/models", headers), answering);
        assert_eq!((answer.status.as_u16(), method), (200, Method::OPTIONS), "{headers:?}");
        let page = headers.contains(&("origin", PAGE)).then_some(PAGE);
        assert_eq!(header(&answer, "access-control-allow-origin"), page);
        assert_eq!(header(&answer, "access-control-max-age"), None);
    }
}

/// Without the headers a page sees "Failed to fetch" in place of the reason.
#[tokio::test]
async fn pages_can_read_the_proxys_own_errors() {
    let (simulator, api, launch, token) = launch().await;
    let proxy = launch.args(["--allow", "POST:/v1/chat/completions"]).start().await;
    let bearer = format!("Bearer {token}");
    let authorized = [("origin", PAGE), ("authorization", &*bearer)];
    for (method, path, headers, status) in [
        (Method::POST, "/v1/chat/completions", &authorized[..1], 401),
        (Method::GET, "/v1/models", &authorized[..], 403),
        (Method::GET, "/elsewhere", &authorized[..], 404),
        (Method::POST, "/healthz", &authorized[..], 405),
        (Method::GET, "/v1/a/../b", &authorized[..], 400),
        (Method::POST, "/v1/chat/completions", &authorized[..], 200),
        (Method::GET, "/healthz", &authorized[..1], 200),
        (Method::GET, "/metrics", &authorized[..], 200),
    ] {
        for protocol in Protocol::BOTH {
            let answer = send_over(protocol, &proxy, method.clone(), path, headers).await;
            assert_eq!(answer.status, status, "{path}");
            assert_readable(&answer, PAGE);
        }
    }
    assert_eq!(simulator.requests(), 2);
    let large = "x".repeat(70 * 1024);
    let headers = [("origin", PAGE), ("x-large", &*large), ("access-control-request-method", "POST")];
    for method in [Method::GET, Method::OPTIONS] {
        let answer = send(&proxy, method, "/v1/models", &headers).await;
        answer.assert_error(431, "invalid_request_error", "headers_too_large");
        assert_readable(&answer, PAGE);
    }
    drop(api);
    let answer = send(&proxy, Method::POST, "/v1/chat/completions", &authorized).await;
    answer.assert_error(502, "api_error", "upstream_unavailable");
    assert_readable(&answer, PAGE);
}

#[tokio::test]
async fn pages_that_are_not_listed_are_refused() {
    let (simulator, _api, launch, token) = launch().await;
    let proxy = launch.args(["--allow-origin", "https://*.example.com"]).start().await;
    let bearer = format!("Bearer {token}");
    for protocol in Protocol::BOTH {
        for (origin, path) in [
            ("https://evil.example", "/v1/models"),
            ("null", "/v1/models"),
            ("http://localhost:3000", "/v1/models"),
            ("https://example.com", "/metrics"),
            ("https://evil.example", "/healthz"),
            ("https://evil.example", "/elsewhere"),
        ] {
            let headers = [("origin", origin), ("authorization", &*bearer)];
            assert_blocked(&send_over(protocol, &proxy, Method::GET, path, &headers).await);
        }
    }
    let handshake = [
        ("origin", "https://evil.example"),
        ("connection", "upgrade"),
        ("upgrade", "websocket"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ("authorization", &*bearer),
    ];
    assert_blocked(&send(&proxy, Method::GET, "/v1/audio/agent", &handshake).await);
    assert_eq!(simulator.requests(), 0);
    proxy.logs("refused=\"origin_not_allowed\"").await;

    // Requests that come from no page need no origin, and subdomains are listed.
    let authorized = [("authorization", &*bearer)];
    let answer = send(&proxy, Method::POST, "/v1/chat/completions", &authorized).await;
    assert_eq!((answer.status.as_u16(), header(&answer, "access-control-allow-origin")), (200, None));
    assert_varies(&answer);
    let metrics = send(&proxy, Method::GET, "/metrics", &authorized).await;
    let counted = "selam_proxy_refusals_total{reason=\"origin_not_allowed\",caller=\"unknown\"} 13";
    assert!(metrics.text().contains(counted), "{}", metrics.text());
    let from_page = [("origin", "https://a.b.example.com"), authorized[0]];
    let answer = send(&proxy, Method::POST, "/v1/chat/completions", &from_page).await;
    assert_readable(&answer, "https://a.b.example.com");
}

#[tokio::test]
async fn every_page_may_be_listed_with_tokens() {
    let simulator = Simulator::new();
    let api = Server::tls(&simulator).await.unwrap();
    let token = secret(random());
    let launch = Launch::with_key(&api).env("SELAM_PROXY_ALLOW_ORIGIN", "*");
    let proxy = launch.callers(&format!("web:{token}\n")).start().await;
    let answer = send(&proxy, Method::GET, "/v1/models", &[("origin", "null")]).await;
    answer.assert_error(401, "authentication_error", "missing_api_key");
    assert_readable(&answer, "*");

    let error = Launch::with_key(&api).env("SELAM_PROXY_ALLOW_ORIGIN", "*").fail().await;
    assert!(error.contains("--allow-origin: * requires --client-token-file"), "{error}");
    let error = Launch::with_key(&api).args(["--allow-origin", "null"]).fail().await;
    assert!(error.contains("--allow-origin: \"null\" stands for"), "{error}");
}

#[tokio::test]
async fn a_listed_page_needs_no_token_on_this_machine() {
    let simulator = Simulator::new();
    let api = Server::tls(&simulator).await.unwrap();
    let key = secret(simulator.issue_key());
    let proxy = Launch::for_api(&api).env("SELAM_API_KEY", key).args(["--allow-origin", PAGE]).start().await;
    let page = [("origin", PAGE), ("sec-fetch-site", "cross-site"), ("referer", "https://app.example/")];
    let chat = "/v1/chat/completions";
    let answer = send(&proxy, Method::POST, chat, &page).await;
    assert_eq!(answer.status, 200);
    assert_readable(&answer, PAGE);
    // The other checks stay, and pages of this machine are listed like all others.
    for (name, value) in [("host", "evil.example"), ("x-forwarded-for", "192.0.2.7"), ("via", "1.1 tunnel")] {
        let answer = send(&proxy, Method::POST, chat, &[page[0], page[1], (name, value)]).await;
        answer.assert_error(403, "authorization_error", "insufficient_permissions");
        assert_readable(&answer, PAGE);
    }
    let answer = send(&proxy, Method::POST, chat, &[("sec-fetch-site", "cross-site")]).await;
    answer.assert_error(403, "authorization_error", "insufficient_permissions");
    assert_blocked(&send(&proxy, Method::POST, chat, &[("origin", "http://localhost:3000")]).await);
    assert_eq!(simulator.requests(), 1);
}

/// Serves an API that answers as the request's header `x-answer` says, as if it meant to let pages in.
async fn permissive_api() -> impl Api {
    TlsListener::listen(Protocol::Http2).await.exchanges().answer_all(async |request| {
        let asked = request.headers()["x-answer"].to_str().unwrap().to_owned();
        tokio::spawn(request.into_body().collect());
        let mut words = asked.split(' ');
        let mut response = Response::builder().status(words.next().unwrap());
        let value = HeaderValue::from_str(words.next().unwrap()).unwrap();
        let headers: HeaderMap = words.map(|name| (name.parse().unwrap(), value.clone())).collect();
        response.headers_mut().unwrap().extend(headers.clone());
        let (feed, body) = channel_body();
        tokio::spawn(async move { feed.trailer_map(headers).await });
        response.body(body).unwrap()
    })
}

/// Whatever the API answers, only listed pages can read it.
#[test]
fn no_answer_is_readable_for_other_pages() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (api, proxy) = runtime.block_on(async {
        let api = permissive_api().await;
        let origins = "https://app.example,https://*.example.com,http://localhost:3000";
        let proxy = Launch::with_key(&api).env("SELAM_PROXY_ALLOW_ORIGIN", origins).start().await;
        (api, proxy)
    });
    let listed = |origin: &str| {
        let subdomains = ["app", "a", "evil", "localhost", "a.b"];
        ["https://app.example", "http://localhost:3000"].contains(&origin)
            || subdomains.iter().any(|name| origin == format!("https://{name}.example.com"))
    };
    let origin = prop_oneof![
        Just(None),
        "(https?://)?(app|a|evil|localhost|a\\.b|)[.:]?(example|com|3000)?[.:]?(com|evil|3000|443)?/?"
            .prop_map(Some),
        Just(Some("https://app.example".to_owned())),
        Just(Some("https://a.example.com".to_owned())),
        Just(Some("http://localhost:3000".to_owned())),
        Just(Some("null".to_owned())),
    ];
    let names =
        proptest::sample::subsequence(hostile().collect::<Vec<_>>(), 0..=HOSTILE.split_whitespace().count());
    let method = proptest::sample::select(vec![Method::GET, Method::POST, Method::OPTIONS]);
    let status = proptest::sample::select(vec![200, 301, 400, 401, 403, 404, 429, 500, 503]);
    let runner = &mut TestRunner::new(Config { failure_persistence: None, ..Config::with_cases(200) });
    let tested = runner.run(
        &(origin, method, status, names, any::<bool>()),
        |(origin, method, status, names, star)| {
            let value = match &origin {
                Some(origin) if !star => origin,
                _ => "*",
            };
            let names: Vec<&str> = names.iter().map(HeaderName::as_str).collect();
            let answer = format!("{status} {value} {}", names.join(" "));
            let mut headers = vec![("x-answer", answer.trim_end())];
            headers.extend(origin.as_deref().map(|origin| ("origin", origin)));
            let answer = runtime.block_on(send(&proxy, method, "/v1/models", &headers));
            let allowed = header(&answer, "access-control-allow-origin");
            match origin.as_deref() {
                Some(origin) if listed(origin) => {
                    prop_assert_eq!(allowed, Some(origin));
                }
                Some(_) => {
                    prop_assert_eq!(allowed, None);
                    prop_assert_eq!(answer.status.as_u16(), 403);
                }
                None => prop_assert_eq!(allowed, None),
            }
            let found: Vec<_> =
                answer.headers.keys().chain(answer.trailers.iter().flat_map(HeaderMap::keys)).collect();
            for name in hostile().filter(|name| !name.as_str().starts_with("access-control-allow-origin")) {
                prop_assert!(!found.contains(&&name) || name == "access-control-expose-headers", "{}", name);
            }
            prop_assert!(
                !answer.trailers.is_some_and(|trailers| trailers.contains_key("access-control-allow-origin"))
            );
            Ok(())
        },
    );
    tested.unwrap();
    drop((proxy, api));
}
