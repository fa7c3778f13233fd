//! Replicas that share their JWTs through a real Redis.

use std::{
    fs::{self, File},
    net::{Ipv4Addr, TcpListener},
    process::{Child, Command, Stdio},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::json;
use tower_selam::{
    Token,
    oauth::RefreshToken,
    simulator::{Server, Simulator, TokenFault},
};

use crate::{
    login::{Issuer, exchanging, user},
    metrics::{reaches, scrape},
    support::{Caller, Launch, Proxy, Scratch, assert_clean, eventually, example, npm::skip, random, secret},
};

const FETCHES: &str = "tower_selam_fleet_fetches_total";
const STORE_CALLS: &str = "tower_selam_fleet_store_calls_total";
const ALONE: &str = "tower_selam_fleet_alone";
const REPLAYS: &str = "tower_selam_replays_total";

/// A Redis that forgets everything when it ends.
struct Redis {
    server: Child,
    arguments: Vec<String>,
    url: String,
    scratch: Scratch,
}

impl Redis {
    /// On a socket, with a password. `None` if it is not installed.
    async fn start() -> Option<Self> {
        let (scratch, password) = (Scratch::new(), secret(random()));
        let socket = scratch.path("redis.sock").display().to_string();
        let url = format!("unix://{socket}?pass={password}");
        let arguments = ["--port", "0", "--unixsocket", &socket, "--requirepass", &password];
        Self::run(scratch, url, &arguments).await
    }

    /// On a port, with a password and TLS.
    async fn with_tls() -> Option<Self> {
        let (scratch, password) = (Scratch::new(), secret(random()));
        let rcgen::CertifiedKey { cert, signing_key } =
            rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let certificate = scratch.write("redis.pem", cert.pem()).display().to_string();
        let key = scratch.write("redis.key", signing_key.serialize_pem()).display().to_string();
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let url = format!("rediss://:{password}@localhost:{port}");
        let port = port.to_string();
        let arguments =
            ["--port", "0", "--tls-port", &port, "--tls-auth-clients", "no", "--requirepass", &password];
        let files =
            ["--tls-cert-file", &certificate, "--tls-key-file", &key, "--tls-ca-cert-file", &certificate];
        Self::run(scratch, url, &[&arguments[..], &files].concat()).await
    }

    async fn run(scratch: Scratch, url: String, arguments: &[&str]) -> Option<Self> {
        let directory = scratch.path("").display().to_string();
        let more = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", &directory];
        let arguments: Vec<_> = arguments.iter().chain(&more).map(|&argument| argument.to_owned()).collect();
        let Some(server) = spawn(&arguments, &scratch) else {
            skip("a fleet of proxies", "redis-server is not installed");
            return None;
        };
        let redis = Self { server, arguments, url, scratch };
        redis.is_ready().await;
        Some(redis)
    }

    async fn is_ready(&self) {
        eventually("Redis is ready", async || {
            let log = fs::read_to_string(self.scratch.path("log")).unwrap();
            log.to_lowercase().contains("ready to accept connections").then_some(())
        })
        .await;
    }

    fn kill(&mut self) {
        self.server.kill().unwrap();
        self.server.wait().unwrap();
    }

    async fn restart(&mut self) {
        self.server = spawn(&self.arguments, &self.scratch).unwrap();
        self.is_ready().await;
    }

    /// A member of the fleet, with these lines in the file with its keys.
    fn joined(&self, launch: Launch, keys: &[&str]) -> Launch {
        let file = launch.scratch().write("fleet-keys", keys.join("\n"));
        launch
            .args(["--fleet", "proxies"])
            .env("SELAM_FLEET_STORE", &self.url)
            .env("SELAM_FLEET_KEY_FILE", file)
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

fn spawn(arguments: &[String], scratch: &Scratch) -> Option<Child> {
    let log = File::create(scratch.path("log")).unwrap();
    Command::new("redis-server").args(arguments).stdin(Stdio::null()).stdout(log).spawn().ok()
}

fn key() -> String {
    secret(BASE64_STANDARD.encode(&random()[..32]))
}

/// An API with a token endpoint.
struct Api {
    simulator: Simulator,
    server: Server,
    key: String,
}

impl Api {
    async fn start() -> Self {
        let simulator = Simulator::new();
        simulator.set_rate_limit(1_000_000);
        let (server, key) = (Server::tls(&simulator).await.unwrap(), secret(simulator.issue_key()));
        Self { simulator, server, key }
    }

    fn launch(&self) -> Launch {
        Launch::for_api(&self.server)
            .env("SELAM_API_KEY", &self.key)
            .env("SELAM_TOKEN_URL", self.server.base_url().replace("/v1", "/oauth/token"))
    }

    /// Sends a request through the proxy, and returns the JWT that arrived.
    async fn jwt_of(&self, proxy: &Proxy) -> String {
        let answer = Caller::http1(proxy).chat().await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        let received = self.simulator.received();
        let sent = received.iter().rfind(|sent| sent.uri.path() != "/oauth/token").unwrap();
        secret(sent.headers["authorization"].to_str().unwrap().replace("Bearer ", ""))
    }
}

/// N1, N3
#[tokio::test]
async fn replicas_share_one_jwt() {
    let Some(redis) = Redis::start().await else { return };
    let (api, [old, new]) = (Api::start().await, [(); 2].map(|()| key()));
    let first = redis.joined(api.launch(), &[&old]).start().await;
    let second = redis.joined(api.launch(), &[&old, &new]).start().await;
    let third = redis.joined(api.launch(), &[&new, "", &old]).start().await;
    let jwt = api.jwt_of(&first).await;
    for replica in [&second, &third] {
        assert_eq!(api.jwt_of(replica).await, jwt);
        assert_eq!(scrape(replica).await.value(FETCHES, &[("outcome", "adopted")]), Some(1.0));
    }
    assert_eq!(api.simulator.token_requests(), 1);
    assert_eq!(scrape(&first).await.value(FETCHES, &[("outcome", "led")]), Some(1.0));

    first.logs("every user of this machine can read the fleet's keys").await;

    // A replica that has none of their keys takes no part.
    let stranger = redis.joined(api.launch(), &[&key()]).start().await;
    assert_ne!(api.jwt_of(&stranger).await, jwt);
    assert_eq!(api.jwt_of(&first).await, jwt);
}

/// N1, H5
#[tokio::test]
async fn replicas_share_the_jwts_of_users() {
    let Some(redis) = Redis::start().await else { return };
    let (api, issuer, key) = (Api::start().await, Issuer::start().await, key());
    let launch = || exchanging(redis.joined(api.launch(), &[&key]), &api.server, &issuer);
    let (first, second) = (launch().start().await, launch().start().await);
    for (number, name) in [user("ada"), user("bo")].iter().enumerate() {
        for (visit, replica) in [&first, &second].into_iter().enumerate() {
            let jwt = issuer.jwt(name, &json!({ "jti": visit }));
            let caller = Caller::http1(replica).with_token(&jwt);
            let answer = caller.post("/v1/audio/agent/sessions", json!({ "user": name }).to_string()).await;
            assert_eq!(answer.status, 200, "{}", answer.text());
        }
        assert_eq!(api.simulator.token_requests(), number as u64 + 1);
    }
}

/// N1: over TLS, with an authority that `--ca` names.
#[tokio::test]
async fn the_store_may_be_reached_over_tls() {
    let Some(redis) = Redis::with_tls().await else { return };
    let (api, key) = (Api::start().await, key());
    let authorities = fs::read_to_string(redis.scratch.path("redis.pem")).unwrap();
    let launch = |authorities: &str| {
        let launch = redis.joined(Launch::new(), &[&key]);
        let file = launch.scratch().write("ca.pem", format!("{}{authorities}", api.server.ca_pem().unwrap()));
        launch
            .arg("--ca")
            .arg(file)
            .env("SELAM_API_KEY", &api.key)
            .env("SELAM_BASE_URL", api.server.base_url())
            .env("SELAM_TOKEN_URL", api.server.base_url().replace("/v1", "/oauth/token"))
    };
    let [first, second] = [launch(&authorities).start().await, launch(&authorities).start().await];
    assert_eq!(api.jwt_of(&first).await, api.jwt_of(&second).await);
    assert_eq!(api.simulator.token_requests(), 1);
    let distrusting = launch("").start().await;
    api.jwt_of(&distrusting).await;
    assert_eq!(api.simulator.token_requests(), 2);
    reaches(&distrusting, ALONE, &[], 1.0).await;
}

/// N6: also when they start, and until it is back.
#[tokio::test]
async fn replicas_go_on_without_the_store() {
    let Some(mut redis) = Redis::start().await else { return };
    let (api, key) = (Api::start().await, key());
    let mut replicas = Vec::new();
    for _ in 0..2 {
        replicas.push(redis.joined(api.launch(), &[&key]).start().await);
    }
    let jwt = api.jwt_of(&replicas[0]).await;
    assert_eq!(api.jwt_of(&replicas[1]).await, jwt);
    redis.kill();
    for replica in &replicas {
        reaches(replica, ALONE, &[], 1.0).await;
        assert_eq!(api.jwt_of(replica).await, jwt);
    }
    replicas.push(redis.joined(api.launch(), &[&key]).start().await);
    api.jwt_of(&replicas[2]).await;
    assert_eq!(api.simulator.token_requests(), 2);
    reaches(&replicas[2], ALONE, &[], 1.0).await;
    api.simulator.expire_jwts();
    for replica in &replicas {
        assert_ne!(api.jwt_of(replica).await, jwt);
    }
    assert_eq!(api.simulator.token_requests(), 5);

    redis.restart().await;
    for replica in &replicas {
        reaches(replica, ALONE, &[], 0.0).await;
        replica.logs("the fleet's store is back").await;
        assert_eq!(replica.errors().matches("goes on alone").count(), 1);
    }
    let late = redis.joined(api.launch(), &[&key]).start().await;
    api.jwt_of(&late).await;
    assert_eq!(api.simulator.token_requests(), 5);
}

/// N4
#[tokio::test]
async fn a_revoked_jwt_is_withdrawn_everywhere() {
    let Some(redis) = Redis::start().await else { return };
    let (api, key) = (Api::start().await, key());
    let launch = || redis.joined(api.launch(), &[&key]).start();
    let (first, second) = (launch().await, launch().await);
    let revoked = api.jwt_of(&first).await;
    assert_eq!(api.jwt_of(&second).await, revoked);
    api.simulator.expire_jwts();
    let current = api.jwt_of(&first).await;
    assert_ne!(current, revoked);

    // Of two more looks at the store, the second one began after that.
    let looks =
        async || scrape(&second).await.value(STORE_CALLS, &[("call", "get"), ("outcome", "ok")]).unwrap();
    let before = looks().await;
    eventually("the other replica has looked", async || (looks().await >= before + 2.0).then_some(())).await;
    assert_eq!(api.jwt_of(&second).await, current);
    assert_eq!(scrape(&second).await.sum(REPLAYS, &[]), 0.0);
    assert_eq!(api.simulator.token_requests(), 2);
}

/// N7: nobody waits for one that shuts down.
#[tokio::test]
async fn a_replica_leaves_on_sigterm() {
    let Some(redis) = Redis::start().await else { return };
    let (api, key) = (Api::start().await, key());
    let launch = || redis.joined(api.launch(), &[&key]).start();
    let (mut first, second) = (launch().await, launch().await);
    api.simulator.inject_token_fault(TokenFault::Hang);
    let caller = Caller::http1(&first);
    let waiting = tokio::spawn(async move { caller.chat().await });
    eventually("the first replica leads", async || (api.simulator.token_requests() == 1).then_some(())).await;
    first.terminate();
    api.jwt_of(&second).await;
    assert_eq!(api.simulator.token_requests(), 2);
    assert!(first.is_running() && !waiting.is_finished());
    first.terminate();
    first.exit_status().await;
    waiting.abort();
}

/// N4, S2
#[tokio::test]
async fn the_admin_shows_and_ends_tokens() {
    let Some(redis) = Redis::start().await else { return };
    let (api, key) = (Api::start().await, key());
    let replica = redis.joined(api.launch(), &[&key]).start().await;
    let keys = redis.scratch.write("fleet-keys", &key);
    let program = example("fleet-admin");
    let admin = |arguments: &str, input: &str| {
        let input = redis.scratch.write("input", input);
        let output = Command::new(&program)
            .args(arguments.split(' '))
            .env("SELAM_FLEET", "proxies")
            .env("SELAM_FLEET_STORE", &redis.url)
            .env("SELAM_FLEET_KEY_FILE", &keys)
            .stdin(File::open(input).unwrap())
            .output()
            .unwrap();
        let printed = [output.stdout, output.stderr].concat();
        assert_clean("fleet-admin", &printed);
        (output.status.success(), String::from_utf8(printed).unwrap())
    };
    assert_eq!(admin("status service", ""), (true, "service: the fleet has no such token\n".to_owned()));
    let jwt = api.jwt_of(&replica).await;
    let id = Token::new(jwt.clone()).unwrap().id();
    let (_, status) = admin("status service", "");
    assert!(status.contains(&format!("token {id} for ")), "{status}");

    assert!(admin("forget service", "").0);
    eventually("the replica has another JWT", async || (api.jwt_of(&replica).await != jwt).then_some(()))
        .await;
    assert!(!admin("status service", "").1.contains(&id.to_string()));

    let login = secret(random());
    assert!(admin("log-in shared", &format!("{login}\n")).0);
    let (_, status) = admin("status shared", "");
    let id = RefreshToken::new(login).unwrap().id();
    assert!(status.contains(&format!("no token, refresh token {id}")), "{status}");
    for (arguments, expected) in [("status", "usage: "), ("log-in shared", "refresh token is empty")] {
        let (succeeded, printed) = admin(arguments, "\n");
        assert!(!succeeded && printed.contains(expected), "{printed}");
    }
}

#[tokio::test]
async fn invalid_fleets_are_reported_at_the_start() {
    let api = Api::start().await;
    let password = secret(random());
    let store = format!("redis://:{password}@127.0.0.1:1");
    let report = async |name: &str, keys: Option<&str>, store: &str| {
        let launch = api.launch();
        let file = launch.scratch().path("fleet-keys");
        if let Some(keys) = keys {
            launch.scratch().write("fleet-keys", keys);
        }
        let launch = launch.args(["--fleet", name, "--fleet-key-file"]).arg(file);
        let line = launch.env("SELAM_FLEET_STORE", store).fail().await;
        line.lines().next().unwrap().to_owned()
    };
    let valid = key();
    let no_key = secret(random());
    for (name, keys, store, expected) in [
        ("a b", Some(&*valid), &*store, "--fleet: "),
        ("proxies", None, &store, "--fleet-key-file: "),
        ("proxies", Some("\n"), &store, "--fleet-key-file: "),
        ("proxies", Some(&format!("{valid}\n{no_key}")), &store, "line 2: "),
        ("proxies", Some(&valid), &format!("http://{password}"), "SELAM_FLEET_STORE: must be "),
    ] {
        let line = report(name, keys, store).await;
        assert!(line.starts_with("proxy: ") && line.contains(expected), "{line}");
    }
}
