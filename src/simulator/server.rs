//! The simulator on a loopback port: feature `test-server`.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use http::{Request, Response, StatusCode};
use hyper::{body::Incoming, service::service_fn, upgrade::OnUpgrade};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::{JoinHandle, JoinSet},
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        self, ServerConfig,
        pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    },
};
use tower_service::Service;

use super::{Simulator, SimulatorBody};
use crate::BoxError;

/// Engine.IO's first packet, as the text frame of a WebSocket.
const OPEN_PACKET: &str = r#"0{"sid":"simulated","upgrades":[],"pingInterval":25000,"pingTimeout":20000}"#;

/// A [`Simulator`] on a free port of `127.0.0.1`, HTTP/1.1 and HTTP/2, until it is dropped.
///
/// ```
/// use tower_selam::simulator::{Server, Simulator};
///
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// let server = Server::tls(&Simulator::new()).await?;
/// assert!(server.base_url().starts_with("https://localhost:"));
/// let trusted = server.ca_pem().expect("a certificate authority of its own");
/// # assert!(trusted.starts_with("-----BEGIN CERTIFICATE-----"));
/// # Ok::<(), tower_selam::BoxError>(())
/// # }).unwrap();
/// ```
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    base_url: String,
    ca_pem: Option<String>,
    ca_der: Option<Vec<u8>>,
    accepting: JoinHandle<()>,
    /// Ends the WebSockets, which are no longer the connections' own.
    hang_up: watch::Sender<()>,
}

impl Server {
    /// Serves `simulator` over plain http; HTTP/2 with prior knowledge.
    ///
    /// # Errors
    ///
    /// When no port is to be had.
    pub async fn http(simulator: &Simulator) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let (hang_up, hung_up) = watch::channel(());
        let host = Host { simulator: simulator.clone(), tls: None, hung_up };
        Ok(Self {
            address,
            base_url: format!("http://{address}/v1"),
            ca_pem: None,
            ca_der: None,
            accepting: tokio::spawn(host.accept(listener)),
            hang_up,
        })
    }

    /// Serves `simulator` over TLS as `localhost`, with a certificate made for it; HTTP/2 by ALPN.
    ///
    /// # Errors
    ///
    /// When no port is to be had or the certificate cannot be made.
    pub async fn tls(simulator: &Simulator) -> Result<Self, BoxError> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let identity = Identity::new()?;
        let tls = Some(TlsAcceptor::from(Arc::new(identity.config)));
        let (hang_up, hung_up) = watch::channel(());
        let host = Host { simulator: simulator.clone(), tls, hung_up };
        Ok(Self {
            address,
            base_url: format!("https://localhost:{}/v1", address.port()),
            ca_pem: Some(identity.ca_pem),
            ca_der: Some(identity.ca_der),
            accepting: tokio::spawn(host.accept(listener)),
            hang_up,
        })
    }

    /// The base URL to give to a client.
    #[must_use]
    pub fn base_url(&self) -> &str {
        &self.base_url
    }

    /// Where it listens.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// The certificate authority that clients have to trust, in PEM; `None` without TLS.
    #[must_use]
    pub fn ca_pem(&self) -> Option<&str> {
        self.ca_pem.as_deref()
    }

    /// The same in DER.
    #[must_use]
    pub fn ca_der(&self) -> Option<&[u8]> {
        self.ca_der.as_deref()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.accepting.abort();
        self.hang_up.send_replace(());
    }
}

struct Identity {
    config: ServerConfig,
    ca_pem: String,
    ca_der: Vec<u8>,
}

impl Identity {
    fn new() -> Result<Self, BoxError> {
        let mut authority = CertificateParams::new([])?;
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority_key = KeyPair::generate()?;
        let authority_certificate = authority.self_signed(&authority_key)?;

        let key = KeyPair::generate()?;
        let names = ["localhost", "127.0.0.1", "::1"].map(str::to_owned);
        let certificate = CertificateParams::new(names)?
            .signed_by(&key, &Issuer::from_params(&authority, &authority_key))?;

        let private = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], private)?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Self { config, ca_pem: authority_certificate.pem(), ca_der: authority_certificate.der().to_vec() })
    }
}

/// What a connection is served with.
#[derive(Clone)]
struct Host {
    simulator: Simulator,
    tls: Option<TlsAcceptor>,
    hung_up: watch::Receiver<()>,
}

impl Host {
    async fn accept(self, listener: TcpListener) {
        // Aborts them all when this task is.
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => {
                    if let Ok((stream, _)) = accepted {
                        connections.spawn(self.clone().connection(stream));
                    }
                }
                Some(_) = connections.join_next() => {}
            }
        }
    }

    async fn connection(self, stream: TcpStream) {
        // Without it, small frames wait for acknowledgements.
        let _ = stream.set_nodelay(true);
        match self.tls.clone() {
            None => self.serve(stream).await,
            Some(tls) => {
                if let Ok(stream) = tls.accept(stream).await {
                    self.serve(stream).await;
                }
            }
        }
    }

    async fn serve(self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let service = service_fn(move |request| self.clone().exchange(request));
        let server = auto::Builder::new(TokioExecutor::new());
        // A client that goes away is no concern of the simulator's.
        let _ = server.serve_connection_with_upgrades(TokioIo::new(stream), service).await;
    }

    async fn exchange(mut self, mut request: Request<Incoming>) -> Result<Response<SimulatorBody>, BoxError> {
        let upgrade = hyper::upgrade::on(&mut request);
        let response = self.simulator.call(request).await?;
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            tokio::spawn(async move {
                tokio::select! {
                    _ = self.hung_up.changed() => {}
                    _ = speak_websocket(upgrade) => {}
                }
            });
        }
        Ok(response)
    }
}

/// Says hello as Socket.IO does, then listens until the caller hangs up or says that it will.
async fn speak_websocket(upgrade: OnUpgrade) -> Result<(), BoxError> {
    // RFC 6455 section 5.2: the last frame of a message, with the opcode of text or close.
    const TEXT: u8 = 0x81;
    const CLOSE: u8 = 0x88;

    let mut stream = TokioIo::new(upgrade.await?);
    // Unmasked, and below 126 bytes.
    stream.write_all(&[TEXT, OPEN_PACKET.len() as u8]).await?;
    stream.write_all(OPEN_PACKET.as_bytes()).await?;
    stream.flush().await?;
    let mut heard = [0; 1024];
    while stream.read(&mut heard).await? > 0 {
        if heard[0] == CLOSE {
            stream.write_all(&[CLOSE, 0]).await?;
            break;
        }
    }
    stream.shutdown().await?;
    Ok(())
}
