//! The Socket.IO clients for Node.js and Python, which reach the voice agent through the proxy: `tests/socketio/`, `tests/socketio.py`.

use std::{path::PathBuf, process::Stdio, time::Duration};

use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdout, Command},
    time,
};
use tower_selam::simulator::{JwtAlgorithm, Server, Simulator};

use crate::support::{
    Launch, Proxy, Scratch, assert_clean, npm,
    python::{self, TIMEOUT},
    random, secret, with_timeout,
};

/// The requirement that is installed.
const PYTHON_CLIENT: &str = "python-socketio>=5.11,<6 requests websocket-client";

const TRANSPORTS: [&str; 3] = ["polling,websocket", "websocket", "polling"];

struct World {
    simulator: Simulator,
    _api: Server,
    proxy: Proxy,
    token: String,
    key: String,
}

/// A proxy with a key in a file, and one caller.
async fn world() -> World {
    let simulator = Simulator::new();
    let api = Server::tls(&simulator).await.unwrap();
    let key = secret(simulator.issue_key());
    let jwt = secret(simulator.mint_jwt(JwtAlgorithm::Hs256, Duration::from_secs(3600)));
    let token = secret(format!("caller-{}", random()));
    let launch = Launch::for_api(&api).key_file(&key).env("SELAM_JWT", jwt).arg("--voice-agent");
    let proxy = launch.callers(&format!("web:{token}\n")).start().await;
    World { simulator, _api: api, proxy, token, key }
}

impl World {
    fn url(&self) -> String {
        format!("http://{}", self.proxy.address())
    }
}

/// The client for Node.js.
struct Node {
    script: PathBuf,
    _scratch: Scratch,
}

impl Node {
    /// Returns the client; `None` if the test is skipped.
    async fn install() -> Option<Self> {
        let scratch = Scratch::new();
        match npm::install("socketio", &scratch).await {
            Ok(folder) => Some(Self { script: folder.join("client.js"), _scratch: scratch }),
            Err(why) => {
                npm::skip("the tests with socket.io-client", &why);
                None
            }
        }
    }

    fn start(&self, world: &World, arguments: [&str; 3], token: &str) -> Running {
        let mut command = Command::new("node");
        command.arg(&self.script).arg(world.url()).args(arguments).env("CLIENT_TOKEN", token);
        command.env("NO_PROXY", "*").stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap()).lines();
        Running { child, output, token: token.to_owned() }
    }

    async fn run(&self, world: &World, arguments: [&str; 3], token: &str) -> Value {
        self.start(world, arguments, token).next().await
    }
}

struct Running {
    child: Child,
    output: Lines<BufReader<ChildStdout>>,
    token: String,
}

impl Running {
    /// Returns the next line, in which the client saw no secret except its own token.
    async fn next(&mut self) -> Value {
        let line = with_timeout(self.output.next_line()).await.unwrap().expect("a line of the client");
        assert_clean("output of the client", line.replace(&self.token, "").as_bytes());
        serde_json::from_str(&line).unwrap_or_else(|_| panic!("{line}"))
    }

    async fn proceed(&mut self) {
        self.child.stdin.as_mut().unwrap().write_all(b"\n").await.unwrap();
    }
}

/// Every transport and place for the token: events, attachments and acknowledgements pass.
#[tokio::test]
async fn the_javascript_client_talks_to_the_agent() {
    let Some(node) = Node::install().await else { return };
    let world = world().await;
    world.simulator.set_rate_limit(100_000);
    for (transports, how) in [
        (TRANSPORTS[0], "query"),
        (TRANSPORTS[0], "api_key"),
        (TRANSPORTS[0], "auth"),
        (TRANSPORTS[1], "query"),
        (TRANSPORTS[1], "header"),
        (TRANSPORTS[1], "protocol"),
        (TRANSPORTS[2], "query"),
        (TRANSPORTS[2], "header"),
    ] {
        let seen = node.run(&world, ["talk", transports, how], &world.token).await;
        let transport = if transports == "polling" { "polling" } else { "websocket" };
        assert_eq!((&seen["end"], &seen["transport"]), (&"done".into(), &transport.into()), "{seen}");
        assert_eq!((&seen["echoed"], &seen["acknowledged"]), (&true.into(), &true.into()), "{seen}");
        assert_eq!(seen["upgraded"], transports == TRANSPORTS[0], "{seen}");
    }
    let received = world.simulator.received();
    assert!(received.iter().all(|request| request.uri.query().unwrap().contains(&world.key)));
    assert!(received.iter().all(|request| request.uri.query().unwrap().contains("voice=mekdes")));
    let sent = received.iter().flat_map(|request| {
        let head = format!("{} {:?}", request.uri, request.headers.values());
        [head.into_bytes(), request.body.to_vec()]
    });
    for sent in sent {
        let found = sent.windows(world.token.len()).any(|window| window == world.token.as_bytes());
        assert!(!found, "the API received the caller's token: {}", String::from_utf8_lossy(&sent));
    }
}

#[tokio::test]
async fn the_javascript_client_learns_why_it_is_refused() {
    let Some(node) = Node::install().await else { return };
    let world = world().await;
    for transports in TRANSPORTS {
        let seen = node.run(&world, ["talk", transports, "query"], "wrong-token").await;
        assert_eq!(seen["end"], "connect error", "{seen}");
        if transports != "websocket" {
            assert_eq!(seen["status"], 401, "{seen}");
            assert!(seen["body"].as_str().unwrap().contains("invalid_api_key"), "{seen}");
        }
    }
    assert_eq!(world.simulator.requests(), 0, "the API saw none of them");

    for transports in TRANSPORTS {
        let seen = node.run(&world, ["namespace", transports, "query"], &world.token).await;
        assert_eq!(seen["end"], "connect error", "{seen}");
        if transports == "websocket" {
            assert_eq!(seen["message"], "Invalid namespace", "{seen}");
        } else {
            assert_eq!(seen["status"], 403, "{seen}");
        }
    }
    let bodies = world.simulator.received().into_iter().map(|request| request.body);
    assert!(bodies.into_iter().all(|body| body.is_empty()), "no packet was forwarded");
}

/// The API's own refusal, in both ways that it may choose.
#[tokio::test]
async fn the_javascript_client_sees_the_refusals_of_the_api() {
    let Some(node) = Node::install().await else { return };
    let world = world().await;
    world.simulator.expire_jwts();
    let seen = node.run(&world, ["talk", "polling", "query"], &world.token).await;
    assert_eq!((&seen["end"], &seen["status"]), (&"connect error".into(), &401.into()), "{seen}");
    world.simulator.refuse_in_voice_namespace(true);
    for transports in TRANSPORTS {
        let seen = node.run(&world, ["talk", transports, "query"], &world.token).await;
        assert_eq!(
            (&seen["end"], &seen["data"]["code"]),
            (&"connect error".into(), &"invalid_token".into()),
            "{seen}"
        );
    }
}

/// K1: a session outlives its key, and the next one uses the new key.
#[tokio::test]
async fn a_rotated_key_ends_no_session() {
    let Some(node) = Node::install().await else { return };
    let world = world().await;
    for transports in ["polling,websocket", "polling"] {
        let mut first = node.start(&world, ["stay", transports, "query"], &world.token);
        assert_eq!(first.next().await["ready"], true);
        let old = std::fs::read_to_string(world.proxy.scratch().path("key")).unwrap();
        let new = secret(world.simulator.issue_key());
        world.proxy.scratch().write("key", &new);
        world.simulator.revoke_key(&old);

        let second = node.run(&world, ["talk", transports, "query"], &world.token).await;
        assert_eq!(second["end"], "done", "{second}");
        assert!(world.simulator.received().last().unwrap().uri.query().unwrap().contains(&new));
        first.proceed().await;
        let end = first.next().await;
        assert_eq!((&end["end"], &end["again"]), (&"done".into(), &"again".into()), "{end}");
    }
}

#[tokio::test]
async fn a_shutdown_lets_sessions_end() {
    let Some(node) = Node::install().await else { return };
    let mut world = world().await;
    let mut client = node.start(&world, ["stay", "websocket", "query"], &world.token);
    assert_eq!(client.next().await["ready"], true);
    world.proxy.terminate();
    world.proxy.logs("shutting down").await;
    client.proceed().await;
    assert_eq!(client.next().await["again"], "again");
    assert!(world.proxy.exit_status().await.success());

    let mut world = self::world().await;
    let mut client = node.start(&world, ["stay", "websocket", "query"], &world.token);
    assert_eq!(client.next().await["ready"], true);
    world.proxy.terminate();
    world.proxy.logs("shutting down").await;
    world.proxy.terminate();
    assert!(world.proxy.exit_status().await.success());
    assert_eq!(client.next().await["end"], "disconnected");
}

#[tokio::test]
async fn the_python_client_talks_to_the_agent() {
    let python = match python::install("socketio", PYTHON_CLIENT).await {
        Ok(python) => python,
        Err(why) => return npm::skip("the test with python-socketio", &why),
    };
    let world = world().await;
    let run = async |transports: &str, namespace: &str, token: &str| {
        let mut command = Command::new(&python);
        command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/socketio.py"));
        command.arg(world.url()).args([transports, namespace]);
        command.env("CLIENT_TOKEN", token).env("NO_PROXY", "*").kill_on_drop(true);
        let output = time::timeout(TIMEOUT, command.output()).await.unwrap().unwrap();
        let (stdout, stderr) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{stdout}{stderr}");
        assert_clean("output of the client", stdout.replace(token, "").as_bytes());
        stdout.into_owned()
    };
    for transports in TRANSPORTS {
        let output = run(transports, "/v1/audio/agent", &world.token).await;
        let transport = if transports == "polling" { "polling" } else { "websocket" };
        assert_eq!(output, format!("{transport}\nall is well\n"));
        for (namespace, token) in [("/v1/audio/agent", "wrong-token"), ("/other", &*world.token)] {
            let output = run(transports, namespace, token).await;
            assert!(output.starts_with("ConnectionError: "), "{transports} {namespace}: {output}");
        }
    }
}
