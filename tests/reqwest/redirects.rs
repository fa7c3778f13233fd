//! O4: what reqwest takes to another origin when it is redirected there by the first, and what it does not under the
//! layers. Over two real origins on loopback.

use http::{Request, StatusCode, header::LOCATION};
use proptest::prelude::*;
use tower::{ServiceBuilder, ServiceExt};
use tower_http::follow_redirect::FollowRedirectLayer;
use tower_selam::{
    Error, Origins, RequestAuth,
    adapter::reqwest::{Client, HttpService, TryCloneBody, redirect_policy},
};

use crate::support::{CHAT, SESSION, WIRES, World, handshake, header, in_time, plain, world};

const STATUSES: [u16; 4] = [301, 302, 307, 308];

/// The API, and somebody else at another port.
async fn two_origins() -> (World, World) {
    (plain().await, plain().await)
}

/// A client with credentials of both sorts.
fn pair(api: &World, http: HttpService) -> Client {
    let layer = api.builder().with_jwt(api.jwt()).build().unwrap();
    Client::with_layers(&layer.with_replay(TryCloneBody), http)
}

#[tokio::test]
async fn o4_plain_reqwest_takes_the_key_and_the_query_to_another_origin() {
    for status in STATUSES {
        let (api, elsewhere) = two_origins().await;
        api.redirect(status, &elsewhere.url("chat/completions"));
        let plain = api.reqwest().build().unwrap();
        let request = plain.post(api.url("chat/completions?api_key=in-the-query")).bearer_auth("a.b.c");
        in_time(request.header("x-api-key", &api.key).body(CHAT).send()).await.unwrap();
        let leaked = elsewhere.last();
        assert_eq!(header(&leaked, "x-api-key"), [&*api.key], "{status}: reqwest has mended it");
        assert_eq!(header(&leaked, "referer"), [api.url("chat/completions?api_key=in-the-query")]);
        assert!(header(&leaked, "authorization").is_empty(), "{status}");

        // So it is with the layers around a client of that sort.
        let selam = pair(&api, HttpService::dangerous_with_client(plain.clone()));
        api.redirect(status, &elsewhere.url("chat/completions"));
        let _ = in_time(selam.execute(plain.post(api.url("chat/completions")).body(CHAT))).await;
        assert_eq!(header(&elsewhere.last(), "x-api-key"), [&*api.key], "{status}");
        let agent = selam.with_extension(RequestAuth::VoiceAgent);
        api.redirect(status, &elsewhere.url("audio/agent"));
        let _ = in_time(agent.execute(handshake(&plain, &api.url("audio/agent")))).await;
        assert!(header(&elsewhere.last(), "referer")[0].contains(&api.key), "{status}");
    }
}

#[tokio::test]
async fn o4_nothing_reaches_another_origin() {
    for status in STATUSES {
        let (api, elsewhere) = two_origins().await;
        let selam = pair(&api, HttpService::new(api.reqwest()).unwrap());
        for choice in [RequestAuth::ApiKey, RequestAuth::ApiKeyAndJwt, RequestAuth::VoiceAgent] {
            let location = elsewhere.url("chat/completions");
            api.redirect(status, &location);
            let selam = selam.clone().with_extension(choice.clone());
            let request = match choice {
                RequestAuth::VoiceAgent => handshake(selam.reqwest(), &api.url("audio/agent")),
                _ => selam.reqwest().post(api.url("chat/completions?x=1")).body(CHAT),
            };
            let response = in_time(selam.execute(request)).await.unwrap();
            assert_eq!(response.status().as_u16(), status, "{choice:?}: the redirect comes up");
            assert_eq!(response.headers()[LOCATION], *location);
        }
        assert_eq!(api.simulator.requests(), 3);
        assert_eq!(elsewhere.simulator.requests(), 0, "{status}");
    }
}

#[tokio::test]
async fn o4_nothing_leaves_tls_for_plain_http_nor_by_way_of_a_detour() {
    for &wire in WIRES {
        let (api, elsewhere) = (world(wire).await, plain().await);
        let selam = pair(&api, HttpService::new(api.reqwest()).unwrap());
        let post = || selam.reqwest().post(api.url("chat/completions")).body(CHAT);
        for status in STATUSES {
            api.redirect(status, &elsewhere.url("chat/completions"));
            assert_eq!(in_time(selam.execute(post())).await.unwrap().status().as_u16(), status);

            // First within the origin, then out of it.
            api.redirect(status, "/v1/models");
            api.redirect(status, &elsewhere.url("chat/completions"));
            let response = in_time(selam.execute(post())).await.unwrap();
            assert_eq!(response.status().as_u16(), status);
            assert_eq!(response.url().path(), "/v1/models");
        }
        assert_eq!(elsewhere.simulator.requests(), 0);
    }
}

#[tokio::test]
async fn o4_a_redirect_within_the_origin_is_followed_with_credentials() {
    for &wire in WIRES {
        let api = world(wire).await;
        let selam = pair(&api, HttpService::new(api.reqwest()).unwrap());
        for status in [307, 308] {
            api.redirect(status, "/v1/audio/agent/sessions?moved=1");
            let request = selam.reqwest().post(api.url("audio/agent/sessions")).body(SESSION);
            let response = in_time(selam.execute(request)).await.unwrap();
            assert_eq!(response.status(), StatusCode::OK);
            assert_eq!(response.url().as_str(), api.url("audio/agent/sessions?moved=1"));
            assert_eq!(header(&api.last(), "x-api-key"), [&*api.key]);
            assert_eq!(&*api.last().body, SESSION.as_bytes());
        }
        // Not for ever.
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

#[tokio::test]
async fn o4_a_follower_outside_the_layers_gets_there_without_credentials() {
    for status in STATUSES {
        let (api, elsewhere) = two_origins().await;
        let origins = api.base_url().origins().strip_for_other_origins();
        let layer = api.builder().with_jwt(api.jwt()).with_origins(origins).build().unwrap();
        let layers =
            ServiceBuilder::new().layer(FollowRedirectLayer::new()).layer(layer.with_replay(TryCloneBody));
        let service = layers.service(HttpService::new(api.reqwest()).unwrap());
        api.redirect(status, &elsewhere.url("chat/completions?x=1"));
        // Without a body: the follower does not know how to have reqwest's again.
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

#[tokio::test]
async fn o4_the_policy_alone_does_as_much_for_a_client_built_elsewhere() {
    let (api, elsewhere) = two_origins().await;
    let client = api.reqwest().redirect(redirect_policy()).build().unwrap();
    let selam = pair(&api, HttpService::dangerous_with_client(client));
    for status in STATUSES {
        api.redirect(status, &elsewhere.url("chat/completions"));
        let request = selam.reqwest().post(api.url("chat/completions")).body(CHAT);
        assert_eq!(in_time(selam.execute(request)).await.unwrap().status().as_u16(), status);
    }
    assert_eq!(elsewhere.simulator.requests(), 0);
}

#[tokio::test]
async fn o4_another_origin_that_may_have_them_gets_them_from_the_layers_alone() {
    let (api, other) = two_origins().await;
    let both =
        api.base_url().origins().allow_insecure_loopback(other.server.base_url().trim_end_matches("/v1"));
    other.simulator.add_key(&*api.key);
    let layer = api.builder().with_origins(both.unwrap().strip_for_other_origins()).build().unwrap();
    for status in STATUSES {
        // By itself, reqwest would go there without `Authorization`.
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

#[tokio::test]
async fn o4_a_builders_own_policy_does_not_count() {
    let (api, elsewhere) = two_origins().await;
    let builder = api.reqwest().redirect(reqwest::redirect::Policy::limited(3));
    let selam = Client::new(api.builder().build().unwrap(), builder).unwrap();
    api.redirect(307, &elsewhere.url("chat/completions"));
    let request = selam.reqwest().post(api.url("chat/completions")).body(CHAT);
    assert_eq!(in_time(selam.execute(request)).await.unwrap().status().as_u16(), 307);
    assert_eq!(elsewhere.simulator.requests(), 0);
}

proptest! {
    /// reqwest reads a URI anew, by other rules than it was judged by.
    #[test]
    fn o2_reqwest_goes_to_the_origin_that_was_allowed(
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
