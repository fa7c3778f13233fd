//! The app's login: users call with their JWTs, in the place of client tokens. The last test has a real OpenID Connect issuer, from npm.

use std::{
    collections::HashMap,
    net::Ipv4Addr,
    process::Stdio,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use bytes::Bytes;
use futures_util::SinkExt;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::{
    client::legacy::Client,
    rt::{TokioExecutor, TokioIo},
};
use ring::{
    rand::SystemRandom,
    signature::{Ed25519KeyPair, KeyPair},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::TcpListener,
    process::Command,
    task::JoinHandle,
};
use tokio_tungstenite::tungstenite::Message;
use tower_selam::simulator::{Server, Simulator};

use crate::{
    support::{
        Caller, Launch, Protocol, Scratch, eventually,
        npm::{install, skip},
        random, secret, with_timeout,
    },
    voice::{CONNECT, EVENT, Poller, handshake, next, path, socket},
};

const AUDIENCE: &str = "my-app";

/// A signing key, with its `kid`.
struct Key {
    pair: Ed25519KeyPair,
    kid: String,
}

impl Key {
    fn new() -> Self {
        let seed = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        Self { pair: Ed25519KeyPair::from_pkcs8(seed.as_ref()).unwrap(), kid: random() }
    }

    fn jwt(&self, claims: &Value) -> String {
        let header = json!({"alg": "EdDSA", "kid": self.kid, "typ": "JWT"});
        let [header, claims] = [&header, claims].map(|part| BASE64_URL_SAFE_NO_PAD.encode(part.to_string()));
        let message = format!("{header}.{claims}");
        let signature = BASE64_URL_SAFE_NO_PAD.encode(self.pair.sign(message.as_bytes()));
        secret(format!("{message}.{signature}"))
    }

    fn set(&self) -> String {
        let x = BASE64_URL_SAFE_NO_PAD.encode(self.pair.public_key());
        json!({"keys": [{"kty": "OKP", "crv": "Ed25519", "kid": self.kid, "x": x, "use": "sig"}]}).to_string()
    }
}

#[expect(clippy::disallowed_methods, reason = "the proxy reads the real time")]
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// The JWT of a user, with further claims; `null` removes one.
fn claims(issuer: &str, user: &str, further: &Value) -> Value {
    let mut claims = json!({"iss": issuer, "aud": AUDIENCE, "sub": user, "exp": now() + 600});
    for (name, value) in further.as_object().unwrap() {
        claims[name] = value.clone();
    }
    claims.as_object_mut().unwrap().retain(|_, value| !value.is_null());
    claims
}

/// A user's name, which no output may show.
pub(crate) fn user(name: &str) -> String {
    secret(format!("{name}-{}@app.example", random()))
}

/// An issuer on a loopback port.
pub(crate) struct Issuer {
    url: String,
    key: Key,
    set: Arc<Mutex<String>>,
    is_down: Arc<AtomicBool>,
    fetched: Arc<AtomicU64>,
    serving: JoinHandle<()>,
}

impl Issuer {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let (url, key) = (format!("http://{}", listener.local_addr().unwrap()), Key::new());
        let (is_down, fetched) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let document = json!({"issuer": url, "jwks_uri": format!("{url}/keys")}).to_string();
        let set = Arc::new(Mutex::new(key.set()));
        let (down, count, published) = (is_down.clone(), fetched.clone(), set.clone());
        let serving = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (down, count, set, document) =
                    (down.clone(), count.clone(), published.clone(), document.clone());
                let service = service_fn(move |request: Request<Incoming>| {
                    let response = match request.uri().path() {
                        _ if down.load(Ordering::SeqCst) => {
                            Response::builder().status(503).body(String::new())
                        }
                        "/.well-known/openid-configuration" => Response::builder().body(document.clone()),
                        _ => {
                            count.fetch_add(1, Ordering::SeqCst);
                            let set = set.lock().unwrap().clone();
                            Response::builder().header("cache-control", "max-age=600").body(set)
                        }
                    };
                    async move { response }
                });
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
        Self { url, key, set, is_down, fetched, serving }
    }

    pub(crate) fn jwt(&self, user: &str, further: &Value) -> String {
        self.key.jwt(&claims(&self.url, user, further))
    }

    fn rotate(&mut self) {
        self.key = Key::new();
        *self.set.lock().unwrap() = self.key.set();
    }
}

impl Drop for Issuer {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn api() -> (Simulator, Server, Launch) {
    let simulator = Simulator::new();
    simulator.set_rate_limit(1_000_000);
    let api = Server::tls(&simulator).await.unwrap();
    let launch = Launch::for_api(&api).env("SELAM_API_KEY", secret(simulator.issue_key()));
    (simulator, api, launch)
}

/// With the login of this issuer.
fn with_issuer(launch: Launch, issuer: &str) -> Launch {
    launch.args(["--allow-insecure-loopback", "--jwt-issuer", issuer, "--jwt-audience", AUDIENCE])
}

#[tokio::test]
async fn jwts_are_accepted_wherever_client_tokens_are() {
    let (simulator, _api, launch) = api().await;
    let issuer = Issuer::start().await;
    let token = secret(format!("caller-{}", random()));
    let proxy = with_issuer(launch, &issuer.url).callers(&format!("web:{token}\n")).start().await;
    let jwt = issuer.jwt(&user("ada"), &json!({}));
    let encoded = secret(BASE64_URL_SAFE_NO_PAD.encode(&jwt));
    for protocol in Protocol::BOTH {
        let caller = Caller::new(&proxy, protocol);
        for (name, value) in [
            ("authorization", format!("Bearer {jwt}")),
            ("authorization", format!("bearer  {jwt}")),
            ("authorization", format!("Bearer {token}")),
            ("x-api-key", jwt.clone()),
            ("api-key", jwt.clone()),
            ("sec-websocket-protocol", format!("realtime, openai-insecure-api-key.{jwt}")),
            ("sec-websocket-protocol", format!("bearer.{jwt}")),
            ("sec-websocket-protocol", format!("base64url.bearer.{encoded}")),
            ("sec-websocket-protocol", format!("realtime, {jwt}")),
        ] {
            assert_eq!(caller.chat_with(&[(name, &*value)]).await.status, 200, "{name}");
        }
        let two = [("authorization", "Bearer sk-my-own"), ("x-api-key", &*jwt)];
        assert_eq!(caller.chat_with(&two).await.status, 200);
        // Nor is a JWT in the query accepted.
        let answer = caller.get(&format!("/v1/models?token={jwt}&access_token={jwt}")).await;
        answer.assert_error(401, "authentication_error", "missing_api_key");
        assert_eq!(caller.clone().with_token(&jwt).get("/metrics").await.status, 200);
    }
    assert_eq!(issuer.fetched.load(Ordering::SeqCst), 1);
    for received in simulator.received() {
        assert!(!format!("{:?}", received.headers).contains(&jwt));
        assert!(!received.headers.contains_key("x-api-key"));
    }
}

/// V1
#[tokio::test]
async fn invalid_jwts_are_refused_with_a_reason() {
    let (simulator, _api, launch) = api().await;
    let issuer = Issuer::start().await;
    let proxy = with_issuer(launch, &issuer.url).args(["--jwt-require", "plan=pro"]).start().await;
    let (name, caller) = (user("bo"), Caller::http1(&proxy));
    let jwt = |further: Value| issuer.jwt(&name, &further);
    let forged = Key::new().jwt(&claims(&issuer.url, &name, &json!({"plan": "pro"})));
    let stranger = Key { kid: issuer.key.kid.clone(), ..Key::new() };
    let invalid = "Bearer error=\"invalid_token\"";
    let expired = "Bearer error=\"invalid_token\", error_description=\"The access token expired\"";
    for (token, status, code, challenge) in [
        (jwt(json!({"exp": now() - 90})), 401, "token_expired", expired),
        (jwt(json!({"exp": null})), 401, "invalid_token", invalid),
        (jwt(json!({"aud": "another-app"})), 401, "invalid_token", invalid),
        (jwt(json!({"iss": "https://evil.example"})), 401, "invalid_token", invalid),
        (jwt(json!({"nbf": now() + 90})), 401, "invalid_token", invalid),
        (forged, 401, "invalid_token", invalid),
        (stranger.jwt(&claims(&issuer.url, &name, &json!({}))), 401, "invalid_token", invalid),
        (
            jwt(json!({"plan": "free"})),
            403,
            "insufficient_permissions",
            "Bearer error=\"insufficient_scope\"",
        ),
        (
            jwt(json!({"plan": "pro", "sub": null})),
            403,
            "insufficient_permissions",
            "Bearer error=\"insufficient_scope\"",
        ),
        ("not-a-jwt".to_owned(), 401, "invalid_token", invalid),
    ] {
        let answer = caller.clone().with_token(&token).chat().await;
        let kind = if status == 401 { "authentication_error" } else { "authorization_error" };
        answer.assert_error(status, kind, code);
        assert_eq!(answer.headers["www-authenticate"], challenge);
    }
    let answer = caller.chat().await;
    answer.assert_error(401, "authentication_error", "missing_api_key");
    assert_eq!(answer.headers["www-authenticate"], "Bearer");
    assert_eq!(simulator.requests(), 0);
    assert_eq!(caller.clone().with_token(&jwt(json!({"plan": ["free", "pro"]}))).chat().await.status, 200);
    proxy.logs("the JWT's `aud` is another audience").await;
}

/// V3
#[tokio::test]
async fn the_proxy_starts_while_the_issuer_is_down() {
    let (simulator, _api, launch) = api().await;
    let issuer = Issuer::start().await;
    issuer.is_down.store(true, Ordering::SeqCst);
    let token = secret(format!("caller-{}", random()));
    let proxy = with_issuer(launch, &issuer.url).callers(&format!("web:{token}\n")).start().await;
    let caller = Caller::http1(&proxy).with_token(&issuer.jwt(&user("cy"), &json!({})));
    let answer = caller.chat().await;
    answer.assert_error(503, "api_error", "identity_unavailable");
    let wait: u64 = answer.headers["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=60).contains(&wait));
    // What needs no keys is decided.
    let late = issuer.jwt(&user("cy"), &json!({"exp": now() - 90}));
    let answer = Caller::http1(&proxy).with_token(&late).chat().await;
    answer.assert_error(401, "authentication_error", "token_expired");
    assert_eq!(Caller::http1(&proxy).with_token(&token).chat().await.status, 200);
    assert_eq!(simulator.requests(), 1);
    proxy.logs("answered 503").await;
    issuer.is_down.store(false, Ordering::SeqCst);
    eventually("the keys are there", async || (caller.chat().await.status == 200).then_some(())).await;
    // Known keys survive the issuer.
    issuer.is_down.store(true, Ordering::SeqCst);
    assert_eq!(caller.chat().await.status, 200);
}

#[tokio::test]
async fn users_are_counted_by_group_and_logged_by_hash() {
    let (_simulator, _api, launch) = api().await;
    let issuer = Issuer::start().await;
    let proxy = with_issuer(launch, &issuer.url).args(["--jwt-group-claim", "plan"]).start().await;
    let caller = Caller::http1(&proxy);
    let name = user("di");
    for plan in [json!("pro"), json!(["pro", "beta"]), json!(null)] {
        let jwt = issuer.jwt(&name, &json!({ "plan": plan }));
        assert_eq!(caller.clone().with_token(&jwt).chat().await.status, 200);
    }
    for number in 0..120 {
        let jwt = issuer.jwt(&user("many"), &json!({"plan": format!("plan-{number}")}));
        assert_eq!(caller.clone().with_token(&jwt).chat().await.status, 200);
    }
    let jwt = issuer.jwt(&name, &json!({"plan": "pro"}));
    let metrics = caller.with_token(&jwt).get("/metrics").await;
    let count = |group: &str| {
        let line = format!("selam_proxy_requests_total{{status=\"2xx\",by=\"api\",caller=\"jwt:{group}\"}} ");
        let value = metrics.text().lines().find_map(|found| found.strip_prefix(&line)?.parse::<u64>().ok());
        value.unwrap_or(0)
    };
    assert_eq!((count("pro"), count("none"), count("plan-0"), count("other")), (2, 1, 1, 22));
    // `sha256sum` of the length of the issuer, a colon, the issuer and the user.
    let digest = ring::digest::digest(
        &ring::digest::SHA256,
        format!("{}:{}{name}", issuer.url.len(), issuer.url).as_bytes(),
    );
    let hash: String = digest.as_ref()[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    let line = proxy.logs(&hash).await;
    assert!(line.contains("caller=\"jwt:pro\"") && line.contains(&format!("user=\"{hash}\"")), "{line}");
}

#[tokio::test]
async fn users_are_logged_plainly_or_not_at_all() {
    let issuer = Issuer::start().await;
    for (how, field) in [("plain", "user=\"eve-of-the-log\""), ("off", "caller=\"jwt:http://")] {
        let (_simulator, _api, launch) = api().await;
        let launch = launch.env("SELAM_PROXY_LOG_CALLERS", how);
        let proxy = with_issuer(launch, &issuer.url).start().await;
        let jwt = issuer.jwt("eve-of-the-log", &json!({}));
        assert_eq!(Caller::http1(&proxy).with_token(&jwt).chat().await.status, 200);
        let line = proxy.logs(field).await;
        assert_eq!(line.contains("user="), how == "plain", "{line}");
    }
}

#[tokio::test]
async fn keys_in_a_file_are_read_again() {
    let (_simulator, _api, launch) = api().await;
    let (old, new) = (Key::new(), Key::new());
    let path = launch.scratch().write("keys", old.set());
    // Without an issuer, whoever has the key may name any.
    let launch = launch.arg("--jwks").arg(path).env("SELAM_PROXY_JWT_AUDIENCE", "x,my-app");
    let proxy = launch.start().await;
    let status = async |key: &Key| {
        let jwt = key.jwt(&claims("anybody", &user("fo"), &json!({})));
        Caller::http1(&proxy).with_token(&jwt).chat().await.status.as_u16()
    };
    assert_eq!(status(&old).await, 200);
    proxy.scratch().write("keys", new.set());
    eventually("the new key is read", async || (status(&new).await == 200).then_some(())).await;
    eventually("the old key is refused", async || (status(&old).await == 401).then_some(())).await;
}

#[tokio::test]
async fn an_invalid_login_is_named() {
    let with_key = || Launch::new().env("SELAM_API_KEY", secret(format!("sk-selam-{}", random())));
    for (arguments, expected) in [
        (&["--jwt-issuer", "http://127.0.0.1:1"][..], "--jwt-issuer: issuer's URL is not https"),
        (&["--jwt-issuer", "login.example"], "--jwt-issuer: issuer's URL is not an absolute URL"),
        (&["--jwks", "https://"], "--jwks: URL of the key set is not an absolute URL"),
        (&["--jwks", "/nowhere/keys"], "--jwks: key set from the file /nowhere/keys cannot be read"),
    ] {
        let line = with_key().args(arguments).args(["--jwt-audience", "x"]).fail().await;
        assert!(line.contains(expected), "{line}");
    }
    let launch = with_key();
    let path =
        launch.scratch().write("key.pem", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n");
    let line = launch.arg("--jwt-key-file").arg(path).args(["--jwt-audience", "x"]).fail().await;
    assert!(line.contains("has no usable public key"), "{line}");
}

/// The `sub` of a JWT that the API was sent.
fn subject_of(authorization: &str) -> String {
    let claims = authorization.split('.').nth(1).unwrap();
    let claims: Value = serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(claims).unwrap()).unwrap();
    claims["sub"].as_str().unwrap().to_owned()
}

/// With a token endpoint that exchanges the users' JWTs.
pub(crate) fn exchanging(launch: Launch, api: &Server, issuer: &Issuer) -> Launch {
    let url = api.base_url().replace("/v1", "/oauth/token");
    with_issuer(launch.env("SELAM_TOKEN_URL", url), &issuer.url)
}

/// H5: no user's JWT is ever sent for another user.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_user_has_a_jwt_of_its_own() {
    let (simulator, api, launch) = api().await;
    let issuer = Issuer::start().await;
    let token = secret(format!("caller-{}", random()));
    let proxy = exchanging(launch, &api, &issuer).callers(&format!("web:{token}\n")).start().await;
    let users: Vec<String> = (0..24).map(|_| user("gus")).collect();
    let calls = users.iter().map(|user| {
        let (caller, user) = (Caller::http2(&proxy).with_token(&issuer.jwt(user, &json!({}))), user.clone());
        tokio::spawn(async move {
            for _ in 0..6 {
                // The API checks JWT and key, and tells us which user's request carried which JWT.
                let answer =
                    caller.post("/v1/audio/agent/sessions", json!({ "user": user }).to_string()).await;
                assert_eq!(answer.status, 200, "{}", answer.text());
            }
        })
    });
    for call in calls.collect::<Vec<_>>() {
        call.await.unwrap();
    }
    let by_token = Caller::http1(&proxy).with_token(&token).post("/v1/audio/agent/sessions", "{}").await;
    assert_eq!(by_token.status, 200);
    let mut jwts = HashMap::new();
    for received in simulator.received() {
        let authorization = received.headers["authorization"].to_str().unwrap();
        if received.uri.path() == "/oauth/token" {
            continue;
        }
        let body: Value = serde_json::from_slice(&received.body).unwrap();
        let subject = subject_of(authorization);
        match body["user"].as_str() {
            Some(user) => assert_eq!(subject, user),
            // A client token names no user: the proxy's own JWT, by client credentials.
            None => assert!(!users.contains(&subject)),
        }
        jwts.insert(authorization.to_owned(), subject);
    }
    assert_eq!((jwts.len(), simulator.token_requests()), (25, 25));
}

#[tokio::test]
async fn the_latest_jwt_of_a_user_is_exchanged() {
    let (simulator, api, launch) = api().await;
    let issuer = Issuer::start().await;
    let proxy = exchanging(launch, &api, &issuer).start().await;
    let name = user("hal");
    let subject_tokens = || {
        let requests = simulator.received().into_iter().filter(|sent| sent.uri.path() == "/oauth/token");
        let forms = requests.map(|sent| String::from_utf8(sent.body.to_vec()).unwrap());
        let field = |form: String| {
            form.split('&').find_map(|field| field.strip_prefix("subject_token=").map(str::to_owned))
        };
        forms.filter_map(field).collect::<Vec<_>>()
    };
    let mut jwts = Vec::new();
    for number in 0..3 {
        jwts.push(issuer.jwt(&name, &json!({ "jti": number })));
        let caller = Caller::http1(&proxy).with_token(&jwts[number]);
        assert_eq!(caller.post("/v1/audio/agent/sessions", "{}").await.status, 200);
        // The API rejects the JWT that it was exchanged for.
        simulator.expire_jwts();
        if number == 1 {
            break;
        }
    }
    assert_eq!(subject_tokens(), jwts);

    // Accepted, because clocks differ, but too late to be exchanged: nothing is sent, and a newer one helps at once.
    let (late, sent) = (user("ida"), simulator.received().len());
    let jwt = |exp: u64| issuer.jwt(&late, &json!({ "exp": exp }));
    let caller = Caller::http1(&proxy);
    let answer = caller.clone().with_token(&jwt(now() - 20)).post("/v1/audio/agent/sessions", "{}").await;
    answer.assert_error(401, "authentication_error", "token_expired");
    assert_eq!(simulator.received().len(), sent);
    let fresh = caller.clone().with_token(&jwt(now() + 600));
    assert_eq!(fresh.post("/v1/audio/agent/sessions", "{}").await.status, 200);
    // Its JWT for the API is still valid.
    let old = caller.with_token(&jwt(now() - 20));
    assert_eq!(old.post("/v1/audio/agent/sessions", "{}").await.status, 200);
}

/// H5: each session carries its user's JWT and the current key. Rotations end no session.
#[tokio::test]
async fn users_talk_to_the_voice_agent() {
    let (simulator, api, _) = api().await;
    let mut issuer = Issuer::start().await;
    let key = secret(simulator.issue_key());
    let launch = Launch::for_api(&api).key_file(&key).arg("--voice-agent");
    let proxy = exchanging(launch, &api, &issuer).start().await;
    // What the API was sent last.
    let sent = || {
        let uri = simulator.received().pop().unwrap().uri;
        let find = |name: &str| uri.query()?.split('&').find_map(|part| part.strip_prefix(name));
        let jwt = secret(find("token=").unwrap());
        (subject_of(&jwt), find("api_key=").unwrap().to_owned(), jwt)
    };
    let (ada, bo) = (user("ada"), user("bo"));

    let polling = Poller::open(&proxy, &issuer.jwt(&ada, &json!({}))).await;
    let (subject, sent_key, jwt) = sent();
    assert_eq!((&subject, &sent_key), (&ada, &key));
    assert_eq!(polling.send(CONNECT).await.text(), "ok");
    assert!(polling.poll().await.text().starts_with(CONNECT));
    let mut socket = socket(&proxy, &issuer.jwt(&bo, &json!({})), "").await;
    assert_eq!(sent().0, bo);
    assert!(next(&mut socket).await.to_text().unwrap().starts_with("0{"));
    socket.send(Message::text(CONNECT)).await.unwrap();
    assert!(next(&mut socket).await.to_text().unwrap().starts_with(CONNECT));

    // An echo of what the proxy sent.
    let echo = format!(r#"42/v1/audio/agent,["say","{jwt}"]"#);
    assert_eq!(polling.send(echo).await.text(), "ok");
    let masked = format!(r#"42/v1/audio/agent,["say","{}"]"#, "*".repeat(jwt.len()));
    assert_eq!(polling.poll().await.text(), masked);

    // The session is the user's, with any JWT.
    let with_jwt =
        |jwt: &str| Poller { caller: Caller::http1(&proxy).with_token(jwt), sid: polling.sid.clone() };
    let thief = with_jwt(&issuer.jwt(&bo, &json!({})));
    thief.poll().await.assert_error(400, "invalid_request_error", "unknown_session");

    let new = secret(simulator.issue_key());
    proxy.scratch().write("key", &new);
    simulator.revoke_key(&key);
    issuer.rotate();
    let next_jwt = issuer.jwt(&ada, &json!({}));
    let opened = Caller::http2(&proxy).get(&path(&format!("&token={next_jwt}"))).await;
    assert!(opened.status == 200 && opened.text().starts_with("0{"), "{}", opened.text());
    let (subject, sent_key, _) = sent();
    assert_eq!((&subject, &sent_key), (&ada, &new));
    // The first session goes on, and an echo of either key is masked, before and after its change to WebSocket.
    let polling = with_jwt(&next_jwt);
    let [echo, masked] = [format!("{key} {new}"), format!("{0} {0}", "*".repeat(key.len()))]
        .map(|keys| format!(r#"42/v1/audio/agent,["say","{keys}"]"#));
    assert_eq!(polling.send(echo.clone()).await.text(), "ok");
    assert_eq!(polling.poll().await.text(), masked);
    let mut upgraded = self::socket(&proxy, &next_jwt, &format!("&sid={}", polling.sid)).await;
    upgraded.send(Message::text("2probe")).await.unwrap();
    assert_eq!(next(&mut upgraded).await, Message::text("3probe"));
    for text in ["5", &*echo] {
        upgraded.send(Message::text(text)).await.unwrap();
    }
    assert_eq!(next(&mut upgraded).await, Message::text(masked));
    socket.send(Message::text(EVENT)).await.unwrap();
    assert_eq!(next(&mut socket).await, Message::text(EVENT));

    let requests = simulator.requests();
    let stranger = Key { kid: issuer.key.kid.clone(), ..Key::new() };
    for (wrong, code) in [
        (stranger.jwt(&claims(&issuer.url, &ada, &json!({}))), "invalid_token"),
        (issuer.jwt(&ada, &json!({"exp": now() - 90})), "token_expired"),
        ("not-a-jwt".to_owned(), "invalid_token"),
    ] {
        let answer = Caller::http1(&proxy).get(&path(&format!("&token={wrong}"))).await;
        answer.assert_error(401, "authentication_error", code);
        with_jwt(&wrong).poll().await.assert_error(401, "authentication_error", code);
        let (_, head) = handshake(&proxy, &wrong, "").await;
        assert!(head.starts_with("HTTP/1.1 401 "), "{head}");
    }
    assert_eq!(simulator.requests(), requests);
}

/// A user's client id and JWT at the real issuer.
async fn log_in(issuer: &str, password: &str, user: &str) -> String {
    let client = Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
    let basic = base64::prelude::BASE64_STANDARD.encode(format!("{user}:{password}"));
    let request = Request::post(format!("{issuer}/token"))
        .header("authorization", format!("Basic {basic}"))
        .header("content-type", "application/x-www-form-urlencoded")
        .body(Full::from("grant_type=client_credentials"))
        .unwrap();
    let response = with_timeout(client.request(request)).await.unwrap();
    let body = with_timeout(response.into_body().collect()).await.unwrap().to_bytes();
    let body: Value = serde_json::from_slice(&body).unwrap();
    secret(body["access_token"].as_str().unwrap_or_else(|| panic!("{body}")))
}

/// V1, V3
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_issuer_rotates_its_keys_under_load() {
    let scratch = Scratch::new();
    let place = match install("oidc", &scratch).await {
        Ok(place) => place,
        Err(why) => return skip("the test with a real OpenID Connect issuer", &why),
    };
    let users: Vec<String> = (0..8).map(|number| secret(format!("user-{number}-{}", random()))).collect();
    let password = secret(random());
    let mut node = Command::new("node");
    node.arg(place.join("issuer.js")).arg(&password).args(&users);
    node.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
    let mut node = node.spawn().unwrap();
    let mut control = node.stdin.take().unwrap();
    let mut output = BufReader::new(node.stdout.take().unwrap()).lines();
    let issuer = with_timeout(output.next_line()).await.unwrap().expect("the issuer's URL");

    let (simulator, _api, launch) = api().await;
    let proxy = with_issuer(launch, &issuer).start().await;
    // On a busy machine, the issuer may take longer to start than the proxy waits for its keys.
    let caller = Caller::http1(&proxy).with_token(&log_in(&issuer, &password, &users[0]).await);
    eventually("the keys are there", async || (caller.chat().await.status == 200).then_some(())).await;
    let (answered, stop) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
    let rotated = Arc::<AtomicBool>::default();
    let callers = users.iter().enumerate().map(|(number, user)| {
        let caller = Caller::new(&proxy, Protocol::BOTH[number % 2]);
        let (answered, stop, rotated) = (answered.clone(), stop.clone(), rotated.clone());
        let (issuer, password, user) = (issuer.clone(), password.clone(), user.clone());
        tokio::spawn(async move {
            let mut jwt = log_in(&issuer, &password, &user).await;
            let mut is_old = true;
            while !stop.load(Ordering::SeqCst) {
                // Half of them keep the JWT that the previous key signed.
                if is_old && number % 2 == 0 && rotated.load(Ordering::SeqCst) {
                    jwt = log_in(&issuer, &password, &user).await;
                    is_old = false;
                }
                let answer = caller.clone().with_token(&jwt).chat().await;
                assert_eq!(answer.status, 200, "{}", answer.text());
                answered.fetch_add(1, Ordering::SeqCst);
            }
            is_old
        })
    });
    let callers: Vec<_> = callers.collect();
    let progress = async || {
        let goal = answered.load(Ordering::SeqCst) + 40;
        eventually("more requests are answered", async || {
            assert!(!callers.iter().any(JoinHandle::is_finished), "a request failed");
            (answered.load(Ordering::SeqCst) >= goal).then_some(())
        })
        .await;
    };
    progress().await;
    control.write_all(b"rotate\n").await.unwrap();
    assert_eq!(with_timeout(output.next_line()).await.unwrap().as_deref(), Some("rotated"));
    rotated.store(true, Ordering::SeqCst);
    progress().await;
    progress().await;
    stop.store(true, Ordering::SeqCst);
    let mut old = 0;
    for caller in callers {
        old += u64::from(caller.await.unwrap());
    }
    assert_eq!(old, 4, "each caller that should has logged in again");
    assert!(simulator.requests() >= 120);

    // JWTs of the real issuer for nobody, and none at all.
    let answer =
        Caller::http1(&proxy).with_token(&format!("{}x", log_in(&issuer, &password, &users[0]).await));
    answer.chat().await.assert_error(401, "authentication_error", "invalid_token");
    drop(control);
}
