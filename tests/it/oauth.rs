//! K2, K3, K7: tokens from an OAuth 2.0 token endpoint. Time is paused except over real connections.

use std::{
    collections::{HashMap, VecDeque},
    error::Error as _,
    future::pending,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    task::{Context, Poll},
    time::{Duration, UNIX_EPOCH},
};

use base64::{
    Engine as _,
    prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD},
};
use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header::USER_AGENT};
use http_body::Frame;
use http_body_util::{BodyExt, Full};
use secrecy::{ExposeSecret, SecretString};
use tokio::{
    sync::Notify,
    task::JoinSet,
    time::{advance, sleep},
};
use tower::{BoxError, Layer, ServiceExt, service_fn, util::BoxCloneSyncService};
use tower_http::set_header::SetRequestHeaderLayer;
use tower_selam::{
    ApiKey, AuthError, AuthErrorKind, ConfigErrorKind, PerSubject, RefreshPolicy, Refreshing, SelamLayer,
    Subject, TestClock, Token,
    oauth::{
        ClientAuth, ClientSecret, MemoryStore, OAuthError, OAuthSource, RefreshToken, RefreshTokenStore,
        SubjectTokens, TokenEndpoint, TokenType, UnansweredExchange,
    },
    simulator::{Server, Simulator, TokenFault},
    source::{FileSource, JwtSigner, Reason, SigningAlgorithm, SigningKey, Source, SourceError, source_fn},
};

use crate::{
    files::Directory,
    support::{BOTH, Body, Fed, KEY, https, jwt_claiming, key},
};

const URL: &str = "https://api.selamgpt.com/oauth/token";
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

type Client = BoxCloneSyncService<Request<Body>, Response<Body>, BoxError>;

/// A request that the endpoint received.
struct TokenRequest {
    head: http::request::Parts,
    form: Vec<(String, String)>,
}

impl TokenRequest {
    /// The form parameters, as `name=value`.
    fn form(&self) -> Vec<String> {
        self.form.iter().map(|(name, value)| format!("{name}={value}")).collect()
    }

    fn authorization(&self) -> Option<&str> {
        self.head.headers.get("authorization").map(|value| value.to_str().unwrap())
    }
}

/// An endpoint that sends scripted responses, and then tokens that live for a minute.
#[derive(Clone, Default)]
struct Scripted {
    script: Arc<Mutex<VecDeque<Response<&'static str>>>>,
    requests: Arc<Mutex<Vec<TokenRequest>>>,
}

impl Scripted {
    fn then(self, status: u16, body: &'static str) -> Self {
        let response = Response::builder().status(status).body(body).unwrap();
        self.script.lock().unwrap().push_back(response);
        self
    }

    fn client(&self) -> Client {
        let this = self.clone();
        BoxCloneSyncService::new(service_fn(move |request: Request<Body>| this.clone().respond(request)))
    }

    async fn respond(self, request: Request<Body>) -> Result<Response<Body>, BoxError> {
        let (head, body) = request.into_parts();
        let body = body.collect().await?.to_bytes();
        let form = form_urlencoded::parse(&body).into_owned().collect();
        let number = {
            let mut requests = self.requests.lock().unwrap();
            requests.push(TokenRequest { head, form });
            requests.len()
        };
        let scripted = self.script.lock().unwrap().pop_front();
        Ok(scripted.map_or_else(
            || {
                let body =
                    format!(r#"{{"access_token":"token-{number}","token_type":"Bearer","expires_in":60}}"#);
                Response::new(Full::from(body))
            },
            |response| response.map(Full::from),
        ))
    }

    fn endpoint(&self) -> TokenEndpoint {
        TokenEndpoint::new(URL, self.client()).unwrap()
    }

    fn count(&self) -> usize {
        self.requests.lock().unwrap().len()
    }

    fn last<T>(&self, read: impl FnOnce(&TokenRequest) -> T) -> T {
        read(self.requests.lock().unwrap().last().expect("a request"))
    }
}

fn endpoint(simulator: &Simulator) -> TokenEndpoint {
    TokenEndpoint::new::<_, Body, _>(URL, simulator.clone()).unwrap()
}

/// Requests tokens from the simulator as a newly registered client.
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

/// Finds the endpoint's error among the causes, as a user would.
fn cause(error: &AuthError) -> &OAuthError {
    error.source().and_then(|cause| cause.downcast_ref()).unwrap_or_else(|| panic!("{error:?}"))
}

/// Runs the tasks that are ready.
async fn settle() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

/// K3: each grant sends the parameters that its RFC defines.
#[tokio::test(start_paused = true)]
async fn each_grant_sends_its_parameters() {
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
        scripted.last(|request| {
            assert_eq!(request.form(), form);
            assert_eq!(
                (request.head.method.as_str(), request.head.uri.to_string()),
                ("POST", URL.to_owned())
            );
            assert_eq!(request.head.headers["content-type"], "application/x-www-form-urlencoded");
            assert_eq!(request.head.headers["accept"], "application/json");
            let user_agent = concat!("tower-selam/", env!("CARGO_PKG_VERSION"));
            assert_eq!(request.head.headers["user-agent"], user_agent);
            assert_eq!(request.authorization(), None);
        });
    }
}

/// K3: one authentication method per request.
#[tokio::test(start_paused = true)]
async fn client_authenticates_in_one_way() {
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
        scripted.last(|request| {
            assert_eq!(request.authorization(), authorization.as_deref());
            assert!(request.head.headers.get("authorization").is_none_or(HeaderValue::is_sensitive));
            assert_eq!(request.form()[1..], form);
        });
    }
}

/// K3: over real connections with TLS.
#[tokio::test]
async fn tokens_arrive_over_http1_and_http2() {
    let simulator = Simulator::new();
    let server = Server::tls(&simulator).await.unwrap();
    let (id, secret) = simulator.issue_client();
    let url = server.base_url().replace("/v1", "/oauth/token");
    for http in BOTH {
        for auth in [
            ClientAuth::client_secret_basic(&id, &*secret),
            ClientAuth::client_secret_post(&id, &*secret),
            Ok(ClientAuth::api_key(ApiKey::new(simulator.issue_key()).unwrap())),
        ] {
            let endpoint =
                TokenEndpoint::new(&url, https(&server, http)).unwrap().with_client_auth(auth.unwrap());
            let jwt = Refreshing::new(OAuthSource::client_credentials(endpoint)).token().await.unwrap();
            assert!(jwt.expires_at().is_some(), "{http:?}");
        }
    }
}

/// K7: an issuer's firewall answers 403 to a request without `User-Agent`; over a real connection.
#[tokio::test]
async fn user_agent_is_sent_unless_the_client_sets_one() {
    let simulator = Simulator::new();
    let server = Server::tls(&simulator).await.unwrap();
    let url = server.base_url().replace("/v1", "/oauth/token");
    let ours = concat!("tower-selam/", env!("CARGO_PKG_VERSION"));
    let theirs =
        |value: &'static str| SetRequestHeaderLayer::overriding(USER_AGENT, HeaderValue::from_static(value));
    let if_missing = SetRequestHeaderLayer::if_not_present(USER_AGENT, HeaderValue::from_static("missing/1"));
    for http in BOTH {
        let client = https(&server, http);
        let endpoint = TokenEndpoint::new(&url, client.clone()).unwrap();
        for (endpoint, expected) in [
            (endpoint.clone(), Some(ours)),
            (endpoint.clone().with_user_agent(HeaderValue::from_static("my-app/2")), Some("my-app/2")),
            (endpoint.with_user_agent(None), None),
            (TokenEndpoint::new(&url, theirs("client/3").layer(client.clone())).unwrap(), Some("client/3")),
            (
                TokenEndpoint::new(&url, if_missing.layer(client)).unwrap().with_user_agent(None),
                Some("missing/1"),
            ),
        ] {
            let auth = ClientAuth::api_key(ApiKey::new(simulator.issue_key()).unwrap());
            engine(OAuthSource::client_credentials(endpoint.with_client_auth(auth))).token().await.unwrap();
            let received = simulator.received().pop().unwrap();
            let sent: Vec<_> =
                received.headers.get_all(USER_AGENT).iter().map(|value| value.to_str().unwrap()).collect();
            assert_eq!(sent, Vec::from_iter(expected), "{http:?}");
        }
    }
}

/// K7: an error in a 200, and those that only a human can end.
#[tokio::test(start_paused = true)]
async fn errors_for_a_human_are_not_retried() {
    for (status, body, message) in [
        (
            200,
            r#"{"error":"bad_refresh_token","error_description":"It has expired."}"#,
            "200 bad_refresh_token: It has expired",
        ),
        (200, "error=invalid_grant&error_description=It+has+expired.", "200 invalid_grant: It has expired"),
        (400, r#"{"error":"interaction_required"}"#, "400 interaction_required"),
        (400, r#"{"error":"consent_required"}"#, "400 consent_required"),
        (403, r#"{"error":"access_denied"}"#, "403 access_denied"),
        (
            400,
            r#"{"code":400,"error_code":"refresh_token_not_found","msg":"Gone."}"#,
            "400 refresh_token_not_found: Gone",
        ),
    ] {
        let scripted = Scripted::default().then(status, body);
        let jwts = engine(OAuthSource::client_credentials(scripted.endpoint()));
        let error = jwts.token().await.unwrap_err();
        assert_eq!(error.kind(), AuthErrorKind::RefreshRejected, "{body}");
        assert_eq!(cause(&error).to_string(), format!("the token endpoint answered {message}"));
        advance(2 * MINUTE).await;
        assert!(jwts.token().await.is_err());
        assert_eq!(scripted.count(), 1, "{body}");
    }
    for (status, body) in [
        (200, r#"{"error":"slow_down"}"#),
        (400, r#"{"error":"temporarily_unavailable"}"#),
        (429, r#"{"error":"access_denied"}"#),
        (500, r#"{"error":"login_required"}"#),
    ] {
        let scripted = Scripted::default().then(status, body);
        let jwts = engine(OAuthSource::client_credentials(scripted.endpoint()));
        assert_eq!(jwts.token().await.unwrap_err().kind(), AuthErrorKind::RefreshFailed, "{body}");
        advance(SECOND).await;
        jwts.token().await.unwrap();
    }
}

/// Makes a signer of assertions with the secret of a client.
fn assertion_signer(secret: &str) -> JwtSigner {
    JwtSigner::new(SigningAlgorithm::Hs256, SigningKey::hmac(secret)).unwrap()
}

fn claims(jwt: &str) -> serde_json::Value {
    let claims = jwt.split('.').nth(1).unwrap();
    serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(claims).unwrap()).unwrap()
}

/// K7: RFC 7523 section 2.2, with a new JWT for each refresh; the simulator accepts each once.
#[tokio::test(start_paused = true)]
async fn client_assertion_is_new_in_each_request() {
    let simulator = Simulator::new();
    simulator.set_token_lifetime(MINUTE);
    let (id, secret) = simulator.issue_client();
    let auth = ClientAuth::private_key_jwt(&id, assertion_signer(&secret)).unwrap();
    assert_eq!(format!("{auth:?}"), format!("ClientAssertion {{ client_id: {id:?} }}"));
    let endpoint = TokenEndpoint::new::<_, Body, _>(&format!("{URL}?tenant=1"), simulator.clone()).unwrap();
    let jwts = engine(OAuthSource::client_credentials(endpoint.with_client_auth(auth)));
    for refreshes in 1..=5 {
        jwts.token().await.unwrap();
        assert_eq!(simulator.token_requests(), refreshes);
        let received = simulator.received().pop().unwrap();
        assert!(!received.headers.contains_key("authorization"));
        let form: HashMap<_, _> = form_urlencoded::parse(&received.body).into_owned().collect();
        assert_eq!(form["client_assertion_type"], "urn:ietf:params:oauth:client-assertion-type:jwt-bearer");
        assert_eq!((form["client_id"].as_str(), form.get("client_secret")), (&*id, None));
        let claims = claims(&form["client_assertion"]);
        assert_eq!([&claims["iss"], &claims["sub"], &claims["aud"]], [&*id, &*id, URL]);
        assert!(claims["exp"].is_u64() && claims["iat"].is_u64());
        advance(2 * MINUTE).await;
    }
    // One that was used before is refused, which a closure that caches its JWT notices.
    let cached =
        assertion_signer(&secret).with_claims(serde_json::json!({ "iss": id, "sub": id, "aud": URL }));
    let cached = cached.unwrap().sign().unwrap();
    let auth = ClientAuth::client_assertion(&*id, move |_| {
        let jwt = cached.clone();
        async { Ok::<_, BoxError>(jwt) }
    });
    let jwts = engine(OAuthSource::client_credentials(endpoint_of(&simulator, auth.unwrap())));
    jwts.token().await.unwrap();
    advance(2 * MINUTE).await;
    let error = jwts.token().await.unwrap_err();
    assert!(cause(&error).to_string().contains("The assertion was used before"), "{error:?}");
}

fn endpoint_of(simulator: &Simulator, auth: ClientAuth) -> TokenEndpoint {
    endpoint(simulator).with_client_auth(auth)
}

/// K7: a replay has another JWT, and another audience may be claimed.
#[tokio::test(start_paused = true)]
async fn replay_carries_a_new_assertion() {
    let scripted = Scripted::default().then(400, r#"{"error":"invalid_grant"}"#);
    let fetches = Arc::new(AtomicU64::new(0));
    let subjects = Refreshing::new(source_fn(move |_: Reason<Token>| {
        let number = fetches.fetch_add(1, SeqCst);
        async move { Ok::<_, BoxError>(Token::new(format!("subject-{number}"))?) }
    }));
    let signer = assertion_signer("a secret of at least thirty-two bytes");
    let claimed = serde_json::json!({ "aud": "https://issuer.example", "jti": "one" });
    let auth = ClientAuth::private_key_jwt("app", signer.with_claims(claimed).unwrap()).unwrap();
    let endpoint = scripted.endpoint().with_client_auth(auth);
    engine(OAuthSource::token_exchange(endpoint, &subjects, TokenType::Jwt)).token().await.unwrap();
    let requests = scripted.requests.lock().unwrap();
    let assertions: Vec<_> = requests
        .iter()
        .map(|request| claims(&request.form.iter().find(|(name, _)| name == "client_assertion").unwrap().1))
        .collect();
    assert_eq!(assertions.len(), 2);
    assert_ne!(assertions[0]["jti"], assertions[1]["jti"]);
    assert_eq!(assertions[0]["aud"], "https://issuer.example");
}

/// K7: a signature that fails is transient, unless its error says otherwise, and sends nothing.
#[tokio::test(start_paused = true)]
async fn failed_assertion_sends_nothing() {
    for permanent in [false, true] {
        let scripted = Scripted::default();
        let auth = ClientAuth::client_assertion("app", move |_| async move {
            let error = if permanent { SourceError::permanent } else { SourceError::transient };
            Err::<Token, _>(error("the key is locked"))
        });
        let endpoint = scripted.endpoint().with_client_auth(auth.unwrap());
        let error = engine(OAuthSource::client_credentials(endpoint)).token().await.unwrap_err();
        assert_eq!(error.kind() == AuthErrorKind::RefreshRejected, permanent);
        assert_eq!(
            (error.source().unwrap().to_string().as_str(), scripted.count()),
            ("the key is locked", 0)
        );
    }
}

/// K7: a secret that was rotated is fetched again when the endpoint rejects the old one.
#[tokio::test(start_paused = true)]
async fn rotated_client_secret_is_fetched_again() {
    let simulator = Simulator::new();
    let (id, secret) = simulator.issue_client();
    for method in [ClientAuth::client_secret_basic, ClientAuth::client_secret_post] {
        let present = Arc::new(Mutex::new("old secret".to_owned()));
        let secrets = Refreshing::new(source_fn({
            let present = Arc::clone(&present);
            move |_: Reason<ClientSecret>| {
                let secret = present.lock().unwrap().clone();
                async move { Ok::<_, BoxError>(ClientSecret::new(secret)?) }
            }
        }));
        secrets.prefetch().await.unwrap();
        present.lock().unwrap().clone_from(&secret);
        let before = simulator.token_requests();
        let auth = method(id.clone(), secrets).unwrap();
        engine(OAuthSource::client_credentials(endpoint_of(&simulator, auth))).token().await.unwrap();
        assert_eq!(simulator.token_requests() - before, 2);
    }
}

/// K3: plain http only to a loopback address, and only on request.
#[test]
fn endpoint_url_must_be_https() {
    let refusal = |url| TokenEndpoint::new::<_, Body, _>(url, Simulator::new()).unwrap_err();
    for (url, kind) in [
        ("http://login.example/token", ConfigErrorKind::NotHttps),
        ("http://127.0.0.1/token", ConfigErrorKind::NotHttps),
        ("https://secret@login.example/token", ConfigErrorKind::UserInfo),
        ("https://login.example/token#secret", ConfigErrorKind::UnexpectedPart),
        ("login.example", ConfigErrorKind::InvalidUrl),
        ("", ConfigErrorKind::Empty),
    ] {
        let error = refusal(url);
        assert_eq!(error.kind(), &kind, "{url}");
        assert!(
            error.to_string().starts_with("token endpoint's URL ") && !error.to_string().contains("secret")
        );
    }
    let loopback = |url| TokenEndpoint::allow_insecure_loopback::<_, Body, _>(url, Simulator::new());
    assert!(loopback("http://127.0.0.1:8080/token").is_ok());
    assert_eq!(loopback("http://localhost.evil.com/").unwrap_err().kind(), &ConfigErrorKind::NotLoopback);
    assert!(
        TokenEndpoint::new::<_, Body, _>("https://login.example/token?tenant=1", Simulator::new()).is_ok()
    );
}

/// S1: the error names the value and does not show it.
#[test]
fn invalid_secrets_are_refused_and_not_shown() {
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
    for (result, message) in cases {
        assert_eq!(result.unwrap_err().to_string(), message);
    }
    let source = OAuthSource::client_credentials(endpoint(&Simulator::new()));
    for name in ["grant_type", "client_secret", "refresh_token", "subject_token"] {
        let error = source.clone().with_parameter(name, "secret").unwrap_err();
        assert_eq!(error.to_string(), "token request parameter is set by the source itself: remove it");
    }
}

/// S1: a `SecretString` is treated like text.
#[tokio::test(start_paused = true)]
async fn secret_strings_are_accepted() {
    let secret = || SecretString::from(" s3cr3t\n");
    assert_eq!(ExposeSecret::expose_secret(&RefreshToken::new(secret()).unwrap()), "s3cr3t");

    let scripted = Scripted::default();
    let basic = format!("Basic {}", BASE64_STANDARD.encode("app:s3cr3t"));
    for (auth, authorization, form) in [
        (ClientAuth::client_secret_basic("app", secret()), Some(&*basic), vec!["password=s3cr3t"]),
        (
            ClientAuth::client_secret_post("app", secret()),
            None,
            vec!["password=s3cr3t", "client_id=app", "client_secret=s3cr3t"],
        ),
    ] {
        let endpoint = scripted.endpoint().with_client_auth(auth.unwrap());
        let source = OAuthSource::client_credentials(endpoint);
        let source = source.with_parameter("password", SecretString::from("s3cr3t")).unwrap();
        engine(source).token().await.unwrap();
        scripted.last(|request| {
            assert_eq!(request.authorization(), authorization);
            assert_eq!(request.form()[1..], form);
        });
    }
}

/// K3: RFC 6749 section 5.2, and responses that are not OAuth at all.
#[tokio::test(start_paused = true)]
async fn transient_errors_are_retried_permanent_are_not() {
    for (fault, message) in [
        (TokenFault::ServerError, "answered 500 server_error: Something went wrong"),
        (TokenFault::Unavailable, "answered 503 temporarily_unavailable: Try again later"),
        (TokenFault::Garbage, "answered 200: the response is not a JSON object with an"),
        (TokenFault::Html, "answered 200: the response is not a JSON object with an"),
        (TokenFault::Redirect("https://evil.example/".into()), "answered 307: redirects are not followed"),
    ] {
        let simulator = Simulator::new();
        let jwts = engine(service_account(&simulator));
        simulator.inject_token_fault(fault);
        let error = jwts.token().await.unwrap_err();
        assert_eq!(error.kind(), AuthErrorKind::RefreshFailed);
        assert!(cause(&error).to_string().contains(message), "{}", cause(&error));
        assert!(jwts.token().await.is_err());
        assert_eq!(simulator.token_requests(), 1, "no request during the back-off");
        advance(SECOND).await;
        jwts.token().await.unwrap();
    }
    // A truncated body, and a token that has already expired, are failures too, without an `OAuthError`.
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
    advance(4 * MINUTE).await;
    assert!(jwts.token().await.is_err());
    assert_eq!(simulator.token_requests(), 1);
}

/// K3: the source is not called before `Retry-After` has passed.
#[tokio::test(start_paused = true)]
async fn retry_after_is_honoured() {
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

/// K3: the response body is bounded in size and time.
#[tokio::test(start_paused = true)]
async fn endless_response_is_abandoned() {
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
        let message = error.source().unwrap().to_string();
        // The body of exactly 64 KiB is read, and is not JSON because its beginning is cut off.
        assert_eq!(message.contains("too long"), length > 64 * 1024, "{message}");
    }

    let (_sender, receiver) = tokio::sync::mpsc::unbounded_channel();
    let body = Arc::new(Mutex::new(Some(Fed(receiver))));
    let stalled = service_fn(move |_: Request<Body>| {
        let body = body.lock().unwrap().take().unwrap();
        async { Ok::<_, BoxError>(Response::new(body)) }
    });
    let source = OAuthSource::client_credentials(TokenEndpoint::new(URL, stalled).unwrap());
    let start = tokio::time::Instant::now();
    assert!(engine(source).token().await.is_err());
    assert_eq!(start.elapsed(), 30 * SECOND);
}

/// A body that is always ready and never sends a byte.
struct EmptyFrames;

impl http_body::Body for EmptyFrames {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        Poll::Ready(Some(Ok(Frame::data(Bytes::new()))))
    }
}

/// K3: empty frames neither block the runtime nor extend the time limit.
#[tokio::test(start_paused = true)]
async fn endless_empty_frames_are_abandoned() {
    let client = service_fn(|_: Request<Body>| async { Ok::<_, BoxError>(Response::new(EmptyFrames)) });
    let source = OAuthSource::client_credentials(TokenEndpoint::new(URL, client).unwrap());
    let policy = policy().with_timeout(2 * MINUTE);
    let call = tokio::spawn(async move { Refreshing::with_policy(source, policy).token().await });
    settle().await;
    advance(29 * SECOND).await;
    settle().await;
    assert!(!call.is_finished());
    advance(SECOND).await;
    let error = call.await.unwrap().unwrap_err();
    assert!(error.source().unwrap().to_string().contains("takes too long"), "{error:?}");
}

/// K2: 100 concurrent callers, five rotations, no token spent twice.
#[tokio::test(start_paused = true)]
async fn each_refresh_token_is_spent_once() {
    let simulator = Simulator::new();
    simulator.set_token_lifetime(MINUTE);
    let first = simulator.issue_refresh_token();
    let store = MemoryStore::new(RefreshToken::new(first.clone()).unwrap());
    let jwts = engine(OAuthSource::refresh_token(public(&simulator), store.clone()));
    for refreshes in 1..=5 {
        let mut callers = JoinSet::new();
        for _ in 0..100 {
            let jwts = jwts.clone();
            callers.spawn(async move { jwts.token().await.unwrap().id() });
        }
        let ids = callers.join_all().await;
        assert!(ids.iter().all(|id| *id == ids[0]));
        assert_eq!(simulator.token_requests(), refreshes);
        assert!(simulator.is_refresh_token_valid(store.current().expose_secret()));
        advance(2 * MINUTE).await;
    }
    assert!(!simulator.is_refresh_token_valid(&first));
    assert_eq!(simulator.reused_refresh_tokens(), 0);
}

/// K2: an endpoint may not rotate refresh tokens.
#[tokio::test(start_paused = true)]
async fn missing_refresh_token_keeps_the_old() {
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

/// K2: the response that arrives after the engine's timeout is kept for the next request.
#[tokio::test(start_paused = true)]
async fn late_response_serves_the_next_request() {
    let simulator = Simulator::new();
    let store = MemoryStore::new(RefreshToken::new(simulator.issue_refresh_token()).unwrap());
    let source = OAuthSource::refresh_token(public(&simulator), store.clone());
    let clock = TestClock::new(UNIX_EPOCH + Duration::from_secs(1_900_000_000));
    let jwts = Refreshing::with_policy(source, policy().with_timeout(5 * SECOND).with_clock(clock.clone()));
    simulator.inject_token_fault(TokenFault::Slow(20 * SECOND));
    assert_eq!(jwts.token().await.unwrap_err().kind(), AuthErrorKind::RefreshFailed);

    // While the exchange still runs, the token is not spent again.
    advance(2 * SECOND).await;
    assert!(jwts.token().await.is_err());
    assert_eq!(simulator.token_requests(), 1);

    advance(8 * SECOND).await;
    settle().await;
    assert!(simulator.is_refresh_token_valid(store.current().expose_secret()), "the rotated token is saved");
    advance(12 * SECOND).await;
    jwts.token().await.unwrap();
    assert_eq!((simulator.token_requests(), simulator.reused_refresh_tokens()), (1, 0));

    // The token aged while it was unclaimed.
    let remaining = jwts.expires_at().unwrap().duration_since(clock.now()).unwrap();
    assert_eq!(remaining, 60 * MINUTE - 12 * SECOND);
}

/// K2: an access token that expired before it was claimed is not used.
#[tokio::test(start_paused = true)]
async fn expired_unclaimed_token_is_discarded() {
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

/// K2: every caller and the engine itself are dropped during the exchange.
#[tokio::test(start_paused = true)]
async fn rotated_token_is_saved_without_callers() {
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
    assert!(!simulator.is_refresh_token_valid(&first), "the token is spent");
    drop(call);
    drop(jwts); // the last handle of the engine

    advance(2 * SECOND).await;
    settle().await;
    assert_ne!(store.current().expose_secret(), first);
    assert!(simulator.is_refresh_token_valid(store.current().expose_secret()));
}

/// K2: an exchange outlives its callers, but not for longer than two minutes.
#[tokio::test(start_paused = true)]
async fn hanging_exchange_ends_after_two_minutes() {
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
    assert_eq!(simulator.token_requests(), 1, "no token is spent for dropped callers");
    jwts.token().await.unwrap();
    assert_eq!(simulator.token_requests(), 2);
}

/// K2: a permanent failure lasts until the store's version changes.
#[tokio::test(start_paused = true)]
async fn new_login_ends_permanent_failure() {
    let simulator = Simulator::new();
    let store = MemoryStore::new(RefreshToken::new(simulator.issue_refresh_token()).unwrap());
    let jwts = engine(OAuthSource::refresh_token(public(&simulator), store.clone()));
    simulator.revoke_refresh_tokens();
    assert_eq!(jwts.token().await.unwrap_err().kind(), AuthErrorKind::RefreshRejected);
    advance(4 * MINUTE).await;
    assert!(jwts.token().await.is_err());
    assert_eq!(simulator.token_requests(), 1);

    store.replace(RefreshToken::new(simulator.issue_refresh_token()).unwrap());
    jwts.token().await.unwrap();
    assert_eq!((simulator.token_requests(), simulator.reused_refresh_tokens()), (2, 0));
}

/// K2: the new login wins over the result of the running exchange.
#[tokio::test(start_paused = true)]
async fn login_during_exchange_is_not_overwritten() {
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
    // The result of the old login is discarded, and the new token is spent at once.
    assert!(!simulator.is_refresh_token_valid(login.expose_secret()));
    assert!(simulator.is_refresh_token_valid(store.current().expose_secret()));
    assert_eq!((simulator.token_requests(), simulator.reused_refresh_tokens()), (2, 0));
    simulator.revoke_refresh_tokens();
    store.replace(RefreshToken::new(simulator.issue_refresh_token()).unwrap());
    advance(2 * MINUTE).await;
    jwts.token().await.unwrap();
}

/// A store that fails or blocks on demand.
#[derive(Clone, Default)]
struct TestStore {
    token: Arc<Mutex<Option<RefreshToken>>>,
    unreadable: Arc<AtomicBool>,
    broken: Arc<AtomicBool>,
    version: Arc<AtomicU64>,
    loads: Arc<AtomicU64>,
    saving: Option<Arc<Notify>>,
}

impl TestStore {
    fn put(&self, token: &str) {
        *self.token.lock().unwrap() = Some(RefreshToken::new(token).unwrap());
    }

    fn holds(&self) -> String {
        self.token.lock().unwrap().as_ref().unwrap().expose_secret().to_owned()
    }
}

impl RefreshTokenStore for TestStore {
    async fn load(&self) -> Result<Option<RefreshToken>, BoxError> {
        self.loads.fetch_add(1, SeqCst);
        if self.unreadable.load(SeqCst) {
            return Err("the disk is gone".into());
        }
        Ok(self.token.lock().unwrap().clone())
    }

    async fn save(&self, token: &RefreshToken, _: &RefreshToken) -> Result<(), BoxError> {
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

/// K2: the rotated token stays usable when `save` fails.
#[tokio::test(start_paused = true)]
async fn failing_store_loses_nothing_in_memory() {
    let simulator = Simulator::new();
    simulator.set_token_lifetime(MINUTE);
    let store = TestStore::default();
    store.put(&simulator.issue_refresh_token());
    let jwts = engine(OAuthSource::refresh_token(public(&simulator), store.clone()));
    jwts.token().await.unwrap();
    settle().await;
    let saved = store.holds();

    store.broken.store(true, SeqCst);
    for _ in 0..3 {
        advance(2 * MINUTE).await;
        jwts.token().await.unwrap();
        settle().await;
        assert_eq!(store.holds(), saved);
    }
    // Without a further exchange.
    store.broken.store(false, SeqCst);
    advance(2 * MINUTE).await;
    settle().await;
    assert!(simulator.is_refresh_token_valid(&store.holds()), "the newest is saved");
    assert_eq!((simulator.token_requests(), simulator.reused_refresh_tokens()), (4, 0));
}

/// K2: the event names the error and masks the token in it.
///
/// Runs in a separate process because `tracing` caches process-wide whether a subscriber is interested.
#[cfg(feature = "tracing")]
#[test]
fn failed_save_raises_a_redacted_event() {
    use crate::environment::{CASE, run, tell};

    const NAME: &str = "oauth::failed_save_raises_a_redacted_event";
    if std::env::var(CASE).is_err() {
        let events = run(NAME, "the event", &[]);
        assert!(events.contains("refresh token not saved"), "{events}");
        assert!(events.contains("no room for [redacted]") && events.contains("tower_selam"), "{events}");
        return;
    }
    let log = crate::secrets::Log::default();
    let _guard = tracing::subscriber::set_default(log.clone());
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let simulator = Simulator::new();
        let store = TestStore::default();
        store.put(&simulator.issue_refresh_token());
        let jwts = engine(OAuthSource::refresh_token(public(&simulator), store.clone()));
        simulator.inject_token_fault(TokenFault::Slow(SECOND));
        let call = tokio::spawn({
            let jwts = jwts.clone();
            async move { jwts.token().await }
        });
        settle().await;
        store.broken.store(true, SeqCst);
        call.await.unwrap().unwrap();
        settle().await;
    });
    tell(&log.text().replace('\n', " "));
}

/// F5: a source that is called directly, without a runtime or without its timers, returns an error.
#[test]
fn fetching_without_timers_is_an_error() {
    let simulator = Simulator::new();
    let store = MemoryStore::new(RefreshToken::new(simulator.issue_refresh_token()).unwrap());
    for source in [
        OAuthSource::client_credentials(public(&simulator)),
        OAuthSource::refresh_token(public(&simulator), store.clone()),
    ] {
        let fetch = || source.fetch(Reason::First);
        let without_timers = tokio::runtime::Builder::new_current_thread().build().unwrap();
        for fetched in [
            tokio_test::task::spawn(fetch()).poll(),
            without_timers.block_on(async { Poll::Ready(fetch().await) }),
        ] {
            let Poll::Ready(Err(error)) = fetched else { panic!("{fetched:?}") };
            assert_eq!(error.to_string(), "a refresh needs a tokio runtime with its timers enabled");
            assert!(!error.is_permanent());
        }
    }
    assert_eq!(simulator.token_requests(), 0);
}

/// K6: a request waits for `save`, but not longer than 5 seconds; the next exchange waits until it ends.
#[tokio::test(start_paused = true)]
async fn access_token_waits_for_the_store() {
    let simulator = Simulator::new();
    simulator.set_token_lifetime(MINUTE);
    let saving = Arc::new(Notify::new());
    let store = TestStore { saving: Some(Arc::clone(&saving)), ..TestStore::default() };
    store.put(&simulator.issue_refresh_token());
    let jwts = engine(OAuthSource::refresh_token(public(&simulator), store.clone()));
    let mut first = tokio_test::task::spawn(jwts.token());
    assert!(first.poll().is_pending());
    advance(4 * SECOND).await;
    settle().await;
    assert!(first.poll().is_pending(), "the refresh token is not saved yet");
    saving.notify_one();
    settle().await;
    assert!(first.poll().is_ready());
    assert!(simulator.is_refresh_token_valid(&store.holds()));

    advance(61 * SECOND).await;
    let start = tokio::time::Instant::now();
    jwts.token().await.unwrap();
    assert_eq!(start.elapsed(), 5 * SECOND);
    advance(61 * SECOND).await;
    let mut third = tokio_test::task::spawn(jwts.token());
    assert!(third.poll().is_pending());
    settle().await;
    assert_eq!(simulator.token_requests(), 2, "the exchange waits for the store");
    saving.notify_one();
    settle().await;
    assert_eq!((simulator.token_requests(), simulator.reused_refresh_tokens()), (3, 0));
    saving.notify_one();
    settle().await;
    assert!(third.poll().is_ready());
}

/// K5: the store is read before each exchange, and again after `invalid_grant`.
#[tokio::test(start_paused = true)]
async fn token_from_another_program_is_used() {
    let simulator = Simulator::new();
    simulator.set_token_lifetime(MINUTE);
    let store = TestStore::default();
    store.put(&simulator.issue_refresh_token());
    let jwts = engine(OAuthSource::refresh_token(public(&simulator), store.clone()));
    jwts.token().await.unwrap();

    simulator.revoke_refresh_tokens();
    store.put(&simulator.issue_refresh_token());
    advance(2 * MINUTE).await;
    jwts.token().await.unwrap();
    assert!(simulator.is_refresh_token_valid(&store.holds()));
    assert_eq!(simulator.token_requests(), 2, "the revoked token is not sent");

    // The other program saves its token two seconds after ours is rejected.
    simulator.revoke_refresh_tokens();
    let next = simulator.issue_refresh_token();
    tokio::spawn({
        let store = store.clone();
        async move {
            sleep(2 * MINUTE + 2 * SECOND).await;
            store.put(&next);
        }
    });
    settle().await;
    advance(2 * MINUTE).await;
    jwts.token().await.unwrap();
    assert_eq!((simulator.token_requests(), simulator.reused_refresh_tokens()), (4, 0));
}

/// K2: an empty store is a permanent failure, an unreadable one a transient failure.
#[tokio::test(start_paused = true)]
async fn missing_login_fails_until_stored() {
    let simulator = Simulator::new();
    let store = TestStore::default();
    let jwts = engine(OAuthSource::refresh_token(public(&simulator), store.clone()));
    let error = jwts.token().await.unwrap_err();
    assert_eq!(error.kind(), AuthErrorKind::RefreshRejected);
    assert_eq!(error.source().unwrap().to_string(), "there is no refresh token: log in");
    advance(MINUTE).await;
    assert!(jwts.token().await.is_err());
    assert_eq!(store.loads.load(SeqCst), 1);

    store.put(&simulator.issue_refresh_token());
    store.version.store(1, SeqCst);
    jwts.token().await.unwrap();

    // An unreadable store is read again.
    let store = TestStore { unreadable: Arc::new(AtomicBool::new(true)), ..TestStore::default() };
    let jwts = engine(OAuthSource::refresh_token(public(&simulator), store.clone()));
    assert_eq!(jwts.token().await.unwrap_err().kind(), AuthErrorKind::RefreshFailed);
    store.put(&simulator.issue_refresh_token());
    store.unreadable.store(false, SeqCst);
    advance(SECOND).await;
    jwts.token().await.unwrap();
}

/// J6: the endpoint rejects the old key, and the source supplies the new one.
#[tokio::test(start_paused = true)]
async fn rotated_api_key_is_fetched_again() {
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

/// W2: a rejected key is sent once, until its source has another.
#[tokio::test(start_paused = true)]
async fn rejected_key_is_not_resent_until_changed() {
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
    keys.rejected(&keys.current().unwrap());
    settle().await;
    jwts.token().await.unwrap();
    assert_eq!(simulator.token_requests(), 2);
}

/// K3: a rejected subject token is refreshed and sent once more; a fixed one is sent once.
#[tokio::test(start_paused = true)]
async fn rejected_subject_token_is_refreshed_once() {
    for refusal in [r#"{"error":"invalid_grant"}"#, r#"{"error":"invalid_request"}"#] {
        let scripted = Scripted::default().then(400, refusal);
        let fetches = Arc::new(AtomicU64::new(0));
        let subjects = Refreshing::new(source_fn({
            let fetches = Arc::clone(&fetches);
            move |_: Reason<Token>| {
                let number = fetches.fetch_add(1, SeqCst);
                async move { Ok::<_, BoxError>(Token::new(format!("subject-{number}"))?) }
            }
        }));
        let source = OAuthSource::token_exchange(scripted.endpoint(), &subjects, TokenType::AccessToken);
        engine(source).token().await.unwrap();
        assert_eq!((scripted.count(), fetches.load(SeqCst)), (2, 2));
        scripted.last(|request| assert!(request.form().contains(&"subject_token=subject-1".to_owned())));
    }
    // A fixed token cannot be refreshed, so it is sent once.
    let scripted = Scripted::default().then(400, r#"{"error":"invalid_grant"}"#);
    let source = OAuthSource::token_exchange(scripted.endpoint(), token("sub"), TokenType::AccessToken);
    assert_eq!(engine(source).token().await.unwrap_err().kind(), AuthErrorKind::RefreshRejected);
    assert_eq!(scripted.count(), 1);
}

/// F7: the token client sends through the layer that waits for the token.
#[tokio::test(start_paused = true)]
async fn reentrant_token_client_fails_at_once() {
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
        let start = tokio::time::Instant::now();
        let error = jwts.token().await.unwrap_err();
        assert!(format!("{error:?}").contains("waits for the credential itself"), "{error:?}");
        assert_eq!((start.elapsed(), simulator.requests()), (Duration::ZERO, 0));
    }
}

/// F5: a panic is a typed error, and the next exchange works.
#[tokio::test(start_paused = true)]
async fn panicking_client_or_store_fails_one_exchange() {
    /// Panics in `load` unless the flag is set, and never completes `save`.
    struct PanickingStore(AtomicBool);
    impl RefreshTokenStore for PanickingStore {
        async fn load(&self) -> Result<Option<RefreshToken>, BoxError> {
            assert!(self.0.load(SeqCst), "the store panics");
            Ok(Some(RefreshToken::new("refresh")?))
        }

        async fn save(&self, _: &RefreshToken, _: &RefreshToken) -> Result<(), BoxError> {
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
                scripted.respond(request).await
            }
        })
    };
    let store = PanickingStore(AtomicBool::new(true));
    let jwts = engine(OAuthSource::refresh_token(TokenEndpoint::new(URL, client).unwrap(), store));
    let error = jwts.token().await.unwrap_err();
    let cause = error.source().unwrap();
    assert!(cause.is::<UnansweredExchange>(), "the client may have sent the token: {error:?}");
    assert!(cause.source().unwrap().to_string().contains("panicked"), "{error:?}");
    panics.store(false, SeqCst);
    advance(SECOND).await;
    jwts.token().await.unwrap();

    let store = PanickingStore(AtomicBool::new(false));
    let jwts = engine(OAuthSource::refresh_token(scripted.endpoint(), store));
    assert_eq!(jwts.token().await.unwrap_err().kind(), AuthErrorKind::RefreshFailed);
}

/// W2, K1: a key file that is corrected after a rejection.
#[tokio::test(start_paused = true)]
async fn corrected_key_file_is_read_again() {
    let simulator = Simulator::new();
    let directory = Directory::new();
    std::fs::write(directory.file(), "sk-selam-wrong").unwrap();
    let keys: Refreshing<ApiKey> = Refreshing::new(FileSource::new(directory.file()));
    let auth = ClientAuth::api_key(&keys);
    let jwts = engine(OAuthSource::client_credentials(endpoint(&simulator).with_client_auth(auth)));
    // The set-up that `SELAM_API_KEY_FILE` and `SELAM_TOKEN_URL` produce.
    let layer = SelamLayer::builder().with_api_key(&keys).with_jwt(&jwts).build().unwrap();
    let selam = layer.layer(simulator.clone());
    let request = || Request::get("https://api.selamgpt.com/v1/models").body(Body::default()).unwrap();
    let error = selam.clone().oneshot(request()).await.unwrap_err();
    assert_eq!(error.auth().unwrap().kind(), AuthErrorKind::RefreshRejected);

    std::fs::write(directory.file(), simulator.issue_key()).unwrap();
    let mut attempts = 0;
    while let Err(error) = selam.clone().oneshot(request()).await {
        attempts += 1;
        assert!(attempts < 10, "{error:?}");
        sleep(SECOND / 2).await;
    }
    assert_eq!(simulator.token_requests(), 2);
}

/// K2: the access token next to it is unusable.
#[tokio::test(start_paused = true)]
async fn refresh_token_of_unusable_response_is_kept() {
    let scripted =
        Scripted::default().then(200, r#"{"access_token":"a.b","expires_in":60,"refresh_token":"second"}"#);
    let store = MemoryStore::new(RefreshToken::new("first").unwrap());
    let jwts = engine(OAuthSource::refresh_token(scripted.endpoint(), store.clone()));
    let _ = jwts.token().await;
    settle().await;
    advance(MINUTE).await;
    let _ = jwts.token().await;
    scripted.last(|request| {
        assert!(request.form().contains(&"refresh_token=second".to_owned()), "{:?}", request.form())
    });
}

/// K2: the store returns a token that this source has spent.
#[tokio::test(start_paused = true)]
async fn spent_token_in_store_is_not_reused() {
    let scripted = Scripted::default()
        .then(200, r#"{"access_token":"t1","token_type":"Bearer","expires_in":60,"refresh_token":"second"}"#)
        .then(400, r#"{"error":"invalid_grant"}"#);
    let store = TestStore::default();
    store.put("first");
    let jwts = engine(OAuthSource::refresh_token(scripted.endpoint(), store.clone()));
    jwts.token().await.unwrap();
    // As if the store had failed to save "second": it still holds "first".
    store.put("first");
    advance(2 * MINUTE).await;
    let _ = jwts.token().await;
    let spent: Vec<_> =
        scripted.requests.lock().unwrap().iter().map(|request| request.form()[1].clone()).collect();
    assert_eq!(spent.iter().filter(|token| *token == "refresh_token=first").count(), 1, "{spent:?}");
}

/// K2: an unclaimed access token belongs to the login it was fetched for.
#[tokio::test(start_paused = true)]
async fn old_login_result_is_not_reused() {
    let simulator = Simulator::new();
    simulator.set_token_lifetime(10 * MINUTE);
    let store = MemoryStore::new(RefreshToken::new(simulator.issue_refresh_token()).unwrap());
    let jwts = engine(OAuthSource::refresh_token(public(&simulator), store.clone()));
    simulator.inject_token_fault(TokenFault::Slow(40 * SECOND));
    assert!(jwts.token().await.is_err(), "timeout");
    advance(15 * SECOND).await;
    settle().await;
    let before = simulator.token_requests();
    // Another user logs in.
    let login = RefreshToken::new(simulator.issue_refresh_token()).unwrap();
    store.replace(login.clone());
    jwts.token().await.unwrap();
    assert_eq!(simulator.token_requests(), before + 1, "the token of the old login is not used");
    assert!(!simulator.is_refresh_token_valid(login.expose_secret()));
}

/// S2: the endpoint echoes the `Authorization` header.
#[tokio::test(start_paused = true)]
async fn echoed_basic_header_is_masked() {
    let basic = BASE64_STANDARD.encode("my-service:s3cr3t-canary");
    let body: &'static str = Box::leak(
        format!(r#"{{"error":"invalid_client","error_description":"not understood: Basic {basic}"}}"#)
            .into_boxed_str(),
    );
    let scripted = Scripted::default().then(401, body);
    let auth = ClientAuth::client_secret_basic("my-service", "s3cr3t-canary").unwrap();
    let jwts = engine(OAuthSource::client_credentials(scripted.endpoint().with_client_auth(auth)));
    let error = jwts.token().await.unwrap_err();
    let message = format!("{} {:?} {}", error, error, cause(&error));
    assert!(!message.contains(&basic), "{message}");
}

/// S2: the endpoint echoes a form-encoded secret.
#[tokio::test(start_paused = true)]
async fn echoed_form_value_is_masked() {
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
    let message = format!("{} {:?} {}", error, error, cause(&error));
    assert!(!message.contains(&encoded), "{message}");
}

/// S2: the endpoint echoes the value of an extra parameter.
#[tokio::test(start_paused = true)]
async fn echoed_parameter_is_masked() {
    let scripted = Scripted::default()
        .then(400, r#"{"error":"invalid_request","error_description":"wrong password hunter2-canary"}"#);
    let jwts = engine(
        OAuthSource::client_credentials(scripted.endpoint())
            .with_parameter("password", "hunter2-canary")
            .unwrap(),
    );
    let error = jwts.token().await.unwrap_err();
    let message = format!("{} {:?} {}", error, error, cause(&error));
    assert!(!message.contains("hunter2-canary"), "{message}");
}

/// S2: `Debug` of the source, its endpoint and its store.
#[test]
fn debug_output_contains_no_secret() {
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
        let message = [
            shown(&OAuthSource::client_credentials(endpoint.clone()).with_parameter("p", SECRET).unwrap()),
            shown(&OAuthSource::token_exchange(endpoint.clone(), token(SECRET), TokenType::Jwt)),
            shown(&OAuthSource::refresh_token(endpoint, store.clone())),
            format!("{store:?}"),
        ]
        .concat();
        assert!(!message.contains(SECRET), "{message}");
        assert!(message.contains("https://login.example/token"), "{message}");
    }
}

/// H5, K3: each subject's own latest token is exchanged, and no other.
#[tokio::test(start_paused = true)]
async fn the_latest_token_of_each_subject_is_exchanged() {
    let (scripted, tokens) = (Scripted::default(), SubjectTokens::new());
    let (exchanged, endpoint) = (tokens.clone(), scripted.endpoint());
    let jwts = PerSubject::new(move |subject| exchanged.exchange(endpoint.clone(), subject, TokenType::Jwt));
    let [ada, bo] = ["ada", "bo"].map(Subject::new);
    let fetch = async |subject: &Subject| jwts.of_subject(subject).token().await;
    let exchanged = || {
        let form = scripted.last(TokenRequest::form);
        form.iter().find_map(|field| Some(field.strip_prefix("subject_token=")?.to_owned())).unwrap()
    };

    // One who has presented nothing gets nothing, whatever others have presented.
    tokens.present(&bo, &token("of-bo"));
    assert_eq!(fetch(&ada).await.unwrap_err().kind(), AuthErrorKind::RefreshFailed);
    assert_eq!(scripted.count(), 0);
    fetch(&bo).await.unwrap();
    assert_eq!(exchanged(), "of-bo");

    // The latest token is taken when a refresh is due.
    tokens.present(&ada, &token("of-ada-1"));
    advance(2 * SECOND).await;
    fetch(&ada).await.unwrap();
    assert_eq!(exchanged(), "of-ada-1");
    tokens.present(&ada, &token("of-ada-2"));
    fetch(&ada).await.unwrap();
    assert_eq!(scripted.count(), 2);
    advance(MINUTE).await;
    fetch(&ada).await.unwrap();
    assert_eq!((exchanged().as_str(), scripted.count()), ("of-ada-2", 3));

    // An expired one is not sent. A newer one helps at once.
    tokens.present(&ada, &jwt_claiming(r#"{"exp":1}"#));
    advance(MINUTE).await;
    for _ in 0..2 {
        assert_eq!(fetch(&ada).await.unwrap_err().kind(), AuthErrorKind::RefreshRejected);
    }
    assert_eq!(scripted.count(), 3);
    tokens.present(&ada, &token("of-ada-3"));
    fetch(&ada).await.unwrap();
    assert_eq!(exchanged(), "of-ada-3");

    // So it does after the endpoint has refused one, for which nobody else suffers.
    advance(MINUTE).await;
    let scripted = scripted.then(400, r#"{"error":"invalid_grant"}"#);
    assert_eq!(fetch(&ada).await.unwrap_err().kind(), AuthErrorKind::RefreshRejected);
    let count = scripted.count();
    assert_eq!(fetch(&ada).await.unwrap_err().kind(), AuthErrorKind::RefreshRejected);
    assert_eq!(scripted.count(), count);
    fetch(&bo).await.unwrap();
    tokens.present(&ada, &token("of-ada-4"));
    fetch(&ada).await.unwrap();
    assert_eq!(
        scripted.last(TokenRequest::form).iter().filter(|field| field.contains("of-ada-4")).count(),
        1
    );

    // Forgotten after a logout.
    tokens.forget(&ada);
    assert!(jwts.forget(&ada));
    assert_eq!(fetch(&ada).await.unwrap_err().kind(), AuthErrorKind::RefreshFailed);
}
