//! Redirects between two real origins: which credentials reach the second one (O4).

use bytes::Bytes;
use http::{Method, Request, Response, header::LOCATION};
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore, pki_types::CertificateDer};
use tower::{Service, ServiceBuilder, ServiceExt};
use tower_http::follow_redirect::{
    FollowRedirectLayer,
    policy::{Policy, PolicyExt, Standard, clone_body_fn},
};
use tower_selam::{
    ApiKey, ApiKeyLayer, AuthError, AuthErrorKind, BoxError, JwtLayer, Origins, RequestAuth,
    simulator::{Fault, Received, Server, Simulator},
};

use crate::support::{BOTH, Body, CHAT, Http, Https, jwt};

const STATUSES: [u16; 4] = [301, 302, 307, 308];

/// Follows redirects, and resends the body where the status preserves it.
fn follow() -> FollowRedirectLayer<impl Policy<Body, BoxError> + Clone> {
    let cloned = clone_body_fn(|body: &Body| Some(body.clone()));
    FollowRedirectLayer::with_policy(cloned.and::<_, Body, BoxError>(Standard::default()))
}

/// The API and a second, foreign origin.
struct World {
    api: Simulator,
    other: Simulator,
    servers: [Server; 2],
    key: String,
}

impl World {
    async fn new() -> Self {
        let (api, other) = (Simulator::new(), Simulator::new());
        let servers = [Server::tls(&api).await.unwrap(), Server::tls(&other).await.unwrap()];
        let key = api.issue_key();
        Self { api, other, servers, key }
    }

    fn origin(&self, index: usize) -> String {
        self.servers[index].base_url().trim_end_matches("/v1").to_owned()
    }

    fn layer(&self, origins: Origins) -> (JwtLayer, ApiKeyLayer) {
        (
            JwtLayer::new(jwt()).with_origins(origins.clone()),
            ApiKeyLayer::x_api_key(ApiKey::new(&*self.key).unwrap()).with_origins(origins),
        )
    }

    /// Builds a client that trusts both servers.
    fn client(&self, http: Http) -> Https {
        let mut roots = RootCertStore::empty();
        for server in &self.servers {
            roots.add(CertificateDer::from(server.ca_der().unwrap().to_vec())).unwrap();
        }
        let tls = ClientConfig::builder_with_provider(std::sync::Arc::new(
            rustls::crypto::ring::default_provider(),
        ))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
        let connector = HttpsConnectorBuilder::new().with_tls_config(tls).https_only();
        let connector = match http {
            Http::One => connector.enable_http1().build(),
            Http::Two => connector.enable_http2().build(),
        };
        Client::builder(TokioExecutor::new()).http2_only(http == Http::Two).build(connector)
    }

    /// Makes the API redirect its next request to the other origin. The location and the request's `Referer` both contain
    /// our key.
    fn redirect(&self, status: u16) -> Request<Body> {
        let location = format!("{}/v1/chat/completions?api_key={}&x=1", self.origin(1), self.key);
        let answer =
            Response::builder().status(status).header(LOCATION, location).body(Bytes::new()).unwrap();
        self.api.inject(Fault::Answer(answer));
        Request::post(format!("{}/v1/chat/completions", self.origin(0)))
            .header("referer", format!("{}/?api_key={}", self.origin(0), self.key))
            .header("content-type", "application/json")
            .body(Body::from(CHAT))
            .unwrap()
    }

    async fn send<S>(&self, service: S, status: u16) -> Received
    where
        S: Service<Request<Body>, Error: Into<BoxError>>,
    {
        if let Err(error) = service.oneshot(self.redirect(status)).await {
            panic!("{status}: {:?}", error.into());
        }
        let sent = self.api.received().pop().unwrap();
        assert_eq!(sent.headers["x-api-key"], self.key, "the API received the key");
        self.other.received().pop().expect("the other origin received a request")
    }
}

/// O4: a redirect followed outside the layers leaks no credential.
#[tokio::test]
async fn redirects_followed_outside_leak_nothing() {
    let world = World::new().await;
    let origins = Origins::new(&world.origin(0)).unwrap().strip_for_other_origins();
    for http in BOTH {
        for status in STATUSES {
            let service = ServiceBuilder::new()
                .layer(follow())
                .layer(world.layer(origins.clone()))
                .map_err(BoxError::from)
                .service(world.client(http));
            let sent = world.send(service, status).await;
            for name in ["authorization", "x-api-key", "referer"] {
                assert!(!sent.headers.contains_key(name), "{http:?} {status} {name}");
            }
            assert_eq!(sent.uri.query(), Some("x=1"), "{http:?} {status}");
            let post = matches!(status, 307 | 308);
            assert_eq!(sent.method, if post { Method::POST } else { Method::GET });
            assert_eq!(sent.body == CHAT, post);
        }
    }
}

/// O4: without strip mode, a cross-origin redirect is refused.
#[tokio::test]
async fn cross_origin_redirects_are_refused_by_default() {
    let world = World::new().await;
    let origins = Origins::new(&world.origin(0)).unwrap();
    for status in STATUSES {
        let service = ServiceBuilder::new()
            .layer(follow())
            .layer(world.layer(origins.clone()))
            .map_err(BoxError::from)
            .service(world.client(Http::Two));
        let error = service.oneshot(world.redirect(status)).await.unwrap_err();
        let error = AuthError::find(&*error).unwrap();
        assert_eq!(error.kind(), AuthErrorKind::OriginNotAllowed);
        assert!(!format!("{error} {error:?}").contains(&world.key));
    }
    assert_eq!(world.other.requests(), 0);
}

/// O4: why the redirect layer belongs outside. tower-http removes a fixed list of headers, without `X-API-Key`.
#[tokio::test]
async fn redirects_followed_inside_leak_the_key() {
    let world = World::new().await;
    let origins = Origins::new(&world.origin(0)).unwrap();
    for status in STATUSES {
        let service = ServiceBuilder::new()
            .layer(world.layer(origins.clone()))
            .layer(follow())
            .map_err(BoxError::from)
            .service(world.client(Http::One));
        let sent = world.send(service, status).await;
        assert_eq!(sent.headers["x-api-key"], world.key, "{status}: fixed in tower-http, so update the docs");
        assert!(!sent.headers.contains_key("authorization"));
    }
}

/// O4: the redirect loses the request's choice, so the request is refused instead of sent with the layer's credentials.
#[tokio::test]
async fn anonymous_requests_stay_anonymous() {
    let world = World::new().await;
    let origins = Origins::new(&world.origin(0)).unwrap().with_origin(&world.origin(1)).unwrap();
    let (jwt, key) = world.layer(origins);
    let service = ServiceBuilder::new()
        .layer(follow())
        .layer((jwt.require_request_auth(), key.require_request_auth()))
        .map_err(BoxError::from)
        .service(world.client(Http::Two));
    let mut request = world.redirect(307);
    request.extensions_mut().insert(RequestAuth::Anonymous);
    let error = service.oneshot(request).await.unwrap_err();
    assert_eq!(AuthError::find(&*error).unwrap().kind(), AuthErrorKind::CredentialUnavailable);
    assert!(!world.api.received()[0].headers.contains_key("x-api-key"));
    assert_eq!((world.api.requests(), world.other.requests()), (1, 0));
}
