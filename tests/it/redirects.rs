//! O4 over two real origins: what reaches the second one when the first sends a request there.

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
    ApiKey, AuthError, AuthErrorKind, BoxError, JwtLayer, Origins, RequestAuth,
    simulator::{Fault, Received, Server, Simulator},
};

use crate::support::{BOTH, Body, CHAT, Http, Https, jwt};

const STATUSES: [u16; 4] = [301, 302, 307, 308];

/// Follows redirects with the body, where it goes along.
fn follow() -> FollowRedirectLayer<impl Policy<Body, BoxError> + Clone> {
    let cloned = clone_body_fn(|body: &Body| Some(body.clone()));
    FollowRedirectLayer::with_policy(cloned.and::<_, Body, BoxError>(Standard::default()))
}

/// The API, and somebody else.
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

    fn origin(&self, of: usize) -> String {
        self.servers[of].base_url().trim_end_matches("/v1").to_owned()
    }

    fn layer(&self, origins: Origins) -> JwtLayer {
        JwtLayer::new(jwt(), ApiKey::new(&*self.key).unwrap()).with_origins(origins)
    }

    /// A client that trusts both.
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

    /// Has the API send its next request to the other, by a URL that echoes our key, from a page whose URL has it too.
    fn redirect(&self, status: u16) -> Request<Body> {
        let away = format!("{}/v1/chat/completions?api_key={}&x=1", self.origin(1), self.key);
        let answer = Response::builder().status(status).header(LOCATION, away).body(Bytes::new()).unwrap();
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
        assert_eq!(sent.headers["x-api-key"], self.key, "the API has it");
        self.other.received().pop().expect("the other origin was asked")
    }
}

#[tokio::test]
async fn o4_a_redirect_that_is_followed_outside_takes_no_credential_along() {
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

#[tokio::test]
async fn o4_a_redirect_to_another_origin_is_refused_where_others_do_not_pass() {
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

/// Why it belongs outside: tower-http takes off a fixed list of headers, and `X-API-Key` is not on it.
#[tokio::test]
async fn o4_a_redirect_that_is_followed_inside_leaks_the_key() {
    let world = World::new().await;
    let origins = Origins::new(&world.origin(0)).unwrap();
    for status in STATUSES {
        let service = ServiceBuilder::new()
            .layer(world.layer(origins.clone()))
            .layer(follow())
            .map_err(BoxError::from)
            .service(world.client(Http::One));
        let sent = world.send(service, status).await;
        assert_eq!(
            sent.headers["x-api-key"], world.key,
            "{status}: tower-http has mended it: say so in the docs"
        );
        assert!(!sent.headers.contains_key("authorization"));
    }
}

/// The choice is lost on the way, and so the request is refused rather than sent with the layer's own.
#[tokio::test]
async fn o4_a_request_without_credentials_stays_without() {
    let world = World::new().await;
    let origins = Origins::new(&world.origin(0)).unwrap().with_origin(&world.origin(1)).unwrap();
    let service = ServiceBuilder::new()
        .layer(follow())
        .layer(world.layer(origins).require_request_auth())
        .map_err(BoxError::from)
        .service(world.client(Http::Two));
    let mut request = world.redirect(307);
    request.extensions_mut().insert(RequestAuth::Anonymous);
    let error = service.oneshot(request).await.unwrap_err();
    assert_eq!(AuthError::find(&*error).unwrap().kind(), AuthErrorKind::CredentialUnavailable);
    assert!(!world.api.received()[0].headers.contains_key("x-api-key"));
    assert_eq!((world.api.requests(), world.other.requests()), (1, 0));
}
