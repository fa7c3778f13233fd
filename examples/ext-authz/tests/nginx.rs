//! A real nginx with `nginx.conf`, between callers and a simulated API over TLS.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests")]

use std::{
    env, fs,
    io::Write,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::http::{HeaderMap, Request, Response, StatusCode};
use example_ext_authz::{Authorizer, Callers};
use http_body_util::{BodyExt, Full};
use hyper::{body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::{
    net::{TcpListener, UnixStream},
    process::{Child, Command},
    task::yield_now,
    time::timeout,
};
use tower_selam::{
    ApiKey, BaseUrl, PerSubject, Provider, Refreshing, SelamLayer, Subject, Token,
    simulator::{JwtAlgorithm, Server, Simulator},
    source::{FileSource, Reason, SourceError, source_fn},
};

const WEB: &str = "token-of-the-web-site";
const MOBILE: &str = "token-of-the-mobile-app";
const CHAT: &str = r#"{"messages":[{"role":"user","content":"Selam!"}]}"#;
const CHAT_STREAM: &str = r#"{"stream":true,"messages":[{"role":"user","content":"Selam!"}]}"#;

/// Time limit that only a hanging test reaches.
const HANG: Duration = Duration::from_secs(60);

/// The simulated API, the service and nginx.
struct Stack {
    simulator: Simulator,
    _api: Server,
    nginx: Nginx,
    /// The JWT of each caller, once it has been fetched.
    jwts: Arc<Mutex<Vec<(String, String)>>>,
}

/// Where nginx is installed. Without it, the tests are skipped, unless the gate asks for them with `REQUIRE_NGINX`.
fn nginx() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = env::split_paths(&path).chain(["/usr/sbin".into(), "/usr/local/sbin".into()]);
    let found = folders.map(|folder: PathBuf| folder.join("nginx")).find(|program| program.is_file());
    if found.is_none() {
        assert!(env::var_os("REQUIRE_NGINX").is_none(), "nginx is not installed");
        // The test harness would capture `eprintln!`.
        let _ = std::io::stderr().write_all(b"\nSKIPPED a test with nginx, which is not installed\n");
    }
    found
}

impl Stack {
    /// `None` where nginx is missing.
    async fn start(key: impl FnOnce(&Simulator, &Path) -> Provider<ApiKey>, trusts: bool) -> Option<Self> {
        let program = nginx()?;
        let folder = Folder::new();
        let simulator = Simulator::new();
        let api = Server::tls(&simulator).await.unwrap();
        let jwts = Arc::new(Mutex::new(Vec::new()));
        let (minted, mint) = (Arc::clone(&jwts), simulator.clone());
        let per_caller = PerSubject::new(move |caller: &Subject| {
            let jwt = mint.mint_jwt(JwtAlgorithm::Es256, HANG);
            minted.lock().unwrap().push((caller.as_str().to_owned(), jwt.clone()));
            let jwt = Token::new(jwt);
            source_fn(move |_: Reason<Token>| std::future::ready(jwt.clone()))
        });
        let layer = SelamLayer::builder()
            .with_base_url(BaseUrl::new(api.base_url()).unwrap())
            .with_api_key(key(&simulator, &folder.0))
            .with_jwt(per_caller);
        let callers = Callers::parse(&format!("web:{WEB} mobile:{MOBILE}")).unwrap();
        let service = Authorizer::new(layer.build().unwrap(), callers).per_caller().router();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let service_address = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move { axum::serve(listener, service).await });

        let other = Server::tls(&Simulator::new()).await.unwrap();
        let authority = if trusts { api.ca_pem() } else { other.ca_pem() };
        fs::write(folder.0.join("ca.pem"), authority.unwrap()).unwrap();
        let nginx = Nginx::start(&program, folder, &service_address, &api).await;
        Some(Self { simulator, _api: api, nginx, jwts })
    }

    fn jwt_of(&self, caller: &str) -> String {
        let jwts = self.jwts.lock().unwrap();
        jwts.iter().find(|(name, _)| name == caller).unwrap().1.clone()
    }
}

/// A folder with a short path, since that of a Unix socket may have about a hundred characters.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("ext-authz-{}-{}", std::process::id(), NEXT.fetch_add(1, Relaxed));
        let folder = env::temp_dir().join(name);
        fs::create_dir_all(&folder).unwrap();
        Self(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

struct Nginx {
    /// Killed on drop, before its folder is removed.
    _process: Child,
    folder: Folder,
}

impl Nginx {
    /// Starts nginx with the example's configuration, in which only addresses, paths and the API's name change.
    async fn start(program: &Path, folder: Folder, service: &str, api: &Server) -> Self {
        let path = |name: &str| folder.0.join(name).display().to_string();
        let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"];
        let temporary = temporary.map(|kind| format!("{kind}_temp_path {};\n", path(kind))).concat();
        let mut configuration = include_str!("../nginx.conf").to_owned();
        for (ours, theirs) in [
            ("listen 127.0.0.1:8080", format!("listen unix:{}", path("socket"))),
            ("127.0.0.1:9191", service.to_owned()),
            ("server api.selamgpt.com:443", format!("server {}", api.local_addr())),
            ("api.selamgpt.com", "localhost".to_owned()),
            ("/etc/ssl/certs/ca-certificates.crt", path("ca.pem")),
            ("/dev/stdout", path("access.log")),
            ("http {", format!("http {{\n{temporary}")),
        ] {
            assert!(configuration.contains(ours), "{ours}");
            configuration = configuration.replace(ours, &theirs);
        }
        fs::write(folder.0.join("nginx.conf"), configuration).unwrap();
        let mut process = Command::new(program)
            .args(["-p", &path(""), "-c", &path("nginx.conf"), "-e", &path("error.log")])
            .args(["-g", "daemon off; master_process off;"])
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let listening = async {
            while UnixStream::connect(folder.0.join("socket")).await.is_err() {
                let ended = process.try_wait().unwrap();
                let log = || fs::read_to_string(folder.0.join("error.log")).unwrap_or_default();
                assert!(ended.is_none(), "nginx: {ended:?} {}", log());
                yield_now().await;
            }
        };
        timeout(HANG, listening).await.unwrap();
        Self { _process: process, folder }
    }

    async fn send(&self, request: Request<&'static str>) -> Response<Bytes> {
        let stream = UnixStream::connect(self.folder.0.join("socket")).await.unwrap();
        let (mut client, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        let connection = tokio::spawn(connection);
        let response = client.send_request(request.map(Full::<Bytes>::from)).await.unwrap();
        let (head, body) = response.into_parts();
        let response = Response::from_parts(head, body.collect().await.unwrap().to_bytes());
        connection.abort();
        response
    }

    async fn chat(&self, token: Option<&str>, body: &'static str) -> Response<Bytes> {
        let mut request = Request::post("/v1/chat/completions").header("host", "caller.example");
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let request = request
            .header("content-type", "application/json")
            .header("x-api-key", "theirs")
            .header("cookie", "session=theirs")
            .header("x-forwarded-for", "192.0.2.7")
            .header("connection", "x-api-key, authorization");
        self.send(request.body(body).unwrap()).await
    }

    fn logs(&self) -> String {
        let read = |name: &str| fs::read_to_string(self.folder.0.join(name)).unwrap_or_default();
        read("access.log") + &read("error.log")
    }
}

fn fixed(simulator: &Simulator, _: &Path) -> Provider<ApiKey> {
    ApiKey::new(simulator.issue_key()).unwrap().into()
}

fn value<'a>(headers: &'a HeaderMap, name: &str) -> Vec<&'a str> {
    headers.get_all(name).iter().map(|value| value.to_str().unwrap()).collect()
}

#[tokio::test]
async fn callers_without_a_token_are_refused() {
    let Some(stack) = Stack::start(fixed, true).await else { return };
    for token in [None, Some("token-of-somebody-else")] {
        let response = stack.nginx.chat(token, CHAT).await;
        assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
        assert_eq!(response.headers()["www-authenticate"], "Bearer");
    }
    for (path, expected) in [
        ("/v1/chat/completions?api_key=theirs", 400),
        ("/v1/chat/completions?%74oken=theirs", 400),
        ("/v1/../admin", 404),
        ("/v1/%2e%2e/admin", 404),
        ("/authorize", 404),
    ] {
        let request = Request::get(path).header("host", "a").header("authorization", format!("Bearer {WEB}"));
        let response = stack.nginx.send(request.body("").unwrap()).await;
        assert_eq!(response.status(), expected, "{path}");
    }
    assert_eq!(stack.simulator.requests(), 0);
}

#[tokio::test]
async fn the_api_sees_our_credentials_alone() {
    let Some(stack) = Stack::start(fixed, true).await else { return };
    let mut secrets = Vec::new();
    for (caller, token, body) in [("web", WEB, CHAT), ("mobile", MOBILE, CHAT_STREAM), ("web", WEB, CHAT)] {
        let response = stack.nginx.chat(Some(token), body).await;
        assert_eq!(response.status(), StatusCode::OK, "{response:?} {}", stack.nginx.logs());
        let received = stack.simulator.received().pop().unwrap();
        let jwt = stack.jwt_of(caller);
        assert_eq!(value(&received.headers, "authorization"), [format!("Bearer {jwt}")]);
        let key = value(&received.headers, "x-api-key");
        assert!(key.len() == 1 && key[0].starts_with("sk-selam-"), "{key:?}");
        assert_eq!((received.uri.path(), &received.body[..]), ("/v1/chat/completions", body.as_bytes()));
        let mut names: Vec<_> = received.headers.keys().map(|name| name.as_str()).collect();
        names.sort_unstable();
        assert_eq!(names, ["authorization", "content-length", "content-type", "host", "x-api-key"]);

        secrets.extend([jwt, key[0].to_owned(), token.to_owned()]);
        let shown = format!("{:?} {:?}", response.headers(), response.body());
        assert!(!secrets.iter().any(|secret| shown.contains(secret)), "{shown}");
    }
    let logs = stack.nginx.logs();
    assert!(logs.contains("POST /v1/chat/completions\" 200"), "{logs}");
    assert!(!secrets.iter().any(|secret| logs.contains(secret)) && !logs.contains("theirs"), "{logs}");
}

#[tokio::test]
async fn a_rotated_key_is_used() {
    let write = |folder: &Path, key: &str| {
        fs::write(folder.join("new"), key).unwrap();
        fs::rename(folder.join("new"), folder.join("key")).unwrap();
    };
    let in_file = move |simulator: &Simulator, folder: &Path| {
        write(folder, &simulator.issue_key());
        Refreshing::new(FileSource::new(folder.join("key"))).into()
    };
    let Some(stack) = Stack::start(in_file, true).await else { return };
    assert_eq!(stack.nginx.chat(Some(WEB), CHAT).await.status(), StatusCode::OK);
    let old = stack.simulator.received().pop().unwrap().headers["x-api-key"].to_str().unwrap().to_owned();

    let new = stack.simulator.issue_key();
    write(&stack.nginx.folder.0, &new);
    stack.simulator.revoke_key(&old);
    // The file is re-read at most twice a second, and believed once two looks agree.
    let accepted = async { while stack.nginx.chat(Some(WEB), CHAT).await.status() != StatusCode::OK {} };
    timeout(HANG, accepted).await.unwrap();
    assert_eq!(stack.simulator.received().pop().unwrap().headers["x-api-key"], new);
}

#[tokio::test]
async fn outage_is_a_503() {
    let sealed = |_: &Simulator, _: &Path| {
        let source =
            |_: Reason<ApiKey>| async { Err::<ApiKey, _>(SourceError::transient("the vault is sealed")) };
        Refreshing::new(source_fn(source)).into()
    };
    let Some(stack) = Stack::start(sealed, true).await else { return };
    let response = stack.nginx.chat(Some(WEB), CHAT).await;
    assert_eq!(
        (response.status(), value(response.headers(), "retry-after")),
        (StatusCode::SERVICE_UNAVAILABLE, vec!["1"])
    );
    assert_eq!(stack.simulator.requests(), 0);
}

/// The API's own 5xx passes as it is; an impostor gets nothing.
#[tokio::test]
async fn the_api_is_authenticated() {
    use tower_selam::simulator::Fault;
    let Some(stack) = Stack::start(fixed, true).await else { return };
    stack.simulator.inject(Fault::Html(StatusCode::INTERNAL_SERVER_ERROR));
    let response = stack.nginx.chat(Some(WEB), CHAT).await;
    assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
    assert!(response.headers()["content-type"].to_str().unwrap().starts_with("text/html"));

    let Some(stack) = Stack::start(fixed, false).await else { return };
    assert_eq!(stack.nginx.chat(Some(WEB), CHAT).await.status(), StatusCode::BAD_GATEWAY);
    assert_eq!(stack.simulator.requests(), 0);
}
