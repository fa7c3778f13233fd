//! `/metrics`: valid Prometheus text, with correct counts.

mod text;

use http::{Method, Response};
use tower_selam::{
    ApiKey,
    simulator::{Fault, Server, Simulator},
};

use self::text::Scrape;
use crate::support::{
    Caller, Launch, Protocol, Proxy, TlsListener, channel_body, empty, eventually, frame, random, read,
    secret, with_timeout,
};

const REQUESTS: &str = "selam_proxy_requests_total";
const REFUSALS: &str = "selam_proxy_refusals_total";
const ABORTED: &str = "selam_proxy_broken_off_total";
const IN_FLIGHT: &str = "selam_proxy_requests_running";
const AUTH_ERRORS: &str = "tower_selam_auth_errors_total";
const REFRESHES: &str = "tower_selam_renewals_total";
const REPLAYS: &str = "tower_selam_replays_total";
const INFO: &str = "tower_selam_credential_info";

pub(crate) async fn scrape(proxy: &Proxy) -> Scrape {
    scrape_as(&Caller::http1(proxy)).await
}

async fn scrape_as(caller: &Caller) -> Scrape {
    let answer = caller.get("/metrics").await;
    assert_eq!(answer.status, 200);
    assert!(answer.headers["content-type"].to_str().unwrap().starts_with("text/plain; version=0.0.4"));
    Scrape::parse(answer.text()).unwrap_or_else(|error| panic!("{error} in\n{}", answer.text()))
}

/// Waits until the metric has this value: a request is counted shortly after its last byte.
pub(crate) async fn reaches(proxy: &Proxy, name: &str, labels: &[(&str, &str)], value: f64) {
    eventually(&format!("{name}{labels:?} is {value}"), async || {
        let now = scrape(proxy).await;
        (now.value(name, labels) == Some(value)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn requests_are_counted_by_status_origin_and_caller() {
    let mut api = TlsListener::listen(Protocol::Http2).await.exchanges();
    let token = secret(random());
    let proxy = Launch::with_key(&api).args(["--allow", "*:/v1/*"]).start().await;
    let caller = Caller::http1(&proxy);
    for status in [200, 204, 302, 404, 429, 500] {
        let calling = tokio::spawn({
            let caller = caller.clone();
            async move { caller.get("/v1/models").await }
        });
        api.next().await.respond(status, empty());
        assert_eq!(calling.await.unwrap().status, status);
    }
    for (class, count) in [("2xx", 2.0), ("3xx", 1.0), ("4xx", 2.0), ("5xx", 1.0)] {
        let labels = [("status", class), ("by", "api"), ("caller", "local")];
        reaches(&proxy, REQUESTS, &labels, count).await;
    }
    // The proxy's own answers.
    caller.get("/v1").await.assert_error(403, "authorization_error", "insufficient_permissions");
    caller.get("/elsewhere").await;
    caller.get("/v1/%41").await;
    for reason in ["not_allowed", "not_found", "bad_path"] {
        let now = scrape(&proxy).await;
        assert_eq!(now.sum(REFUSALS, &[("reason", reason)]), 1.0, "{reason}");
    }
    let now = scrape(&proxy).await;
    assert_eq!(now.sum(REQUESTS, &[("by", "proxy"), ("status", "4xx")]), 3.0);
    // Scrapes and health checks are not counted.
    assert_eq!(now.sum(REQUESTS, &[]), 9.0);

    // With client tokens, requests are counted by caller.
    let proxy = Launch::with_key(&api).callers(&format!("web:{token}\n")).start().await;
    let known = Caller::http1(&proxy).with_token(&token);
    let calling = tokio::spawn({
        let known = known.clone();
        async move { known.get("/v1/models").await }
    });
    api.next().await.respond(200, empty());
    calling.await.unwrap();
    let caller = Caller::http1(&proxy);
    caller.get("/v1/models").await;
    // The metrics are for callers as well.
    caller.get("/metrics").await.assert_error(401, "authentication_error", "missing_api_key");
    caller.with_token("not-a-token-of-anybody").get("/v1/models").await;
    let now = scrape_as(&known).await;
    assert_eq!(now.value(REQUESTS, &[("status", "2xx"), ("by", "api"), ("caller", "web")]), Some(1.0));
    assert_eq!(now.value(REQUESTS, &[("status", "4xx"), ("by", "proxy"), ("caller", "unknown")]), Some(2.0));
    assert_eq!(now.value(REFUSALS, &[("reason", "missing_token"), ("caller", "unknown")]), Some(1.0));
    assert_eq!(now.value(REFUSALS, &[("reason", "invalid_token"), ("caller", "unknown")]), Some(1.0));
}

#[tokio::test]
async fn auth_errors_are_counted_by_kind() {
    let simulator = Simulator::new();
    let api = Server::tls(&simulator).await.unwrap();
    let (key, limited) = (secret(simulator.issue_key()), secret(simulator.issue_limited_key()));
    let proxy = Launch::for_api(&api).env("SELAM_API_KEY", limited).start().await;
    let before = scrape(&proxy).await;
    assert_eq!(before.sum(AUTH_ERRORS, &[]), 0.0);
    Caller::http1(&proxy).post("/v1/audio/speech", "{}").await;
    Caller::http1(&proxy).post("/v1/audio/speech", "{}").await;
    let code = "insufficient_permissions";
    assert_eq!(scrape(&proxy).await.value(AUTH_ERRORS, &[("kind", code), ("code", code)]), Some(2.0));

    let proxy = Launch::for_api(&api).env("SELAM_API_KEY", &key).start().await;
    simulator.revoke_key(&key);
    Caller::http1(&proxy).chat().await;
    let body = r#"{"error":{"message":"No","type":"authentication_error","code":"made_up_by_somebody"}}"#;
    simulator.inject(Fault::Answer(Response::builder().status(403).body(body.into()).unwrap()));
    Caller::http1(&proxy).chat().await;
    let now = scrape(&proxy).await;
    let code = "invalid_api_key";
    assert_eq!(now.value(AUTH_ERRORS, &[("kind", code), ("code", code)]), Some(1.0));
    // Codes that are not documented do not become labels.
    assert_eq!(now.sum(AUTH_ERRORS, &[("code", "other")]), 1.0);
    assert_eq!(now.sum(AUTH_ERRORS, &[]), 2.0);
}

#[tokio::test]
async fn refreshes_replays_and_the_current_key_are_shown() {
    let simulator = Simulator::new();
    let api = Server::tls(&simulator).await.unwrap();
    let (old, new) = (secret(simulator.issue_key()), secret(simulator.issue_key()));
    let id = |key: &str| ApiKey::new(key).unwrap().id().to_string();
    let url = api.base_url().replace("/v1", "/oauth/token");
    let launch = || Launch::for_api(&api).key_file(&old).env("SELAM_TOKEN_URL", &url);
    let proxy = launch().start().await;
    let caller = Caller::http1(&proxy);
    assert_eq!(caller.chat().await.status, 200);
    let now = scrape(&proxy).await;
    assert_eq!(now.value(INFO, &[("credential", "api_key"), ("id", &id(&old))]), Some(1.0));
    assert_eq!(now.value(REFRESHES, &[("credential", "token"), ("outcome", "renewed")]), Some(1.0));
    assert_eq!(now.sum(REPLAYS, &[]), 0.0);

    simulator.expire_jwts();
    assert_eq!(caller.chat().await.status, 200);
    let now = scrape(&proxy).await;
    assert_eq!(now.value(REFRESHES, &[("credential", "token"), ("outcome", "renewed")]), Some(2.0));
    assert_eq!(now.value(REPLAYS, &[("outcome", "accepted")]), Some(1.0));

    proxy.scratch().write("key", &new);
    // The file is checked while there are requests.
    eventually("the new key is in use", async || {
        assert_eq!(caller.chat().await.status, 200);
        let info = scrape(&proxy).await.value(INFO, &[("credential", "api_key"), ("id", &id(&new))]);
        (info == Some(1.0)).then_some(())
    })
    .await;
    let now = scrape(&proxy).await;
    assert_eq!(now.value(INFO, &[("credential", "api_key"), ("id", &id(&old))]), Some(0.0));
    assert!(now.sum(REFRESHES, &[("credential", "api_key"), ("outcome", "renewed")]) >= 1.0);

    // The replay is rejected as well.
    simulator.reject_jwts(true);
    let proxy = launch().start().await;
    assert_eq!(Caller::http1(&proxy).chat().await.status, 401);
    assert_eq!(scrape(&proxy).await.value(REPLAYS, &[("outcome", "refused")]), Some(1.0));
}

#[tokio::test]
async fn requests_without_credential_or_api_are_counted() {
    let simulator = Simulator::new();
    let api = Server::tls(&simulator).await.unwrap();
    let url = api.base_url().replace("/v1", "/oauth/token");
    let launch = Launch::for_api(&api).env("SELAM_API_KEY", secret(simulator.issue_key()));
    let proxy = launch.env("SELAM_TOKEN_URL", url).start().await;
    simulator.set_token_outage(true);
    assert_eq!(Caller::http1(&proxy).chat().await.status, 503);
    let now = scrape(&proxy).await;
    assert!(now.sum(REFRESHES, &[("credential", "token"), ("outcome", "failed")]) >= 1.0);
    assert_eq!(now.sum("tower_selam_unsent_requests_total", &[]), 1.0);
    assert_eq!(now.value(REQUESTS, &[("status", "5xx"), ("by", "proxy"), ("caller", "local")]), Some(1.0));
    assert_eq!(now.sum(REFUSALS, &[("reason", "no_credential")]), 1.0);

    let gone = TlsListener::listen(Protocol::Http1).await;
    let proxy = Launch::with_key(&gone).start().await;
    drop(gone);
    assert_eq!(Caller::http1(&proxy).chat().await.status, 502);
    assert_eq!(scrape(&proxy).await.sum(REFUSALS, &[("reason", "no_upstream")]), 1.0);
}

#[tokio::test]
async fn the_rate_limit_is_shown() {
    let simulator = Simulator::new();
    simulator.set_rate_limit(100);
    let api = Server::tls(&simulator).await.unwrap();
    let proxy = Launch::for_api(&api).env("SELAM_API_KEY", secret(simulator.issue_key())).start().await;
    for left in [99.0, 98.0, 97.0] {
        assert_eq!(Caller::http1(&proxy).chat().await.status, 200);
        let now = scrape(&proxy).await;
        assert_eq!(now.value("selam_proxy_rate_limit", &[]), Some(100.0));
        assert_eq!(now.value("selam_proxy_rate_limit_remaining", &[]), Some(left));
        let reset = now.value("selam_proxy_rate_limit_reset_seconds", &[]).unwrap();
        assert!((0.0..=60.0).contains(&reset), "{reset}");
    }
}

#[tokio::test]
async fn requests_in_flight_and_aborted_ones_are_counted() {
    let mut api = TlsListener::listen(Protocol::Http2).await.exchanges();
    let proxy = Launch::with_key(&api).start().await;
    assert_eq!(scrape(&proxy).await.value(IN_FLIGHT, &[]), Some(0.0));
    let caller = Caller::http1(&proxy);
    let begin = || {
        let caller = caller.clone();
        tokio::spawn(async move {
            caller.send(caller.request(Method::GET, "/v1/models").body(empty()).unwrap()).await
        })
    };
    let (first, second, third) = (begin(), begin(), begin());
    let mut feeds = Vec::new();
    for _ in 0..3 {
        let (feed, body) = channel_body();
        api.next().await.respond(200, body);
        feed.data("begun").await;
        feeds.push(feed);
    }
    assert_eq!(scrape(&proxy).await.value(IN_FLIGHT, &[]), Some(3.0));
    let mut responses = Vec::new();
    for calling in [first, second, third] {
        let mut response = with_timeout(calling).await.unwrap();
        assert!(frame(response.body_mut()).await.unwrap().is_ok());
        responses.push(response);
    }
    // One caller leaves, the API breaks one stream off, and one completes.
    drop(responses.pop());
    reaches(&proxy, IN_FLIGHT, &[], 2.0).await;
    reaches(&proxy, ABORTED, &[("by", "caller")], 1.0).await;
    let mut open = Vec::new();
    for feed in feeds {
        // The body whose caller has left is closed.
        if feed.try_data("more").await {
            open.push(feed);
        }
    }
    let mut open = open.into_iter();
    open.next().unwrap().fail().await;
    reaches(&proxy, ABORTED, &[("by", "api")], 1.0).await;
    drop(open);
    let mut ended = 0;
    for response in responses {
        let body = with_timeout(http_body_util::BodyExt::collect(response.into_body())).await;
        ended += usize::from(body.is_ok());
    }
    assert_eq!(ended, 1);
    reaches(&proxy, IN_FLIGHT, &[], 0.0).await;
    let now = scrape(&proxy).await;
    assert_eq!(now.value("selam_proxy_request_seconds_count", &[]), Some(3.0));
    assert_eq!(now.value(ABORTED, &[("by", "caller")]), Some(1.0));
}

#[tokio::test]
async fn metrics_and_healthz_answer_head() {
    let simulator = Simulator::new();
    let api = Server::tls(&simulator).await.unwrap();
    let proxy = Launch::with_key(&api).start().await;
    let caller = Caller::http1(&proxy);
    for path in ["/metrics", "/healthz"] {
        let request = caller.request(Method::HEAD, path).body(empty()).unwrap();
        let answer = read(caller.send(request).await).await;
        assert_eq!((answer.status.as_u16(), answer.body.len()), (200, 0));
        caller.post(path, "").await.assert_error(405, "invalid_request_error", "method_not_allowed");
    }
}
