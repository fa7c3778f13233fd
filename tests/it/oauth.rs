//! K2 and K3: tokens from an OAuth 2.0 token endpoint. Time is paused where nothing crosses a wire.

use std::{
    collections::VecDeque,
    error::Error as _,
    future::pending,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, UNIX_EPOCH},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use tokio::{
    sync::Notify,
    task::JoinSet,
    time::{advance, sleep},
};
use tower::{BoxError, Layer, ServiceExt, service_fn, util::BoxCloneSyncService};
use tower_selam::{
    ApiKey, AuthError, AuthErrorKind, ConfigErrorKind, RefreshPolicy, Refreshing, SelamLayer, TestClock,
    Token,
    oauth::{
        ClientAuth, MemoryStore, OAuthError, OAuthSource, RefreshToken, RefreshTokenStore, TokenEndpoint,
        TokenType,
    },
    simulator::{Server, Simulator, TokenFault},
    source::{FileSource, Reason, source_fn},
};

use crate::{
    files::Directory,
    support::{BOTH, Body, Fed, KEY, https, key},
};

const URL: &str = "https://api.selamgpt.com/oauth/token";
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

type Client = BoxCloneSyncService<Request<Body>, Response<Body>, BoxError>;

/// What an endpoint was sent.
struct Asked {
    head: http::request::Parts,
    form: Vec<(String, String)>,
}

impl Asked {
    /// The parameters, as `name=value`.
    fn form(&self) -> Vec<String> {
        self.form.iter().map(|(name, value)| format!("{name}={value}")).collect()
    }

    fn authorization(&self) -> Option<&str> {
        self.head.headers.get("authorization").map(|value| value.to_str().unwrap())
    }
}

/// An endpoint that answers from a script, and at its end with tokens that live a minute.
#[derive(Clone, Default)]
struct Scripted {
    script: Arc<Mutex<VecDeque<Response<&'static str>>>>,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Scripted {
    fn then(self, status: u16, body: &'static str) -> Self {
        let answer = Response::builder().status(status).body(body).unwrap();
        self.script.lock().unwrap().push_back(answer);
        self
    }

    fn client(&self) -> Client {
        let this = self.clone();
        BoxCloneSyncService::new(service_fn(move |request: Request<Body>| this.clone().answer(request)))
    }

    async fn answer(self, request: Request<Body>) -> Result<Response<Body>, BoxError> {
        let (head, body) = request.into_parts();
        let body = body.collect().await?.to_bytes();
        let form = form_urlencoded::parse(&body).into_owned().collect();
        let number = {
            let mut asked = self.asked.lock().unwrap();
            asked.push(Asked { head, form });
            asked.len()
        };
        let scripted = self.script.lock().unwrap().pop_front();
        Ok(scripted.map_or_else(
            || {
                let body =
                    format!(r#"{{"access_token":"token-{number}","token_type":"Bearer","expires_in":60}}"#);
                Response::new(Full::from(body))
            },
            |answer| answer.map(Full::from),
        ))
    }

    fn endpoint(&self) -> TokenEndpoint {
        TokenEndpoint::new(URL, self.client()).unwrap()
    }

    fn count(&self) -> usize {
        self.asked.lock().unwrap().len()
    }

    fn last<T>(&self, read: impl FnOnce(&Asked) -> T) -> T {
        read(self.asked.lock().unwrap().last().expect("a request"))
    }
}

fn endpoint(simulator: &Simulator) -> TokenEndpoint {
    TokenEndpoint::new::<_, Body, _>(URL, simulator.clone()).unwrap()
}

/// Asks the simulator for tokens for a client of its own.
fn service_account(simulator: &Simulator) -> OAuthSource {
    let (id, secret) = simulator.issue_client();
    let auth = ClientAuth::client_secret_basic(id, secret).unwrap();
    OAuthSource::client_credentials(endpoint(simulator).with_client_auth(auth))
}

fn public(simulator: &Simulator) -> TokenEndpoint {
    endpoint(simulator).with_client_auth(ClientAuth::public("app").unwrap())
}

fn policy() -> RefreshPolicy {
    RefreshPolicy::new().with_jitter(0.0).with_backoff(SECOND, SECOND)
}

fn engine(source: OAuthSource) -> Refreshing<Token> {
    Refreshing::with_policy(source, policy())
}

fn token(text: &str) -> Token {
    Token::new(text).unwrap()
}

/// What the endpoint said, found as a user would.
fn cause(error: &AuthError) -> &OAuthError {
    error.source().and_then(|cause| cause.downcast_ref()).unwrap_or_else(|| panic!("{error:?}"))
}

/// Lets the tasks that are ready run.
async fn settle() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn k3_each_grant_asks_as_its_rfc_has_it() {
    let scripted = Scripted::default();
    let endpoint = scripted.endpoint();
    let exchange = "urn:ietf:params:oauth:grant-type:token-exchange";
    let typed = |name: &str| format!("urn:ietf:params:oauth:token-type:{name}");
    let cases = [
        (
            OAuthSource::client_credentials(endpoint.clone()).with_scope("a b").with_scope("audio agent"),
            vec!["grant_type=client_credentials".into(), "scope=audio agent".into()],
        ),
        (
            OAuthSource::refresh_token(
                endpoint.clone(),
                MemoryStore::new(RefreshToken::new("r&=+ %1").unwrap()),
            ),
            vec!["grant_type=refresh_token".into(), "refresh_token=r&=+ %1".into()],
        ),
        (
            OAuthSource::token_exchange(endpoint.clone(), token("sub"), TokenType::AccessToken),
            vec![
                format!("grant_type={exchange}"),
                "subject_token=sub".into(),
                format!("subject_token_type={}", typed("access_token")),
            ],
        ),
        (
            OAuthSource::token_exchange(endpoint.clone(), token("sub"), TokenType::Jwt)
                .with_actor(token("act"), TokenType::Other("urn:x".into()))
                .with_audience("one")
                .with_audience("two")
                .with_resource("https://api.selamgpt.com/")
                .with_parameter("requested_token_type", typed("jwt"))
                .unwrap(),
            vec![
                format!("grant_type={exchange}"),
                "subject_token=sub".into(),
                format!("subject_token_type={}", typed("jwt")),
                "actor_token=act".into(),
                "actor_token_type=urn:x".into(),
                "audience=one".into(),
                "audience=two".into(),
                "resource=https://api.selamgpt.com/".into(),
                format!("requested_token_type={}", typed("jwt")),
            ],
        ),
        (
            OAuthSource::jwt_bearer(endpoint.clone(), token("a.b.c")),
            vec!["grant_type=urn:ietf:params:oauth:grant-type:jwt-bearer".into(), "assertion=a.b.c".into()],
        ),
    ];
    for (source, form) in cases {
        engine(source).token().await.unwrap();
        scripted.last(|asked| {
            assert_eq!(asked.form(), form);
            assert_eq!((asked.head.method.as_str(), asked.head.uri.to_string()), ("POST", URL.to_owned()));
            assert_eq!(asked.head.headers["content-type"], "application/x-www-form-urlencoded");
            assert_eq!(asked.head.headers["accept"], "application/json");
            assert_eq!(asked.authorization(), None);
        });
    }
}

#[tokio::test(start_paused = true)]
async fn k3_a_client_says_who_it_is_in_one_way() {
    let scripted = Scripted::default();
    let encoded = BASE64_STANDARD.encode("my+app%3A1:s%2B+%25%3A%26");
    for (auth, authorization, form) in [
        (ClientAuth::none(), None, vec![]),
        (ClientAuth::public("my app:1").unwrap(), None, vec!["client_id=my app:1"]),
        (
            ClientAuth::client_secret_post("my app:1", "s+ %:&").unwrap(),
            None,
            vec!["client_id=my app:1", "client_secret=s+ %:&"],
        ),
        (
            ClientAuth::client_secret_basic("my app:1", "s+ %:&\n").unwrap(),
            Some(format!("Basic {encoded}")),
            vec![],
        ),
        (ClientAuth::api_key(key()), Some(format!("Bearer {KEY}")), vec![]),
    ] {
        let source = OAuthSource::client_credentials(scripted.endpoint().with_client_auth(auth));
        engine(source).token().await.unwrap();
        scripted.last(|asked| {
            assert_eq!(asked.authorization(), authorization.as_deref());
            assert!(asked.head.headers.get("authorization").is_none_or(http::HeaderValue::is_sensitive));
            assert_eq!(asked.form()[1..], form);
        });
    }
}

#[tokio::test]
async fn k3_tokens_come_over_tls_in_either_version_of_http() {
    let simulator = Simulator::new();
    let server = Server::tls(&simulator).await.unwrap();
    let (id, secret) = simulator.issue_client();
    let url = server.base_url().replace("/v1", "/oauth/token");
    for http in BOTH {
        for auth in [
            ClientAuth::client_secret_basic(&id, &secret),
            ClientAuth::client_secret_post(&id, &secret),
            Ok(ClientAuth::api_key(ApiKey::new(simulator.issue_key()).unwrap())),
        ] {
            let endpoint =
                TokenEndpoint::new(&url, https(&server, http)).unwrap().with_client_auth(auth.unwrap());
            let jwt = Refreshing::new(OAuthSource::client_credentials(endpoint)).token().await.unwrap();
            assert!(jwt.expires_at().is_some(), "{http:?}");
        }
    }
}

#[test]
fn k3_a_url_that_is_not_https_is_refused() {
    let refuse = |url| TokenEndpoint::new::<_, Body, _>(url, Simulator::new()).unwrap_err();
    for (url, kind) in [
        ("http://login.example/token", ConfigErrorKind::NotHttps),
        ("http://127.0.0.1/token", ConfigErrorKind::NotHttps),
        ("https://secret@login.example/token", ConfigErrorKind::UserInfo),
        ("https://login.example/token#secret", ConfigErrorKind::Excess),
        ("login.example", ConfigErrorKind::InvalidUrl),
        ("", ConfigErrorKind::Empty),
    ] {
        let error = refuse(url);
        assert_eq!(error.kind(), kind, "{url}");
        assert!(
            error.to_string().starts_with("token endpoint's URL ") && !error.to_string().contains("secret")
        );
    }
    let loopback = |url| TokenEndpoint::allow_insecure_loopback::<_, Body, _>(url, Simulator::new());
    assert!(loopback("http://127.0.0.1:8080/token").is_ok());
    assert_eq!(loopback("http://localhost.evil.com/").unwrap_err().kind(), ConfigErrorKind::NotLoopback);
    assert!(
        TokenEndpoint::new::<_, Body, _>("https://login.example/token?tenant=1", Simulator::new()).is_ok()
    );
}

#[test]
fn s1_what_a_client_or_a_login_has_is_checked_and_not_shown() {
    let cases = [
        (ClientAuth::client_secret_basic("", "secret").map(|_| ()), "client id is empty"),
        (ClientAuth::client_secret_basic("id", " \n").map(|_| ()), "client secret is empty"),
        (
            ClientAuth::client_secret_post("id", "secret\u{1}").map(|_| ()),
            "client secret has a control character at byte 6",
        ),
        (ClientAuth::public("id\u{e9}").map(|_| ()), "client id has a character that is not ASCII at byte 2"),
        (
            RefreshToken::new("secret\u{200b}").map(|_| ()),
            "refresh token has a character that is not ASCII at byte 6",
        ),
    ];
    for (result, said) in cases {
        assert_eq!(result.unwrap_err().to_string(), said);
    }
    let source = OAuthSource::client_credentials(endpoint(&Simulator::new()));
    for name in ["grant_type", "client_secret", "refresh_token", "subject_token"] {
        let error = source.clone().with_parameter(name, "secret").unwrap_err();
        assert_eq!(error.to_string(), "token request's parameter is one that the source sets itself");
    }
}

#[tokio::test(start_paused = true)]
async fn k3_an_endpoint_that_fails_is_asked_again_and_one_that_refuses_is_not() {
    for (fault, said) in [
        (TokenFault::ServerError, "answered 500 server_error: Something went wrong"),
        (TokenFault::Unavailable, "answered 503 temporarily_unavailable: Try again later"),
        (TokenFault::Garbage, "answered 200: the answer is no JSON object with an"),
        (TokenFault::Html, "answered 200: the answer is no JSON object with an"),
        (TokenFault::Redirect("https://evil.example/".into()), "answered 307: redirects are not followed"),
    ] {
        let simulator = Simulator::new();
        let jwts = engine(service_account(&simulator));
        simulator.inject_token_fault(fault);
        let error = jwts.token().await.unwrap_err();
        assert_eq!(error.kind(), AuthErrorKind::RefreshFailed);
        assert!(cause(&error).to_string().contains(said), "{}", cause(&error));
        assert!(jwts.token().await.is_err());
        assert_eq!(simulator.token_requests(), 1, "not during the back-off");
        advance(SECOND).await;
        jwts.token().await.unwrap();
    }
    // Broken off, and expired: no answer of the endpoint's own, but failures all the same.
    for fault in [TokenFault::CutOff, TokenFault::Expired] {
        let simulator = Simulator::new();
        let jwts = engine(service_account(&simulator));
        simulator.inject_token_fault(fault);
        assert_eq!(jwts.token().await.unwrap_err().kind(), AuthErrorKind::RefreshFailed);
        advance(SECOND).await;
        jwts.token().await.unwrap();
    }

    let simulator = Simulator::new();
    let jwts = engine(service_account(&simulator));
    simulator.inject_token_fault(TokenFault::InvalidGrant);
    let error = jwts.token().await.unwrap_err();
    assert_eq!(error.kind(), AuthErrorKind::RefreshRejected);
    assert_eq!(cause(&error).code(), Some("invalid_grant"));
    assert_eq!(cause(&error).status(), StatusCode::BAD_REQUEST);
    advance(10 * MINUTE).await;
    assert!(jwts.token().await.is_err());
    assert_eq!(simulator.token_requests(), 1);
}

#[tokio::test(start_paused = true)]
async fn k3_retry_after_is_honoured() {
    let simulator = Simulator::new();
    let jwts = engine(service_account(&simulator));
    simulator.inject_token_fault(TokenFault::RateLimited { retry_after: 90 * SECOND });
    let error = jwts.token().await.unwrap_err();
    assert_eq!(error.retry_after(), Some(90 * SECOND));
    assert_eq!(cause(&error).retry_after(), Some(90 * SECOND));
    advance(89 * SECOND).await;
    assert!(jwts.token().await.is_err());
    assert_eq!(simulator.token_requests(), 1);
    advance(SECOND).await;
    jwts.token().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn k3_an_answer_without_end_is_given_up() {
    for length in [64 * 1024, 64 * 1024 + 1] {
        let body = format!(r#"{{"access_token":"a","token_type":"Bearer","x":"{}"}}"#, "x".repeat(length));
        let body = Bytes::from(body[body.len() - length..].to_owned());
        let sized = move || {
            let body = body.clone();
            service_fn(move |_: Request<Body>| {
                let body = Full::new(body.clone());
                async { Ok::<_, BoxError>(Response::new(body)) }
            })
        };
        let source = OAuthSource::client_credentials(TokenEndpoint::new(URL, sized()).unwrap());
        let error = engine(source).token().await.unwrap_err();
        let said = error.source().unwrap().to_string();
        // The one that is just within bounds is read, and is no JSON as it was cut.
        assert_eq!(said.contains("too long"), length > 64 * 1024, "{said}");
    }

    let (_sender, receiver) = tokio::sync::mpsc::unbounded_channel();
    let body = Arc::new(Mutex::new(Some(Fed(receiver))));
    let stalled = service_fn(move |_: Request<Body>| {
        let body = body.lock().unwrap().take().unwrap();
        async { Ok::<_, BoxError>(Response::new(body)) }
    });
    let source = OAuthSource::client_credentials(TokenEndpoint::new(URL, stalled).unwrap());
    let began = tokio::time::Instant::now();
    assert!(engine(source).token().await.is_err());
    assert_eq!(began.elapsed(), 30 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn k2_refresh_tokens_rotate_and_each_is_spent_once() {
    let simulator = Simulator::new();
    simulator.set_token_lifetime(MINUTE);
    let first = simulator.issue_refresh_token();
    let store = MemoryStore::new(RefreshToken::new(first.clone()).unwrap());
    let jwts = engine(OAuthSource::refresh_token(public(&simulator), store.clone()));
    for renewals in 1..=5 {
        let mut callers = JoinSet::new();
        for _ in 0..100 {
            let jwts = jwts.clone();
            callers.spawn(async move { jwts.token().await.unwrap().id() });
        }
        let ids = callers.join_all().await;
        assert!(ids.iter().all(|id| *id == ids[0]));
        assert_eq!(simulator.token_requests(), renewals);
        assert!(simulator.is_refresh_token_valid(store.current().expose_secret()));
        advance(2 * MINUTE).await;
    }
    assert!(!simulator.is_refresh_token_valid(&first));
    assert_eq!(simulator.reused_refresh_tokens(), 0);
}

#[tokio::test(start_paused = true)]
async fn k2_an_answer_without_a_refresh_token_keeps_the_old() {
    let simulator = Simulator::new();
    simulator.rotate_refresh_tokens(false);
    simulator.set_token_lifetime(MINUTE);
    let first = RefreshToken::new(simulator.issue_refresh_token()).unwrap();
    let store = MemoryStore::new(first.clone());
    let jwts = engine(OAuthSource::refresh_token(public(&simulator), store.clone()));
    for _ in 0..3 {
        jwts.token().await.unwrap();
        advance(2 * MINUTE).await;
    }
    assert_eq!(simulator.token_requests(), 3);
    assert_eq!(store.current().id(), first.id());
}

#[tokio::test(start_paused = true)]
async fn k2_the_answer_that_comes_after_the_timeout_is_kept_for_the_next_who_asks() {
    let simulator = Simulator::new();
    let store = MemoryStore::new(RefreshToken::new(simulator.issue_refresh_token()).unwrap());
    let source = OAuthSource::refresh_token(public(&simulator), store.clone());
    let clock = TestClock::new(UNIX_EPOCH + Duration::from_secs(1_900_000_000));
    let jwts = Refreshing::with_policy(source, policy().with_timeout(5 * SECOND).with_clock(clock.clone()));
    simulator.inject_token_fault(TokenFault::Slow(20 * SECOND));
    assert_eq!(jwts.token().await.unwrap_err().kind(), AuthErrorKind::RefreshFailed);

    // While the exchange still runs, nobody spends the token again.
    advance(2 * SECOND).await;
    assert!(jwts.token().await.is_err());
    assert_eq!(simulator.token_requests(), 1);

    advance(8 * SECOND).await;
    settle().await;
    assert!(simulator.is_refresh_token_valid(store.current().expose_secret()), "the new one is kept");
    advance(12 * SECOND).await;
    jwts.token().await.unwrap();
    assert_eq!((simulator.token_requests(), simulator.reused_refresh_tokens()), (1, 0));

    // What was fetched for somebody else has aged meanwhile.
    let left = jwts.expires_at().unwrap().duration_since(clock.now()).unwrap();
    assert_eq!(left, 60 * MINUTE - 12 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn k2_an_answer_that_expired_before_anybody_asked_is_not_handed_out() {
    let simulator = Simulator::new();
    simulator.set_token_lifetime(MINUTE);
    let store = MemoryStore::new(RefreshToken::new(simulator.issue_refresh_token()).unwrap());
    let source = OAuthSource::refresh_token(public(&simulator), store);
    let jwts = Refreshing::with_policy(source, policy().with_timeout(5 * SECOND));
    simulator.inject_token_fault(TokenFault::Slow(20 * SECOND));
    assert!(jwts.token().await.is_err());
    advance(15 * SECOND).await;
    settle().await;
    advance(2 * MINUTE).await;
    jwts.token().await.unwrap();
    assert_eq!((simulator.token_requests(), simulator.reused_refresh_tokens()), (2, 0));
}

#[tokio::test(start_paused = true)]
async fn k2_whoever_leaves_and_even_if_all_do_the_new_refresh_token_reaches_the_store() {
    let simulator = Simulator::new();
    let first = simulator.issue_refresh_token();
    let store = MemoryStore::new(RefreshToken::new(first.clone()).unwrap());
    let jwts = engine(OAuthSource::refresh_token(public(&simulator), store.clone()));
    simulator.inject_token_fault(TokenFault::Slow(SECOND));
    let mut call = tokio_test::task::spawn({
        let jwts = jwts.clone();
        async move { jwts.token().await }
    });
    assert!(call.poll().is_pending());
    settle().await;
    assert!(!simulator.is_refresh_token_valid(&first), "it is spent");
    drop(call);
    drop(jwts); // and with it the engine

    advance(2 * SECOND).await;
    settle().await;
    assert_ne!(store.current().expose_secret(), first);
    assert!(simulator.is_refresh_token_valid(store.current().expose_secret()));
}

#[tokio::test(start_paused = true)]
async fn k2_an_exchange_that_never_ends_is_given_up_after_two_minutes() {
    let simulator = Simulator::new();
    let store = MemoryStore::new(RefreshToken::new(simulator.issue_refresh_token()).unwrap());
    let jwts = engine(OAuthSource::refresh_token(public(&simulator), store));
    simulator.inject_token_fault(TokenFault::Hang);
    for _ in 0..3 {
        assert!(jwts.token().await.is_err());
        assert_eq!(simulator.token_requests(), 1);
        advance(SECOND).await;
    }
    advance(30 * SECOND).await;
    settle().await;
    assert_eq!(simulator.token_requests(), 1, "nothing is spent for those who have left");
    jwts.token().await.unwrap();
    assert_eq!(simulator.token_requests(), 2);
}

#[tokio::test(start_paused = true)]
async fn k2_a_new_login_ends_the_failure_of_the_old_one() {
    let simulator = Simulator::new();
    let store = MemoryStore::new(RefreshToken::new(simulator.issue_refresh_token()).unwrap());
    let jwts = engine(OAuthSource::refresh_token(public(&simulator), store.clone()));
    simulator.revoke_refresh_tokens();
    assert_eq!(jwts.token().await.unwrap_err().kind(), AuthErrorKind::RefreshRejected);
    advance(10 * MINUTE).await;
    assert!(jwts.token().await.is_err());
    assert_eq!(simulator.token_requests(), 1);

    store.replace(RefreshToken::new(simulator.issue_refresh_token()).unwrap());
    jwts.token().await.unwrap();
    assert_eq!((simulator.token_requests(), simulator.reused_refresh_tokens()), (2, 0));
}

#[tokio::test(start_paused = true)]
async fn k2_a_login_during_an_exchange_is_not_overwritten_by_it() {
    let simulator = Simulator::new();
    simulator.set_token_lifetime(MINUTE);
    let store = MemoryStore::new(RefreshToken::new(simulator.issue_refresh_token()).unwrap());
    let jwts = engine(OAuthSource::refresh_token(public(&simulator), store.clone()));
    simulator.inject_token_fault(TokenFault::Slow(SECOND));
    let waiting = tokio::spawn({
        let jwts = jwts.clone();
        async move { jwts.token().await }
    });
    settle().await;
    let login = RefreshToken::new(simulator.issue_refresh_token()).unwrap();
    store.replace(login.clone());
    waiting.await.unwrap().unwrap();
    settle().await;
    // What the old login brought is dropped, and the new one spent at once.
    assert!(!simulator.is_refresh_token_valid(login.expose_secret()));
    assert!(simulator.is_refresh_token_valid(store.current().expose_secret()));
    assert_eq!((simulator.token_requests(), simulator.reused_refresh_tokens()), (2, 0));
    simulator.revoke_refresh_tokens();
    store.replace(RefreshToken::new(simulator.issue_refresh_token()).unwrap());
    advance(2 * MINUTE).await;
    jwts.token().await.unwrap();
}

/// A store whose parts fail when they are told to.
#[derive(Clone, Default)]
struct Shelf {
    token: Arc<Mutex<Option<RefreshToken>>>,
    broken: Arc<AtomicBool>,
    version: Arc<AtomicU64>,
    loads: Arc<AtomicU64>,
    saving: Option<Arc<Notify>>,
}

impl Shelf {
    fn put(&self, token: &str) {
        *self.token.lock().unwrap() = Some(RefreshToken::new(token).unwrap());
    }

    fn holds(&self) -> String {
        self.token.lock().unwrap().as_ref().unwrap().expose_secret().to_owned()
    }
}

impl RefreshTokenStore for Shelf {
    async fn load(&self) -> Result<Option<RefreshToken>, BoxError> {
        self.loads.fetch_add(1, SeqCst);
        if self.broken.load(SeqCst) {
            return Err("the disk is gone".into());
        }
        Ok(self.token.lock().unwrap().clone())
    }

    async fn save(&self, token: &RefreshToken) -> Result<(), BoxError> {
        if self.broken.load(SeqCst) {
            return Err(format!("no room for {}", token.expose_secret()).into());
        }
        if let Some(saving) = &self.saving {
            saving.notified().await;
        }
        *self.token.lock().unwrap() = Some(token.clone());
        Ok(())
    }

    fn version(&self) -> u64 {
        self.version.load(SeqCst)
    }
}

#[tokio::test(start_paused = true)]
async fn k2_a_store_that_fails_loses_nothing_in_memory() {
    let simulator = Simulator::new();
    simulator.set_token_lifetime(MINUTE);
    let shelf = Shelf::default();
    shelf.put(&simulator.issue_refresh_token());
    let jwts = engine(OAuthSource::refresh_token(public(&simulator), shelf.clone()));
    jwts.token().await.unwrap();
    settle().await;
    let saved = shelf.holds();

    shelf.broken.store(true, SeqCst);
    for _ in 0..3 {
        advance(2 * MINUTE).await;
        jwts.token().await.unwrap();
        settle().await;
        assert_eq!(shelf.holds(), saved);
    }
    shelf.broken.store(false, SeqCst);
    advance(2 * MINUTE).await;
    jwts.token().await.unwrap();
    settle().await;
    assert!(simulator.is_refresh_token_valid(&shelf.holds()), "the newest is saved");
    assert_eq!((simulator.reused_refresh_tokens(), shelf.loads.load(SeqCst)), (0, 1));
}

/// In a process of its own: `tracing` remembers for all threads whether anybody listens.
#[cfg(feature = "tracing")]
#[test]
fn k2_a_store_that_fails_to_save_raises_an_event_without_the_token() {
    use crate::environment::{CASE, run, tell};

    const NAME: &str = "oauth::k2_a_store_that_fails_to_save_raises_an_event_without_the_token";
    if std::env::var(CASE).is_err() {
        let events = run(NAME, "the event", &[]);
        assert!(events.contains("the new refresh token was not saved"), "{events}");
        assert!(events.contains("no room for [redacted]") && events.contains("tower_selam"), "{events}");
        return;
    }
    let log = crate::secrets::Log::default();
    let _guard = tracing::subscriber::set_default(log.clone());
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let simulator = Simulator::new();
        let shelf = Shelf::default();
        shelf.put(&simulator.issue_refresh_token());
        let jwts = engine(OAuthSource::refresh_token(public(&simulator), shelf.clone()));
        simulator.inject_token_fault(TokenFault::Slow(SECOND));
        let call = tokio::spawn({
            let jwts = jwts.clone();
            async move { jwts.token().await }
        });
        settle().await;
        shelf.broken.store(true, SeqCst);
        call.await.unwrap().unwrap();
        settle().await;
    });
    tell(&log.text().replace('\n', " "));
}

#[tokio::test(start_paused = true)]
async fn k2_a_slow_store_delays_no_request_but_the_next_exchange() {
    let simulator = Simulator::new();
    simulator.set_token_lifetime(MINUTE);
    let saving = Arc::new(Notify::new());
    let shelf = Shelf { saving: Some(Arc::clone(&saving)), ..Shelf::default() };
    shelf.put(&simulator.issue_refresh_token());
    let jwts = engine(OAuthSource::refresh_token(public(&simulator), shelf.clone()));
    jwts.token().await.unwrap(); // though nothing is saved yet

    advance(61 * SECOND).await;
    let mut next = tokio_test::task::spawn(jwts.token());
    assert!(next.poll().is_pending());
    settle().await;
    assert_eq!(simulator.token_requests(), 1, "it waits for the store");
    saving.notify_one();
    settle().await;
    assert!(next.poll().is_ready());
    assert_eq!((simulator.token_requests(), simulator.reused_refresh_tokens()), (2, 0));
}

#[tokio::test(start_paused = true)]
async fn k2_what_another_program_has_stored_is_taken_where_ours_was_refused() {
    let simulator = Simulator::new();
    simulator.set_token_lifetime(MINUTE);
    let shelf = Shelf::default();
    shelf.put(&simulator.issue_refresh_token());
    let jwts = engine(OAuthSource::refresh_token(public(&simulator), shelf.clone()));
    jwts.token().await.unwrap();
    settle().await;

    simulator.revoke_refresh_tokens();
    shelf.put(&simulator.issue_refresh_token());
    advance(2 * MINUTE).await;
    jwts.token().await.unwrap();
    settle().await;
    assert!(simulator.is_refresh_token_valid(&shelf.holds()));
    assert_eq!(simulator.token_requests(), 3, "refused once, and then with the other");
}

#[tokio::test(start_paused = true)]
async fn k2_nobody_logged_in_is_a_failure_until_somebody_has() {
    let simulator = Simulator::new();
    let shelf = Shelf::default();
    let jwts = engine(OAuthSource::refresh_token(public(&simulator), shelf.clone()));
    let error = jwts.token().await.unwrap_err();
    assert_eq!(error.kind(), AuthErrorKind::RefreshRejected);
    assert_eq!(error.source().unwrap().to_string(), "there is no refresh token: log in");
    advance(MINUTE).await;
    assert!(jwts.token().await.is_err());
    assert_eq!(shelf.loads.load(SeqCst), 1);

    shelf.put(&simulator.issue_refresh_token());
    shelf.version.store(1, SeqCst);
    jwts.token().await.unwrap();

    // A store that cannot be read is asked again.
    let shelf = Shelf { broken: Arc::new(AtomicBool::new(true)), ..Shelf::default() };
    let jwts = engine(OAuthSource::refresh_token(public(&simulator), shelf.clone()));
    assert_eq!(jwts.token().await.unwrap_err().kind(), AuthErrorKind::RefreshFailed);
    shelf.put(&simulator.issue_refresh_token());
    shelf.broken.store(false, SeqCst);
    advance(SECOND).await;
    jwts.token().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn j6_a_key_that_was_rotated_is_read_again_and_nobody_notices() {
    let simulator = Simulator::new();
    let first = simulator.issue_key();
    let present = Arc::new(Mutex::new(first.clone()));
    let keys = Refreshing::new(source_fn({
        let present = Arc::clone(&present);
        move |_: Reason<ApiKey>| {
            let key = present.lock().unwrap().clone();
            async move { Ok::<_, BoxError>(ApiKey::new(key)?) }
        }
    }));
    keys.prefetch().await.unwrap();
    *present.lock().unwrap() = simulator.issue_key();
    simulator.revoke_key(&first);

    let endpoint = endpoint(&simulator).with_client_auth(ClientAuth::api_key(&keys));
    engine(OAuthSource::client_credentials(endpoint)).token().await.unwrap();
    assert_eq!(simulator.token_requests(), 2);
}

#[tokio::test(start_paused = true)]
async fn w2_a_key_that_is_refused_and_has_no_other_is_not_sent_again_until_it_has() {
    let simulator = Simulator::new();
    let present = Arc::new(Mutex::new("sk-selam-revoked".to_owned()));
    let keys = Refreshing::new(source_fn({
        let present = Arc::clone(&present);
        move |_: Reason<ApiKey>| {
            let key = present.lock().unwrap().clone();
            async move { Ok::<_, BoxError>(ApiKey::new(key)?) }
        }
    }));
    let endpoint = endpoint(&simulator).with_client_auth(ClientAuth::api_key(&keys));
    let jwts = engine(OAuthSource::client_credentials(endpoint));
    assert_eq!(jwts.token().await.unwrap_err().kind(), AuthErrorKind::RefreshRejected);
    for _ in 0..3 {
        advance(MINUTE).await;
        assert!(jwts.token().await.is_err());
    }
    assert_eq!(simulator.token_requests(), 1);

    *present.lock().unwrap() = simulator.issue_key();
    keys.invalidate(&keys.current().unwrap());
    settle().await;
    jwts.token().await.unwrap();
    assert_eq!(simulator.token_requests(), 2);
}

#[tokio::test(start_paused = true)]
async fn k3_a_subject_token_that_is_refused_is_renewed_and_sent_once_more() {
    for refusal in [r#"{"error":"invalid_grant"}"#, r#"{"error":"invalid_request"}"#] {
        let scripted = Scripted::default().then(400, refusal);
        let asked = Arc::new(AtomicU64::new(0));
        let subjects = Refreshing::new(source_fn({
            let asked = Arc::clone(&asked);
            move |_: Reason<Token>| {
                let number = asked.fetch_add(1, SeqCst);
                async move { Ok::<_, BoxError>(Token::new(format!("subject-{number}"))?) }
            }
        }));
        let source = OAuthSource::token_exchange(scripted.endpoint(), &subjects, TokenType::AccessToken);
        engine(source).token().await.unwrap();
        assert_eq!((scripted.count(), asked.load(SeqCst)), (2, 2));
        scripted.last(|asked| assert!(asked.form().contains(&"subject_token=subject-1".to_owned())));
    }
    // What is fixed has no other, and is sent but once.
    let scripted = Scripted::default().then(400, r#"{"error":"invalid_grant"}"#);
    let source = OAuthSource::token_exchange(scripted.endpoint(), token("sub"), TokenType::AccessToken);
    assert_eq!(engine(source).token().await.unwrap_err().kind(), AuthErrorKind::RefreshRejected);
    assert_eq!(scripted.count(), 1);
}

#[tokio::test(start_paused = true)]
async fn f7_a_token_client_that_asks_for_the_token_itself_fails_at_once() {
    for refresh in [false, true] {
        let simulator = Simulator::new();
        let engines: Arc<Mutex<Option<Refreshing<Token>>>> = Arc::default();
        let client = {
            let (simulator, engines) = (simulator.clone(), Arc::clone(&engines));
            service_fn(move |request: Request<Body>| {
                let jwts = engines.lock().unwrap().clone().unwrap();
                let layer = SelamLayer::builder().with_api_key(key()).with_jwt(jwts).build().unwrap();
                layer.layer(simulator.clone()).oneshot(request)
            })
        };
        let endpoint = TokenEndpoint::new(URL, client.map_err(|error| error.into_boxed())).unwrap();
        let source = match refresh {
            true => OAuthSource::refresh_token(endpoint, MemoryStore::new(RefreshToken::new("r").unwrap())),
            false => OAuthSource::client_credentials(endpoint),
        };
        let jwts = engine(source);
        *engines.lock().unwrap() = Some(jwts.clone());
        let began = tokio::time::Instant::now();
        let error = jwts.token().await.unwrap_err();
        assert!(format!("{error:?}").contains("waits for the credential itself"), "{error:?}");
        assert_eq!((began.elapsed(), simulator.requests()), (Duration::ZERO, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn f5_a_client_or_a_store_that_panics_fails_and_the_next_exchange_works() {
    struct Panicking(AtomicBool);
    impl RefreshTokenStore for Panicking {
        async fn load(&self) -> Result<Option<RefreshToken>, BoxError> {
            assert!(self.0.load(SeqCst), "the store panics");
            Ok(Some(RefreshToken::new("refresh")?))
        }

        async fn save(&self, _: &RefreshToken) -> Result<(), BoxError> {
            pending().await
        }
    }

    let panics = Arc::new(AtomicBool::new(true));
    let scripted = Scripted::default();
    let client = {
        let (panics, scripted) = (Arc::clone(&panics), scripted.clone());
        service_fn(move |request: Request<Body>| {
            let (panics, scripted) = (panics.load(SeqCst), scripted.clone());
            async move {
                assert!(!panics, "the client panics");
                scripted.answer(request).await
            }
        })
    };
    let store = Panicking(AtomicBool::new(true));
    let jwts = engine(OAuthSource::refresh_token(TokenEndpoint::new(URL, client).unwrap(), store));
    let error = jwts.token().await.unwrap_err();
    assert!(error.source().unwrap().to_string().contains("panicked"), "{error:?}");
    panics.store(false, SeqCst);
    advance(SECOND).await;
    jwts.token().await.unwrap();

    let store = Panicking(AtomicBool::new(false));
    let jwts = engine(OAuthSource::refresh_token(scripted.endpoint(), store));
    assert_eq!(jwts.token().await.unwrap_err().kind(), AuthErrorKind::RefreshFailed);
}

#[tokio::test(start_paused = true)]
async fn w2_k1_a_key_file_that_is_mended_after_a_refusal_is_read_again() {
    let simulator = Simulator::new();
    let directory = Directory::new();
    std::fs::write(directory.file(), "sk-selam-wrong").unwrap();
    let keys: Refreshing<ApiKey> = Refreshing::new(FileSource::new(directory.file()));
    let auth = ClientAuth::api_key(&keys);
    let jwts = engine(OAuthSource::client_credentials(endpoint(&simulator).with_client_auth(auth)));
    // As `SELAM_API_KEY_FILE` and `SELAM_TOKEN_URL` have it.
    let layer = SelamLayer::builder().with_api_key(&keys).with_jwt(&jwts).build().unwrap();
    let selam = layer.layer(simulator.clone());
    let request = || Request::get("https://api.selamgpt.com/v1/models").body(Body::default()).unwrap();
    let error = selam.clone().oneshot(request()).await.unwrap_err();
    assert_eq!(error.auth().unwrap().kind(), AuthErrorKind::RefreshRejected);

    std::fs::write(directory.file(), simulator.issue_key()).unwrap();
    let mut tries = 0;
    while let Err(error) = selam.clone().oneshot(request()).await {
        tries += 1;
        assert!(tries < 10, "{error:?}");
        sleep(SECOND / 2).await;
    }
    assert_eq!(simulator.token_requests(), 2);
}

#[tokio::test(start_paused = true)]
async fn k2_a_refresh_token_is_kept_though_its_answer_is_refused() {
    let scripted =
        Scripted::default().then(200, r#"{"access_token":"a.b","expires_in":60,"refresh_token":"second"}"#);
    let store = MemoryStore::new(RefreshToken::new("first").unwrap());
    let jwts = engine(OAuthSource::refresh_token(scripted.endpoint(), store.clone()));
    let _ = jwts.token().await;
    settle().await;
    advance(MINUTE).await;
    let _ = jwts.token().await;
    scripted.last(|asked| {
        assert!(asked.form().contains(&"refresh_token=second".to_owned()), "{:?}", asked.form())
    });
}

#[tokio::test(start_paused = true)]
async fn k2_what_was_spent_is_not_spent_again_though_the_store_has_it_still() {
    let scripted = Scripted::default()
        .then(200, r#"{"access_token":"t1","token_type":"Bearer","expires_in":60,"refresh_token":"second"}"#)
        .then(400, r#"{"error":"invalid_grant"}"#);
    let shelf = Shelf::default();
    shelf.put("first");
    let jwts = engine(OAuthSource::refresh_token(scripted.endpoint(), shelf.clone()));
    jwts.token().await.unwrap();
    // the store could not save "second": it holds "first" still
    shelf.put("first");
    advance(2 * MINUTE).await;
    let _ = jwts.token().await;
    let spent: Vec<_> = scripted.asked.lock().unwrap().iter().map(|asked| asked.form()[1].clone()).collect();
    assert_eq!(spent.iter().filter(|s| *s == "refresh_token=first").count(), 1, "{spent:?}");
}

#[tokio::test(start_paused = true)]
async fn k2_what_was_fetched_for_an_old_login_is_not_handed_to_the_new_one() {
    let simulator = Simulator::new();
    simulator.set_token_lifetime(10 * MINUTE);
    let store = MemoryStore::new(RefreshToken::new(simulator.issue_refresh_token()).unwrap());
    let jwts = engine(OAuthSource::refresh_token(public(&simulator), store.clone()));
    simulator.inject_token_fault(TokenFault::Slow(40 * SECOND));
    assert!(jwts.token().await.is_err(), "timeout");
    advance(15 * SECOND).await;
    settle().await;
    let before = simulator.token_requests();
    // somebody else logs in
    let login = RefreshToken::new(simulator.issue_refresh_token()).unwrap();
    store.replace(login.clone());
    jwts.token().await.unwrap();
    assert_eq!(simulator.token_requests(), before + 1, "the old login's token was handed out");
    assert!(!simulator.is_refresh_token_valid(login.expose_secret()));
}

#[tokio::test(start_paused = true)]
async fn s2_an_echo_of_the_basic_header_is_masked() {
    let basic = BASE64_STANDARD.encode("my-service:s3cr3t-canary");
    let body: &'static str = Box::leak(
        format!(r#"{{"error":"invalid_client","error_description":"not understood: Basic {basic}"}}"#)
            .into_boxed_str(),
    );
    let scripted = Scripted::default().then(401, body);
    let auth = ClientAuth::client_secret_basic("my-service", "s3cr3t-canary").unwrap();
    let jwts = engine(OAuthSource::client_credentials(scripted.endpoint().with_client_auth(auth)));
    let error = jwts.token().await.unwrap_err();
    let said = format!("{} {:?} {}", error, error, cause(&error));
    assert!(!said.contains(&basic), "{said}");
}

#[tokio::test(start_paused = true)]
async fn s2_an_echo_of_the_form_is_masked() {
    let secret = "pa~ss wo*rd~x";
    let encoded: String = form_urlencoded::byte_serialize(secret.as_bytes()).collect();
    let body: &'static str = Box::leak(
        format!(r#"{{"error":"invalid_client","error_description":"bad body client_secret={encoded}"}}"#)
            .into_boxed_str(),
    );
    let scripted = Scripted::default().then(401, body);
    let auth = ClientAuth::client_secret_post("my-service", secret).unwrap();
    let jwts = engine(OAuthSource::client_credentials(scripted.endpoint().with_client_auth(auth)));
    let error = jwts.token().await.unwrap_err();
    let said = format!("{} {:?} {}", error, error, cause(&error));
    assert!(!said.contains(&encoded), "{said}");
}

#[tokio::test(start_paused = true)]
async fn s2_an_echo_of_a_parameter_is_masked() {
    let scripted = Scripted::default()
        .then(400, r#"{"error":"invalid_request","error_description":"wrong password hunter2-canary"}"#);
    let jwts = engine(
        OAuthSource::client_credentials(scripted.endpoint())
            .with_parameter("password", "hunter2-canary")
            .unwrap(),
    );
    let error = jwts.token().await.unwrap_err();
    let said = format!("{} {:?} {}", error, error, cause(&error));
    assert!(!said.contains("hunter2-canary"), "{said}");
}

#[test]
fn s2_nothing_printed_shows_what_a_token_is_asked_with() {
    const SECRET: &str = "canary-secret";
    let endpoint = TokenEndpoint::new::<_, Body, _>(
        &format!("https://login.example/token?key={SECRET}"),
        Simulator::new(),
    )
    .unwrap();
    let shown = |source: &OAuthSource| format!("{source:?} {source:#?}");
    for auth in [
        ClientAuth::client_secret_basic("my-app", SECRET).unwrap(),
        ClientAuth::client_secret_post("my-app", SECRET).unwrap(),
        ClientAuth::api_key(ApiKey::new(SECRET).unwrap()),
    ] {
        let endpoint = endpoint.clone().with_client_auth(auth);
        let store = MemoryStore::new(RefreshToken::new(SECRET).unwrap());
        let said = [
            shown(&OAuthSource::client_credentials(endpoint.clone()).with_parameter("p", SECRET).unwrap()),
            shown(&OAuthSource::token_exchange(endpoint.clone(), token(SECRET), TokenType::Jwt)),
            shown(&OAuthSource::refresh_token(endpoint, store.clone())),
            format!("{store:?}"),
        ]
        .concat();
        assert!(!said.contains(SECRET), "{said}");
        assert!(said.contains("https://login.example/token"), "{said}");
    }
}
