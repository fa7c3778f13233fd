//! `adapter::reqwest_middleware`.

use std::{
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use async_trait::async_trait;
use http::{Extensions, Request, StatusCode};
use reqwest_middleware::{ClientBuilder, ClientWithMiddleware, Error, Middleware, Next};
use tower::{ServiceBuilder, timeout::TimeoutLayer};
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
    CHAT, HANG, SESSION, WIRES, World, handshake, header, in_time, plain, shown, stream, world,
};

fn client(world: &World) -> reqwest::Client {
    world.reqwest().redirect(redirect_policy()).build().unwrap()
}

fn over(world: &World, layer: SelamLayer) -> ClientWithMiddleware {
    ClientBuilder::new(client(world)).with(AuthMiddleware::new(layer)).build()
}

/// Sends again whatever was not answered with success, twice at most. As `reqwest-retry` does, it leaves alone what a
/// middleware had to say.
struct Retry(Arc<AtomicUsize>);

#[async_trait]
impl Middleware for Retry {
    async fn handle(
        &self,
        request: reqwest::Request,
        extensions: &mut Extensions,
        next: Next<'_>,
    ) -> Result<reqwest::Response, Error> {
        let mut tries = 0;
        loop {
            let Some(copy) = request.try_clone() else { return next.run(request, extensions).await };
            self.0.fetch_add(1, SeqCst);
            tries += 1;
            match next.clone().run(copy, extensions).await {
                Ok(response) if response.status().is_server_error() && tries < 3 => {}
                Err(Error::Reqwest(error)) if error.is_timeout() && tries < 3 => {}
                result => return result,
            }
        }
    }
}

/// What a middleware further in has to tell, and what it was told.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Note(&'static str);

struct Notes;

#[async_trait]
impl Middleware for Notes {
    async fn handle(
        &self,
        request: reqwest::Request,
        extensions: &mut Extensions,
        next: Next<'_>,
    ) -> Result<reqwest::Response, Error> {
        assert!(request.headers()["authorization"].is_sensitive(), "it sees the credentials");
        assert_eq!(extensions.insert(Note("from within")), Some(Note("from outside")));
        next.run(request, extensions).await
    }
}

#[tokio::test]
async fn h1_a_completion_with_the_key_alone() {
    for &wire in WIRES {
        let world = world(wire).await;
        let client = over(&world, world.builder().build().unwrap());
        let url = world.url("chat/completions?lang=am");
        let request = client.post(&url).header("x-api-key", "theirs").bearer_auth("theirs").body(CHAT);
        let response = in_time(request.send()).await.unwrap();
        assert_eq!((response.status(), response.version()), (StatusCode::OK, wire.version()));
        assert_eq!(response.url().as_str(), url);
        assert!(response.text().await.unwrap().contains("You said: Selam!"));
        assert_eq!(header(&world.last(), "authorization"), [format!("Bearer {}", world.key)]);
        assert!(header(&world.last(), "x-api-key").is_empty());
    }
}

#[tokio::test]
async fn h4_a_request_chooses_by_an_extension() {
    let world = world(WIRES[0]).await;
    let client = over(&world, world.builder().with_jwt(world.jwt()).build().unwrap());
    let post = || client.post(world.url("chat/completions")).body(CHAT);
    in_time(post().with_extension(RequestAuth::ApiKey).send()).await.unwrap();
    assert_eq!(header(&world.last(), "authorization"), [format!("Bearer {}", world.key)]);
    in_time(post().send()).await.unwrap();
    assert_eq!(header(&world.last(), "x-api-key"), [&*world.key], "the choice was that request's");
    let other = world.simulator.issue_key();
    let own = RequestAuth::Custom(Credentials::bearer(ApiKey::new(&*other).unwrap()));
    in_time(post().with_extension(own).send()).await.unwrap();
    assert_eq!(header(&world.last(), "authorization"), [format!("Bearer {other}")]);

    let jwts = PerSubject::new(|user: &Subject| {
        let token = Token::new(format!("jwt-of-{}", user.as_str())).unwrap();
        source_fn(move |_: Reason<Token>| std::future::ready(Ok::<_, BoxError>(token.clone())))
    });
    let client = over(&world, world.builder().with_jwt(jwts).build().unwrap());
    for user in ["user-7", "user-8"] {
        let request = client.post(world.url("audio/agent/sessions")).body(SESSION);
        assert!(in_time(request.with_extension(Subject::new(user)).send()).await.is_err());
        assert_eq!(header(&world.last(), "authorization"), [format!("Bearer jwt-of-{user}")]);
    }
}

#[tokio::test]
async fn j2_j7_a_renewal_is_one_for_all_and_bodies_are_sent_again() {
    for &wire in WIRES {
        let world = world(wire).await;
        let (jwts, asked) = world.renewing();
        let client = over(&world, world.builder().with_jwt(jwts.clone()).build().unwrap());
        jwts.prefetch().await.unwrap();
        world.simulator.expire_jwts();
        let calls: tokio::task::JoinSet<_> =
            (0..8).map(|_| client.post(world.url("audio/agent/sessions")).body(SESSION).send()).collect();
        for response in in_time(calls.join_all()).await {
            assert_eq!(response.unwrap().status(), StatusCode::OK);
        }
        assert_eq!(asked.load(SeqCst), 2);
        assert!(world.simulator.received().iter().all(|received| *received.body == *SESSION.as_bytes()));
    }
}

#[tokio::test]
async fn j7_a_stream_is_not_sent_again() {
    let world = world(WIRES[0]).await;
    let (jwts, asked) = world.renewing();
    let jwt = JwtLayer::new(jwts.clone(), world.api_key()).with_origins(world.base_url().origins());
    let layers = ServiceBuilder::new().layer(RefreshLayer::with_replay(TryCloneBody)).layer(jwt);
    let client = ClientBuilder::new(client(&world)).with(AuthMiddleware::with_layers(layers)).build();
    jwts.prefetch().await.unwrap();
    world.simulator.expire_jwts();
    let request = client.post(world.url("audio/agent/sessions")).body(stream(SESSION));
    let response = in_time(request.send()).await.unwrap();
    assert_eq!((response.status(), world.simulator.requests()), (StatusCode::UNAUTHORIZED, 1));
    assert!(response.text().await.unwrap().contains("error"), "intact");
    jwts.token().await.unwrap();
    assert_eq!(asked.load(SeqCst), 2);

    // One that is kept is.
    let layer = world.builder().with_jwt(jwts.clone()).build().unwrap().buffered(1024);
    let client = ClientBuilder::new(client.as_ref().clone()).with(AuthMiddleware::with_layers(layer)).build();
    let request = client.post(world.url("audio/agent/sessions")).body(stream(SESSION));
    assert_eq!(in_time(request.send()).await.unwrap().status(), StatusCode::OK);
}

#[tokio::test]
async fn j9_under_retries_every_try_has_a_fresh_credential_and_a_401_ends_them() {
    let world = world(WIRES[0]).await;
    let (jwts, asked) = world.renewing();
    let tries = Arc::new(AtomicUsize::new(0));
    let client = ClientBuilder::new(client(&world))
        .with(Retry(Arc::clone(&tries)))
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
    // The 503, the 401 and what it was sent again for: two tries of the middleware's.
    assert_eq!((world.simulator.requests(), tries.swap(0, SeqCst), asked.load(SeqCst)), (3, 2, 2));

    let unknown = RequestAuth::Custom(Credentials::bearer(ApiKey::new("sk-selam-unknown").unwrap()));
    let refused = send(unknown).await.unwrap_err();
    assert_eq!(AuthError::find(&refused).unwrap().kind(), AuthErrorKind::InvalidApiKey);
    assert_eq!((world.simulator.requests(), tries.load(SeqCst)), (4, 1));
}

#[tokio::test]
async fn e7_ours_is_found_and_the_clients_own_error_is_left_as_it_is() {
    let world = world(WIRES[0]).await;
    let layer = world.builder().with_jwt(world.jwt()).build().unwrap();
    let client = over(&world, layer);
    let refused = in_time(client.post("https://evil.example/v1/models").send()).await.unwrap_err();
    assert!(refused.is_middleware());
    let found = AuthError::find(&refused).unwrap();
    assert_eq!(found.kind(), AuthErrorKind::OriginNotAllowed);
    assert_eq!(refused.to_string(), "request not authenticated");
    assert!(shown(&refused).contains("credentials are not sent to https://evil.example"));
    let boxed: BoxError = Box::new(refused);
    assert!(AuthError::find(&*boxed).is_some());

    world.simulator.inject(Fault::Stall);
    let request = client.post(world.url("chat/completions?theirs=of-theirs"));
    let error = in_time(request.timeout(Duration::from_millis(100)).send()).await.unwrap_err();
    assert!(matches!(&error, Error::Reqwest(error) if error.is_timeout()), "{error:?}");
    assert_eq!(error.url().unwrap().as_str(), world.url("chat/completions"));
    assert!(AuthError::find(&error).is_none());
}

#[tokio::test]
async fn s2_a_handshakes_query_is_not_shown() {
    let world = plain().await;
    let jwt = world.jwt();
    let client = over(&world, world.builder().with_jwt(jwt.clone()).build().unwrap());
    let send = || {
        let request = handshake(client.as_ref(), &world.url("audio/agent?voice=mekdes"));
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
    assert!(world.last().uri.query().unwrap().contains(&world.key), "the test can tell");
    for secret in [&*world.key, jwt.expose_secret()] {
        assert!(!all.contains(secret), "{all}");
    }
}

#[tokio::test]
async fn extensions_go_in_and_come_out() {
    let world = world(WIRES[0]).await;
    let (jwts, _) = world.renewing();
    let client = ClientBuilder::new(client(&world))
        .with(AuthMiddleware::new(world.builder().with_jwt(jwts).build().unwrap()))
        .with(Notes)
        .build();
    let mut extensions = Extensions::new();
    extensions.insert(Note("from outside"));
    let request = client.post(world.url("audio/agent/sessions")).body(SESSION).build().unwrap();
    in_time(client.execute_with_extensions(request, &mut extensions)).await.unwrap();
    assert_eq!(extensions.get(), Some(&Note("from within")));

    // One that is left while it waits has taken nothing away.
    world.simulator.inject(Fault::Stall);
    extensions.insert(Note("from outside"));
    let request = client.post(world.url("audio/agent/sessions")).body(SESSION).build().unwrap();
    let call = client.execute_with_extensions(request, &mut extensions);
    assert!(tokio::time::timeout(Duration::from_millis(200), call).await.is_err());
    assert_eq!(extensions.get(), Some(&Note("from outside")));
}

#[tokio::test]
async fn any_layers_of_this_crates_and_of_towers_make_a_middleware() {
    let world = world(WIRES[0]).await;
    let origins = world.base_url().origins();
    let layers = ServiceBuilder::new()
        .map_err(|error: BoxError| match error.downcast::<Error>() {
            Ok(error) => *error,
            Err(error) => Error::middleware(std::io::Error::other(error)),
        })
        .layer(TimeoutLayer::new(HANG))
        .layer(AuthErrorLayer::new())
        .layer(ApiKeyLayer::bearer(world.api_key()).with_origins(origins));
    let client = ClientBuilder::new(client(&world)).with(AuthMiddleware::with_layers(layers)).build();
    let send = || in_time(client.post(world.url("chat/completions")).body(CHAT).send());
    assert_eq!(send().await.unwrap().status(), StatusCode::OK);
    world.simulator.revoke_key(&world.key);
    assert_eq!(AuthError::find(&send().await.unwrap_err()).unwrap().kind(), AuthErrorKind::InvalidApiKey);
}

#[tokio::test]
async fn o4_nothing_reaches_another_origin() {
    for status in [301, 302, 307, 308] {
        let (api, elsewhere) = (plain().await, plain().await);
        let layer = api.builder().with_jwt(api.jwt()).build().unwrap();
        // Without the policy, it does.
        let careless = api.reqwest().build().unwrap();
        let careless = ClientBuilder::new(careless).with(AuthMiddleware::new(layer.clone())).build();
        api.redirect(status, &elsewhere.url("chat/completions"));
        let _ = in_time(careless.post(api.url("chat/completions")).body(CHAT).send()).await;
        assert_eq!(header(&elsewhere.last(), "x-api-key"), [&*api.key], "{status}");

        let client = over(&api, layer);
        api.redirect(status, &elsewhere.url("chat/completions"));
        let response = in_time(client.post(api.url("chat/completions")).body(CHAT).send()).await.unwrap();
        assert_eq!(response.status().as_u16(), status);
        assert_eq!(elsewhere.simulator.requests(), 1);
    }
}

/// Wraps what went wrong further in, as `reqwest-retry` does.
struct Wraps;

#[derive(Debug)]
struct Wrapped(Error);

impl fmt::Display for Wrapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tried in vain: {}", self.0)
    }
}

impl std::error::Error for Wrapped {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.0)
    }
}

#[async_trait]
impl Middleware for Wraps {
    async fn handle(
        &self,
        request: reqwest::Request,
        extensions: &mut Extensions,
        next: Next<'_>,
    ) -> Result<reqwest::Response, Error> {
        next.run(request, extensions).await.map_err(|error| Error::middleware(Wrapped(error)))
    }
}

#[tokio::test]
async fn s2_what_a_middleware_further_in_wraps_of_a_handshake_shows_no_credential() {
    let world = plain().await;
    let jwt = world.jwt();
    let layer = world.builder().with_jwt(jwt.clone()).build().unwrap();
    let client = ClientBuilder::new(client(&world)).with(AuthMiddleware::new(layer)).with(Wraps).build();
    world.simulator.inject(Fault::Stall);
    let request = handshake(client.as_ref(), &world.url("audio/agent?voice=mekdes"));
    let request = request.timeout(Duration::from_millis(100)).build().unwrap();
    let request = reqwest_middleware::RequestBuilder::from_parts(client.clone(), request);
    let error = in_time(request.with_extension(RequestAuth::VoiceAgent).send()).await.unwrap_err();
    let said = shown(&error);
    assert!(!said.contains(&world.key) && !said.contains(jwt.expose_secret()), "{said}");
    assert!(said.contains("tried in vain") && said.contains("/v1/audio/agent"), "{said}");
}

/// Notes what it finds in the extensions.
struct Finds(Arc<Mutex<Option<Subject>>>);

#[async_trait]
impl Middleware for Finds {
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

#[tokio::test]
async fn h4_what_a_layer_puts_into_the_extensions_reaches_the_middlewares_further_in() {
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
        .with(Finds(Arc::clone(&seen)))
        .build();
    in_time(client.post(world.url("chat/completions")).body(CHAT).send()).await.unwrap();
    assert_eq!(*seen.lock().unwrap(), Some(Subject::new("user-7")));
}
