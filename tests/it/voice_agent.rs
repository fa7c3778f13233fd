//! Tests the simulator's voice agent: Engine.IO and Socket.IO, packet by packet.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use http::{Method, Request, StatusCode};
use http_body_util::BodyExt;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::time::timeout;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, protocol::Role},
};
use tower::ServiceExt;
use tower_selam::simulator::{JwtAlgorithm, Server, Simulator};

use crate::support::{Body, HANG, Http, handshake, https, voice_agent};

const CONNECT: &str = "40/v1/audio/agent,";

/// A client that polls in process.
struct Client {
    simulator: Simulator,
    credentials: String,
    sid: String,
}

/// Returns a key, and the query with it and a JWT.
fn issue(simulator: &Simulator) -> (String, String) {
    let key = simulator.issue_key();
    let jwt = simulator.mint_jwt(JwtAlgorithm::Hs256, Duration::from_secs(3600));
    let query = format!("&token={jwt}&api_key={key}");
    (key, query)
}

async fn call(simulator: &Simulator, method: Method, query: &str, body: &str) -> (u16, String) {
    let request = Request::builder().method(method).uri(format!("/socket.io/?{query}"));
    let response = simulator.clone().oneshot(request.body(body.to_owned()).unwrap()).await.unwrap();
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

impl Client {
    async fn open(simulator: &Simulator, credentials: &str) -> Self {
        let query = format!("EIO=4&transport=polling{credentials}");
        let (status, open) = call(simulator, Method::GET, &query, "").await;
        assert_eq!(status, 200, "{open}");
        let open: Value = serde_json::from_str(open.strip_prefix('0').unwrap()).unwrap();
        assert_eq!((&open["upgrades"][0], &open["maxPayload"]), (&"websocket".into(), &1_000_000.into()));
        let sid = open["sid"].as_str().unwrap().to_owned();
        Self { simulator: simulator.clone(), credentials: credentials.to_owned(), sid }
    }

    async fn call(&self, method: Method, body: &str) -> (u16, String) {
        let query = format!("EIO=4&transport=polling&sid={}{}", self.sid, self.credentials);
        call(&self.simulator, method, &query, body).await
    }

    async fn send(&self, packets: &str) {
        assert_eq!(self.call(Method::POST, packets).await, (200, "ok".to_owned()));
    }

    async fn poll(&self) -> String {
        let (status, packets) = self.call(Method::GET, "").await;
        assert_eq!(status, 200, "{packets}");
        packets
    }
}

#[tokio::test]
async fn events_are_echoed_and_acknowledged() {
    let simulator = Simulator::new();
    let client = Client::open(&simulator, &issue(&simulator).1).await;
    client.send(CONNECT).await;
    assert!(client.poll().await.starts_with(r#"40/v1/audio/agent,{"sid":""#));
    for (sent, received) in [
        (r#"42/v1/audio/agent,["say","\u1230",1]"#, r#"42/v1/audio/agent,["say","ሰ",1]"#),
        (
            r#"42/v1/audio/agent,7["say",{"a":[]}]"#,
            "42/v1/audio/agent,[\"say\",{\"a\":[]}]\x1e43/v1/audio/agent,7[{\"a\":[]}]",
        ),
        (
            "451-/v1/audio/agent,3[\"audio\",{\"_placeholder\":true,\"num\":0}]\x1ebAQID",
            "451-/v1/audio/agent,[\"audio\",{\"_placeholder\":true,\"num\":0}]\x1ebAQID\x1e\
             461-/v1/audio/agent,3[{\"_placeholder\":true,\"num\":0}]\x1ebAQID",
        ),
    ] {
        client.send(sent).await;
        assert_eq!(client.poll().await, received);
    }
    // An attachment may come later.
    client.send("451-/v1/audio/agent,[\"a\",{\"_placeholder\":true,\"num\":0}]").await;
    client.send("bAA==").await;
    assert_eq!(client.poll().await, "451-/v1/audio/agent,[\"a\",{\"_placeholder\":true,\"num\":0}]\x1ebAA==");
    client.send("41/v1/audio/agent,").await;
    client.send("1").await;
    assert_eq!(client.call(Method::GET, "").await.0, 400);
}

#[tokio::test]
async fn bad_credentials_are_refused() {
    let simulator = Simulator::new();
    let (key, good) = issue(&simulator);
    let limited = good.replace(&key, &simulator.issue_limited_key());
    let wrong_key = good.replace(&key, "sk-selam-unknown");
    let wrong_jwt = format!("&token=a.b.c&api_key={key}");
    let cases = [
        ("", 401, "missing_api_key"),
        (&*wrong_key, 401, "invalid_api_key"),
        (&*wrong_jwt, 401, "invalid_token"),
        (&*limited, 403, "insufficient_permissions"),
    ];
    for (credentials, status, code) in cases {
        for (transport, method) in [("polling", Method::GET), ("websocket", Method::GET)] {
            let query = format!("EIO=4&transport={transport}{credentials}");
            let (answered, body) = call(&simulator, method, &query, "").await;
            assert_eq!(answered, status, "{body}");
            assert_eq!(serde_json::from_str::<Value>(&body).unwrap()["error"]["code"], code);
        }
    }
    // As a middleware of a namespace does it.
    simulator.refuse_in_voice_namespace(true);
    for (credentials, _, code) in cases {
        let client = Client::open(&simulator, credentials).await;
        client.send(CONNECT).await;
        let refused = client.poll().await;
        let error: Value = serde_json::from_str(refused.strip_prefix("44/v1/audio/agent,").unwrap()).unwrap();
        assert_eq!(error["data"]["code"], code);
        client.send(r#"42/v1/audio/agent,["not connected"]"#).await;
        assert_eq!(client.call(Method::GET, "").await.0, 400, "the session has ended");
    }
}

#[tokio::test]
async fn a_session_outlives_its_key() {
    let simulator = Simulator::new();
    let (key, credentials) = issue(&simulator);
    let client = Client::open(&simulator, &credentials).await;
    client.send(CONNECT).await;
    client.poll().await;
    let late = Client::open(&simulator, &credentials).await;
    simulator.revoke_key(&key);
    client.send(r#"42/v1/audio/agent,["still here"]"#).await;
    assert_eq!(client.poll().await, r#"42/v1/audio/agent,["still here"]"#);
    // The namespace is entered with credentials that are valid then.
    late.send(CONNECT).await;
    assert!(late.poll().await.starts_with("44/v1/audio/agent,"));
}

#[tokio::test]
async fn other_namespaces_do_not_exist() {
    let simulator = Simulator::new();
    let client = Client::open(&simulator, &issue(&simulator).1).await;
    client.send("40").await;
    assert_eq!(client.poll().await, r#"44{"message":"Invalid namespace"}"#);
    client.send("40/v1/audio/agents,").await;
    assert_eq!(client.poll().await, r#"44/v1/audio/agents,{"message":"Invalid namespace"}"#);
}

#[tokio::test]
async fn requests_are_refused_as_by_engine_io() {
    let simulator = Simulator::new();
    let (_, credentials) = issue(&simulator);
    let client = Client::open(&simulator, &credentials).await;
    let known = format!("EIO=4&sid={}", client.sid);
    for (method, query, code) in [
        (Method::GET, "EIO=4".to_owned(), 0),
        (Method::GET, "EIO=4&transport=webtransport".to_owned(), 0),
        (Method::GET, "EIO=4&transport=polling&sid=unknown".to_owned(), 1),
        (Method::POST, format!("EIO=4&transport=polling{credentials}"), 2),
        (Method::PUT, format!("{known}&transport=polling"), 3),
        (Method::POST, format!("{known}&transport=websocket"), 3),
        (Method::GET, format!("EIO=3&transport=polling{credentials}"), 5),
    ] {
        let (status, body) = call(&simulator, method, &query, "").await;
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!((status, &body["code"]), (400, &code.into()), "{query}");
    }
    // A packet that is not one ends the session.
    client.send("9").await;
    assert_eq!(client.call(Method::GET, "").await.0, 400);
    assert_eq!(simulator.received().len(), 10, "all are recorded");
}

#[tokio::test(start_paused = true)]
async fn clients_are_pinged_and_must_answer() {
    let simulator = Simulator::new();
    simulator.set_voice_agent_pings(Duration::from_secs(10), Duration::from_secs(5));
    let client = Client::open(&simulator, &issue(&simulator).1).await;
    for _ in 0..3 {
        let start = tokio::time::Instant::now();
        assert_eq!(client.poll().await, "2");
        assert_eq!(start.elapsed().as_secs(), 10);
        client.send("3").await;
    }
    assert_eq!(client.poll().await, "2");
    let start = tokio::time::Instant::now();
    assert_eq!(client.poll().await, "1", "the pong is missing");
    assert_eq!(start.elapsed().as_secs(), 5);
    assert_eq!(client.call(Method::GET, "").await.0, 400);
}

async fn websocket(server: &Server, query: &str) -> WebSocketStream<TokioIo<Upgraded>> {
    let request = handshake(&format!("{}{query}", voice_agent(server))).map(|()| Body::default());
    let mut response = https(server, Http::One).request(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    let stream = TokioIo::new(hyper::upgrade::on(&mut response).await.unwrap());
    WebSocketStream::from_raw_socket(stream, Role::Client, None).await
}

async fn next(socket: &mut WebSocketStream<TokioIo<Upgraded>>) -> Message {
    timeout(HANG, socket.next()).await.unwrap().unwrap().unwrap()
}

#[tokio::test]
async fn a_session_changes_from_polling_to_websocket() {
    let simulator = Simulator::new();
    let server = Server::tls(&simulator).await.unwrap();
    let client = Client::open(&simulator, &issue(&simulator).1).await;
    client.send(CONNECT).await;
    client.poll().await;

    let mut socket = websocket(&server, &format!("&sid={}", client.sid)).await;
    let waiting = async {
        assert_eq!(client.poll().await, "6", "the request that polls is released");
    };
    let probing = async {
        socket.send(Message::text("2probe")).await.unwrap();
        assert_eq!(next(&mut socket).await, Message::text("3probe"));
    };
    tokio::join!(waiting, probing);
    socket.send(Message::text("5")).await.unwrap();
    let event = "451-/v1/audio/agent,[\"audio\",{\"_placeholder\":true,\"num\":0}]";
    socket.send(Message::text(event)).await.unwrap();
    socket.send(Message::binary(vec![1, 2, 3])).await.unwrap();
    assert_eq!(next(&mut socket).await, Message::text(event));
    assert_eq!(next(&mut socket).await, Message::binary(vec![1, 2, 3]));
    assert_eq!(client.call(Method::GET, "").await.0, 400, "polling is over");
    socket.send(Message::text("1")).await.unwrap();
    assert!(next(&mut socket).await.is_close());
}

#[tokio::test]
async fn a_session_may_begin_with_websocket() {
    let simulator = Simulator::new();
    simulator.set_voice_agent_pings(Duration::from_millis(20), Duration::from_secs(20));
    let server = Server::tls(&simulator).await.unwrap();
    let mut socket = websocket(&server, &issue(&simulator).1).await;
    let open = next(&mut socket).await;
    assert!(open.to_text().unwrap().starts_with("0{"), "{open}");
    assert_eq!(next(&mut socket).await, Message::text("2"));
    socket.send(Message::text("3")).await.unwrap();
    assert_eq!(next(&mut socket).await, Message::text("2"));
    drop(server);
    let end = timeout(HANG, socket.next()).await.unwrap();
    assert!(!matches!(end, Some(Ok(_))), "the server is gone");
}
