//! Stand-ins for the API, for tests that need more control than the simulator offers.

use std::{
    net::Ipv4Addr,
    pin::Pin,
    sync::{Arc, LazyLock},
};

use http::{Request, Response, request::Parts};
use http_body_util::BodyExt;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    net::{TcpListener, TcpStream},
    sync::{mpsc, oneshot},
    task::{JoinHandle, JoinSet},
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        crypto::ring,
        pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    },
    server::TlsStream,
};
use tower_selam::simulator::Server;

use super::{Body, with_timeout};

/// The authority that `--ca` names.
pub(crate) static TRUSTED: LazyLock<Authority> = LazyLock::new(Authority::new);

/// The authority that the system trusts.
pub(crate) static SYSTEM: LazyLock<Authority> = LazyLock::new(Authority::new);

/// An API that the proxy can be configured for.
pub(crate) trait Api {
    fn base_url(&self) -> String;

    /// `None` for plain http.
    fn ca_pem(&self) -> Option<String>;
}

impl Api for Server {
    fn base_url(&self) -> String {
        self.base_url().to_owned()
    }

    fn ca_pem(&self) -> Option<String> {
        self.ca_pem().map(str::to_owned)
    }
}

/// A host that exists only behind an HTTP proxy.
pub(crate) const REMOTE_HOST: &str = "api.example";

/// A certificate authority, and a TLS server configuration for `localhost` and the remote host that it signed.
#[derive(Debug)]
pub(crate) struct Authority {
    ca_pem: String,
    config: ServerConfig,
}

impl Authority {
    fn new() -> Self {
        let mut authority = CertificateParams::new([]).unwrap();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority_key = KeyPair::generate().unwrap();
        let ca_pem = authority.self_signed(&authority_key).unwrap().pem();

        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(["localhost", REMOTE_HOST].map(str::to_owned))
            .unwrap()
            .signed_by(&key, &Issuer::from_params(&authority, &authority_key))
            .unwrap();
        let private = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], private)
            .unwrap();
        Self { ca_pem, config }
    }

    pub(crate) fn ca_pem(&self) -> &str {
        &self.ca_pem
    }
}

/// The version of HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Http1,
    Http2,
}

impl Protocol {
    pub(crate) const BOTH: [Self; 2] = [Self::Http1, Self::Http2];

    /// All combinations for callers and API.
    pub(crate) const PAIRS: [(Self, Self); 4] = [
        (Self::Http1, Self::Http1),
        (Self::Http1, Self::Http2),
        (Self::Http2, Self::Http1),
        (Self::Http2, Self::Http2),
    ];
}

pub(crate) type Tls = TlsStream<TcpStream>;

/// A TLS listener on `localhost` whose connections the test handles itself.
pub(crate) struct TlsListener {
    listener: TcpListener,
    tls: TlsAcceptor,
}

impl TlsListener {
    pub(crate) async fn listen(protocol: Protocol) -> Self {
        Self::signed_by(&TRUSTED, protocol).await
    }

    pub(crate) async fn signed_by(authority: &Authority, protocol: Protocol) -> Self {
        let mut config = authority.config.clone();
        config.alpn_protocols = match protocol {
            Protocol::Http1 => vec![b"http/1.1".to_vec()],
            Protocol::Http2 => vec![b"h2".to_vec()],
        };
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        Self { listener, tls: TlsAcceptor::from(Arc::new(config)) }
    }

    pub(crate) fn port(&self) -> u16 {
        self.listener.local_addr().unwrap().port()
    }

    /// Accepts the next connection that completes its TLS handshake.
    pub(crate) async fn accept(&self) -> Tls {
        with_timeout(async {
            loop {
                let (stream, _) = self.listener.accept().await.unwrap();
                stream.set_nodelay(true).unwrap();
                if let Ok(stream) = self.tls.accept(stream).await {
                    return stream;
                }
            }
        })
        .await
    }

    /// Serves HTTP, with every response provided by the test.
    pub(crate) fn exchanges(self) -> Exchanges {
        let (base_url, ca_pem) = (self.base_url(), self.ca_pem());
        let (sender, receiver) = mpsc::unbounded_channel();
        let serving = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let Ok((stream, _)) = self.listener.accept().await else { continue };
                let (tls, sender) = (self.tls.clone(), sender.clone());
                connections.spawn(async move {
                    stream.set_nodelay(true).unwrap();
                    if let Ok(stream) = tls.accept(stream).await {
                        serve(stream, sender).await;
                    }
                });
            }
        });
        Exchanges { base_url, ca_pem, receiver, serving }
    }
}

impl Api for TlsListener {
    fn base_url(&self) -> String {
        format!("https://localhost:{}/v1", self.port())
    }

    fn ca_pem(&self) -> Option<String> {
        Some(TRUSTED.ca_pem.clone())
    }
}

/// A queue of requests for the test to answer.
pub(crate) struct Exchanges {
    base_url: String,
    ca_pem: Option<String>,
    receiver: mpsc::UnboundedReceiver<Exchange>,
    serving: JoinHandle<()>,
}

#[derive(Debug)]
pub(crate) struct Exchange {
    pub(crate) request: Request<Incoming>,
    pub(crate) answer: oneshot::Sender<Response<Body>>,
}

impl Exchanges {
    pub(crate) async fn next(&mut self) -> Exchange {
        with_timeout(self.receiver.recv()).await.unwrap()
    }

    /// Asserts that no further request has arrived.
    pub(crate) fn assert_silent(&mut self) {
        assert!(self.receiver.try_recv().is_err());
    }

    /// Answers all further requests with this function, each on a separate task.
    pub(crate) fn answer_all<F>(
        mut self,
        answer: impl Fn(Request<Incoming>) -> F + Send + Sync + 'static,
    ) -> AutoApi
    where
        F: Future<Output = Response<Body>> + Send + 'static,
    {
        let (base_url, ca_pem) = (self.base_url.clone(), self.ca_pem.clone());
        let answering = tokio::spawn(async move {
            while let Some(exchange) = self.receiver.recv().await {
                let answer: Pin<Box<dyn Future<Output = _> + Send>> = Box::pin(answer(exchange.request));
                tokio::spawn(async move {
                    let mut sender = exchange.answer;
                    tokio::select! {
                        answer = answer => drop(sender.send(answer)),
                        () = sender.closed() => {}
                    }
                });
            }
        });
        AutoApi { base_url, ca_pem, answering }
    }
}

impl Exchange {
    /// Answers, and reads the rest of the request's body in the background: a server that does not may cut off its answer.
    pub(crate) fn answer(self, response: Response<Body>) -> Parts {
        let (parts, body) = self.request.into_parts();
        tokio::spawn(body.collect());
        self.answer.send(response).expect("the proxy is waiting for the response");
        parts
    }

    pub(crate) fn respond(self, status: u16, body: Body) -> Parts {
        self.answer(Response::builder().status(status).body(body).unwrap())
    }
}

impl Api for Exchanges {
    fn base_url(&self) -> String {
        self.base_url.clone()
    }

    fn ca_pem(&self) -> Option<String> {
        self.ca_pem.clone()
    }
}

impl Drop for Exchanges {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// An API with automatic answers.
pub(crate) struct AutoApi {
    base_url: String,
    ca_pem: Option<String>,
    answering: JoinHandle<()>,
}

impl Api for AutoApi {
    fn base_url(&self) -> String {
        self.base_url.clone()
    }

    fn ca_pem(&self) -> Option<String> {
        self.ca_pem.clone()
    }
}

impl Drop for AutoApi {
    fn drop(&mut self) {
        self.answering.abort();
    }
}

async fn serve(stream: Tls, sender: mpsc::UnboundedSender<Exchange>) {
    let exchange = service_fn(move |request| {
        let sender = sender.clone();
        async move {
            let (answer, answered) = oneshot::channel();
            let _ = sender.send(Exchange { request, answer });
            // If the sender is dropped, the connection ends.
            answered.await
        }
    });
    let mut server = auto::Builder::new(TokioExecutor::new());
    server.http1().preserve_header_case(true).max_headers(4096);
    server.http2().max_concurrent_streams(100).max_header_list_size(1024 * 1024);
    let _ = server.serve_connection_with_upgrades(TokioIo::new(stream), exchange).await;
}

/// Reads a head from a raw connection, up to and including the empty line.
pub(crate) async fn read_head(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(with_timeout(stream.read_u8()).await.expect("the head is complete"));
    }
    String::from_utf8(head).unwrap()
}
