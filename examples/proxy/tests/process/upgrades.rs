//! Upgraded connections, such as WebSockets.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{
    Launch, Protocol, TlsListener, random, raw, read_head, read_to_end, response_head, secret, upgraded,
    with_timeout,
};

const SWITCHED: &[u8] =
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade, X-Hop\r\nUpgrade: echo/2\r\nX-Hop: end\r\n\
      Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\nX-Kept: 1\r\n\r\n";

fn handshake(more: &str) -> String {
    format!(
        "GET /v1/audio/live?voice=x HTTP/1.1\r\nHost: localhost\r\nConnection: X-Mine, Upgrade\r\nUpgrade: echo/2\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nX-Mine: hop\r\nX-Api-Key: theirs\r\n{more}\r\n"
    )
}

async fn expect(stream: &mut (impl tokio::io::AsyncRead + Unpin), expected: &[u8]) {
    let mut received = vec![0; expected.len()];
    with_timeout(stream.read_exact(&mut received)).await.unwrap();
    assert_eq!(received, expected);
}

#[tokio::test]
async fn the_handshake_passes_with_the_proxys_credentials() {
    let api = TlsListener::listen(Protocol::Http1).await;
    let key = secret(format!("sk-selam-{}", random()));
    let proxy = Launch::for_api(&api).env("SELAM_API_KEY", &key).start().await;
    let mut caller = raw(&proxy).await;
    caller.write_all(handshake("").as_bytes()).await.unwrap();
    let mut connection = api.accept().await;
    let head = read_head(&mut connection).await.to_ascii_lowercase();
    for line in [
        "get /v1/audio/live?voice=x http/1.1\r\n",
        "\r\nconnection: upgrade\r\n",
        "\r\nupgrade: echo/2\r\n",
        "\r\nsec-websocket-key: dghlihnhbxbszsbub25jzq==\r\n",
        &format!("\r\nauthorization: bearer {key}\r\n"),
    ] {
        assert!(head.contains(line), "{line:?} is not in {head}");
    }
    assert!(!head.contains("theirs") && !head.contains("hop"), "{head}");

    connection.write_all(SWITCHED).await.unwrap();
    let head = response_head(&mut caller).await.to_ascii_lowercase();
    for line in [
        "\r\nconnection: upgrade\r\n",
        "\r\nupgrade: echo/2\r\n",
        "\r\nx-kept: 1\r\n",
        "\r\nsec-websocket-accept: ",
    ] {
        assert!(head.contains(line), "{line:?} is not in {head}");
    }
    assert!(!head.contains("x-hop"), "{head}");
}

#[tokio::test]
async fn bytes_flow_both_ways() {
    let api = TlsListener::listen(Protocol::Http1).await;
    let proxy = Launch::with_key(&api).start().await;
    let (mut caller, mut connection) = upgraded(&proxy, &api).await;
    for number in 0_u32..50 {
        caller.write_all(&number.to_be_bytes()).await.unwrap();
        expect(&mut connection, &number.to_be_bytes()).await;
        connection.write_all(&[number as u8; 3]).await.unwrap();
        expect(&mut caller, &[number as u8; 3]).await;
    }
    // More than all buffers in between can hold.
    let data = vec![7; 4 * 1024 * 1024];
    let (mut reader, mut writer) = tokio::io::split(connection);
    let echo = tokio::spawn(async move { tokio::io::copy(&mut reader, &mut writer).await.map(|_| writer) });
    let (mut reader, mut writer) = caller.into_split();
    let asking = tokio::spawn({
        let data = data.clone();
        async move { writer.write_all(&data).await.map(|()| writer) }
    });
    expect(&mut reader, &data).await;
    let writer = asking.await.unwrap().unwrap();
    drop(writer);
    with_timeout(echo).await.unwrap().unwrap().shutdown().await.unwrap();
    assert_eq!(read_to_end(&mut reader).await, b"");
}

#[tokio::test]
async fn each_side_can_half_close() {
    let api = TlsListener::listen(Protocol::Http1).await;
    let proxy = Launch::with_key(&api).start().await;

    let (mut caller, mut connection) = upgraded(&proxy, &api).await;
    caller.write_all(b"last words").await.unwrap();
    caller.shutdown().await.unwrap();
    assert_eq!(read_to_end(&mut connection).await, b"last words");
    connection.write_all(b"an answer to them").await.unwrap();
    expect(&mut caller, b"an answer to them").await;
    connection.shutdown().await.unwrap();
    assert_eq!(read_to_end(&mut caller).await, b"");

    let (mut caller, mut connection) = upgraded(&proxy, &api).await;
    connection.write_all(b"last words").await.unwrap();
    connection.shutdown().await.unwrap();
    assert_eq!(read_to_end(&mut caller).await, b"last words");
    caller.write_all(b"an answer to them").await.unwrap();
    expect(&mut connection, b"an answer to them").await;
    caller.shutdown().await.unwrap();
    assert_eq!(read_to_end(&mut connection).await, b"");
}

#[tokio::test]
async fn a_reset_reaches_the_other_side() {
    let api = TlsListener::listen(Protocol::Http1).await;
    let proxy = Launch::with_key(&api).start().await;
    let (caller, mut connection) = upgraded(&proxy, &api).await;
    // Closed with a reset instead of a FIN.
    caller.set_zero_linger().unwrap();
    drop(caller);
    let mut rest = Vec::new();
    let _ = with_timeout(connection.read_to_end(&mut rest)).await;
    assert_eq!(rest, b"");

    let (mut caller, connection) = upgraded(&proxy, &api).await;
    connection.get_ref().0.set_zero_linger().unwrap();
    drop(connection);
    let _ = with_timeout(caller.read_to_end(&mut rest)).await;
    assert_eq!(rest, b"");
}

#[tokio::test]
async fn bytes_right_after_the_heads_are_kept() {
    let api = TlsListener::listen(Protocol::Http1).await;
    let proxy = Launch::with_key(&api).start().await;
    let mut caller = raw(&proxy).await;
    caller.write_all(format!("{}early", handshake("")).as_bytes()).await.unwrap();
    let mut connection = api.accept().await;
    read_head(&mut connection).await;
    connection.write_all(&[SWITCHED, b"at once"].concat()).await.unwrap();
    response_head(&mut caller).await;
    expect(&mut caller, b"at once").await;
    expect(&mut connection, b"early").await;
}

#[tokio::test]
async fn a_declined_upgrade_is_an_ordinary_answer() {
    let api = TlsListener::listen(Protocol::Http1).await;
    let proxy = Launch::with_key(&api).start().await;
    let mut caller = raw(&proxy).await;
    caller.write_all(handshake("").as_bytes()).await.unwrap();
    let mut connection = api.accept().await;
    read_head(&mut connection).await;
    let refusal = b"HTTP/1.1 426 Upgrade Required\r\nContent-Length: 2\r\nX-Kept: 1\r\n\r\nno";
    connection.write_all(refusal).await.unwrap();
    let head = response_head(&mut caller).await;
    assert!(head.starts_with("HTTP/1.1 426 ") && head.contains("x-kept: 1\r\n"), "{head}");
    expect(&mut caller, b"no").await;
    // The connection can be reused.
    caller.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    assert!(response_head(&mut caller).await.starts_with("HTTP/1.1 200 "));
}

/// Java's client offers HTTP/2 with each request.
#[tokio::test]
async fn an_offer_of_http2_is_dropped_and_the_body_kept() {
    let api = TlsListener::listen(Protocol::Http1).await;
    let proxy = Launch::with_key(&api).start().await;
    let mut caller = raw(&proxy).await;
    let request = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\n\
         Upgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\nContent-Length: 4\r\n\r\nbody";
    caller.write_all(request.as_bytes()).await.unwrap();
    let mut connection = api.accept().await;
    let head = read_head(&mut connection).await.to_ascii_lowercase();
    assert!(!head.contains("upgrade") && !head.contains("http2-settings"), "{head}");
    expect(&mut connection, b"body").await;
    connection.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
    assert!(response_head(&mut caller).await.starts_with("HTTP/1.1 200 "));
    expect(&mut caller, b"ok").await;
}

#[tokio::test]
async fn upgrades_need_a_token() {
    let api = TlsListener::listen(Protocol::Http1).await;
    let token = secret(random());
    let proxy = Launch::with_key(&api).callers(&format!("web:{token}\n")).start().await;
    let mut caller = raw(&proxy).await;
    caller.write_all(handshake("Connection: close\r\n").as_bytes()).await.unwrap();
    assert!(response_head(&mut caller).await.starts_with("HTTP/1.1 401 "));

    let mut caller = raw(&proxy).await;
    let head = handshake(&format!("Authorization: Bearer {token}\r\n"));
    caller.write_all(head.as_bytes()).await.unwrap();
    let mut connection = api.accept().await;
    assert!(!read_head(&mut connection).await.contains(&token));
}

/// The token of a caller among the WebSocket subprotocols, in every way that clients have of putting it there.
#[tokio::test]
async fn a_token_among_subprotocols_is_taken() {
    let api = TlsListener::listen(Protocol::Http1).await;
    let token = secret(random());
    let proxy = Launch::with_key(&api).callers(&format!("web:{token}\n")).start().await;
    let encoded = base64(token.as_bytes());
    secret(&encoded);
    for (offered, left) in [
        (
            format!("realtime, openai-insecure-api-key.{token}, openai-beta.realtime-v1"),
            "realtime, openai-beta.realtime-v1",
        ),
        (format!("openai-insecure-api-key.{token}"), ""),
        (format!("bearer.{token}, chat"), "chat"),
        (format!("chat, Bearer, {token}"), "chat"),
        (format!("chat\r\nSec-WebSocket-Protocol: access_token.{token}"), "chat"),
        (format!("base64url.bearer.authorization.k8s.io.{encoded}, v4.channel.k8s.io"), "v4.channel.k8s.io"),
        (format!("chat, {token}"), "chat"),
        (format!("bearer.{token}, chat, x-{token}-y, my~{encoded}"), "chat"),
    ] {
        let mut caller = raw(&proxy).await;
        let head = handshake(&format!("Sec-WebSocket-Protocol: {offered}\r\n"));
        caller.write_all(head.as_bytes()).await.unwrap();
        let mut connection = api.accept().await;
        let head = read_head(&mut connection).await;
        assert!(!head.contains(&token) && !head.contains(&encoded), "{head}");
        let lower = head.to_ascii_lowercase();
        let sent = lower.split("\r\n").find_map(|line| line.strip_prefix("sec-websocket-protocol: "));
        assert_eq!(sent.unwrap_or_default(), left);
        let chosen = left.split(", ").next().filter(|chosen| !chosen.is_empty());
        let answer = match chosen {
            Some(chosen) => SWITCHED
                .strip_suffix(b"\r\n")
                .unwrap()
                .iter()
                .copied()
                .chain(format!("Sec-WebSocket-Protocol: {chosen}\r\n\r\n").bytes())
                .collect(),
            None => SWITCHED.to_vec(),
        };
        connection.write_all(&answer).await.unwrap();
        let head = response_head(&mut caller).await.to_ascii_lowercase();
        assert!(head.starts_with("http/1.1 101 "), "{head}");
        assert_eq!(head.contains("sec-websocket-protocol"), chosen.is_some());
    }
    // A wrong token is refused, and a token never reaches the API of a request that is not a handshake.
    let mut caller = raw(&proxy).await;
    caller
        .write_all(handshake("Sec-WebSocket-Protocol: bearer.wrong\r\nConnection: close\r\n").as_bytes())
        .await
        .unwrap();
    assert!(response_head(&mut caller).await.starts_with("HTTP/1.1 401 "));
    let mut caller = raw(&proxy).await;
    let plain = format!(
        "GET /v1/models HTTP/1.1\r\nHost: localhost\r\nSec-WebSocket-Protocol: x.{token}, bearer.{token}\r\n\r\n"
    );
    caller.write_all(plain.as_bytes()).await.unwrap();
    let mut connection = api.accept().await;
    assert!(!read_head(&mut connection).await.contains(&token));
}

/// A browser closes a WebSocket for which it offered subprotocols and none was chosen.
#[tokio::test]
async fn a_subprotocol_is_chosen_for_who_offered_a_token() {
    let api = TlsListener::listen(Protocol::Http1).await;
    let token = secret(random());
    let proxy = Launch::with_key(&api).callers(&format!("web:{token}\n")).start().await;
    for (offered, expected) in [
        (format!("realtime, openai-insecure-api-key.{token}, openai-beta.realtime-v1"), Some("realtime")),
        (format!("bearer, {token}"), Some("bearer")),
        (format!("{token}, chat"), Some("chat")),
        // The answer would have to repeat the token.
        (format!("bearer.{token}"), None),
        // The token is in a header, so the answer is the API's alone.
        (format!("chat\r\nAuthorization: Bearer {token}"), None),
    ] {
        let mut caller = raw(&proxy).await;
        let head = handshake(&format!("Sec-WebSocket-Protocol: {offered}\r\n"));
        caller.write_all(head.as_bytes()).await.unwrap();
        let mut connection = api.accept().await;
        read_head(&mut connection).await;
        connection.write_all(SWITCHED).await.unwrap();
        let head = response_head(&mut caller).await.to_ascii_lowercase();
        assert!(head.starts_with("http/1.1 101 "), "{head}");
        let chosen = head.split("\r\n").find_map(|line| line.strip_prefix("sec-websocket-protocol: "));
        assert_eq!(chosen, expected, "{head}");
    }
}

#[tokio::test]
async fn the_api_cannot_choose_a_subprotocol_that_was_not_offered() {
    let api = TlsListener::listen(Protocol::Http1).await;
    let proxy = Launch::with_key(&api).start().await;
    for chosen in ["other", "bearer.theirs", "chat, superchat", "chat\r\nSec-WebSocket-Protocol: chat"] {
        let mut caller = raw(&proxy).await;
        let head = handshake("Sec-WebSocket-Protocol: chat, bearer.theirs, superchat\r\n");
        caller.write_all(head.as_bytes()).await.unwrap();
        let mut connection = api.accept().await;
        read_head(&mut connection).await;
        let answer = [
            SWITCHED.strip_suffix(b"\r\n").unwrap(),
            b"Sec-WebSocket-Protocol: ",
            chosen.as_bytes(),
            b"\r\n\r\n",
        ]
        .concat();
        connection.write_all(&answer).await.unwrap();
        let head = response_head(&mut caller).await;
        assert!(head.starts_with("HTTP/1.1 502 ") && !head.contains("theirs"), "{chosen}: {head}");
    }
}

/// Encodes without padding, for URLs.
fn base64(bytes: &[u8]) -> String {
    let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut encoded = String::new();
    for chunk in bytes.chunks(3) {
        let bits =
            chunk.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for place in 0..=chunk.len() {
            encoded.push(char::from(alphabet[(bits >> (18 - 6 * place) & 63) as usize]));
        }
    }
    encoded
}
