//! What goes over the connection, and when.

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

use crate::support::{Gate, HANG, How, KEY, layer, until};

#[tokio::test]
async fn h2_on_the_wire_the_credentials_are_never_indexed() {
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
    // RFC 7541 section 6.2.3: 0001, then the name: entry 23 of the static table, or a literal. Section 6.2.1
    // is what goes into the table: 01. `x-api-key` is 7 bytes in Huffman code, as is `x-indexed`.
    assert!(has(&[0x1f, 0x08]), "authorization never indexed: {block:x?}");
    assert!(has(&[0x10, 0x87]), "x-api-key never indexed: {block:x?}");
    assert!(has(&[0x40, 0x87]), "another header goes into the table: {block:x?}");
}

#[tokio::test]
async fn e5_a_stream_begins_before_anything_was_said() {
    let gate = Gate::refusing(How::Headers);
    let (_server, mut client) = gate.revoked().await;
    let (send, names) = mpsc::unbounded_channel();
    // The response comes, by a replay, though neither side has sent a message yet.
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

#[tokio::test]
async fn t1_a_call_that_was_refused_pins_no_permit_while_it_waits() {
    let gate = Gate::refusing(How::Headers);
    let server = gate.serve().await;
    let jwts = gate.jwts();
    jwts.prefetch().await.unwrap();
    gate.revoke();
    let channel = server.endpoint().unwrap().concurrency_limit(1).connect_lazy();
    pins_no_permit(gate, GreeterClient::new(layer(&server, jwts).layer(channel)), 2).await;
}

#[tokio::test]
async fn t1_a_call_that_waits_for_the_first_token_pins_no_permit() {
    let gate = Gate::default();
    let server = gate.serve().await;
    let channel = ConcurrencyLimit::new(server.endpoint().unwrap().connect_lazy(), 1);
    pins_no_permit(gate.clone(), GreeterClient::new(layer(&server, gate.jwts()).layer(channel)), 1).await;
}

/// One call waits for the renewal, and another, which needs none, passes it.
async fn pins_no_permit<S>(gate: Gate, mut client: GreeterClient<SelamGrpc<S>>, renewal: usize)
where
    S: Service<http::Request<Body>, Response = http::Response<Body>> + Clone + Send + Sync + 'static,
    S::Future: Send,
    S::Error: Into<BoxError> + Send,
{
    gate.hold();
    let mut waits = client.clone();
    let waiting = tokio::spawn(async move { waits.greet(Name::of("Almaz")).await });
    until(|| gate.asked() == renewal).await;
    gate.let_pass();
    let mut request = tonic::Request::new(Name::of("Kaleb"));
    request.extensions_mut().insert(RequestAuth::ApiKey);
    let greeting = timeout(HANG, client.greet(request)).await.expect("no permit").unwrap();
    assert_eq!(greeting.into_inner().text, "Selam, Kaleb!");
    assert!(!waiting.is_finished());
    gate.release();
    assert_eq!(waiting.await.unwrap().unwrap().into_inner().text, "Selam, Almaz!");
}

#[tokio::test]
async fn t1_the_instance_that_was_ready_is_the_one_that_is_called() {
    // A limit around the channel itself, with permits that are taken when it is ready.
    let gate = Gate::refusing(How::Headers);
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

#[test]
fn t2_services_and_futures_can_go_where_those_of_the_channel_can() {
    fn assert<T: Send + Unpin + 'static>() {}
    fn assert_clone<T: Clone + Send + Sync>() {}
    assert_clone::<SelamGrpcLayer>();
    assert_clone::<SelamGrpc<Channel>>();
    assert::<SelamGrpc<Channel>>();
    assert::<ResponseFuture<tonic::transport::channel::ResponseFuture, Channel, Body>>();
    assert::<ResponseBody<Body>>();
    // Any other service, too.
    let inner =
        service_fn(|_: http::Request<Body>| async { Ok::<_, Status>(http::Response::new(Body::empty())) });
    let base_url = BaseUrl::default();
    let selam = SelamLayer::builder().with_base_url(base_url).with_api_key(ApiKey::new(KEY).unwrap());
    let layer = SelamGrpcLayer::new(selam.build().unwrap(), &"https://api.selamgpt.com".parse().unwrap());
    let _ = GreeterClient::new(layer.unwrap().layer(inner));
}
