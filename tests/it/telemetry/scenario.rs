//! A scenario that triggers every event and metric.

use std::{
    future::ready,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use tower::{Layer, Service, service_fn};
use tower_selam::{
    ApiKey, BoxError, Refreshing, SelamLayer, Token,
    oauth::{ClientAuth, OAuthSource, RefreshToken, RefreshTokenStore, TokenEndpoint},
    simulator::{JwtAlgorithm, Simulator},
    source::{Fetched, Reason, Source, SourceError, source_fn},
};

use crate::{
    mint::{Answer, Mint, engine, settle},
    support::{Body, CHAT, KEY, key, response},
};

/// A key source whose key a test can rotate.
#[derive(Clone)]
pub(super) struct RotatingKey(Arc<Mutex<String>>);

impl RotatingKey {
    pub(super) fn new(key: impl Into<String>) -> Self {
        Self(Arc::new(Mutex::new(key.into())))
    }

    pub(super) fn rotate(&self, key: impl Into<String>) {
        *self.0.lock().unwrap() = key.into();
    }
}

impl Source<ApiKey> for RotatingKey {
    async fn fetch(&self, _: Reason<ApiKey>) -> Result<Fetched<ApiKey>, SourceError> {
        let key = self.0.lock().unwrap().clone();
        Ok(Fetched::new(ApiKey::new(key)?))
    }
}

/// A store that fails to save, with an error that contains the token.
pub(super) struct FailingStore(RefreshToken);

impl FailingStore {
    pub(super) fn new(token: RefreshToken) -> Self {
        Self(token)
    }
}

impl RefreshTokenStore for FailingStore {
    async fn load(&self) -> Result<Option<RefreshToken>, BoxError> {
        Ok(Some(self.0.clone()))
    }

    async fn save(&self, token: &RefreshToken, _: &RefreshToken) -> Result<(), BoxError> {
        Err(format!("no room for\n{}", token.expose_secret()).into())
    }
}

pub(super) fn chat() -> Request<String> {
    Request::post("https://api.selamgpt.com/v1/chat/completions").body(CHAT.to_owned()).unwrap()
}

/// Returns an API that answers with `answers` in order, then with a connection error.
pub(super) fn api<const N: usize>(
    answers: [(u16, &'static str); N],
) -> impl Service<Request<String>, Response = Response<Body>, Error = BoxError, Future: Send> + Clone {
    let answers = Arc::new(Mutex::new(answers.into_iter()));
    service_fn(move |_: Request<String>| {
        let next = answers.lock().unwrap().next();
        ready(
            next.map(|(status, body)| response(status, body))
                .ok_or_else(|| BoxError::from("the connection broke")),
        )
    })
}

pub(super) fn assert_no_secret(shown: &str) {
    for secret in [KEY, "canary", "sk-selam", "eyJ", "user-secret"] {
        assert!(!shown.contains(secret), "{shown}");
    }
}

/// Logs in with a store that fails to save the refresh token.
pub(super) async fn login_with_failing_store(simulator: &Simulator) {
    let endpoint = TokenEndpoint::new::<_, http_body_util::Full<Bytes>, _>(
        "https://api.selamgpt.com/oauth/token",
        simulator.clone(),
    );
    let (id, secret) = simulator.issue_client();
    let auth = ClientAuth::client_secret_basic(id, secret).unwrap();
    let token = RefreshToken::new(simulator.issue_refresh_token()).unwrap();
    let source =
        OAuthSource::refresh_token(endpoint.unwrap().with_client_auth(auth), FailingStore::new(token));
    Refreshing::new(source).prefetch().await.unwrap();
    settle().await;
}

/// Triggers every event and metric, with sources and an API that echo secrets.
pub(super) async fn trigger_everything() {
    let simulator = Simulator::new();
    login_with_failing_store(&simulator).await;

    // Key and JWT are rotated without notice.
    simulator.add_key(KEY);
    let keys = RotatingKey::new(KEY);
    let issuer = simulator.clone();
    let jwts = Refreshing::new(source_fn(move |_: Reason<Token>| {
        let jwt = issuer.mint_jwt(JwtAlgorithm::Es256, Duration::from_secs(600));
        async { Ok::<_, BoxError>(Token::new(jwt)?) }
    }));
    let keys_in_use = Refreshing::new(keys.clone());
    let layer = SelamLayer::builder().with_api_key(&keys_in_use).with_jwt(&jwts).build().unwrap();
    let selam = layer.layer(simulator.clone());
    assert_eq!(selam.send(chat()).await.unwrap().status(), 200);
    simulator.expire_jwts();
    assert_eq!(selam.send(chat()).await.unwrap().status(), 200);
    simulator.revoke_key(KEY);
    keys.rotate("sk-selam-canary-the-next");
    simulator.add_key("sk-selam-canary-the-next");
    let _ = selam.send(chat()).await;
    simulator.reject_jwts(true);
    let _ = selam.send(chat()).await;

    // The API echoes the key.
    let fixed = SelamLayer::builder().with_api_key(key()).build().unwrap();
    let echo = r#"{"error":{"code":"sk-selam-canary-0123456789abcdef","message":"bad\nkey sk-selam-canary-0123456789abcdef"}}"#;
    fixed.layer(api([(401, echo)])).send(chat()).await.unwrap_err();
    fixed.annotated().layer(api([(403, echo)])).send(chat()).await.unwrap();

    // A refused request has a secret in its URI.
    let plain = Request::get(format!("http://api.selamgpt.com/?api_key={KEY}")).body(String::new()).unwrap();
    layer.layer(api([])).send(plain).await.unwrap_err();

    // Sources quote credentials in their errors.
    let (first, second) = ("opaque-canary-first", "opaque-canary-second");
    for permanent in [false, true] {
        let jwts = Refreshing::new(source_fn(move |reason: Reason<Token>| async move {
            match reason {
                Reason::Rejected(old) => {
                    let message =
                        format!("no other than\r\n{}, {KEY} or eyJh.eyJz.c2ln", old.expose_secret());
                    Err(if permanent {
                        SourceError::permanent(message)
                    } else {
                        SourceError::transient(message)
                    })
                }
                _ => Ok(Fetched::new(Token::new(if permanent { first } else { second })?)),
            }
        }));
        let old = jwts.token().await.unwrap();
        jwts.rejected(&old);
        jwts.token().await.unwrap();
    }
    for answer in [Answer::Panics, Answer::Fails(None), Answer::Bare(Token::new("canary-bare").unwrap())] {
        let _ = engine(&Mint::default().then(answer)).0.token().await;
    }
}
