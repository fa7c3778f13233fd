//! `adapter::reqwest::Client`: credentials, replays, errors and streams.

use std::{sync::atomic::Ordering::SeqCst, time::Duration};

use http::{Request, StatusCode};
use tokio::task::JoinSet;
use tower::{Layer, Service, ServiceBuilder, ServiceExt};
use tower_selam::{
    ApiKey, ApiKeyLayer, AuthError, AuthErrorKind, BoxError, Credentials, Error, JwtLayer, PerSubject,
    RefreshLayer, RequestAuth, Subject, Token,
    adapter::reqwest::{Client, HttpService, TryCloneBody},
    oauth::{ClientAuth, OAuthSource, TokenEndpoint},
    simulator::{Fault, Received},
    source::{Reason, source_fn},
    stack::ResponseBody,
};

use crate::support::{CHAT, DEADLINE, PROTOCOLS, SESSION, handshake, header, in_time, plain, stream, world};

/// H1: a completion with the key alone.
#[tokio::test]
async fn key_alone_is_sent_as_bearer() {
    for &protocol in PROTOCOLS {
        let world = world(protocol).await;
        let selam = world.key_alone();
        let url = world.url("chat/completions?lang=am");
        let request = selam.reqwest().post(&url).header("content-type", "application/json").body(CHAT);
        let response = in_time(selam.execute(request)).await.unwrap();
        assert_eq!((response.status(), response.version()), (StatusCode::OK, protocol.version()));
        assert_eq!(response.headers()["x-ratelimit-limit"], "600");
        assert_eq!(response.url().as_str(), url);
        assert_eq!(response.remote_addr(), Some(world.server.local_addr()));
        let length = response.content_length();
        let text = response.text().await.unwrap();
        assert!(text.contains("Selam! You said: Selam!"));
        assert_eq!(length, Some(text.len() as u64));

        let received = world.last();
        assert_eq!(header(&received, "authorization"), [format!("Bearer {}", world.key)]);
        assert!(header(&received, "x-api-key").is_empty());
        assert_eq!(header(&received, "content-type"), ["application/json"]);
        assert_eq!((received.version, &*received.body), (protocol.version(), CHAT.as_bytes()));
        assert_eq!(header(&received, "content-length"), [CHAT.len().to_string()]);
    }
}

/// H3: duplicates in the request are replaced too.
#[tokio::test]
async fn key_and_jwt_replace_owned_headers() {
    for &protocol in PROTOCOLS {
        let world = world(protocol).await;
        let jwt = world.jwt();
        let layer = world.builder().with_jwt(jwt.clone()).build().unwrap();
        let mut selam = Client::new(layer, world.reqwest()).unwrap();
        let request = selam.reqwest().post(world.url("audio/agent/sessions")).bearer_auth("from-caller");
        let request =
            request.header("x-api-key", "from-caller").header("x-api-key", "from-caller too").body(SESSION);
        let request = request.basic_auth("from-caller", Some("from-caller")).build().unwrap();
        // Through the `Service` implementation.
        let response = in_time(selam.ready().await.unwrap().call(request)).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(header(&world.last(), "authorization"), [format!("Bearer {}", jwt.expose_secret())]);
        assert_eq!(header(&world.last(), "x-api-key"), [&*world.key]);
    }
}

/// H4: an extension affects neither other clients nor other requests.
#[tokio::test]
async fn request_auth_applies_to_its_client_or_request() {
    let world = world(PROTOCOLS[0]).await;
    let layer = world.builder().with_jwt(world.jwt()).build().unwrap();
    let selam = Client::new(layer, world.reqwest()).unwrap();
    let chat = world.url("chat/completions");
    let post = || selam.reqwest().post(&chat).body(CHAT);

    let with_key = selam.clone().with_extension(RequestAuth::ApiKey);
    in_time(with_key.execute(post())).await.unwrap();
    assert_eq!(header(&world.last(), "authorization"), [format!("Bearer {}", world.key)]);
    assert!(header(&world.last(), "x-api-key").is_empty());

    in_time(selam.execute(post())).await.unwrap();
    assert_eq!(header(&world.last(), "x-api-key"), [&*world.key], "the original client is unchanged");

    // The request's extension takes precedence, in an `http::Request` and after conversion to reqwest's type.
    let other = world.simulator.issue_key();
    let custom = RequestAuth::Custom(Credentials::bearer(ApiKey::new(&*other).unwrap()));
    let request = || Request::post(&chat).extension(custom.clone()).body(CHAT).unwrap();
    in_time(with_key.execute(request())).await.unwrap();
    assert_eq!(header(&world.last(), "authorization"), [format!("Bearer {other}")]);
    let request = reqwest::Request::try_from(request()).unwrap();
    in_time(with_key.clone().oneshot(request)).await.unwrap();
    assert_eq!(header(&world.last(), "authorization"), [format!("Bearer {other}")]);

    let anonymous = selam.clone().with_extension(RequestAuth::Anonymous);
    let refused = in_time(anonymous.execute(post())).await.unwrap_err();
    assert_eq!(refused.auth().unwrap().kind(), AuthErrorKind::MissingApiKey);
}

/// H4: the client's `Subject` selects the JWT, unless the request names another.
#[tokio::test]
async fn each_subject_gets_its_own_jwt() {
    let world = world(PROTOCOLS[0]).await;
    let jwts = PerSubject::new(|subject: &Subject| {
        let token = Token::new(format!("jwt-of-{}", subject.as_str()));
        source_fn(move |_: Reason<Token>| std::future::ready(token.clone()))
    });
    let selam = Client::new(world.builder().with_jwt(jwts).build().unwrap(), world.reqwest()).unwrap();
    let url = world.url("audio/agent/sessions");
    let [almaz, kaleb] = ["almaz", "kaleb"].map(|name| selam.for_subject(&Subject::new(name)));
    // The API rejects these made-up tokens.
    for (request, expected) in [
        (almaz.post(&url), "almaz"),
        (kaleb.post(&url), "kaleb"),
        (almaz.post(&url).with_extension(Subject::new("kaleb")), "kaleb"),
        (almaz.post(&url), "almaz"),
    ] {
        assert!(in_time(request.body(SESSION).send()).await.is_err());
        assert_eq!(header(&world.last(), "authorization"), [format!("Bearer jwt-of-{expected}")]);
    }
    let sent = world.simulator.requests();
    let refused = in_time(selam.post(&url).body(SESSION).send()).await.unwrap_err();
    assert_eq!(refused.auth().unwrap().kind(), AuthErrorKind::CredentialUnavailable, "no subject");
    assert_eq!(world.simulator.requests(), sent);
}

/// H1, H3: what the client's own builder sends goes through the layers.
#[tokio::test]
async fn the_builder_sends_through_the_layers() {
    for &protocol in PROTOCOLS {
        let world = world(protocol).await;
        let layer = world.builder().with_jwt(world.jwt()).build().unwrap();
        let selam = Client::new(layer, world.reqwest()).unwrap();
        let url = world.url("chat/completions");
        let mut headers = http::HeaderMap::new();
        headers.insert("x-mine", "1".parse().unwrap());
        let question: serde_json::Value = serde_json::from_str(CHAT).unwrap();
        let request = selam.post(&url).headers(headers).header("authorization", "Bearer theirs");
        let request = request.timeout(DEADLINE).json(&question).map(|request| request.bearer_auth("theirs"));
        assert!(!format!("{request:?}").contains("theirs"));
        let response = in_time(request.send()).await.unwrap();
        assert_eq!((response.status(), response.version()), (StatusCode::OK, protocol.version()));
        let received = world.last();
        assert_eq!(serde_json::from_slice::<serde_json::Value>(&received.body).unwrap(), question);
        assert_eq!(header(&received, "content-type"), ["application/json"]);
        assert_eq!(header(&received, "x-mine"), ["1"]);
        assert_eq!(header(&received, "x-api-key"), [&*world.key]);
        let bearer = header(&received, "authorization");
        assert!(bearer.len() == 1 && !bearer[0].contains("theirs"), "{bearer:?}");

        let request = selam.post(&url).body(CHAT).with_extension(RequestAuth::ApiKey);
        in_time(request.send()).await.unwrap();
        assert_eq!(header(&world.last(), "authorization"), [format!("Bearer {}", world.key)]);
        in_time(selam.get(&url).send()).await.unwrap();
        assert_eq!(world.last().method, http::Method::GET);
        assert_eq!(header(&world.last(), "x-api-key"), [&*world.key], "the extension applied to one request");
        in_time(selam.request(http::Method::DELETE, &url).send()).await.unwrap();
        assert_eq!(world.last().method, http::Method::DELETE);
    }
}

/// What cannot be built is an error of `send`; nothing is sent, not even before the future is polled.
#[tokio::test]
async fn the_builder_reports_mistakes_when_it_sends() {
    let world = plain().await;
    let selam = world.key_alone();
    let not_json = std::collections::HashMap::from([((), ())]);
    let url = world.url("chat/completions");
    for request in
        [selam.get("no url"), selam.post(&url).json(&not_json), selam.post(&url).header("x", "a\nb")]
    {
        match in_time(request.send()).await {
            Err(Error::Inner(error)) => assert!(error.is_builder()),
            other => panic!("{other:?}"),
        }
    }
    drop(selam.post(&url).body(CHAT).send());
    assert_eq!(world.simulator.requests(), 0);
}

/// J2: every request is replayed after the single refresh.
#[tokio::test]
async fn concurrent_401s_cause_one_refresh() {
    for &protocol in PROTOCOLS {
        let world = world(protocol).await;
        let (jwts, refreshes) = world.refreshing();
        let selam = Client::new(world.builder().with_jwt(jwts.clone()).build().unwrap(), world.reqwest());
        let selam = selam.unwrap();
        jwts.prefetch().await.unwrap();
        world.simulator.expire_jwts();
        let calls: JoinSet<_> = (0..16)
            .map(|_| selam.execute(selam.reqwest().post(world.url("audio/agent/sessions")).body(SESSION)))
            .collect();
        for response in in_time(calls.join_all()).await {
            assert_eq!(response.unwrap().status(), StatusCode::OK);
        }
        assert_eq!(refreshes.load(SeqCst), 2, "{protocol:?}");
    }
}

/// J7: the replay differs only in `Authorization`.
#[tokio::test]
async fn bytes_are_replayed_byte_for_byte() {
    let long: &'static str = Box::leak(format!("{{\"voice\":\"{}\"}}", "x".repeat(300_000)).into());
    for (&protocol, body) in
        PROTOCOLS.iter().flat_map(|protocol| [(protocol, SESSION), (protocol, ""), (protocol, long)])
    {
        let world = world(protocol).await;
        let (jwts, _) = world.refreshing();
        let layer = world.builder().with_jwt(jwts.clone()).build().unwrap();
        let selam = Client::new(layer, world.reqwest()).unwrap();
        jwts.prefetch().await.unwrap();
        world.simulator.expire_jwts();
        let request = selam.reqwest().post(world.url("audio/agent/sessions?lang=am")).header("x-mine", "1");
        let response = in_time(selam.execute(request.body(body))).await.unwrap();
        assert_ne!(response.status(), StatusCode::UNAUTHORIZED);

        let received = world.simulator.received();
        let [first, replay] = &*received else { panic!("{received:?}") };
        assert_ne!(first.headers["authorization"], replay.headers["authorization"]);
        let head = |received: &Received| {
            let mut headers = received.headers.clone();
            headers.remove("authorization");
            (received.method.clone(), received.uri.clone(), received.version, headers)
        };
        assert_eq!(head(first), head(replay));
        assert_eq!((&first.body, first.body_length), (&replay.body, replay.body_length));
        assert_eq!(replay.body_length, body.len() as u64);
    }
}

/// J7: its 401 is returned intact, and the token is refreshed.
#[tokio::test]
async fn stream_is_not_replayed() {
    for &protocol in PROTOCOLS {
        let world = world(protocol).await;
        let (jwts, refreshes) = world.refreshing();
        let jwt = (
            JwtLayer::new(jwts.clone()).with_origins(world.base_url().origins()),
            ApiKeyLayer::x_api_key(world.api_key()).with_origins(world.base_url().origins()),
        );
        let layers = ServiceBuilder::new()
            .layer(RefreshLayer::with_replay(TryCloneBody))
            .layer(jwt)
            .map_err(Error::Inner);
        let selam = Client::with_layers(&layers, HttpService::new(world.reqwest()).unwrap());
        jwts.prefetch().await.unwrap();
        world.simulator.expire_jwts();
        let post = || selam.reqwest().post(world.url("audio/agent/sessions"));

        let response = in_time(selam.execute(post().body(stream(SESSION)))).await.unwrap();
        assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
        let length = response.content_length();
        let text = response.text().await.unwrap();
        assert!(
            serde_json::from_str::<serde_json::Value>(&text).unwrap()["error"]["code"].is_string(),
            "{text}"
        );
        assert_eq!(length, Some(text.len() as u64));
        assert_eq!(world.simulator.requests(), 1, "sent once");
        assert_eq!(&*world.last().body, SESSION.as_bytes());

        // The token was rejected, so the next request waits for another.
        let response = in_time(selam.execute(post().body(stream(SESSION)))).await.unwrap();
        assert_eq!((response.status(), refreshes.load(SeqCst)), (StatusCode::OK, 2));
    }
}

/// J7: `buffered` makes streams replayable.
#[tokio::test]
async fn buffered_stream_is_replayed() {
    for &protocol in PROTOCOLS {
        let world = world(protocol).await;
        let (jwts, _) = world.refreshing();
        let layer = world.builder().with_jwt(jwts.clone()).build().unwrap().buffered(1024);
        let selam = Client::with_layers(&layer, HttpService::new(world.reqwest()).unwrap());
        jwts.prefetch().await.unwrap();
        world.simulator.expire_jwts();
        let request = selam.reqwest().post(world.url("audio/agent/sessions")).body(stream(SESSION));
        assert_eq!(in_time(selam.execute(request)).await.unwrap().status(), StatusCode::OK);
        let bodies: Vec<_> = world.simulator.received().into_iter().map(|received| received.body).collect();
        assert_eq!(bodies, [SESSION, SESSION]);
    }
}

/// E1: a revoked key gives `InvalidApiKey`.
#[tokio::test]
async fn invalid_key_is_a_typed_error() {
    for &protocol in PROTOCOLS {
        let world = world(protocol).await;
        let selam = world.key_alone();
        world.simulator.revoke_key(&world.key);
        let request = selam.reqwest().post(world.url("chat/completions")).body(CHAT);
        match in_time(selam.execute(request)).await {
            Err(Error::Auth(error)) => assert_eq!(error.kind(), AuthErrorKind::InvalidApiKey),
            other => panic!("{other:?}"),
        }
    }
}

/// E5: the first chunk arrives although the body never ends.
#[tokio::test]
async fn first_chunk_of_a_stream_is_not_delayed() {
    for &protocol in PROTOCOLS {
        let world = world(protocol).await;
        let selam = world.key_alone();
        // The body stalls after its first bytes.
        world.simulator.inject(Fault::StallBody { after: 20 });
        let request = selam.reqwest().post(world.url("chat/completions"));
        let body = r#"{"stream":true,"messages":[{"role":"user","content":"Selam!"}]}"#;
        let mut response = in_time(selam.execute(request.body(body))).await.unwrap();
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        assert!(in_time(response.chunk()).await.unwrap().unwrap().starts_with(b"data: {"));
    }
}

/// E7: `AuthError::find` sees through `buffer`, `timeout` and boxes.
#[tokio::test]
async fn auth_error_is_found_through_tower_layers() {
    let world = world(PROTOCOLS[0]).await;
    let layer = world.builder().build().unwrap().with_replay(TryCloneBody);
    let layers = ServiceBuilder::new()
        .buffer(4)
        .timeout(Duration::from_secs(60))
        .map_err(Error::into_boxed)
        .layer(layer);
    let selam = Client::with_layers(&layers, HttpService::new(world.reqwest()).unwrap());
    let post = |key: &str| {
        let custom = RequestAuth::Custom(Credentials::bearer(ApiKey::new(key).unwrap()));
        Request::post(world.url("chat/completions")).extension(custom).body(CHAT).unwrap()
    };
    assert_eq!(in_time(selam.execute(post(&world.key))).await.unwrap().status(), StatusCode::OK);
    let refused: BoxError = in_time(selam.execute(post("sk-selam-unknown"))).await.unwrap_err();
    assert_eq!(AuthError::find(&*refused).unwrap().kind(), AuthErrorKind::InvalidApiKey);
    let elsewhere = selam.reqwest().post("https://evil.example/v1/models");
    let refused = in_time(selam.execute(elsewhere)).await.unwrap_err();
    assert_eq!(AuthError::find(&*refused).unwrap().kind(), AuthErrorKind::OriginNotAllowed);
}

#[tokio::test]
async fn timeout_and_version_are_kept() {
    let world = world(PROTOCOLS[0]).await;
    let selam = world.key_alone();
    world.simulator.inject(Fault::Stall);
    let request = selam.reqwest().post(world.url("chat/completions")).body(CHAT);
    let request = request.timeout(Duration::from_millis(50)).build().unwrap();
    match in_time(selam.execute(request)).await {
        Err(Error::Inner(error)) => assert!(error.is_timeout(), "{error:?}"),
        other => panic!("{other:?}"),
    }

    // The timeout also applies to the replay.
    let (jwts, _) = world.refreshing();
    let layer = world.builder().with_jwt(jwts.clone()).build().unwrap();
    let selam = Client::new(layer, world.reqwest()).unwrap();
    jwts.prefetch().await.unwrap();
    world.simulator.inject(Fault::Answer(
        http::Response::builder().status(401).body(bytes::Bytes::from_static(b"{}")).unwrap(),
    ));
    world.simulator.inject(Fault::Stall);
    let request = selam.reqwest().post(world.url("audio/agent/sessions")).body(SESSION);
    match in_time(selam.execute(request.timeout(Duration::from_millis(200)))).await {
        Err(Error::Inner(error)) => assert!(error.is_timeout(), "{error:?}"),
        other => panic!("{other:?}"),
    }

    let plain = plain().await;
    let selam = plain.key_alone();
    let request =
        selam.reqwest().post(plain.url("chat/completions")).version(http::Version::HTTP_10).body(CHAT);
    assert_eq!(in_time(selam.execute(request)).await.unwrap().status(), StatusCode::OK);
    assert_eq!(plain.last().version, http::Version::HTTP_10);
}

#[tokio::test]
async fn handshake_is_upgraded_through_the_layers() {
    let world = world(PROTOCOLS[0]).await;
    let jwt = world.jwt();
    let layer = world.builder().with_jwt(jwt).build().unwrap();
    let selam = Client::new(layer, world.reqwest().http1_only()).unwrap();
    let agent = selam.clone().with_extension(RequestAuth::VoiceAgent);
    let request = handshake(selam.reqwest(), &world.voice_agent("&voice=mekdes"));
    let response = in_time(agent.execute(request)).await.unwrap();
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    assert!(world.last().uri.query().unwrap().contains(&world.key));
    assert_eq!(response.url().query(), None, "the credentials are removed");
    let mut socket = in_time(response.upgrade()).await.unwrap();
    let mut hello = [0; 2];
    in_time(tokio::io::AsyncReadExt::read_exact(&mut socket, &mut hello)).await.unwrap();
    assert_eq!(hello[0], 0x81, "a text frame");
}

#[tokio::test]
async fn http_service_works_for_token_endpoints() {
    let world = world(PROTOCOLS[0]).await;
    let none = reqwest::redirect::Policy::none();
    let http = HttpService::dangerous_with_client(world.reqwest().redirect(none).build().unwrap());
    let url = world.server.base_url().replace("/v1", "/oauth/token");
    let endpoint = TokenEndpoint::allow_insecure_loopback::<_, reqwest::Body, _>(&url, http.clone())
        .or_else(|_| TokenEndpoint::new::<_, reqwest::Body, _>(&url, http))
        .unwrap()
        .with_client_auth(ClientAuth::api_key(world.api_key()));
    let jwts = tower_selam::Refreshing::new(OAuthSource::client_credentials(endpoint));
    let selam = Client::new(world.builder().with_jwt(jwts).build().unwrap(), world.reqwest()).unwrap();
    let request = selam.reqwest().post(world.url("audio/agent/sessions")).body(SESSION);
    assert_eq!(in_time(selam.execute(request)).await.unwrap().status(), StatusCode::OK);
}

#[tokio::test]
async fn build_error_is_returned() {
    let world = world(PROTOCOLS[0]).await;
    let selam = world.key_alone();
    match in_time(selam.execute(selam.reqwest().get("no url"))).await {
        Err(Error::Inner(error)) => assert!(error.is_builder()),
        other => panic!("{other:?}"),
    }
    assert_eq!(world.simulator.requests(), 0);
}

#[tokio::test]
async fn layers_wrap_http_service_directly() {
    let world = world(PROTOCOLS[0]).await;
    let layer = world.builder().build().unwrap().with_replay(TryCloneBody);
    let service = layer.layer(HttpService::new(world.reqwest()).unwrap());
    let request = Request::post(world.url("chat/completions")).body(reqwest::Body::from(CHAT)).unwrap();
    let response: http::Response<ResponseBody<reqwest::Body>> =
        in_time(service.oneshot(request)).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
}
