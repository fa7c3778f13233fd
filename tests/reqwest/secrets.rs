//! S2: no error, response or `Debug` output shows a secret. H2: headers stay sensitive on the wire.

use std::{error::Error as StdError, time::Duration};

use http::StatusCode;
use tower_selam::{
    Error, RequestAuth,
    adapter::reqwest::{Client, HttpService, TryCloneBody},
    simulator::Fault,
};

use crate::support::{PROTOCOLS, World, handshake, in_time, plain, shown, world};

/// A secret that the caller puts into a URL.
const CALLER_SECRET: &str = "a-secret-of-the-caller";

fn inner(result: Result<reqwest::Response, Error<reqwest::Error>>) -> reqwest::Error {
    match result {
        Err(Error::Inner(error)) => error,
        other => panic!("{other:?}"),
    }
}

fn assert_clean(secrets: &[&str], text: &str) {
    for secret in secrets {
        assert!(!text.contains(secret), "{text}");
    }
}

fn assert_clean_error(secrets: &[&str], error: &(dyn StdError + 'static)) {
    assert_clean(secrets, &shown(error));
}

/// A client for handshakes, which put credentials into the query, and the secrets to look for.
fn agent(world: &World, http: HttpService) -> (Client, [String; 3]) {
    let jwt = world.jwt();
    let secrets = [world.key.clone(), jwt.expose_secret().to_owned(), CALLER_SECRET.to_owned()];
    let layer = world.builder().with_jwt(jwt).build().unwrap().with_replay(TryCloneBody);
    (Client::with_layers(&layer, http).with_extension(RequestAuth::VoiceAgent), secrets)
}

/// S2: the URL of an error has no query.
#[tokio::test]
async fn errors_show_no_query() {
    for &protocol in PROTOCOLS {
        let world = world(protocol).await;
        let http = HttpService::new(world.reqwest().timeout(Duration::from_millis(500))).unwrap();
        let (agent, secrets) = agent(&world, http);
        let secrets = secrets.each_ref().map(|secret| &**secret);
        let url = world.voice_agent(&format!("&secret={CALLER_SECRET}#{CALLER_SECRET}"));
        let send = || in_time(agent.execute(handshake(agent.reqwest(), &url)));

        world.simulator.inject(Fault::Stall);
        let error = inner(send().await);
        assert!(error.is_timeout());
        assert!(world.last().uri.query().unwrap().contains(secrets[1]), "the secret was sent");
        assert_eq!((error.url().unwrap().path(), error.url().unwrap().query()), ("/socket.io/", None));
        assert_clean_error(&secrets, &error);
        assert_clean_error(&secrets, &Error::<reqwest::Error>::Inner(error));

        for _ in 0..11 {
            world.redirect(307, &format!("/socket.io/?again={}", world.key));
        }
        let error = inner(send().await);
        assert!(error.is_redirect());
        assert_clean_error(&secrets, &error);
    }
}

/// S2: the URL of the response to a handshake has no query.
#[tokio::test]
async fn handshake_response_shows_no_query() {
    for &protocol in PROTOCOLS {
        let world = world(protocol).await;
        let (agent, secrets) = agent(&world, HttpService::new(world.reqwest()).unwrap());
        let secrets = secrets.each_ref().map(|secret| &**secret);
        let url = world.voice_agent(&format!("&secret={CALLER_SECRET}"));
        world.simulator.inject(Fault::Unavailable);
        let response = in_time(agent.execute(handshake(agent.reqwest(), &url))).await.unwrap();
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert!(world.last().uri.query().unwrap().contains(secrets[1]), "the secret was sent");
        assert_clean(&secrets, &format!("{response:?}"));
        assert_clean_error(&secrets, &response.error_for_status().unwrap_err());

        world.simulator.inject(Fault::CutOff { after: 1 });
        let plain = world.simulator.requests();
        let response = in_time(agent.execute(handshake(agent.reqwest(), &url)));
        // HTTP/1.1 fails reading the body, HTTP/2 may fail the whole request.
        match response.await {
            Ok(response) => {
                if let Err(error) = in_time(response.bytes()).await {
                    assert_clean_error(&secrets, &error);
                }
            }
            Err(error) => assert_clean_error(&secrets, &error),
        }
        assert_eq!(world.simulator.requests(), plain + 1);
    }
}

/// S2: errors before or during connecting.
#[tokio::test]
async fn unsent_requests_show_no_query() {
    let world = plain().await;
    let (agent, secrets) = agent(&world, HttpService::new(world.reqwest()).unwrap());
    let secrets = secrets.each_ref().map(|secret| &**secret);
    let here = handshake(agent.reqwest(), &world.voice_agent(&format!("&secret={CALLER_SECRET}")));
    for refused in [
        agent.reqwest().get(format!("data:?{CALLER_SECRET}")),
        agent.reqwest().get(format!("not a URL with {CALLER_SECRET}")),
        agent.reqwest().get(format!("http://[{CALLER_SECRET}")),
        agent
            .reqwest()
            .get(format!("ftp://{CALLER_SECRET}:{CALLER_SECRET}@host/?{CALLER_SECRET}#{CALLER_SECRET}")),
        handshake(agent.reqwest(), &format!("https://evil.example/?secret={CALLER_SECRET}")),
        agent.reqwest().get(world.voice_agent("")).header("x", "not\na header"),
    ] {
        let error = in_time(agent.execute(refused)).await.unwrap_err();
        assert_clean_error(&secrets, &error);
    }
    assert_eq!(world.simulator.requests(), 0);

    let debugged = agent.execute(here.try_clone().unwrap());
    assert_clean(&secrets, &format!("{agent:?} {debugged:?} {:?}", agent.get_ref().get_ref()));

    // The port is closed now.
    drop(world.server);
    let error = inner(in_time(agent.execute(here)).await);
    assert!(error.is_connect());
    assert_clean_error(&secrets, &error);
}

/// H2: HPACK encodes both headers as never indexed.
#[cfg(feature = "tls")]
#[tokio::test]
async fn credentials_are_never_indexed() {
    use tokio::io::AsyncReadExt;
    use tower_selam::{BaseUrl, SelamLayer};

    use crate::support::CHAT;

    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base_url = format!("http://{}/v1", listener.local_addr().unwrap());
    let world = plain().await;
    let layer = SelamLayer::builder().with_api_key(world.api_key()).with_jwt(world.jwt());
    let layer = layer.with_base_url(BaseUrl::allow_insecure_loopback(&base_url).unwrap()).build().unwrap();
    let builder = reqwest::Client::builder().no_proxy().http2_prior_knowledge();
    let selam = Client::new(layer, builder).unwrap();
    let request = selam.reqwest().post(format!("{base_url}/chat/completions")).header("x-indexed", "1");
    let call = tokio::spawn(selam.execute(request.body(CHAT)));

    // The preface, then frames: length, type, flags, stream (RFC 9113 section 4.1).
    let block = in_time(async {
        let (mut server, _) = listener.accept().await.unwrap();
        server.read_exact(&mut [0; 24]).await.unwrap();
        loop {
            let mut head = [0; 9];
            server.read_exact(&mut head).await.unwrap();
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            let mut payload = vec![0; length];
            server.read_exact(&mut payload).await.unwrap();
            if head[3] == 1 {
                return payload;
            }
        }
    })
    .await;
    call.abort();
    let has = |bytes: &[u8]| block.windows(bytes.len()).any(|window| window == bytes);
    // As in `tests/it/wire.rs`: RFC 7541 section 6.2.
    assert!(has(&[0x1f, 0x08]), "authorization never indexed: {block:x?}");
    assert!(has(&[0x10, 0x87]), "x-api-key never indexed: {block:x?}");
    assert!(has(&[0x40, 0x87]), "another header is indexed: {block:x?}");
}
