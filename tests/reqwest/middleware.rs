//! `adapter::reqwest_middleware`: alone, and next to other middlewares.

use std::{
    collections::HashMap,
    fmt,
    pin::pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Waker},
    time::Duration,
};

use allocation_counter::measure;
use async_trait::async_trait;
use http::{Extensions, Request, StatusCode};
use reqwest_middleware::{ClientBuilder, ClientWithMiddleware, Error, Middleware, Next};
use tower::{ServiceBuilder, layer::util::Identity, timeout::TimeoutLayer};
use tower_selam::{
    ApiKey, ApiKeyLayer, AuthError, AuthErrorKind, AuthErrorLayer, BoxError, Credentials, JwtLayer,
    PerSubject, RefreshLayer, RequestAuth, SelamLayer, Subject, Token,
    adapter::{
        reqwest::{TryCloneBody, redirect_policy},
        reqwest_middleware::AuthMiddleware,
    },
    simulator::Fault,
    source::{Reason, source_fn},
};

use crate::support::{
    CHAT, DEADLINE, PROTOCOLS, SESSION, World, handshake, header, in_time, plain, shown, stream, world,
};

fn client(world: &World) -> reqwest::Client {
    world.reqwest().redirect(redirect_policy()).build().unwrap()
}

fn with_layer(world: &World, layer: SelamLayer) -> ClientWithMiddleware {
    ClientBuilder::new(client(world)).with(AuthMiddleware::new(layer)).build()
}

/// Retries server errors and timeouts, twice at most. Like `reqwest-retry`, it treats the error of a middleware as final.
struct Retry(Arc<AtomicUsize>);

#[async_trait]
impl Middleware for Retry {
    async fn handle(
        &self,
        request: reqwest::Request,
        extensions: &mut Extensions,
        next: Next<'_>,
    ) -> Result<reqwest::Response, Error> {
        let mut attempts = 0;
        loop {
            let Some(copy) = request.try_clone() else { return next.run(request, extensions).await };
            self.0.fetch_add(1, SeqCst);
            attempts += 1;
            match next.clone().run(copy, extensions).await {
                Ok(response) if response.status().is_server_error() && attempts < 3 => {}
                Err(Error::Reqwest(error)) if error.is_timeout() && attempts < 3 => {}
                result => return result,
            }
        }
    }
}

/// An extension that is passed to an inner middleware and back.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Note(&'static str);

struct ExchangesNotes;

#[async_trait]
impl Middleware for ExchangesNotes {
    async fn handle(
        &self,
        request: reqwest::Request,
        extensions: &mut Extensions,
        next: Next<'_>,
    ) -> Result<reqwest::Response, Error> {
        assert!(request.headers()["authorization"].is_sensitive(), "inner middlewares see the credentials");
        assert_eq!(extensions.insert(Note("from inside")), Some(Note("from outside")));
        next.run(request, extensions).await
    }
}

/// H1: a completion with the key alone.
#[tokio::test]
async fn key_alone_is_sent_as_bearer() {
    for &protocol in PROTOCOLS {
        let world = world(protocol).await;
        let client = with_layer(&world, world.builder().build().unwrap());
        let url = world.url("chat/completions?lang=am");
        let request =
            client.post(&url).header("x-api-key", "from-caller").bearer_auth("from-caller").body(CHAT);
        let response = in_time(request.send()).await.unwrap();
        assert_eq!((response.status(), response.version()), (StatusCode::OK, protocol.version()));
        assert_eq!(response.url().as_str(), url);
        assert!(response.text().await.unwrap().contains("You said: Selam!"));
        assert_eq!(header(&world.last(), "authorization"), [format!("Bearer {}", world.key)]);
        assert!(header(&world.last(), "x-api-key").is_empty());
    }
}

/// H4: by an extension, as does `Subject`.
#[tokio::test]
async fn request_auth_applies_to_one_request() {
    let world = world(PROTOCOLS[0]).await;
    let client = with_layer(&world, world.builder().with_jwt(world.jwt()).build().unwrap());
    let post = || client.post(world.url("chat/completions")).body(CHAT);
    in_time(post().with_extension(RequestAuth::ApiKey).send()).await.unwrap();
    assert_eq!(header(&world.last(), "authorization"), [format!("Bearer {}", world.key)]);
    in_time(post().send()).await.unwrap();
    assert_eq!(header(&world.last(), "x-api-key"), [&*world.key], "the extension applied to one request");
    let other = world.simulator.issue_key();
    let custom = RequestAuth::Custom(Credentials::bearer(ApiKey::new(&*other).unwrap()));
    in_time(post().with_extension(custom).send()).await.unwrap();
    assert_eq!(header(&world.last(), "authorization"), [format!("Bearer {other}")]);

    let jwts = PerSubject::new(|subject: &Subject| {
        let token = Token::new(format!("jwt-of-{}", subject.as_str())).unwrap();
        source_fn(move |_: Reason<Token>| std::future::ready(Ok::<_, BoxError>(token.clone())))
    });
    let client = with_layer(&world, world.builder().with_jwt(jwts).build().unwrap());
    for subject in ["user-7", "user-8"] {
        let request = client.post(world.url("audio/agent/sessions")).body(SESSION);
        assert!(in_time(request.with_extension(Subject::new(subject)).send()).await.is_err());
        assert_eq!(header(&world.last(), "authorization"), [format!("Bearer jwt-of-{subject}")]);
    }
}

/// A generated client: it builds its requests itself, by the client's builder or as reqwest's own.
struct Generated {
    client: ClientWithMiddleware,
    url: String,
}

impl Generated {
    async fn open_session(&self) -> Result<reqwest::Response, Error> {
        self.client.post(&self.url).body(SESSION).send().await
    }

    async fn open_built_session(&self) -> Result<reqwest::Response, Error> {
        let request = self.client.post(&self.url).body(SESSION).build().unwrap();
        self.client.execute(request).await
    }
}

/// H4: a middleware speaks for its subject, in whatever way the client sends; a request's own subject wins.
#[tokio::test]
async fn a_generated_client_speaks_for_a_user() {
    for &protocol in PROTOCOLS {
        let world = world(protocol).await;
        let users = ["almaz", "kaleb"].map(|name| (name, world.jwt()));
        let jwts: HashMap<_, _> = users.iter().cloned().collect();
        let jwts = PerSubject::new(move |subject: &Subject| {
            let token = jwts[subject.as_str()].clone();
            source_fn(move |_: Reason<Token>| std::future::ready(Ok::<_, BoxError>(token.clone())))
        });
        let auth = AuthMiddleware::new(world.builder().with_jwt(jwts.clone()).build().unwrap());
        let retries = Arc::new(AtomicUsize::new(0));
        let base = ClientBuilder::new(client(&world)).with(Retry(Arc::clone(&retries))).build();
        let url = world.url("audio/agent/sessions");
        let generated = |auth: AuthMiddleware| Generated {
            client: ClientBuilder::from_client(base.clone()).with(auth).build(),
            url: url.clone(),
        };
        let clients =
            users.clone().map(|(name, token)| (generated(auth.for_subject(&Subject::new(name))), token));
        for _ in 0..2 {
            for (client, token) in &clients {
                let expected = [format!("Bearer {}", token.expose_secret())];
                for response in
                    [in_time(client.open_session()).await, in_time(client.open_built_session()).await]
                {
                    assert_eq!(response.unwrap().status(), StatusCode::OK);
                }
                let received = world.simulator.received();
                for sent in &received[received.len() - 2..] {
                    assert_eq!(header(sent, "authorization"), expected);
                    assert_eq!(header(sent, "x-api-key"), [&*world.key]);
                }
            }
        }
        assert_eq!((jwts.len(), retries.load(SeqCst)), (2, 8), "they share JWTs and middlewares");

        let [(almaz, _), (_, of_kaleb)] = &clients;
        let request = almaz.client.post(&url).body(SESSION).with_extension(Subject::new("kaleb"));
        in_time(request.send()).await.unwrap();
        let bearer = |token: &Token| [format!("Bearer {}", token.expose_secret())];
        assert_eq!(header(&world.last(), "authorization"), bearer(of_kaleb));

        // A caller that reuses its extensions takes neither the subject nor the choice of one client to another.
        let mut extensions = Extensions::new();
        let choosing =
            generated(auth.for_subject(&Subject::new("almaz")).with_extension(RequestAuth::ApiKeyAndJwt));
        for (client, expected) in
            [(&choosing, &clients[0].1), (&clients[1].0, of_kaleb), (almaz, &clients[0].1)]
        {
            let request = client.client.post(&url).body(SESSION).build().unwrap();
            in_time(client.client.execute_with_extensions(request, &mut extensions)).await.unwrap();
            assert_eq!(header(&world.last(), "authorization"), bearer(expected));
            assert!(extensions.get::<Subject>().is_none() && extensions.get::<RequestAuth>().is_none());
        }
        let key_alone = generated(auth.clone().with_extension(RequestAuth::ApiKey));
        assert!(in_time(key_alone.open_session()).await.is_err(), "sessions need a JWT");
        assert_eq!(header(&world.last(), "authorization"), [format!("Bearer {}", world.key)]);

        let sent = world.simulator.requests();
        let error = in_time(generated(auth).open_built_session()).await.unwrap_err();
        assert_eq!(AuthError::find(&error).unwrap().kind(), AuthErrorKind::CredentialUnavailable);
        assert_eq!(world.simulator.requests(), sent, "a forgotten subject is refused");
    }
}

/// Answers without sending anything.
struct Answers;

#[async_trait]
impl Middleware for Answers {
    async fn handle(
        &self,
        _: reqwest::Request,
        _: &mut Extensions,
        _: Next<'_>,
    ) -> Result<reqwest::Response, Error> {
        Ok(http::Response::new(reqwest::Body::default()).into())
    }
}

/// How often one request allocates in the middleware. The one before it may fill buffers that are kept.
fn allocations(world: &World, middleware: impl Middleware) -> u64 {
    let client = ClientBuilder::new(client(world)).with(middleware).with(Answers).build();
    let send = || {
        let request = client.post(world.url("chat/completions")).body(CHAT).build().unwrap();
        let mut call = pin!(client.execute(request));
        let mut context = Context::from_waker(Waker::noop());
        measure(|| assert!(call.as_mut().poll(&mut context).is_ready())).count_total
    };
    send();
    send()
}

#[tokio::test]
async fn layers_are_cheap_to_build_per_request() {
    let world = plain().await;
    let (jwts, _) = world.refreshing();
    jwts.prefetch().await.unwrap();
    let key = ApiKeyLayer::bearer(world.api_key()).with_origins(world.base_url().origins());
    let fixed = world.builder().build().unwrap();
    let refreshing = world.builder().with_jwt(jwts).build().unwrap();
    let none = allocations(&world, AuthMiddleware::with_layers(Identity::new()));
    // What it takes to serve one request; the layers themselves share their configuration.
    for (allocated, at_most) in [
        (allocations(&world, AuthMiddleware::with_layers(key)), 2),
        (allocations(&world, AuthMiddleware::new(fixed)), 2),
        // With a copy of the head and the body, and the service to replay them with.
        (allocations(&world, AuthMiddleware::new(refreshing)), 9),
    ] {
        assert!(allocated <= none + at_most, "{allocated} > {none} + {at_most}");
    }
}

/// J2, J7: bodies are replayed after the single refresh.
#[tokio::test]
async fn concurrent_401s_cause_one_refresh() {
    for &protocol in PROTOCOLS {
        let world = world(protocol).await;
        let (jwts, refreshes) = world.refreshing();
        let client = with_layer(&world, world.builder().with_jwt(jwts.clone()).build().unwrap());
        jwts.prefetch().await.unwrap();
        world.simulator.expire_jwts();
        let calls: tokio::task::JoinSet<_> =
            (0..8).map(|_| client.post(world.url("audio/agent/sessions")).body(SESSION).send()).collect();
        for response in in_time(calls.join_all()).await {
            assert_eq!(response.unwrap().status(), StatusCode::OK);
        }
        assert_eq!(refreshes.load(SeqCst), 2);
        assert!(world.simulator.received().iter().all(|received| *received.body == *SESSION.as_bytes()));
    }
}

/// J7: the 401 of an unbuffered stream is returned intact.
#[tokio::test]
async fn stream_is_replayed_only_if_buffered() {
    let world = world(PROTOCOLS[0]).await;
    let (jwts, refreshes) = world.refreshing();
    let jwt = (
        JwtLayer::new(jwts.clone()).with_origins(world.base_url().origins()),
        ApiKeyLayer::x_api_key(world.api_key()).with_origins(world.base_url().origins()),
    );
    let layers = ServiceBuilder::new().layer(RefreshLayer::with_replay(TryCloneBody)).layer(jwt);
    let client = ClientBuilder::new(client(&world)).with(AuthMiddleware::with_layers(layers)).build();
    jwts.prefetch().await.unwrap();
    world.simulator.expire_jwts();
    let request = client.post(world.url("audio/agent/sessions")).body(stream(SESSION));
    let response = in_time(request.send()).await.unwrap();
    assert_eq!((response.status(), world.simulator.requests()), (StatusCode::UNAUTHORIZED, 1));
    assert!(response.text().await.unwrap().contains("error"), "the body is intact");
    jwts.token().await.unwrap();
    assert_eq!(refreshes.load(SeqCst), 2);

    // A buffered stream is replayed.
    let layer = world.builder().with_jwt(jwts.clone()).build().unwrap().buffered(1024);
    let client = ClientBuilder::new(client.as_ref().clone()).with(AuthMiddleware::with_layers(layer)).build();
    let request = client.post(world.url("audio/agent/sessions")).body(stream(SESSION));
    assert_eq!(in_time(request.send()).await.unwrap().status(), StatusCode::OK);
}

/// J9: each attempt gets a fresh credential, and an `AuthError` ends the attempts.
#[tokio::test]
async fn retries_do_not_multiply_sends() {
    let world = world(PROTOCOLS[0]).await;
    let (jwts, refreshes) = world.refreshing();
    let attempts = Arc::new(AtomicUsize::new(0));
    let client = ClientBuilder::new(client(&world))
        .with(Retry(Arc::clone(&attempts)))
        .with(AuthMiddleware::new(world.builder().with_jwt(jwts.clone()).build().unwrap()))
        .build();
    let send = |key: RequestAuth| {
        let request = client.post(world.url("audio/agent/sessions")).body(SESSION);
        in_time(request.with_extension(key).send())
    };
    jwts.prefetch().await.unwrap();
    world.simulator.expire_jwts();
    world.simulator.inject(Fault::Unavailable);
    assert_eq!(send(RequestAuth::ApiKeyAndJwt).await.unwrap().status(), StatusCode::OK);
    // Three sends (503, 401, replay) in two attempts of the retry middleware.
    assert_eq!((world.simulator.requests(), attempts.swap(0, SeqCst), refreshes.load(SeqCst)), (3, 2, 2));

    let unknown = RequestAuth::Custom(Credentials::bearer(ApiKey::new("sk-selam-unknown").unwrap()));
    let refused = send(unknown).await.unwrap_err();
    assert_eq!(AuthError::find(&refused).unwrap().kind(), AuthErrorKind::InvalidApiKey);
    assert_eq!((world.simulator.requests(), attempts.load(SeqCst)), (4, 1));
}

/// E7: errors of the client keep their type.
#[tokio::test]
async fn auth_error_is_found_and_client_errors_kept() {
    let world = world(PROTOCOLS[0]).await;
    let layer = world.builder().with_jwt(world.jwt()).build().unwrap();
    let client = with_layer(&world, layer);
    let refused = in_time(client.post("https://evil.example/v1/models").send()).await.unwrap_err();
    assert!(refused.is_middleware());
    let found = AuthError::find(&refused).unwrap();
    assert_eq!(found.kind(), AuthErrorKind::OriginNotAllowed);
    assert_eq!(refused.to_string(), "request not authenticated");
    assert!(shown(&refused).contains("credentials are not sent to https://evil.example"));
    let boxed: BoxError = Box::new(refused);
    assert!(AuthError::find(&*boxed).is_some());

    world.simulator.inject(Fault::Stall);
    let request = client.post(world.url("chat/completions?secret=of-the-caller"));
    let error = in_time(request.timeout(Duration::from_millis(100)).send()).await.unwrap_err();
    assert!(matches!(&error, Error::Reqwest(error) if error.is_timeout()), "{error:?}");
    assert_eq!(error.url().unwrap().as_str(), world.url("chat/completions"));
    assert!(AuthError::find(&error).is_none());
}

/// S2: neither by errors nor by responses.
#[tokio::test]
async fn handshake_query_is_not_shown() {
    let world = plain().await;
    let jwt = world.jwt();
    let client = with_layer(&world, world.builder().with_jwt(jwt.clone()).build().unwrap());
    let send = || {
        let request = handshake(client.as_ref(), &world.voice_agent("&voice=mekdes"));
        let request = request.timeout(Duration::from_millis(500)).build().unwrap();
        let request = reqwest_middleware::RequestBuilder::from_parts(client.clone(), request);
        in_time(request.with_extension(RequestAuth::VoiceAgent).send())
    };
    world.simulator.inject(Fault::Stall);
    let stalled = send().await.unwrap_err();
    world.simulator.inject(Fault::Unavailable);
    let response = send().await.unwrap();
    let mut all = shown(&stalled) + &format!("{response:?}");
    all += &shown(&response.error_for_status().unwrap_err());
    assert!(world.last().uri.query().unwrap().contains(&world.key), "the secret was sent");
    for secret in [&*world.key, jwt.expose_secret()] {
        assert!(!all.contains(secret), "{all}");
    }
}

#[tokio::test]
async fn extensions_pass_in_and_out() {
    let world = world(PROTOCOLS[0]).await;
    let (jwts, _) = world.refreshing();
    let client = ClientBuilder::new(client(&world))
        .with(AuthMiddleware::new(world.builder().with_jwt(jwts).build().unwrap()))
        .with(ExchangesNotes)
        .build();
    let mut extensions = Extensions::new();
    extensions.insert(Note("from outside"));
    let request = client.post(world.url("audio/agent/sessions")).body(SESSION).build().unwrap();
    in_time(client.execute_with_extensions(request, &mut extensions)).await.unwrap();
    assert_eq!(extensions.get(), Some(&Note("from inside")));

    // A cancelled call leaves the extensions in place.
    world.simulator.inject(Fault::Stall);
    extensions.insert(Note("from outside"));
    let request = client.post(world.url("audio/agent/sessions")).body(SESSION).build().unwrap();
    let call = client.execute_with_extensions(request, &mut extensions);
    assert!(tokio::time::timeout(Duration::from_millis(200), call).await.is_err());
    assert_eq!(extensions.get(), Some(&Note("from outside")));
}

#[tokio::test]
async fn any_tower_layers_make_a_middleware() {
    let world = world(PROTOCOLS[0]).await;
    let origins = world.base_url().origins();
    let layers = ServiceBuilder::new()
        .map_err(|error: BoxError| match error.downcast::<Error>() {
            Ok(error) => *error,
            Err(error) => Error::middleware(std::io::Error::other(error)),
        })
        .layer(TimeoutLayer::new(DEADLINE))
        .layer(AuthErrorLayer::new())
        .layer(ApiKeyLayer::bearer(world.api_key()).with_origins(origins));
    let client = ClientBuilder::new(client(&world)).with(AuthMiddleware::with_layers(layers)).build();
    let send = || in_time(client.post(world.url("chat/completions")).body(CHAT).send());
    assert_eq!(send().await.unwrap().status(), StatusCode::OK);
    world.simulator.revoke_key(&world.key);
    assert_eq!(AuthError::find(&send().await.unwrap_err()).unwrap().kind(), AuthErrorKind::InvalidApiKey);
}

/// O4: no credential reaches the second origin.
#[tokio::test]
async fn cross_origin_redirects_are_not_followed() {
    for status in [301, 302, 307, 308] {
        let (api, elsewhere) = (plain().await, plain().await);
        let layer = api.builder().with_jwt(api.jwt()).build().unwrap();
        // Without the policy, `X-API-Key` leaks.
        let leaking = api.reqwest().build().unwrap();
        let leaking = ClientBuilder::new(leaking).with(AuthMiddleware::new(layer.clone())).build();
        api.redirect(status, &elsewhere.url("chat/completions"));
        let _ = in_time(leaking.post(api.url("chat/completions")).body(CHAT).send()).await;
        assert_eq!(header(&elsewhere.last(), "x-api-key"), [&*api.key], "{status}");

        let client = with_layer(&api, layer);
        api.redirect(status, &elsewhere.url("chat/completions"));
        let response = in_time(client.post(api.url("chat/completions")).body(CHAT).send()).await.unwrap();
        assert_eq!(response.status().as_u16(), status);
        assert_eq!(elsewhere.simulator.requests(), 1);
    }
}

/// Wraps the errors of inner middlewares, as `reqwest-retry` does.
struct WrapsErrors;

#[derive(Debug)]
struct Wrapped(Error);

impl fmt::Display for Wrapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "all attempts failed: {}", self.0)
    }
}

impl std::error::Error for Wrapped {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.0)
    }
}

#[async_trait]
impl Middleware for WrapsErrors {
    async fn handle(
        &self,
        request: reqwest::Request,
        extensions: &mut Extensions,
        next: Next<'_>,
    ) -> Result<reqwest::Response, Error> {
        next.run(request, extensions).await.map_err(|error| Error::middleware(Wrapped(error)))
    }
}

/// S2: an inner middleware wraps the error of the client.
#[tokio::test]
async fn wrapped_handshake_errors_show_no_credential() {
    let world = plain().await;
    let jwt = world.jwt();
    let layer = world.builder().with_jwt(jwt.clone()).build().unwrap();
    let client =
        ClientBuilder::new(client(&world)).with(AuthMiddleware::new(layer)).with(WrapsErrors).build();
    world.simulator.inject(Fault::Stall);
    let request = handshake(client.as_ref(), &world.voice_agent("&voice=mekdes"));
    let request = request.timeout(Duration::from_millis(100)).build().unwrap();
    let request = reqwest_middleware::RequestBuilder::from_parts(client.clone(), request);
    let error = in_time(request.with_extension(RequestAuth::VoiceAgent).send()).await.unwrap_err();
    let text = shown(&error);
    assert!(!text.contains(&world.key) && !text.contains(jwt.expose_secret()), "{text}");
    assert!(text.contains("all attempts failed") && text.contains("/socket.io/"), "{text}");
}

/// Records the `Subject` in the extensions.
struct RecordsSubject(Arc<Mutex<Option<Subject>>>);

#[async_trait]
impl Middleware for RecordsSubject {
    async fn handle(
        &self,
        request: reqwest::Request,
        extensions: &mut Extensions,
        next: Next<'_>,
    ) -> Result<reqwest::Response, Error> {
        *self.0.lock().unwrap() = extensions.get().cloned();
        next.run(request, extensions).await
    }
}

/// H4: an extension set by a layer is seen by later middlewares.
#[tokio::test]
async fn layer_extensions_reach_inner_middlewares() {
    let world = plain().await;
    let seen = Arc::new(Mutex::new(None));
    let layers = ServiceBuilder::new()
        .layer(world.builder().build().unwrap().with_replay(TryCloneBody))
        .map_request(|mut request: Request<reqwest::Body>| {
            request.extensions_mut().insert(Subject::new("user-7"));
            request
        });
    let client = ClientBuilder::new(client(&world))
        .with(AuthMiddleware::with_layers(layers))
        .with(RecordsSubject(Arc::clone(&seen)))
        .build();
    in_time(client.post(world.url("chat/completions")).body(CHAT).send()).await.unwrap();
    assert_eq!(*seen.lock().unwrap(), Some(Subject::new("user-7")));
}
