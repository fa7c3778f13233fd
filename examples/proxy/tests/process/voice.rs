//! The voice agent, packet by packet: who may talk to it, and what passes.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use http::{Method, Request, Response};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Message,
        protocol::{Role, frame::coding::CloseCode},
    },
};
use tower_selam::simulator::{JwtAlgorithm, Server, Simulator};

use crate::support::{
    Answer, Caller, Exchange, Launch, Protocol, Proxy, TlsListener, assert_clean, full, random, raw, read,
    read_head, response_head, secret, with_timeout,
};

pub(crate) const CONNECT: &str = "40/v1/audio/agent,";
pub(crate) const EVENT: &str = r#"42/v1/audio/agent,["say","Selam!"]"#;
const BINARY_EVENT: &str = r#"451-/v1/audio/agent,["a",{"_placeholder":true,"num":0}]"#;

struct World {
    simulator: Simulator,
    _api: Server,
    proxy: Proxy,
    web: String,
    app: String,
    key: String,
    jwt: String,
}

async fn world(arguments: &[&str]) -> World {
    let simulator = Simulator::new();
    let api = Server::tls(&simulator).await.unwrap();
    let key = secret(simulator.issue_key());
    let jwt = secret(simulator.mint_jwt(JwtAlgorithm::Hs256, Duration::from_secs(3600)));
    let (web, app) = (secret(random()), secret(random()));
    let launch = Launch::for_api(&api).env("SELAM_API_KEY", &key).env("SELAM_JWT", &jwt);
    let launch = launch.callers(&format!("web:{web}\napp:{app}\n")).args(arguments);
    World { simulator, _api: api, proxy: launch.start().await, web, app, key, jwt }
}

/// A proxy for an API that the test plays.
async fn launch(base_url: &impl crate::support::Api) -> (Proxy, String) {
    let key = secret(format!("sk-selam-{}", random()));
    let jwt = secret(format!("{}.{}.{}", random(), random(), random()));
    let token = secret(random());
    let launch = Launch::for_api(base_url).env("SELAM_API_KEY", &key).env("SELAM_JWT", jwt);
    let launch = launch.callers(&format!("web:{token}\n")).arg("--voice-agent");
    (launch.start().await, token)
}

/// A client that polls.
pub(crate) struct Poller {
    pub(crate) caller: Caller,
    pub(crate) sid: String,
}

pub(crate) fn path(query: &str) -> String {
    format!("/socket.io/?EIO=4&transport=polling{query}")
}

fn sid(answer: &Answer) -> String {
    assert_eq!(answer.status, 200, "{}", answer.text());
    let open: Value = serde_json::from_str(answer.text().strip_prefix('0').unwrap()).unwrap();
    open["sid"].as_str().unwrap().to_owned()
}

impl Poller {
    pub(crate) async fn open(proxy: &Proxy, token: &str) -> Self {
        let caller = Caller::http1(proxy).with_token(token);
        let sid = sid(&caller.get(&path("")).await);
        Self { caller, sid }
    }

    fn path(&self) -> String {
        path(&format!("&sid={}", self.sid))
    }

    pub(crate) async fn send(&self, packets: impl Into<bytes::Bytes>) -> Answer {
        self.caller.post(&self.path(), packets).await
    }

    pub(crate) async fn poll(&self) -> Answer {
        self.caller.get(&self.path()).await
    }
}

pub(crate) type Socket = WebSocketStream<TcpStream>;

pub(crate) async fn handshake(proxy: &Proxy, token: &str, query: &str) -> (TcpStream, String) {
    let mut stream = raw(proxy).await;
    let head = format!(
        "GET /socket.io/?EIO=4&transport=websocket{query} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n\
         Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
         Sec-WebSocket-Extensions: permessage-deflate\r\nAuthorization: Bearer {token}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let head = response_head(&mut stream).await;
    (stream, head)
}

pub(crate) async fn socket(proxy: &Proxy, token: &str, query: &str) -> Socket {
    let (stream, head) = handshake(proxy, token, query).await;
    assert!(head.starts_with("HTTP/1.1 101 ") && !head.to_ascii_lowercase().contains("extensions"), "{head}");
    WebSocketStream::from_raw_socket(stream, Role::Client, None).await
}

/// Returns the next message, which contains no secret.
pub(crate) async fn next(socket: &mut Socket) -> Message {
    let message = with_timeout(socket.next()).await.expect("a message").unwrap();
    assert_clean("a message", message.to_string().as_bytes());
    message
}

/// Opens a session on a WebSocket and enters the namespace.
async fn connected(world: &World) -> Socket {
    let mut socket = socket(&world.proxy, &world.web, "").await;
    assert!(next(&mut socket).await.to_text().unwrap().starts_with("0{"));
    socket.send(Message::text(CONNECT)).await.unwrap();
    assert!(next(&mut socket).await.to_text().unwrap().starts_with(CONNECT));
    socket
}

async fn close_code(socket: &mut Socket) -> CloseCode {
    match next(socket).await {
        Message::Close(Some(frame)) => frame.code,
        other => panic!("{other:?}"),
    }
}

async fn metric(world: &World, name: &str) -> String {
    let metrics = Caller::http1(&world.proxy).with_token(&world.web).get("/metrics").await;
    let line = metrics.text().lines().find_map(|line| line.strip_prefix(name)).unwrap_or("");
    line.trim().to_owned()
}

#[tokio::test]
async fn polling_passes_with_the_proxys_credentials() {
    let world = world(&["--voice-agent"]).await;
    let caller = Caller::http2(&world.proxy);
    let token = format!("&token={}&voice=a%20b", world.web);
    let sid = sid(&caller.get(&path(&token)).await);
    let path = path(&format!("&sid={sid}&api_key={}", world.web));
    assert_eq!(caller.post(&path, CONNECT).await.text(), "ok");
    assert!(caller.get(&path).await.text().starts_with(CONNECT));
    assert_eq!(caller.post(&path, format!("{EVENT}\x1e{BINARY_EVENT}\x1ebAQID")).await.text(), "ok");
    assert_eq!(caller.get(&path).await.text(), format!("{EVENT}\x1e{BINARY_EVENT}\x1ebAQID"));
    assert_eq!(metric(&world, "selam_proxy_voice_sessions ").await, "1");
    assert_eq!(caller.post(&path, "1").await.text(), "ok");
    assert_eq!(metric(&world, "selam_proxy_voice_sessions ").await, "0");

    let received = world.simulator.received();
    let ours = format!("token={}&api_key={}", world.jwt, world.key);
    assert_eq!(received[0].uri.path(), "/socket.io/");
    assert_eq!(received[0].uri.query().unwrap(), format!("EIO=4&transport=polling&voice=a%20b&{ours}"));
    for request in received {
        assert!(request.uri.query().unwrap().ends_with(&ours));
        for header in ["authorization", "x-api-key", "accept-encoding", "cookie"] {
            assert!(!request.headers.contains_key(header), "{header}");
        }
    }
    assert_eq!(metric(&world, r#"selam_proxy_voice_handshakes_total{transport="polling"}"#).await, "1");
}

#[tokio::test]
async fn a_websocket_passes_and_ends() {
    let world = world(&["--voice-agent"]).await;
    let mut socket = connected(&world).await;
    socket.send(Message::Ping("x".into())).await.unwrap();
    assert!(next(&mut socket).await.is_pong());
    socket.send(Message::text(BINARY_EVENT)).await.unwrap();
    socket.send(Message::binary(vec![7; 500_000])).await.unwrap();
    assert_eq!(next(&mut socket).await, Message::text(BINARY_EVENT));
    assert_eq!(next(&mut socket).await, Message::binary(vec![7; 500_000]));
    assert_eq!(metric(&world, "selam_proxy_voice_sessions ").await, "1");
    socket.close(None).await.unwrap();
    while socket.next().await.is_some() {}
    let line = world.proxy.logs("end=\"complete\"").await;
    assert!(line.contains("status=101") && line.contains("path=\"/socket.io/\""), "{line}");
    assert_eq!(metric(&world, "selam_proxy_voice_sessions ").await, "0");
}

/// A session cannot be taken over with its id.
#[tokio::test]
async fn a_session_belongs_to_its_caller() {
    let world = world(&["--voice-agent"]).await;
    let owner = Poller::open(&world.proxy, &world.web).await;
    let seen = world.simulator.requests();
    let thief = Poller { caller: Caller::http1(&world.proxy).with_token(&world.app), sid: owner.sid.clone() };
    thief.poll().await.assert_error(400, "invalid_request_error", "unknown_session");
    thief.send(CONNECT).await.assert_error(400, "invalid_request_error", "unknown_session");
    let (_, head) = handshake(&world.proxy, &world.app, &format!("&sid={}", owner.sid)).await;
    assert!(head.starts_with("HTTP/1.1 400 "), "{head}");
    let unknown = Poller { sid: "unknown".to_owned(), ..Poller::open(&world.proxy, &world.app).await };
    unknown.poll().await.assert_error(400, "invalid_request_error", "unknown_session");
    let stranger = Caller::http1(&world.proxy);
    stranger.get(&owner.path()).await.assert_error(401, "authentication_error", "missing_api_key");
    let wrong = stranger.get(&path("&token=wrong")).await;
    wrong.assert_error(401, "authentication_error", "invalid_api_key");
    assert_eq!(world.simulator.requests(), seen + 1, "only the handshake of the other caller");
    assert_eq!(owner.send(CONNECT).await.text(), "ok");
}

/// Packets of a session come in bodies first and on one WebSocket then, never on both.
#[tokio::test]
async fn a_session_moves_to_one_websocket() {
    let world = world(&["--voice-agent"]).await;
    let poller = Poller::open(&world.proxy, &world.web).await;
    assert_eq!(poller.send(CONNECT).await.text(), "ok");
    assert!(poller.poll().await.text().starts_with(CONNECT));
    let query = format!("&sid={}", poller.sid);
    let probed = async || {
        let mut socket = socket(&world.proxy, &world.web, &query).await;
        socket.send(Message::text("2probe")).await.unwrap();
        assert_eq!(next(&mut socket).await, Message::text("3probe"));
        socket
    };
    let refused = async |early: Message| {
        let mut socket = probed().await;
        socket.send(early).await.unwrap();
        assert_eq!(close_code(&mut socket).await, CloseCode::Policy);
    };
    refused(Message::text(EVENT)).await;
    refused(Message::text(CONNECT)).await;
    assert_eq!(poller.send(BINARY_EVENT).await.text(), "ok");
    refused(Message::binary("attached")).await;
    let (mut moved, mut late) = (probed().await, probed().await);
    moved.send(Message::text("5")).await.unwrap();
    // The attachment was announced in a body.
    moved.send(Message::binary("attached")).await.unwrap();
    assert_eq!(next(&mut moved).await, Message::text(BINARY_EVENT));
    assert_eq!(next(&mut moved).await, Message::binary("attached"));
    late.send(Message::text("5")).await.unwrap();
    assert_eq!(close_code(&mut late).await, CloseCode::Policy);
    poller.send(BINARY_EVENT).await.assert_error(400, "invalid_request_error", "invalid_request");
    poller.poll().await.assert_error(400, "invalid_request_error", "invalid_request");
    let (_, head) = handshake(&world.proxy, &world.web, &query).await;
    assert!(head.starts_with("HTTP/1.1 400 "), "{head}");
    moved.send(Message::text(EVENT)).await.unwrap();
    assert_eq!(next(&mut moved).await, Message::text(EVENT));
}

#[tokio::test]
async fn bodies_with_other_packets_are_refused() {
    let world = world(&["--voice-agent"]).await;
    let poller = Poller::open(&world.proxy, &world.web).await;
    let large = format!("{EVENT}{}", " ".repeat(1024 * 1024));
    for (body, status, code) in [
        ("40/other,", 403, "insufficient_permissions"),
        ("40", 403, "insufficient_permissions"),
        ("40/v1/audio/agent,\x1e42/other,[]", 403, "insufficient_permissions"),
        ("421-/other,[]", 403, "insufficient_permissions"),
        ("", 400, "invalid_packet"),
        ("9", 400, "invalid_packet"),
        ("bAQID", 400, "invalid_packet"),
        ("40/v1/audio/agent,[]", 400, "invalid_packet"),
        (&large, 413, "request_too_large"),
    ] {
        let answer = poller.send(body.to_owned()).await;
        assert_eq!((answer.status.as_u16(), &*answer.error().1), (status, code), "{body:.40}");
    }
    let encoded = poller.caller.request(Method::POST, &poller.path()).header("content-encoding", "gzip");
    let answer = read(poller.caller.send(encoded.body(full(CONNECT)).unwrap()).await).await;
    answer.assert_error(400, "invalid_request_error", "invalid_packet");
    for query in ["&EIO=4", "&transport=websocket", "&j=1", "&x=1;sid=y"] {
        let answer = poller.caller.get(&path(query)).await;
        answer.assert_error(400, "invalid_request_error", "invalid_request");
    }
    assert_eq!(world.simulator.requests(), 1, "the handshake alone");
    let refused = "selam_proxy_voice_refused_packets_total";
    assert_eq!(metric(&world, &format!(r#"{refused}{{from="caller",reason="namespace"}}"#)).await, "4");
    assert_eq!(metric(&world, &format!(r#"{refused}{{from="caller",reason="too_large"}}"#)).await, "1");
    assert_eq!(poller.send(CONNECT).await.text(), "ok", "the session is still open");
}

/// A masked frame of RFC 6455 section 5.2, with a mask of zeros.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![first];
    match payload.len() {
        length @ 0..126 => frame.push(0x80 | length as u8),
        length => {
            frame.push(0xfe);
            frame.extend((length as u16).to_be_bytes());
        }
    }
    frame.extend([0; 4]);
    frame.extend(payload);
    frame
}

#[tokio::test]
async fn hostile_frames_end_the_connection() {
    let world = world(&["--voice-agent"]).await;
    const TEXT: u8 = 0x81;
    let (policy, size) = (CloseCode::Policy, CloseCode::Size);
    for (frames, code) in [
        (frame(TEXT, b"42/other,[]"), policy),
        (frame(TEXT, b"42[]"), policy),
        (frame(TEXT, b"9"), policy),
        (frame(TEXT, b""), policy),
        (frame(TEXT, b"0{}"), policy),
        (frame(TEXT, b"41\xff"), policy),
        // Fragments, with a control frame in between.
        ([frame(0x01, b"42/v1/audio/ag"), frame(0x89, b""), frame(0x80, b"ents,[]")].concat(), policy),
        ([frame(0x01, b"4"), frame(0x00, b"2"), frame(0x80, b"/other,[]")].concat(), policy),
        // A binary frame that was not announced, and one too many.
        (frame(0x82, b"\x84\xa4type"), policy),
        ([frame(TEXT, BINARY_EVENT.as_bytes()), frame(TEXT, EVENT.as_bytes())].concat(), policy),
        // Compressed, reserved, a continuation of nothing, and without a mask.
        (frame(0xc1, b"2"), policy),
        (frame(0x83, b""), policy),
        (frame(0x80, b"x"), policy),
        (vec![TEXT, 1, b'3'], policy),
        // A gigabyte is announced, and a megabyte in pieces is sent.
        ([&[TEXT, 0xff][..], &(1_u64 << 30).to_be_bytes(), &[0; 4]].concat(), size),
        (
            [frame(0x01, b"42/v1/audio/agent,[")]
                .into_iter()
                .chain((0..17).map(|_| frame(0x00, &[b' '; 65_000])))
                .flatten()
                .collect(),
            size,
        ),
    ] {
        let mut socket = connected(&world).await;
        let forwarded = world.simulator.requests();
        let _ = socket.get_mut().write_all(&frames).await;
        let shown = String::from_utf8_lossy(&frames[..frames.len().min(40)]).into_owned();
        let mut end = next(&mut socket).await;
        while end.is_pong() {
            end = next(&mut socket).await;
        }
        let Message::Close(Some(close)) = end else { panic!("{shown}: {end:?}") };
        assert_eq!(close.code, code, "{shown}");
        assert_eq!(world.simulator.requests(), forwarded);
    }
}

#[tokio::test]
async fn a_connect_to_another_namespace_is_answered() {
    let world = world(&["--voice-agent"]).await;
    let mut socket = connected(&world).await;
    for _ in 0..20 {
        socket.send(Message::text("40/other,{}")).await.unwrap();
    }
    for _ in 0..20 {
        let answer = r#"44/other,{"message":"Invalid namespace"}"#;
        assert_eq!(next(&mut socket).await, Message::text(answer));
    }
    socket.send(Message::text(EVENT)).await.unwrap();
    assert_eq!(next(&mut socket).await, Message::text(EVENT), "the session is still open");
}

/// A text frame of a server.
fn text(payload: &str) -> Vec<u8> {
    assert!(payload.len() < 126);
    [&[0x81, payload.len() as u8], payload.as_bytes()].concat()
}

const SWITCHED: &str = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
    Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n";

/// The API may echo the query of the handshake, and send what a client should not get.
#[tokio::test]
async fn what_the_api_sends_is_checked_and_masked() {
    let api = TlsListener::listen(Protocol::Http1).await;
    let (proxy, token) = launch(&api).await;
    for (sent, received) in [
        (r#"42/v1/audio/agent,["a"]"#, Some(r#"42/v1/audio/agent,["a"]"#)),
        (r#"42["a"]"#, None),
        (r#"42/other,["a"]"#, None),
        (r#"0{"sid":"again"}"#, None),
        ("5", None),
    ] {
        let stream = tokio::spawn({
            let address = proxy.address();
            let token = token.clone();
            async move {
                let mut stream = TcpStream::connect(address).await.unwrap();
                let head = format!(
                    "GET /socket.io/?EIO=4&transport=websocket&token={token} HTTP/1.1\r\nHost: localhost\r\n\
                     Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
                     Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n"
                );
                stream.write_all(head.as_bytes()).await.unwrap();
                let head = response_head(&mut stream).await;
                (head, WebSocketStream::from_raw_socket(stream, Role::Client, None).await)
            }
        });
        let mut connection = api.accept().await;
        let head = read_head(&mut connection).await;
        let query = head.split(' ').nth(1).unwrap().split_once('?').unwrap().1;
        assert!(!head.contains(&token) && !head.to_ascii_lowercase().contains("extensions"), "{head}");
        let jwt = query.split('&').find_map(|part| part.strip_prefix("token=")).unwrap();
        let answer = format!("{SWITCHED}X-Echo: {jwt}\r\n\r\n");
        connection.write_all(answer.as_bytes()).await.unwrap();
        connection.write_all(&text(&format!(r#"0{{"sid":"{}"}}"#, random()))).await.unwrap();
        connection
            .write_all(&text(&format!(r#"44/v1/audio/agent,{{"message":"{}"}}"#, &jwt[..80])))
            .await
            .unwrap();
        connection.write_all(&text(sent)).await.unwrap();
        // Code 1000, with the JWT as the reason.
        let reason = [&1000_u16.to_be_bytes()[..], jwt.as_bytes()].concat();
        connection.write_all(&[&[0x88, reason.len() as u8], &*reason].concat()).await.unwrap();
        let (head, mut socket) = with_timeout(stream).await.unwrap();
        assert!(!head.contains(jwt), "{head}");
        assert!(next(&mut socket).await.to_text().unwrap().starts_with(r#"0{"sid":""#));
        let echo = next(&mut socket).await;
        assert!(
            echo.to_text().unwrap().contains("********") && !echo.to_text().unwrap().contains(&jwt[..12]),
            "{echo}"
        );
        match received {
            Some(received) => {
                assert_eq!(next(&mut socket).await, Message::text(received));
                let Message::Close(Some(close)) = next(&mut socket).await else { panic!("no reason") };
                assert_eq!((close.code, &*close.reason), (CloseCode::Normal, &*"*".repeat(jwt.len())));
            }
            None => assert_eq!(close_code(&mut socket).await, CloseCode::Away),
        }
    }
    // An extension that was not offered.
    let handshake = tokio::spawn({
        let stream = raw(&proxy).await;
        async move {
            let mut stream = stream;
            let head = format!(
                "GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: {token}\r\n\
                 Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
            );
            stream.write_all(head.as_bytes()).await.unwrap();
            response_head(&mut stream).await
        }
    });
    let mut connection = api.accept().await;
    read_head(&mut connection).await;
    let answer = format!("{SWITCHED}Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n");
    connection.write_all(answer.as_bytes()).await.unwrap();
    let head = with_timeout(handshake).await.unwrap();
    assert!(head.starts_with("HTTP/1.1 502 "), "{head}");
}

fn answered(body: impl Into<bytes::Bytes>) -> Response<crate::support::Body> {
    Response::builder().status(200).body(full(body)).unwrap()
}

/// The same while polling; and the caller's token leaves the `auth` of the packet that enters the namespace.
#[tokio::test]
async fn polled_packets_are_checked_and_masked() {
    let mut api = TlsListener::listen(Protocol::Http1).await.exchanges();
    let (proxy, token) = launch(&api).await;
    let caller = Caller::http1(&proxy).with_token(&token);
    let get = async |api: &mut crate::support::Exchanges,
                     query: &str,
                     answer: &dyn Fn(&Exchange) -> Response<crate::support::Body>| {
        let path = path(query);
        let exchange = async {
            let exchange = api.next().await;
            let response = answer(&exchange);
            exchange.answer(response);
        };
        tokio::join!(caller.get(&path), exchange).0
    };
    let opened = get(&mut api, "", &|_| answered(r#"0{"sid":"a","pingInterval":60000}"#)).await;
    assert_eq!(sid(&opened), "a");
    let echo = get(&mut api, "&sid=a", &|exchange| {
        let query = exchange.request.uri().query().unwrap();
        answered(format!(r#"42/v1/audio/agent,["{query}"]"#))
    });
    let echo = echo.await;
    assert!(
        echo.text().starts_with(r#"42/v1/audio/agent,["EIO=4&transport=polling&sid=a&token=***"#),
        "{}",
        echo.text()
    );
    for bad in ["42[\"a\"]", "0{\"sid\":\"b\"}", "x", "bAQID", "", "\u{1e}6"] {
        let answer = get(&mut api, "&sid=a", &|_| answered(bad)).await;
        answer.assert_error(502, "api_error", "upstream_unavailable");
    }
    for bad in ["6", "0{}", r#"0{"sid":"a"}"#, r#"0{"sid":"x y"}"#] {
        let answer = get(&mut api, "", &|_| answered(bad)).await;
        answer.assert_error(502, "api_error", "upstream_unavailable");
    }
    let gzip = |_: &Exchange| {
        Response::builder().status(200).header("content-encoding", "gzip").body(full("6")).unwrap()
    };
    get(&mut api, "&sid=a", &gzip).await.assert_error(502, "api_error", "upstream_unavailable");
    let failed = get(&mut api, "&sid=a", &|exchange| {
        let query = exchange.request.uri().query().unwrap().to_owned();
        Response::builder().status(400).header("x-echo", &query).body(full(query)).unwrap()
    });
    let failed = failed.await;
    assert_eq!(failed.status, 400);
    assert!(failed.text().contains("token=***"), "{}", failed.text());

    let auth = format!(r#"40/v1/audio/agent,{{"token":"{token}","other":"{token}","voice":"x"}}"#);
    let path = path("&sid=a");
    let exchange = async {
        let Exchange { request, answer } = api.next().await;
        let request: Request<_> = request;
        let body = http_body_util::BodyExt::collect(request.into_body()).await.unwrap().to_bytes();
        assert_eq!(body, r#"40/v1/audio/agent,{"voice":"x"}"#);
        answer.send(answered("ok")).unwrap();
    };
    let (answer, ()) = tokio::join!(caller.post(&path, auth), exchange);
    assert_eq!(answer.text(), "ok");

    let request = caller.request(Method::POST, &path).header("expect", "100-continue");
    let request = request.header("accept-encoding", "gzip").body(full(CONNECT)).unwrap();
    let exchange = async {
        let exchange = api.next().await;
        for name in ["expect", "accept-encoding"] {
            assert!(!exchange.request.headers().contains_key(name), "{name}");
        }
        exchange.answer(answered("ok"));
    };
    let (answer, ()) = tokio::join!(caller.send(request), exchange);
    assert_eq!(read(answer).await.text(), "ok");

    // The API ends the session.
    assert_eq!(get(&mut api, "&sid=a", &|_| answered("1")).await.text(), "1");
    caller.get(&path).await.assert_error(400, "invalid_request_error", "unknown_session");
}

#[tokio::test]
async fn it_is_served_only_where_it_is_allowed() {
    let off = world(&[]).await;
    let caller = Caller::http1(&off.proxy).with_token(&off.web);
    caller.get(&path("")).await.assert_error(404, "invalid_request_error", "not_found");

    let world = world(&["--voice-agent", "--allow", "GET:/socket.io/"]).await;
    let poller = Poller::open(&world.proxy, &world.web).await;
    poller.send(CONNECT).await.assert_error(403, "authorization_error", "insufficient_permissions");
    let mut socket = connected(&world).await;
    socket.close(None).await.unwrap();
    for path in ["/socket.io", "/socket.io/x", "/v1/socket.io/"] {
        let answer = poller.caller.get(&format!("{path}?EIO=4&transport=polling")).await;
        assert!([403, 404].contains(&answer.status.as_u16()), "{path}");
    }
}

#[tokio::test]
async fn an_idle_websocket_is_closed() {
    let world = world(&["--voice-agent", "--upgrade-idle", "1"]).await;
    let mut socket = connected(&world).await;
    let mut rest = Vec::new();
    let _ = with_timeout(socket.get_mut().read_to_end(&mut rest)).await;
    world.proxy.logs("end=\"idle\"").await;
}
