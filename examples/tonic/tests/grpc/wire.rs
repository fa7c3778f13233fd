//! What is sent over the connection, and when.

use example_tonic::{GreeterClient, Name};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    sync::mpsc,
    time::timeout,
};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Status, body::Body, transport::Channel};
use tower::{Layer, Service, limit::ConcurrencyLimit, service_fn};
use tower_selam::{
    ApiKey, BaseUrl, BoxError, RequestAuth, SelamLayer, Token,
    adapter::tonic::{ResponseBody, ResponseFuture, SelamGrpc, SelamGrpcLayer},
};

use crate::support::{Gate, HANG, KEY, RejectIn, layer, until};

/// H2: HPACK encodes both credentials as never indexed.
#[tokio::test]
async fn credentials_are_never_indexed() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let origin = format!("http://{}", listener.local_addr().unwrap());
    let selam = SelamLayer::builder()
        .with_base_url(BaseUrl::allow_insecure_loopback(&origin).unwrap())
        .with_api_key(ApiKey::new(KEY).unwrap())
        .with_jwt(Token::new("a.b.c").unwrap())
        .build()
        .unwrap();
    let endpoint = Channel::from_shared(origin).unwrap();
    let layer = SelamGrpcLayer::new(selam, endpoint.uri()).unwrap();
    let mut client = GreeterClient::new(layer.layer(endpoint.connect_lazy()));
    let mut request = tonic::Request::new(Name::of("Almaz"));
    request.metadata_mut().insert("x-indexed", "1".parse().unwrap());

    let block = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
        let mut preface = [0; 24];
        stream.read_exact(&mut preface).await.unwrap();
        loop {
            let mut head = [0; 9];
            stream.read_exact(&mut head).await.unwrap();
            let mut frame = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
            stream.read_exact(&mut frame).await.unwrap();
            if head[3] == 1 {
                return frame;
            }
        }
    };
    let block = tokio::select! {
        block = timeout(HANG, block) => block.unwrap(),
        answer = client.greet(request) => panic!("{answer:?}"),
    };
    let has = |bytes: &[u8]| block.windows(bytes.len()).any(|window| window == bytes);
    // RFC 7541 section 6.2.3, never indexed: 0001, then the name, which is entry 23 of the static table or a literal.
    // Section 6.2.1, indexed: 01. `x-api-key` and `x-indexed` are each 7 bytes in Huffman code.
    assert!(has(&[0x1f, 0x08]), "authorization never indexed: {block:x?}");
    assert!(has(&[0x10, 0x87]), "x-api-key never indexed: {block:x?}");
    assert!(has(&[0x40, 0x87]), "another header is indexed: {block:x?}");
}

/// E5: the response arrives, after a replay, before either side has sent a message.
#[tokio::test]
async fn a_stream_starts_before_any_message() {
    let gate = Gate::rejecting(RejectIn::Headers);
    let (_server, mut client) = gate.serve_with_revoked_token().await;
    let (send, names) = mpsc::unbounded_channel();
    let response = timeout(HANG, client.converse(UnboundedReceiverStream::new(names))).await.unwrap();
    let mut greetings = response.unwrap().into_inner();
    for name in ["Almaz", "Kaleb"] {
        send.send(Name::of(name)).unwrap();
        let greeting = timeout(HANG, greetings.message()).await.unwrap().unwrap().unwrap();
        assert_eq!(greeting.text, format!("Selam, {name}!"));
    }
    drop(send);
    assert!(greetings.message().await.unwrap().is_none());
}

/// T1: a rejected call holds no permit while it waits for the refresh.
#[tokio::test]
async fn a_rejected_call_pins_no_permit() {
    let gate = Gate::rejecting(RejectIn::Headers);
    let server = gate.serve().await;
    let jwts = gate.jwts();
    jwts.prefetch().await.unwrap();
    gate.revoke();
    let channel = server.endpoint().unwrap().concurrency_limit(1).connect_lazy();
    pins_no_permit(gate, GreeterClient::new(layer(&server, jwts).layer(channel)), 2).await;
}

/// T1: a call holds no permit while it waits for the first token.
#[tokio::test]
async fn waiting_for_the_first_token_pins_no_permit() {
    let gate = Gate::default();
    let server = gate.serve().await;
    let channel = ConcurrencyLimit::new(server.endpoint().unwrap().connect_lazy(), 1);
    pins_no_permit(gate.clone(), GreeterClient::new(layer(&server, gate.jwts()).layer(channel)), 1).await;
}

/// Asserts that a call which needs no JWT overtakes a call which waits for the refresh number `refreshes`.
async fn pins_no_permit<S>(gate: Gate, mut client: GreeterClient<SelamGrpc<S>>, refreshes: usize)
where
    S: Service<http::Request<Body>, Response = http::Response<Body>> + Clone + Send + Sync + 'static,
    S::Future: Send,
    S::Error: Into<BoxError> + Send,
{
    gate.hold();
    let mut waiter = client.clone();
    let waiting = tokio::spawn(async move { waiter.greet(Name::of("Almaz")).await });
    until(|| gate.refreshes_started() == refreshes).await;
    gate.accept_all();
    let mut request = tonic::Request::new(Name::of("Kaleb"));
    request.extensions_mut().insert(RequestAuth::ApiKey);
    let greeting = timeout(HANG, client.greet(request)).await.expect("a permit is free").unwrap();
    assert_eq!(greeting.into_inner().text, "Selam, Kaleb!");
    assert!(!waiting.is_finished());
    gate.release();
    assert_eq!(waiting.await.unwrap().unwrap().into_inner().text, "Selam, Almaz!");
}

/// T1: the instance that was polled ready is called, on replay as well.
#[tokio::test]
async fn the_ready_instance_is_called() {
    // The limit hands out its permit in `poll_ready`.
    let gate = Gate::rejecting(RejectIn::Headers);
    let server = gate.serve().await;
    let jwts = gate.jwts();
    jwts.prefetch().await.unwrap();
    gate.revoke();
    let channel = ConcurrencyLimit::new(server.endpoint().unwrap().connect_lazy(), 1);
    let mut client = GreeterClient::new(layer(&server, jwts).layer(channel));
    for _ in 0..3 {
        let greeting = timeout(HANG, client.greet(Name::of("Almaz"))).await.unwrap();
        assert_eq!(greeting.unwrap().into_inner().text, "Selam, Almaz!");
    }
}

/// T2: services and futures have the auto traits of the channel's.
#[test]
fn services_and_futures_keep_auto_traits() {
    fn assert<T: Send + Unpin + 'static>() {}
    fn assert_clone<T: Clone + Send + Sync>() {}
    assert_clone::<SelamGrpcLayer>();
    assert_clone::<SelamGrpc<Channel>>();
    assert::<SelamGrpc<Channel>>();
    assert::<ResponseFuture<Channel, Body>>();
    assert::<ResponseBody<Body>>();
    // The layer accepts any inner service.
    let inner =
        service_fn(|_: http::Request<Body>| async { Ok::<_, Status>(http::Response::new(Body::empty())) });
    let base_url = BaseUrl::default();
    let selam = SelamLayer::builder().with_base_url(base_url).with_api_key(ApiKey::new(KEY).unwrap());
    let layer = SelamGrpcLayer::new(selam.build().unwrap(), &"https://api.selamgpt.com".parse().unwrap());
    let _ = GreeterClient::new(layer.unwrap().layer(inner));
}
