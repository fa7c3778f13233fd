//! Tests behaviours over real connections: hyper-util's client, TLS, HTTP/1.1 and HTTP/2.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, Full};
use hyper_util::{
    client::legacy::Client,
    rt::{TokioExecutor, TokioIo},
};
use tokio::io::AsyncReadExt;
use tokio_rustls::TlsConnector;
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_selam::{
    ApiKey, ApiKeyLayer, AuthError, AuthErrorKind, AuthErrorLayer, BaseUrl, Credentials, Error, JwtLayer,
    Origins, RequestAuth, SelamLayer, Token,
    inbound::StripCredentialsLayer,
    simulator::{Fault, JwtAlgorithm, Received, Server, Simulator},
    stack::ResponseBody,
};

use crate::{
    errors::seen,
    support::{
        BOTH, Body, CHAT, CHAT_STREAM, HANG, Http, JWT, KEY, bring_theirs, builder, https, post, trusting,
    },
};

const MINUTE: Duration = Duration::from_secs(60);

struct World {
    simulator: Simulator,
    server: Server,
    key: String,
    jwt: String,
}

async fn world() -> World {
    let simulator = Simulator::new();
    let server = Server::tls(&simulator).await.unwrap();
    let key = simulator.issue_key();
    let jwt = simulator.mint_jwt(JwtAlgorithm::Es256, MINUTE);
    World { simulator, server, key, jwt }
}

impl World {
    fn key_alone(&self) -> SelamLayer {
        builder(&self.server).with_api_key(ApiKey::new(&*self.key).unwrap()).build().unwrap()
    }

    fn key_and_jwt(&self) -> SelamLayer {
        let builder = builder(&self.server).with_api_key(ApiKey::new(&*self.key).unwrap());
        builder.with_jwt(Token::new(&*self.jwt).unwrap()).build().unwrap()
    }

    fn last(&self) -> Received {
        self.simulator.received().pop().unwrap()
    }

    /// Sends a request through `layer` and a new client.
    async fn send(
        &self,
        layer: &SelamLayer,
        http: Http,
        request: Request<Body>,
    ) -> Result<Response<ResponseBody<hyper::body::Incoming>>, Error<hyper_util::client::legacy::Error>> {
        let client = layer.layer(https(&self.server, http));
        tokio::time::timeout(HANG, client.oneshot(request)).await.expect("no answer in time")
    }

    async fn refused(&self, layer: &SelamLayer, http: Http, request: Request<Body>) -> AuthError {
        match self.send(layer, http, request).await {
            Err(Error::Auth(error)) => error,
            other => panic!("{other:?}"),
        }
    }
}

fn header(received: &Received, name: &str) -> Vec<String> {
    received.headers.get_all(name).iter().map(|value| value.to_str().unwrap().to_owned()).collect()
}

async fn text(response: Response<ResponseBody<hyper::body::Incoming>>) -> String {
    let body = tokio::time::timeout(HANG, response.into_body().collect()).await.unwrap().unwrap();
    String::from_utf8(body.to_bytes().to_vec()).unwrap()
}

/// H1: a completion with the key alone.
#[tokio::test]
async fn key_alone_is_sent_as_bearer() {
    let world = world().await;
    let layer = world.key_alone();
    for (http, version) in [(Http::One, Version::HTTP_11), (Http::Two, Version::HTTP_2)] {
        let response = world.send(&layer, http, post(&layer, "chat/completions", CHAT)).await.unwrap();
        assert_eq!((response.status(), response.version()), (StatusCode::OK, version));
        assert_eq!(response.headers()["x-ratelimit-limit"], "600");
        assert!(text(response).await.contains("Selam! You said: Selam!"));

        let received = world.last();
        assert_eq!(header(&received, "authorization"), [format!("Bearer {}", world.key)]);
        assert!(header(&received, "x-api-key").is_empty());
        assert_eq!(received.version, version);
    }
}

/// H1, H3: both headers of the request are replaced.
#[tokio::test]
async fn key_and_jwt_replace_owned_headers() {
    let world = world().await;
    let layer = world.key_and_jwt();
    for http in BOTH {
        let mut request = post(&layer, "audio/agent/sessions", r#"{"voice":"mekdes"}"#);
        bring_theirs(&mut request);
        let response = world.send(&layer, http, request).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        assert!(text(response).await.contains("mekdes"));
        assert_eq!(header(&world.last(), "authorization"), [format!("Bearer {}", world.jwt)]);
        assert_eq!(header(&world.last(), "x-api-key"), [&*world.key]);
    }
}

/// H1: the API accepts both orders.
#[tokio::test]
async fn key_and_jwt_layers_compose_in_either_order() {
    let world = world().await;
    let base = BaseUrl::new(world.server.base_url()).unwrap();
    let jwt = JwtLayer::new(Token::new(&*world.jwt).unwrap()).with_origins(base.origins());
    let key = ApiKeyLayer::x_api_key(ApiKey::new(&*world.key).unwrap()).with_origins(base.origins());
    let uri = base.endpoint("audio/agent/sessions").unwrap();
    for http in BOTH {
        let request = || Request::post(&uri).body(Full::from("{}")).unwrap();
        let client = https(&world.server, http).map_err(Error::Inner);
        let responses = [
            key.layer(jwt.layer(client.clone())).oneshot(request()).await,
            jwt.layer(key.layer(client)).oneshot(request()).await,
        ];
        for response in responses {
            assert_eq!(response.unwrap().status(), StatusCode::OK);
        }
    }
}

/// H1: the key in `X-API-Key` alone.
#[tokio::test]
async fn key_is_sent_as_x_api_key() {
    let world = world().await;
    let base = BaseUrl::new(world.server.base_url()).unwrap();
    let layer = ApiKeyLayer::x_api_key(ApiKey::new(&*world.key).unwrap()).with_origins(base.origins());
    for http in BOTH {
        let request = Request::post(base.endpoint("audio/speech").unwrap())
            .header("authorization", "Bearer from-caller");
        // The key layer does not own `Authorization`, so another layer removes the caller's.
        let layers = (StripCredentialsLayer::new(), layer.clone());
        let client = layers.layer(https(&world.server, http).map_err(Error::Inner));
        let response = client.oneshot(request.body(Full::from("{}")).unwrap()).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        assert!(header(&world.last(), "authorization").is_empty());
        assert_eq!(header(&world.last(), "x-api-key"), [&*world.key]);
    }
}

/// O2: with `strip_for_other_origins`, another origin gets the request without credentials.
#[tokio::test]
async fn other_origins_get_no_credentials() {
    let (api, elsewhere) = (world().await, world().await);
    let base = BaseUrl::new(api.server.base_url()).unwrap();
    let credentials = (Token::new(&*api.jwt).unwrap(), ApiKey::new(&*api.key).unwrap());
    let layer = (
        JwtLayer::new(credentials.0).with_origins(base.origins().strip_for_other_origins()),
        ApiKeyLayer::x_api_key(credentials.1).with_origins(base.origins().strip_for_other_origins()),
    );
    let uri = BaseUrl::new(elsewhere.server.base_url()).unwrap().endpoint("chat/completions").unwrap();
    for http in BOTH {
        let request = Request::post(&uri).header("x-api-key", "from-caller").body(Full::from(CHAT)).unwrap();
        let client = layer.layer(https(&elsewhere.server, http).map_err(Error::Inner));
        let response = client.oneshot(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
        assert!(header(&elsewhere.last(), "authorization").is_empty());
        assert!(header(&elsewhere.last(), "x-api-key").is_empty());
    }
    assert_eq!(api.simulator.requests(), 0);
}

#[tokio::test]
async fn simulator_serves_plain_http1_and_http2() {
    let simulator = Simulator::new();
    let server = Server::http(&simulator).await.unwrap();
    let base = BaseUrl::allow_insecure_loopback(server.base_url()).unwrap();
    let key = ApiKey::new(simulator.issue_key()).unwrap();
    let layer = SelamLayer::builder().with_api_key(key).with_base_url(base).build().unwrap();
    for (http, version) in [(Http::One, Version::HTTP_11), (Http::Two, Version::HTTP_2)] {
        let client = Client::builder(TokioExecutor::new()).http2_only(http == Http::Two).build_http();
        let response = layer.layer(client).oneshot(post(&layer, "chat/completions", CHAT)).await.unwrap();
        assert_eq!((response.status(), response.version()), (StatusCode::OK, version));
    }
}

/// H3: the hop-by-hop trick `Connection: authorization`.
#[tokio::test]
async fn connection_header_cannot_remove_credentials() {
    let world = world().await;
    let layer = world.key_and_jwt();
    for http in BOTH {
        let mut request = post(&layer, "audio/agent/sessions", "{}");
        request.headers_mut().insert("connection", "authorization, x-api-key".parse().unwrap());
        assert_eq!(world.send(&layer, http, request).await.unwrap().status(), StatusCode::OK);
    }

    // Without the layers, hyper's HTTP/2 client drops what `Connection` names.
    let mut request = post(&layer, "chat/completions", CHAT);
    request.headers_mut().insert("authorization", format!("Bearer {}", world.key).parse().unwrap());
    request.headers_mut().insert("connection", "authorization".parse().unwrap());
    let response = https(&world.server, Http::Two).request(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
}

/// H4: the next request gets the default credentials.
#[tokio::test]
async fn request_auth_applies_to_one_request() {
    let world = world().await;
    let layer = world.key_and_jwt();
    let tenant = world.simulator.issue_key();
    for http in BOTH {
        let mut client = layer.layer(https(&world.server, http));
        for (auth, bearer) in [
            (RequestAuth::Custom(Credentials::bearer(ApiKey::new(&*tenant).unwrap())), &tenant),
            (RequestAuth::ApiKey, &world.key),
        ] {
            let mut request = post(&layer, "chat/completions", CHAT);
            request.extensions_mut().insert(auth);
            client.ready().await.unwrap().call(request).await.unwrap();
            assert_eq!(header(&world.last(), "authorization"), [format!("Bearer {bearer}")]);
            assert!(header(&world.last(), "x-api-key").is_empty());

            client.ready().await.unwrap().call(post(&layer, "chat/completions", CHAT)).await.unwrap();
            assert_eq!(header(&world.last(), "authorization"), [format!("Bearer {}", world.jwt)]);
        }
        let mut request = post(&layer, "chat/completions", CHAT);
        request.extensions_mut().insert(RequestAuth::Anonymous);
        let error = client.ready().await.unwrap().call(request).await.unwrap_err();
        assert_eq!(error.auth().unwrap().kind(), AuthErrorKind::MissingApiKey);
    }
}

/// O1, O2: refused before anything is sent.
#[tokio::test]
async fn disallowed_origins_receive_nothing() {
    let world = world().await;
    let plain = Server::http(&world.simulator).await.unwrap();
    let layer = world.key_alone();
    let port = world.server.local_addr().port();
    for http in BOTH {
        for uri in [
            format!("{}/chat/completions", plain.base_url()),
            format!("http://localhost:{port}/v1/chat/completions"),
            format!("https://127.0.0.1:{port}/v1/chat/completions"),
            format!("https://localhost.evil.com:{port}/v1/chat/completions"),
            format!("https://localhost:{port}@127.0.0.1:{port}/v1/chat/completions"),
        ] {
            let request = Request::post(&uri).body(Full::from(CHAT)).unwrap();
            let error = world.refused(&layer, http, request).await;
            assert_eq!(error.kind(), AuthErrorKind::OriginNotAllowed, "{uri}");
        }
    }
    assert_eq!(world.simulator.requests(), 0);
}

/// E1: the three documented errors.
#[tokio::test]
async fn documented_errors_are_typed() {
    let world = world().await;
    let revoked = world.simulator.issue_key();
    let limited = ApiKey::new(world.simulator.issue_limited_key()).unwrap();
    world.simulator.revoke_key(&revoked);
    let with = |key| builder(&world.server).with_api_key(key).build().unwrap();
    for http in BOTH {
        let layer = with(ApiKey::new(&*revoked).unwrap());
        let error = world.refused(&layer, http, post(&layer, "chat/completions", CHAT)).await;
        assert_eq!(error.kind(), AuthErrorKind::InvalidApiKey);
        assert_eq!(error.message(), Some("Invalid API key provided."));
        assert!(error.request_id().unwrap().starts_with("req_"));
        assert_eq!(error.rate_limit().unwrap().limit, Some(600));

        let mut request = post(&layer, "chat/completions", CHAT);
        request.extensions_mut().insert(RequestAuth::Anonymous);
        let error = world.refused(&layer, http, request).await;
        assert_eq!(error.kind(), AuthErrorKind::MissingApiKey);

        let layer = with(limited.clone());
        let error = world.refused(&layer, http, post(&layer, "audio/speech", "{}")).await;
        assert_eq!(error.kind(), AuthErrorKind::InsufficientPermissions);
        assert_eq!(error.status(), Some(StatusCode::FORBIDDEN));
    }
}

/// E2, E3: every body of `error-bodies.json`.
#[tokio::test]
async fn every_known_error_body_is_classified() {
    let world = world().await;
    let layer = world.key_alone();
    for http in BOTH {
        for seen in seen() {
            world.simulator.inject(Fault::Answer(seen.response()));
            let expected = seen.expect["kind"].as_str();
            match world.send(&layer, http, post(&layer, "chat/completions", CHAT)).await {
                Err(Error::Auth(error)) => {
                    assert_eq!(Some(&*format!("{:?}", error.kind())), expected, "{}", seen.id);
                    assert_eq!(error.body(), seen.body.as_bytes(), "{}", seen.id);
                }
                Ok(response) => {
                    assert_eq!((response.status().as_u16(), expected), (seen.status, None), "{}", seen.id);
                    assert_eq!(text(response).await, seen.body, "{}", seen.id);
                }
                Err(Error::Inner(error)) => panic!("{}: {error}", seen.id),
            }
        }
    }
}

/// E7: through `timeout` and `buffer`.
#[tokio::test]
async fn auth_error_is_found_through_tower_layers() {
    let world = world().await;
    world.simulator.revoke_key(&world.key);
    let layer = world.key_alone();
    for http in BOTH {
        let stack = ServiceBuilder::new()
            .timeout(HANG)
            .buffer(4)
            .map_err(Error::into_boxed)
            .layer(layer.clone())
            .service(https(&world.server, http));
        let error = stack.oneshot(post(&layer, "chat/completions", CHAT)).await.unwrap_err();
        assert_eq!(AuthError::find(&*error).unwrap().kind(), AuthErrorKind::InvalidApiKey);
    }
}

/// O3: URIs without authority, over HTTP/1.1 and as in tonic.
#[tokio::test]
async fn relative_uris_work_with_a_stated_origin() {
    let world = world().await;
    let authority = format!("localhost:{}", world.server.local_addr().port());
    let origin = format!("https://{authority}");
    let tls = TlsConnector::from(Arc::new(trusting(&world.server)));
    let tcp = tokio::net::TcpStream::connect(world.server.local_addr()).await.unwrap();
    let stream = tls.connect("localhost".try_into().unwrap(), tcp).await.unwrap();
    let (sender, connection) =
        hyper::client::conn::http1::handshake::<_, Body>(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let mut sender = Some(sender);
    let connection = service_fn(move |request| {
        let mut sender = sender.take().expect("one request");
        async move { sender.send_request(request).await }
    });
    // The layer needs a cloneable client, because a request may wait for its credential. hyper's connection is not one.
    let connection = ServiceBuilder::new().buffer(1).service(connection);
    let origins = Origins::new(&origin).unwrap().with_relative_uri_origin(&origin).unwrap();
    let layer = ApiKeyLayer::bearer(ApiKey::new(&*world.key).unwrap()).with_origins(origins);
    let request =
        Request::post("/v1/chat/completions").header("host", authority).body(Full::from(CHAT)).unwrap();
    let response = layer.layer(connection).oneshot(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(header(&world.last(), "authorization"), [format!("Bearer {}", world.key)]);

    // As in tonic: over HTTP/2, with the origin added by the inner service.
    let origins = Origins::new(&origin).unwrap().with_relative_uri_origin(&origin).unwrap();
    let layer = ApiKeyLayer::bearer(ApiKey::new(&*world.key).unwrap()).with_origins(origins);
    let client = ServiceBuilder::new()
        .map_err(Error::Inner)
        .map_request(move |mut request: Request<Body>| {
            *request.uri_mut() = format!("{origin}{}", request.uri()).parse().unwrap();
            request
        })
        .service(https(&world.server, Http::Two));
    let request = Request::post("/v1/chat/completions").body(Full::from(CHAT)).unwrap();
    let response = layer.layer(client).oneshot(request).await.unwrap();
    assert_eq!((response.status(), response.version()), (StatusCode::OK, Version::HTTP_2));
}

/// E2: an expired JWT gives `TokenRejected`.
#[tokio::test]
async fn expired_jwt_is_token_rejected() {
    let world = world().await;
    let layer = world.key_and_jwt();
    world.simulator.expire_jwts();
    for http in BOTH {
        let error = world.refused(&layer, http, post(&layer, "audio/agent/sessions", "{}")).await;
        assert_eq!((error.kind(), error.code()), (AuthErrorKind::TokenRejected, Some("invalid_token")));
    }
}

/// E4: truncated, stalled, oversized, compressed and HEAD responses.
#[tokio::test]
async fn faulty_error_bodies_keep_the_status() {
    let world = world().await;
    world.simulator.revoke_key(&world.key);
    let with_timeout = |time| {
        let builder = builder(&world.server).with_api_key(ApiKey::new(&*world.key).unwrap());
        builder.with_error_body_timeout(time).build().unwrap()
    };
    let layer = with_timeout(HANG);
    // Sockets do not work with paused time. The bytes before the stall arrive well within this.
    let impatient = with_timeout(Duration::from_millis(400));
    let big = Response::builder().status(401).body(Bytes::from(vec![b'x'; 1 << 20])).unwrap();
    let gzip = Response::builder().status(403).header("content-encoding", "gzip");
    let gzip = gzip.body(Bytes::from_static(b"\x1f\x8b\x08\x00")).unwrap();
    for http in BOTH {
        for (fault, status, length) in [
            (Fault::CutOff { after: 20 }, 401, 0..21),
            (Fault::CutOff { after: 0 }, 401, 0..1),
            (Fault::StallBody { after: 20 }, 401, 20..21),
            (Fault::StallBody { after: 0 }, 401, 0..1),
            (Fault::Html(StatusCode::FORBIDDEN), 403, 20..200),
            (Fault::Answer(big.clone()), 401, 65_536..65_537),
            (Fault::Answer(gzip.clone()), 403, 4..5),
        ] {
            world.simulator.inject(fault.clone());
            let layer = if matches!(fault, Fault::StallBody { .. }) { &impatient } else { &layer };
            let error = world.refused(layer, http, post(layer, "chat/completions", CHAT)).await;
            assert_eq!(error.status().unwrap(), status, "{fault:?}");
            assert!(length.contains(&error.body().len()), "{fault:?}: {}", error.body().len());
        }
        let mut head = post(&layer, "chat/completions", "");
        *head.method_mut() = Method::HEAD;
        world.simulator.inject(Fault::Html(StatusCode::UNAUTHORIZED));
        let error = world.refused(&layer, http, head).await;
        assert_eq!((error.kind(), error.body()), (AuthErrorKind::Unauthorized, &b""[..]));
    }
}

/// E5: 2xx, 429 and 5xx are untouched.
#[tokio::test]
async fn streams_audio_and_other_errors_pass_through() {
    let world = world().await;
    let layer = world.key_alone();
    for http in BOTH {
        let response = world.send(&layer, http, post(&layer, "chat/completions", CHAT_STREAM)).await.unwrap();
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let events = text(response).await;
        assert!(events.starts_with("data: {") && events.ends_with("data: [DONE]\n\n"), "{events}");

        let response = world.send(&layer, http, post(&layer, "audio/speech", "{}")).await.unwrap();
        assert_eq!(response.headers()["content-type"], "audio/wav");
        assert!(response.into_body().collect().await.unwrap().to_bytes().starts_with(b"RIFF"));

        for (fault, status) in [
            (Fault::RateLimited { retry_after: Duration::from_secs(7) }, 429),
            (Fault::Unavailable, 503),
            (Fault::Html(StatusCode::BAD_GATEWAY), 502),
        ] {
            world.simulator.inject(fault);
            let response = world.send(&layer, http, post(&layer, "chat/completions", CHAT)).await.unwrap();
            assert_eq!(response.status().as_u16(), status);
            assert_eq!(response.headers().get("retry-after").is_some(), status == 429);
        }
    }
}

/// E5: the first event arrives before the second exists.
#[tokio::test]
async fn first_event_is_not_delayed() {
    let world = world().await;
    let layer = world.key_alone();
    for http in BOTH {
        // The stream stalls after its first bytes.
        world.simulator.inject(Fault::StallBody { after: 40 });
        let response = world.send(&layer, http, post(&layer, "chat/completions", CHAT_STREAM)).await.unwrap();
        let mut body = response.into_body();
        let first = tokio::time::timeout(HANG, body.frame()).await.unwrap().unwrap().unwrap();
        assert!(first.into_data().unwrap().starts_with(b"data: {"));
    }
}

/// E6: status and body are those the API sent.
#[tokio::test]
async fn annotated_response_is_unchanged() {
    let world = world().await;
    world.simulator.revoke_key(&world.key);
    let base = BaseUrl::new(world.server.base_url()).unwrap();
    let layer = ApiKeyLayer::bearer(ApiKey::new(&*world.key).unwrap()).with_origins(base.origins());
    for http in BOTH {
        let client = https(&world.server, http).map_err(Error::Inner);
        let client = AuthErrorLayer::new().annotated().layer(layer.layer(client));
        let request =
            Request::post(base.endpoint("chat/completions").unwrap()).body(Full::from(CHAT)).unwrap();
        let response = client.oneshot(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
        let error = response.extensions().get::<AuthError>().unwrap().clone();
        assert_eq!(error.kind(), AuthErrorKind::InvalidApiKey);
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(body, error.body());
        assert!(body.starts_with(b"{\n  \"error\": {\n    \"message\": \"Invalid API key provided.\""));
    }
}

/// The header block that hyper's HTTP/2 client writes for one request through `JwtLayer`.
async fn header_block(request: Request<Body>) -> Vec<u8> {
    let (client, mut server) = tokio::io::duplex(64 * 1024);
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(client)).await.unwrap();
    tokio::spawn(connection);
    let send = service_fn(move |request| {
        let mut sender = sender.clone();
        async move { sender.send_request(request).await }
    });
    let send = ServiceBuilder::new().map_err(Error::Inner).service(send);
    let layer = (JwtLayer::new(Token::new(JWT).unwrap()), ApiKeyLayer::x_api_key(ApiKey::new(KEY).unwrap()));
    tokio::spawn(layer.layer(send).oneshot(request));

    // The preface, then frames: length, type, flags, stream (RFC 9113 section 4.1).
    server.read_exact(&mut [0; 24]).await.unwrap();
    loop {
        let mut head = [0; 9];
        server.read_exact(&mut head).await.unwrap();
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        server.read_exact(&mut payload).await.unwrap();
        if head[3] == 1 {
            return payload;
        }
    }
}

/// H2: HPACK encodes both headers as never indexed.
#[tokio::test]
async fn credentials_are_never_indexed() {
    let request = Request::post("https://api.selamgpt.com/v1/chat/completions")
        .header("x-indexed", "1")
        .body(Full::from(CHAT))
        .unwrap();
    let block = tokio::time::timeout(HANG, header_block(request)).await.unwrap();
    let has = |bytes: &[u8]| block.windows(bytes.len()).any(|window| window == bytes);
    // RFC 7541 section 6.2.3, never indexed: 0001, then the name as entry 23 of the static table or as a literal.
    // Section 6.2.1, indexed: 01. In Huffman code, `x-api-key` and `x-indexed` are 7 bytes each.
    assert!(has(&[0x1f, 0x08]), "authorization never indexed: {block:x?}");
    assert!(has(&[0x10, 0x87]), "x-api-key never indexed: {block:x?}");
    assert!(has(&[0x40, 0x87]), "another header is indexed: {block:x?}");
}
