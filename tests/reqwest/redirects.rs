//! O4: redirects between two real loopback origins. Plain reqwest leaks credentials; under the layers it does not.

use http::{Request, StatusCode, header::LOCATION};
use proptest::prelude::*;
use tower::{ServiceBuilder, ServiceExt};
use tower_http::follow_redirect::FollowRedirectLayer;
use tower_selam::{
    Error, Origins, RequestAuth,
    adapter::reqwest::{Client, HttpService, TryCloneBody, redirect_policy},
};

use crate::support::{CHAT, PROTOCOLS, SESSION, World, handshake, header, in_time, plain, world};

const STATUSES: [u16; 4] = [301, 302, 307, 308];

/// The API, and another server on a different port.
async fn two_origins() -> (World, World) {
    (plain().await, plain().await)
}

/// A client that sends a key and a JWT.
fn key_and_jwt(api: &World, http: HttpService) -> Client {
    let layer = api.builder().with_jwt(api.jwt()).build().unwrap();
    Client::with_layers(&layer.with_replay(TryCloneBody), http)
}

/// O4: the default policy sends `X-API-Key` and `Referer` to the second origin.
#[tokio::test]
async fn plain_reqwest_leaks_key_and_query() {
    for status in STATUSES {
        let (api, elsewhere) = two_origins().await;
        api.redirect(status, &elsewhere.url("chat/completions"));
        let plain = api.reqwest().build().unwrap();
        let request = plain.post(api.url("chat/completions?api_key=in-the-query")).bearer_auth("a.b.c");
        in_time(request.header("x-api-key", &api.key).body(CHAT).send()).await.unwrap();
        let leaked = elsewhere.last();
        assert_eq!(header(&leaked, "x-api-key"), [&*api.key], "{status}: reqwest no longer leaks it");
        assert_eq!(header(&leaked, "referer"), [api.url("chat/completions?api_key=in-the-query")]);
        assert!(header(&leaked, "authorization").is_empty(), "{status}");

        // The layers cannot prevent it around such a client.
        let selam = key_and_jwt(&api, HttpService::dangerous_with_client(plain.clone()));
        api.redirect(status, &elsewhere.url("chat/completions"));
        let _ = in_time(selam.execute(plain.post(api.url("chat/completions")).body(CHAT))).await;
        assert_eq!(header(&elsewhere.last(), "x-api-key"), [&*api.key], "{status}");
        let agent = selam.with_extension(RequestAuth::VoiceAgent);
        api.redirect(status, &elsewhere.voice_agent(""));
        let _ = in_time(agent.execute(handshake(&plain, &api.voice_agent("")))).await;
        assert!(header(&elsewhere.last(), "referer")[0].contains(&api.key), "{status}");
    }
}

/// O4: the 3xx response is returned, and the second origin gets no request.
#[tokio::test]
async fn cross_origin_redirects_are_not_followed() {
    for status in STATUSES {
        let (api, elsewhere) = two_origins().await;
        let selam = key_and_jwt(&api, HttpService::new(api.reqwest()).unwrap());
        for auth in [RequestAuth::ApiKey, RequestAuth::ApiKeyAndJwt, RequestAuth::VoiceAgent] {
            let location = elsewhere.url("chat/completions");
            api.redirect(status, &location);
            let selam = selam.clone().with_extension(auth.clone());
            let request = match auth {
                RequestAuth::VoiceAgent => handshake(selam.reqwest(), &api.voice_agent("")),
                _ => selam.reqwest().post(api.url("chat/completions?x=1")).body(CHAT),
            };
            let response = in_time(selam.execute(request)).await.unwrap();
            assert_eq!(response.status().as_u16(), status, "{auth:?}: the redirect is returned");
            assert_eq!(response.headers()[LOCATION], *location);
        }
        assert_eq!(api.simulator.requests(), 3);
        assert_eq!(elsewhere.simulator.requests(), 0, "{status}");
    }
}

/// O4: neither directly nor after a redirect within the origin.
#[tokio::test]
async fn redirects_do_not_leave_tls() {
    for &protocol in PROTOCOLS {
        let (api, elsewhere) = (world(protocol).await, plain().await);
        let selam = key_and_jwt(&api, HttpService::new(api.reqwest()).unwrap());
        let post = || selam.reqwest().post(api.url("chat/completions")).body(CHAT);
        for status in STATUSES {
            api.redirect(status, &elsewhere.url("chat/completions"));
            assert_eq!(in_time(selam.execute(post())).await.unwrap().status().as_u16(), status);

            // First within the origin, then away from it.
            api.redirect(status, "/v1/models");
            api.redirect(status, &elsewhere.url("chat/completions"));
            let response = in_time(selam.execute(post())).await.unwrap();
            assert_eq!(response.status().as_u16(), status);
            assert_eq!(response.url().path(), "/v1/models");
        }
        assert_eq!(elsewhere.simulator.requests(), 0);
    }
}

/// O4: redirects within the origin are followed, at most ten times.
#[tokio::test]
async fn same_origin_redirects_keep_credentials() {
    for &protocol in PROTOCOLS {
        let api = world(protocol).await;
        let selam = key_and_jwt(&api, HttpService::new(api.reqwest()).unwrap());
        for status in [307, 308] {
            api.redirect(status, "/v1/audio/agent/sessions?moved=1");
            let request = selam.reqwest().post(api.url("audio/agent/sessions")).body(SESSION);
            let response = in_time(selam.execute(request)).await.unwrap();
            assert_eq!(response.status(), StatusCode::OK);
            assert_eq!(response.url().as_str(), api.url("audio/agent/sessions?moved=1"));
            assert_eq!(header(&api.last(), "x-api-key"), [&*api.key]);
            assert_eq!(&*api.last().body, SESSION.as_bytes());
        }
        // At most ten times.
        for _ in 0..20 {
            api.redirect(307, "/v1/audio/agent/sessions");
        }
        let request = selam.reqwest().post(api.url("audio/agent/sessions")).body(SESSION);
        match in_time(selam.execute(request)).await {
            Err(Error::Inner(error)) => assert!(error.is_redirect()),
            other => panic!("{other:?}"),
        }
    }
}

/// O4: `FollowRedirect` outside the layers reaches the second origin without credentials.
#[tokio::test]
async fn outer_redirect_follower_sends_no_credentials() {
    for status in STATUSES {
        let (api, elsewhere) = two_origins().await;
        let origins = api.base_url().origins().strip_for_other_origins();
        let layer = api.builder().with_jwt(api.jwt()).with_origins(origins).build().unwrap();
        let layers =
            ServiceBuilder::new().layer(FollowRedirectLayer::new()).layer(layer.with_replay(TryCloneBody));
        let service = layers.service(HttpService::new(api.reqwest()).unwrap());
        api.redirect(status, &elsewhere.url("chat/completions?x=1"));
        // Without a body, because `FollowRedirect` cannot clone reqwest's.
        let request = Request::get(api.url("chat/completions")).body(reqwest::Body::default()).unwrap();
        let refused = in_time(service.oneshot(request)).await;
        assert!(!matches!(refused, Err(Error::Inner(_))));
        assert_eq!((api.simulator.requests(), elsewhere.simulator.requests()), (1, 1), "{status}");
        let sent = elsewhere.last();
        assert_eq!(sent.uri.query(), Some("x=1"));
        for name in ["authorization", "x-api-key", "referer"] {
            assert!(header(&sent, name).is_empty(), "{name}");
        }
    }
}

/// O4: `redirect_policy` on a client built by the user.
#[tokio::test]
async fn redirect_policy_protects_a_prebuilt_client() {
    let (api, elsewhere) = two_origins().await;
    let client = api.reqwest().redirect(redirect_policy()).build().unwrap();
    let selam = key_and_jwt(&api, HttpService::dangerous_with_client(client));
    for status in STATUSES {
        api.redirect(status, &elsewhere.url("chat/completions"));
        let request = selam.reqwest().post(api.url("chat/completions")).body(CHAT);
        assert_eq!(in_time(selam.execute(request)).await.unwrap().status().as_u16(), status);
    }
    assert_eq!(elsewhere.simulator.requests(), 0);
}

/// O4: reqwest does not follow even to an allowed origin; `FollowRedirect` does.
#[tokio::test]
async fn only_layers_send_credentials_across_origins() {
    let (api, other) = two_origins().await;
    let both =
        api.base_url().origins().allow_insecure_loopback(other.server.base_url().trim_end_matches("/v1"));
    other.simulator.add_key(&*api.key);
    let layer = api.builder().with_origins(both.unwrap().strip_for_other_origins()).build().unwrap();
    for status in STATUSES {
        // On its own, reqwest would follow without `Authorization`.
        api.redirect(status, &other.url("chat/completions"));
        let selam = Client::new(layer.clone(), api.reqwest()).unwrap();
        let request = selam.reqwest().get(api.url("chat/completions"));
        assert_eq!(in_time(selam.execute(request)).await.unwrap().status().as_u16(), status);
    }
    assert_eq!(other.simulator.requests(), 0);

    api.redirect(307, &other.url("chat/completions"));
    let layers =
        ServiceBuilder::new().layer(FollowRedirectLayer::new()).layer(layer.with_replay(TryCloneBody));
    let selam = Client::with_layers(&layers, HttpService::new(api.reqwest()).unwrap());
    in_time(selam.execute(selam.reqwest().get(api.url("chat/completions")))).await.unwrap();
    assert_eq!(header(&other.last(), "authorization"), [format!("Bearer {}", api.key)]);
}

/// O4: the policy of the `ClientBuilder` has no effect.
#[tokio::test]
async fn builder_policy_is_replaced() {
    let (api, elsewhere) = two_origins().await;
    let builder = api.reqwest().redirect(reqwest::redirect::Policy::limited(3));
    let selam = Client::new(api.builder().build().unwrap(), builder).unwrap();
    api.redirect(307, &elsewhere.url("chat/completions"));
    let request = selam.reqwest().post(api.url("chat/completions")).body(CHAT);
    assert_eq!(in_time(selam.execute(request)).await.unwrap().status().as_u16(), 307);
    assert_eq!(elsewhere.simulator.requests(), 0);
}

proptest! {
    /// O2: reqwest parses the URI again, by different rules than the origin check.
    #[test]
    fn reqwest_connects_to_the_checked_origin(
        scheme in "https?|HTTPS|wss",
        before in "([a-z.]{0,9}[@\\\\/%:])?",
        host in "(evil\\.com)?[aA]pi\\.selamgpt\\.com\\.?(%2e|\\\\|@|%00)?(evil\\.com)?",
        port in "(:(443|80|0443|))?",
        path in "([/\\\\?@.]{0,3}(evil\\.com)?){0,3}",
    ) {
        let text = format!("{scheme}://{before}{host}{port}{path}");
        if let Ok(request) = Request::get(&text).body("")
            && Origins::selam().allows(request.uri())
            && let Ok(request) = reqwest::Request::try_from(request)
        {
            let url = request.url();
            prop_assert!(matches!(url.scheme(), "https" | "wss"), "{url}");
            prop_assert_eq!(url.host_str().map(|host| host.trim_end_matches('.')), Some("api.selamgpt.com"));
            prop_assert_eq!(url.port_or_known_default(), Some(443));
        }
    }
}
